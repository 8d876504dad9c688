"""Examples of any data set to one `Batch` in fixed shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from data_pipelines.batch import Batch, CachedFeatures
from data_pipelines.features import Layout
from data_pipelines.tokenizers import BOS_ID, EOS_ID, Tokenizer, pad_token_ids
from data_pipelines.tower_images import TowerImages
from evf_sam_jax.errors import UserError

# The corners of a training box move by up to this share of its sides: people do not draw exact
# boxes.
BOX_JITTER = 0.1


@dataclasses.dataclass(frozen=True)
class Example:
    """What every source yields: an image, its phrases, and the mask of each.

    Attributes:
      example_id: a stable number within the source.
      ignore: true at pixels that count neither as inside nor as outside.
    """

    example_id: int
    image: UInt8[np.ndarray, "h w 3"]
    phrases: tuple[str, ...]
    masks: UInt8[np.ndarray, "k h w"]
    ignore: Bool[np.ndarray, "h w"] | None = None


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shapes of a `Batch`, and what goes into it.

    Attributes:
      batch_size: images of the global batch.
      phrases: k, phrases an image.
      text_length: l, tokens a phrase with `<s>` and `</s>`.
      images: how both towers take an image.
      canvas: height and width that hold every image at its original size.
      prompts: whether to add a click and a box for each target.
      features: of the cache that features of images are read from, in place of the segmenter's
        images; None: there are these images.
      shrink: whether the targets of an image larger than the canvas are shrunk to fit (the model's
        own images are not affected); otherwise it is refused.
    """

    batch_size: int
    phrases: int
    text_length: int
    images: TowerImages = TowerImages()
    canvas: tuple[int, int] = (640, 640)
    prompts: bool = False
    shrink: bool = False
    features: Layout | None = None


@dataclasses.dataclass(frozen=True)
class Slot:
    """One row of a batch: an example, or None for padding.

    Attributes:
      skipped_id: the example that could not be read, which `example` stands in for (or nothing
        does); else -1.
      prompt_seed: what the clicks and boxes are drawn from.
      features: of the example's image, from a cache: values, and scales of int8.
    """

    example: Example | None
    skipped_id: int = -1
    prompt_seed: tuple[int, int] = (0, 0)
    features: Sequence[np.ndarray] = ()


def assemble(slots: Sequence[Slot], spec: BatchSpec, tokenizer: Tokenizer) -> Batch:
    """Resizes, tokenises and pads.

    Of a target that is shrunk to the canvas, `original_size` is the size it has there.

    Raises:
      UserError: an example has more phrases, a phrase more tokens, or an image more pixels than
        `spec` has room for.
    """
    fields = _empty(len(slots), spec)
    fields["skipped_id"][:] = [slot.skipped_id for slot in slots]
    for row, slot in enumerate(slots):
        phrases = () if slot.example is None else slot.example.phrases
        ids = [tokenizer.encode(phrase) for phrase in phrases]
        # Padding is a phrase of no words: attention over it is defined.
        ids += [[BOS_ID, EOS_ID]] * (spec.phrases - len(ids))
        if slot.example is not None:
            _check_room(slot.example, spec)
            _fill(fields, row, slot.example, spec)
            _fill_segmenter(fields, row, slot, spec)
            if spec.prompts:
                _fill_prompts(fields, row, slot.example, slot.prompt_seed, spec.images)
        fields["text_ids"][row], fields["text_valid"][row] = pad_token_ids(ids, spec.text_length)
    return Batch(**fields)


def draw_point(
    mask: UInt8[np.ndarray, "h w"], rng: np.random.Generator
) -> Float32[np.ndarray, " 2"]:
    """(x, y) of a pixel of the mask, each as likely as the others."""
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(inside.size)]), mask.shape[1])
    return np.array([x, y], np.float32)


def draw_box(
    mask: UInt8[np.ndarray, "h w"], rng: np.random.Generator, jitter: float = BOX_JITTER
) -> Float32[np.ndarray, " 4"]:
    """(x0, y0, x1, y1) of the first and last pixels, each moved by up to `jitter` of the side."""
    height, width = mask.shape
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([xs[0], ys[0], xs[-1], ys[-1]], np.float32)
    sides = np.tile(box[2:] - box[:2] + 1, 2)
    box += sides * rng.uniform(-jitter, jitter, 4).astype(np.float32)
    return np.clip(box, 0, np.array([width, height, width, height], np.float32) - 1)


