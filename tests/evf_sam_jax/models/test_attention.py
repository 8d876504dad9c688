"""Attention in tiles gives what whole scores give, with and without relative positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evf_sam_jax.models import attention

ROWS, WIDTH = 4, 8
SCALE = WIDTH**-0.5


def drawn(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("side", [6, attention.LANES])
# Whole rows two at a time, a third (or what divides the rows) of their queries, and all at once.
@pytest.mark.parametrize("share", [2, 1 / 3, None])
def test_tiles_change_nothing(
    monkeypatch: pytest.MonkeyPatch, biased: bool, side: int, share: float | None
):
    tokens = side * side
    if share is not None:
        monkeypatch.setattr(attention, "SMALL_SCORES", 0)
        monkeypatch.setitem(attention.TILE_SCORES, "cpu", int(share * tokens**2))
    q, k, v = (drawn(ROWS, tokens, WIDTH, seed=seed) for seed in range(3))
    added = [drawn(ROWS, tokens, side, seed=seed) for seed in (3, 4)] if biased else []
    found = attention.attend_square(q, k, v, *added, scale=SCALE)
    scores = SCALE * np.einsum("nqd,nkd->nqk", q, k)
    if biased:
        h, w = (np.asarray(bias) for bias in added)
        scores += (h[..., :, None] + w[..., None, :]).reshape(scores.shape)
    np.testing.assert_allclose(found, softmax(scores) @ np.asarray(v), atol=1e-5)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores)
    return weights / weights.sum(axis=-1, keepdims=True)


def test_masks_take_keys_away_and_a_query_without_any_attends_evenly():
    images, queries, keys, heads = 2, 5, 7, 3
    q = drawn(images, queries, heads, WIDTH, seed=0)
    k, v = (drawn(images, keys, heads, WIDTH, seed=seed) for seed in (1, 2))
    valid = np.ones((images, keys), bool)
    valid[0, 4:] = False
    valid[1] = False  # all of them
    allowed = np.tri(queries, keys, 2, dtype=bool)
    found = attention.attend(
        q, k, v, scale=SCALE, key_valid=jnp.asarray(valid), allowed=jnp.asarray(allowed)
    )
    scores = SCALE * np.einsum("bqhd,bshd->bhqs", q, k)
    counted = valid[:, None, None, :] & allowed
    weights = softmax(np.where(counted, scores, np.where(counted.any(-1)[..., None], -np.inf, 0)))
    expected = np.einsum("bhqs,bshd->bqhd", weights, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    looked = attention.attention_weights(q, k, scale=SCALE, key_valid=jnp.asarray(valid))
    np.testing.assert_allclose(looked[1], np.full((heads, queries, keys), 1 / keys), atol=1e-6)
