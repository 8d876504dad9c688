"""A segmenter's image in its square frame: normalised, and stretched where the weights expect it.

Reference: hustvl/EVF-SAM, `inference.py` at 9935dc5 (current profile), and before 9d00853 (legacy).

Differences: normalisation and the second resize happen on the device, in static shapes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from evf_sam_jax.mask_geometry import source_positions

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def normalize(image: UInt8[Array, "b s s 3"]) -> Float[Array, "b s s 3"]:
    """Returns (pixels - mean) / standard deviation of each channel, on the scale of 0 to 255."""
    mean = jnp.asarray(PIXEL_MEAN, jnp.float32)[None, None, None]
    std = jnp.asarray(PIXEL_STD, jnp.float32)[None, None, None]
    return (image.astype(jnp.float32) - mean) / std


def normalize_and_stretch(
    image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"], profile: str
) -> Float[Array, "b s s 3"]:
    """Returns a normalised image that fills the frame.

    The legacy profile resizes a second time: what was scaled by its longer side is normalised, then
    stretched bilinearly (align_corners False, no antialias), as `F.interpolate` does.

    Args:
      image: fills the frame already (current), or its content lies top-left (legacy).
      size: height and width of the content; only the legacy profile looks at it.
      profile: "current" or "legacy".
    """
    x = normalize(image)
    if profile == "current":
        return x
    rows, columns = (stretch_matrix(size[:, axis], image.shape[1]) for axis in (0, 1))
    return jnp.einsum("bih,bhwc,bjw->bijc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def stretch_matrix(content: Int[Array, " b"], side: int) -> Float[Array, "b s s"]:
    """Returns the weights of the frame's pixels where the first `content` are resized to `side`."""

    def matrix(content: Int[Array, ""]) -> Float[Array, "s s"]:
        positions, scale = jnp.arange(side, dtype=jnp.float32), content.astype(jnp.float32) / side
        first, second, weight = source_positions(positions, scale, content)
        pixels = jnp.arange(side)[None]
        of_first = jnp.where(pixels == first[:, None], (1.0 - weight)[:, None], 0.0)
        return of_first + jnp.where(pixels == second[:, None], weight[:, None], 0.0)

    return jax.vmap(matrix)(content)
