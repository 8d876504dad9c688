"""The one way from a PyTorch checkpoint to a model directory, whatever the family."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint_files import Checkpoint
from convert.table import Plan, Table, build_leaf, check_source, leaf_dtype, make_plan
from data_pipelines.tokenizers import has_tokenizer, load_tokenizer, tokenizer_files
from evf_sam_jax.model_dir import Manifest, path_leaves, require_space, write_model_dir
from evf_sam_jax.models.evf_sam import EvfSamConfig, param_shapes
from evf_sam_jax.output_directory import require_absent

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_LISTED = 5  # tensors kept aside for one reason that a note spells out


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A checkpoint that a family has recognised, ready to be converted.

    Attributes:
      variant: name of the model in the manifest.
      config: the manifest's `config`.
      table: the family's rules for this configuration.
      shapes: path -> shape of every leaf to fill.
      checkpoint: the open source.
      where: the source's name in errors.
      source_config: the original's config.json, if it has one.
      tokenizer_dir: where tokenizer files may lie.
      notes: what the user should be told.
    """

    variant: str
    config: dict[str, Any]
    table: Table
    shapes: Mapping[str, tuple[int, ...]]
    checkpoint: Checkpoint
    where: str
    source_config: dict[str, Any] | None = None
    tokenizer_dir: Path | None = None
    notes: tuple[str, ...] = ()


def full_config(config: dict[str, Any]) -> EvfSamConfig:
    """The configuration behind a manifest's `config`; a tower that it lacks is a placeholder."""
    return EvfSamConfig.from_dict(EvfSamConfig.tiny().to_dict() | config)


def leaf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of a manifest's `config`: both towers, or the one it has."""
    shapes = param_shapes(full_config(config))
    towers = {"encoder", "segmenter"} & set(config)
    kept = shapes if len(towers) == 2 else {tower: shapes[tower] for tower in towers}
    return {path: leaf.shape for path, leaf in path_leaves(kept).items()}


def write_conversion(
    conversion: Conversion, model_dir: Path, dtype: str | None = None
) -> tuple[Manifest, tuple[str, ...]]:
    """Converts into a new model directory, leaf by leaf.

    Args:
      conversion: what to convert.
      model_dir: must not exist.
      dtype: cast every parameter to this; the source's own dtypes if None.

    Returns:
      The manifest, and what the user should be told.

    Raises:
      UserError: the checkpoint does not fit the model; nothing has been written.
    """
    require_absent(model_dir, "the model directory")
    _check_tokenizer(conversion)
    plan = make_plan(conversion.table, conversion.shapes)
    tensors = conversion.checkpoint.tensors
    ignored = check_source(plan, tensors, conversion.where)
    target = None if dtype is None else DTYPES[dtype]
    require_space(
        model_dir,
        sum(
            math.prod(plan.shapes[path]) * (target or leaf_dtype(parts, tensors)).itemsize
            for path, parts in plan.parts.items()
        ),
    )
    manifest = Manifest(
        variant=conversion.variant,
        config=conversion.config,
        profile=conversion.config.get("profile", "current"),
        source=conversion.checkpoint.file_hashes(),
        source_config=conversion.source_config,
        source_dtypes=_source_dtypes(plan, conversion.checkpoint),
        cast_to=dtype,
        passthrough=ignored,
    )
    manifest = write_model_dir(
        model_dir,
        {path: functools.partial(build_leaf, plan, path, tensors, target) for path in plan.shapes},
        manifest,
        tokenizer_dir=conversion.tokenizer_dir,
        passthrough={key: tensors[key].load() for key in ignored},
    )
    return manifest, (*conversion.notes, *_notes(conversion, manifest))


def _check_tokenizer(conversion: Conversion) -> None:
    """Raises UserError for a tokenizer that is none: a model with it could not be loaded."""
    source = conversion.tokenizer_dir
    if source is not None and has_tokenizer(source):
        encoder = full_config(conversion.config).encoder
        load_tokenizer(source).check_vocabulary(encoder.vocab_size)


def _source_dtypes(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """The dtype of each source tensor: the commonest as "default", and those that differ."""
    dtypes = {key: checkpoint.tensors[key].dtype.name for key in plan.source_shapes()}
    names = list(dtypes.values())
    default = max(sorted(set(names)), key=names.count)
    return {"default": default} | {key: one for key, one in dtypes.items() if one != default}


def _kept_aside(passthrough: Mapping[str, str]) -> list[str]:
    """What is kept aside, with the reason: every tensor, or one of many with the same reason."""
    notes = []
    for reason in dict.fromkeys(passthrough.values()):
        keys = [key for key, one in passthrough.items() if one == reason]
        if len(keys) > _LISTED:
            notes.append(f"{len(keys)} tensors such as {keys[0]} are kept aside: {reason}")
        else:
            notes += [f"{key} is kept aside: {reason}" for key in keys]
    return notes


def _notes(conversion: Conversion, manifest: Manifest) -> list[str]:
    notes = _kept_aside(manifest.passthrough)
    if manifest.cast_to is not None and set(manifest.source_dtypes.values()) != {manifest.cast_to}:
        notes.append(
            f"parameters were cast to {manifest.cast_to}: what that rounds cannot go back "
            "bit-identical with to-torch"
        )
    if conversion.tokenizer_dir is not None and not manifest.has_tokenizer:
        notes.append(
            f"{conversion.tokenizer_dir} has no tokenizer ({tokenizer_files()}): only token "
            "ids can be used with this model, not texts"
        )
    return notes
