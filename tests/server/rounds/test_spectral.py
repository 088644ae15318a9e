"""The power iteration of the spectral start finds the singular vectors of all gradients side by side."""

from __future__ import annotations

import numpy as np

from colora.server.rounds.spectral import orthonormalize

A, B = "q.lora_A.weight", "q.lora_B.weight"


def test_orthonormal_factors_span_the_same_spaces() -> None:
    rng = np.random.default_rng(0)
    given = {A: rng.normal(size=(3, 7)).astype(np.float32), B: rng.normal(size=(5, 3)).astype(np.float32)}
    found = orthonormalize(given)
    np.testing.assert_allclose(found[B].T @ found[B], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(found[A] @ found[A].T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(found[B] @ found[B].T @ given[B], given[B], atol=1e-5)
    np.testing.assert_allclose(given[A] @ found[A].T @ found[A], given[A], atol=1e-5)
    assert found[A].dtype == found[B].dtype == np.float32


def test_power_iterations_reach_the_singular_vectors_of_a_numpy_svd() -> None:
    rng = np.random.default_rng(1)
    signal = rng.normal(size=(8, 3)) @ rng.normal(size=(3, 9))
    gradients = [signal * rng.normal() + 0.1 * rng.normal(size=(8, 9)) for _ in range(4)]
    arrays = orthonormalize({A: rng.normal(size=(3, 9)), B: rng.normal(size=(8, 3))})
    for _ in range(15):
        b, a = (arrays[key].astype(np.float64) for key in (B, A))
        arrays = orthonormalize({B: sum(g @ g.T @ b for g in gradients), A: sum(a @ g.T @ g for g in gradients)})
    u = np.linalg.svd(np.hstack(gradients))[0][:, :3]
    v = np.linalg.svd(np.hstack([g.T for g in gradients]))[0][:, :3]
    assert np.linalg.norm(arrays[B] @ arrays[B].T - u @ u.T) < 1e-3
    assert np.linalg.norm(arrays[A].T @ arrays[A] - v @ v.T) < 1e-3
