"""What CLIP is asked in the parity tests, and what the original answers."""

import dataclasses
from typing import Any

import numpy as np

from evf_sam_jax.models.clip import ClipConfig
from tests.parity.weights import fill

# OpenAI's activation and OpenCLIP's; heads as wide as the released models', unequal widths.
SMALL = dataclasses.replace(
    ClipConfig.tiny(),
    text_width=128,
    vision_width=192,
    vision_heads=3,
    projection_width=96,
)
CONFIGS = {
    "quick_gelu": dataclasses.replace(SMALL, activation="quick_gelu"),
    "gelu": dataclasses.replace(SMALL, activation="gelu"),
}
BEGIN, END = 126, 127  # the two largest ids, as in the originals' vocabulary


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Two images and two phrases, the second padded."""

    image: np.ndarray  # [2, h, w, 3] float32
    ids: np.ndarray  # [2, l]
    valid: np.ndarray


def inputs(config: ClipConfig) -> Inputs:
    """Returns the same inputs for the same sizes."""
    rng = np.random.default_rng(5)
    side = config.image_size
    ids = rng.integers(0, BEGIN, (2, 9)).astype(np.int32)
    ids[:, 0] = BEGIN
    ids[0, 8], ids[1, 5:] = END, END
    valid = np.asarray([[True] * 9, [True] * 6 + [False] * 3])
    return Inputs(rng.normal(size=(2, side, side, 3)).astype(np.float32), ids, valid)


def original_config(config: ClipConfig) -> Any:
    """transformers' configuration of these sizes."""
    from transformers import CLIPConfig

    def tower(width: int, heads: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "intermediate_size": 4 * width,
            "hidden_act": config.activation,
            "projection_dim": config.projection_width,
        }

    text = tower(config.text_width, config.text_heads, config.text_layers)
    vision = tower(config.vision_width, config.vision_heads, config.vision_layers)
    return CLIPConfig(
        text_config=text
        | {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_text_tokens,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": END,
        },
        vision_config=vision | {"image_size": config.image_size, "patch_size": config.patch_size},
        projection_dim=config.projection_width,
    )


def original(config: ClipConfig) -> Any:
    """transformers' model of these sizes, with weights drawn from its names."""
    from transformers import CLIPModel

    model = CLIPModel(original_config(config))
    fill(model)
    return model


def original_outputs(config: ClipConfig) -> dict[str, np.ndarray]:
    """Of each text and each image the vector before and after the projection, [2, d] each."""
    import torch

    model, given = original(config), inputs(config)
    ids, valid = torch.from_numpy(given.ids).long(), torch.from_numpy(given.valid).long()
    image = torch.from_numpy(given.image).permute(0, 3, 1, 2)
    with torch.inference_mode():
        text = model.text_model(input_ids=ids, attention_mask=valid).pooler_output
        vision = model.vision_model(pixel_values=image).pooler_output
        return {
            "text": text.numpy(),
            "text_projected": model.text_projection(text).numpy(),
            "image": vision.numpy(),
            "image_projected": model.visual_projection(vision).numpy(),
        }
