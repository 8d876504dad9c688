"""What is asked of an image, checked: phrases, points, boxes and masks, in the segmenter's frame.

A job is k prompts of one image as a user gives them, in pixels of that image; here it becomes k
prompts that can be batched with those of any other image. NumPy only.

Reference: facebookresearch/segment-anything at dca509f, `utils/transforms.py` (`apply_coords`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from evf_sam_jax.errors import UserError

INSIDE, OUTSIDE, NO_POINT = 1, 0, -1

# Decoders are compiled for these numbers of points a prompt.
POINT_BUCKETS = (2, 4, 8, 16, 32)
MAX_POINTS = POINT_BUCKETS[-1] - 1  # one place is for the point that stands for no box


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, which gives one mask; it combines whatever is not None or empty.

    Attributes:
      ids: token ids of the phrase.
      points: (x, y) in pixels of the segmenter's frame.
      labels: 1 inside the object, 0 outside.
      box: (x0, y0, x1, y1) in pixels of the frame.
      mask: logits of an earlier mask.
    """

    ids: tuple[int, ...] | None
    points: Float32[np.ndarray, "n 2"]
    labels: Int32[np.ndarray, " n"]
    box: Float32[np.ndarray, "4"] | None
    mask: Float32[np.ndarray, "l l"] | None

    @property
    def kinds(self) -> tuple[bool, bool, bool]:
        """Whether there is a phrase, a point or box, and a mask: alike, prompts go together."""
        return (
            self.ids is not None,
            bool(len(self.points)) or self.box is not None,
            (self.mask is not None),
        )


@dataclasses.dataclass(frozen=True)
class Frame:
    """How an image lies in the segmenter's frame.

    Attributes:
      size: height and width of the image.
      content: height and width of the resized image, at the frame's top left.
      extent: height and width of the image where points and boxes lie: those of its content, or of
        the whole frame where that is stretched.
      low_res: side of a mask as the decoder gives it.
    """

    size: tuple[int, int]
    content: tuple[int, int]
    extent: tuple[int, int]
    low_res: int

    def place(self, points: Float64[np.ndarray, "*s 2"]) -> Float32[np.ndarray, "*s 2"]:
        """Brings (x, y) of the image to the frame, in float64 as the original does."""
        scale = [self.extent[1] / self.size[1], self.extent[0] / self.size[0]]
        return (points * np.asarray(scale)).astype(np.float32)


