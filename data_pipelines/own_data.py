"""A user's own images with phrases and masks: as JSON lines, or as a COCO json with phrases.

`own_jsonl`: `<split>.jsonl` with one object of an image a line,

    {"image": "photos/a.jpg", "phrase": "the red cup", "mask": [[10, 10, 60, 10, 60, 80]]}

where "image" is relative to the root; "phrase" is a string or a list of strings; "mask" is a
polygon, a list of polygons, COCO run lengths, a list of these, or the path of a PNG as large as the
upright image (whatever is not 0 is inside). "id" and "category" may be given. Several lines may
name one image.

`own_coco`: `<split>.json` in COCO's format, where each annotation also has "phrases", "phrase" or
"caption" (a string or a list of strings); "category_id" may be left out. Images are in `images/`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.coco_json import CocoFile, CocoImage, PresentFiles, missing_image, read_coco
from data_pipelines.dataset import Dataset
from data_pipelines.image_input import FORMATS, read_size
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.segmentations import SegmentationError, encode_mask, encode_segmentation
from data_pipelines.tokenizers import is_unicode
from evf_sam_jax.errors import UserError

SPLITS = ("train", "val", "test")
# What the ids of images begin with; the name of the file follows.
OWN = "own/"
PHRASE_KEYS = ("phrases", "phrase", "caption")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of a JSON lines file, its types checked.

    Attributes:
      where: "file:line", for messages.
      mask: polygons, run lengths, or the path of a PNG relative to the root.
    """

    where: str
    image: str
    phrases: tuple[str, ...]
    mask: Any
    target_id: str
    category: str


def encode_png(path: Path, height: int, width: int) -> bytes:
    """The run lengths of a mask in an image file: inside is whatever is not 0.

    A palette's indices count, not its colours; alpha does not count.

    Raises:
      SegmentationError: it is missing, no image, of another size, or all 0.
    """
    if not path.is_file():
        raise SegmentationError(f"expected the mask {path}, found nothing there")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.size != (width, height):  # before it is decoded, however large it is
                raise SegmentationError(
                    f"expected a mask as large as the image, {width} x {height}, found {path} of "
                    f"{opened.width} x {opened.height}"
                )
            pixels = np.asarray(opened)
            bands = opened.getbands()
    except SegmentationError:
        raise
    except Exception as error:  # each decoder raises its own
        raise SegmentationError(f"expected a mask as a PNG, found another {path}") from error
    if pixels.ndim == 3:
        pixels = pixels[..., : len(bands) - (bands[-1] == "A")].any(-1)
    mask = pixels != 0
    if not mask.any():
        raise SegmentationError(f"expected a mask that is not 0 everywhere, found {path}")
    return encode_mask(mask)


def _phrases(value: Any, where: str, key: str) -> tuple[str, ...]:
    phrases = [value] if isinstance(value, str) else value
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise UserError(
            f"{where}: {key!r}: expected a string or a list of strings, found {str(value)[:40]!r}"
        )
    return tuple(phrases)


def _worded(phrases: tuple[str, ...], where: str) -> tuple[tuple[str, ...], list[Problem]]:
    """The phrases that have words, and a problem for each kind that has none."""
    text = tuple(phrase for phrase in phrases if is_unicode(phrase))
    kept = tuple(phrase for phrase in text if phrase.strip())
    problems = []
    if len(text) < len(phrases):
        problems.append(Problem(where, "expected Unicode text, found half a character"))
    if not phrases or len(kept) < len(text):
        problems.append(Problem(where, "expected words, found an empty phrase"))
    return kept, problems


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key!r}: expected a string, found {str(record[key])[:40]!r}")
    _check_unicode(record[key], key, where)
    return record[key]


def _check_unicode(text: str, key: str, where: str) -> None:
    if not is_unicode(text):
        raise UserError(f"{where}: {key!r}: expected Unicode text, found {text[:40]!r}")


def _parse_line(text: bytes, number: int, where: str) -> _Line:
    try:
        record = json.loads(text)
    except ValueError as error:  # not json, or not text
        raise UserError(f"{where}: expected a json object, found {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a json object, found {str(record)[:40]!r}")
    for key in ("image", "phrase", "mask"):
        if key not in record:
            found = ", ".join(record) or "none"
            raise UserError(f"{where}: expected the key {key!r}, found {found}")
    image, mask, target_id = _string(record, "image", where), record["mask"], record.get("id")
    for path in (image, mask):
        if isinstance(path, str) and (not path or PurePosixPath(path).is_absolute()):
            raise UserError(f"{where}: expected a path relative to the root, found {path!r}")
    if not isinstance(mask, str | list | dict):
        raise UserError(
            f"{where}: 'mask': expected polygons, run lengths or the path of a PNG, "
            f"found {str(mask)[:40]!r}"
        )
    if not isinstance(target_id, str | int | None):
        raise UserError(
            f"{where}: 'id': expected a string or a whole number, found {str(target_id)[:40]!r}"
        )
    for key, value in (("id", target_id), ("mask", mask)):
        if isinstance(value, str):
            _check_unicode(value, key, where)
    return _Line(
        where,
        PurePosixPath(image).as_posix(),  # "./a.png" is "a.png"
        _phrases(record["phrase"], where, "phrase"),
        mask,
        str(number if target_id is None else target_id),
        "" if record.get("category") is None else _string(record, "category", where),
    )


