"""The prepared form of a split: images and annotations in a few large files, read at random.

A directory holds

- `SPLIT-00000-of-00004.array_record`, ...: a record an image, see `encode_record`;
- `index/`: the annotations again, in the order of the records (`data_pipelines.index`), so that
  phrases, sizes and masks are known without reading an image;
- `manifest.json`: what the directory holds, and the size and checksum of each shard.

`data_pipelines.prepare` writes it. A directory in a bucket ("gs://...") is copied into the user's
cache when it is opened, since both kinds of file are mapped or read at random; for "gs://" install
`etils[epath-gcs]`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from data_pipelines.image_input import decode_image
from data_pipelines.index import AnnotatedImage, Index, Target, user_cache
from data_pipelines.record_files import Shard, damage, is_remote, read_manifest_file
from data_pipelines.source import IndexedSource, ReadingRules
from evf_sam_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index"
_AGAIN = "run data_pipelines.prepare again"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds.

    Attributes:
      fingerprint: of the annotation files that it was made from.
      rules: how the data set is read where nothing else is asked for.
      counts: of "images", "targets", "phrases" and "problems".
    """

    name: str
    split: str
    fingerprint: str
    rules: ReadingRules
    counts: dict[str, int]
    shards: tuple[Shard, ...]

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError, KeyError or TypeError if it is no such text."""
        content = json.loads(text)
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, found {version!r}")
        rules = dict(content["rules"])
        rules["without_categories"] = tuple(rules["without_categories"])
        content["rules"] = ReadingRules(**rules)
        content["shards"] = tuple(map(Shard.from_json, content["shards"]))
        return cls(**content)


def encode_record(image: AnnotatedImage, content: bytes) -> bytes:
    """One record: the length of a header (4 bytes, little-endian), the header, the image file.

    The header is JSON with the fields of `AnnotatedImage` and `Target`; run lengths are ASCII.
    """
    header = json.dumps(dataclasses.asdict(image), default=_ascii).encode()
    return struct.pack("<I", len(header)) + header + content


def decode_record(record: bytes) -> tuple[AnnotatedImage, bytes]:
    """What `encode_record` was given."""
    end = _header_end(record)
    header = json.loads(record[4:end])
    targets = tuple(
        Target(
            target["target_id"],
            tuple(target["phrases"]),
            tuple(part.encode("ascii") for part in target["parts"]),
            target["category"],
        )
        for target in header["targets"]
    )
    header |= {"targets": targets, "ignore": header["ignore"].encode("ascii")}
    return AnnotatedImage(**header), record[end:]


class RecordStore:
    """Images in shards of records; each process opens the files that it reads, when it does.

    Attributes:
      shards: local path and number of records of each, in order.
    """

    def __init__(self, shards: Iterable[tuple[str, int]]):
        self.shards = tuple(shards)

    def __reduce__(self):
        return RecordStore, (self.shards,)

    def read(self, index: int, file: str) -> np.ndarray:
        """Upright RGB of the image of a record.

        Raises:
          UserError: the record is damaged, belongs to another file, or is no image.
        """
        try:
            record = self._records[index]
            end = _header_end(record)
            found = json.loads(record[4:end])["file"]
        except (OSError, RuntimeError, ValueError, KeyError, IndexError, struct.error) as error:
            raise UserError(f"{self._where(index)}: expected a record, found {error}") from error
        if found != file:
            raise UserError(f"{self._where(index)}: expected {file}, found {found}; {_AGAIN}")
        return decode_image(record[end:], f"{self._where(index)} ({file})")

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        # With their ranges given, files are not opened to count their records.
        return ArrayRecordDataSource([f"{path}[0:{records}]" for path, records in self.shards])

    def _where(self, index: int) -> str:
        for path, records in self.shards:
            if index < records:
                return f"{path}, record {index}"
            index -= records
        return f"{self.shards[-1][0]}, {index + 1} records past its end"


def read_manifest(directory: str | os.PathLike) -> Manifest | None:
    """What a directory says it holds; None if nothing has been prepared there, or not to the end.

    Raises:
      UserError: it is no manifest, or one of another version.
    """
    path = epath.Path(directory) / MANIFEST
    return read_manifest_file(path, Manifest.from_json, "a prepared data set")


def open_prepared(
    directory: str | os.PathLike,
    rules: ReadingRules | None = None,
    cache: Path | None = None,
) -> IndexedSource:
    """The examples of a prepared split, the same as those of the files it was made from.

    Args:
      directory: `OUT/NAME/SPLIT` of `data_pipelines.prepare`, local or "gs://...".
      rules: by default those with which the data set is read.
      cache: where what is in a bucket is copied to; by default a folder of the user's cache.

    Raises:
      UserError: something is missing, incomplete, or of another version.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        path = epath.Path(directory) / MANIFEST
        raise UserError(f"{path}: expected a prepared data set, found nothing there; {_AGAIN}")
    for shard in manifest.shards:
        if wrong := damage(directory, shard):
            raise UserError(f"{wrong}; {_AGAIN}")
    if not (epath.Path(directory) / INDEX / "meta.json").exists():
        path = epath.Path(directory) / INDEX
        raise UserError(f"{path}: expected an index, found nothing there; {_AGAIN}")
    local = _cached(directory, manifest, cache) if is_remote(directory) else Path(directory)
    index = Index(local / INDEX)
    records = sum(shard.records for shard in manifest.shards)
    if len(index) != records:
        raise UserError(f"{local}: expected {len(index)} records, found {records}; {_AGAIN}")
    store = RecordStore((str(local / shard.file), shard.records) for shard in manifest.shards)
    return IndexedSource(index, store, manifest.rules if rules is None else rules)


def _cached(directory: str | os.PathLike, manifest: Manifest, cache: Path | None) -> Path:
    """A local copy; what has been copied before, and has kept its size, is not copied again."""
    if cache is None:
        cache = user_cache("prepared")
    # Other contents at the same place must not be taken for these.
    key = hashlib.sha256(f"{os.fspath(directory)}\0{manifest.to_json()}".encode()).hexdigest()[:16]
    local = cache / f"{manifest.name}-{manifest.split}-{key}"
    source = epath.Path(directory)
    files = [shard.file for shard in manifest.shards]
    files += [f"{INDEX}/{path.name}" for path in (source / INDEX).iterdir()]
    logging.info("%s: copying to %s", directory, local)
    try:
        (local / INDEX).mkdir(parents=True, exist_ok=True)
        for file in files:
            _copy(source / file, local / file)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the copy {local} cannot be written: {reason}") from error
    return local


def _copy(source: epath.Path, target: Path) -> None:
    if target.exists() and target.stat().st_size == source.stat().length:
        return
    # Under another name first: several processes may open the same directory.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        source.copy(temporary)
        temporary.replace(target)


def _header_end(record: bytes) -> int:
    (length,) = struct.unpack_from("<I", record)
    return 4 + length


def _ascii(value: object) -> str:
    """For JSON: run lengths as text."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    raise TypeError(f"expected run lengths, found {type(value).__name__}")
