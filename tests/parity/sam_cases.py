"""What SAM is asked in the parity tests, and what the original answers.

`small("b")` and `small("l")` are narrow models with the block structure of ViT-B and ViT-L: two
windowed blocks before each global one, and five; a window that does not divide the grid.
"""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.sam.config import SamConfig
from tests.parity import originals
from tests.parity.weights import fill

SMALL = dataclasses.replace(SamConfig.tiny(), image_size=128, window_size=6, dtype="float32")
CONFIGS = {
    "small_b": dataclasses.replace(SMALL, depth=6, global_every=3),
    "small_l": dataclasses.replace(SMALL, depth=12, global_every=6),
}
KINDS = ("points", "box", "mask", "text")
# Every combination of prompts; box, mask and text are there at most once a prompt.
COMBINATIONS = [
    kinds for n in range(1, len(KINDS) + 1) for kinds in itertools.combinations(KINDS, n)
]
PROMPTS = 2  # of each kind


def combinations(name: str) -> list[tuple[str, ...]]:
    """All combinations of one model; the other has the same prompt encoder and decoder."""
    return COMBINATIONS if name == "small_b" else [("text",), KINDS]


def stored_combinations(name: str) -> list[tuple[str, ...]]:
    """Those whose outputs are stored, each of which a test compiles: of one kind, and of all."""
    return [kinds for kinds in combinations(name) if len(kinds) in (1, len(KINDS))]


def section(config: SamConfig) -> dict[str, Any]:
    """The manifest's configuration of a segmenter alone."""
    whole = dataclasses.replace(EvfSamConfig.tiny(), segmenter=config).to_dict()
    return {"segmenter": whole["segmenter"]}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One image whose content does not fill the frame, and prompts of each kind."""

    image: np.ndarray  # uint8 [s, s, 3], zero outside the content
    size: tuple[int, int]
    points: np.ndarray  # [k, 3, 2], one click inside, one outside, one that is not a point
    labels: np.ndarray
    boxes: np.ndarray
    mask: np.ndarray
    text: np.ndarray


def inputs(config: SamConfig) -> Inputs:
    """Returns the same inputs for the same sizes."""
    rng = np.random.default_rng(7)
    side, low = config.image_size, config.low_res_size
    size = (side * 3 // 4 + 1, side)
    image = np.zeros((side, side, 3), np.uint8)
    image[: size[0], : size[1]] = rng.integers(0, 256, (*size, 3))
    corners = np.sort(rng.uniform(0, side, (PROMPTS, 2, 2)).astype(np.float32), axis=1)
    return Inputs(
        image=image,
        size=size,
        points=rng.uniform(0, side, (PROMPTS, 3, 2)).astype(np.float32),
        labels=np.asarray([[1, 0, -1], [0, 1, 1]], np.int32),
        boxes=corners.reshape(PROMPTS, 4),
        mask=rng.normal(size=(PROMPTS, low, low)).astype(np.float32),
        text=rng.normal(size=(PROMPTS, 1, config.out_channels)).astype(np.float32),
    )


def key(kinds: tuple[str, ...], multimask: bool, what: str) -> str:
    """The name of one output."""
    return f"{'+'.join(kinds)}/{'multi' if multimask else 'single'}/{what}"


def original(config: SamConfig) -> Any:
    """`segment_anything`'s model of these sizes, with weights drawn from its names."""
    import torch

    originals.segment_anything()
    from segment_anything import modeling

    every = config.global_every
    model = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=config.depth,
            embed_dim=config.width,
            img_size=config.image_size,
            mlp_ratio=config.mlp_ratio,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=config.heads,
            patch_size=config.patch_size,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=tuple(range(every - 1, config.depth, every)),
            window_size=config.window_size,
            out_chans=config.out_channels,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=config.out_channels,
            image_embedding_size=(config.grid, config.grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_channels,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=config.num_multimask,
            transformer=modeling.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.out_channels,
                mlp_dim=config.decoder_mlp_width,
                num_heads=config.decoder_heads,
            ),
            transformer_dim=config.out_channels,
            iou_head_depth=3,
            iou_head_hidden_dim=config.iou_head_width,
        ),
    )
    fill(model)
    return model


def original_outputs(
    config: SamConfig, combinations: list[tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """The image embedding [g, g, c], and logits and IoU of every combination of prompts.

    The text token, which the original does not know, is appended to its sparse embeddings, as
    hustvl/EVF-SAM does.
    """
    import torch

    model, given = original(config), inputs(config)
    outputs = {}
    with torch.inference_mode():
        content = torch.from_numpy(given.image[: given.size[0], : given.size[1]].copy())
        image = model.preprocess(content.permute(2, 0, 1).float()[None])
        embedding = model.image_encoder(image)
        outputs["embedding"] = embedding[0].permute(1, 2, 0).numpy()
        for kinds in combinations:
            has = {kind: kind in kinds for kind in KINDS}
            sparse, dense = model.prompt_encoder(
                points=(torch.from_numpy(given.points), torch.from_numpy(given.labels))
                if has["points"]
                else None,
                boxes=torch.from_numpy(given.boxes) if has["box"] else None,
                masks=torch.from_numpy(given.mask)[:, None] if has["mask"] else None,
            )
            if has["text"]:
                sparse = sparse.expand(PROMPTS, -1, -1)
                sparse = torch.cat([sparse, torch.from_numpy(given.text)], dim=1)
                dense = dense.expand(PROMPTS, -1, -1, -1)
            for multimask in (False, True):
                masks, iou = model.mask_decoder(
                    image_embeddings=embedding,
                    image_pe=model.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=multimask,
                )
                outputs[key(kinds, multimask, "logits")] = masks.numpy()
                outputs[key(kinds, multimask, "iou")] = iou.numpy()
    return outputs
