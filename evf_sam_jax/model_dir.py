"""A finished model on disk: everything that evaluation and prediction need.

    DIR/manifest.json              what the model is, and where it came from (`Manifest`)
    DIR/params/                    an Orbax checkpoint, a nested dict of arrays
    DIR/tokenizer/                 the tokenizer's files, if the model came with them
    DIR/passthrough.safetensors    source tensors that the model has no use for, but may go back

The directory appears whole or not at all: it is written beside its place and renamed. Parameters
are written and read a few at a time, so that neither way holds a second model in memory.
"""

import asyncio
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from data_pipelines.tokenizers import CONFIG, KINDS, has_tokenizer
from evf_sam_jax.errors import UserError
from evf_sam_jax.output_directory import new_directory

FORMAT_VERSION = 1
# Glob patterns; those of the vocabulary first, without which texts cannot be encoded.
TOKENIZER_FILES = (
    *(pattern for kind in KINDS for pattern in kind),
    "added_tokens.json",
    CONFIG,
    "special_tokens_map.json",
    "tokenizer.json",
)
# Leaves are written and read together up to this many bytes: one by one, each of the many small
# ones costs a commit (25 ms); all at once, the way to disk or back holds a second model in memory.
_TOGETHER_BYTES = 64 * 2**20

Leaf = Callable[[], np.ndarray] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a model directory holds.

    Attributes:
      variant: name of the model ("evf-sam", "sam_vit_h", "beit3_large", "tiny").
      config: `EvfSamConfig.to_dict()`; of a foundation model, its one tower's entry of it.
      format_version: of the directory.
      profile: the preprocessing that the weights need.
      source: name -> sha256 of the files this was converted from.
      source_config: the config.json of the source.
      source_dtypes: the dtype each source tensor had, under its name; "default" for all others.
      cast_to: the dtype that conversion cast every parameter to; None: the source's own.
      passthrough: tensors in passthrough.safetensors, each with the reason why the model has no use
        for it.
      parameter_counts: parameters of each module, and "total"; filled in on writing.
      has_tokenizer: whether texts can be encoded; filled in on writing.
    """

    variant: str
    config: dict[str, Any]
    format_version: int = FORMAT_VERSION
    profile: str = "current"
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    source_config: dict[str, Any] | None = None
    source_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    cast_to: str | None = None
    passthrough: dict[str, str] = dataclasses.field(default_factory=dict)
    parameter_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    has_tokenizer: bool = False


def write_model_dir(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    manifest: Manifest,
    tokenizer_dir: str | os.PathLike | None = None,
    passthrough: Mapping[str, np.ndarray] | None = None,
) -> Manifest:
    """Writes a model directory, whole or not at all.

    Args:
      path: the new directory; its parents are made.
      params: a nested dict whose keys may be '/'-paths, of arrays or of functions that return one.
        A function is called when its leaf is written, and the leaf let go soon after. Arrays of
        jax must be addressable by this process.
      manifest: `parameter_counts` and `has_tokenizer` are filled in here.
      tokenizer_dir: copies the tokenizer files found there.
      passthrough: source tensors by their names in the source.

    Returns:
      The manifest as written.

    Raises:
      UserError: `path` exists or cannot be written.
    """
    try:
        with new_directory(path, "the model directory") as scratch:
            counts = _write_params(scratch / "params", path_leaves(params))
            if passthrough:
                file = scratch / "passthrough.safetensors"
                safetensors.numpy.save_file(
                    {key: np.array(array, order="C") for key, array in passthrough.items()}, file
                )
                file.chmod(0o644)  # the library's is private
            has_tokenizer = tokenizer_dir is not None and _copy_tokenizer(
                Path(tokenizer_dir), scratch / "tokenizer"
            )
            manifest = dataclasses.replace(
                manifest, parameter_counts=_module_counts(counts), has_tokenizer=has_tokenizer
            )
            text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
            (scratch / "manifest.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return manifest


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Reads what a model directory holds.

    Raises:
      UserError: it is no model directory, or one of another format version.
    """
    path = Path(path)
    file = path / "manifest.json"
    if not os.path.isdir(path):  # Path's own raises for a name that is too long
        found = "is not a directory" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {found}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a model directory: it has no manifest.json") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: expected format_version {FORMAT_VERSION}, found {version!r}; the model "
            "directory was written by another version of evf_sam_jax"
        )
    if not isinstance(values.get("config", {}), dict):
        raise UserError(f"{file}: expected an object under config, found {values['config']!r}")
    try:
        return Manifest(**values)
    except TypeError as error:
        raise UserError(f"{file} is not a manifest: {error}") from None


def check_whole(path: str | os.PathLike, manifest: Manifest) -> None:
    """Raises UserError if the directory of this manifest lacks the encoder or the segmenter."""
    missing = [tower for tower in ("encoder", "segmenter") if tower not in manifest.config]
    if missing:
        raise UserError(
            f"{path}: expected a whole EVF-SAM model, found one without {' and '.join(missing)}"
        )


