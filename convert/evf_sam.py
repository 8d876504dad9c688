"""EVF-SAM model directories as published on Hugging Face: config.json, weights, tokenizer files.

Names: hustvl/EVF-SAM at 9935dc5, `model/evf_sam.py`; config: `model/configuration_evf.py`. The
weights are an encoder, a segmenter and a projector, so the table is theirs with prefixes.

A model that came without a config.json (one trained here, of any size), or that is no longer what
its config.json says, goes to PyTorch with its configuration under `evf_sam_jax` in config.json, and
comes back by it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from convert.checkpoint_files import Shapes, open_directory, read_json_object
from convert.families import recognise_tower, tower_table
from convert.recognise import family_of, looks_like
from convert.table import LINEAR, Rule, Table, check_source, joined, make_plan, weight_and_bias
from convert.to_model_dir import Conversion, leaf_shapes
from data_pipelines.tokenizers import read_added_tokens
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import RELEASED, released_variant

OWN_CONFIG = "evf_sam_jax"
# Architecture -> (sam_scale, mm_extractor_scale) -> name in `RELEASED`.
_MODELS = {
    "EvfSamModel": {("huge", "large"): "evf-sam", ("huge", "base"): "evf-sam-base"},
    "EvfSam2Model": {("large", "large"): "evf-sam2", ("tiny", "base"): "evf-sam2-tiny"},
    "EvfEffiSamModel": {("small", "large"): "evf-effi-sam", ("tiny", "base"): "evf-effi-sam-tiny"},
}
# model/configuration_evf.py; sam_scale and mm_extractor_scale have no default.
_DEFAULTS = {"hidden_size": 768, "out_dim": 256}
_PREFIXES = {"mm_extractor.": "encoder", "visual_model.": "segmenter"}
_SEMANTIC = "[semantic]"  # a token of its own in the multi-task models only
_MULTITASK = "multitask"


def table(config: EvfSamConfig) -> Table:
    """The table of an EVF-SAM: its two towers' and the projector's."""
    projector: tuple[Rule, ...] = (
        *weight_and_bias("text_hidden_fcs.0.0", "projector/hidden", LINEAR),
        *weight_and_bias("text_hidden_fcs.0.2", "projector/out", LINEAR),
    )
    return joined(
        Table(projector, fields={}),
        *(
            tower_table(getattr(config, tower)).prefixed(prefix)
            for prefix, tower in _PREFIXES.items()
        ),
    )


def whole_name(config: EvfSamConfig, name: str) -> str:
    """The name in an EVF-SAM of a tensor that a tower's own checkpoint had, and no use for here."""
    for prefix, tower in _PREFIXES.items():
        ignored = tower_table(getattr(config, tower)).ignored
        if any(re.fullmatch(one.source, name) for one in ignored):
            # transformers, which loads an EVF-SAM, knows no tensor of the name gamma.
            return prefix + re.sub(r"\.gamma$", ".weight", name)
    return name


def convert(directory: Path, profile: str | None = None) -> Conversion:
    """Opens an EVF-SAM directory; config.json says which model it is.

    Args:
      profile: of preprocessing and decoding; None: as the checkpoint needs it.
    """
    checkpoint = open_directory(directory)
    source_config = read_json_object(directory / "config.json")
    variant, config = recognise(source_config, directory / "config.json")
    own = OWN_CONFIG in source_config
    config, notes = in_profile(variant, config, directory, profile, own)
    conversion = Conversion(
        variant=variant,
        config=config.to_dict(),
        table=table(config),
        shapes=leaf_shapes(config.to_dict()),
        checkpoint=checkpoint,
        where=str(directory),
        source_config=source_config,
        tokenizer_dir=directory,
        notes=notes,
    )
    plan = make_plan(conversion.table, conversion.shapes)
    try:
        check_source(plan, checkpoint.tensors, conversion.where)
    except UserError as error:
        other = other_model(checkpoint.shapes, plan.source_shapes())
        raise UserError(f"{error}{other}") from None
    return conversion


def other_model(found: Shapes, expected: Shapes) -> str:
    """Returns "; they look like ..." if tensors are of other towers than expected, or nothing."""
    if not any(name.startswith(tuple(_PREFIXES)) for name in found):
        return looks_like(found)
    towers = {prefix: _tower(found, prefix) for prefix in _PREFIXES}
    others = {
        f"{prefix}*": label
        for prefix, (label, _) in towers.items()
        if label and label != _tower(expected, prefix)[0]
    }
    if not others:
        return ""
    configs = [config for _, config in towers.values()]
    whole = None if None in configs else released_variant(EvfSamConfig(*configs))
    if whole is not None:
        return f"; they look like those of {whole}"
    return "; " + " and ".join(f"{names} look like {label}" for names, label in others.items())


def _tower(shapes: Shapes, prefix: str) -> tuple[str | None, Any]:
    """What the tower of these names seems to be, and its configuration if its size is known."""
    own = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    return recognise_tower(_PREFIXES[prefix], own) or (family_of(own), None)


def described(source_config: dict[str, Any], tokenizer_dir: Path) -> EvfSamConfig:
    """The configuration of what `convert` makes of a directory with this config.json."""
    variant, config = recognise(source_config, Path("config.json"))
    return in_profile(variant, config, tokenizer_dir, None, OWN_CONFIG in source_config)[0]


