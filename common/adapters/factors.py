"""The update of each layer as two factors: ΔW = B' A', with cores, scales and s folded into B'."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..config.schema import Plan
from ..methods import PRIVATE
from .core import CORE_FORMS
from .inject import scaling_of
from .multilora import fold

Values = Mapping[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer → B' (d_out, r), A' (r, d_in)
A_LEAF = ".lora_A.weight"


def factors_of(values: Values, plan: Plan) -> Factors:
    """Return the factors of every layer, in double precision.

    A shared and a private adapter on the same layer are concatenated along the rank, the shared one first.
    """
    terms: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for key in sorted(key for key in values if key.endswith(A_LEAF)):
        name = key.removesuffix(A_LEAF)
        settings = plan.private if name.startswith(PRIVATE) else plan.adapter
        b = values[f"{name}.lora_B.weight"].double()
        if (core := values.get(f"{name}.lora_core")) is not None:
            b = b @ CORE_FORMS[plan.adapter.core].matrix(core.double())
        if (scale := values.get(f"{name}.lora_scale")) is not None:
            b = fold(b, scale.double())
        layer = name.removeprefix(PRIVATE)
        terms.setdefault(layer, []).append((b * scaling_of(settings, layer), values[key].double()))
    return {layer: _concatenate(pairs) for layer, pairs in sorted(terms.items())}


def difference(whole: Factors, part: Factors) -> Factors:
    """Return factors of ΔW_whole − ΔW_part. The rank grows only where the two have no factor in common."""
    return {layer: _subtract(pair, part[layer]) if layer in part else pair for layer, pair in whole.items()}


def padded(whole: Factors) -> Factors:
    """Return the same products with one rank for all layers, padded with zeros, in fp32."""
    rank = max((b.shape[1] for b, _ in whole.values()), default=0)
    return {
        layer: (
            torch.nn.functional.pad(b, (0, rank - b.shape[1])).float(),
            torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])).float(),
        )
        for layer, (b, a) in whole.items()
    }


def _concatenate(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs], 0)


def _subtract(
    whole: tuple[torch.Tensor, torch.Tensor], part: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    (b, a), (b_part, a_part) = whole, part
    if not b_part.any():
        return whole
    rank = b_part.shape[1]  # the part is the first columns of the whole; a private adapter follows it
    if torch.equal(a[:rank], a_part):
        return torch.cat([b[:, :rank] - b_part, b[:, rank:]], 1), a
    if torch.equal(b[:, :rank], b_part):
        return b, torch.cat([a[:rank] - a_part, a[rank:]], 0)
    return torch.cat([b, -b_part], 1), torch.cat([a, a_part], 0)
