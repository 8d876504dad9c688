"""Reads PyTorch's zip checkpoints (.pth, .pt, .bin) without PyTorch, running nothing of theirs.

The format (torch.serialization since version 1.6): an uncompressed zip whose `data.pkl` is a pickle
of the object, with each tensor's storage left out as a persistent id, and whose `data/N` is the raw
bytes of storage N. The file is memory-mapped and a tensor is a strided view of it, so nothing is
read before it is used. The unpickler knows tensors, parameters, dictionaries and Python's literals;
every other name in the pickle is refused before anything of it is imported.
"""

import dataclasses
import io
import math
import mmap
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from evf_sam_jax.errors import UserError

# The pickle protocol-2 head of the magic number that opens every file written before PyTorch 1.6.
_LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Sealed:
    """What a pickle can get hold of but not change: it could set state past a frozen dataclass."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"the pickle would change a {type(self).__name__}")


@dataclasses.dataclass(frozen=True)
class Storage(_Sealed):
    """One storage of a checkpoint: `size` raw elements of `dtype` at byte `offset` of the file."""

    file: mmap.mmap
    offset: int
    size: int
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class TorchTensor(_Sealed):
    """A tensor that is still in its file: a strided window (in elements) of a storage."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def view(self) -> np.ndarray:
        """The tensor as a read-only array on the memory-mapped file; nothing is copied."""
        itemsize = self.dtype.itemsize
        return np.ndarray(
            self.shape,
            self.dtype,
            buffer=self.storage.file if math.prod(self.shape) else b"",
            offset=self.storage.offset + self.start * itemsize if math.prod(self.shape) else 0,
            strides=tuple(step * itemsize for step in self.strides),
        )


def read_torch_file(path: Path) -> Any:
    """Reads a checkpoint: dictionaries, lists and literals, with a `TorchTensor` for each tensor.

    Raises:
      UserError: the file is missing, truncated, in the format before PyTorch 1.6, no checkpoint at
        all, or its pickle names anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            _refuse_other_formats(path, file.read(1024))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with zipfile.ZipFile(file) as archive:
                return _read_archive(path, archive, mapped)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is truncated or damaged: it begins like a PyTorch checkpoint, but the zip "
            "directory at its end is missing or unreadable"
        ) from None
    except Exception as error:
        # A damaged archive can raise anything; whatever it is, the file is at fault.
        raise UserError(
            f"{path} is damaged: its zip archive cannot be read ({type(error).__name__}: {error})"
        ) from None


def _refuse_other_formats(path: Path, head: bytes) -> None:
    if head.startswith(_LEGACY_HEAD):
        raise UserError(
            f"{path} is in PyTorch's format from before version 1.6, which is not read here; with "
            f"PyTorch installed, save it again by `torch.save(torch.load({str(path)!r}, "
            "map_location='cpu', weights_only=True), 'NEW.pth')`"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer of {len(head)} bytes, not the weights themselves; "
            "fetch it with `git lfs pull`"
        )
    if not head.startswith(b"PK\x03\x04"):
        raise UserError(
            f"{path} is not a PyTorch checkpoint: expected a zip archive as torch.save writes it, "
            f"found {'an empty file' if not head else f'a file that begins with {head[:8]!r}'}"
        )


def _read_archive(path: Path, archive: zipfile.ZipFile, mapped: mmap.mmap) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip archive but not a PyTorch checkpoint: it has no data.pkl")
    root = pickles[0].split("/")[0]
    if f"{root}/constants.pkl" in entries:
        raise UserError(
            f"{path} is a TorchScript program, not a checkpoint; save its `state_dict()` instead"
        )
    if entries[pickles[0]].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is a compressed archive, which PyTorch does not write")
    order = entries.get(f"{root}/byteorder")
    if order is not None and archive.read(order) != b"little":
        raise UserError(f"{path} was written on a big-endian machine; only little-endian is read")

    def open_storage(key: str, dtype: np.dtype, size: int) -> Storage:
        info = entries.get(f"{root}/data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} is damaged: storage {key} is missing or compressed")
        # The local header repeats the name and pads so that the bytes are aligned: only it knows by
        # how much (zip format, section 4.3.7).
        local = mapped[info.header_offset : info.header_offset + 30]
        offset = (
            info.header_offset
            + 30
            + int.from_bytes(local[26:28], "little")
            + int.from_bytes(local[28:30], "little")
        )
        fits = info.file_size >= size * dtype.itemsize and offset + info.file_size <= len(mapped)
        if size < 0 or not fits:
            raise UserError(f"{path} is damaged: storage {key} is shorter than its tensors")
        return Storage(mapped, offset, size, dtype)

    return _unpickle(path, io.BytesIO(archive.read(pickles[0])), open_storage)


def _unpickle(
    path: Path, file: io.BufferedIOBase, open_storage: Callable[[str, np.dtype, int], Storage]
) -> Any:
    try:
        return _TensorUnpickler(path, file, open_storage).load()
    except UserError:
        raise
    except Exception as error:
        # A damaged pickle can raise anything; whatever it is, the file is at fault.
        raise UserError(
            f"{path} is damaged: its pickle cannot be read ({type(error).__name__}: {error})"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Allowed(_Sealed):
    """What an allowed name stands for."""

    name: str
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _Dict(dict):
    """Stands for OrderedDict, whose attributes (`_metadata` of a state dict) are dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and nothing else."""

    def __init__(
        self,
        path: Path,
        file: io.BufferedIOBase,
        open_storage: Callable[[str, np.dtype, int], Storage],
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._open_storage = open_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _Allowed(name, _refuse_call)
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise UserError(
                f"{self._path} is refused: its pickle asks for {module}.{name}, and only tensors "
                "are read; if you trust the file, load it in PyTorch and save its state dict again"
            )
        return allowed

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _location, size = pid
        if kind != "storage":
            raise ValueError(f"unknown persistent id {kind!r}")
        return self._open_storage(str(key), _STORAGE_DTYPES[storage_type.name], int(size))


def _refuse_call(*_: Any) -> Any:
    raise ValueError("a storage type is not a function")


def _rebuild_tensor(
    storage: Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> TorchTensor:
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    if len(shape) != len(strides) or start < 0 or min((*shape, *strides), default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.size:
        raise ValueError(f"a tensor of shape {shape} reaches past the end of its storage")
    return TorchTensor(storage, start, shape, strides)


_ALLOWED = {
    ("collections", "OrderedDict"): _Allowed("OrderedDict", _Dict),
    ("torch._utils", "_rebuild_tensor"): _Allowed("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(
        "_rebuild_parameter", lambda tensor, *_: tensor
    ),
}
