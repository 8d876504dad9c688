"""`Batch`: the only contract between the data pipelines and the model."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

if TYPE_CHECKING:
    Array = Any  # which of the two it is depends on where the batch is: no type checker knows
else:
    Array = np.ndarray | jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("finished",),
)
@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """What a segmenter has computed of b images before, as it is stored (`features`).

    Attributes:
      values: [b, h, w, c] the embedding, then finer features, finest first; float32, bfloat16, or
        int8.
      scales: [b, c] of each of them where they are int8; else there are none.
      finished: whether they are for the decoder as they are.
    """

    values: tuple[Any, ...]
    scales: tuple[Any, ...] = ()
    finished: bool = True


@dataclasses.dataclass(frozen=True)
class Batch:
    """b examples (images) with k phrases each, in fixed shapes.

    NumPy on the host, `jax.Array` on devices.

    S is the segmenter's frame, (H, W) the canvas that every target is placed on, top-left.

    Attributes:
      sam_image: in the frame as `TowerImages.segmenter` brings it there, top-left or stretched; not
        normalised (normalisation and padding happen on the device).
      sam_size: height and width of the content of `sam_image`.
      encoder_image: resized and normalised for the multimodal encoder (bicubic overshoots, so it
        cannot be uint8); where images differ in size, a fourth channel is 1 inside.
      text_ids: token ids, right-padded.
      text_valid: false at padding.
      phrase_valid: false rows are padding.
      mask: targets at the original resolution; above 1 only where overlapping parts are summed.
      mask_valid: false outside the image and at ignored pixels.
      original_size: height and width of the image on disk.
      example_id: a stable number of the example within its source.
      example_valid: false where the last evaluation batch was padded or a sample could not be read.
      skipped_id: the example that could not be read and was replaced, or -1.
      image_features: features in place of `sam_image`, where they are cached.
      points: one click inside each target, (x, y) in the segmenter's frame (for training on
        clicks and boxes).
      boxes: the box of each target, (x0, y0, x1, y1) in the segmenter's frame.
    """

    sam_image: UInt8[Array, "b S S 3"] | None
    sam_size: Int32[Array, "b 2"]
    encoder_image: Float32[Array, "b h w _"]
    text_ids: Int32[Array, "b k l"]
    text_valid: Bool[Array, "b k l"]
    phrase_valid: Bool[Array, "b k"]
    mask: UInt8[Array, "b k H W"]
    mask_valid: Bool[Array, "b H W"]
    original_size: Int32[Array, "b 2"]
    example_id: Int32[Array, " b"]
    example_valid: Bool[Array, " b"]
    skipped_id: Int32[Array, " b"]
    image_features: CachedFeatures | None = None
    points: Float32[Array, "b k 1 2"] | None = None
    boxes: Float32[Array, "b k 4"] | None = None


_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))


def _flatten(batch: Batch) -> tuple[list[tuple[Any, Any]], None]:
    return [(jax.tree_util.GetAttrKey(name), getattr(batch, name)) for name in _FIELDS], None


def _unflatten(_: None, values: Iterable[Any]) -> Batch:
    # Past `__init__` and the shape checks of the tests: a tree of shardings is a Batch too.
    batch = object.__new__(Batch)
    for name, value in zip(_FIELDS, values, strict=True):
        object.__setattr__(batch, name, value)
    return batch


jax.tree_util.register_pytree_with_keys(Batch, _flatten, _unflatten)


def copied(batch: Batch) -> Batch:
    """The same batch in memory of its own, as NumPy arrays."""
    return jax.tree.map(np.array, batch)
