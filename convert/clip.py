"""CLIP checkpoints: a directory of transformers, or open_clip's one file.

Names: huggingface/transformers 5.24, `models/clip/modeling_clip.py`; mlfoundations/open_clip,
`model.py` and `transformer.py`. Both hold the same tensors, but open_clip has query, key and value
in one, and projections as matrices that multiply from the right.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

from convert.checkpoint_files import Checkpoint, open_directory, open_file, read_json_object
from convert.recognise import looks_like
from convert.table import (
    CONV,
    LINEAR,
    Ignored,
    Rule,
    Table,
    Transform,
    norm,
    weight_and_bias,
)
from convert.to_model_dir import Conversion, leaf_shapes
from data_pipelines.encoder_images import CLIP_NORMALISATIONS
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.clip import ClipConfig
from evf_sam_jax.models.families import tower_to_dict
from evf_sam_jax.models.pre_norm import ACTIVATIONS

# The tensors of query, key and value, one after the other <-> a stack of three matrices.
_FUSED_LINEAR = Transform(
    "[3 out,in] <-> [3,in,out]",
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(0, 2, 1),
    lambda x: x.transpose(0, 2, 1).reshape(-1, x.shape[1]),
)
_FUSED_BIAS = Transform("[3 out] <-> [3,out]", lambda x: x.reshape(3, -1), lambda x: x.reshape(-1))

CONFIGS = {
    "clip_l14_openai": ClipConfig.l14_openai(),
    "clip_l14": ClipConfig.l14(),
    "clip_h14": ClipConfig.h14(),
    "clip_tiny": ClipConfig.tiny(),
}
# Begins the variant of what came with open_clip's names, and goes back to them.
OPEN_CLIP = "open_"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_CONFIG = "open_clip_config.json"
# Where the mean and deviation of images are: file, entry, keys. The first is transformers' since 5,
# which takes it before the second; each library takes OpenAI's where its file has none.
_IMAGE_CONFIGS = (
    ("processor_config.json", "image_processor", ("image_mean", "image_std")),
    ("preprocessor_config.json", None, ("image_mean", "image_std")),
    (_OPEN_CLIP_CONFIG, "preprocess_cfg", ("mean", "std")),
)


def table(config: ClipConfig) -> Table:
    """The table of a CLIP under the names that transformers gives its tensors."""
    return _table(config, *_transformers(config))


def table_of_variant(config: ClipConfig, variant: str) -> Table:
    """The table of a CLIP under the names of what it was converted from."""
    if variant.startswith(OPEN_CLIP):
        return _table(config, *_open_clip(config))
    return table(config)


def _table(config: ClipConfig, rules: tuple[Rule, ...], ignored: tuple[Ignored, ...]) -> Table:
    return Table(
        rules=rules,
        fields={
            "text_layer": {str(layer): (layer,) for layer in range(config.text_layers)},
            "vision_layer": {str(layer): (layer,) for layer in range(config.vision_layers)},
            "part": {"q": (0,), "k": (1,), "v": (2,)},
            "clip_fc": {name: name for name in ("fc1", "fc2")},
        },
        ignored=ignored,
    )


def _transformers(config: ClipConfig) -> tuple[tuple[Rule, ...], tuple[Ignored, ...]]:
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    rules = [
        Rule(f"{text}.token_embedding.weight", "encoder/text_embed/embedding"),
        Rule(f"{text}.position_embedding.weight", "encoder/text_positions/embedding"),
        *_layer("text_model.encoder.layers.{text_layer}", "encoder/text_layers"),
        *norm("text_model.final_layer_norm", "encoder/text_norm"),
    ]
    if config.projected:
        target = "encoder/text_projection/kernel"
        rules.append(Rule("text_projection.weight", target, LINEAR))
    if config.fusion != "text":
        rules += [
            Rule(f"{vision}.class_embedding", "encoder/vision_embed/cls_token"),
            Rule(f"{vision}.patch_embedding.weight", "encoder/vision_embed/proj/kernel", CONV),
            Rule(f"{vision}.position_embedding.weight", "encoder/vision_positions/embedding"),
            *norm("vision_model.pre_layrnorm", "encoder/vision_norm_before"),
            *_layer("vision_model.encoder.layers.{vision_layer}", "encoder/vision_layers"),
            *norm("vision_model.post_layernorm", "encoder/vision_norm"),
        ]
        if config.projected:
            target = "encoder/vision_projection/kernel"
            rules.append(Rule("visual_projection.weight", target, LINEAR))
    ignored = (
        Ignored(r"(text|vision)_model\.embeddings\.position_ids", "counts 0, 1, 2 and so on"),
        Ignored("logit_scale", "temperature of contrastive training"),
    )
    return tuple(rules), ignored


def _layer(source: str, target: str) -> tuple[Rule, ...]:
    attention = (f"{source}.self_attn", f"{target}/attention")
    return (
        *norm(f"{source}.layer_norm1", f"{target}/norm1"),
        *weight_and_bias(f"{attention[0]}.{{part}}_proj", f"{attention[1]}/qkv", LINEAR),
        *weight_and_bias(f"{attention[0]}.out_proj", f"{attention[1]}/out_proj", LINEAR),
        *norm(f"{source}.layer_norm2", f"{target}/norm2"),
        *weight_and_bias(f"{source}.mlp.{{clip_fc}}", f"{target}/{{clip_fc}}", LINEAR),
    )


def _open_clip(config: ClipConfig) -> tuple[tuple[Rule, ...], tuple[Ignored, ...]]:
    rules = [
        Rule("token_embedding.weight", "encoder/text_embed/embedding"),
        Rule("positional_embedding", "encoder/text_positions/embedding"),
        *_resblock("transformer.resblocks.{text_layer}", "encoder/text_layers"),
        *norm("ln_final", "encoder/text_norm"),
    ]
    if config.projected:
        rules.append(Rule("text_projection", "encoder/text_projection/kernel"))
    if config.fusion != "text":
        rules += [
            Rule("visual.class_embedding", "encoder/vision_embed/cls_token"),
            Rule("visual.conv1.weight", "encoder/vision_embed/proj/kernel", CONV),
            Rule("visual.positional_embedding", "encoder/vision_positions/embedding"),
            *norm("visual.ln_pre", "encoder/vision_norm_before"),
            *_resblock("visual.transformer.resblocks.{vision_layer}", "encoder/vision_layers"),
            *norm("visual.ln_post", "encoder/vision_norm"),
        ]
        if config.projected:
            rules.append(Rule("visual.proj", "encoder/vision_projection/kernel"))
    return tuple(rules), (Ignored("logit_scale", "temperature of contrastive training"),)


def _resblock(source: str, target: str) -> tuple[Rule, ...]:
    attention = (f"{source}.attn", f"{target}/attention")
    return (
        *norm(f"{source}.ln_1", f"{target}/norm1"),
        Rule(f"{attention[0]}.in_proj_weight", f"{attention[1]}/qkv/kernel", _FUSED_LINEAR),
        Rule(f"{attention[0]}.in_proj_bias", f"{attention[1]}/qkv/bias", _FUSED_BIAS),
        *weight_and_bias(f"{attention[0]}.out_proj", f"{attention[1]}/out_proj", LINEAR),
        *norm(f"{source}.ln_2", f"{target}/norm2"),
        *weight_and_bias(f"{source}.mlp.c_fc", f"{target}/fc1", LINEAR),
        *weight_and_bias(f"{source}.mlp.c_proj", f"{target}/fc2", LINEAR),
    )


@dataclasses.dataclass(frozen=True)
class _Names:
    """What tells the size of a CLIP: names of some tensors, and the layers' as templates."""

    words: str
    text_layer: str
    text_projection: str
    patches: str
    positions: str
    vision_layer: str


