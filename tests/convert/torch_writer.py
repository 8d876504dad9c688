"""Writes PyTorch's zip checkpoints without PyTorch, for the torch-free tests; also ill-formed ones.

The pickles are assembled from opcodes, since Python pickles a name only if it can import it. The
`torch` tier checks that PyTorch reads what this writes.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


def save(path: Path, tensors: Mapping[str, np.ndarray], wrapped_in: str | None = None) -> None:
    """Writes a state dict as torch.save does; `wrapped_in` puts it under a key of a dictionary."""
    state = b"}" + b"("
    storages = []
    for key, (name, array) in enumerate(tensors.items()):
        array = np.asarray(array, order="C")
        strides = [step // array.itemsize for step in array.strides]
        state += text(name) + tensor(array.dtype, str(key), array.size, 0, array.shape, strides)
        storages.append(array.tobytes())
    state += b"u"  # SETITEMS
    if wrapped_in is not None:
        state = b"}" + b"(" + text(wrapped_in) + state + b"u"
    write_archive(path, state, storages)


def write_archive(path: Path, program: bytes, storages: Sequence[bytes] = ()) -> None:
    """Writes an archive whose pickle runs `program`, opcodes that leave one object."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/byteorder", b"little")
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage)
        archive.writestr("archive/version", b"3\n")


def tensor(
    dtype: np.dtype,
    storage: str,
    storage_size: int,
    start: int,
    shape: Sequence[int],
    strides: Sequence[int],
) -> bytes:
    """The opcodes of a tensor: torch._utils._rebuild_tensor_v2 of a persistent storage."""
    kind = f"ctorch\n{STORAGES[np.dtype(dtype)]}\n".encode()
    pid = b"(" + text("storage") + kind + text(storage) + text("cpu") + number(storage_size) + b"tQ"
    arguments = b"(" + pid + number(start) + numbers(shape) + numbers(strides)
    no_gradient, no_hooks = b"\x89", b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + no_gradient + no_hooks + b"tR"


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without the header and the final stop


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"
