"""Opens a checkpoint, whatever its files: name -> tensor, each still on disk until it is loaded."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from convert.safetensors_files import DTYPES
from convert.torch_files import TorchTensor, read_torch_file
from evf_sam_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their names

# The order in which transformers looks for them: safetensors first, whole files before shards.
_DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint; `load()` reads it (possibly as a read-only view of the file)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its tensors by name, and the files they lie in."""

    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]

    @property
    def shapes(self) -> Shapes:
        """Of the tensors."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def file_hashes(self) -> dict[str, str]:
        """File name -> sha256 of its bytes."""
        return {path.name: _sha256(path) for path in self.files}


def open_directory(directory: Path) -> Checkpoint:
    """Opens a Hugging Face model directory's checkpoint: .safetensors or .bin, whole or sharded."""
    if not os.path.isdir(directory):  # Path's own raises for a name that is too long
        if os.path.exists(directory):
            raise UserError(
                f"{directory}: expected the directory with config.json and the weights, found a "
                "file"
            )
        raise UserError(f"{directory} does not exist")
    for name in _DIRECTORY_FILES:
        path = directory / name
        if path.exists():
            return _open_shards(path) if name.endswith(".index.json") else open_file(path)
    raise UserError(f"{directory} has no checkpoint: expected one of {', '.join(_DIRECTORY_FILES)}")


def open_file(path: Path, wrapped_in: str | None = None) -> Checkpoint:
    """Opens one file, a .safetensors or what torch.save wrote.

    Args:
      path: the file.
      wrapped_in: the state dict is this entry of the saved dictionary, if the dictionary has it.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: expected the file of the checkpoint, found a directory")
    if path.suffix == ".safetensors":
        return Checkpoint(_open_safetensors(path), (path,))
    content = read_torch_file(path)
    if wrapped_in is not None and isinstance(content, dict) and wrapped_in in content:
        content = content[wrapped_in]
    return Checkpoint(_state_dict(path, content), (path,))


def _state_dict(path: Path, content: Any) -> dict[str, SourceTensor]:
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{path} holds no state dict: expected a dictionary of names to tensors, "
            f"found {'an empty one' if content == {} else type(content).__name__}"
        )
    strangers = [key for key, value in content.items() if not isinstance(value, TorchTensor)]
    if strangers:
        raise UserError(
            f"{path} holds no state dict: expected a tensor under every name, found "
            f"{type(content[strangers[0]]).__name__} under {strangers[0]!r}"
        )
    return {
        str(key): SourceTensor(tensor.shape, tensor.dtype, tensor.view)
        for key, tensor in content.items()
    }


def _open_safetensors(path: Path) -> dict[str, SourceTensor]:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        file = safetensors.safe_open(path, framework="numpy")
        slices = {key: file.get_slice(key) for key in file.keys()}
        described = {key: (one.get_shape(), one.get_dtype()) for key, one in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    unknown = sorted({dtype for _, dtype in described.values()} - set(DTYPES))
    if unknown:
        raise UserError(
            f"{path} has tensors of dtype {', '.join(unknown)}, which are not read here"
        )

    def loader(key: str) -> Callable[[], np.ndarray]:
        return lambda: file.get_tensor(key)

    return {
        key: SourceTensor(tuple(shape), DTYPES[dtype], loader(key))
        for key, (shape, dtype) in described.items()
    }


def _open_shards(index: Path) -> Checkpoint:
    """Opens the shards that a *.index.json lists; their keys must be those of its `weight_map`."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map of tensor names to file names")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names the file {name!r}, which is not in its own directory")
    shards = {name: open_file(index.parent / name) for name in names}
    found = [(key, name) for name, shard in shards.items() for key in shard.tensors]
    odd = sorted(set(found) ^ set(weight_map.items()))
    if odd:
        key, name = odd[0]
        state = "lists" if weight_map.get(key) == name else "does not list"
        raise UserError(
            f"{index} and its shards disagree on {len(odd)} tensors; "
            f"the first: it {state} {key!r} in {name}"
        )
    tensors = {key: shards[name].tensors[key] for key, name in weight_map.items()}
    return Checkpoint(tensors, (index, *(index.parent / name for name in names)))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top is an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
