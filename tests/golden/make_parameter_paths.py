"""Writes parameter_paths.json: the path and shape of every parameter of every configuration.

Checkpoints, freezing, sharding and conversion all speak of these paths. Run
`python -m tests.golden.make_parameter_paths` only for a change of layout that is meant, and read
the difference.
"""

import dataclasses
import json
import pathlib

from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.models.clip import ClipConfig
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import EvfSamConfig, param_shapes
from evf_sam_jax.models.released import RELEASED
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.vilt import ViltConfig

FILE = pathlib.Path(__file__).parent / "parameter_paths.json"


def parameter_paths() -> dict[str, dict[str, list[int]]]:
    """Name of the configuration -> path -> shape; of a foundation model, its own tower's."""
    tiny = EvfSamConfig.tiny()
    evf_sam, evf_sam_base = _shapes(RELEASED["evf-sam"]), _shapes(RELEASED["evf-sam-base"])
    vit_b = _shapes(dataclasses.replace(tiny, segmenter=SamConfig.vit_b()))
    vit_l = _shapes(dataclasses.replace(tiny, segmenter=SamConfig.vit_l()))
    vitt = _shapes(dataclasses.replace(tiny, segmenter=EfficientSamConfig.vitt()))
    vits = _shapes(dataclasses.replace(tiny, segmenter=EfficientSamConfig.vits()))
    sam2 = {
        f"sam2_{size}": _tower(_shapes(dataclasses.replace(tiny, segmenter=config)), "segmenter")
        for size, config in (
            ("hiera_tiny", Sam2Config.hiera_tiny()),
            ("hiera_small", Sam2Config.hiera_small()),
            ("hiera_base_plus", Sam2Config.hiera_base_plus()),
            ("hiera_large", Sam2Config.hiera_large()),
        )
    }
    encoders = {
        name: _tower(_shapes(dataclasses.replace(tiny, encoder=config)), "encoder")
        for name, config in (
            ("clip_l14", ClipConfig.l14()),
            ("clip_h14", ClipConfig.h14()),
            ("vilt_b32", dataclasses.replace(ViltConfig.b32(), readout="pooler")),
        )
    }
    return {
        "evf_sam": evf_sam,
        "tiny": _shapes(tiny),
        "sam_vit_b": _tower(vit_b, "segmenter"),
        "sam_vit_l": _tower(vit_l, "segmenter"),
        "sam_vit_h": _tower(evf_sam, "segmenter"),
        "efficient_sam_vitt": _tower(vitt, "segmenter"),
        "efficient_sam_vits": _tower(vits, "segmenter"),
        **sam2,
        "beit3_base": _tower(evf_sam_base, "encoder"),
        "beit3_large": _tower(evf_sam, "encoder"),
        **encoders,
    }


def _shapes(config: EvfSamConfig) -> dict[str, list[int]]:
    leaves = path_leaves(param_shapes(config))
    return {path: list(leaf.shape) for path, leaf in sorted(leaves.items())}


def _tower(shapes: dict[str, list[int]], tower: str) -> dict[str, list[int]]:
    return {path: shape for path, shape in shapes.items() if path.startswith(f"{tower}/")}


def main() -> None:
    """Writes one line a parameter, so that a difference can be read."""
    blocks = (
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f" {json.dumps(path)}: {json.dumps(shape)}" for path, shape in shapes.items())
        + "\n}"
        for name, shapes in parameter_paths().items()
    )
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
