"""Features of images on disk, which training reads in place of the segmenter's images.

A directory holds

- `features-0123456789abcdef.array_record`, ...: a record an image, see `Layout.encode`; each file
  is named after its images;
- `features-0123456789abcdef.keys.npy`, ...: the first 8 bytes of the key of each of its records;
- `features-0123456789abcdef.array_record.json`, ...: by which the command knows a finished file;
- `manifest.json`: what the features are of, and the size and checksum of each file.

`--mode cache_features` writes it. A record is found by the pixels of its image, so the same
picture in several data sets has one, and a picture that has changed has none.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from jaxtyping import Float, UInt8

from data_pipelines.record_files import (
    Shard,
    damage,
    is_remote,
    read_manifest_file,
    reporting,
    whole_file,
)
from evf_sam_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KEY_BYTES = 16
# Of a directory, so many files are open at a time: systems often allow a process 1024.
OPEN_FILES = 256
_AGAIN = "write it again with --mode cache_features"

# How features are stored. `int8` has a scale for each channel of each image, and halves bfloat16.
STORED = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays of an image.

    Attributes:
      shapes: height, width and channels of the embedding, then of finer features, finest first.
      dtype: one of `STORED`.
      finished: whether they are for the decoder as they are, or `evf_sam.finish_features` has to
        complete them.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtype: str
    finished: bool = True

    @property
    def record_bytes(self) -> int:
        """Key included."""
        return KEY_BYTES + sum(size for _, _, size in self._parts())

    def empty(self, images: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Zeros for the values of so many images, and for the scales where there are any."""
        values = tuple(np.zeros((images, *shape), STORED[self.dtype]) for shape in self.shapes)
        if self.dtype != "int8":
            return values, ()
        return values, tuple(np.zeros((images, shape[-1]), np.float32) for shape in self.shapes)

    def encode(self, key: bytes, features: Sequence[Float[np.ndarray, "_ _ _"]]) -> bytes:
        """One record: the key, then values, and scales of int8, one array after the other."""
        parts = [key]
        scales = []
        for feature, shape in zip(features, self.shapes, strict=True):
            assert feature.shape == shape, f"expected {shape}, found {feature.shape}"
            if self.dtype == "int8":
                largest = np.abs(feature).max((0, 1)).astype(np.float32)
                scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
                feature = np.rint(feature / scale)
                scales.append(scale.tobytes())
            parts.append(feature.astype(STORED[self.dtype]).tobytes())
        return b"".join(parts + scales)

    def decode(self, record: bytes) -> list[np.ndarray]:
        """Views of values, then of scales. Raises ValueError for a record of another length."""
        if len(record) != self.record_bytes:
            raise ValueError(f"expected {self.record_bytes} bytes, found {len(record)}")
        arrays, begin = [], KEY_BYTES
        for shape, dtype, size in self._parts():
            part = np.frombuffer(record, dtype, math.prod(shape), begin)
            arrays.append(part.reshape(shape))
            begin += size
        return arrays

    def _parts(self) -> list[tuple[tuple[int, ...], np.dtype, int]]:
        dtype = STORED[self.dtype]
        parts = [(shape, dtype, math.prod(shape) * dtype.itemsize) for shape in self.shapes]
        if self.dtype == "int8":
            one = np.dtype(np.float32)
            parts += [(shape[-1:], one, shape[-1] * one.itemsize) for shape in self.shapes]
        return parts


@dataclasses.dataclass(frozen=True)
class FeatureManifest:
    """What a directory of features holds.

    Attributes:
      fingerprint: of all that features depend on but the image: parameters, sizes, dtypes, and how
        an image is brought into the segmenter's frame.
    """

    fingerprint: str
    layout: Layout
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        """How many have features."""
        return sum(shard.records for shard in self.shards)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FeatureManifest":
        """Raises ValueError, KeyError or TypeError if it is no such text."""
        content = json.loads(text)
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, found {version!r}")
        layout = content["layout"]
        if layout["dtype"] not in STORED:
            raise ValueError(f"dtype: expected one of {', '.join(STORED)}, found another")
        content["layout"] = Layout(**{**layout, "shapes": tuple(map(tuple, layout["shapes"]))})
        content["shards"] = tuple(map(Shard.from_json, content["shards"]))
        return cls(**content)


