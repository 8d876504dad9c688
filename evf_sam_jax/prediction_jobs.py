"""Which image files are predicted and what is asked of each: files, folders, globs, JSON lines.

A line of a JSON lines file is an object such as

    {"image": "photos/a.jpg", "texts": ["the red cup", "its handle"]}
    {"image": "b.jpg", "text": "the dog", "points": [[310, 95, 1], [20, 20, 0]]}
    {"image": "b.jpg", "box": [100, 40, 420, 300]}

"image" is relative to the file's folder; points are (x, y, 1 inside or 0 outside) and a box is
(x0, y0, x1, y1), in pixels of the image. Points and a box belong to each phrase of their line, or
ask alone where it has none. "text_ids" are for models without a tokenizer.
"""

import dataclasses
import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.image_input import FORMATS
from evf_sam_jax.errors import UserError

KEYS = ("image", "text", "texts", "text_ids", "points", "box")


@dataclasses.dataclass(frozen=True)
class FileJob:
    """What is asked of one image file: k prompts, one a phrase, or one without a phrase.

    Attributes:
      where: what messages call it.
      image: the file.
      texts: k phrases; or
      text_ids: k phrases as token ids; or both empty.
      points: (x, y, 1 or 0) of every prompt, in pixels of the image; unchecked.
      box: (x0, y0, x1, y1) of every prompt; unchecked.
    """

    where: str
    image: Path
    texts: tuple[str, ...] = ()
    text_ids: tuple[tuple[int, ...], ...] = ()
    points: tuple[tuple[float | int, ...], ...] = ()
    box: tuple[float | int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What each prompt is called: its phrase, or what else there is."""
        ids = tuple(" ".join(map(str, phrase)) for phrase in self.text_ids)
        kinds = [name for name in ("points", "box") if getattr(self, name)]
        return self.texts or ids or (" and ".join(kinds),)

    def arguments(self) -> dict[str, Any]:
        """The prompts as `Predictor.predict` takes them."""
        k = len(self.names)
        given: dict[str, Any] = {}
        if self.texts:
            given["texts"] = self.texts
        if self.text_ids:
            given["text_ids"] = self.text_ids
        if self.points:
            given["points"] = [[point[:2] for point in self.points]] * k
            given["point_labels"] = [[point[2] for point in self.points]] * k
        if self.box:
            given["boxes"] = [self.box] * k
        return given


def with_prefix(job: FileJob, prefix: str) -> FileJob:
    """Returns the job with a prefix before every phrase that does not begin with it."""
    texts = tuple(text if text.startswith(prefix.strip()) else prefix + text for text in job.texts)
    return dataclasses.replace(job, texts=texts)


def image_files(names: Sequence[str]) -> list[Path]:
    """Returns the image files that are named: by a path, a folder, or a pattern such as "*.jpg".

    Of a folder, files whose ending is that of an image that can be read, by name; its folders are
    not looked into. Each file is returned once.

    Raises:
      UserError: a folder has no images or cannot be read, or nothing matches a pattern.
    """
    read = (*FORMATS, "MPO")
    endings = [end for end, kind in Image.registered_extensions().items() if kind in read]
    files: list[Path] = []
    for name in names:
        try:
            files += _named_files(name, endings)
        except OSError as error:
            raise UserError(f"--image: cannot read {name[:80]}: {error.strerror}") from None
    return list(dict.fromkeys(files))


def _named_files(name: str, endings: Sequence[str]) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = [f for f in sorted(path.iterdir()) if f.suffix.lower() in endings]
        if not found:
            raise UserError(f"--image: expected images in the folder {name}, found none")
        return found
    if not path.exists() and glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        found = [match for match in matches if not match.is_dir()]
        if not found:
            raise UserError(f"--image: expected files that match {name!r}, found none")
        return found
    return [path]


def read_jobs(path: str | os.PathLike) -> list[FileJob]:
    """Reads a JSON lines file; empty lines count as none.

    Raises:
      UserError: it cannot be read, has no job, or a line is none; the line is named.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--jobs: cannot read {path}: {error.strerror}") from None
    jobs = [
        _parse_line(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not jobs:
        raise UserError(f"--jobs: expected a job a line in {path}, found none")
    return jobs


def _parse_line(line: bytes, where: str, folder: Path) -> FileJob:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # not json, not text, too deep
        raise UserError(f"{where}: expected a json object, found {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a json object, found {str(record)[:40]!r}")
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        raise UserError(f"{where}: expected the keys {', '.join(KEYS)}, found {unknown[0]!r}")
    image = record.get("image")
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: 'image': expected the path of a file, found {image!r}")
    given = [key for key in ("text", "texts", "text_ids") if key in record]
    if len(given) > 1:
        raise UserError(f"{where}: expected one of text, texts and text_ids, found {given}")
    job = FileJob(
        where,
        folder / image,
        _texts(record, where),
        tuple(tuple(ids) for ids in _rows(record, "text_ids", where, None)),
        tuple(tuple(point) for point in _rows(record, "points", where, 3)),
        tuple(_rows({"box": [record["box"]]}, "box", where, 4)[0]) if "box" in record else (),
    )
    if not (job.texts or job.text_ids or job.points or job.box):
        raise UserError(f"{where}: expected texts, text_ids, points or a box, found none of them")
    return job


def _texts(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "text" in record:
        texts = [record["text"]]
    else:
        texts = record.get("texts", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: 'texts': expected a list of strings (or one as 'text'), "
            f"found {str(texts)[:40]!r}"
        )
    if not all(text.strip() for text in texts):
        raise UserError(f"{where}: expected phrases of words, found an empty one")
    return tuple(texts)


def _rows(record: Mapping[str, Any], key: str, where: str, length: int | None) -> list[list[Any]]:
    """Lists of numbers, each of a length; None: of any, of whole numbers."""
    rows = record.get(key, [])
    kind = int if length is None else (int, float)

    def is_row(row: Any) -> bool:
        return (
            isinstance(row, list)
            and (length is None or len(row) == length)
            and all(isinstance(x, kind) and not isinstance(x, bool) for x in row)
        )

    if not isinstance(rows, list) or not all(map(is_row, rows)):
        form = {
            "text_ids": "lists of token ids",
            "points": "a list of [x, y, 1 or 0]",
            "box": "[x0, y0, x1, y1]",
        }[key]
        raise UserError(f"{where}: {key!r}: expected {form}, found {str(record[key])[:40]!r}")
    return rows
