"""RefCOCO's family as Parquet of the Hugging Face Hub, beside COCO's images or with images inside.

Annotations alone (jxu124/refcoco, refcocoplus, refcocog) give what the publishers' own files give.
Two forms carry their images and are for evaluation only. lmms-lab/RefCOCO and its like have no
train split, and of each mask one flat list of coordinates: of an object in several parts that list
is not its mask, and `val` of RefCOCO has 8,811 rows where the publishers' has 3,811 refs, so its
figures are not those of `refcoco`. moondream/refcoco-m is the validation split with new masks.

Reference: hustvl/EVF-SAM at 9935dc5, utils/refer.py and utils/refer_seg_dataset.py:140-215.

Differences: the original reads the publishers' pickles only; see `data_pipelines.refer`. Names of
categories are in refcoco-m alone.
"""

import contextlib
import functools
import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import ArrowException, parquet

from data_pipelines.coco_json import PresentFiles, missing_image
from data_pipelines.dataset import Dataset
from data_pipelines.image_input import FORMATS, decode_image
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.refer import PUBLISHED
from data_pipelines.segmentations import (
    SegmentationError,
    encode_drawable_parts,
    encode_segmentation,
)
from evf_sam_jax.errors import UserError

IMAGE_FOLDERS = ("train2014", "coco/train2014", "train2017", "coco/train2017")
# What the "split" column, or the name of a file, may say for a split.
_OTHER_NAMES = {"val": ("validation",), "testA": ("test",)}

_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_COCO_NUMBER = re.compile(r"(?<!\d)\d{12}(?!\d)")


class ParquetImages:
    """Images in the column "image" of Parquet files, named "path/of/file.parquet#row".

    The row group read last is kept, since rows are written in the order in which they are read.
    """

    def __init__(self, root: Path):
        self.root = root
        self._lock = threading.Lock()  # Grain reads with several threads
        self._group_begins: dict[str, np.ndarray] = {}
        self._kept: tuple[str, int] | None = None
        self._images: Any = None

    def __reduce__(self):
        return ParquetImages, (self.root,)

    def read(self, index: int, file: str) -> np.ndarray:
        """Upright RGB of a row's image. Raises UserError if it cannot be read."""
        path, _, row = file.rpartition("#")
        return decode_image(self._content(path, int(row)), f"{self.root / path}: row {row}")

    def _content(self, path: str, row: int) -> bytes:
        with self._lock:
            if path not in self._group_begins:
                self._group_begins[path] = _group_begins(self.root / path)
            begins = self._group_begins[path]
            group = int(np.searchsorted(begins, row, "right")) - 1
            if self._kept != (path, group):
                with _opened(self.root / path) as opened:
                    table = opened.read_row_group(group, columns=["image.bytes"])
                self._images, self._kept = table.column("image"), (path, group)
            return self._images[row - int(begins[group])].as_py()["bytes"]


