"""SAM-2's mask decoder: image features and prompt tokens to masks and their estimated IoU.

Reference: facebookresearch/sam2 at 2b90b9f, `modeling/sam/mask_decoder.py`, with the options of
`build_sam.py` (sigmoid IoU, object score, choice by stability).

Differences:
  - The four hyper-networks are stacked and computed at once.
  - A mask that is not chosen is not computed, where the choice does not depend on it.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from evf_sam_jax.models.layers import (
    TORCH_NORMAL,
    Mlp,
    PatchTranspose,
    gelu_float32,
    layer_norm,
    matmul_precision,
)
from evf_sam_jax.models.sam.mask_decoder import MLP_NAMES, hyper_networks
from evf_sam_jax.models.sam.transformer import TwoWayTransformer
from evf_sam_jax.models.sam2.config import Sam2Config

LAYER_NORM_EPSILON = 1e-6
# Which masks a decoder returns: the alternatives (tokens 1 to 3), the one of them with the highest
# estimated IoU, the single one (token 0), or that one unless it is unstable, then the best.
CHOICES = ("several", "best", "single", "stable")
# A mask is stable if its area changes little between these thresholds on its logits.
STABILITY_DELTA = 0.05
STABILITY_THRESHOLD = 0.98


def stability(logits: Float[Array, "*n l l"]) -> Float[Array, "*n"]:
    """Returns the area of each mask at a raised threshold, divided by that at a lowered one."""
    inner = jnp.sum(logits > STABILITY_DELTA, axis=(-2, -1))
    outer = jnp.sum(logits > -STABILITY_DELTA, axis=(-2, -1))
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)


class OutputUpscaling(nn.Module):
    """The image embedding at four times its resolution, with the finer features added."""

    config: Sam2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "n g g c"], high_res: Sequence[Float[Array, "b _ _ _"]]
    ) -> Float[Array, "n 4*g 4*g d"]:
        config = self.config
        finest, finer = high_res
        x = PatchTranspose(config.out_channels // 4, config.dtype, name="conv1")(x)
        x = _add_to_each_prompt(x, finer)
        x = gelu_float32(layer_norm("norm", LAYER_NORM_EPSILON, config.dtype)(x))
        x = PatchTranspose(config.out_channels // 8, config.dtype, name="conv2")(x)
        return gelu_float32(_add_to_each_prompt(x, finest))


def _add_to_each_prompt(
    x: Float[Array, "n g g c"], features: Float[Array, "b g g c"]
) -> Float[Array, "n g g c"]:
    """Adds an image's features to the n / b rows of its prompts."""
    by_image = x.reshape(features.shape[0], -1, *x.shape[1:])
    return (by_image + features.astype(x.dtype)[:, None]).reshape(x.shape)


class MaskDecoder(nn.Module):
    """Predicts one mask a prompt, or several alternatives."""

    config: Sam2Config

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "n g g c"],
        image_pe: Float[Array, "g g c"],
        high_res: Sequence[Float[Array, "b _ _ _"]],
        sparse: Float[Array, "n t c"],
        choice: str,
        sparse_valid: Bool[Array, "n t"] | None = None,
    ) -> tuple[Float[Array, "n m l l"], Float[Array, "n m"], Float[Array, " n"]]:
        """Returns low-resolution logits, estimated IoU and the object's score, all float32.

        Args:
          image: image embedding plus dense prompt, one row a prompt.
          image_pe: positional encoding of the image embedding.
          high_res: the finer features of each image, finest first; n / b rows have each.
          sparse: prompt tokens.
          choice: one of `CHOICES`.
          sparse_valid: false at prompt tokens that nothing attends to.
        """
        config = self.config
        n, grid, channels = image.shape[0], config.grid, config.out_channels
        masks = config.num_multimask + 1
        tokens = [
            self.param(name, TORCH_NORMAL, (count, channels), jnp.float32)
            for name, count in (("obj_score_token", 1), ("iou_token", 1), ("mask_tokens", masks))
        ]
        output_tokens = jnp.concatenate(tokens).astype(config.dtype)
        output_tokens = jnp.broadcast_to(output_tokens, (n, *output_tokens.shape))
        tokens = jnp.concatenate([output_tokens, sparse], axis=1)
        valid = None
        if sparse_valid is not None:
            always = jnp.ones(output_tokens.shape[:2], bool)
            valid = jnp.concatenate([always, sparse_valid], axis=1)

        image_pe = image_pe.reshape(1, grid * grid, channels).astype(config.dtype)
        image = image.reshape(n, grid * grid, channels)
        tokens, image = TwoWayTransformer(config, name="transformer")(
            image, image_pe, tokens, valid
        )

        upscaled = OutputUpscaling(config, name="output_upscaling")(
            image.reshape(n, grid, grid, channels), high_res
        )
        hyper = hyper_networks(config, "relu")(tokens[:, 2 : 2 + masks])
        widths = (config.iou_head_width, config.iou_head_width, masks)
        iou = Mlp(widths, "relu", config.dtype, MLP_NAMES, name="iou_prediction_head")(tokens[:, 1])
        iou = jax.nn.sigmoid(iou.astype(jnp.float32))
        widths = (channels, channels, 1)
        score = Mlp(widths, "relu", config.dtype, MLP_NAMES, name="pred_obj_score_head")
        object_score = score(tokens[:, 0])[:, 0].astype(jnp.float32)

        def logits_of(hyper: Float[Array, "n m d"]) -> Float[Array, "n m l l"]:
            precision = matmul_precision(config.dtype)
            logits = jnp.einsum("nmc,nhwc->nmhw", hyper, upscaled, precision=precision)
            return logits.astype(jnp.float32)

        if choice == "several":
            return logits_of(hyper[:, 1:]), iou[:, 1:], object_score
        single, single_iou = hyper[:, :1], iou[:, :1]
        if choice == "single":
            return logits_of(single), single_iou, object_score
        best = 1 + jnp.argmax(iou[:, 1:], axis=1, keepdims=True)
        best_hyper = jnp.take_along_axis(hyper, best[..., None], axis=1)
        best_iou = jnp.take_along_axis(iou, best, axis=1)
        if choice == "best":
            return logits_of(best_hyper), best_iou, object_score
        logits = logits_of(single)
        stable = stability(logits) >= STABILITY_THRESHOLD
        return (
            jnp.where(stable[..., None, None], logits, logits_of(best_hyper)),
            jnp.where(stable, single_iou, best_iou),
            object_score,
        )
