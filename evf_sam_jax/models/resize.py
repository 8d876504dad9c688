"""Resizing a table of positions to another grid, as a constant matrix.

Reference: `upsample_bicubic2d` of PyTorch (align_corners False, no antialias), which
`F.interpolate(mode="bicubic")` calls.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from data_pipelines.image_input import cubic_taps


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
