"""A model directory back to PyTorch: .safetensors under the original's names."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import evf_sam
from convert.families import tower_table
from convert.safetensors_files import SafetensorsWriter
from convert.table import Plan, Table, common_dtype, make_plan
from convert.to_model_dir import full_config, leaf_shapes
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import (
    Manifest,
    describe,
    iterate_params,
    read_manifest,
    read_passthrough,
    require_space,
)
from evf_sam_jax.output_directory import new_directory, require_absent


def table_of(config: dict[str, Any], variant: str = "") -> Table:
    """The table of a manifest's `config`, which has both towers or one, and its `variant`."""
    whole = full_config(config)
    if "encoder" not in config:
        return tower_table(whole.segmenter, variant)
    if "segmenter" not in config:
        return tower_table(whole.encoder, variant)
    return evf_sam.table(whole)


def write_torch(model_dir: Path, out_dir: Path) -> tuple[str, ...]:
    """Writes OUT_DIR/model.safetensors, with config.json and the tokenizer files.

    A tensor goes back in the dtype it had in the source wherever that loses nothing, so an
    unchanged directory gives back the source's bits. Parameters that have changed since, or were
    cast, go in the dtype they are stored in.

    Returns:
      What the user should be told.

    Raises:
      UserError: OUT_DIR exists or cannot be written, or MODEL_DIR is no model directory or damaged.
    """
    require_absent(out_dir)
    manifest = read_manifest(model_dir)
    plan = make_plan(table_of(manifest.config, manifest.variant), leaf_shapes(manifest.config))
    stored = describe(model_dir)
    if {path: leaf.shape for path, leaf in stored.items()} != plan.shapes:
        raise UserError(
            f"{model_dir}: the parameters are not those of the configuration in its manifest"
        )
    passthrough = read_passthrough(model_dir)
    if {"encoder", "segmenter"} <= set(manifest.config):
        whole = full_config(manifest.config)
        passthrough = {evf_sam.whole_name(whole, key): x for key, x in passthrough.items()}
    dtypes = _source_dtypes(manifest, plan, stored)
    lossy = _lossy(model_dir, plan, dtypes, stored)
    header = {
        part.key: (part.shape, stored[path].dtype if part.key in lossy else dtypes[part.key])
        for path, parts in plan.parts.items()
        for part in parts
    } | {key: (array.shape, array.dtype) for key, array in passthrough.items()}
    require_space(out_dir, sum(math.prod(shape) * one.itemsize for shape, one in header.values()))
    try:
        with new_directory(out_dir) as scratch:
            with SafetensorsWriter(scratch / "model.safetensors", header) as writer:
                for path, leaf in iterate_params(model_dir):
                    for part in plan.parts[path]:
                        tensor = part.transform.to_torch(leaf[part.index])
                        writer.write(part.key, tensor.astype(header[part.key][1], copy=False))
                for key, array in passthrough.items():
                    writer.write(key, array)
            content = config_json(manifest, model_dir / "tokenizer")
            if content is not None:
                text = json.dumps(content, indent=2) + "\n"
                (scratch / "config.json").write_text(text, encoding="utf-8")
            if (model_dir / "tokenizer").is_dir():
                shutil.copytree(model_dir / "tokenizer", scratch, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written: {error.strerror or error}") from None
    return _notes(manifest, len(lossy))


def _source_dtypes(
    manifest: Manifest, plan: Plan, stored: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.dtype]:
    """The dtype that each tensor had in the source; as stored where there was no source."""
    names = manifest.source_dtypes
    default = names.get("default")
    return {
        part.key: jnp.dtype(names.get(part.key, default or stored[path].dtype))
        for path, parts in plan.parts.items()
        for part in parts
    }


def _lossy(
    model_dir: Path,
    plan: Plan,
    dtypes: Mapping[str, np.dtype],
    stored: Mapping[str, jax.ShapeDtypeStruct],
) -> set[str]:
    """The tensors that cannot go back in their source's dtype without losing something.

    Most are stored in it. A stored dtype that is wider (a stack whose layers differed, or a model
    trained on in float32) is narrowed if all its values survive, which means reading them first.
    """
    lossy, uncertain = set(), set()
    for path, parts in plan.parts.items():
        for part in parts:
            source, kept = dtypes[part.key], stored[path].dtype
            if common_dtype(source, kept) != kept:
                lossy.add(part.key)
            elif source != kept:
                uncertain.add(path)
    if uncertain:
        only = "|".join(f"^{re.escape(path)}$" for path in sorted(uncertain))
        for path, leaf in iterate_params(model_dir, only=only):
            for part in plan.parts[path]:
                if not _survives(leaf[part.index], dtypes[part.key]):
                    lossy.add(part.key)
    return lossy


def _survives(array: np.ndarray, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):  # what overflows does not survive
        back = array.astype(dtype).astype(array.dtype)
    return bool(np.array_equal(back.reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8)))


def config_json(manifest: Manifest, tokenizer_dir: Path) -> dict[str, Any] | None:
    """The config.json of the source; of a whole model, such that it describes the model.

    A model may be in another profile than its source needs, and what was trained on may read out
    something else than its source did.
    """
    content = manifest.source_config
    if not {"encoder", "segmenter"} <= set(manifest.config):
        return content
    config = full_config(manifest.config)
    own = evf_sam.source_config_of(manifest.variant, config)
    if content is None:
        return own
    if evf_sam.described(content, tokenizer_dir) == config:
        return content
    return content | {evf_sam.OWN_CONFIG: own[evf_sam.OWN_CONFIG]}


def _notes(manifest: Manifest, lossy: int) -> tuple[str, ...]:
    if not lossy:
        return ()
    why = (
        f"were cast to {manifest.cast_to} when they were converted"
        if manifest.cast_to
        else "are not what a source held"
    )
    return (
        f"{lossy} tensors {why}: they are written as they are stored, not as a source had them",
    )
