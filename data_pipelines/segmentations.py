"""Masks as annotation files hold them (polygons, run lengths) to COCO's run lengths, and to pixels.

Every mask of every data set is kept as its parts, each a compressed run-length string of COCO
(pycocotools' `counts`), and becomes pixels when an example is read.

Reference: hustvl/EVF-SAM at 9935dc5, utils/refer.py and utils/refer_seg_dataset.py:176-215.

Differences: overlapping parts are united by default (`overlap="sum"` adds them, as the original
does, so that targets exceed 1); a polygon of two points is refused (pycocotools takes its four
numbers for a box); run lengths that do not fill the image are refused (pycocotools reads past
them).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pycocotools.mask
from jaxtyping import Bool, UInt8

# Its stubs do not know all the forms that it takes.
coco: Any = pycocotools.mask

Overlap = Literal["union", "sum"]
# pycocotools walks along every edge pixel by pixel, and crashes where there are too many.
_LARGEST_COORDINATE = 1e6

OVERLAPS: tuple[Overlap, ...] = ("union", "sum")


class SegmentationError(Exception):
    """What is wrong with one segmentation: "expected ..., found ..."."""


def encode_segmentation(segmentation: Any, height: int, width: int) -> tuple[bytes, ...]:
    """The parts of a COCO segmentation: a list of polygons, a list of run lengths, or one of them.

    Args:
      segmentation: polygons are flat lists x0, y0, x1, y1, ... in pixels; run lengths are
        {"size": [h, w], "counts": list of lengths, or the compressed string}.

    Returns:
      One compressed run-length string a part.

    Raises:
      SegmentationError: it is empty, ill-formed, of another size, or covers no pixel.
    """
    parts, wrong = encode_drawable_parts(segmentation, height, width)
    if wrong:
        raise SegmentationError(wrong[0])
    return parts


def encode_drawable_parts(
    segmentation: Any, height: int, width: int
) -> tuple[tuple[bytes, ...], list[str]]:
    """As `encode_segmentation`, but parts that are ill-formed are left out.

    Returns:
      The other parts, and what is wrong with the segmentation: "expected ..., found ...".
    """
    shapes = [segmentation] if isinstance(segmentation, Mapping) else segmentation
    if not isinstance(shapes, Sequence) or isinstance(shapes, str | bytes):
        return (), [f"expected polygons or run lengths, found {type(segmentation).__name__}"]
    if not shapes:
        return (), ["expected polygons or run lengths, found an empty segmentation"]
    if isinstance(shapes[0], int | float):  # one polygon, without the list around it
        shapes = [shapes]
    parts, wrong = [], []
    for shape in shapes:
        try:
            if isinstance(shape, Mapping):
                parts.append(_encode_run_lengths(shape, height, width))
            else:
                parts.append(_encode_polygon(shape, height, width))
        except SegmentationError as error:
            wrong.append(str(error))
    if not wrong and not any(coco.area(_rle(part, height, width)) for part in parts):
        return (), [f"it covers no pixel of its image of {width} x {height}"]
    return tuple(parts), wrong


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> bytes:
    """The compressed run lengths of a mask."""
    return coco.encode(np.asfortranarray(mask, np.uint8))["counts"]


def encode_box(box: Sequence[float | int], height: int, width: int) -> bytes:
    """The run lengths of a filled box (x, y, width, height).

    Raises:
      SegmentationError: it has other than four numbers, no area, or lies outside the image.
    """
    numbers = _finite_numbers(box)
    if len(numbers) != 4 or min(numbers[2:]) <= 0:
        raise SegmentationError(f"expected a box x, y, width, height, found {list(box)}")
    (encoded,) = coco.frPyObjects(np.array([numbers]), height, width)
    if not coco.area(encoded):
        raise SegmentationError(f"the box covers no pixel of its image of {width} x {height}")
    return encoded["counts"]


def decode_parts(
    parts: Sequence[bytes], height: int, width: int, overlap: Overlap = "union"
) -> UInt8[np.ndarray, "h w"]:
    """The pixels of a mask: 1 inside; with `overlap="sum"` the number of parts at each pixel.

    No parts give an empty mask.
    """
    if not parts:
        return np.zeros((height, width), np.uint8)
    encoded = [_rle(part, height, width) for part in parts]
    if len(encoded) == 1:
        return coco.decode(encoded[0])
    if overlap == "union":
        return coco.decode(coco.merge(encoded, intersect=False))
    return coco.decode(encoded).sum(-1, dtype=np.uint8)


def area(parts: Sequence[bytes], height: int, width: int) -> int:
    """Pixels in the union of the parts."""
    if not parts:
        return 0
    return int(coco.area(coco.merge([_rle(part, height, width) for part in parts])))


def _rle(part: bytes, height: int, width: int) -> dict[str, Any]:
    return {"size": [height, width], "counts": part}


def _encode_polygon(polygon: Any, height: int, width: int) -> bytes:
    numbers = _finite_numbers(polygon)
    if len(numbers) % 2:
        raise SegmentationError(f"expected a polygon x, y, x, y, ..., found {len(numbers)} numbers")
    if len(numbers) < 6:
        raise SegmentationError(
            f"expected a polygon of at least 3 points, found {len(numbers) // 2}"
        )
    return coco.frPyObjects([numbers], height, width)[0]["counts"]


def _encode_run_lengths(encoded: Mapping[str, Any], height: int, width: int) -> bytes:
    size = encoded.get("size")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise SegmentationError(f"expected run lengths of size {[height, width]}, found {size}")
    counts = encoded.get("counts")
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    lengths = _run_lengths(counts) if isinstance(counts, bytes) else counts
    if not isinstance(lengths, Sequence) or not all(
        isinstance(length, int) and length >= 0 for length in lengths
    ):
        raise SegmentationError("expected run lengths of 0 or more, found other counts")
    if sum(lengths) != height * width:
        raise SegmentationError(
            f"expected run lengths that add up to {height * width}, found {sum(lengths)}"
        )
    if isinstance(counts, bytes):
        return counts
    uncompressed = {"size": [height, width], "counts": list(lengths)}
    return coco.frPyObjects(uncompressed, height, width)["counts"]


def _run_lengths(counts: bytes) -> list[int]:
    """The lengths in a compressed string, which pycocotools does not check itself.

    Each length is written in groups of five bits, the lowest first, as bytes from 48 on; bit 5 says
    that more follow, bit 4 of the last group is the sign. From the fourth length on, the difference
    to the length two places before is written (cocoapi, common/maskApi.c, `rleToString`).
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts:
        group = byte - 48
        if not 0 <= group < 64:
            raise SegmentationError("expected compressed run lengths, found other characters")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise SegmentationError("expected whole compressed run lengths, found them cut short")
    return lengths


def _finite_numbers(values: Any) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise SegmentationError(f"expected numbers, found {str(values)[:40]}") from None
    if not all(map(math.isfinite, numbers)):
        raise SegmentationError("expected finite coordinates, found others")
    if max(map(abs, numbers), default=0.0) > _LARGEST_COORDINATE:
        raise SegmentationError(f"expected coordinates in pixels, found {max(numbers, key=abs)}")
    return numbers