_NAMES = {
    "": _Names(
        words="text_model.embeddings.token_embedding.weight",
        text_layer="text_model.encoder.layers.{}.layer_norm1.weight",
        text_projection="text_projection.weight",
        patches="vision_model.embeddings.patch_embedding.weight",
        positions="vision_model.embeddings.position_embedding.weight",
        vision_layer="vision_model.encoder.layers.{}.layer_norm1.weight",
    ),
    OPEN_CLIP: _Names(
        words="token_embedding.weight",
        text_layer="transformer.resblocks.{}.ln_1.weight",
        text_projection="text_projection",
        patches="visual.conv1.weight",
        positions="visual.positional_embedding",
        vision_layer="visual.transformer.resblocks.{}.ln_1.weight",
    ),
}


def convert(path: Path) -> Conversion:
    """Opens a CLIP checkpoint; its size follows from its shapes, all else from its configs.

    The conversion has both towers with their projections, so that a run can use any part of them.

    Args:
      path: a directory with config.json and weights as transformers writes them, or with
        open_clip's `open_clip_pytorch_model.bin`; or a file of weights in such a directory.
    """
    checkpoint = _open(path)
    directory = path if path.is_dir() else path.parent
    prefix, config = _recognise(checkpoint, path)
    notes, source_config = [], None
    if prefix == OPEN_CLIP:
        activation, notes = _open_clip_activation(directory, path)
    else:
        source_config = read_json_object(directory / "config.json")
        activation = _transformers_activation(source_config, config, directory / "config.json")
    config = dataclasses.replace(config, activation=activation, normalisation="openai")
    if config.fusion != "text":
        normalisation, more = _normalisation(directory, prefix == OPEN_CLIP)
        config = dataclasses.replace(config, normalisation=normalisation)
        notes += more
    section = {"encoder": tower_to_dict(config)}
    variant = prefix + _name(config)
    return Conversion(
        variant=variant,
        config=section,
        table=table_of_variant(config, variant),
        shapes=leaf_shapes(section),
        checkpoint=checkpoint,
        where=str(path),
        source_config=source_config,
        tokenizer_dir=directory,
        notes=tuple(notes),
    )


