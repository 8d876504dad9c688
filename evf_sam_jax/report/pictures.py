"""Thumbnails of targets and predictions as data URIs, and the examples that they are drawn from."""

import base64
import io
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipelines.assemble import Example
from data_pipelines.segmentations import decode_parts, encode_drawable_parts
from evf_sam_jax.errors import UserError
from evf_sam_jax.report.evaluated_set import EvaluatedSet
from evf_sam_jax.visualize import COLORS, outline, overlay

SIDE = 288  # pixels of the longer side of a thumbnail
LARGEST = 22_000  # bytes of a thumbnail, so that 250 of them stay below 8 MB as text
WHITE = (255, 255, 255)
_FADE = 0.5  # 0 leaves the image, 1 covers it
_QUALITIES = (82, 70, 55, 40, 25, 10)  # of JPEG, tried in this order

# Gives the image of a set by its place there, with one phrase of it by its place in the image.
ReadExample = Callable[[str, int, int], Example]


def read_matching(read: ReadExample, phrases: EvaluatedSet, row: int) -> Example:
    """The example of one phrase, if it is what was evaluated.

    Raises:
      UserError: the data cannot be read, or is not what it was: another size, phrase or target.
    """
    example = read(phrases.name, int(phrases.image_index[row]), int(phrases.phrase_index[row]))
    height, width = example.image.shape[:2]
    expected = (int(phrases.height[row]), int(phrases.width[row]), phrases.phrase[row])
    found = (height, width, example.phrases[0])
    if found != expected:
        raise UserError(
            f"{phrases.name}, image {phrases.image_id[row]}: expected the image and phrase that "
            f"were evaluated, {expected[1]} x {expected[0]} pixels and {expected[2]!r}, found "
            f"{width} x {height} and {found[2]!r}"
        )
    return example


def predicted_mask(phrases: EvaluatedSet, row: int) -> Bool[np.ndarray, "h w"]:
    """The pixels that the run predicted for a phrase.

    Raises:
      UserError: what is kept of them is no mask of the image's size.
    """
    height, width = int(phrases.height[row]), int(phrases.width[row])
    encoded = {"size": [height, width], "counts": phrases.prediction_rle[row]}
    parts, wrong = encode_drawable_parts(encoded, height, width)
    if wrong and phrases.predicted_pixels[row]:
        raise UserError(
            f"{phrases.name}, image {phrases.image_id[row]}, phrase {phrases.phrase_index[row]}: "
            f"the predicted mask cannot be drawn: {wrong[0]}"
        )
    return decode_parts(parts, height, width) > 0


def thumbnail(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], color: str
) -> tuple[str, tuple[int, int]]:
    """A JPEG of the image, faded outside the mask, as a data URI of at most 4/3 `LARGEST` letters.

    The mask keeps the picture's own colours, since phrases are often about them, and has an edge of
    `color`.

    Args:
      color: a name of `visualize.COLORS`.

    Returns:
      The URI, and width and height in pixels.
    """
    height, width = mask.shape
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    marked = _shrunk(mask, size)
    faded = overlay(small, ~marked, WHITE, _FADE)
    # A white line around, then the coloured edge: seen on objects of any colour.
    painted = outline(outline(faded, _grown(marked), WHITE, 1), marked, COLORS[color], 3)
    return f"data:image/jpeg;base64,{base64.b64encode(_jpeg(painted)).decode()}", size


def _shrunk(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "y x"]:
    """The mask at another size (width, height); what is too small for that is drawn larger."""
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX))
    return share >= 0.5 if (share >= 0.5).any() else _grown(share > 0)


def _grown(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The mask and the pixels beside it."""
    padded = np.pad(mask, 1)
    beside = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.logical_or.reduce([mask, *beside])


def _jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The best quality that is small enough; colour at full resolution, for thin outlines."""
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
        data = buffer.getvalue()
        if len(data) <= LARGEST:
            break
    return data
