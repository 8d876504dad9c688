"""EfficientSAM checkpoints (T, S): `{"model": state dict}`, or a bare one.

Names: yformer/EfficientSAM at d525f62, `efficient_sam/*.py`.
"""

from pathlib import Path

from convert.checkpoint_files import Shapes, open_file
from convert.recognise import looks_like
from convert.sam import decoder_fields, transformer_rules
from convert.table import (
    CONV,
    CONV_TRANSPOSE,
    DROP_LEADING_ONE,
    LINEAR,
    Rule,
    Table,
    norm,
    weight_and_bias,
)
from convert.to_model_dir import Conversion, leaf_shapes
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.families import tower_to_dict

_POSITIONS = "image_encoder.pos_embed"

CONFIGS = {
    "efficient_sam_vitt": EfficientSamConfig.vitt(),
    "efficient_sam_vits": EfficientSamConfig.vits(),
    "efficient_sam_tiny": EfficientSamConfig.tiny(),
}


def table(config: EfficientSamConfig) -> Table:
    """The table of an EfficientSAM: all blocks of the image encoder are stacked."""
    points = (
        "invalid_points",
        "point_embeddings",
        "bbox_top_left_embeddings",
        "bbox_bottom_right_embeddings",
    )
    return Table(
        rules=(*_image_encoder(), *_prompt_encoder(), *_mask_decoder()),
        fields={
            **decoder_fields(config),
            "lin": {"layers.0.0": "lin1", "fc": "lin2"},
            "head": {"layers.0.0": "0", "layers.1.0": "1", "fc": "2"},
            "point": {name: (row,) for row, name in enumerate(points)},
            "image_block": {str(block): (block,) for block in range(config.depth)},
            "image_norm": {name: name for name in ("norm1", "norm2")},
            "image_mlp": {name: name for name in ("fc1", "fc2")},
        },
    )


def _image_encoder() -> tuple[Rule, ...]:
    source, target = "image_encoder", "segmenter/image_encoder"
    block = (f"{source}.blocks.{{image_block}}", f"{target}/blocks")
    return (
        Rule(_POSITIONS, f"{target}/pos_embed", DROP_LEADING_ONE),
        *weight_and_bias(f"{source}.patch_embed.proj", f"{target}/patch_embed/proj", CONV),
        *norm(f"{block[0]}.{{image_norm}}", f"{block[1]}/{{image_norm}}"),
        *weight_and_bias(f"{block[0]}.attn.qkv", f"{block[1]}/attn/qkv", LINEAR),
        *weight_and_bias(f"{block[0]}.attn.proj", f"{block[1]}/attn/proj", LINEAR),
        *weight_and_bias(f"{block[0]}.mlp.{{image_mlp}}", f"{block[1]}/mlp/{{image_mlp}}", LINEAR),
        Rule(f"{source}.neck.0.weight", f"{target}/neck/conv1/kernel", CONV),
        *norm(f"{source}.neck.1", f"{target}/neck/norm1"),
        Rule(f"{source}.neck.2.weight", f"{target}/neck/conv2/kernel", CONV),
        *norm(f"{source}.neck.3", f"{target}/neck/norm2"),
    )


def _prompt_encoder() -> tuple[Rule, ...]:
    source, target = "prompt_encoder", "segmenter/prompt_encoder"
    gaussian = "pe_layer{}positional_encoding_gaussian_matrix"
    return (
        Rule(f"{source}.{gaussian.format('.')}", f"{target}/{gaussian.format('/')}"),
        Rule(f"{source}.{{point}}.weight", f"{target}/point_embeddings", DROP_LEADING_ONE),
    )


def _mask_decoder() -> tuple[Rule, ...]:
    source, target = "mask_decoder", "segmenter/mask_decoder"
    upscaling = (f"{source}.final_output_upscaling_layers", f"{target}/output_upscaling")
    return (
        *transformer_rules(source),
        *weight_and_bias(f"{upscaling[0]}.0.0", f"{upscaling[1]}/conv1", CONV_TRANSPOSE),
        *norm(f"{upscaling[0]}.0.1", f"{upscaling[1]}/norm"),
        *weight_and_bias(f"{upscaling[0]}.1.0", f"{upscaling[1]}/conv2", CONV_TRANSPOSE),
        *weight_and_bias(
            f"{source}.output_hypernetworks_mlps.{{mask}}.{{head}}",
            f"{target}/output_hypernetworks_mlps/layers_{{head}}",
            LINEAR,
        ),
        *weight_and_bias(
            f"{source}.iou_prediction_head.{{head}}",
            f"{target}/iou_prediction_head/layers_{{head}}",
            LINEAR,
        ),
    )


def convert(path: Path) -> Conversion:
    """Opens an EfficientSAM checkpoint; its size follows from its shapes."""
    checkpoint = open_file(path, wrapped_in="model")
    variant, config = recognise(checkpoint.shapes, path)
    section = {"segmenter": tower_to_dict(config)}
    return Conversion(
        variant=variant,
        config=section,
        table=table(config),
        shapes=leaf_shapes(section),
        checkpoint=checkpoint,
        where=str(path),
    )


def recognise(shapes: Shapes, path: Path) -> tuple[str, EfficientSamConfig]:
    """The name and the configuration that have these shapes; UserError if it is none."""
    depth = sum(key.endswith(".attn.qkv.weight") for key in shapes)
    found = shapes.get(_POSITIONS, ())
    for variant, config in CONFIGS.items():
        if depth == config.depth and found == (1, 1 + config.table_size**2, config.width):
            return variant, config
    raise UserError(
        f"{path} is not an EfficientSAM checkpoint of a known size ({', '.join(CONFIGS)}): found "
        f"{len(shapes)} tensors, {depth} blocks, and {_POSITIONS} {list(found)}{looks_like(shapes)}"
    )