def _open(path: Path) -> Checkpoint:
    if not path.is_dir():
        return open_file(path)
    found = [path / name for name in _OPEN_CLIP_FILES if (path / name).exists()]
    if not (path / "config.json").exists() and found:
        return open_file(found[0])
    return open_directory(path)


def _recognise(checkpoint: Checkpoint, path: Path) -> tuple[str, ClipConfig]:
    """Whose names these are, and the configuration that has these shapes."""
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    found = [(prefix, names) for prefix, names in _NAMES.items() if names.words in shapes]
    if not found:
        raise UserError(
            f"{path} is not a CLIP checkpoint: found {len(shapes)} tensors, none of them "
            f"{' or '.join(names.words for names in _NAMES.values())}{looks_like(shapes)}"
        )
    prefix, names = found[0]
    text = names.patches not in shapes
    layers = [_count(template, shapes) for template in (names.text_layer, names.vision_layer)]
    patch = shapes.get(names.patches, (0, 0, 0, 0))
    for known in CONFIGS.values():
        config = known
        if text:
            projected = names.text_projection in shapes
            config = dataclasses.replace(
                known, fusion="text", readout="text_eos", projected=projected
            )
        same_text = (layers[0], shapes[names.words][-1]) == (config.text_layers, config.text_width)
        sizes = (config.vision_layers, (config.vision_width, 3, *(config.patch_size,) * 2))
        if same_text and (text or (layers[1], patch) == sizes):
            return prefix, config if text else _with_image_size(config, names, shapes, path)
    raise UserError(
        f"{path} is not a CLIP of a known size ({', '.join(CONFIGS)}): found {layers[0]} layers of "
        f"{shapes[names.words][-1]} channels for text, and {layers[1]} of {patch[0]} for images in "
        f"patches of {patch[-1]} pixels"
    )


def _count(template: str, shapes: dict[str, tuple[int, ...]]) -> int:
    return next(layer for layer in itertools.count() if template.format(layer) not in shapes)


def _with_image_size(
    config: ClipConfig, names: _Names, shapes: dict[str, tuple[int, ...]], path: Path
) -> ClipConfig:
    rows = shapes.get(names.positions, (0,))[0]
    side = math.isqrt(max(rows - 1, 0))
    if side < 1 or side * side != rows - 1:
        raise UserError(
            f"{path}: {names.positions} has {rows} rows; expected 1 and a square number"
        )
    return dataclasses.replace(config, image_size=side * config.patch_size)


def _name(config: ClipConfig) -> str:
    """The name of the configuration with these sizes; its activation decides between two."""
    sizes = [
        (name, known)
        for name, known in CONFIGS.items()
        if (known.text_width, known.vision_width) == (config.text_width, config.vision_width)
    ]
    same = [name for name, known in sizes if known.activation == config.activation]
    return (same or [name for name, _ in sizes])[0]


