"""The model applied to a batch, and one pure training step: (state, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from data_pipelines.batch import Batch
from evf_sam_jax.losses import bce_and_dice
from evf_sam_jax.mask_geometry import resample_masks
from evf_sam_jax.metrics import StepMetrics, overlap_counts
from evf_sam_jax.models.evf_sam import EvfSamConfig, decode, encode_image, encode_phrases
from evf_sam_jax.models.interfaces import ImageFeatures, Prompts
from evf_sam_jax.param_rules import Params, merge
from evf_sam_jax.train_state import TrainState

# What tells the segmenter which object is meant: the phrase, a click inside the object, its box,
# or a click for the first half of the images and a box for the others.
PromptKind = Literal["text", "points", "boxes", "points_and_boxes"]
PROMPT_KINDS = ("text", "points", "boxes", "points_and_boxes")


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Of the two losses, in their sum (both 1 in the paper, section 4.2)."""

    bce: float = 1.0
    dice: float = 1.0


def predict_masks(
    config: EvfSamConfig, params: Params, batch: Batch, prompts: PromptKind
) -> Float[Array, "b k h w"]:
    """Returns the logits of each mask at the original resolution, top-left on the batch's canvas.

    Needs only the modules of `params` that the prompts make use of.
    """
    features = batch.image_features
    if features is None:
        assert batch.sam_image is not None, "a batch has images or their features"
        features = encode_image(config, params, batch.sam_image, batch.sam_size)
    if prompts == "points_and_boxes":
        half = batch.sam_size.shape[0] // 2
        logits = jnp.concatenate(
            [
                _decode(config, params, _rows(features, 0, half), _rows(batch, 0, half), "points"),
                _decode(
                    config, params, _rows(features, half, None), _rows(batch, half, None), "boxes"
                ),
            ]
        )
    else:
        logits = _decode(config, params, features, batch, prompts)
    return resample_masks(
        logits,
        batch.sam_size,
        batch.original_size,
        batch.mask.shape[-2:],
        config.segmenter.image_size,
    )


def make_train_step(
    config: EvfSamConfig,
    prompts: PromptKind,
    weights: LossWeights,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the step, a pure function to be compiled; it may be given the state for good.

    Args:
      learning_rate: the optimizer's own, for the record.
    """

    def loss(trainable: Params, frozen: Params, batch: Batch):
        logits = predict_masks(config, merge(trainable, frozen), batch, prompts)
        bce, dice = bce_and_dice(logits, batch.mask, batch.mask_valid, batch.phrase_valid)
        counts = overlap_counts(logits, batch.mask, batch.mask_valid, batch.phrase_valid)
        total = weights.bce * bce + weights.dice * dice
        return total, (bce, dice, *(count.sum(dtype=jnp.int32) for count in counts))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (total, (bce, dice, intersection, union)), gradients = jax.value_and_grad(
            loss, has_aux=True
        )(state.trainable, state.frozen, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        metrics = StepMetrics(
            loss=total,
            bce=bce,
            dice=dice,
            grad_norm=optax.tree.norm(gradients),
            update_norm=optax.tree.norm(updates),
            learning_rate=jnp.asarray(learning_rate(state.step)),
            intersection=intersection,
            union=union,
        )
        trainable: Any = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return train_step


def _decode(
    config: EvfSamConfig,
    params: Params,
    features: ImageFeatures,
    batch: Batch,
    prompts: PromptKind,
) -> Float[Array, "b k l l"]:
    if prompts == "text":
        text = encode_phrases(config, params, batch.encoder_image, batch.text_ids, batch.text_valid)
        given = Prompts(text=text)
    elif prompts == "points":
        assert batch.points is not None, "points are drawn where a batch is assembled"
        labels = jnp.ones(batch.points.shape[:3], jnp.int32)
        given = Prompts(points=batch.points, point_labels=labels)
    else:
        given = Prompts(boxes=batch.boxes)
    return decode(config, params, features, given, multimask=False).low_res_logits[:, :, 0]


def _rows(tree, start: int, stop: int | None):
    return jax.tree.map(lambda x: x[start:stop], tree)
