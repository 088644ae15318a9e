"""Settings of differential privacy and secure aggregation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .field_types import STRICT, PositiveFloat


@dataclass(frozen=True, config=STRICT)
class PrivacySettings:
    """Differential privacy for each training example of a site, by DP-SGD (arXiv 1607.00133), and secure aggregation.

    In every round, all trained groups are trained with clipped and noised gradients: the gradients of A and B depend on
    the personal groups, so noise on A and B alone would protect nothing. The final steps are without noise, since
    nothing of them is sent. Without ``epsilon`` and ``noise_multiplier`` there is no differential privacy.
    """

    epsilon: PositiveFloat | None = None
    """Privacy budget of each site for all rounds. A site whose budget is spent takes no part in further rounds. Unset:
    no limit."""

    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability δ with which the guarantee may fail. It should be far below 1 / the number of examples."""

    noise_multiplier: PositiveFloat | None = None
    """Standard deviation of the noise on a sum of clipped gradients, divided by ``max_grad_norm``. Unset: each site
    computes what spends ``epsilon`` over all rounds."""

    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of one example's gradient, over all trained parameters together. It takes the place of
    ``train.max_grad_norm``."""

    metrics: Literal["none", "all"] = "none"
    """Which metrics sites report. They are computed from rows without noise, so that the guarantee holds with ``none``
    only. ``all`` is for simulations."""

    secure_aggregation: bool = False
    """Whether the coordinator receives only the weighted sum of the updates of a round (Bonawitz et al. 2017).
    Experimental: it protects against a coordinator that follows the protocol. It needs ``train.max_update_norm``, which
    sets the range of the fixed-point numbers."""

    min_sites: Annotated[int, Field(ge=2)] = 3
    """Smallest number of sites in a secure sum. With fewer, no sum is opened. Two thirds of the sites on the list of
    a round are needed in any case. A site refuses fewer than its ``allow.min_sites``."""

    @property
    def enabled(self) -> bool:
        """Whether training is differentially private."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @property
    def withholds_metrics(self) -> bool:
        """Whether replies hold no metrics."""
        return self.enabled and self.metrics == "none"


@dataclass(frozen=True, config=STRICT)
class SitePrivacySettings:
    """Differential privacy for each site as a whole, by DP-FedAvg at the coordinator (arXiv 1710.06963).

    ε and δ bound what the shared adapters of all rounds reveal about all data of a site together. They hold against
    other sites and everyone who gets the adapter, not against the coordinator, which sees every update. The table needs
    ``epsilon`` or ``noise_multiplier``, the aggregator ``mean`` and uniform weights.
    """

    epsilon: PositiveFloat | None = None
    """Privacy budget of each site for all rounds. The run ends before a round that would exceed it. Unset: no limit."""

    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability δ with which the guarantee may fail. It must be below 1 / the number of sites."""

    noise_multiplier: PositiveFloat | None = None
    """Standard deviation of the noise on the mean of the updates, divided by what one site can change in it: 2 ·
    ``clip_norm`` / the number of sampled sites. Unset: what spends ``epsilon`` over all rounds."""

    clip_norm: PositiveFloat = 1.0
    """Norm to which the coordinator clips the update of a site, over all shared arrays together. It takes the place of
    ``server.max_relative_norm``."""
