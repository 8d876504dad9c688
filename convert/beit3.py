"""BEiT-3 checkpoints: `{"model": state dict}` as microsoft/unilm publishes them, or a bare one.

Names: torchscale 0.2.0 `model/BEiT3.py` and `architecture/encoder.py`; heads and the interpolation
of positions: hustvl/EVF-SAM at 9935dc5, `model/unilm/beit3/modeling_finetune.py` and `utils.py`.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from convert.checkpoint_files import Shapes, SourceTensor, open_file
from convert.recognise import looks_like
from convert.table import (
    CONV,
    LINEAR,
    Ignored,
    Rule,
    Table,
    check_source,
    make_plan,
    norm,
    weight_and_bias,
)
from convert.to_model_dir import Conversion, leaf_shapes
from data_pipelines.image_input import resize_bicubic
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.families import tower_to_dict

POSITIONS = "beit3.encoder.embed_positions.A.weight"
_WORDS = "beit3.text_embed.weight"
_PATCHES = "beit3.vision_embed.proj.weight"
_EXTRA_POSITIONS = 3  # two rows of fairseq's offset, and [CLS]

CONFIGS = {
    "beit3_base": Beit3Config.base(),
    "beit3_large": Beit3Config.large(),
    "beit3_tiny": Beit3Config.tiny(),
}
_IGNORED = (
    Ignored(r"beit3\.vision_embed\.mask_token", "stands for masked patches, in pretraining only"),
    Ignored(r"mlm_head\.(weight|bias)", "predicts masked words, in pretraining only"),
    Ignored(r"mim_head\.(weight|bias)", "predicts masked patches, in pretraining only"),
    Ignored(r"language_head\.weight", "projects text for contrastive retrieval"),
    Ignored(r"vision_head\.weight", "projects images for contrastive retrieval"),
    Ignored(r"logit_scale", "temperature of contrastive retrieval"),
)


def table(config: Beit3Config) -> Table:
    """The table of a BEiT-3 encoder: all layers but the last are stacked."""
    last = config.layers - 1
    return Table(
        rules=(
            Rule(_WORDS, "encoder/text_embed/embedding"),
            Rule("beit3.vision_embed.cls_token", "encoder/vision_embed/cls_token"),
            *weight_and_bias("beit3.vision_embed.proj", "encoder/vision_embed/proj", CONV),
            Rule(POSITIONS, "encoder/vision_positions/embedding"),
            Rule("beit3.encoder.embed_positions.B.weight", "encoder/text_positions/embedding"),
            *_layer("beit3.encoder.layers.{layer}", "encoder/layers"),
            *_layer(f"beit3.encoder.layers.{last}", "encoder/last_layer"),
            *norm("beit3.encoder.layer_norm.{branch}", "encoder/layer_norm/{branch}"),
        ),
        fields={
            "branch": {"A": "vision", "B": "text"},
            "proj": {name: name for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "fc": {name: name for name in ("fc1", "fc2")},
            "layer": {str(layer): (layer,) for layer in range(last)},
        },
        ignored=_IGNORED,
    )


def _layer(source: str, target: str) -> tuple[Rule, ...]:
    attention = (f"{source}.self_attn", f"{target}/self_attn")
    ffn = (f"{source}.ffn.{{branch}}", f"{target}/ffn/{{branch}}")
    return (
        *norm(
            f"{source}.self_attn_layer_norm.{{branch}}", f"{target}/self_attn_layer_norm/{{branch}}"
        ),
        *weight_and_bias(
            f"{attention[0]}.{{proj}}.{{branch}}", f"{attention[1]}/{{proj}}/{{branch}}", LINEAR
        ),
        *norm(
            f"{attention[0]}.inner_attn_ln.{{branch}}", f"{attention[1]}/inner_attn_ln/{{branch}}"
        ),
        *norm(f"{source}.final_layer_norm.{{branch}}", f"{target}/final_layer_norm/{{branch}}"),
        *weight_and_bias(f"{ffn[0]}.{{fc}}", f"{ffn[1]}/{{fc}}", LINEAR),
        *norm(f"{ffn[0]}.ffn_layernorm", f"{ffn[1]}/ffn_layernorm"),
    )


def convert(path: Path, image_size: int | None = None) -> Conversion:
    """Opens a BEiT-3 checkpoint; its size follows from its shapes.

    Args:
      path: the .pth (or .safetensors) file.
      image_size: side of the images the encoder shall take; the checkpoint's own if None. Another
        size interpolates the positions of the patches.
    """
    checkpoint = open_file(path, wrapped_in="model")
    variant, config = recognise(checkpoint.shapes, path)
    notes = []
    tensors = dict(checkpoint.tensors)
    if image_size is not None and image_size != config.image_size:
        if image_size <= 0 or image_size % config.patch_size:
            raise UserError(
                f"--image_size: expected a positive multiple of {config.patch_size}, "
                f"found {image_size}"
            )
        # Checked as it is in the file first: afterwards it has the right shape by construction.
        plan = make_plan(table(config), leaf_shapes({"encoder": tower_to_dict(config)}))
        check_source(plan, tensors, str(path))
        config = dataclasses.replace(config, image_size=image_size)
        tensors[POSITIONS] = _interpolated(tensors[POSITIONS], image_size // config.patch_size)
        notes.append(
            f"positions interpolated to images of {image_size} pixels: {POSITIONS} cannot go back "
            "bit-identical"
        )
    section = {"encoder": tower_to_dict(config)}
    return Conversion(
        variant=variant,
        config=section,
        table=table(config),
        shapes=leaf_shapes(section),
        checkpoint=dataclasses.replace(checkpoint, tensors=tensors),
        where=str(path),
        tokenizer_dir=path.parent,  # beit3.spm is published beside the checkpoints
        notes=tuple(notes),
    )


def recognise(shapes: Shapes, path: Path) -> tuple[str, Beit3Config]:
    """The name and the configuration that have these shapes; UserError if it is none."""
    rows = shapes.get(POSITIONS, (0,))[0] - _EXTRA_POSITIONS
    side = math.isqrt(max(rows, 0))
    layers = sum(key.endswith(".self_attn.q_proj.A.weight") for key in shapes)
    for variant, config in CONFIGS.items():
        patches = (config.width, 3, config.patch_size, config.patch_size)
        same_width = shapes.get(_WORDS, (0,))[-1] == config.width
        if layers == config.layers and same_width and shapes.get(_PATCHES) == patches:
            if side < 1 or side * side != rows:
                raise UserError(
                    f"{path}: {POSITIONS} has {rows + _EXTRA_POSITIONS} rows; expected "
                    f"{_EXTRA_POSITIONS} and a square number"
                )
            return variant, dataclasses.replace(config, image_size=side * config.patch_size)
    raise UserError(
        f"{path} is not a BEiT-3 checkpoint of a known size ({', '.join(CONFIGS)}): found "
        f"{len(shapes)} tensors, {layers} layers, and {_WORDS} {list(shapes.get(_WORDS, ()))}"
        f"{looks_like(shapes)}"
    )


def _interpolated(tensor: SourceTensor, side: int) -> SourceTensor:
    def load() -> np.ndarray:
        return interpolate_positions(np.asarray(tensor.load(), np.float32), side).astype(
            tensor.dtype
        )

    rows = _EXTRA_POSITIONS + side * side
    return SourceTensor((rows, tensor.shape[1]), tensor.dtype, load)


def interpolate_positions(
    positions: Float32[np.ndarray, "rows d"], side: int
) -> Float32[np.ndarray, "new_rows d"]:
    """Resizes the positions of the patches to a grid of side x side; the first three rows stay.

    As `F.interpolate(mode="bicubic", align_corners=False)` (a = -0.75, no antialias), which
    `load_model_and_may_interpolate` of the original's `model/unilm/beit3/utils.py` uses.
    """
    extra, grid = positions[:_EXTRA_POSITIONS], positions[_EXTRA_POSITIONS:]
    old = math.isqrt(len(grid))
    resized = resize_bicubic(grid.reshape(old, old, -1), side)
    return np.concatenate([extra, resized.reshape(side * side, -1)])
