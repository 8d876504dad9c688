"""From the decoder's low-resolution logits to the pixels of the original image, in static shapes.

The original upsamples the decoder's mask to the frame, crops what the image occupied there, and
resizes that to the image, both times bilinearly. All of it is linear and separable, so it is one
matrix a side: `rows @ logits @ columns.T`, without a frame-sized intermediate and without a shape
that depends on the image. The loss, the metrics and prediction share it.

A segmenter that images are stretched for has its masks resized to the image at once.

Reference: `Sam.postprocess_masks` of hustvl/EVF-SAM at 9935dc5, `model/segment_anything/modeling/
sam.py`; `model/evf_effisam.py:247-273`, `model/evf_sam2.py:135-141`; and `upsample_bilinear2d` of
PyTorch (align_corners False, no antialias).

Differences: equal to the chain of `F.interpolate` inside the image up to rounding; zero outside.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def source_positions(
    positions: Float[Array, " n"], scale: Float[Array, ""] | float, size: Int[Array, ""] | int
) -> tuple[Int[Array, " n"], Int[Array, " n"], Float[Array, " n"]]:
    """Returns the two source pixels of each target pixel and the weight of the second one.

    Args:
      positions: target pixels.
      scale: source size / target size.
      size: number of source pixels.
    """
    source = jnp.maximum(scale * (positions + 0.5) - 0.5, 0.0)
    first = jnp.minimum(jnp.floor(source), size - 1.0)
    second = jnp.minimum(first + 1.0, size - 1.0)
    return first.astype(jnp.int32), second.astype(jnp.int32), source - first


def interpolation_matrix(
    content: Int[Array, ""],
    original: Int[Array, ""],
    positions: Int[Array, " n"],
    frame: int,
    low_res: int,
) -> Float[Array, "n l"]:
    """Returns the weights of `low_res` pixels in each pixel at `positions` along one axis.

    Args:
      content: pixels of the frame that the resized image occupies.
      original: pixels of the original image; rows at positions beyond it are zero.
      positions: pixels of the original image.
      frame: side of the frame.
      low_res: side of the decoder's masks.
    """
    scale = content.astype(jnp.float32) / original.astype(jnp.float32)
    in_frame = source_positions(positions.astype(jnp.float32), scale, content)
    cells = jnp.arange(low_res)[None]
    matrix = jnp.zeros((positions.shape[0], low_res), jnp.float32)
    for frame_pixel, frame_weight in (
        (in_frame[0], 1.0 - in_frame[2]),
        (in_frame[1], in_frame[2]),
    ):
        first, second, weight = source_positions(
            frame_pixel.astype(jnp.float32), low_res / frame, low_res
        )
        matrix += jnp.where(cells == first[:, None], (frame_weight * (1.0 - weight))[:, None], 0.0)
        matrix += jnp.where(cells == second[:, None], (frame_weight * weight)[:, None], 0.0)
    return jnp.where((positions < original)[:, None], matrix, 0.0)


def resample_masks(
    low_res_logits: Float[Array, "b k l l"],
    sam_size: Int[Array, "b 2"],
    original_size: Int[Array, "b 2"],
    canvas: tuple[int, int],
    frame: int | None,
    origin: Int[Array, "2"] | tuple[int, int] = (0, 0),
) -> Float[Array, "b k h w"]:
    """Returns logits at the original resolution, top-left on a canvas, zero outside the image.

    Args:
      low_res_logits: the decoder's masks; computed in float32.
      sam_size: height and width of the resized image within the frame.
      original_size: height and width of the original image.
      canvas: height and width of the result.
      frame: side of the segmenter's frame, which the image was padded to; None: the image was
        stretched to all of it, so that masks are resized once, whatever `sam_size` says.
      origin: pixel of the original image at the canvas's top left; traced, so that one compiled
        function computes any tile of an image of any size.
    """
    low_res = low_res_logits.shape[-1]
    if frame is None:  # as if the decoder's mask were the frame, and the image all of it
        frame, sam_size = low_res, jnp.full_like(sam_size, low_res)

    def matrices(axis: int) -> Float[Array, "b n l"]:
        positions = jnp.arange(canvas[axis]) + jnp.asarray(origin)[axis]
        return jax.vmap(
            lambda content, original: interpolation_matrix(
                content, original, positions, frame, low_res
            )
        )(sam_size[:, axis], original_size[:, axis])

    return jnp.einsum(
        "bhi,bkij,bwj->bkhw",
        matrices(0),
        low_res_logits.astype(jnp.float32),
        matrices(1),
        precision=jax.lax.Precision.HIGHEST,
    )
