"""ViLT checkpoints: a directory of transformers, such as `dandelin/vilt-b32-mlm`.

Names: huggingface/transformers 5.24, `models/vilt/modeling_vilt.py`.
"""

import dataclasses
from pathlib import Path

from convert.checkpoint_files import Checkpoint, open_directory, read_json_object
from convert.recognise import looks_like
from convert.table import (
    CONV,
    DROP_LEADING_ONE,
    LINEAR,
    Ignored,
    Rule,
    Table,
    norm,
    weight_and_bias,
)
from convert.to_model_dir import Conversion, leaf_shapes
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.families import tower_to_dict
from evf_sam_jax.models.vilt import ViltConfig

_WORDS = "vilt.embeddings.text_embeddings.word_embeddings.weight"
_PATCHES = "vilt.embeddings.patch_embeddings.projection.weight"
_POSITIONS = "vilt.embeddings.position_embeddings"
_POOLER = "vilt.pooler.dense.weight"

CONFIGS = {"vilt_b32": ViltConfig.b32(), "vilt_tiny": ViltConfig.tiny()}
_IGNORED = (
    Ignored(r"mlm_score\..*", "predicts masked words, in pretraining only"),
    Ignored(r"itm_score\..*", "tells whether text and image belong together, in pretraining only"),
    Ignored(r"(classifier|rank_output)\..*", "the head of another task"),
    Ignored(r"vilt\.embeddings\.text_embeddings\.position_ids", "counts 0, 1, 2 and so on"),
    Ignored(r"vilt\.embeddings\.text_embeddings\.token_type_ids", "only zeros"),
)
_POOLER_IGNORED = Ignored(r"vilt\.pooler\.dense\.(weight|bias)", "is not read out")
_IMAGES_IGNORED = Ignored(
    r"vilt\.embeddings\.(cls_token|position_embeddings|patch_embeddings\..*)", "is of images"
)


def table(config: ViltConfig) -> Table:
    """The table of a ViLT."""
    text, images = "vilt.embeddings.text_embeddings", "vilt.embeddings"
    rules = [
        Rule(_WORDS, "encoder/text_embed/embedding"),
        Rule(f"{text}.position_embeddings.weight", "encoder/text_positions/embedding"),
        Rule(f"{text}.token_type_embeddings.weight", "encoder/text_types/embedding"),
        *norm(f"{text}.LayerNorm", "encoder/text_embed_norm"),
        Rule(f"{images}.token_type_embeddings.weight", "encoder/modality_types/embedding"),
        *_layer("vilt.encoder.layer.{encoder_layer}", "encoder/layers"),
        *norm("vilt.layernorm", "encoder/norm"),
    ]
    ignored = list(_IGNORED)
    if config.fusion == "text":
        ignored.append(_IMAGES_IGNORED)
    else:
        projection = f"{images}.patch_embeddings.projection"
        rules += [
            Rule(f"{images}.cls_token", "encoder/cls_token"),
            Rule(_POSITIONS, "encoder/image_positions", DROP_LEADING_ONE),
            *weight_and_bias(projection, "encoder/patch_embed", CONV),
        ]
    if config.readout == "pooler":
        rules += weight_and_bias("vilt.pooler.dense", "encoder/pooler", LINEAR)
    else:
        ignored.append(_POOLER_IGNORED)
    return Table(
        rules=tuple(rules),
        fields={
            "encoder_layer": {str(layer): (layer,) for layer in range(config.layers)},
            "part": {"query": (0,), "key": (1,), "value": (2,)},
        },
        ignored=tuple(ignored),
    )


def _layer(source: str, target: str) -> tuple[Rule, ...]:
    attention = (f"{source}.attention", f"{target}/attention")
    return (
        *norm(f"{source}.layernorm_before", f"{target}/norm1"),
        *weight_and_bias(f"{attention[0]}.attention.{{part}}", f"{attention[1]}/qkv", LINEAR),
        *weight_and_bias(f"{attention[0]}.output.dense", f"{attention[1]}/out_proj", LINEAR),
        *norm(f"{source}.layernorm_after", f"{target}/norm2"),
        *weight_and_bias(f"{source}.intermediate.dense", f"{target}/fc1", LINEAR),
        *weight_and_bias(f"{source}.output.dense", f"{target}/fc2", LINEAR),
    )


# What a conversion can be asked to read out: the pooler's weights belong to the model, or are kept
# aside.
READOUTS = ("text_cls", "pooler")


def convert(path: Path, readout: str = READOUTS[0]) -> Conversion:
    """Opens a ViLT directory; its size follows from its shapes.

    Args:
      readout: one of `READOUTS`. A run can read out all else of either, but the pooler only where
        it was asked for here.
    """
    checkpoint = open_directory(path)
    source_config = read_json_object(path / "config.json")
    variant, config = _recognise(checkpoint, path)
    if readout == "pooler" and _POOLER not in checkpoint.tensors:
        raise UserError(f"{path}: expected {_POOLER} for the read-out pooler, found none")
    config = dataclasses.replace(config, readout=readout)
    found = source_config.get("num_attention_heads", config.heads)
    if found != config.heads:
        raise UserError(
            f"{path / 'config.json'}: expected {config.heads} attention heads, found {found!r}"
        )
    section = {"encoder": tower_to_dict(config)}
    return Conversion(
        variant=variant,
        config=section,
        table=table(config),
        shapes=leaf_shapes(section),
        checkpoint=checkpoint,
        where=str(path),
        source_config=source_config,
        tokenizer_dir=path,
    )


def _recognise(checkpoint: Checkpoint, path: Path) -> tuple[str, ViltConfig]:
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    if _WORDS not in shapes:
        raise UserError(
            f"{path} is not a ViLT checkpoint: found {len(shapes)} tensors, none of them {_WORDS}"
            f"{looks_like(shapes)}"
        )
    layers = sum(key.endswith(".attention.attention.query.weight") for key in shapes)
    patches, positions = shapes.get(_PATCHES, ()), shapes.get(_POSITIONS, ())
    for variant, config in CONFIGS.items():
        width, patch = config.width, config.patch_size
        if (layers, patches, positions) == (
            config.layers,
            (width, 3, patch, patch),
            (1, 1 + config.grid**2, width),
        ):
            return variant, config
    raise UserError(
        f"{path} is not a ViLT of a known size ({', '.join(CONFIGS)}): found {layers} layers, "
        f"{_PATCHES} {list(patches)} and {_POSITIONS} {list(positions)}"
    )