def _read_lines(path: Path) -> list[_Line]:
    """The lines of a file but for empty ones.

    Raises:
      UserError: a line is ill-formed, or has the id of another.
    """
    lines: list[_Line] = []
    seen: dict[str, str] = {}
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            where = f"{path}:{number}"
            line = _parse_line(text, number, where)
            if line.target_id in seen:
                raise UserError(
                    f"{where}: expected each id once (a line without has its number), "
                    f"found {line.target_id!r} as in {seen[line.target_id]}"
                )
            seen[line.target_id] = where
            lines.append(line)
    return lines


def _lines_path(root: Path, split: str) -> Path:
    return root / f"{split}.jsonl"


def _jsonl_inputs(root: Path, split: str) -> tuple[Path, ...]:
    """The lines, and what the index takes from elsewhere: masks, and which images there are."""
    path = _lines_path(root, split)
    if not path.exists():
        return (path,)
    lines = _read_lines(path)
    named = {root / line.mask for line in lines if isinstance(line.mask, str)}
    for line in lines:
        image = root / line.image
        # The root itself changes when the index is put into it.
        named.add(image if image.parent == root else image.parent)
    return (path, *sorted(place for place in named if place.exists()))


def _load_jsonl(root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
    by_image: dict[str, list[_Line]] = {}
    for line in _read_lines(_lines_path(root, split)):
        by_image.setdefault(line.image, []).append(line)
    present = PresentFiles(root)
    for file, lines in by_image.items():
        if file not in present:
            yield from (missing_image(line.where, file) for line in lines)
            continue
        try:
            height, width = read_size(root / file)
        except UserError as error:
            yield from (Problem(line.where, str(error)) for line in lines)
            continue
        targets = []
        for line in lines:
            phrases, problems = _worded(line.phrases, line.where)
            yield from problems
            try:
                parts = _encode(root, line.mask, height, width)
            except SegmentationError as error:
                yield Problem(line.where, str(error))
                continue
            targets.append(Target(line.target_id, phrases, parts, line.category))
        yield AnnotatedImage(f"{OWN}{file}", file, height, width, tuple(targets))


def _encode(root: Path, mask: Any, height: int, width: int) -> tuple[bytes, ...]:
    if isinstance(mask, str):
        return (encode_png(root / mask, height, width),)
    return encode_segmentation(mask, height, width)


def _coco_inputs(root: Path, split: str) -> tuple[Path, ...]:
    return root / f"{split}.json", root / "images"


def _load_coco(root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
    coco = read_coco(root / f"{split}.json", ("segmentation",))
    for image in coco.images:  # a file without phrases is refused before anything is drawn
        for annotation in image.annotations:
            _coco_phrases(coco, annotation)
    for found in coco.present_images(root, "images"):
        if isinstance(found, Problem):
            yield found
            continue
        image, file = found
        targets = []
        for annotation in image.annotations:
            item = _coco_target(coco, image, annotation)
            if isinstance(item, Problem):
                yield item
                continue
            phrases, problems = _worded(item.phrases, coco.where(annotation))
            yield from problems
            targets.append(dataclasses.replace(item, phrases=phrases))
        yield AnnotatedImage(f"{OWN}{file}", file, image.height, image.width, tuple(targets))


def _coco_target(
    coco: CocoFile, image: CocoImage, annotation: Mapping[str, Any]
) -> Target | Problem:
    category = "" if annotation.get("category_id") is None else coco.category(annotation)
    try:
        parts = encode_segmentation(annotation["segmentation"], image.height, image.width)
    except SegmentationError as error:
        return Problem(coco.where(annotation), str(error))
    return Target(str(annotation["id"]), _coco_phrases(coco, annotation), parts, category)


def _coco_phrases(coco: CocoFile, annotation: Mapping[str, Any]) -> tuple[str, ...]:
    where = coco.where(annotation)
    for key in PHRASE_KEYS:
        if key in annotation:
            return _phrases(annotation[key], where, key)
    expected = " or ".join(map(repr, PHRASE_KEYS))
    raise UserError(f"{where}: expected the key {expected}, found {', '.join(annotation)}")


DATASETS = (
    Dataset(
        "own_jsonl",
        SPLITS,
        '  {train,val,test}.jsonl   one {"image": path, "phrase": words, "mask": polygons} a line\n'
        "  and the images that it names",
        inputs=_jsonl_inputs,
        load=_load_jsonl,
    ),
    Dataset(
        "own_coco",
        SPLITS,
        '  {train,val,test}.json   COCO\'s format, with "phrases" in each annotation\n  images/',
        inputs=_coco_inputs,
        load=_load_coco,
    ),
)
