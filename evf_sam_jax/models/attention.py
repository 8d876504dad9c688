"""Softmax attention: the one door through which every tower attends.

Scores are never kept whole where they are large. A frame of 64 x 64 tokens and 16 heads has a
gigabyte of them, and on a CPU writing that out and reading it back costs more than the matrix
products do, so they are computed in tiles that stay in the cache (`benchmarks/image_encoder.py`).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from evf_sam_jax.models.layers import matmul_precision, on_each_device

# Scores computed at a time, by backend: 4 MiB of float32 fit a core's cache; an accelerator only
# needs its memory bounded.
TILE_SCORES = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**28}
# Below this many scores in total, tiles cost more than they save.
SMALL_SCORES = 2**23

_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def tiles_of(backend: str) -> Iterator[None]:
    """What is traced within has the tiles of `backend`; otherwise they are of jax's default one."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    *,
    scale: float,
    key_valid: Bool[Array, "b s"] | None = None,
    allowed: Bool[Array, "q s"] | None = None,
) -> Float[Array, "b q h d"]:
    """Returns softmax(scale q.k) v; softmax in float32, products in the dtype of `query`.

    Keys where `key_valid` is false get no weight, nor do those that a query is not `allowed`. A row
    without any valid key attends evenly, so that padding never turns into NaN.
    """
    weights = attention_weights(query, key, scale=scale, key_valid=key_valid, allowed=allowed)
    weights = weights.astype(query.dtype)
    precision = matmul_precision(query.dtype)
    return jnp.einsum("bhqs,bshd->bqhd", weights, value, precision=precision)


def attention_weights(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    *,
    scale: float,
    key_valid: Bool[Array, "b s"] | None = None,
    allowed: Bool[Array, "q s"] | None = None,
) -> Float32[Array, "b h q s"]:
    """Returns softmax(scale q.k), how much each query attends to each key; see `attend`."""
    scores = jnp.einsum(
        "bqhd,bshd->bhqs",
        query * scale,
        key,
        precision=matmul_precision(query.dtype),
        preferred_element_type=jnp.float32,
    )
    lowest = jnp.finfo(jnp.float32).min
    if key_valid is not None:
        scores = jnp.where(key_valid[:, None, None, :], scores, lowest)
    if allowed is not None:
        scores = jnp.where(allowed[None, None], scores, lowest)
    return jax.nn.softmax(scores, axis=-1)


def attend_square(
    query: Float[Array, "n t d"],
    key: Float[Array, "n t d"],
    value: Float[Array, "n t d"],
    bias_h: Float[Array, "n t s"] | None = None,
    bias_w: Float[Array, "n t s"] | None = None,
    *,
    scale: float,
) -> Float[Array, "n t d"]:
    """Returns softmax(scale q.k + bias) v over a square of s x s = t tokens, tile by tile.

    Softmax is computed in float32, products in the dtype of `query`.

    Args:
      query: one row per head of each image or window.
      bias_h: added to the scores of all keys in a row of the square; with `bias_w`, or neither.
      bias_w: added to the scores of all keys in a column of the square.
    """
    attend_rows = on_each_device(functools.partial(_attend_rows, scale))
    biases = () if bias_h is None or bias_w is None else (bias_h, bias_w)
    return attend_rows(query, key, value, *biases)


def _attend_rows(scale: float, query: Array, key: Array, value: Array, *biases: Array) -> Array:
    """`attend_square` of the rows of one device."""
    n, tokens, width = query.shape
    precision = matmul_precision(query.dtype)

    def attend_tile(tile: tuple[Array, ...]) -> Float[Array, "r q d"]:
        q, k, v, *added = tile
        scores = jnp.einsum(
            "rqd,rkd->rqk", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        if added:
            h, w = (bias.astype(jnp.float32) for bias in added)
            scores = scores + (h[..., :, None] + w[..., None, :]).reshape(scores.shape)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        context = jnp.einsum(
            "rqk,rkd->rqd",
            weights.astype(q.dtype),
            v,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return (context / total).astype(q.dtype)

    query = query * scale
    rows, block = tile_shape(n, tokens, _backend.get() or jax.default_backend())
    if (rows, block) == (n, tokens):
        return attend_tile((query, key, value, *biases))

    def blocks(x: Float[Array, "n t c"]) -> Float[Array, "g r q c"]:
        x = x.reshape(n // rows, rows, tokens // block, block, x.shape[-1])
        return x.swapaxes(1, 2).reshape(-1, rows, block, x.shape[-1])

    def attend_block(tile: tuple[Array, ...]) -> Float[Array, "r q d"]:
        first, q, *added = tile
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, rows) for x in (key, value))
        return attend_tile((q, k, v, *added))

    first = jnp.repeat(jnp.arange(0, n, rows), tokens // block)
    context = jax.lax.map(attend_block, (first, *(blocks(x) for x in (query, *biases))))
    context = context.reshape(n // rows, tokens // block, rows, block, width).swapaxes(1, 2)
    return context.reshape(n, tokens, width)


def tile_shape(n: int, tokens: int, backend: str) -> tuple[int, int]:
    """Returns how many of `n` rows, and how many queries of each, are attended at a time.

    Both divide what they cut, and whole rows come first.
    """
    if n * tokens * tokens <= SMALL_SCORES:
        return n, tokens
    budget = TILE_SCORES.get(backend, TILE_SCORES["gpu"])
    rows = largest_divisor(n, budget // (tokens * tokens))
    block = tokens if tokens * tokens <= budget else largest_divisor(tokens, budget // tokens)
    return rows, block


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` that is at most `limit`, or 1."""
    divisors = (d for d in range(1, math.isqrt(number) + 1) if number % d == 0)
    return max(
        (d for pair in ((d, number // d) for d in divisors) for d in pair if d <= limit), default=1
    )
