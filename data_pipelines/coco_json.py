"""Reads a COCO json and checks its images, annotations and categories before anything uses them."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.index import Problem
from evf_sam_jax.errors import UserError

# What COCO json files use for ids.
Id = int | str

_KINDS: dict[type | tuple[type, ...], str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    (int, str): "a whole number or a string",
}


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """An image of a COCO json with its annotations, in their order in the file.

    Attributes:
      coco_id: its id in the file.
      file_name: relative to the folder of images.
      height: pixels, as the file says.
      width: likewise.
      annotations: the json objects; "id", "image_id" and the keys asked for are there.
    """

    coco_id: Id
    file_name: str
    height: int
    width: int
    annotations: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """What a COCO json says.

    Attributes:
      path: the file, for messages.
      images: in their order in the file.
      categories: names by id.
    """

    path: Path
    images: tuple[CocoImage, ...]
    categories: Mapping[Id, str]

    def category(self, annotation: Mapping[str, Any]) -> str:
        """The name of an annotation's category. Raises UserError if the file has no such."""
        category = annotation["category_id"]
        if not isinstance(category, Id) or category not in self.categories:
            raise UserError(
                f"{self.where(annotation)}: expected the id of one of the file's "
                f"{len(self.categories)} categories as 'category_id', found {category!r}"
            )
        return self.categories[category]

    def where(self, annotation: Mapping[str, Any]) -> str:
        """The file and the annotation's id, for messages."""
        return f"{self.path}: annotation {annotation['id']}"

    def present_images(self, root: Path, folder: str) -> Iterator[tuple[CocoImage, str] | Problem]:
        """Each image with its path below the root; of a missing one, a problem for each annotation.

        Args:
          folder: of the images, relative to the root.
        """
        present = PresentFiles(root)
        for image in self.images:
            file = f"{folder}/{image.file_name}"
            if file in present:
                yield image, file
            else:
                yield from (missing_image(self.where(one), file) for one in image.annotations)


class PresentFiles:
    """Which files are below a root; each folder is listed once, since millions may be asked for."""

    def __init__(self, root: Path):
        self._root = root
        self._listed: dict[str, frozenset[str]] = {}

    def __contains__(self, file: str) -> bool:
        folder, name = os.path.split(file)
        if folder not in self._listed:
            self._listed[folder] = _file_names(self._root / folder)
        return name in self._listed[folder]


def _file_names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def missing_image(where: str, file: str) -> Problem:
    """The problem of an annotation whose image is not there."""
    return Problem(where, f"expected the image {file}, found nothing there")


def without_suffix(file_name: str) -> str:
    """The path without ".jpg" and the like, as ids name it."""
    return PurePosixPath(file_name).with_suffix("").as_posix()


def read_coco(path: Path, annotation_keys: Sequence[str] = ("category_id",)) -> CocoFile:
    """Reads a COCO json. Raises UserError as `parse_coco` does, and where there is no json."""
    return parse_coco(path, read_json(path), annotation_keys)


def parse_coco(
    path: Path, content: Any, annotation_keys: Sequence[str] = ("category_id",)
) -> CocoFile:
    """Checks the content of a COCO json, whose annotations are grouped as they are, not copied.

    Args:
      path: where it comes from, for messages.
      annotation_keys: what each annotation must have, beside "id" and "image_id". Without
        "category_id" among them the file needs no categories.

    Raises:
      UserError: a key is missing, a value has the wrong type, an id comes twice, or an annotation
        names an image that is not listed.
    """
    content = _checked(content, dict, f"{path}: the content")
    required = "category_id" in annotation_keys
    categories: dict[Id, str] = {}
    for i, one in enumerate(_entries(path, content, "categories", required)):
        where = f"{path}: categories[{i}]"
        _add_new(categories, _id(one, where), _value(one, "name", str, where), where)
    images: dict[Id, CocoImage] = {}
    for i, one in enumerate(_entries(path, content, "images")):
        where = f"{path}: images[{i}]"
        image = CocoImage(
            _id(one, where),
            _value(one, "file_name", str, where),
            _side(one, "height", where),
            _side(one, "width", where),
            (),
        )
        _add_new(images, image.coco_id, image, where)
    annotations: dict[Id, list[Mapping[str, Any]]] = {}
    seen: dict[Id, None] = {}
    for i, one in enumerate(_entries(path, content, "annotations")):
        where = f"{path}: annotations[{i}]"
        _add_new(seen, _id(one, where), None, where)
        image_id = _value(one, "image_id", (int, str), where)
        if image_id not in images:
            raise UserError(
                f"{where}: expected the id of one of the file's images as 'image_id', "
                f"found {image_id!r}"
            )
        for key in annotation_keys:
            _present(one, key, where)
        annotations.setdefault(image_id, []).append(one)
    grouped = tuple(
        dataclasses.replace(image, annotations=tuple(annotations.get(image_id, ())))
        for image_id, image in images.items()
    )
    return CocoFile(path, grouped, categories)


def read_json(path: Path) -> Any:
    """The content of any JSON file. Raises UserError if it cannot be read, or is none."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found: {error.strerror}") from error
    except ValueError as error:  # not json, or not text
        raise UserError(f"{path}: expected json, found {error}") from error


def _entries(
    path: Path, content: Mapping[str, Any], key: str, required: bool = True
) -> Iterator[Mapping[str, Any]]:
    if not required and key not in content:
        return
    for i, one in enumerate(_value(content, key, list, f"{path}: the content")):
        yield _checked(one, dict, f"{path}: {key}[{i}]")


def _present(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise UserError(f"{where}: expected the key {key!r}, found {', '.join(entry) or 'none'}")
    return entry[key]


def _value(entry: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = _present(entry, key, where)
    if not isinstance(value, kind):  # the message is made only for what is wrong: millions are not
        _checked(value, kind, f"{where}: {key!r}")
    return value


def _checked(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected {_KINDS[kind]}, found {str(value)[:40]!r}")
    return value


def _id(entry: Mapping[str, Any], where: str) -> Id:
    return _value(entry, "id", (int, str), where)


def _side(entry: Mapping[str, Any], key: str, where: str) -> int:
    side = _value(entry, key, int, where)
    if side < 1:
        raise UserError(f"{where}: {key!r}: expected 1 pixel or more, found {side}")
    return side


def _add_new(known: dict[Id, Any], new: Id, value: Any, where: str) -> None:
    if new in known:
        raise UserError(f"{where}: expected each id once, found {new!r} a second time")
    known[new] = value
