"""Tiny checkpoints under the originals' names, for the tests that need no PyTorch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from convert import evf_sam
from convert.table import make_plan
from convert.to_model_dir import leaf_shapes
from convert.to_torch import table_of
from evf_sam_jax.models.evf_sam import EvfSamConfig

TINY = EvfSamConfig.tiny()
SECTIONS: dict[str, dict[str, Any]] = {
    "evf-sam": TINY.to_dict(),
    "sam": {"segmenter": TINY.to_dict()["segmenter"]},
    "beit3": {"encoder": TINY.to_dict()["encoder"]},
}
MASK_TOKEN = {"evf-sam": "mm_extractor.beit3.vision_embed.mask_token"}
MASK_TOKEN["beit3"] = "beit3.vision_embed.mask_token"
HALF, BRAIN = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def state_dict(family: str, dtype: np.dtype | str = "float32") -> dict[str, np.ndarray]:
    """A random state dict of a tiny model, the tensors that it has no use for included.

    Args:
      family: "evf-sam", "sam" or "beit3".
      dtype: of every tensor, or "mixed": three dtypes by turns, within stacks too.
    """
    section = SECTIONS[family]
    shapes = make_plan(table_of(section), leaf_shapes(section)).source_shapes()
    if family in MASK_TOKEN:
        shapes[MASK_TOKEN[family]] = (1, 1, TINY.encoder.width)
    if family == "beit3":
        width = TINY.encoder.width
        shapes |= {
            "mlm_head.weight": (TINY.encoder.vocab_size, width),
            "mlm_head.bias": (TINY.encoder.vocab_size,),
            "mim_head.weight": (8, width),
            "mim_head.bias": (8,),
            "language_head.weight": (width, width),
            "vision_head.weight": (width, width),
            "logit_scale": (),
        }
    rng = np.random.default_rng(0)
    turns = (np.dtype(np.float32), HALF, BRAIN)
    arrays = {}
    for turn, (key, shape) in enumerate(sorted(shapes.items())):
        one = turns[turn % 3] if dtype == "mixed" else np.dtype(dtype)
        arrays[key] = np.asarray(rng.normal(size=shape)).astype(one)
    # Values that a careless cast or sum would change.
    first = next(iter(arrays.values()))
    first.reshape(-1)[:5] = [np.nan, np.inf, -np.inf, -0.0, 1e-7]
    return arrays


def write_config(directory: Path, **changes: Any) -> None:
    """Writes the config.json of a tiny EVF-SAM; a change to None leaves a key out."""
    config = evf_sam.source_config_of("tiny", TINY) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_evf_sam(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a directory as published: config.json and model.safetensors."""
    directory.mkdir()
    write_config(directory)
    safetensors.numpy.save_file(dict(arrays), directory / "model.safetensors")
