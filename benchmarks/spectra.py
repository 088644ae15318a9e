"""The singular spectrum of ΔW, the update of a layer: how many directions carry it.

MultiLoRA (arXiv 2311.11501) claims that its ΔW is less dominated by the top directions than LoRA's, and thus closer to
full fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ of one ΔW, largest first. No measure depends on the scale of ΔW; all are NaN for ΔW = 0.

    ``values`` (k,) may omit zeros, which change no measure.
    """

    values: torch.Tensor

    @property
    def cumulative(self) -> torch.Tensor:
        """Σ_{i≤j} σ_i² ÷ Σ σ_i² for j = 1 … k: the share of ‖ΔW‖_F² in the first j directions, shape (k,)."""
        energy = self.values.square().cumsum(0)
        return energy / energy[-1]

    def top(self, k: int) -> float:
        """Return the top-k energy, the share of ‖ΔW‖_F² in the k largest directions."""
        return self.cumulative[:k][-1].item()

    @property
    def effective_rank(self) -> float:
        """exp(H(p)) with p = σ ÷ Σσ and H the Shannon entropy (Roy and Vetterli, EUSIPCO 2007): 1 … rank."""
        return torch.special.entr(self.values / self.values.sum()).sum().exp().item()

    @property
    def participation(self) -> float:
        """The participation ratio (Σσ²)² ÷ Σσ⁴: 1 … rank. Small values count less than in the effective rank."""
        return (self.values.square().sum().square() / self.values.pow(4).sum()).item()


def spectrum_of(delta: torch.Tensor) -> Spectrum:
    """Return the spectrum of ΔW (d_out, d_in), computed in fp64."""
    return Spectrum(torch.linalg.svdvals(delta.detach().double()))


def spectrum_of_factors(b: torch.Tensor, a: torch.Tensor) -> Spectrum:
    """Return the spectrum of ΔW = B' A' with B' (d_out, r) and A' (r, d_in), without computing the product.

    B' = Q_b R_b and A'ᵀ = Q_a R_a, so ΔW = Q_b (R_b R_aᵀ) Q_aᵀ has the singular values of R_b R_aᵀ, at most (r, r).
    """
    r_b = torch.linalg.qr(b.detach().double(), mode="r").R
    r_a = torch.linalg.qr(a.detach().double().T, mode="r").R
    return spectrum_of(r_b @ r_a.T)