def _transformers_activation(source: dict[str, Any], config: ClipConfig, path: Path) -> str:
    """The activation that config.json names; transformers leaves out what is its default."""
    found = set()
    for tower, heads in (("text", config.text_heads), ("vision", config.vision_heads)):
        if tower == "vision" and config.fusion == "text":
            continue
        section = source.get(f"{tower}_config", source if config.fusion == "text" else {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: expected an object under {tower}_config, found {section!r}")
        if section.get("num_attention_heads", heads) != heads:
            raise UserError(
                f"{path}: expected {heads} attention heads in {tower}_config, found "
                f"{section['num_attention_heads']!r}"
            )
        found.add(section.get("hidden_act", "quick_gelu"))
    if len(found) != 1 or not found <= set(ACTIVATIONS):
        raise UserError(
            f"{path}: expected one hidden_act, {' or '.join(ACTIVATIONS)}, for both towers, found "
            f"{' and '.join(sorted(map(str, found)))}"
        )
    return found.pop()


def _open_clip_activation(directory: Path, path: Path) -> tuple[str, list[str]]:
    """The activation that open_clip's config names, and what to tell where there is none."""
    if not (directory / _OPEN_CLIP_CONFIG).exists():
        note = (
            f"{path} has no {_OPEN_CLIP_CONFIG} beside it: an exact GELU is assumed, as open_clip "
            "trains; OpenAI's weights need one that says quick_gelu"
        )
        return "gelu", [note]
    model = read_json_object(directory / _OPEN_CLIP_CONFIG).get("model_cfg")
    quick = model.get("quick_gelu", False) if isinstance(model, dict) else None
    if not isinstance(quick, bool):
        raise UserError(
            f"{directory / _OPEN_CLIP_CONFIG}: expected model_cfg with true or false under "
            f"quick_gelu, found {model!r}"
        )
    return "quick_gelu" if quick else "gelu", []


def _normalisation(directory: Path, open_clip: bool) -> tuple[str, list[str]]:
    """How images are normalised by the configs in the directory, and what to tell of it.

    Args:
      open_clip: whether the weights are open_clip's, whose config then comes before transformers'.
    """
    configs = _IMAGE_CONFIGS[::-1] if open_clip else _IMAGE_CONFIGS
    found: dict[str, str] = {}
    for name, entry, keys in configs:
        path = directory / name
        if path.exists() and (known := _named(path, entry, keys)):
            found[name] = known
    if not found:
        names = ", ".join(name for name, _, _ in _IMAGE_CONFIGS)
        return "openai", [
            f"{directory} says in none of {names} how images are normalised: OpenAI's mean and "
            "deviation are assumed, which not all weights were trained with"
        ]
    first, *others = found
    notes = [
        f"mean and deviation of images are those of {first} ({found[first]}), not those of {other} "
        f"beside it ({found[other]})"
        for other in others
        if found[other] != found[first]
    ]
    return found[first], notes


def _named(path: Path, entry: str | None, keys: tuple[str, str]) -> str | None:
    """The name of a config's mean and deviation; None if it is not of images."""
    section = read_json_object(path)
    if entry is not None:
        section = section.get(entry)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise UserError(f"{path}: expected an object under {entry}, found {section!r}")
    given = tuple(
        section.get(key, default)
        for key, default in zip(keys, CLIP_NORMALISATIONS["openai"], strict=True)
    )
    for name, known in CLIP_NORMALISATIONS.items():
        if _near(given[0], known[0]) and _near(given[1], known[1]):
            return name
    expected = " or ".join(
        f"{list(mean)} and {list(std)}" for mean, std in CLIP_NORMALISATIONS.values()
    )
    raise UserError(
        f"{path}: expected {' and '.join(keys)} {expected}, found {given[0]!r} and {given[1]!r}"
    )


def _near(given: Any, known: tuple[float, ...]) -> bool:
    """Whether three numbers are the known ones but for rounding to float32."""
    return (
        isinstance(given, list | tuple)
        and len(given) == len(known)
        and all(isinstance(one, int | float) for one in given)
        and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(given, known, strict=True))
    )
