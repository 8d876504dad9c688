"""Files of records that appear whole, know what they were made from, and are gone on with.

A command that writes many records makes a few files of them, `NAME.array_record`. As long as it is
under way, or may be asked for more, each finished file has a `.json` beside it, by which the same
command knows it when it is started again; a manifest, written last, makes the directory valid as a
whole.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from evf_sam_jax.errors import UserError

# One record a group, so that one is read without its neighbours; what is in them is compressed
# already, or cannot be.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_PARTIAL = ".partial"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      file: its name in the directory.
      records: how many.
      bytes: the file's size.
      sha256: of the file, in hexadecimal.
      left_out: the row of each image that could not be read, in what the command goes
        through, with the reason.
    """

    file: str
    records: int
    bytes: int
    sha256: str
    left_out: tuple[tuple[int, str], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Shard":
        """From what `dataclasses.asdict` made."""
        left_out = tuple((int(row), str(what)) for row, what in entry["left_out"])
        return cls(**{**entry, "left_out": left_out})


def shard_name(split: str, shard: int, shards: int) -> str:
    """The name of a file of records."""
    return f"{split}-{shard:05}-of-{shards:05}.array_record"


def damage(directory: str | os.PathLike, shard: Shard) -> str | None:
    """What is wrong with the file of a shard, by its size; None: nothing."""
    path = epath.Path(directory) / shard.file
    try:
        size = path.stat().length
    except FileNotFoundError:
        return f"{path}: expected a file of records, found nothing there"
    if size != shard.bytes:
        return f"{path}: expected {shard.bytes} bytes, found {size}"
    return None


def read_manifest_file(path: epath.Path, parse: Callable[[str], T], what: str) -> T | None:
    """What a manifest says; None if there is none, as long as its directory is not whole.

    Args:
      parse: raises ValueError, KeyError, TypeError or AttributeError for another text.
      what: it is a manifest of.

    Raises:
      UserError: it is no such manifest, or one of another version.
    """
    try:
        return parse(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except KeyError as error:
        raise UserError(f"{path}: expected the key {error}, found none") from None
    except (ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: expected a manifest of {what}: {error}") from None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path leads to a bucket."""
    return "://" in os.fspath(path)


def file_sha256(path: Path) -> str:
    """The checksum of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(
    directory: str | os.PathLike,
    file: str,
    fingerprint: str,
    records: Iterable[bytes | tuple[int, str]],
) -> Shard:
    """Writes one file of records and its sidecar, each whole or not at all.

    Args:
      fingerprint: of all that its content depends on.
      records: each, or the row of an image that is left out and the reason.

    Raises:
      UserError: it cannot be written.
    """
    path = epath.Path(directory) / file
    left_out: list[tuple[int, str]] = []
    count = 0
    with reporting(path), whole_file(path) as local:
        writer = ArrayRecordWriter(os.fspath(local), _WRITER_OPTIONS)
        try:
            for record in records:
                if isinstance(record, bytes):
                    writer.write(record)
                    count += 1
                else:
                    left_out.append(record)
        finally:
            writer.close()
        size = local.stat().st_size
        shard = Shard(file, count, size, file_sha256(local), tuple(left_out))
    write_text(
        _sidecar(path), json.dumps({**dataclasses.asdict(shard), "fingerprint": fingerprint})
    )
    return shard


def finished_shard(
    directory: str | os.PathLike, file: str, fingerprint: str, known: Shard | None = None
) -> Shard | None:
    """The shard of a file, if it is there already, whole and with this fingerprint.

    Args:
      known: what a manifest says of it.
    """
    shard = known
    if shard is None:
        try:
            entry = json.loads(_sidecar(epath.Path(directory) / file).read_text())
            if entry.pop("fingerprint") != fingerprint:
                return None
            shard = Shard.from_json(entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # not written to its end
    return shard if damage(directory, shard) is None else None


def fingerprint_of_shard(directory: str | os.PathLike, file: str) -> str | None:
    """What a file was written of, by its sidecar; None if that says nothing."""
    try:
        return json.loads(_sidecar(epath.Path(directory) / file).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[Path]:
    """Gives a local file to write, which becomes `path` at the end, or is removed."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            yield local
            epath.Path(local).copy(path, overwrite=True)
        return
    partial = Path(path).with_name(f".{path.name}{_PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def reporting(path: epath.Path) -> Iterator[None]:
    """What cannot be written becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # array_record's, such as "write() failed: ...; writing ..."
        reason = re.search(r"failed: ([^;]+)", str(error))
        what = reason[1] if reason else error
        raise UserError(f"{path} cannot be written: {what}") from error


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all. Raises UserError if it cannot be."""
    with reporting(path), whole_file(path) as local:
        local.write_text(text, "utf-8")


def remove_sidecars(directory: epath.Path, names: Sequence[str]) -> None:
    """Removes what a finished directory needs no more."""
    for name in names:
        _sidecar(directory / name).unlink(missing_ok=True)


def remove_leftovers(directory: epath.Path, pattern: str, names: Sequence[str]) -> None:
    """Removes half-written files, and shards that are not wanted any more.

    Args:
      pattern: of the names of all that the command calls a shard, without their endings; files of
        other names stay.
      names: of the shards that are wanted. What belongs to one has its name with another ending.
    """
    kept = {name.removesuffix(".array_record") for name in names}
    for path in directory.iterdir():
        shard = path.name.split(".")[0]
        other = re.fullmatch(pattern, shard) and shard not in kept
        if other or (path.name.startswith(".") and path.name.endswith(_PARTIAL)):
            path.unlink()


def _sidecar(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.json")
