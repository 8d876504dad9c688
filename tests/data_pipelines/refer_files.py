"""Writes tiny roots of RefCOCO's family in the official layout, with the pickles of Python 2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from data_pipelines.refer import CLEF_IMAGES, COCO_IMAGES

H, W = 30, 40
TRIANGLE, SQUARE = [2, 2, 22, 2, 2, 22], [10, 5, 30, 5, 30, 25, 10, 25]
BLOB = np.zeros((H, W), np.uint8)
BLOB[4:9, 11:30] = 1
RLE = {"size": [H, W], "counts": coco.encode(np.asfortranarray(BLOB))["counts"].decode()}

ANNOTATIONS = {  # annotation id: image id, segmentation
    101: (1, [TRIANGLE]),
    102: (1, [TRIANGLE, SQUARE]),
    103: (2, [SQUARE]),
    104: (2, []),
    105: (3, [[0, 0, 5, 5]]),
    106: (4, [RLE]),
}


def ref(ref_id: int, ann_id: Any, image_id: int, split: str, *phrases: str) -> dict:
    sentences = [
        {"sent_id": 10 * ref_id + i, "raw": p.upper(), "sent": p, "tokens": p.split()}
        for i, p in enumerate(phrases)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 7,
        "image_id": image_id,
        "file_name": f"COCO_train2014_{image_id:012}_{ref_id}.jpg",
        "split": split,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


REFS = [
    ref(1, 101, 1, "train", "Left triangle ", "the triangle"),
    ref(2, 102, 1, "train", "both of them"),
    ref(3, 103, 2, "val", "the square"),
    ref(4, 104, 2, "train", "nothing drawn"),
    ref(5, 105, 3, "testA", "a line"),
    ref(6, 106, 4, "testB", "the blob"),
]


def python_2_pickle(value: Any) -> bytes:
    """What `cPickle.dumps(value)` of Python 2 gives, byte strings and all, but without its memo."""
    return _python_2_opcodes(value) + b"."


def _python_2_opcodes(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case int():
            return b"I%d\n" % value
        case str() if max(value, default="") < "\x80":
            return b"S" + repr(value.encode())[1:].encode() + b"\n"
        case str():  # `unicode`
            return b"V" + value.encode("raw_unicode_escape") + b"\n"
        case list():
            return b"(l" + b"".join(_python_2_opcodes(one) + b"a" for one in value)
        case dict():
            items = value.items()
            return b"(d" + b"".join(
                _python_2_opcodes(key) + _python_2_opcodes(one) + b"s" for key, one in items
            )
    raise TypeError(f"expected plain values, found {type(value)}")


def write_refer_root(
    root: Path,
    refs: list[dict] = REFS,
    folder: str = "refcoco",
    file: str = "refs(unc).p",
    year: int = 2014,
    short_names: bool = False,
) -> Path:
    """Writes `refs` with their instances and images; returns the root.

    Args:
      folder: below `refer_seg`; "refclef" has its images and their names in its own way.
      file: pickled, or json by its name.
      year: of the folder of images.
      short_names: images without "COCO_train2014_"; those of 2017 are always so.
    """
    place = root / "refer_seg" / folder
    place.mkdir(parents=True)
    clef = folder == "refclef"
    names = {i: f"{i}.jpg" if clef else f"COCO_train2014_{i:012}.jpg" for i in (1, 2, 3, 4)}
    instances = {
        "images": [{"id": i, "file_name": n, "height": H, "width": W} for i, n in names.items()],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 7, "segmentation": s, "iscrowd": 0}
            for i, (image, s) in ANNOTATIONS.items()
        ],
        "categories": [{"id": 7, "name": "shape"}],
    }
    (place / "instances.json").write_text(json.dumps(instances))
    content = json.dumps(refs).encode() if file.endswith("json") else python_2_pickle(refs)
    (place / file).write_bytes(content)
    images = root / (CLEF_IMAGES if clef else COCO_IMAGES)[0].replace("2014", str(year))
    images.mkdir(parents=True)
    for i, name in names.items():
        if short_names or year == 2017:
            name = name.removeprefix("COCO_train2014_")
        Image.fromarray(np.full((H, W, 3), 40 * i, np.uint8)).save(images / name)
    return root