def load_params(
    path: str | os.PathLike,
    dtype: str | None = None,
    only: str | None = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Reads the parameters as a nested dict, a few leaves at a time.

    Args:
      path: the model directory.
      dtype: cast to this while reading; as stored if None (float64 becomes float32 on a device).
      only: reads the leaves in whose '/'-path this regular expression is found.
      place: puts a leaf (its path and its array) where it shall live, for instance
        `lambda path, leaf: jax.device_put(leaf, shardings[path])`; by default, the default device.

    Raises:
      UserError: the directory is no model directory, is damaged, or `only` matches nothing.
    """
    place = place or (lambda _, leaf: jnp.asarray(leaf))
    return nest({one: place(one, leaf) for one, leaf in iterate_params(path, dtype, only)})


def iterate_params(
    path: str | os.PathLike, dtype: str | None = None, only: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the parameters as (path, array), as `load_params` does, on the host."""
    path = Path(path)
    shapes = {
        one: leaf for one, leaf in describe(path).items() if only is None or re.search(only, one)
    }
    if not shapes:
        raise UserError(f"{path}: no parameter matches {only!r}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for batch in _batches(shapes):
            restore = ocp.RestoreArgs(
                restore_type=np.ndarray, dtype=None if dtype is None else jnp.dtype(dtype)
            )
            wanted = nest(dict.fromkeys(batch, restore))
            try:
                tree = checkpointer.restore(
                    (path / "params").absolute(),
                    args=ocp.args.PyTreeRestore(
                        item=wanted, restore_args=wanted, partial_restore=True
                    ),
                )
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{path / 'params'} is damaged: {_first_line(error)}") from None
            yield from path_leaves(tree).items()


def describe(path: str | os.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter as stored; reads no parameter.

    Raises:
      UserError: the directory is no model directory, or is damaged.
    """
    read_manifest(path)
    params = (Path(path) / "params").absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(params).item_metadata.tree
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{params} is damaged: {_first_line(error)}") from None
    return {
        one: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for one, leaf in path_leaves(tree).items()
    }


def read_passthrough(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The source tensors that the model has no use for, by their names in the source."""
    file = Path(path) / "passthrough.safetensors"
    if not file.exists():
        return {}
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def require_space(path: str | os.PathLike, needed: int) -> None:
    """Raises UserError if the disk that `path` will be on has fewer than `needed` bytes free."""
    existing = next(parent for parent in Path(path).absolute().parents if os.path.isdir(parent))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free"
        )


def path_leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a nested dict to '/'-path -> leaf."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= {f"{key}/{rest}": leaf for rest, leaf in path_leaves(value).items()}
        else:
            leaves[key] = value
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of '/'-path -> leaf."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


@dataclasses.dataclass(frozen=True)
class _PendingLeaf:
    """A leaf that is made when it is written; `written` takes its size then."""

    path: str
    leaf: Leaf
    written: dict[str, int]

    def make(self) -> np.ndarray:
        array = np.asarray(self.leaf() if callable(self.leaf) else self.leaf)
        self.written[self.path] = array.size
        return array


class _InTurnHandler(ocp.type_handlers.NumpyHandler):
    """Writes arrays as Orbax does, so that any Orbax reads them, but makes each at its turn."""

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[Any],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        writing, size = [], 0
        try:
            for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
                array = value.make()
                writing += await super().serialize([array], [info], arg and [arg])
                size += array.nbytes
                del array
                if size >= _TOGETHER_BYTES:
                    await _finish(writing)
                    writing, size = [], 0
        finally:
            # Also where a leaf could not be made: what is still being written would appear in a
            # directory that is being removed.
            await _finish(writing)
        return []


async def _finish(writing: Sequence[Any]) -> None:
    """Waits for all of Orbax's futures, also after one has failed: what they write is removed."""
    waits = (asyncio.to_thread(future.result) for future in writing)
    for result in await asyncio.gather(*waits, return_exceptions=True):
        if isinstance(result, ValueError):  # how TensorStore says that it could not write
            raise OSError(_first_line(result))
        if isinstance(result, BaseException):
            raise result


def _write_params(path: Path, leaves: Mapping[str, Leaf]) -> dict[str, int]:
    """Writes the Orbax checkpoint; returns the number of elements of each leaf."""
    written: dict[str, int] = {}
    registry = ocp.type_handlers.create_type_handler_registry(
        # A copy guards against changes while Orbax writes in the background; here nothing does.
        (_PendingLeaf, _InTurnHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; Orbax warns if it is missing
    )
    # Of several processes only the one that was asked writes; Orbax would wait for the others.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"model_{me}"
    )
    # Weights are noise: compression saves 8 % of the space and doubles the time to load.
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, multiprocessing_options=alone
    )
    tree = nest({one: _PendingLeaf(one, leaf, written) for one, leaf in leaves.items()})
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
    return written


def _batches(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path, leaf in shapes.items():
        leaf_bytes = leaf.size * leaf.dtype.itemsize
        if batch and size + leaf_bytes > _TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += leaf_bytes
    yield batch


def module_of(path: str) -> str:
    """The module that counts are given by: a tower's part, or the projector."""
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] == "segmenter" else 1])


def _module_counts(counts: Mapping[str, int]) -> dict[str, int]:
    modules: dict[str, int] = {}
    for path, count in counts.items():
        modules[module_of(path)] = modules.get(module_of(path), 0) + count
    return dict(sorted(modules.items())) | {"total": sum(counts.values())}


def _copy_tokenizer(source: Path, target: Path) -> bool:
    """Copies the tokenizer files that `source` has; returns whether they can encode texts."""
    files = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern)]
    if files:
        target.mkdir()
        for file in files:
            shutil.copyfile(file, target / file.name)
    return has_tokenizer(source)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
