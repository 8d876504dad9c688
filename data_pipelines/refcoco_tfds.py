"""RefCOCO's family as TensorFlow Datasets prepares it: `ref_coco` as array_record, with images.

Reading needs no TensorFlow, preparing does. TFDS keeps the expressions as people typed them
(`raw`), not the cleaned ones (`sent`) that the original reads, so figures of these data sets and of
the publishers' files are not strictly comparable. It unites the parts of each mask, and drops the
ids of refs: a target goes by the id of its annotation.

Reference: hustvl/EVF-SAM at 9935dc5, utils/refer.py and utils/refer_seg_dataset.py:140-215.

Differences: as above; see also `data_pipelines.refer`.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.dataset import Dataset
from data_pipelines.image_input import decode_image
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.refer import PUBLISHED
from data_pipelines.segmentations import encode_mask
from evf_sam_jax.errors import UserError

_INFO = "dataset_info.json"
_SHARD = re.compile(r"-of-(?P<count>\d{5})$")


class TfdsImages:
    """The encoded images of a prepared split, named "<split>#<number of the element>"."""

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        self._elements: Any = None

    def __reduce__(self):
        return TfdsImages, (self.directory, self.split)

    def read(self, index: int, file: str) -> np.ndarray:
        """Upright RGB of an element's image. Raises UserError if it cannot be read."""
        if self._elements is None:
            self._elements = _elements(self.directory, self.split, serialized=True)
        content = _encoded_image(self._elements[int(file.rpartition("#")[2])])
        return decode_image(content, f"{self.directory}: {file}")


def _encoded_image(element: bytes) -> bytes:
    """The image of a serialized element; TFDS's own reader would decode every mask beside it."""
    protos: Any = importlib.import_module("tensorflow_datasets.proto").tf_example_pb2
    example = protos.Example.FromString(element)
    return example.features.feature["image"].bytes_list.value[0]


def _elements(directory: Path, split: str, serialized: bool = False) -> Any:
    """Random access to the elements of a split: serialized, or read except for their images.

    Raises:
      UserError: TFDS is not installed, or cannot read the directory; or its masks are missing.
    """
    try:
        tfds: Any = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UserError(
            "reading what TFDS prepared needs tensorflow-datasets: "
            f"pip install 'evf-sam-jax[tfds]' ({error})"
        ) from None
    how: dict[str, Any] = {"decoders": {"image": tfds.decode.SkipDecoding()}}
    if serialized:
        how = {"deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES}
    try:
        builder = tfds.builder_from_directory(directory)
        features = builder.info.features
        elements = builder.as_data_source(_tfds_split(split), **how)
    except Exception as error:  # TFDS raises what it likes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{directory}: expected a data set prepared by TFDS as array_record, found: {reason}"
        ) from error
    if "objects" not in features or "mask" not in features["objects"].feature:
        raise UserError(
            f"{directory}: expected masks as ref_coco has them since version 1.1.0, found none"
        )
    return elements


def _tfds_split(split: str) -> str:
    return "validation" if split == "val" else split


def _directory(config: str, root: Path) -> Path:
    """The newest version of a configuration."""
    folder = root / "ref_coco" / config
    versions = sorted(folder.glob(f"*/{_INFO}"), key=lambda path: _version(path.parent.name))
    return versions[-1].parent if versions else folder / "1.1.0"


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _inputs(config: str, root: Path, split: str) -> tuple[Path, ...]:
    directory = _directory(config, root)
    name = f"ref_coco-{_tfds_split(split)}.array_record"
    files = sorted(directory.glob(f"{name}*")) or [directory / f"{name}*"]
    if shard := _SHARD.search(files[0].name):  # then all of them must be there
        count = int(shard["count"])
        files = [directory / f"{name}-{i:05}-of-{count:05}" for i in range(count)]
    return (directory / _INFO, *files)


def _image_store(config: str, root: Path, split: str) -> TfdsImages:
    return TfdsImages(_directory(config, root), split)


def _load(config: str, root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
    directory = _directory(config, root)
    elements = _elements(directory, split)
    for number in range(len(elements)):
        element = elements[number]
        objects = element["objects"]
        if not len(objects["mask"]):
            continue
        file = f"{split}#{number}"
        masks = [np.asarray(mask)[..., 0] > 0 for mask in objects["mask"]]  # 1 or 255 inside
        height, width = masks[0].shape
        names = _unique([str(int(one)) for one in objects["id"]])
        targets = []
        for name, mask, raw in zip(names, masks, objects["refexp"]["raw"], strict=True):
            where = f"{directory}: {file}: annotation {name}"
            if mask.shape != (height, width):
                raise UserError(
                    f"{where}: expected a mask of {width} x {height} as its image's first, "
                    f"found {mask.shape[1]} x {mask.shape[0]}"
                )
            parts = (encode_mask(mask),) if mask.any() else ()
            if not parts:
                yield Problem(where, f"it covers no pixel of its image of {width} x {height}")
            targets.append(Target(name, tuple(one.decode() for one in raw), parts))
        image_id = f"coco/{int(element['image/id'])}"
        yield AnnotatedImage(image_id, file, height, width, tuple(targets))


def _unique(names: list[str]) -> list[str]:
    """The names; of one that comes again (two refs of one annotation), with a number behind it."""
    earlier = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}.{n + 1}" if n else name for name, n in zip(names, earlier, strict=True)]


def _dataset(name: str, config: str, splits: tuple[str, ...]) -> Dataset:
    return Dataset(
        name,
        splits,
        f"  ref_coco/{config}/1.1.0/{_INFO}\n"
        f"  ref_coco/{config}/1.1.0/ref_coco-{{train,validation,...}}.array_record-*\n"
        "  (what `tfds build ref_coco --file_format=array_record` writes)",
        inputs=functools.partial(_inputs, config),
        load=functools.partial(_load, config),
        published=PUBLISHED[name.removeprefix("tfds_")],
        image_store=functools.partial(_image_store, config),
    )


_TEST_AB = ("train", "val", "testA", "testB")
_TEST = ("train", "val", "test")

DATASETS = (
    _dataset("tfds_refcoco", "refcoco_unc", _TEST_AB),
    _dataset("tfds_refcoco_google", "refcoco_google", _TEST),
    _dataset("tfds_refcoco+", "refcocoplus_unc", _TEST_AB),
    _dataset("tfds_refcocog", "refcocog_umd", _TEST),
    _dataset("tfds_refcocog_google", "refcocog_google", ("train", "val")),
)
