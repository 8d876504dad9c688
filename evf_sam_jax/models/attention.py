"""Softmax attention: the one door through which every tower attends.

Scores are never kept whole where they are large. A frame of 64 x 64 tokens and 16 heads has a
gigabyte of them, and on a CPU writing that out and reading it back costs more than the matrix
products do. So a square of tokens is attended in one of three ways, which `method_of` chooses:

  - tiles: XLA computes scores in tiles that stay in the cache, and adds positions to them.
    Where: CPUs; float32 on any device; windows; where neither kernel serves.
    Why: on two CPU cores the same tiles with positions folded into queries and keys take 1.5 to 2.1
    times as long, and XLA's attention with whole scores 3.4 to 4.9 times (medians of
    `benchmarks/attention.py`). cuDNN takes no float32, and TPUs would round it.
  - cudnn: `fused_attention.cudnn`, positions folded into queries and keys.
    Where: whole frames in 16 bits, on NVIDIA GPUs, if no wider with them than cuDNN takes: 256 from
    Hopper on; 128 from Ampere on, where SAM's blocks (192, ViT-H's 208) do not fit, but those
    without positions do, of SAM-2 and EfficientSAM.
    Why: scores never leave the chip.
  - flash: `fused_attention.flash`, positions folded, widths padded to a TPU's 128 lanes.
    Where: whole frames in 16 bits, on TPUs, if no wider than 256.
    Why: as cudnn; wider rows were not tried.

Pallas's kernel has been compiled for TPUs (v5e, v5p) and has run in jax's interpreter. cuDNN's has
run nowhere yet: tests put XLA in its place. No accelerator has timed either;
`EVF_SAM_ATTENTION=xla` in the environment does without them. What is no square (`attend`: BEiT-3's
200 tokens or so, pooled queries, decoders) has few scores, and keeps them.
"""

import dataclasses
import functools
import math
import os
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from evf_sam_jax.errors import UserError
from evf_sam_jax.models import fused_attention
from evf_sam_jax.models.layers import matmul_precision, on_each_device
from evf_sam_jax.models.target import Target, current_target

Method = Literal["tiles", "cudnn", "flash"]

# Scores computed at a time, by backend: 16 MiB of float32 fit the cache that cores share, and their
# matrix products are large enough; an accelerator only needs its memory bounded.
TILE_SCORES = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}
# The most float32 numbers that one instruction of a CPU adds, with AVX-512.
LANES = 16
# Below this many scores in total, tiles cost more than they save.
SMALL_SCORES = 2**23
# Kernels attend to at least so many tokens: those of whole frames.
FUSED_TOKENS = 1024
# The widest queries and keys of a TPU's kernel.
FLASH_WIDTH = 256
# Those of cuDNN's, from each generation of GPUs on: Hopper, Ampere.
CUDNN_WIDTHS = {9.0: 256, 8.0: 128}

# The environment variable that keeps kernels away, where a device does not suit them.
VARIABLE = "EVF_SAM_ATTENTION"


def allowed_target() -> Target:
    """Returns what is traced for, without its kernels if the user does not want them.

    Raises:
      UserError: the environment variable `EVF_SAM_ATTENTION` is neither empty nor "xla".
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "xla"):
        raise UserError(f"environment variable {VARIABLE}: expected xla or nothing, found {wish!r}")
    target = current_target()
    return dataclasses.replace(target, fused=target.fused and not wish)


def method_of(target: Target, dtype: DTypeLike, tokens: int, width: int, side: int) -> Method:
    """Returns how a square of tokens is attended; why is said at the top of this file.

    Args:
      width: of queries, keys and values.
      side: of the square if positions are added, otherwise 0.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if not target.fused or not half or tokens < FUSED_TOKENS:
        return "tiles"
    if target.backend == "gpu":
        folded = fused_attention.folded_width(width, side, fused_attention.CUDNN_MULTIPLE)
        return "cudnn" if folded <= cudnn_width(target) else "tiles"
    folded = fused_attention.folded_width(width, side, fused_attention.TPU_LANES)
    fits = folded <= FLASH_WIDTH and fused_attention.flash_block(tokens)
    return "flash" if target.backend == "tpu" and fits else "tiles"


def cudnn_width(target: Target) -> int:
    """Returns the widest queries and keys that cuDNN's kernels take there; 0: it has none."""
    widths = (width for since, width in CUDNN_WIDTHS.items() if target.capability >= since)
    return max(widths, default=0)


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
    b, queries, heads, _ = query.shape
    scores = _scores(query, key, scale, key_valid, allowed)
    weights, total = _unnormalised(scores, axis=(2,))
    context = _weighted(weights, _by_head(value), query.dtype) / total
    return context.astype(query.dtype).reshape(b, heads, queries, -1).swapaxes(1, 2)


