"""What SAM-2 is asked in the parity tests, and what the original answers.

`small_t` and so on are narrow models with the trunk of Hiera T, S, B+ and L: their blocks, windows,
global blocks and poolings, on 32, 16, 8 and 4 tokens a side.
"""

import dataclasses
from typing import Any

import numpy as np

from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.sam2.config import STAGES, Sam2Config
from tests.parity import originals
from tests.parity.sam_cases import PROMPTS, Inputs, inputs
from tests.parity.weights import fill

# The original fixes the other sizes of the decoder.
_NARROW = {"image_size": 128, "out_channels": 64, "dtype": "float32", "encoder_chunk": None}


def _narrow(config: Sam2Config, head_width: int) -> Sam2Config:
    return dataclasses.replace(config, width=head_width * config.heads, **_NARROW)


CONFIGS = {
    "small_t": _narrow(Sam2Config.hiera_tiny(), 16),
    "small_s": _narrow(Sam2Config.hiera_small(), 16),
    "small_b_plus": _narrow(Sam2Config.hiera_base_plus(), 8),
    "small_l": _narrow(Sam2Config.hiera_large(), 8),
}
# Of the largest, outputs of the original are stored.
FULL_SIZES = {
    "hiera_tiny": dataclasses.replace(Sam2Config.hiera_tiny(), dtype="float32"),
    "hiera_small": dataclasses.replace(Sam2Config.hiera_small(), dtype="float32"),
    "hiera_base_plus": dataclasses.replace(Sam2Config.hiera_base_plus(), dtype="float32"),
}
COMBINATIONS = [
    ("points",),
    ("box",),
    ("mask",),
    ("points", "box", "mask"),
    ("text",),
    ("points", "box", "text"),
]


def combinations(name: str) -> list[tuple[str, ...]]:
    """All combinations of one model, and text in another, which finds its single masks stable.

    The prompt encoder and the decoder are the same in all of them.
    """
    some = [("text",), ("points", "box", "mask")]
    return {"small_t": COMBINATIONS, "small_l": [("text",)], "hiera_tiny": some}.get(name, [])


def profiles(name: str) -> tuple[str, ...]:
    """The profiles that an image is encoded in; what is decoded is of the last one."""
    return ("legacy", "current") if name == "small_t" else ("current",)


