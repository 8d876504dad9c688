"""What EfficientSAM is asked in the parity tests, and what the original answers.

The original is on GitHub only: `tests/golden/make_efficient_sam.py` says how to install it.
"""

import dataclasses
from typing import Any

import numpy as np

from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import EvfSamConfig
from tests.parity.weights import fill

CONFIG = EfficientSamConfig.tiny()
# Box and text are there at most once a prompt.
COMBINATIONS = [("points",), ("box",), ("text",), ("points", "box"), ("points", "box", "text")]
PROMPTS = 2  # of each kind


def section(config: EfficientSamConfig) -> dict[str, Any]:
    """The manifest's configuration of a segmenter alone."""
    whole = dataclasses.replace(EvfSamConfig.tiny(), segmenter=config).to_dict()
    return {"segmenter": whole["segmenter"]}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """An image that fills the frame, one that does not, and prompts of each kind."""

    image: np.ndarray  # uint8 [s, s, 3]
    size: tuple[int, int]  # of the legacy profile's content, at the image's top left
    points: np.ndarray  # [k, 3, 2]: of all labels that the original knows, and of one it does not
    labels: np.ndarray
    boxes: np.ndarray
    text: np.ndarray


def inputs(config: EfficientSamConfig) -> Inputs:
    """Returns the same inputs for the same sizes."""
    rng = np.random.default_rng(7)
    side = config.image_size
    corners = np.sort(rng.uniform(0, side, (PROMPTS, 2, 2)).astype(np.float32), axis=1)
    return Inputs(
        image=rng.integers(0, 256, (side, side, 3), np.uint8),
        size=(side * 2 // 3, side),
        points=rng.uniform(0, side, (PROMPTS, 3, 2)).astype(np.float32),
        labels=np.asarray([[1, 0, -1], [1, 2, 3]], np.int32),
        boxes=corners.reshape(PROMPTS, 4),
        text=rng.normal(size=(PROMPTS, 1, config.out_channels)).astype(np.float32),
    )


def key(kinds: tuple[str, ...], multimask: bool, what: str) -> str:
    """The name of one output."""
    return f"{'+'.join(kinds)}/{'multi' if multimask else 'single'}/{what}"


def original(config: EfficientSamConfig) -> Any:
    """The original of these sizes, with weights drawn from its names."""
    import torch
    from efficient_sam import (
        efficient_sam,
        efficient_sam_decoder,
        efficient_sam_encoder,
        two_way_transformer,
    )

    gelu, channels = torch.nn.GELU, config.out_channels
    encoder = efficient_sam_encoder.ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=3,
        patch_embed_dim=config.width,
        normalization_type="layer_norm",
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        neck_dims=[channels, channels],
        act_layer=gelu,
    )
    # It makes the table for images of 224 pixels, and reads the size of whichever it has.
    rows = 1 + config.table_size**2
    encoder.pos_embed = torch.nn.Parameter(torch.zeros(1, rows, config.width))
    model = efficient_sam.EfficientSam(
        image_encoder=encoder,
        prompt_encoder=efficient_sam_decoder.PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(config.grid, config.grid),
            input_image_size=(config.image_size, config.image_size),
        ),
        decoder_max_num_input_points=config.filled_points,
        mask_decoder=efficient_sam_decoder.MaskDecoder(
            transformer_dim=channels,
            transformer=two_way_transformer.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=channels,
                num_heads=config.decoder_heads,
                mlp_dim=config.decoder_mlp_width,
                activation=gelu,
                normalize_before_activation=False,
            ),
            num_multimask_outputs=config.num_multimask,
            activation=gelu,
            normalization_type="layer_norm",
            normalize_before_activation=False,
            iou_head_depth=2,
            iou_head_hidden_dim=config.iou_head_width,
            upscaling_layer_dims=[channels // 4, channels // 8],
        ),
    )
    fill(model)
    return model


def original_outputs(config: EfficientSamConfig) -> dict[str, np.ndarray]:
    """The image embeddings [g, g, c] of both profiles, and of the first one logits and IoU of every
    combination of prompts.

    Text, which the original does not know, is its decoder's only prompt in hustvl/EVF-SAM; here it
    also follows what its prompt encoder makes of points and boxes.
    """
    import torch

    model, given = original(config), inputs(config)
    side = config.image_size
    labels, boxes = given.labels, given.boxes.reshape(PROMPTS, 2, 2)
    outputs = {}

    def pixels(height: int, width: int) -> torch.Tensor:
        content = torch.from_numpy(given.image[:height, :width].copy())
        return model.preprocess(content.permute(2, 0, 1).float()[None] / 255)

    def prompt(kinds: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Points and labels [1, k, 6, ...] as `predict_masks` makes them of what is given."""
        count = 3 * ("points" in kinds) + 2 * ("box" in kinds)
        places = np.full((PROMPTS, config.filled_points, 2), -1.0, np.float32)
        numbers = np.full((PROMPTS, config.filled_points), -1, np.int32)
        if "points" in kinds:
            places[:, :3], numbers[:, :3] = given.points, labels
        if "box" in kinds:
            places[:, count - 2 : count], numbers[:, count - 2 : count] = boxes, (2, 3)
        return torch.from_numpy(places[None]), torch.from_numpy(numbers[None])

    with torch.inference_mode():
        embedding = model.image_encoder(pixels(side, side))
        outputs["current/embedding"] = embedding[0].permute(1, 2, 0).numpy()
        stretched = model.image_encoder(pixels(*given.size))
        outputs["legacy/embedding"] = stretched[0].permute(1, 2, 0).numpy()
        for kinds in COMBINATIONS:
            for multimask in (False, True):
                if "text" not in kinds:
                    count = 3 * ("points" in kinds) + 2 * ("box" in kinds)
                    places, numbers = (x[:, :, :count] for x in prompt(kinds))
                    masks, iou = model.predict_masks(
                        embedding, places, numbers, multimask, input_h=side, input_w=side
                    )
                    masks, iou = masks[0], iou[0]
                else:
                    tokens = [torch.from_numpy(given.text)]
                    if len(kinds) > 1:
                        places, numbers = prompt(kinds)
                        tokens.append(model.prompt_encoder(places[0], numbers[0]))
                    masks, iou = model.mask_decoder(
                        embedding,
                        model.prompt_encoder.get_dense_pe(),
                        torch.cat(tokens, dim=1)[None],
                        multimask,
                    )
                outputs[key(kinds, multimask, "logits")] = masks.numpy()
                outputs[key(kinds, multimask, "iou")] = iou.numpy()
    return outputs