def _check_room(example: Example, spec: BatchSpec) -> None:
    height, width = example.image.shape[:2]
    if not spec.shrink and (height > spec.canvas[0] or width > spec.canvas[1]):
        raise UserError(
            f"example {example.example_id} is {height} x {width}, "
            f"expected at most the canvas of {spec.canvas[0]} x {spec.canvas[1]}"
        )
    if len(example.phrases) > spec.phrases:
        raise UserError(
            f"example {example.example_id} has {len(example.phrases)} phrases, "
            f"expected at most {spec.phrases}"
        )


def _empty(b: int, spec: BatchSpec) -> dict[str, Any]:
    """The fields of a `Batch` of padding."""
    k, length, frame = spec.phrases, spec.text_length, spec.images.frame
    fields: dict[str, Any] = {
        "sam_image": None,
        # Padding has size 1, so that no geometry divides by zero.
        "sam_size": np.ones((b, 2), np.int32),
        "encoder_image": np.zeros((b, *spec.images.encoder_shape), np.float32),
        "text_ids": np.zeros((b, k, length), np.int32),
        "text_valid": np.zeros((b, k, length), bool),
        "phrase_valid": np.zeros((b, k), bool),
        "mask": np.zeros((b, k, *spec.canvas), np.uint8),
        "mask_valid": np.zeros((b, *spec.canvas), bool),
        "original_size": np.ones((b, 2), np.int32),
        "example_id": np.full(b, -1, np.int32),
        "example_valid": np.zeros(b, bool),
        "skipped_id": np.full(b, -1, np.int32),
    }
    if spec.features is None:
        fields["sam_image"] = np.zeros((b, frame, frame, 3), np.uint8)
    else:
        values, scales = spec.features.empty(b)
        fields["image_features"] = CachedFeatures(values, scales, spec.features.finished)
    if spec.prompts:
        fields["points"] = np.zeros((b, k, 1, 2), np.float32)
        fields["boxes"] = np.zeros((b, k, 4), np.float32)
    return fields


def _fill(fields: dict[str, Any], row: int, example: Example, spec: BatchSpec) -> None:
    masks, ignore = _on_canvas(example, spec.canvas)
    height, width = masks.shape[1:]
    k = len(example.phrases)
    fields["encoder_image"][row] = spec.images.encoder(example.image)
    fields["phrase_valid"][row, :k] = True
    fields["mask"][row, :k, :height, :width] = masks
    valid = True if ignore is None else ~ignore
    fields["mask_valid"][row, :height, :width] = valid
    fields["original_size"][row] = height, width
    fields["example_id"][row] = example.example_id
    fields["example_valid"][row] = True


def _fill_segmenter(fields: dict[str, Any], row: int, slot: Slot, spec: BatchSpec) -> None:
    """The segmenter's image, or its features."""
    assert slot.example is not None
    image = slot.example.image
    if spec.features is None:
        _, fields["sam_size"][row] = spec.images.segmenter(image, fields["sam_image"][row])
        return
    fields["sam_size"][row] = spec.images.content(*image.shape[:2])
    cached = fields["image_features"]
    for target, array in zip((*cached.values, *cached.scales), slot.features, strict=True):
        target[row] = array


def _on_canvas(
    example: Example, canvas: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "k h w"], Bool[np.ndarray, "h w"] | None]:
    """Masks and ignored pixels; of an image larger than the canvas, every so manyth pixel.

    Both sides shrink by the same factor; each pixel is the one under its centre.
    """
    height, width = example.image.shape[:2]
    scale = min(canvas[0] / height, canvas[1] / width)
    if scale >= 1:
        return example.masks, example.ignore
    rows = _centres(height, max(1, int(height * scale)))
    columns = _centres(width, max(1, int(width * scale)))
    ignore = None if example.ignore is None else example.ignore[rows[:, None], columns]
    return example.masks[:, rows[:, None], columns], ignore


def _centres(source: int, target: int) -> np.ndarray:
    return ((np.arange(target) + 0.5) * source / target).astype(np.int64)


def _fill_prompts(
    fields: dict[str, Any],
    row: int,
    example: Example,
    seed: tuple[int, int],
    images: TowerImages,
) -> None:
    rng = np.random.Generator(np.random.Philox(key=np.array(seed, np.uint64)))
    height, width = example.image.shape[:2]
    sam_height, sam_width = images.prompt_frame(height, width)
    # Coordinates are scaled as in segment-anything dca509f, utils/transforms.py:33-41.
    scale = np.array([sam_width / width, sam_height / height], np.float32)
    for phrase, mask in enumerate(example.masks):
        if mask.any():
            fields["points"][row, phrase, 0] = draw_point(mask, rng) * scale
            fields["boxes"][row, phrase] = draw_box(mask, rng) * np.tile(scale, 2)