def read_feature_manifest(directory: str | os.PathLike) -> FeatureManifest | None:
    """What a directory says it holds; None if nothing has been written there, or not to the end.

    Raises:
      UserError: it is no manifest, or one of another version.
    """
    path = epath.Path(directory) / MANIFEST
    return read_manifest_file(path, FeatureManifest.from_json, "features")


def image_key(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """What the record of an image is found by: a hash of its size and pixels."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=KEY_BYTES)
    digest.update(image.tobytes())
    return digest.digest()


def short_keys(keys: Sequence[bytes]) -> np.ndarray:
    """What is searched for; whoever finds a record compares the whole key."""
    return np.frombuffer(b"".join(key[:8] for key in keys), np.uint64)


def keys_name(file: str) -> str:
    """The file of the keys of a file of records."""
    return file.removesuffix(".array_record") + ".keys.npy"


def write_keys(directory: str | os.PathLike, file: str, keys: Sequence[bytes]) -> None:
    """Writes the file of the keys of a file of records, whole or not at all."""
    path = epath.Path(directory) / keys_name(file)
    with reporting(path), whole_file(path) as local, local.open("wb") as opened:
        np.save(opened, short_keys(keys))


def record_keys(directory: str | os.PathLike, file: str) -> list[bytes]:
    """The key of each record of a file that is whole."""
    records = ArrayRecordDataSource([os.path.join(directory, file)])
    return [records[row][:KEY_BYTES] for row in range(len(records))]


class FeatureStore:
    """Random access to the features of images; each process opens the files that it reads.

    Attributes:
      directory: where they are.
      manifest: what is there.
    """

    def __init__(self, directory: str | os.PathLike):
        """Raises UserError if something is missing, incomplete, or of another version."""
        self.directory = os.fspath(directory)
        if is_remote(directory):
            raise UserError(
                f"data.features: expected a local or mounted directory, found {directory}"
            )
        manifest = read_feature_manifest(directory)
        if manifest is None:
            path = epath.Path(directory) / MANIFEST
            raise UserError(
                f"{path}: expected a finished directory of features, found nothing there; {_AGAIN}"
            )
        if not manifest.images:
            raise UserError(f"{directory}: expected features of images, found none of any")
        self.manifest = manifest
        for shard in manifest.shards:
            if wrong := damage(directory, shard):
                raise UserError(f"{wrong}; {_AGAIN}")
        keys = np.concatenate([self._keys_of(shard) for shard in manifest.shards])
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]
        self._ends = np.cumsum([shard.records for shard in manifest.shards])
        self._opened = functools.lru_cache(OPEN_FILES)(self._open)

    def __reduce__(self):
        return FeatureStore, (self.directory,)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, image: UInt8[np.ndarray, "h w 3"]) -> list[np.ndarray]:
        """The values of an image, then the scales of int8.

        Raises:
          UserError: there are none of this image, or their record is damaged.
        """
        key = image_key(image)
        short = short_keys([key])[0]
        at = int(np.searchsorted(self._keys, short))
        if at == len(self._keys) or self._keys[at] != short:
            raise UserError(f"{self.directory}: expected features of these pixels, found none")
        row = int(self._rows[at])
        number = int(np.searchsorted(self._ends, row, side="right"))
        row -= int(self._ends[number]) - self.manifest.shards[number].records
        try:
            record = self._opened(number)[row]
            if record[:KEY_BYTES] != key:
                raise ValueError("that of another image")
            return self.manifest.layout.decode(record)
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{os.path.join(self.directory, self.manifest.shards[number].file)}, record {row}: "
                f"expected features, found {error}"
            ) from error

    def images_fingerprint(self) -> str:
        """A short text that changes with the pictures that have features."""
        return hashlib.sha256(self._keys.tobytes()).hexdigest()[:16]

    def _open(self, number: int) -> ArrayRecordDataSource:
        """The records of a file; it is closed with the last reference."""
        shard = self.manifest.shards[number]
        # With its range given, the file is not opened to count its records.
        return ArrayRecordDataSource(
            f"{os.path.join(self.directory, shard.file)}[0:{shard.records}]"
        )

    def _keys_of(self, shard: Shard) -> np.ndarray:
        path = os.path.join(self.directory, keys_name(shard.file))
        try:
            keys = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: expected the keys of records: {error}; {_AGAIN}") from error
        if keys.shape != (shard.records,) or keys.dtype != np.uint64:
            raise UserError(
                f"{path}: expected {shard.records} keys, found {keys.dtype} {list(keys.shape)}; "
                f"{_AGAIN}"
            )
        return keys
