"""Sites for heterogeneous linear regression: y = ⟨X, W_k*⟩ + ε with W_k* = U* Λ_k* V*ᵀ, d = 20, r = 3, σ = 0.1."""

from __future__ import annotations

from itertools import cycle

import numpy as np

from ..common.config.schema import Recipe, SimulatedSiteSettings
from ..common.dataset import Row, SiteDataset
from ..common.models.synthetic import regression_rows, regression_truth
from ..common.seeds import seed_from

SOURCES = {"synthetic:regression": False, "synthetic:regression-mixed": True}  # → half of the tasks are unlike the rest
NOISE = 0.1  # standard deviation of ε in the training rows


def truths(recipe: Recipe) -> dict[str, np.ndarray]:
    """Return W_k* by site name, each of shape (20, 20)."""
    assert recipe.partition is not None
    mixed, seed = SOURCES[recipe.data.source], seed_from(recipe.seed, "truth")
    truth = regression_truth(seed, recipe.partition.sites, mixed=mixed)
    return {f"task-{k + 1:02d}": w for k, w in enumerate(truth)}


def regression_sites(recipe: Recipe) -> list[tuple[SimulatedSiteSettings, SiteDataset]]:
    """Return the settings and rows of one site for each of the ``partition.sites`` tasks.

    A site has ``data.train`` training rows (default 40) with noise, and ``data.test`` test rows (default 500) without.
    """
    assert recipe.partition is not None
    sites, ranks = [], cycle(recipe.partition.max_ranks or (None,))
    for (name, truth), max_rank in zip(truths(recipe).items(), ranks, strict=False):
        train = regression_rows(truth, recipe.data.train or 40, NOISE, seed_from(recipe.seed, name, "train"))
        test = regression_rows(truth, recipe.data.test or 500, 0.0, seed_from(recipe.seed, name, "test"))
        dataset = SiteDataset(name, "regression", _rows(train), _rows(test))
        sites.append((SimulatedSiteSettings(name, recipe.data, max_rank=max_rank), dataset))
    return sites


def _rows(arrays: dict[str, np.ndarray]) -> list[Row]:
    return [{"x": x, "y": y} for x, y in zip(arrays["x"], arrays["y"], strict=True)]
