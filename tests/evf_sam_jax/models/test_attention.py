"""Attention in tiles gives what whole scores give, with and without relative positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evf_sam_jax.models import attention

ROWS, SIDE, WIDTH = 4, 6, 8
SCALE = WIDTH**-0.5


def drawn(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def operands() -> list[jax.Array]:
    return [drawn(ROWS, SIDE * SIDE, WIDTH, seed=seed) for seed in range(3)]


def biases() -> list[jax.Array]:
    return [drawn(ROWS, SIDE * SIDE, SIDE, seed=seed) for seed in (3, 4)]


@pytest.mark.parametrize("biased", [False, True])
# Whole rows two at a time, a third of the queries of a row, and everything at once.
@pytest.mark.parametrize("tile", [2 * SIDE**4, SIDE**4 // 3, None])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, biased: bool, tile: int | None):
    if tile is not None:
        monkeypatch.setattr(attention, "SMALL_SCORES", 0)
        monkeypatch.setitem(attention.TILE_SCORES, "cpu", tile)
    q, k, v = operands()
    added = biases() if biased else []
    found = attention.attend_square(q, k, v, *added, scale=SCALE)
    scores = SCALE * np.einsum("nqd,nkd->nqk", q, k)
    if biased:
        h, w = (np.asarray(bias) for bias in added)
        scores += (h[..., :, None] + w[..., None, :]).reshape(scores.shape)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("nqk,nkd->nqd", weights, v), atol=1e-5)
