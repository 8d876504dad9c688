"""Segment Anything checkpoints (ViT-B, L, H): a bare state dict.

Names: facebookresearch/segment-anything at dca509f, `modeling/*.py`.
"""

from collections.abc import Mapping
from pathlib import Path

from convert.checkpoint_files import Shapes, open_file
from convert.recognise import looks_like
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
from evf_sam_jax.models.families import tower_to_dict
from evf_sam_jax.models.sam.config import DecoderConfig, SamConfig

_POSITIONS = "image_encoder.pos_embed"

CONFIGS = {
    "sam_vit_b": SamConfig.vit_b(),
    "sam_vit_l": SamConfig.vit_l(),
    "sam_vit_h": SamConfig.vit_h(),
    "sam_tiny": SamConfig.tiny(),
}


def table(config: SamConfig) -> Table:
    """The table of a SAM: each group of windowed blocks and its global block are stacked."""
    windowed = config.global_every - 1
    blocks = range(config.depth)
    names = {
        "block_norm": ("norm1", "norm2"),
        "lin": ("lin1", "lin2"),
        "axis": ("rel_pos_h", "rel_pos_w"),
    }
    return Table(
        rules=(
            *_image_encoder(),
            *prompt_encoder_rules("prompt_encoder"),
            *mask_decoder_rules("mask_decoder"),
        ),
        fields={field: {name: name for name in values} for field, values in names.items()}
        | decoder_fields(config)
        | {
            "window_block": {
                str(block): (block // config.global_every, block % config.global_every)
                for block in blocks
                if block % config.global_every != windowed
            },
            "global_block": {
                str(block): (block // config.global_every,)
                for block in blocks
                if block % config.global_every == windowed
            },
        },
    )


def decoder_fields(config: DecoderConfig) -> dict[str, Mapping[str, str | tuple[int, ...]]]:
    """The fields of `prompt_encoder_rules` and `mask_decoder_rules`, but for "lin".

    That is the two layers of a transformer's MLP, which are called differently in SAM-2.
    """
    names = {
        "projection": ("q_proj", "k_proj", "v_proj", "out_proj"),
        "cross": ("cross_attn_token_to_image", "cross_attn_image_to_token"),
        "two_way_norm": ("norm1", "norm2", "norm3", "norm4"),
        "two_way": tuple(str(layer) for layer in range(config.decoder_depth)),
        "head": ("0", "1", "2"),
    }
    fields: dict[str, Mapping[str, str | tuple[int, ...]]] = {
        field: {name: name for name in values} for field, values in names.items()
    }
    return fields | {
        "point": {str(label): (label,) for label in range(4)},
        "mask": {str(token): (token,) for token in range(config.num_multimask + 1)},
    }


def _image_encoder() -> tuple[Rule, ...]:
    target = "segmenter/image_encoder"
    return (
        Rule(_POSITIONS, f"{target}/pos_embed", DROP_LEADING_ONE),
        *weight_and_bias("image_encoder.patch_embed.proj", f"{target}/patch_embed/proj", CONV),
        *_block("image_encoder.blocks.{window_block}", f"{target}/groups/windowed"),
        *_block("image_encoder.blocks.{global_block}", f"{target}/groups/global"),
        Rule("image_encoder.neck.0.weight", f"{target}/neck/conv1/kernel", CONV),
        *norm("image_encoder.neck.1", f"{target}/neck/norm1"),
        Rule("image_encoder.neck.2.weight", f"{target}/neck/conv2/kernel", CONV),
        *norm("image_encoder.neck.3", f"{target}/neck/norm2"),
    )


def _block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.{{block_norm}}", f"{target}/{{block_norm}}"),
        *weight_and_bias(f"{source}.attn.qkv", f"{target}/attn/qkv", LINEAR),
        *weight_and_bias(f"{source}.attn.proj", f"{target}/attn/proj", LINEAR),
        Rule(f"{source}.attn.{{axis}}", f"{target}/attn/{{axis}}"),
        *weight_and_bias(f"{source}.mlp.{{lin}}", f"{target}/mlp/{{lin}}", LINEAR),
    )


def prompt_encoder_rules(source: str) -> tuple[Rule, ...]:
    """The rules of a prompt encoder that is called `source`."""
    target = "segmenter/prompt_encoder"
    masks = (f"{source}.mask_downscaling", f"{target}/mask_downscaling")
    gaussian = "pe_layer{}positional_encoding_gaussian_matrix"
    return (
        Rule(f"{source}.{gaussian.format('.')}", f"{target}/{gaussian.format('/')}"),
        Rule(
            f"{source}.point_embeddings.{{point}}.weight",
            f"{target}/point_embeddings",
            DROP_LEADING_ONE,
        ),
        Rule(f"{source}.not_a_point_embed.weight", f"{target}/not_a_point_embed", DROP_LEADING_ONE),
        Rule(f"{source}.no_mask_embed.weight", f"{target}/no_mask_embed", DROP_LEADING_ONE),
        *weight_and_bias(f"{masks[0]}.0", f"{masks[1]}/conv1", CONV),
        *norm(f"{masks[0]}.1", f"{masks[1]}/norm1"),
        *weight_and_bias(f"{masks[0]}.3", f"{masks[1]}/conv2", CONV),
        *norm(f"{masks[0]}.4", f"{masks[1]}/norm2"),
        *weight_and_bias(f"{masks[0]}.6", f"{masks[1]}/conv3", CONV),
    )


def mask_decoder_rules(source: str) -> tuple[Rule, ...]:
    """The rules of a mask decoder that is called `source`."""
    target = "segmenter/mask_decoder"
    upscaling = (f"{source}.output_upscaling", f"{target}/output_upscaling")
    return (
        *transformer_rules(source),
        *weight_and_bias(f"{upscaling[0]}.0", f"{upscaling[1]}/conv1", CONV_TRANSPOSE),
        *norm(f"{upscaling[0]}.1", f"{upscaling[1]}/norm"),
        *weight_and_bias(f"{upscaling[0]}.3", f"{upscaling[1]}/conv2", CONV_TRANSPOSE),
        *weight_and_bias(
            f"{source}.output_hypernetworks_mlps.{{mask}}.layers.{{head}}",
            f"{target}/output_hypernetworks_mlps/layers_{{head}}",
            LINEAR,
        ),
        *weight_and_bias(
            f"{source}.iou_prediction_head.layers.{{head}}",
            f"{target}/iou_prediction_head/layers_{{head}}",
            LINEAR,
        ),
    )


def transformer_rules(source: str) -> tuple[Rule, ...]:
    """The rules of a mask decoder's tokens and transformer."""
    target = "segmenter/mask_decoder"
    layer = (f"{source}.transformer.layers.{{two_way}}", f"{target}/transformer/layers_{{two_way}}")
    final = "transformer{}final_attn_token_to_image{}{{projection}}"
    return (
        Rule(f"{source}.iou_token.weight", f"{target}/iou_token"),
        Rule(f"{source}.mask_tokens.weight", f"{target}/mask_tokens"),
        *weight_and_bias(
            f"{layer[0]}.self_attn.{{projection}}", f"{layer[1]}/self_attn/{{projection}}", LINEAR
        ),
        *weight_and_bias(
            f"{layer[0]}.{{cross}}.{{projection}}", f"{layer[1]}/{{cross}}/{{projection}}", LINEAR
        ),
        *norm(f"{layer[0]}.{{two_way_norm}}", f"{layer[1]}/{{two_way_norm}}"),
        *weight_and_bias(f"{layer[0]}.mlp.{{lin}}", f"{layer[1]}/mlp/{{lin}}", LINEAR),
        *weight_and_bias(
            f"{source}.{final.format('.', '.')}", f"{target}/{final.format('/', '/')}", LINEAR
        ),
        *norm(f"{source}.transformer.norm_final_attn", f"{target}/transformer/norm_final_attn"),
    )


def convert(path: Path) -> Conversion:
    """Opens a SAM checkpoint; its size follows from its shapes."""
    checkpoint = open_file(path, wrapped_in="model")  # as other families are: to say which it is
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


def recognise(shapes: Shapes, path: Path) -> tuple[str, SamConfig]:
    """The name and the configuration that have these shapes; UserError if it is none."""
    depth = sum(key.endswith(".attn.qkv.weight") for key in shapes)
    found = shapes.get(_POSITIONS, ())
    for variant, config in CONFIGS.items():
        if depth == config.depth and found == (1, config.grid, config.grid, config.width):
            return variant, config
    raise UserError(
        f"{path} is not a SAM checkpoint of a known size ({', '.join(CONFIGS)}): found "
        f"{len(shapes)} tensors, {depth} blocks, and {_POSITIONS} {list(found)}{looks_like(shapes)}"
    )
