"""Objects365 with one phrase an object, its category: with the authors' masks, or with boxes.

`objects365` reads the file that the authors of EVF-SAM made of it: masks that a segmenter (SAM 2)
drew from the boxes, of those objects only that are alone of their category in the image.
`objects365_boxes` reads the official detection annotations, and its targets are the filled boxes;
a segmenter prompted with those boxes makes masks of them.

Reference: hustvl/EVF-SAM at 9935dc5, utils/o365_dataset.py:16-125.

Differences: of several run lengths of one annotation all are taken, the original takes the first;
the filter "alone of its category" runs on both files, on the authors' it should find nothing left
to drop; a box marked as a crowd stands for several instances.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.coco_json import CocoImage, read_coco, without_suffix
from data_pipelines.dataset import Dataset
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.segmentations import SegmentationError, encode_box, encode_segmentation

FOLDER = "Object365/raw/Objects365_v1/2019-08-02"
MASK_FILES = {"train": "o365_res_instances.json"}
BOX_FILES = {"train": "objects365_train.json", "val": "objects365_val.json"}

Encode = Callable[[Mapping[str, Any], CocoImage], tuple[bytes, ...]]


def alone_of_their_category(
    annotations: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """Those annotations of an image whose category has one instance there (the paper's filter).

    A category's name then says which object is meant. An annotation with a true "iscrowd" is
    several instances by itself.
    """
    instances = Counter(one["category_id"] for one in annotations)
    return [one for one in annotations if instances[one["category_id"]] == 1 and not is_crowd(one)]


def is_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether a box or mask stands for several instances."""
    return bool(annotation.get("iscrowd"))


def _encode_mask(annotation: Mapping[str, Any], image: CocoImage) -> tuple[bytes, ...]:
    return encode_segmentation(annotation["segmentation"], image.height, image.width)


def _encode_box(annotation: Mapping[str, Any], image: CocoImage) -> tuple[bytes, ...]:
    return (encode_box(annotation["bbox"], image.height, image.width),)


def _inputs(files: Mapping[str, str], root: Path, split: str) -> tuple[Path, ...]:
    return root / FOLDER / files[split], root / FOLDER / split


def _load(
    files: Mapping[str, str], key: str, encode: Encode, root: Path, split: str
) -> Iterator[AnnotatedImage | Problem]:
    coco = read_coco(root / FOLDER / files[split], ("category_id", key))
    for found in coco.present_images(root, f"{FOLDER}/{split}"):
        if isinstance(found, Problem):
            yield found
            continue
        image, file = found
        for annotation in image.annotations:  # before the filter counts them
            coco.category(annotation)
        targets = []
        for annotation in alone_of_their_category(image.annotations):
            name = coco.category(annotation)
            try:
                parts = encode(annotation, image)
            except SegmentationError as error:
                yield Problem(coco.where(annotation), str(error))
                continue
            targets.append(Target(str(annotation["id"]), (name,), parts, name))
        image_id = f"objects365/{without_suffix(image.file_name)}"
        yield AnnotatedImage(image_id, file, image.height, image.width, tuple(targets))


DATASETS = (
    Dataset(
        "objects365",
        tuple(MASK_FILES),
        f"  {FOLDER}/\n"
        "    o365_res_instances.json   (masks: the authors', or by `evf_sam_jax.annotate`)\n"
        "    train/<image>.jpg",
        inputs=functools.partial(_inputs, MASK_FILES),
        load=functools.partial(_load, MASK_FILES, "segmentation", _encode_mask),
    ),
    Dataset(
        "objects365_boxes",
        tuple(BOX_FILES),
        f"  {FOLDER}/\n    objects365_{{train,val}}.json   (the official boxes)\n"
        "    {train,val}/<image>.jpg",
        inputs=functools.partial(_inputs, BOX_FILES),
        load=functools.partial(_load, BOX_FILES, "bbox", _encode_box),
    ),
)
