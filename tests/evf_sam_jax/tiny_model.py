"""A tiny model directory whose random parameters all matter, and pictures for it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from evf_sam_jax import model_dir
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import SegmenterConfig

TOKENIZER = Path(__file__).parents[2] / "data_pipelines" / "shapes_tokenizer"
CONFIG = evf_sam.EvfSamConfig.tiny()


def random_params(config: evf_sam.EvfSamConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Path -> parameter; none is zero, as some are where a training begins."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.normal(size=shape).astype(np.float32)
        if path.endswith("kernel"):
            return values / np.float32(np.sqrt(shape[-2]))
        if path.endswith("bias"):  # larger ones would drown what is asked
            return values / 4
        return 1 + values / 10 if path.endswith("scale") else values

    shapes = model_dir.path_leaves(evf_sam.param_shapes(config))
    return {path: draw(path, leaf.shape) for path, leaf in shapes.items()}


def write_tiny_model(path: Path, config: evf_sam.EvfSamConfig = CONFIG, seed: int = 0) -> Path:
    """Writes the directory, with the tokenizer of the shapes."""
    manifest = model_dir.Manifest(variant="tiny", config=config.to_dict())
    model_dir.write_model_dir(path, random_params(config, seed), manifest, TOKENIZER)
    return path


def write_tiny_segmenter(path: Path, config: SegmenterConfig, seed: int = 0) -> Path:
    """Writes a directory as `python -m convert sam2` and the like do: a segmenter alone."""
    whole = dataclasses.replace(CONFIG, segmenter=config)
    params = random_params(whole, seed)
    own = {name: leaf for name, leaf in params.items() if name.startswith("segmenter/")}
    section = {"segmenter": whole.to_dict()["segmenter"]}
    model_dir.write_model_dir(path, own, model_dir.Manifest("tiny", section))
    return path


def edited(directory: Path, path: Path, **changes: object) -> Path:
    """A copy of a model directory with other values in its manifest."""
    shutil.copytree(directory, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))
    return path


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, smooth enough to survive a resize."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
