"""Parts of animals and things: PartImageNet, and PASCAL-Part as VLPart prepares it.

All annotations of one category in an image are one target ("every bird's wing"), one part of its
mask an annotation, so that the rule for overlapping parts is applied when an example is read.

Reference: hustvl/EVF-SAM at 9935dc5, utils/partimagenet_dataset.py:17-158 and
utils/pascal_part_dataset.py:17-168.

Differences: annotations that cannot be drawn are reported, the original passes over them; one that
covers no pixel is left out too, the original takes it for an empty target; validation splits are
read as well.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipelines.coco_json import CocoFile, CocoImage, Id, read_coco, without_suffix
from data_pipelines.dataset import Dataset
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.segmentations import (
    SegmentationError,
    decode_parts,
    encode_mask,
    encode_segmentation,
)
from data_pipelines.source import SEMANTIC_PREFIX, ReadingRules

PARTIMAGENET = "PartImageNet"
PASCAL_PART = "vlpart/pascal_part"
PASCAL_IMAGES = f"{PASCAL_PART}/VOCdevkit/VOC2010/JPEGImages"


def partimagenet_phrase(category: str) -> str:
    """The category in lower case: "Quadruped Head" as "quadruped head"."""
    return category.lower()


def pascal_part_phrase(category: str) -> str:
    """The category without its colon: "bird:head" as "bird head"."""
    return category.replace(":", " ")


def _partimagenet_places(split: str) -> tuple[str, str]:
    """The annotation file and the image folder, relative to the root."""
    return f"{PARTIMAGENET}/annotations/{split}/{split}.json", f"{PARTIMAGENET}/images/{split}"


def _pascal_part_places(split: str) -> tuple[str, str]:
    return f"{PASCAL_PART}/{split}.json", PASCAL_IMAGES


def _merged(
    coco: CocoFile, image: CocoImage, phrase: Callable[[str], str]
) -> tuple[list[Target], list[Problem]]:
    """One target a category, with all that can be drawn of it, in order of first appearance."""
    masks: dict[Id, list[bytes]] = {}
    names: dict[Id, str] = {}
    problems = []
    for annotation in image.annotations:
        name = coco.category(annotation)
        try:
            # Some annotations have no usable segmentation; the key may be missing, too.
            encoded = _one_part(annotation.get("segmentation"), image.height, image.width)
        except SegmentationError as error:
            problems.append(Problem(coco.where(annotation), str(error)))
            continue
        names[annotation["category_id"]] = name
        masks.setdefault(annotation["category_id"], []).append(encoded)
    targets = [
        Target(f"{image.coco_id}/{category}", (phrase(name),), tuple(masks[category]), name)
        for category, name in names.items()
    ]
    return targets, problems


def _one_part(segmentation: object, height: int, width: int) -> bytes:
    """An annotation's polygons, united: the original adds up annotations, not their polygons."""
    parts = encode_segmentation(segmentation, height, width)
    return parts[0] if len(parts) == 1 else encode_mask(decode_parts(parts, height, width) > 0)


def _inputs(places: Callable[[str], tuple[str, str]], root: Path, split: str) -> tuple[Path, ...]:
    return tuple(root / place for place in places(split))


def _load(
    name: str,
    places: Callable[[str], tuple[str, str]],
    phrase: Callable[[str], str],
    root: Path,
    split: str,
) -> Iterator[AnnotatedImage | Problem]:
    annotations, folder = places(split)
    coco = read_coco(root / annotations)
    for found in coco.present_images(root, folder):
        if isinstance(found, Problem):
            yield found
            continue
        image, file = found
        targets, problems = _merged(coco, image, phrase)
        yield from problems
        image_id = f"{name}/{without_suffix(image.file_name)}"
        yield AnnotatedImage(image_id, file, image.height, image.width, tuple(targets))


def _dataset(
    name: str,
    splits: tuple[str, ...],
    layout: str,
    places: Callable[[str], tuple[str, str]],
    phrase: Callable[[str], str],
) -> Dataset:
    return Dataset(
        name,
        splits,
        layout,
        inputs=functools.partial(_inputs, places),
        load=functools.partial(_load, name, places, phrase),
        train_rules=ReadingRules(prefix=SEMANTIC_PREFIX),
        eval_rules=ReadingRules(text="lower", prefix=SEMANTIC_PREFIX),
    )


DATASETS = (
    _dataset(
        "partimagenet",
        ("train", "val", "test"),
        f"  {PARTIMAGENET}/annotations/<split>/<split>.json\n"
        f"  {PARTIMAGENET}/images/<split>/<image>.JPEG",
        _partimagenet_places,
        partimagenet_phrase,
    ),
    _dataset(
        "pascal_part",
        ("train", "val"),
        f"  {PASCAL_PART}/{{train,val}}.json\n  {PASCAL_IMAGES}/<image>.jpg",
        _pascal_part_places,
        pascal_part_phrase,
    ),
)
