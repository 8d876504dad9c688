"""Writes .safetensors one tensor at a time; reading is the library's.

The library writes a dictionary of whole arrays, which would hold a whole model in memory. The
format is simple enough to stream (https://github.com/huggingface/safetensors, section "Format"):
eight bytes of header length, a JSON header of name -> dtype, shape and byte range, then the bytes.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A file whose tensors are declared at once and written in any order, each exactly once."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """Creates the file; `tensors` maps each name to its shape and dtype."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            begins[name], end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _CODES[dtype],
                "shape": list(shape),
                "data_offsets": [begins[name], end],
            }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # so that the tensors begin aligned
        self._missing = dict(tensors)
        self._offsets = {name: 8 + len(encoded) + begin for name, begin in begins.items()}
        self._file = open(path, "wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor.

        Raises:
          ValueError: it was not declared so, or has been written before.
        """
        if self._missing.pop(name, None) != (array.shape, array.dtype):
            raise ValueError(
                f"{name} {array.shape} {array.dtype} was not declared so, or is not new"
            )
        self._file.seek(self._offsets[name])
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(self._file)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"never written: {', '.join(self._missing)}")
