"""The coordinator's part in the spectral start: the subspaces that the sites' gradients have in common.

B = U and A = Vᵀ, the top-r singular vectors of the sites' gradients side by side, with cores that start at 0. They are
found by a power iteration (``client/training/spectral.py``). The start is that of alternating minimization for
heterogeneous linear regression.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

POWER_ITERATIONS = 15


def orthonormalize(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return B with orthonormal columns and A with orthonormal rows that span the same spaces, in fp32.

    Other arrays (a shared head) are unchanged.
    """
    return {key: _orthonormal(key, array) for key, array in arrays.items()}


def _orthonormal(key: str, array: np.ndarray) -> np.ndarray:
    if ".lora_B." in key:
        return np.linalg.qr(array.astype(np.float64))[0].astype(np.float32)
    if ".lora_A." in key:
        return np.ascontiguousarray(np.linalg.qr(array.T.astype(np.float64))[0].T, dtype=np.float32)
    return array
