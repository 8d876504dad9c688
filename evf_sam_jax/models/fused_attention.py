"""Kernels that attend without writing scores to memory, and relative positions folded into them.

The kernels are those of the libraries: cuDNN's as `jax.nn.dot_product_attention` calls it, and the
Pallas kernel for TPUs that jax brings along. Neither adds the relative positions of SAM's blocks,
so these become a part of queries and keys: `scale q.k + h[row of k] + w[column of k]` is
`[scale q, h, w] . [k, onehot(row), onehot(column)]`. Queries and keys of ViT-H are then
80 + 64 + 64 numbers wide, and no score has to be kept.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from evf_sam_jax.models.layers import on_each_device

# A kernel: queries, keys and values of a common width to contexts; scores are not scaled.
Kernel = Callable[[Array, Array, Array], Array]

# Queries, and keys, that the kernel for TPUs has at a time.
FLASH_BLOCK = 512
# The last axis of a TPU's registers.
TPU_LANES = 128
# cuDNN's kernels want widths in multiples of this.
CUDNN_MULTIPLE = 8


def attend_fused(
    kernel: Kernel,
    query: Float[Array, "n t d"],
    key: Float[Array, "n t d"],
    value: Float[Array, "n t d"],
    bias_h: Float[Array, "n t s"] | None = None,
    bias_w: Float[Array, "n t s"] | None = None,
    *,
    scale: float,
    multiple: int,
) -> Float[Array, "n t d"]:
    """Returns what `attention.attend_square` returns, by a kernel for `multiple`s in width."""
    query = query * scale
    if bias_h is not None and bias_w is not None:
        query, key = fold_positions(query, key, bias_h, bias_w)
    padded = folded_width(query.shape[-1], 0, multiple)
    query, key, values = (_pad_width(x, padded) for x in (query, key, value))
    return kernel(query, key, values)[..., : value.shape[-1]]


def fold_positions(
    query: Float[Array, "n t d"],
    key: Float[Array, "n t d"],
    bias_h: Float[Array, "n t s"],
    bias_w: Float[Array, "n t s"],
) -> tuple[Float[Array, "n t f"], Float[Array, "n t f"]]:
    """Returns queries and keys whose products are `query.key` plus the biases of a square."""
    n, _, side = bias_h.shape
    rows, columns = jnp.divmod(jnp.arange(side * side), side)
    where = jnp.concatenate([jax.nn.one_hot(x, side, dtype=key.dtype) for x in (rows, columns)], -1)
    where = jnp.broadcast_to(where, (n, *where.shape))
    query = jnp.concatenate([query, bias_h.astype(query.dtype), bias_w.astype(query.dtype)], -1)
    return query, jnp.concatenate([key, where], axis=-1)


def folded_width(width: int, side: int, multiple: int) -> int:
    """How wide queries and keys are with positions of a square of `side`, padded to a multiple."""
    return -(-(width + 2 * side) // multiple) * multiple


def cudnn(
    query: Float[Array, "n t f"],
    key: Float[Array, "n t f"],
    value: Float[Array, "n t f"],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "n t f"]:
    """Attends by cuDNN, in float16 or bfloat16; each device of a mesh its rows.

    Args:
      implementation: "xla" computes the same where there is no cuDNN.
    """
    return jax.nn.dot_product_attention(
        query[:, :, None],  # a row is one head of an image
        key[:, :, None],
        value[:, :, None],
        scale=1.0,
        implementation=implementation,
    )[:, :, 0]


def flash(
    query: Float[Array, "n t f"], key: Float[Array, "n t f"], value: Float[Array, "n t f"]
) -> Float[Array, "n t f"]:
    """Attends by jax's Pallas kernel for TPUs; each device of a mesh its rows."""
    return on_each_device(_flash_rows, kernel=True)(query, key, value)


def _flash_rows(query: Array, key: Array, value: Array) -> Array:
    # Imported where it is used, which is on TPUs alone.
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    block = flash_block(query.shape[1])
    sizes = tpu.BlockSizes(
        block_b=1,
        **dict.fromkeys(
            (
                "block_q",
                "block_k_major",
                "block_k",
                "block_q_major_dkv",
                "block_k_major_dkv",
                "block_k_dkv",
                "block_q_dkv",
                "block_k_major_dq",
                "block_k_dq",
                "block_q_dq",
            ),
            block,
        ),
    )
    attend = functools.partial(tpu.flash_attention, sm_scale=1.0, block_sizes=sizes)
    return attend(query[None], key[None], value[None])[0]  # rows as the heads of one image


def flash_block(tokens: int) -> int:
    """The largest block of at most `FLASH_BLOCK` that divides `tokens`, or 0 if it has no lanes."""
    blocks = range(FLASH_BLOCK, 0, -TPU_LANES)
    return next((block for block in blocks if tokens % block == 0), 0)


def _pad_width(x: Float[Array, "n t d"], width: int) -> Float[Array, "n t f"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))
