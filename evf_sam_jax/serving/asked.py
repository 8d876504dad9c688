"""What a request asks for, checked before an image is decoded or a phrase is read.

A request is JSON with the image in base64, or a form with the image as a file. No field is ever a
path: an image is the bytes of a file, and the name it is sent with is not looked at.
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import FormData, UploadFile

from data_pipelines.source import SEMANTIC_PREFIX
from evf_sam_jax.errors import UserError

# JSON of more values than these is not parsed: small text can become large lists.
MAX_VALUES = 20_000
# Beside the image: fields of a form, and what JSON has around the image.
MAX_FIELDS = 1000
ROOM_FOR_FIELDS = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is too much; checked on sizes and headers, before memory is spent on it.

    Attributes:
      upload_bytes: of an image file.
      pixels: of an image.
      prompts: of a request.
      characters: of a phrase.
    """

    upload_bytes: int = 16 << 20
    pixels: int = 25_000_000
    prompts: int = 16
    characters: int = 300

    @property
    def body_bytes(self) -> int:
        """The most that a request's body can have: the image in base64, and the rest."""
        return self.upload_bytes * 4 // 3 + ROOM_FOR_FIELDS


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request within the limits; `Predictor.prepare` checks the prompts further.

    Attributes:
      image: the bytes of an image file.
      texts: phrases, with the prefix of categories where it was asked for; or
      text_ids: phrases as token ids.
      points: [k][n][2] in pixels of the image, with `point_labels` [k][n].
      boxes: [k][4].
      multimask: three alternatives a prompt.
      png: whether the masks are also wanted as PNG.
    """

    image: bytes
    texts: tuple[str, ...] | None = None
    text_ids: tuple[tuple[int, ...], ...] | None = None
    points: Any = None
    point_labels: Any = None
    boxes: Any = None
    multimask: bool = False
    png: bool = False


FIELDS = tuple(field.name for field in dataclasses.fields(Asked)) + ("semantic",)
_LISTS = ("text_ids", "points", "point_labels", "boxes")
_NUMBERS = ("points", "point_labels", "boxes")
_FLAGS = ("multimask", "png", "semantic")


def from_json(body: bytes, limits: Limits) -> Asked:
    """Reads a JSON request.

    Raises:
      UserError: it is no JSON object of known fields, or a field is none of what is expected.
    """
    if max(body.count(b","), body.count(b"["), body.count(b"{")) > MAX_VALUES:
        raise UserError(f"expected at most {MAX_VALUES} values in a request, found more")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("expected a JSON object, found something else") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object, found {_kind(values)}")
    image = values.pop("image", None)
    if not isinstance(image, str):
        raise UserError(f"image: expected a file in base64, found {_kind(image)}")
    try:
        values["image"] = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("image: expected a file in base64, found other characters") from None
    return _asked(values, limits)


async def from_form(form: FormData, limits: Limits) -> Asked:
    """Reads a form, in which `texts` may be given many times, and lists are JSON.

    Raises:
      UserError: as `from_json`, or a field is given twice.
    """
    values: dict[str, Any] = {}
    for name in form:
        given = form.getlist(name)
        if name == "texts":
            values[name] = given
        elif len(given) > 1:
            raise UserError(f"{_shown(name)}: expected it once, found {len(given)} of it")
        elif name == "image":
            values[name] = await _file(given[0], limits)
        elif isinstance(given[0], UploadFile):
            raise UserError(f"{_shown(name)}: expected text, found a file")
        elif name in _LISTS:
            values[name] = _list(name, given[0])
        elif name in _FLAGS:
            values[name] = {"true": True, "false": False}.get(given[0], given[0])
        else:
            values[name] = given[0]
    if "image" not in values:
        raise UserError("image: expected an image file, found none")
    return _asked(values, limits)


async def _file(value: Any, limits: Limits) -> bytes:
    if not isinstance(value, UploadFile):
        raise UserError("image: expected an image file, found text")
    if value.size is None or value.size > limits.upload_bytes:
        raise _too_large(value.size, limits)
    return await value.read()


def _list(name: str, text: str) -> Any:
    if text.count(",") > MAX_VALUES or text.count("[") > MAX_VALUES:
        raise UserError(f"{name}: expected at most {MAX_VALUES} values, found more")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f"{name}: expected lists of numbers as JSON, found something else"
        ) from None


def _asked(values: Mapping[str, Any], limits: Limits) -> Asked:
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise UserError(f"unknown field {_shown(unknown[0])}, expected some of {', '.join(FIELDS)}")
    if len(values["image"]) > limits.upload_bytes:
        raise _too_large(len(values["image"]), limits)
    for name in _FLAGS:
        if not isinstance(values.get(name, False), bool):
            raise UserError(f"{name}: expected true or false, found {_kind(values[name])}")
    for name in ("texts", *_LISTS):
        value = values.get(name)
        if value is not None and not isinstance(value, list):
            raise UserError(f"{name}: expected a list, found {_kind(value)}")
        if value is not None and len(value) > limits.prompts:
            raise UserError(f"{name}: expected at most {limits.prompts}, found {len(value)}")
    for name in _NUMBERS:
        _check_numbers(name, values.get(name))
    prefix = SEMANTIC_PREFIX if values.get("semantic") else ""
    texts, text_ids = values.get("texts"), values.get("text_ids")
    return Asked(
        image=values["image"],
        texts=None if texts is None else tuple(prefix + _phrase(x, limits) for x in texts),
        text_ids=None if text_ids is None else tuple(map(_ids, text_ids)),
        points=values.get("points"),
        point_labels=values.get("point_labels"),
        boxes=values.get("boxes"),
        multimask=values.get("multimask", False),
        png=values.get("png", False),
    )


def _phrase(value: Any, limits: Limits) -> str:
    if not isinstance(value, str):
        raise UserError(f"texts: expected phrases, found {_kind(value)}")
    if not value.strip():
        raise UserError("texts: expected phrases, found an empty one")
    if len(value) > limits.characters:
        raise UserError(
            f"texts: expected phrases of at most {limits.characters} characters, "
            f"found one of {len(value)}"
        )
    return value


def _check_numbers(name: str, value: Any) -> None:
    """Refuses what NumPy would take for a number: text such as "3", true and false, nothing."""
    waiting = [] if value is None else [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif type(one) not in (int, float):
            raise UserError(f"{name}: expected an array of numbers, found {_kind(one)} in it")


def _ids(value: Any) -> tuple[int, ...]:
    # bool is an int to Python, not to whoever sends it.
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise UserError("text_ids: expected a list of integers a phrase, found something else")
    return tuple(value)


def _too_large(found: int | None, limits: Limits) -> UserError:
    size = "more" if found is None else f"{found:,}"
    return UserError(f"image: expected at most {limits.upload_bytes:,} bytes, found {size}")


def _kind(value: Any) -> str:
    """What a value is, in words."""
    names: Sequence[tuple[type, str]] = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
        (UploadFile, "a file"),
    )
    return next((words for kind, words in names if isinstance(value, kind)), "nothing")


def _shown(name: str) -> str:
    """A name that somebody sent, short and harmless."""
    return repr(name[:40])
