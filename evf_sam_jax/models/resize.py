"""Resizing a table of positions to another grid, as a constant matrix.

Reference: `upsample_bicubic2d` of PyTorch (align_corners False, no antialias), which
`F.interpolate(mode="bicubic")` calls.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

CUBIC_A = np.float32(-0.75)  # torch's; Pillow and JAX use -0.5


@functools.lru_cache(maxsize=512)
def cubic_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 4 source indices and their weights of each target pixel, both [target, 4].

    Edges are repeated. Weights are rounded to float32 where torch rounds them.
    """
    # The scale is rounded to float32, the position once: torch's compiled code uses a fused
    # multiply-add, and without it a position is off by up to 1e-4 of the result.
    scale = np.float64(np.float32(source) / np.float32(target))
    position = (scale * (np.arange(target) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(position)
    t = position - first
    a, one = CUBIC_A, np.float32(1)

    def near(x: np.ndarray) -> np.ndarray:  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(t + one), near(t), near(one - t), far(one - t + one)], axis=1)
    indices = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(indices, 0, source - 1), weights.astype(np.float32)


def bicubic_matrix(source: int, target: int) -> Float32[np.ndarray, "t s"]:
    """Returns the weights of `source` pixels in each of `target` pixels along one axis."""
    indices, weights = cubic_taps(source, target)
    matrix = np.zeros((target, source), np.float32)
    # Near an edge several taps are one pixel.
    np.add.at(matrix, (np.arange(target)[:, None], indices), weights)
    return matrix


def resize_bicubic(grid: Float[Array, "h w c"], height: int, width: int) -> Float[Array, "_ _ c"]:
    """Returns the grid at `height` x `width`, in float32; the matrices are constants."""
    rows = jnp.asarray(bicubic_matrix(grid.shape[0], height))
    columns = jnp.asarray(bicubic_matrix(grid.shape[1], width))
    grid = grid.astype(jnp.float32)
    return jnp.einsum("ih,hwc,jw->ijc", rows, grid, columns, precision=jax.lax.Precision.HIGHEST)