def in_profile(
    variant: str, config: EvfSamConfig, directory: Path, asked: str | None, own: bool = False
) -> tuple[EvfSamConfig, tuple[str, ...]]:
    """The configuration in the profile asked for, and what to say of it.

    By hustvl/EVF-SAM's README at 9935dc5, the multi-task checkpoints were trained after its commit
    9d00853, which changed how images are stretched and SAM-2 decodes, and the others before it. A
    SAM ViT has one way; checkpoints with EfficientSAM were never released.

    Args:
      variant: name of the model.
      config: as config.json describes it.
      directory: with the tokenizer files.
      asked: a profile, or None.
      own: whether config.json holds our configuration, which says the profile.
    """
    if not config.segmenter.stretches:
        if asked in (None, config.profile):
            return config, ()
        return config, (f"--profile {asked} changes nothing: for {variant} both mean the same",)
    multitask = _SEMANTIC in read_added_tokens(directory)
    reason = f"{directory} {'has' if multitask else 'has not'} the token {_SEMANTIC}"
    legacy = variant.startswith("evf-sam2") and not multitask
    name = f"{variant}-{_MULTITASK}" if multitask else variant
    expected = config.profile if own else "legacy" if legacy else "current"
    profile = asked or expected
    doubtful = legacy and not own and _MULTITASK in directory.resolve().name
    notes = []
    if profile != expected and own:
        notes.append(
            f"profile {profile} as asked for, but {directory / 'config.json'} says that the model "
            f"was trained with the profile {expected}: expect worse masks"
        )
    elif profile != expected and doubtful:
        notes.append(
            f"profile {profile} as asked for, and as the directory's name has it ({reason})"
        )
    elif profile != expected:
        notes.append(
            f"profile {profile} as asked for, but the weights look like those of {name} ({reason}),"
            f" which were trained with the profile {expected}: expect worse masks"
        )
    elif not own:
        notes.append(f"profile {profile}, as {name} needs it ({reason}); --profile overrides that")
        if doubtful:
            notes.append(
                f"{directory} is called {_MULTITASK}: if its tokenizer files are not those of the "
                "weights, these need --profile current"
            )
    return dataclasses.replace(config, profile=profile), tuple(notes)


def recognise(source_config: dict[str, Any], where: Path) -> tuple[str, EvfSamConfig]:
    """The variant and configuration that a config.json describes."""
    if OWN_CONFIG in source_config:
        own = source_config[OWN_CONFIG]
        if not isinstance(own, dict) or set(own) != {"variant", "config"}:
            raise UserError(f"{where}: expected an object of variant and config under {OWN_CONFIG}")
        return str(own["variant"]), EvfSamConfig.from_dict(own["config"])
    values: dict[str, Any] = {**_DEFAULTS, **source_config}
    scales = []
    for number, key in enumerate(("sam_scale", "mm_extractor_scale")):
        known = dict.fromkeys(pair[number] for models in _MODELS.values() for pair in models)
        expected = " or ".join(map(repr, known))
        if key not in values:
            raise UserError(f"{where} has no {key}: expected {expected}")
        if not isinstance(values[key], str):
            raise UserError(f"{where}: expected {expected} under {key}, found {values[key]!r}")
        scales.append(values[key])
    variant = _variant(values, (scales[0], scales[1]), where)
    config = RELEASED[variant]
    sizes = {"hidden_size": config.encoder.width, "out_dim": config.segmenter.out_channels}
    for key, value in sizes.items():
        if values[key] != value:
            raise UserError(f"{where} has {key} {values[key]!r}; a {variant} has {value}")
    return variant, config


def _variant(values: dict[str, Any], scales: tuple[str, str], where: Path) -> str:
    """The name in `RELEASED`, by the architecture or, without one, by the scales alone."""
    found = values.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f"{where}: expected names under architectures, found {found!r}")
    known = [one for one in found if one in _MODELS]
    if found and not known:
        raise UserError(
            f"{where}: expected {' or '.join(_MODELS)} under architectures, found {found[0]}"
        )
    models = {one: pairs for one, pairs in _MODELS.items() if one in known or not found}
    fitting = [pairs[scales] for pairs in models.values() if scales in pairs]
    if len(fitting) > 1:
        raise UserError(
            f"{where}: expected {' or '.join(models)} under architectures, since sam_scale "
            f"{scales[0]!r} may be {' or '.join(fitting)}; found none"
        )
    if not fitting:
        pairs = [f"{sam!r} with {encoder!r}" for one in models.values() for sam, encoder in one]
        raise UserError(
            f"{where}: expected sam_scale and mm_extractor_scale {' or '.join(pairs)}"
            f"{f' for {known[0]}' if known else ''}, found {scales[0]!r} with {scales[1]!r}"
        )
    return fitting[0]


def source_config_of(variant: str, config: EvfSamConfig) -> dict[str, Any]:
    """A config.json for a model that came without one: our own configuration, and the original's
    names of architecture and scales where it has them."""
    named = {
        name: (architecture, scales)
        for architecture, models in _MODELS.items()
        for scales, name in models.items()
    }
    architecture, scales = named.get(variant, ("EvfSamModel", ()))
    return {
        "architectures": [architecture],
        "model_type": "evf",
        "hidden_size": config.encoder.width,
        "out_dim": config.segmenter.out_channels,
        **dict(zip(("sam_scale", "mm_extractor_scale"), scales, strict=False)),
        OWN_CONFIG: {"variant": variant, "config": config.to_dict()},
    }
