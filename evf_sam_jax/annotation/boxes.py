"""The boxes that masks are made of, from a COCO json, and the json with the masks.

Reference: EVF-SAM's paper, appendix A.2: of an image of Objects365, a category that it has several
instances of is left out.

The file is parsed as a whole: the 10 million boxes of Objects365, 2.2 GB of text, take 8.6 GB of
memory and some minutes (counted on 500,000 made-up boxes), which Python keeps although what the
filter drops is let go. Of the masks, those of a few images are in memory.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from data_pipelines.coco_json import CocoFile, CocoImage, parse_coco, read_json
from data_pipelines.objects365 import alone_of_their_category, is_crowd
from evf_sam_jax.errors import UserError

Box = tuple[float, float, float, float]

SEVERAL = "boxes of categories with several instances in their image"
CROWDS = "boxes of crowds"
NO_AREA = "boxes without area in their image"

_LARGEST_COORDINATE = 1e6


@dataclasses.dataclass(frozen=True)
class BoxedImage:
    """An image with boxes that masks are made of.

    Attributes:
      file_name: relative to the folder of images.
      height: pixels, as the json says.
      width: likewise.
      annotations: its json objects with those boxes, in their order in the file.
    """

    file_name: str
    height: int
    width: int
    annotations: tuple[Mapping[str, Any], ...]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """(x0, y0, x1, y1) of each, within the image."""
        found = (clip_box(one["bbox"], self.height, self.width) for one in self.annotations)
        return tuple(box for box in found if box is not None)


@dataclasses.dataclass(frozen=True)
class BoxFile:
    """What is to be made of a COCO json.

    Attributes:
      rest: the file's content, but for its annotations, whose place in it is empty.
      images: those with boxes, in their order in the file.
      left_out: how many annotations are not among theirs, by reason.
    """

    rest: Mapping[str, Any]
    images: tuple[BoxedImage, ...]
    left_out: Mapping[str, int]


def read_boxes(path: str | os.PathLike, only_alone: bool = True) -> BoxFile:
    """Reads the boxes of a COCO json.

    A box that reaches beyond its image is cut at the edge; nothing of the model lies outside. One
    without area there is left out, after the filter has counted it.

    Args:
      only_alone: only those that are alone of their category in their image (the paper's filter).

    Raises:
      UserError: the file cannot be read or is no COCO json, a box is not four numbers, or there is
        no box that a mask could be made of.
    """
    path = Path(path)
    content = read_json(path)
    coco = parse_coco(path, content, ("category_id", "bbox"))
    left_out: dict[str, int] = {SEVERAL: 0, CROWDS: 0, NO_AREA: 0}
    images = []
    for image in coco.images:
        for annotation in image.annotations:  # before the filter counts them
            coco.category(annotation)
        chosen = [one for one in image.annotations if not is_crowd(one)]
        left_out[CROWDS] += len(image.annotations) - len(chosen)
        if only_alone:
            left_out[SEVERAL] += len(chosen)
            chosen = alone_of_their_category(image.annotations)
            left_out[SEVERAL] -= len(chosen)
        with_area = tuple(one for one in chosen if _has_area(coco, image, one))
        left_out[NO_AREA] += len(chosen) - len(with_area)
        if with_area:
            images.append(BoxedImage(image.file_name, image.height, image.width, with_area))
    if not images:
        found = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        raise UserError(f"{path}: expected boxes to make masks of, found {found or 'none at all'}")
    rest = {key: None if key == "annotations" else value for key, value in content.items()}
    return BoxFile(rest, tuple(images), left_out)


def clip_box(bbox: Any, height: int, width: int) -> Box | None:
    """Returns (x0, y0, x1, y1) of a box of COCO, cut at the edges of its image; None: no area.

    Args:
      bbox: x, y, width, height in pixels.

    Raises:
      UserError: it is not four numbers.
    """
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_coordinate, bbox))):
        raise UserError(f"expected 'bbox' x, y, width, height in pixels, found {str(bbox)[:60]}")
    x, y, box_width, box_height = map(float, bbox)
    x0, x1 = max(0.0, x), min(float(width), x + box_width)
    y0, y1 = max(0.0, y), min(float(height), y + box_height)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _is_coordinate(value: Any) -> bool:
    """Whether it is a number of pixels; a NaN compares as false."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST_COORDINATE


def _has_area(coco: CocoFile, image: CocoImage, annotation: Mapping[str, Any]) -> bool:
    try:
        return clip_box(annotation["bbox"], image.height, image.width) is not None
    except UserError as error:
        raise UserError(f"{coco.where(annotation)}: {error}") from None


def with_mask(annotation: Mapping[str, Any], image: BoxedImage, counts: str) -> dict[str, Any]:
    """The annotation with a mask as `segmentation`, in a list, as the authors' file has it.

    Args:
      counts: compressed run lengths.
    """
    run_lengths = {"size": [image.height, image.width], "counts": counts}
    return {**annotation, "segmentation": [run_lengths]}


def write_masks(
    path: Path, rest: Mapping[str, Any], annotations: Iterable[Mapping[str, Any]]
) -> None:
    """Writes a COCO json, of whose lists one entry at a time is in memory as text.

    Args:
      rest: all but the annotations, whose place is kept.
    """
    with path.open("w", encoding="utf-8") as file:
        for i, (key, value) in enumerate(rest.items()):
            file.write(f"{', ' if i else '{'}{json.dumps(key)}: ")
            entries = annotations if key == "annotations" else value
            if key == "annotations" or isinstance(value, list):
                _write_list(file, entries)
            else:
                file.write(json.dumps(value))
        file.write("}\n")


def _write_list(file: TextIO, entries: Iterable[Any]) -> None:
    file.write("[")
    for i, entry in enumerate(entries):
        file.write((", " if i else "") + json.dumps(entry))
    file.write("]")
