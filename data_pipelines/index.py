"""What the annotations of one split say, in columns on disk: built once, then mapped into memory.

A data set's loader yields `AnnotatedImage`s; `write_index` lays them out as one NumPy file a
column, with offsets where rows vary in length, and `Index` reads any row without reading the rest.
Worker processes map the same files, so an index costs its memory once. Nothing of it depends on
how examples are read: text case, prefixes and the rule for overlapping parts come later.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from evf_sam_jax.errors import UserError
from evf_sam_jax.output_directory import new_directory

FORMAT_VERSION = 1
# Folder beside the data that holds the indices of a root.
INDEX_FOLDER = ".evf_sam_index"


@dataclasses.dataclass(frozen=True)
class Target:
    """One referred object, or all instances of a category, with the phrases for it.

    Attributes:
      target_id: unique within the split: the id of a ref, of an annotation, or of a category in an
        image.
      phrases: as written in the annotations.
      parts: COCO's compressed run lengths, one a part; none: nothing is referred to.
      category: "" where there is none.
    """

    target_id: str
    phrases: tuple[str, ...]
    parts: tuple[bytes, ...]
    category: str = ""


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
    """An image with all that is said about it.

    Attributes:
      image_id: unique within the split, and the same for the same picture in other data sets
        ("coco/581857").
      file: where the image is, relative to the root, with "/".
      height: of the image file, pixels.
      width: likewise.
      ignore: run lengths of pixels that count neither as inside nor as outside; b"": none.
    """

    image_id: str
    file: str
    height: int
    width: int
    targets: tuple[Target, ...]
    ignore: bytes = b""


@dataclasses.dataclass(frozen=True)
class Problem:
    """An annotation that a loader had to leave out, or to take as empty.

    Attributes:
      where: the file and the id.
      what: what was expected, what was found.
    """

    where: str
    what: str


Loader = Callable[[], Iterator[AnnotatedImage | Problem]]


class Index:
    """Random access to the images, targets and phrases of one split.

    Attributes:
      directory: where its columns are.
      meta: name, split, counts, and what `write_index` was given.
      sizes: [images, 2] height and width.
      phrase_begin: [images + 1] first phrase of each image.
      phrase_target: [phrases] the target of each phrase.
      target_category: [targets] row of each target's name in `meta["categories"]`.
    """

    def __init__(self, directory: str | os.PathLike):
        """Raises UserError if it is damaged, or of another version."""
        self.directory = Path(directory)
        try:
            self._map()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.directory}: expected an index of version {FORMAT_VERSION}, found another "
                f"or a damaged one ({error}); remove it, and it is built again"
            ) from error

    def _map(self) -> None:
        self.meta: dict[str, Any] = json.loads((self.directory / "meta.json").read_text("utf-8"))
        if self.meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {self.meta['format_version']}")
        self.sizes = self._array("sizes")
        self.phrase_begin = self._array("phrase_begin")
        self.phrase_target = self._array("phrase_target")
        self.target_category = self._array("target_category")
        self._part_begin = self._array("part_begin")
        self._strings = {name: self._strings_of(name) for name in _STRING_COLUMNS}

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self):
        return Index, (self.directory,)

    def image_id(self, image: int) -> str:
        """The image's id, the same in every data set that has the picture."""
        return self._string("image_id", image).decode()

    def file(self, image: int) -> str:
        """Where the image is, relative to the root."""
        return self._string("file", image).decode()

    def phrases(self, image: int) -> range:
        """The rows of the image's phrases."""
        return range(int(self.phrase_begin[image]), int(self.phrase_begin[image + 1]))

    def phrase(self, phrase: int) -> str:
        """A phrase as written."""
        return self._string("phrase", phrase).decode()

    def target_id(self, target: int) -> str:
        """The id of a ref, an annotation, or a category in an image."""
        return self._string("target_id", target).decode()

    def category(self, target: int) -> str:
        """The name of the target's category, or ""."""
        return self.meta["categories"][int(self.target_category[target])]

    def parts(self, target: int) -> tuple[bytes, ...]:
        """The run lengths of the target's parts."""
        begin, end = self._part_begin[target : target + 2].tolist()
        return tuple(self._string("part", part) for part in range(begin, end))

    def ignore(self, image: int) -> bytes:
        """The run lengths of ignored pixels, or b""."""
        return self._string("ignore", image)

    def annotated(self, image: int) -> AnnotatedImage:
        """All that was written for an image."""
        phrases: dict[int, list[str]] = {}
        for row in self.phrases(image):
            phrases.setdefault(int(self.phrase_target[row]), []).append(self.phrase(row))
        targets = [
            Target(self.target_id(t), tuple(texts), self.parts(t), self.category(t))
            for t, texts in phrases.items()
        ]
        height, width = self.sizes[image].tolist()
        return AnnotatedImage(
            self.image_id(image),
            self.file(image),
            height,
            width,
            tuple(targets),
            self.ignore(image),
        )

    def problems(self) -> list[Problem]:
        """What had to be left out or taken as empty when the index was built."""
        lines = (self.directory / "problems.jsonl").read_text("utf-8").splitlines()
        return [Problem(**json.loads(line)) for line in lines]

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.directory / f"{name}.npy", mmap_mode="r")

    def _strings_of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._array(f"{name}_offset"), self._array(f"{name}_bytes")

    def _string(self, name: str, row: int) -> bytes:
        begins, content = self._strings[name]
        return content[begins[row] : begins[row + 1]].tobytes()


# Columns of byte strings: one row an image, a phrase, a target, or a part of a mask.
_STRING_COLUMNS = ("image_id", "file", "ignore", "phrase", "target_id", "part")


