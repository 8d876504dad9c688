"""The combinations of towers that the paper names, and which of them a configuration is of."""

import dataclasses

from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam2.config import Sam2Config

# Name -> sizes; hustvl/EVF-SAM's README at 9935dc5 and the paper's Table 6.
RELEASED = {
    "evf-sam": EvfSamConfig(Beit3Config.large(), SamConfig.vit_h()),
    "evf-sam-base": EvfSamConfig(Beit3Config.base(), SamConfig.vit_h()),
    "evf-sam2": EvfSamConfig(Beit3Config.large(), Sam2Config.hiera_large()),
    "evf-sam2-tiny": EvfSamConfig(Beit3Config.base(), Sam2Config.hiera_tiny()),
    "evf-effi-sam": EvfSamConfig(Beit3Config.large(), EfficientSamConfig.vits()),
    "evf-effi-sam-tiny": EvfSamConfig(Beit3Config.base(), EfficientSamConfig.vitt()),
}


def released_variant(config: EvfSamConfig) -> str | None:
    """Returns the name in `RELEASED` of what has these sizes; None if there is none."""
    sizes = _sizes(config)
    return next((name for name, one in RELEASED.items() if _sizes(one) == sizes), None)


def _sizes(config: EvfSamConfig) -> EvfSamConfig:
    """A configuration without what changes neither parameters nor what they mean."""
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, dtype="float32", remat=False),
        segmenter=dataclasses.replace(
            config.segmenter, dtype="float32", remat=False, encoder_chunk=None
        ),
        profile="current",
    )
