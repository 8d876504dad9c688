"""SAM's mask decoder: image embedding and prompt tokens to masks and their estimated IoU.

Reference: facebookresearch/segment-anything at dca509f, `modeling/mask_decoder.py`.

Differences: the four hyper-networks are stacked and computed at once.
"""

from typing import ClassVar

import flax.linen as nn
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
from evf_sam_jax.models.sam.config import DecoderConfig
from evf_sam_jax.models.sam.transformer import TwoWayTransformer

LAYER_NORM_EPSILON = 1e-6
MLP_NAMES = ("layers_0", "layers_1", "layers_2")


class OutputUpscaling(nn.Module):
    """The image embedding at four times its resolution and an eighth of its channels."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n g g c"]) -> Float[Array, "n 4*g 4*g d"]:
        config = self.config
        x = PatchTranspose(config.out_channels // 4, config.dtype, name="conv1")(x)
        x = gelu_float32(layer_norm("norm", LAYER_NORM_EPSILON, config.dtype)(x))
        return gelu_float32(PatchTranspose(config.out_channels // 8, config.dtype, name="conv2")(x))


def hyper_networks(config: DecoderConfig, activation: str) -> nn.Module:
    """Returns the networks that make of each mask token the weights of its mask, stacked."""
    channels = config.out_channels
    return nn.vmap(
        Mlp, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
    )(
        (channels, channels, channels // 8),
        activation,
        config.dtype,
        MLP_NAMES,
        name="output_hypernetworks_mlps",
    )


class MaskDecoder(nn.Module):
    """Predicts one mask a prompt, or several alternatives."""

    config: DecoderConfig

    activation: ClassVar[str] = "relu"
    transformer_type: ClassVar[type[TwoWayTransformer]] = TwoWayTransformer
    upscaling_type: ClassVar[type[nn.Module]] = OutputUpscaling

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "n g g c"],
        image_pe: Float[Array, "g g c"],
        sparse: Float[Array, "n t c"],
        multimask: bool,
        sparse_valid: Bool[Array, "n t"] | None = None,
    ) -> tuple[Float[Array, "n m l l"], Float[Array, "n m"]]:
        """Returns low-resolution logits and estimated IoU, both float32.

        Args:
          image: image embedding plus dense prompt, one row a prompt.
          image_pe: positional encoding of the image embedding.
          sparse: prompt tokens.
          multimask: three masks (tokens 1-3) instead of one (token 0).
          sparse_valid: false at prompt tokens that nothing attends to.
        """
        config = self.config
        n, grid, channels = image.shape[0], config.grid, config.out_channels
        masks = config.num_multimask + 1
        iou_token = self.param("iou_token", TORCH_NORMAL, (1, channels), jnp.float32)
        mask_tokens = self.param("mask_tokens", TORCH_NORMAL, (masks, channels), jnp.float32)
        output_tokens = jnp.concatenate([iou_token, mask_tokens]).astype(config.dtype)
        output_tokens = jnp.broadcast_to(output_tokens, (n, *output_tokens.shape))
        tokens = jnp.concatenate([output_tokens, sparse], axis=1)
        valid = None
        if sparse_valid is not None:
            always = jnp.ones(output_tokens.shape[:2], bool)
            valid = jnp.concatenate([always, sparse_valid], axis=1)

        image_pe = image_pe.reshape(1, grid * grid, channels).astype(config.dtype)
        image = image.reshape(n, grid * grid, channels)
        tokens, image = self.transformer_type(config, name="transformer")(
            image, image_pe, tokens, valid
        )

        upscaled = self.upscaling_type(config, name="output_upscaling")(
            image.reshape(n, grid, grid, channels)
        )
        hyper = hyper_networks(config, self.activation)(tokens[:, 1 : 1 + masks])
        iou = Mlp(
            (config.iou_head_width, config.iou_head_width, masks),
            self.activation,
            config.dtype,
            MLP_NAMES,
            name="iou_prediction_head",
        )(tokens[:, 0])

        chosen = slice(1, masks) if multimask else slice(0, 1)
        logits = jnp.einsum(
            "nmc,nhwc->nmhw", hyper[:, chosen], upscaled, precision=matmul_precision(config.dtype)
        )
        return logits.astype(jnp.float32), iou[:, chosen].astype(jnp.float32)
