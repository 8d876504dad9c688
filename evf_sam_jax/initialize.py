"""The parameters a run begins with: random ones, foundation models, a finished model.

Each leaf goes from its file straight to the devices it lives on, so that there is never a second
model in memory.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from data_pipelines.shapes import SHAPES_TOKENIZER
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import ExperimentConfig, InitConfig, ShapesDataConfig
from evf_sam_jax.model_dir import (
    Manifest,
    describe,
    iterate_params,
    nest,
    path_leaves,
    read_manifest,
    read_passthrough,
)
from evf_sam_jax.models.evf_sam import RUNS_ONCE, EvfSamConfig, draw_params, param_shapes
from evf_sam_jax.models.released import released_variant
from evf_sam_jax.param_rules import Params, match_rules


def initial_params(
    config: ExperimentConfig,
    shardings: Mapping[str, NamedSharding] | None = None,
    cast: frozenset[str] = frozenset(),
    only: str = "",
) -> Params:
    """All parameters, each times its factor in `init.scale`.

    Args:
      shardings: where the leaf of each '/'-path lives; None: on the default device.
      cast: paths of those that `init.frozen_dtype` is for; all others are float32.
      only: regex of the paths that are wanted; of the others nothing is read or drawn.

    Raises:
      UserError: a directory has not the parameters that the model needs.
    """
    shapes = path_leaves(param_shapes(config.model))
    factors = match_rules(config.init.scale, shapes, "init.scale")
    shapes = {path: leaf for path, leaf in shapes.items() if re.match(only, path)}
    directories = init_directories(config.init)

    def dtype(path: str) -> str:
        return config.init.frozen_dtype if path in cast else "float32"

    leaves: dict[str, Any] = {}
    for key, (directory, pattern) in directories.items():
        expected = {path: leaf for path, leaf in shapes.items() if re.match(pattern, path)}
        if not expected:
            continue
        _check_leaves(key, directory, expected)
        # A foundation may have more, such as the tower of a modality that is left out.
        wanted = "|".join(f"^{re.escape(path)}$" for path in expected)
        for path, leaf in iterate_params(directory, only=wanted):
            scaled = leaf if factors[path] == 1 else factors[path] * leaf
            leaves[path] = _put(path, scaled.astype(dtype(path)), shardings)
    random = {path: factors[path] for path in shapes if path not in leaves}
    if random:
        # Of what is not asked for, the compiler computes nothing. Factors are arguments, so that
        # experiments which differ in them, or in the seed, share what is compiled.
        make = functools.partial(_random, config.model, {path: dtype(path) for path in random})
        places = None if shardings is None else {path: shardings[path] for path in random}
        draw = jax.jit(make, out_shardings=places, compiler_options=RUNS_ONCE)
        leaves |= draw(random, jax.random.key(config.seed))
    return nest({path: leaves[path] for path in shapes})


def init_directories(init: InitConfig) -> dict[str, tuple[str, str]]:
    """Key of the config -> directory, and a regex of the paths that come from there."""
    found = {
        "init.model": (init.model, ""),
        "init.encoder": (init.encoder, "encoder/"),
        "init.segmenter": (init.segmenter, "segmenter/"),
    }
    return {
        key: (directory, f"^{prefix}") for key, (directory, prefix) in found.items() if directory
    }


def tokenizer_directory(config: ExperimentConfig) -> Path:
    """Where the tokenizer of the run's model is.

    Raises:
      UserError: the run begins with nothing that has one, and its phrases need one.
    """
    if directory := config.init.model or config.init.encoder:
        return Path(directory) / "tokenizer"
    if not isinstance(config.data, ShapesDataConfig):
        raise UserError(
            "init: expected model or encoder, whose tokenizer the phrases need, found neither"
        )
    return SHAPES_TOKENIZER


def finished_model(
    config: ExperimentConfig, params: Params, cast: frozenset[str]
) -> tuple[dict[str, Any], Manifest, dict[str, np.ndarray]]:
    """What a model directory is written from at the end of a run.

    Frozen parameters that were cast are read again from where they came, and tensors of a source
    that the model has no use for are handed on, so that every key can go back to PyTorch.

    Args:
      params: arrays, or functions that return one.
      cast: paths of those that `init.frozen_dtype` is for.

    Returns:
      Parameters by path, the manifest, and passthrough tensors.
    """
    leaves = path_leaves(params)
    model = config.model
    name = released_variant(model) or f"{model.encoder.family}-{model.segmenter.family}"
    manifest = Manifest(variant=name, config=model.to_dict(), profile=model.profile)
    passthrough: dict[str, np.ndarray] = {}
    directories = init_directories(config.init)
    if config.init.frozen_dtype != "float32":
        factors = match_rules(config.init.scale, leaves, "init.scale")
        for directory, pattern in directories.values():
            for path in leaves:
                if path in cast and re.match(pattern, path) and factors[path] == 1:
                    leaves[path] = functools.partial(_read_one, directory, path)
    if config.init.model:
        source = read_manifest(config.init.model)
        passthrough = read_passthrough(config.init.model)
        began_as = released_variant(EvfSamConfig.from_dict(source.config))
        manifest = dataclasses.replace(
            source,
            variant=source.variant if began_as == released_variant(model) else name,
            config=model.to_dict(),
            profile=model.profile,
            source={},
            cast_to=None,
        )
    else:  # under the names of the towers' own checkpoints
        reasons: dict[str, str] = {}
        for directory, _ in directories.values():
            passthrough |= read_passthrough(directory)
            reasons |= read_manifest(directory).passthrough
        manifest = dataclasses.replace(manifest, passthrough=reasons)
    return leaves, manifest, passthrough


def _random(
    config: EvfSamConfig,
    dtypes: Mapping[str, str],
    factors: Mapping[str, Float[Array, ""]],
    rng: jax.Array,
) -> dict[str, jax.Array]:
    leaves = path_leaves(draw_params(config, rng))
    return {path: (factors[path] * leaves[path]).astype(dtype) for path, dtype in dtypes.items()}


def _read_one(directory: str, path: str) -> np.ndarray:
    ((_, leaf),) = iterate_params(directory, only=f"^{re.escape(path)}$")
    return leaf


def _put(path: str, leaf: np.ndarray, shardings: Mapping[str, NamedSharding] | None) -> jax.Array:
    if shardings is None:
        return jax.device_put(leaf)
    # Every process has read the whole leaf; each device takes its part.
    return jax.make_array_from_callback(leaf.shape, shardings[path], leaf.__getitem__)


def _check_leaves(key: str, directory: str, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    stored = describe(directory)
    for path, leaf in expected.items():
        if path not in stored:
            raise UserError(f"{key}: expected the parameter {path} in {directory}, found none")
        if stored[path].shape != leaf.shape:
            raise UserError(
                f"{key}: expected {path} of shape {leaf.shape}, found {stored[path].shape} "
                f"in {directory}"
            )
