"""What BEiT-3 is asked in the parity tests, and what the original answers."""

import dataclasses
from typing import Any

import numpy as np

from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.evf_sam import EvfSamConfig
from tests.parity import originals
from tests.parity.weights import fill

SMALL = dataclasses.replace(Beit3Config.tiny(), vocab_size=128, dtype="float32")
CONFIGS = {  # heads as wide as the released models', layers in the ratio of base to large
    "small_base": dataclasses.replace(SMALL, width=128, heads=2, layers=3, mlp_width=512),
    "small_large": dataclasses.replace(SMALL, width=192, heads=3, layers=6, mlp_width=768),
}


def section(config: Beit3Config) -> dict[str, Any]:
    """The manifest's configuration of an encoder alone."""
    whole = dataclasses.replace(EvfSamConfig.tiny(), encoder=config).to_dict()
    return {"encoder": whole["encoder"]}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Two pairs of image and text, the second text padded."""

    image: np.ndarray  # [2, h, w, 3] float32
    ids: np.ndarray  # [2, l]
    valid: np.ndarray


def inputs(config: Beit3Config) -> Inputs:
    """Returns the same inputs for the same sizes."""
    rng = np.random.default_rng(5)
    side = config.image_size
    valid = np.asarray([[True] * 9, [True] * 5 + [False] * 4])
    ids = rng.integers(4, config.vocab_size, (2, 9)).astype(np.int32)
    return Inputs(
        image=rng.normal(size=(2, side, side, 3)).astype(np.float32),
        ids=np.where(valid, ids, 1),
        valid=valid,
    )


def original(config: Beit3Config) -> Any:
    """torchscale's model as the original configures it, with weights drawn from its names."""
    beit3, encoder_config = originals.torchscale_beit3()
    model = beit3(
        encoder_config(
            img_size=config.image_size,
            patch_size=config.patch_size,
            vocab_size=config.vocab_size,
            multiway=True,
            layernorm_embedding=False,
            normalize_output=True,
            no_output_layer=True,
            encoder_embed_dim=config.width,
            encoder_attention_heads=config.heads,
            encoder_ffn_embed_dim=config.mlp_width,
            encoder_layers=config.layers,
            max_source_positions=config.max_text_positions,
        )
    )
    fill(model)
    return model


def original_outputs(config: Beit3Config) -> dict[str, np.ndarray]:
    """Final tokens [2, tokens, d] of both modalities together and of each alone; attention.

    "attention" [2, g, g] is the last layer's, from the image [CLS] to the patches, summed over
    heads. torchscale's attention returns its weights [heads, images, queries, keys] and its layer
    drops them.
    """
    import torch

    model, given = original(config), inputs(config)
    weights = []
    model.encoder.layers[-1].self_attn.register_forward_hook(
        lambda module, arguments, found: weights.append(found[1].numpy())
    )
    image = torch.from_numpy(given.image).permute(0, 3, 1, 2)
    ids, padding = torch.from_numpy(given.ids).long(), torch.from_numpy(~given.valid)
    with torch.inference_mode():
        outputs = {
            "early": model(visual_tokens=image, textual_tokens=ids, text_padding_position=padding)[
                "encoder_out"
            ].numpy(),
            "text": model(textual_tokens=ids, text_padding_position=padding)["encoder_out"].numpy(),
            "vision": model(visual_tokens=image)["encoder_out"].numpy(),
        }
    side = config.image_size // config.patch_size
    attention = weights[0][:, :, 0, 1 : 1 + config.patches].sum(axis=0)
    return outputs | {"attention": attention.reshape(-1, side, side)}
