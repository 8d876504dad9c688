"""EVF-SAM model directories as published on Hugging Face: config.json, weights, tokenizer files.

Names: hustvl/EVF-SAM at 9935dc5, `model/evf_sam.py`; config: `model/configuration_evf.py`. The
weights are a BEiT-3, a SAM and a projector, so the table is theirs with prefixes.

A model that came without a config.json (one trained here, of any size) goes to PyTorch with its
configuration under `evf_sam_jax` in config.json, and comes back by it.
"""

from pathlib import Path
from typing import Any

from convert.checkpoint_files import open_directory, read_json_object
from convert.families import tower_table
from convert.table import LINEAR, Rule, Table, joined, weight_and_bias
from convert.to_model_dir import Conversion, leaf_shapes
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.evf_sam import EvfSamConfig

_OWN_CONFIG = "evf_sam_jax"
_CONFIGS = {
    ("huge", "large"): ("evf-sam", EvfSamConfig.evf_sam()),
    ("huge", "base"): ("evf-sam-base", EvfSamConfig.evf_sam_base()),
}
# model/configuration_evf.py; sam_scale and mm_extractor_scale have no default.
_DEFAULTS = {"hidden_size": 768, "out_dim": 256}
_OTHER_SEGMENTERS = {
    "EvfSam2Model": "EVF-SAM2 (SAM-2)",
    "EvfEffiSamModel": "EVF-EffiSAM (EfficientSAM)",
}


def table(config: EvfSamConfig) -> Table:
    """The table of an EVF-SAM: its two towers' and the projector's."""
    projector: tuple[Rule, ...] = (
        *weight_and_bias("text_hidden_fcs.0.0", "projector/hidden", LINEAR),
        *weight_and_bias("text_hidden_fcs.0.2", "projector/out", LINEAR),
    )
    return joined(
        tower_table(config.encoder).prefixed("mm_extractor."),
        Table(projector, fields={}),
        tower_table(config.segmenter).prefixed("visual_model."),
    )


def convert(directory: Path) -> Conversion:
    """Opens an EVF-SAM directory; config.json says which model it is."""
    checkpoint = open_directory(directory)
    source_config = read_json_object(directory / "config.json")
    variant, config = recognise(source_config, directory / "config.json")
    return Conversion(
        variant=variant,
        config=config.to_dict(),
        table=table(config),
        shapes=leaf_shapes(config.to_dict()),
        checkpoint=checkpoint,
        where=str(directory),
        source_config=source_config,
        tokenizer_dir=directory,
    )


def recognise(source_config: dict[str, Any], where: Path) -> tuple[str, EvfSamConfig]:
    """The variant and configuration that a config.json describes."""
    if _OWN_CONFIG in source_config:
        own = source_config[_OWN_CONFIG]
        if not isinstance(own, dict) or set(own) != {"variant", "config"}:
            raise UserError(
                f"{where}: expected an object of variant and config under {_OWN_CONFIG}"
            )
        return str(own["variant"]), EvfSamConfig.from_dict(own["config"])
    values: dict[str, Any] = {**_DEFAULTS, **source_config}
    for key, expected in (("sam_scale", "'huge'"), ("mm_extractor_scale", "'large' or 'base'")):
        if key not in values:
            raise UserError(f"{where} has no {key}: expected {expected}")
        if not isinstance(values[key], str):
            raise UserError(f"{where}: expected {expected} under {key}, found {values[key]!r}")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise UserError(f"{where}: expected names under architectures, found {architectures!r}")
    for architecture in architectures:
        if architecture in _OTHER_SEGMENTERS:
            raise UserError(
                f"{where} describes {_OTHER_SEGMENTERS[architecture]} (architectures: "
                f"{architecture}, sam_scale: {values['sam_scale']!r}); this version converts "
                "EVF-SAM with a SAM ViT, sam_scale 'huge', only"
            )
    scales = (values["sam_scale"], values["mm_extractor_scale"])
    if scales not in _CONFIGS:
        kinds = {"large": "EVF-SAM2", "tiny": "EVF-SAM2 or EVF-EffiSAM", "small": "EVF-EffiSAM"}
        guess = kinds.get(str(scales[0])) if scales[0] != "huge" else None
        raise UserError(
            f"{where} has sam_scale {scales[0]!r} and mm_extractor_scale {scales[1]!r}"
            f"{f', which looks like {guess}' if guess else ''}; this version converts "
            + " and ".join(f"{sam!r} with {encoder!r}" for sam, encoder in _CONFIGS)
        )
    variant, config = _CONFIGS[scales]
    expected = {"hidden_size": config.encoder.width, "out_dim": config.segmenter.out_channels}
    for key, value in expected.items():
        if values[key] != value:
            raise UserError(f"{where} has {key} {values[key]!r}; a {variant} has {value}")
    return variant, config


def source_config_of(variant: str, config: EvfSamConfig) -> dict[str, Any]:
    """A config.json for a model that came without one: our own configuration, and the original's
    names of the scales where it has them."""
    scales = {name: scales for scales, (name, _) in _CONFIGS.items()}.get(variant)
    return {
        "architectures": ["EvfSamModel"],
        "model_type": "evf",
        "hidden_size": config.encoder.width,
        "out_dim": config.segmenter.out_channels,
        **(dict(zip(("sam_scale", "mm_extractor_scale"), scales, strict=True)) if scales else {}),
        _OWN_CONFIG: {"variant": variant, "config": config.to_dict()},
    }
