"""What ViLT is asked in the parity tests, and what the original answers."""

import dataclasses
from typing import Any

import numpy as np

from evf_sam_jax.models.vilt import ViltConfig
from tests.parity.weights import fill

SMALL = dataclasses.replace(ViltConfig.tiny(), width=128, mlp_width=256)
# Height and width in patches of two images, padded to the larger side. The table of positions is
# 3 x 3: of the padded ones the first has as many rows and more columns, the second a single row.
SIZES = {"padded": ((3, 5), (1, 4)), "square": ((3, 3), (3, 3))}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Two images with a phrase each, the second phrase padded."""

    image: np.ndarray  # [2, h, w, 3] float32, zero at padding
    image_valid: np.ndarray  # [2, h, w]
    ids: np.ndarray  # [2, l]
    valid: np.ndarray


def inputs(config: ViltConfig, sizes: tuple[tuple[int, int], ...]) -> Inputs:
    """Returns the same inputs for the same sizes."""
    rng = np.random.default_rng(5)
    side = config.patch_size * max(max(size) for size in sizes)
    inside = np.zeros((2, side, side), bool)
    for row, size in enumerate(sizes):
        height, width = (config.patch_size * patches for patches in size)
        inside[row, :height, :width] = True
    image = rng.normal(size=(2, side, side, 3)).astype(np.float32) * inside[..., None]
    valid = np.asarray([[True] * 7, [True] * 4 + [False] * 3])
    ids = np.where(valid, rng.integers(1, config.vocab_size, (2, 7)), 0).astype(np.int32)
    return Inputs(image, inside, ids, valid)


def original(config: ViltConfig, with_heads: bool = False) -> Any:
    """transformers' model of these sizes, with weights drawn from its names.

    Args:
      with_heads: as the published checkpoint has it, with the head that predicts masked words.
    """
    from transformers import ViltConfig as OriginalConfig
    from transformers import ViltForMaskedLM, ViltModel

    model = (ViltForMaskedLM if with_heads else ViltModel)(
        OriginalConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_text_tokens,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    )
    fill(model)
    return model


def original_outputs(
    config: ViltConfig, sizes: tuple[tuple[int, int], ...]
) -> dict[str, np.ndarray]:
    """What can be read out of each pair, [2, d] each.

    The original puts what is inside of a padded image in any order, so patches are averaged.
    """
    import torch

    model, given = original(config), inputs(config, sizes)
    with torch.inference_mode():
        found = model(
            input_ids=torch.from_numpy(given.ids).long(),
            attention_mask=torch.from_numpy(given.valid).long(),
            pixel_values=torch.from_numpy(given.image).permute(0, 3, 1, 2),
            pixel_mask=torch.from_numpy(given.image_valid).long(),
        )
    tokens, text = found.last_hidden_state.numpy(), given.ids.shape[1]
    patches = [down * across for down, across in sizes]
    return {
        "text_cls": tokens[:, 0],
        "image_cls": tokens[:, text],
        "pooler": found.pooler_output.numpy(),
        # What is inside comes first.
        "image_mean": np.stack(
            [row[text + 1 :][:n].mean(axis=0) for row, n in zip(tokens, patches, strict=True)]
        ),
    }