def ways(kinds: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """Profile, and whether several masks: all that differ in what is decoded of these prompts."""
    single = [("current", False), ("legacy", False)] if "text" in kinds else [("current", False)]
    return (*single, ("current", True))


def key(kinds: tuple[str, ...], way: tuple[str, bool], what: str) -> str:
    """The name of one output."""
    profile, multimask = way
    return f"{'+'.join(kinds)}/{'multi' if multimask else profile}/{what}"


def section(config: Sam2Config) -> dict[str, Any]:
    """The manifest's configuration of a segmenter alone."""
    whole = dataclasses.replace(EvfSamConfig.tiny(), segmenter=config).to_dict()
    return {"segmenter": whole["segmenter"]}


def original(config: Sam2Config) -> Any:
    """`sam2`'s model of these sizes, as its yaml files build it, with weights from its names."""
    import torch

    originals.sam2()
    from sam2.modeling import position_encoding, sam2_base
    from sam2.modeling.backbones import hieradet, image_encoder

    model = sam2_base.SAM2Base(
        image_encoder=image_encoder.ImageEncoder(
            scalp=1,
            trunk=hieradet.Hiera(
                embed_dim=config.width,
                num_heads=config.heads,
                stages=config.stages,
                global_att_blocks=config.global_blocks,
                window_pos_embed_bkg_spatial_size=(config.position_grid, config.position_grid),
                window_spec=config.windows,
            ),
            neck=image_encoder.FpnNeck(
                position_encoding=position_encoding.PositionEmbeddingSine(
                    num_pos_feats=config.out_channels, normalize=True, temperature=10000
                ),
                d_model=config.out_channels,
                backbone_channel_list=[config.stage_width(s) for s in reversed(range(STAGES))],
                fpn_top_down_levels=[2, 3],
                fpn_interp_model="nearest",
            ),
        ),
        memory_attention=torch.nn.Module(),  # of videos, and never called
        memory_encoder=torch.nn.Module(),
        image_size=config.image_size,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    fill(model)
    return model


def original_features(model: Any, image: Any) -> list[Any]:
    """What `SAM2ImagePredictor.set_image` keeps of [1,3,s,s]: finest features first."""
    found = model.forward_image(image)
    _, levels, _, sizes = model._prepare_backbone_features(found)
    levels[-1] = levels[-1] + model.no_mem_embed
    return [
        level.permute(1, 2, 0).reshape(1, -1, *size)
        for level, size in zip(levels, sizes, strict=True)
    ]


class _NoTransforms:
    """In the place of a predictor's: masks stay as the decoder gives them."""

    @staticmethod
    def postprocess_masks(masks: Any, size: Any) -> Any:
        return masks


def original_outputs(name: str) -> dict[str, np.ndarray]:
    """The image's features [g, g, c], and what every combination of prompts gives.

    That are logits, IoU, and the score of the object, which is the same however masks are chosen.

    Prompts without text are answered by the original's own predictor. Text, which it does not know,
    is appended to its sparse embeddings, and the best of three masks is taken, as hustvl/EVF-SAM
    does.
    """
    import torch

    config = (CONFIGS | FULL_SIZES)[name]
    model, given = original(config), inputs(config)
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    outputs = {}
    with torch.inference_mode():
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        whole = torch.from_numpy(given.image).permute(2, 0, 1).float() / 255
        frame = ((whole - mean) / std)[None]
        content = frame[..., : given.size[0], : given.size[1]]
        stretched = torch.nn.functional.interpolate(
            content, (config.image_size,) * 2, mode="bilinear", align_corners=False
        )
        images = {"legacy": stretched, "current": frame}
        for profile in profiles(name):
            features = original_features(model, images[profile])
            levels = ("high_res_0", "high_res_1", "embedding")
            for level, found in zip(levels, features, strict=True):
                outputs[f"{level}/{profile}"] = found[0].permute(1, 2, 0).numpy()

        predictor = SAM2ImagePredictor.__new__(SAM2ImagePredictor)
        predictor.model, predictor._transforms = model, _NoTransforms()
        predictor._is_image_set, predictor._orig_hw = True, [None]
        predictor._features = {"image_embed": features[-1], "high_res_feats": features[:-1]}
        scores = []
        model.sam_mask_decoder.register_forward_hook(
            lambda module, arguments, found: scores.append(found[3][0].numpy())
        )
        for kinds in combinations(name):
            for profile, multimask in ways(kinds):
                rows = [
                    _with_text(predictor, given, kinds, profile, multimask, row)
                    if "text" in kinds
                    else predictor._predict(
                        **_geometry(given, kinds, row),
                        multimask_output=multimask,
                        return_logits=True,
                    )[:2]
                    for row in range(PROMPTS)
                ]
                masks, iou = (torch.cat(parts).numpy() for parts in zip(*rows, strict=True))
                outputs[key(kinds, (profile, multimask), "logits")] = masks
                outputs[key(kinds, (profile, multimask), "iou")] = iou
            outputs[f"{'+'.join(kinds)}/object_score"] = np.concatenate(scores[-PROMPTS:])
    return outputs


def _geometry(given: Inputs, kinds: tuple[str, ...], row: int) -> dict[str, Any]:
    import torch

    one = slice(row, row + 1)
    points, labels, boxes, mask = (
        torch.from_numpy(x[one]) if kind in kinds else None
        for kind, x in (
            ("points", given.points),
            ("points", given.labels),
            ("box", given.boxes),
            ("mask", given.mask[:, None]),
        )
    )
    return {"point_coords": points, "point_labels": labels, "boxes": boxes, "mask_input": mask}


def _with_text(
    predictor: Any,
    given: Inputs,
    kinds: tuple[str, ...],
    profile: str,
    multimask: bool,
    row: int,
) -> tuple[Any, Any]:
    """Masks [1,m,l,l] and IoU [1,m] of one prompt with text."""
    import torch

    encoder, text = predictor.model.sam_prompt_encoder, torch.from_numpy(given.text[row : row + 1])

    def with_text(**geometry: Any) -> tuple[Any, Any]:
        sparse, dense = encode(**geometry)
        return torch.cat([sparse, text], dim=1), dense

    several = multimask or profile == "current"
    encode, encoder.forward = encoder.forward, with_text
    try:
        masks, iou, _ = predictor._predict(
            **_geometry(given, kinds, row), multimask_output=several, return_logits=True
        )
    finally:
        encoder.forward = encode
    if several and not multimask:
        best = torch.argsort(iou, dim=-1, descending=True)[:, :1]
        masks = torch.take_along_dim(masks, best[..., None, None], dim=1)
        iou = torch.take_along_dim(iou, best, dim=1)
    return masks, iou