def _group_begins(path: Path) -> np.ndarray:
    with _opened(path) as opened:
        meta = opened.metadata
        counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file. Raises UserError if it is no Parquet, here or while it is read."""

    try:
        with parquet.ParquetFile(path) as opened:
            yield opened
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a readable Parquet file, found: {reason}") from error


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's number and its values in the columns. Raises UserError if a column is missing."""
    number = 0
    with _opened(path) as opened:
        names = opened.schema_arrow.names
        for column in columns:
            if column not in names:
                found = ", ".join(names)
                raise UserError(f"{path}: expected the column {column!r}, found {found}")
        for batch in opened.iter_batches(batch_size=64, columns=list(columns)):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _value(row: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = row.get(key) if isinstance(row, dict) else row
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(one.__name__ for one in kinds)
        raise UserError(f"{where}: expected {key!r} as {expected}, found {str(value)[:40]!r}")
    return value


def _strings(values: list[Any], key: str, where: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{where}: expected {key!r} of strings, found {str(value)[:40]!r}")
    return tuple(values)


def _parquet_files(folder: Path, prefix: str = "") -> list[Path]:
    """The files below a folder, or "data" in it; of a split in several, those missing too."""
    files = sorted((*folder.glob(f"data/{prefix}*.parquet"), *folder.glob(f"{prefix}*.parquet")))
    found: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if shard := _SHARD.match(file.name):
            group = (file.parent, shard["prefix"], int(shard["count"]))
            found.setdefault(group, set()).add(int(shard["number"]))
    missing = [
        place / f"{name}-{number:05}-of-{count:05}.parquet"
        for (place, name, count), numbers in found.items()
        for number in range(count)
        if number not in numbers
    ]
    return [*files, *missing] or [folder / "data" / f"{prefix}*.parquet"]


# Annotations beside COCO's images.


def _annotation_inputs(folder: str, root: Path, split: str) -> tuple[Path, ...]:
    folders = [root / name for name in IMAGE_FOLDERS]
    present = [path for path in folders if path.exists()] or folders[:1]
    return (*_parquet_files(root / folder), *present)


_ANNOTATION_COLUMNS = ("ref_id", "image_id", "split", "sentences", "raw_anns", "raw_image_info")


def _load_annotations(folder: str, root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
    present = PresentFiles(root)
    by_image: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for where, row in _refs_of_split(_parquet_files(root / folder), split):
        by_image.setdefault(_value(row, "image_id", int, where), []).append((where, row))
    for image_id in sorted(by_image):
        where, row = by_image[image_id][0]
        info = _json_object(row, "raw_image_info", where)
        where = f"{where}: raw_image_info"
        name = _value(info, "file_name", str, where)
        height = _value(info, "height", int, where)
        width = _value(info, "width", int, where)
        names = (name, name.removeprefix("COCO_train2014_"))
        places = [f"{images}/{one}" for images in IMAGE_FOLDERS for one in names]
        file = next((place for place in places if place in present), None)
        if file is None:
            for where, _ in by_image[image_id]:
                yield missing_image(where, places[0])
            continue
        targets = []
        for where, row in by_image[image_id]:
            found = _json_object(row, "raw_anns", where).get("segmentation")
            # What cannot be drawn is left out, as of the publishers' files.
            parts, wrong = encode_drawable_parts(found, height, width)
            yield from (Problem(where, what) for what in wrong)
            targets.append(Target(str(row["ref_id"]), _sentences(row, where), parts))
        yield AnnotatedImage(f"coco/{image_id}", file, height, width, tuple(targets))


def _refs_of_split(files: Sequence[Path], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each ref of a split is, and its row. Raises UserError if there is none."""
    wanted = (split, *_OTHER_NAMES.get(split, ()))
    others: set[str] = set()
    any_found = False
    for path in files:
        for number, row in _rows(path, _ANNOTATION_COLUMNS):
            of_ref = _value(row, "split", str, f"{path}: row {number}")
            if of_ref not in wanted:
                others.add(of_ref)
                continue
            any_found = True
            yield f"{path}: ref {_value(row, 'ref_id', int, f'{path}: row {number}')}", row
    if not any_found:
        raise UserError(
            f"{files[0].parent}: expected rows of the split {split}, found those of "
            f"{', '.join(sorted(others)) or 'none'}"
        )


def _json_object(row: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    text = _value(row, key, str, where)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: expected json in {key!r}, found {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a json object in {key!r}, found {text[:40]!r}")
    return value


def _sentences(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The cleaned expressions; early versions of the files have them as one string of json."""
    sentences = row["sentences"]
    if isinstance(sentences, str):
        try:
            sentences = json.loads(sentences)
        except ValueError as error:
            raise UserError(f"{where}: expected json in 'sentences', found {error}") from error
    if not isinstance(sentences, list):
        found = str(sentences)[:40]
        raise UserError(f"{where}: expected a list in 'sentences', found {found!r}")
    return tuple(_value(one, "sent", str, f"{where}: sentences") for one in sentences)


# Images inside.


def _image_inputs(
    folder: str, prefixes: Mapping[str, str], root: Path, split: str
) -> tuple[Path, ...]:
    return tuple(_parquet_files(root / folder, prefixes[split]))


def _image_store(root: Path, split: str) -> ParquetImages:
    return ParquetImages(root)


def _image_id(row: Mapping[str, Any], where: str) -> str:
    """The id of the COCO picture, which is in its name ("COCO_train2014_000000581857_16.jpg")."""
    name = _value(row, "file_name", str, where)
    number = _COCO_NUMBER.search(name)
    if number is None:
        raise UserError(f"{where}: expected a COCO image's name as 'file_name', found {name!r}")
    return f"coco/{int(number[0])}"


def _image_size(row: Mapping[str, Any], where: str) -> tuple[int, int] | Problem:
    """Height and width as the image's header says."""
    content = _value(_value(row, "image", dict, where), "bytes", (bytes, type(None)), where)
    try:
        with Image.open(io.BytesIO(content or b""), formats=FORMATS) as image:
            return image.height, image.width
    except OSError:
        return Problem(where, f"expected an image in 'image', found {len(content or b'')} bytes")


_LMMS_COLUMNS = ("image", "answer", "segmentation", "file_name")


def _load_lmms(files: Sequence[Path], root: Path) -> Iterator[AnnotatedImage | Problem]:
    """One row is a ref with its image, which comes again for each ref of the same picture."""
    images: dict[str, AnnotatedImage] = {}
    targets: dict[str, list[Target]] = {}
    for path in files:
        for number, row in _rows(path, _LMMS_COLUMNS):
            where = f"{path}: row {number}"
            image_id = _image_id(row, where)
            if image_id not in images:
                size = _image_size(row, where)
                if isinstance(size, Problem):
                    yield size
                    continue
                file = f"{path.relative_to(root).as_posix()}#{number}"
                images[image_id] = AnnotatedImage(image_id, file, *size, ())
            image = images[image_id]
            phrases = _strings(_value(row, "answer", list, where), "answer", where)
            polygon = _value(row, "segmentation", list, where)
            try:
                parts = encode_segmentation(polygon, image.height, image.width)
            except SegmentationError as error:
                yield Problem(where, str(error))
                continue
            # Their own "question_id" is not said to be unique.
            target = Target(f"{path.stem}#{number}", phrases, parts)
            targets.setdefault(image_id, []).append(target)
    for image_id, of_image in targets.items():
        image = images[image_id]
        yield AnnotatedImage(image_id, image.file, image.height, image.width, tuple(of_image))


_REFCOCO_M_COLUMNS = ("image", "file_name", "samples")


def _load_refcoco_m(files: Sequence[Path], root: Path) -> Iterator[AnnotatedImage | Problem]:
    for path in files:
        for number, row in _rows(path, _REFCOCO_M_COLUMNS):
            where = f"{path}: row {number}"
            size = _image_size(row, where)
            if isinstance(size, Problem):
                yield size
                continue
            targets = []
            for sample in _value(row, "samples", list, where):
                target = _refcoco_m_target(sample, size, f"{where}: samples")
                if isinstance(target, Problem):
                    yield target
                else:
                    targets.append(target)
            file = f"{path.relative_to(root).as_posix()}#{number}"
            yield AnnotatedImage(_image_id(row, where), file, *size, tuple(targets))


def _refcoco_m_target(sample: Any, size: tuple[int, int], where: str) -> Target | Problem:
    sample_id = _value(sample, "id", (int, str), where)
    where = f"{where}: id {sample_id}"
    phrases = _strings(_value(sample, "sentences", list, where), "sentences", where)
    mask = _value(sample, "mask", dict, where)
    try:
        parts = encode_segmentation(mask, *size)
    except SegmentationError as error:
        return Problem(where, str(error))
    return Target(str(sample_id), phrases, parts, _value(sample, "category", str, where))


_LoadFiles = Callable[[Sequence[Path], Path], Iterator[AnnotatedImage | Problem]]


def _load_images(
    load: _LoadFiles, folder: str, prefixes: Mapping[str, str], root: Path, split: str
) -> Iterator[AnnotatedImage | Problem]:
    return load(_parquet_files(root / folder, prefixes[split]), root)


# The data sets.


def _targets(counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    return {split: {"targets": count} for split, count in counts.items()}


def _annotation_dataset(name: str, folder: str, splits: tuple[str, ...]) -> Dataset:
    return Dataset(
        f"{name}_parquet",
        splits,
        f"  {folder}/data/*.parquet, as in jxu124/{folder} on the Hugging Face Hub\n"
        f"  {' or '.join(IMAGE_FOLDERS)}/\n"
        "    COCO_train2014_<12 digits>.jpg, or <12 digits>.jpg, in any of the folders",
        inputs=functools.partial(_annotation_inputs, folder),
        load=functools.partial(_load_annotations, folder),
        published=PUBLISHED[name],
    )


def _image_dataset(
    name: str,
    folder: str,
    prefixes: Mapping[str, str],
    load: _LoadFiles,
    note: str,
    published: Mapping[str, Mapping[str, int]] | None = None,
) -> Dataset:
    files = f"{folder}/data/{{{','.join(prefixes.values())}}}*.parquet"
    return Dataset(
        name,
        tuple(prefixes),
        f"  {files}, as in {folder} on the Hugging Face Hub\n  ({note})",
        inputs=functools.partial(_image_inputs, folder, prefixes),
        load=functools.partial(_load_images, load, folder, prefixes),
        evaluation_only=True,
        published=published or {},
        image_store=_image_store,
    )


def _lmms(
    name: str, folder: str, splits: tuple[str, ...], published: Mapping[str, int] | None = None
) -> Dataset:
    note = "for evaluation only: objects of several parts have no proper mask there"
    prefixes = {split: f"{split}-" for split in splits}
    counts = _targets(published or {})
    return _image_dataset(name, f"lmms-lab/{folder}", prefixes, _load_lmms, note, counts)


_TEST_AB = ("train", "val", "testA", "testB")

DATASETS = (
    _annotation_dataset("refcoco", "refcoco", _TEST_AB),
    _annotation_dataset("refcoco+", "refcocoplus", _TEST_AB),
    _annotation_dataset("refcocog", "refcocog", ("train", "val", "test")),
    _image_dataset(
        "refcoco_m",
        "moondream/refcoco-m",
        {"val": "validation-"},
        _load_refcoco_m,
        "for evaluation only: RefCOCO's validation split with new masks",
        {"val": {"images": 1_190, "targets": 2_080, "phrases": 5_598}},
    ),
    _lmms(
        "lmms_refcoco",
        "RefCOCO",
        ("val", "testA", "testB", "test"),
        {"val": 8_811, "testA": 1_975, "testB": 1_810, "test": 5_000},
    ),
    _lmms("lmms_refcoco+", "RefCOCOplus", ("val", "testA", "testB")),
    _lmms("lmms_refcocog", "RefCOCOg", ("val", "test")),
)