def attention_weights(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    *,
    scale: float,
    key_valid: Bool[Array, "b s"] | None = None,
    allowed: Bool[Array, "q s"] | None = None,
) -> Float32[Array, "b h q s"]:
    """Returns softmax(scale q.k), how much each query attends to each key; see `attend`."""
    b, queries, heads, _ = query.shape
    scores = _scores(query, key, scale, key_valid, allowed)
    return jax.nn.softmax(scores, axis=-1).reshape(b, heads, queries, -1)


def _by_head(x: Float[Array, "b t h d"]) -> Float[Array, "b*h t d"]:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _scores(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s h d"],
    scale: float,
    key_valid: Bool[Array, "b s"] | None,
    allowed: Bool[Array, "q s"] | None,
) -> Float32[Array, "b*h q s"]:
    """What softmax is taken of. CPUs multiply heads one after another much faster than interleaved,
    and add what padding takes away in passing; to select by it is another pass.
    """
    scores = _products(_by_head(query * scale), _by_head(key))
    lowest = jnp.finfo(jnp.float32).min  # absorbs every score that is added to it
    if key_valid is not None:
        added = jnp.where(key_valid, 0.0, lowest)
        scores = scores + jnp.repeat(added, query.shape[2], axis=0)[:, None]
    if allowed is not None:
        # Selected: `lowest` added twice would be -inf, and NaN in a row without any key.
        scores = jnp.where(allowed[None], scores, lowest)
    return scores


def _products(query: Float[Array, "n q d"], key: Float[Array, "n s d"]) -> Float32[Array, "n q s"]:
    return jnp.einsum(
        "nqd,nsd->nqs",
        query,
        key,
        precision=matmul_precision(query.dtype),
        preferred_element_type=jnp.float32,
    )


def _unnormalised(scores: Array, axis: tuple[int, ...]) -> tuple[Array, Float32[Array, "n q 1"]]:
    """Returns softmax's numerators, of at most 1, and the sums that they are to be divided by."""
    # The largest score cancels: nothing is to be learnt through it.
    largest = jax.lax.stop_gradient(scores.max(axis=axis, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, weights.sum(axis=axis)[..., None]


def _weighted(
    weights: Float32[Array, "n q s"], value: Float[Array, "n s d"], dtype: DTypeLike
) -> Float32[Array, "n q d"]:
    return jnp.einsum(
        "nqs,nsd->nqd",
        weights.astype(dtype),
        value,
        precision=matmul_precision(dtype),
        preferred_element_type=jnp.float32,
    )


def attend_square(
    query: Float[Array, "n t d"],
    key: Float[Array, "n t d"],
    value: Float[Array, "n t d"],
    bias_h: Float[Array, "n t s"] | None = None,
    bias_w: Float[Array, "n t s"] | None = None,
    *,
    scale: float,
) -> Float[Array, "n t d"]:
    """Returns softmax(scale q.k + bias) v over a square of s x s = t tokens, as `method_of` says.

    Softmax is computed in float32, products in the dtype of `query`.

    Args:
      query: one row per head of each image or window.
      bias_h: added to the scores of all keys in a row of the square; with `bias_w`, or neither.
      bias_w: added to the scores of all keys in a column of the square.
    """
    positions = () if bias_h is None or bias_w is None else (bias_h, bias_w)
    target = allowed_target()
    _, tokens, width = query.shape
    side = math.isqrt(tokens) if positions else 0
    match method_of(target, query.dtype, tokens, width, side):
        case "cudnn":
            kernel, multiple = fused_attention.cudnn, fused_attention.CUDNN_MULTIPLE
        case "flash":
            kernel, multiple = fused_attention.flash, fused_attention.TPU_LANES
        case "tiles":
            attend_rows = functools.partial(_attend_rows, target.backend, scale)
            return on_each_device(attend_rows)(query, key, value, *positions)
    return fused_attention.attend_fused(
        kernel, query, key, value, *positions, scale=scale, multiple=multiple
    )


def _attend_rows(
    backend: str, scale: float, query: Array, key: Array, value: Array, *biases: Array
) -> Array:
    """`attend_square` of the rows of one device, in tiles."""
    n, tokens, width = query.shape

    def attend_tile(tile: tuple[Array, ...]) -> Float[Array, "r q d"]:
        q, k, v, *added = tile
        scores = _products(q, k)
        flat, keys = scores.shape, (2,)
        if added:
            h, w = (bias.astype(jnp.float32) for bias in added)
            bias = h[..., :, None] + w[..., None, :]
            if bias.shape[-1] % LANES:
                scores = scores + bias.reshape(flat)
            else:  # the same numbers, in less time where rows fill lanes
                scores, keys = scores.reshape(bias.shape) + bias, (2, 3)
        weights, total = _unnormalised(scores, keys)
        return (_weighted(weights.reshape(flat), v, q.dtype) / total).astype(q.dtype)

    query = query * scale
    rows, block = tile_shape(n, tokens, backend)
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