class _Strings:
    """Byte strings end to end, with the offset of each."""

    def __init__(self) -> None:
        self.begins = [0]
        self.content = bytearray()

    def append(self, value: str | bytes) -> None:
        self.content += value.encode() if isinstance(value, str) else value
        self.begins.append(len(self.content))

    def save(self, directory: Path, name: str) -> None:
        np.save(directory / f"{name}_offset.npy", np.array(self.begins, np.int64))
        np.save(directory / f"{name}_bytes.npy", np.frombuffer(self.content, np.uint8))


def write_index(
    directory: str | os.PathLike,
    items: Iterable[AnnotatedImage | Problem],
    meta: dict[str, Any],
) -> Index:
    """Writes what a loader yields; the directory appears whole or not at all.

    A phrase of nothing but white space, a target without phrases and an image without targets are
    left out, the first as a problem.

    Args:
      meta: further entries of the index's own; "name" and "split" are used in messages.

    Raises:
      UserError: an id comes twice, no image is left, or the directory cannot be written.
    """
    name = f"{meta.get('name', 'data')}/{meta.get('split', '')}"
    strings = {column: _Strings() for column in _STRING_COLUMNS}
    sizes: list[tuple[int, int]] = []
    phrase_begin, part_begin = [0], [0]
    phrase_target: list[int] = []
    target_category: list[int] = []
    categories: dict[str, int] = {}
    problems: list[Problem] = []
    seen_images: set[str] = set()
    seen_targets: set[str] = set()
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
            continue
        _check_new(item.image_id, seen_images, f"{name}: image id")
        before = len(phrase_target)
        for target in item.targets:
            _check_new(target.target_id, seen_targets, f"{name}: annotation id")
            phrases = [phrase for phrase in target.phrases if phrase.strip()]
            if len(phrases) < len(target.phrases):
                where = f"{name}, annotation {target.target_id}"
                problems.append(Problem(where, "expected words, found an empty phrase"))
            if not phrases:
                continue
            phrase_target += [len(target_category)] * len(phrases)
            for phrase in phrases:
                strings["phrase"].append(phrase)
            strings["target_id"].append(target.target_id)
            for part in target.parts:
                strings["part"].append(part)
            part_begin.append(part_begin[-1] + len(target.parts))
            target_category.append(categories.setdefault(target.category, len(categories)))
        if len(phrase_target) == before:
            continue
        sizes.append((item.height, item.width))
        phrase_begin.append(len(phrase_target))
        strings["image_id"].append(item.image_id)
        strings["file"].append(item.file)
        strings["ignore"].append(item.ignore)
    if not sizes:
        first = f"; the first problem: {problems[0].where}: {problems[0].what}" if problems else ""
        raise UserError(f"{name}: expected images with phrases, found none{first}")
    arrays = {
        "sizes": np.array(sizes, np.int32),
        "phrase_begin": np.array(phrase_begin, np.int64),
        "phrase_target": np.array(phrase_target, np.int64),
        "target_category": np.array(target_category, np.int32),
        "part_begin": np.array(part_begin, np.int64),
    }
    meta = {
        **meta,
        "format_version": FORMAT_VERSION,
        "images": len(sizes),
        "targets": len(target_category),
        "phrases": len(phrase_target),
        "problems": len(problems),
        "categories": list(categories),
    }
    try:
        with new_directory(directory, "the index") as temporary:
            for column, array in arrays.items():
                np.save(temporary / f"{column}.npy", array)
            for column, values in strings.items():
                values.save(temporary, column)
            lines = [json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems]
            (temporary / "problems.jsonl").write_text("".join(lines), "utf-8")
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    except OSError as error:
        raise UserError(f"the index {directory} cannot be written: {error.strerror}") from error
    if problems:
        logging.warning(
            "%s: %d annotations have problems, the first: %s: %s (all: %s)",
            name,
            len(problems),
            problems[0].where,
            problems[0].what,
            Path(directory) / "problems.jsonl",
        )
    return Index(directory)


def open_index(
    root: Path, name: str, split: str, inputs: Sequence[Path], load: Loader, options: str = ""
) -> Index:
    """The index of a split: the one beside the data if it is up to date, or a new one.

    Args:
      root: the data set's folder; the index goes into its `.evf_sam_index`, or where nothing can be
        written there, into the user's cache.
      inputs: the annotation files and folders it is made from; another size or time of change of
        any of them makes another index.
      load: yields the annotations.
      options: whatever else the annotations depend on.
    """
    key = _fingerprint(root, inputs, options)
    folder = f"{name}-{split}-{key}".replace("/", "_")
    places = [root / INDEX_FOLDER / folder, user_cache("index") / folder]
    for place in places:
        if (place / "meta.json").exists():
            return Index(place)
    place = places[0] if _writable(root) else places[1]
    logging.info("%s/%s: building the index %s", name, split, place)
    meta = {"name": name, "split": split, "fingerprint": key}
    try:
        return write_index(place, load(), meta)
    except UserError:
        if (place / "meta.json").exists():  # another process was faster
            return Index(place)
        raise


def _check_new(value: str, seen: set[str], what: str) -> None:
    if value in seen:
        raise UserError(f"{what} {value!r}: expected once, found twice")
    seen.add(value)


def _fingerprint(root: Path, inputs: Sequence[Path], options: str) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {options}".encode())
    for path in sorted(inputs):
        status = path.stat()
        size = 0 if path.is_dir() else status.st_size
        with contextlib.suppress(ValueError):  # an input outside of the root goes by its own path
            path = path.relative_to(root)
        digest.update(f"\0{path.as_posix()} {size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def user_cache(kind: str) -> Path:
    """The user's folder for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "evf_sam_jax" / kind


def _writable(root: Path) -> bool:
    folder = root / INDEX_FOLDER
    return os.access(folder if folder.exists() else root, os.W_OK)
