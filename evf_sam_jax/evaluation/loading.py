"""The model that is evaluated: a model directory, or a checkpoint of a training run."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.checkpoints import (
    FOLDER,
    checksum,
    is_begun,
    list_checkpoints,
    read_averaged_params,
)
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import nest, path_leaves, read_manifest
from evf_sam_jax.model_inputs import load_tokenizer
from evf_sam_jax.models import evf_sam
from evf_sam_jax.param_rules import Params
from evf_sam_jax.predictor import Predictor
from evf_sam_jax.run_log import run_directory

NEWEST, BEST = "newest", "best"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on the default device.

    Attributes:
      fingerprint: what tells its parameters and sizes from others.
      name: the directory, and of a run also which checkpoint.
    """

    config: evf_sam.EvfSamConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str
    name: str


def load_model(path: str, checkpoint: str = NEWEST, dtype: str = "float32") -> LoadedModel:
    """Loads a model directory, or a checkpoint from the directory of a training run.

    Of a run, the last stage that has begun is taken, and the moving average of the parameters where
    there is one.

    Args:
      path: the directory.
      checkpoint: of a run: "newest", "best" (by held-out cIoU), or a step.
      dtype: of activations and matrix products, "float32" or "bfloat16".

    Raises:
      UserError: there is no such model, it is damaged, it has no tokenizer, or a checkpoint is
        asked of a model directory, which has none.
    """
    directory = run_directory(path)
    if (directory / "config.json").exists() and not (directory / "manifest.json").exists():
        return _load_checkpoint(directory, checkpoint, dtype)
    manifest = read_manifest(path)
    if checkpoint != NEWEST:
        raise UserError(
            f"config.checkpoint: expected {NEWEST} for a model directory such as {path}, which has "
            f"one model, found {checkpoint!r}"
        )
    if not manifest.has_tokenizer:
        raise UserError(f"{path}: expected a model with a tokenizer, found one without")
    predictor = Predictor.load(path, dtype)
    assert predictor.tokenizer is not None, "the manifest says that there is one"
    found = fingerprint(predictor.config, predictor.params)
    return LoadedModel(predictor.config, predictor.params, predictor.tokenizer, found, str(path))


def fingerprint(config: evf_sam.EvfSamConfig, params: Params) -> str:
    """A short text that changes with any value of the configuration and any bit of a parameter."""
    text = json.dumps([config.to_dict(), checksum(params)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load_checkpoint(run: epath.Path, checkpoint: str, dtype: str) -> LoadedModel:
    values = _run_config(run)
    names = [stage["name"] for stage in values["stages"]]
    begun = [name for name in names if is_begun(run, name)]
    if not begun:
        raise UserError(f"{run}: expected a run with checkpoints, found none")
    stage = begun[-1]
    step = _choose(run / FOLDER / stage, list_checkpoints(run, stage), checkpoint)
    config = evf_sam.with_dtype(evf_sam.EvfSamConfig.from_dict(values["model"]), dtype)
    tokenizer = load_tokenizer(_tokenizer_directory(values), config)
    leaves = path_leaves(read_averaged_params(run, stage, step))
    params = {
        path: jax.device_put(leaf.astype(evf_sam.param_dtype(path, dtype)))
        for path, leaf in leaves.items()
    }
    params = nest(params)
    found = fingerprint(config, params)
    return LoadedModel(config, params, tokenizer, found, f"{run} ({stage}, step {step})")


def _run_config(run: epath.Path) -> dict[str, Any]:
    """Raises UserError unless it is the directory of a training run."""
    try:
        values = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run / 'config.json'}: expected JSON, found it damaged: {error}"
        ) from None
    if not isinstance(values, dict) or not {"stages", "model", "data", "init"} <= values.keys():
        raise UserError(
            f"{run}: expected a model directory or a training run, found a run of another kind"
        )
    return values


def _choose(folder: epath.Path, scores: Mapping[int, float | None], checkpoint: str) -> int:
    """The step that is asked for. Raises UserError if there is none such."""
    if checkpoint == NEWEST:
        return max(scores)
    if checkpoint == BEST:
        ranked = [(score, step) for step, score in scores.items() if score is not None]
        if not ranked:
            raise UserError(
                f"config.checkpoint: expected newest or a step, since none in {folder} has been "
                "measured on held-out images, found best"
            )
        return max(ranked)[1]
    if not checkpoint.isdecimal() or int(checkpoint) not in scores:
        steps = ", ".join(map(str, scores))
        raise UserError(
            f"config.checkpoint: expected {NEWEST}, {BEST} or a step of {folder} ({steps}), "
            f"found {checkpoint!r}"
        )
    return int(checkpoint)


def _tokenizer_directory(values: Mapping[str, Any]) -> Path:
    """Where the run that has these values took its tokenizer from."""
    init = values["init"]
    if directory := init["model"] or init["encoder"]:
        return Path(directory) / "tokenizer"
    return SHAPES_TOKENIZER
