"""Which towers there are: the one place that knows a family by its name.

A family is a configuration and a module. What they must offer is in `interfaces.py`; nothing else
asks which family a tower is of.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from evf_sam_jax.errors import UserError
from evf_sam_jax.models.beit3 import Beit3, Beit3Config, image_cls_attention
from evf_sam_jax.models.clip import Clip, ClipConfig
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.efficient_sam.efficient_sam import EfficientSam
from evf_sam_jax.models.interfaces import EncoderConfig, SegmenterConfig
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam.sam import Sam
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.sam2.sam2 import Sam2
from evf_sam_jax.models.vilt import Vilt, ViltConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A configuration class, and the module that it configures.

    Attributes:
      attention: of an encoder, where its image [CLS] looks for a phrase, as BEiT-3's
        `image_cls_attention`; None: that cannot be shown.
    """

    config: type
    module: type[nn.Module]
    attention: Callable[..., Array] | None = None


ENCODERS = {
    "beit3": Family(Beit3Config, Beit3, image_cls_attention),
    "clip": Family(ClipConfig, Clip),
    "vilt": Family(ViltConfig, Vilt),
}
SEGMENTERS = {
    "sam": Family(SamConfig, Sam),
    "sam2": Family(Sam2Config, Sam2),
    "efficient_sam": Family(EfficientSamConfig, EfficientSam),
}

# Of what was written when there was one family of each.
_FIRST = {"encoder": "beit3", "segmenter": "sam"}


def attention_of(config: EncoderConfig) -> Callable[..., Array] | None:
    """Returns the function that shows where an encoder looks, see `Family`."""
    return ENCODERS[config.family].attention


def families_with_attention() -> list[str]:
    """Names of the encoders that `attention_of` has a function for."""
    return [name for name, family in ENCODERS.items() if family.attention is not None]


def tower_to_dict(config: EncoderConfig | SegmenterConfig) -> dict[str, Any]:
    """Returns a JSON-serialisable dict that `tower_from_dict` reads."""
    return {"family": config.family, **dataclasses.asdict(config)}


def tower_from_dict(tower: str, values: Any) -> Any:
    """Returns the configuration of the family that `values` name.

    Args:
      tower: "encoder" or "segmenter".

    Raises:
      UserError: there is no such family, a key is unknown or missing, or a value is not possible.
    """
    where = f"model.{tower}"
    families = ENCODERS if tower == "encoder" else SEGMENTERS
    if not isinstance(values, dict):
        raise UserError(f"config {where}: expected keys with values, found {values!r}")
    values = dict(values)
    name = values.pop("family", _FIRST[tower])
    if name not in families:
        known = ", ".join(families)
        raise UserError(f"config {where}.family: expected one of {known}, found {name!r}")
    family = families[name]
    return family.config(**checked_keys(family.config, values, where))


def make_encoder(config: EncoderConfig) -> Any:
    """Returns the multimodal encoder, unbound."""
    return ENCODERS[config.family].module(config)


def make_segmenter(config: SegmenterConfig, profile: str) -> Any:
    """Returns the promptable segmenter, unbound; `profile` as of `EvfSamConfig`."""
    return SEGMENTERS[config.family].module(config, profile)


def checked_keys(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Returns `values` if they can construct the dataclass `cls`; UserError otherwise."""
    if not isinstance(values, dict):
        raise UserError(f"config {where}: expected keys with values, found {values!r}")
    fields = dataclasses.fields(cls)
    unknown = sorted(set(values) - {field.name for field in fields})
    if unknown:
        known = ", ".join(field.name for field in fields)
        raise UserError(f"config {where}: unknown key {unknown[0]!r}, expected one of {known}")
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"config {where}: key {missing[0]!r} is missing")
    return dict(values)