def make_prompts(
    frame: Frame,
    ids: Sequence[Sequence[int]] | None,
    points: Any = None,
    point_labels: Any = None,
    boxes: Any = None,
    mask_logits: Any = None,
) -> tuple[Prompt, ...]:
    """Checks k prompts in pixels of the image and brings them to the frame.

    Args:
      ids: token ids of k phrases, already checked.
      points: [k, n, 2], (x, y).
      point_labels: [k, n], 1 inside, 0 outside, -1 no point (its coordinates mean nothing).
      boxes: [k, 4], (x0, y0, x1, y1).
      mask_logits: [k, l, l].

    Raises:
      UserError: nothing is given, numbers of prompts differ, an array has another shape or holds
        what is no number, a coordinate is outside the image, or a prompt says nothing.
    """
    if (points is None) != (point_labels is None):
        given = "points" if point_labels is None else "point_labels"
        raise UserError(f"expected points and point_labels together, found {given} alone")
    given = {
        "phrases": ids,
        "points": None if points is None else _array("points", points, (None, None, 2)),
        "point_labels": None
        if point_labels is None
        else _array("point_labels", point_labels, (None, None)),
        "boxes": None if boxes is None else _array("boxes", boxes, (None, 4)),
        "mask_logits": None
        if mask_logits is None
        else _array("mask_logits", mask_logits, (None, frame.low_res, frame.low_res)),
    }
    counts = {name: len(value) for name, value in given.items() if value is not None}
    if not counts:
        raise UserError(
            "expected texts, text_ids, points, boxes or mask_logits, found none of them"
        )
    k = next(iter(counts.values()))
    if k == 0:
        raise UserError("expected at least one prompt, found none")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UserError(f"expected as many of each kind, found {found}")

    by_prompt_points = [(_NO_POINTS, _NO_LABELS)] * k
    if given["points"] is not None:
        by_prompt_points = _points(frame, given["points"], given["point_labels"])
    by_prompt_boxes = _boxes(frame, given["boxes"]) if given["boxes"] is not None else [None] * k
    masks: Sequence[Any] = [None] * k
    if given["mask_logits"] is not None:
        _check_finite("mask_logits", given["mask_logits"])
        masks = given["mask_logits"].astype(np.float32)
    prompts = tuple(
        Prompt(
            None if ids is None else tuple(ids[i]),
            *by_prompt_points[i],
            by_prompt_boxes[i],
            masks[i],
        )
        for i in range(k)
    )
    for i, prompt in enumerate(prompts):
        if not any(prompt.kinds):
            raise UserError(f"expected a point, box, mask or phrase, found none in prompt {i}")
    return prompts


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Points and boxes of r prompts as arrays of one shape, filled up with what does not count.

    Attributes:
      points: in pixels of the frame.
      labels: as SAM has them; -1 is its "not a point", which follows points without a box.
      boxes: in pixels of the frame.
      valid: which points, then which of the two corners a box, count.
    """

    points: Float32[np.ndarray, "r p 2"]
    labels: Int32[np.ndarray, "r p"]
    boxes: Float32[np.ndarray, "r 4"]
    valid: Bool[np.ndarray, "r p+2"]


def stack_geometry(prompts: Sequence[Prompt]) -> Geometry:
    """Returns the points and boxes of prompts in the smallest bucket that holds them."""
    # A place more than points: a prompt of points without a box has SAM's "not a point".
    most = max(len(prompt.points) for prompt in prompts) + 1
    places = next(bucket for bucket in POINT_BUCKETS if most <= bucket)
    r = len(prompts)
    # EfficientSAM encodes where the places are that it fills prompts up with: at -1.
    points, boxes = np.full((r, places, 2), -1.0, np.float32), np.zeros((r, 4), np.float32)
    labels, valid = np.full((r, places), -1, np.int32), np.zeros((r, places + 2), bool)
    for row, prompt in enumerate(prompts):
        n = len(prompt.points)
        points[row, :n], labels[row, :n] = prompt.points, prompt.labels
        valid[row, : n + (n > 0 and prompt.box is None)] = True
        if prompt.box is not None:
            boxes[row], valid[row, places:] = prompt.box, True
    return Geometry(points, labels, boxes, valid)


_NO_POINTS, _NO_LABELS = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)


def _array(name: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """`value` as float64 of a shape, in which None is any number."""
    words = "[" + ", ".join("any" if side is None else str(side) for side in shape) + "]"
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name}: expected an array of numbers {words}") from None
    fits = array.ndim == len(shape) and all(
        side in (None, found) for side, found in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise UserError(f"{name}: expected numbers {words}, found shape {list(array.shape)}")
    return array


def _check_finite(name: str, array: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise UserError(
            f"{name}: expected finite numbers, found {array[tuple(bad[0])]} in prompt {bad[0][0]}"
        )


def _points(
    frame: Frame, points: np.ndarray, labels: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    if points.shape[:2] != labels.shape:
        raise UserError(
            f"expected a label a point, found points {list(points.shape)} "
            f"and point_labels {list(labels.shape)}"
        )
    known = np.isin(labels, (INSIDE, OUTSIDE, NO_POINT))
    if not known.all():
        raise UserError(
            "point_labels: expected 1 (inside), 0 (outside) or -1 (no point), "
            f"found {labels[~known][0]:g}"
        )
    present = labels != NO_POINT
    _check_finite("points", np.where(present[..., None], points, 0.0))
    height, width = frame.size
    for number, (row, there) in enumerate(zip(points, present, strict=True)):
        for x, y in row[there]:
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(
                    f"points: expected pixels of an image of {width} x {height}, "
                    f"found ({x:g}, {y:g}) in prompt {number}"
                )
        if there.sum() > MAX_POINTS:
            raise UserError(
                f"points: expected at most {MAX_POINTS} a prompt, found {there.sum()} "
                f"in prompt {number}"
            )
    return [
        (frame.place(row[there]), label[there].astype(np.int32))
        for row, label, there in zip(points, labels, present, strict=True)
    ]


def _boxes(frame: Frame, boxes: np.ndarray) -> list[np.ndarray]:
    _check_finite("boxes", boxes)
    height, width = frame.size
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"boxes: expected x0 < x1 and y0 < y1 inside an image of {width} x {height}, "
                f"found ({x0:g}, {y0:g}, {x1:g}, {y1:g}) in prompt {number}"
            )
    return list(frame.place(boxes.reshape(-1, 2, 2)).reshape(-1, 4))
