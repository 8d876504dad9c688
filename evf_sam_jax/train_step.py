"""The model applied to a batch, and one pure training step: (state, batch) -> (state, metrics)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from data_pipelines.batch import Batch
from evf_sam_jax.losses import bce_and_dice
from evf_sam_jax.mask_geometry import resample_masks
from evf_sam_jax.metrics import StepMetrics, overlap_counts
from evf_sam_jax.models.evf_sam import (
    EvfSamConfig,
    decode,
    encode_image,
    encode_phrases,
    finish_features,
    padded_frame,
    split_strided,
)
from evf_sam_jax.models.interfaces import ImageFeatures, Prompts
from evf_sam_jax.param_rules import Params, merge
from evf_sam_jax.sharding import Placement
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
    config: EvfSamConfig, params: Params, batch: Batch, prompts: PromptKind, train: bool = False
) -> Float[Array, "b k h w"]:
    """Returns the logits of each mask at the original resolution, top-left on the batch's canvas.

    Needs only the modules of `params` that the prompts make use of; `train` as of `decode`.
    """
    features = _image_features(config, params, batch)
    decoded = functools.partial(_decode, config, params, train)
    if prompts == "points_and_boxes":
        half = batch.sam_size.shape[0] // 2
        logits = jnp.concatenate(
            [
                decoded(_rows(features, 0, half), _rows(batch, 0, half), "points"),
                decoded(_rows(features, half, None), _rows(batch, half, None), "boxes"),
            ]
        )
    else:
        logits = decoded(features, batch, prompts)
    return resample_masks(
        logits,
        batch.sam_size,
        batch.original_size,
        batch.mask.shape[-2:],
        padded_frame(config),
    )


def make_loss(
    config: EvfSamConfig, prompts: PromptKind, weights: LossWeights
) -> Callable[..., tuple[Float[Array, ""], dict[str, Array]]]:
    """Returns (trainable, frozen, batch, phrases) -> (loss, fields of `StepMetrics`).

    `phrases` is the number of valid phrases that losses are divided by. Whatever is returned adds
    up over the parts of a batch.
    """

    def loss(trainable: Params, frozen: Params, batch: Batch, phrases: Float[Array, ""]):
        logits = predict_masks(config, merge(trainable, frozen), batch, prompts, train=True)
        bce, dice = bce_and_dice(logits, batch.mask, batch.mask_valid, batch.phrase_valid, phrases)
        intersection, union = overlap_counts(
            logits, batch.mask, batch.mask_valid, batch.phrase_valid
        )
        total = weights.bce * bce + weights.dice * dice
        sums = {
            "loss": total,
            "bce": bce,
            "dice": dice,
            "intersection": intersection.sum(dtype=jnp.int32),
            "union": union.sum(dtype=jnp.int32),
        }
        return total, sums

    return loss


def make_train_step(
    config: EvfSamConfig,
    prompts: PromptKind,
    weights: LossWeights,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    placement: Placement | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the step, a pure function to be compiled; it may be given the state for good.

    It is `make_gradients`, then `make_update`, whose arguments it takes.
    """
    find = make_gradients(config, prompts, weights, accumulate=accumulate, placement=placement)
    update = make_update(optimizer, learning_rate, ema_decay)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return update(state, *find(state, batch))

    return train_step


def make_gradients(
    config: EvfSamConfig,
    prompts: PromptKind,
    weights: LossWeights,
    *,
    accumulate: int = 1,
    placement: Placement | None = None,
) -> Callable[[TrainState, Batch], tuple[Params, dict[str, Array]]]:
    """Returns (state, batch) -> gradients of the trainable parameters, fields of `StepMetrics`.

    Losses are averaged over the valid phrases of the whole batch, however it is split.

    Args:
      accumulate: parts that the batch goes through one after another, whose gradients add up to
        that of the whole. The original averages over the phrases of each part, then over parts.
      placement: where gradients live; None: one device.
    """
    loss = make_loss(config, prompts, weights)

    def of_part(state: TrainState, batch: Batch, phrases: Float[Array, ""]):
        found = jax.grad(loss, has_aux=True)(state.trainable, state.frozen, batch, phrases)
        if placement is None:
            return found
        return jax.lax.with_sharding_constraint(found[0], placement.gradients), found[1]

    def gradients(state: TrainState, batch: Batch) -> tuple[Params, dict[str, Array]]:
        phrases = batch.phrase_valid.sum(dtype=jnp.float32)
        if accumulate == 1:
            return of_part(state, batch, phrases)
        parts = jax.tree.map(lambda x: split_strided(x, accumulate), batch)
        if placement is not None:
            # A part has rows of every device: see `split_strided`.
            spec = PartitionSpec(None, *placement.batch.spec)
            parts = jax.lax.with_sharding_constraint(parts, NamedSharding(placement.mesh, spec))

        def add(total, part: Batch):
            return jax.tree.map(jnp.add, total, of_part(state, part, phrases)), None

        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of_part, state, jax.tree.map(lambda x: x[0], parts), phrases),
        )
        return jax.lax.scan(add, zero, parts)[0]

    return gradients


def make_update(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Params, dict[str, Array]], tuple[TrainState, StepMetrics]]:
    """Returns (state, gradients, sums) -> the state after the step, and all its metrics.

    Where the loss or a gradient is not finite, the state stays and says so.

    Args:
      learning_rate: the optimizer's own, for the record.
      ema_decay: of the moving average of the parameters, if the state has one.
    """
    decay = 0.0 if ema_decay is None else ema_decay

    def update(
        state: TrainState, gradients: Params, sums: dict[str, Array]
    ) -> tuple[TrainState, StepMetrics]:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        metrics = StepMetrics(
            **sums,
            grad_norm=optax.tree.norm(gradients),
            update_norm=optax.tree.norm(updates),
            learning_rate=jnp.asarray(learning_rate(state.step)),
        )
        trainable: Any = optax.apply_updates(state.trainable, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.tree.update_moment(trainable, ema, decay, 1)
        finite = state.finite & jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        after = TrainState(state.step + 1, finite, trainable, state.frozen, opt_state, ema)
        kept = dataclasses.replace(state, finite=finite)
        return _choose(finite, after, kept), metrics

    return update


def _choose(finite: Bool[Array, ""], after: TrainState, before: TrainState) -> TrainState:
    """One of two states with the same frozen parameters, which are passed on as they are."""
    chosen = jax.tree.map(
        lambda a, b: jnp.where(finite, a, b),
        dataclasses.replace(after, frozen={}),
        dataclasses.replace(before, frozen={}),
    )
    return dataclasses.replace(chosen, frozen=after.frozen)


def _image_features(config: EvfSamConfig, params: Params, batch: Batch) -> ImageFeatures:
    """Computes the features of the images, or takes those that were cached."""
    cached = batch.image_features
    if cached is None:
        assert batch.sam_image is not None, "a batch has images or their features"
        return encode_image(config, params, batch.sam_image, batch.sam_size)
    values = [value.astype(jnp.float32) for value in cached.values]
    if cached.scales:
        values = [
            value * scale[:, None, None] for value, scale in zip(values, cached.scales, strict=True)
        ]
    features = ImageFeatures(embedding=values[0], high_res=tuple(values[1:]))
    return features if cached.finished else finish_features(config, params, features)


def _decode(
    config: EvfSamConfig,
    params: Params,
    train: bool,
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
    prediction = decode(config, params, features, given, multimask=False, train=train)
    return prediction.low_res_logits[:, :, 0]


def _rows(tree, start: int, stop: int | None):
    return jax.tree.map(lambda x: x[start:stop], tree)
