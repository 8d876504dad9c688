"""EfficientSAM's image encoder: a plain ViT in which all patches attend to all.

Reference: yformer/EfficientSAM at d525f62, `efficient_sam/efficient_sam_encoder.py`.

Differences:
  - Blocks are stacked and scanned; scores are computed in tiles.
  - Normalisation, and the legacy profile's stretch, happen here, on the device.
  - Softmax, the residual stream and the neck are float32 whatever the dtype of the products.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from evf_sam_jax.models.attention import attend_square
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.frame import normalize_and_stretch
from evf_sam_jax.models.layers import Mlp, dense, layer_norm, scanned, split_by_batch
from evf_sam_jax.models.resize import resize_bicubic
from evf_sam_jax.models.sam.image_encoder import LAYER_NORM_EPSILON, Neck, PatchEmbed


class Attention(nn.Module):
    """Self-attention of all patches."""

    config: EfficientSamConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        config = self.config
        b, tokens, heads, width = *x.shape[:2], config.heads, config.head_width
        qkv = dense("qkv", 3 * config.width, config.dtype)(x)
        # [3, b * heads, tokens, width]
        qkv = qkv.reshape(b, tokens, 3, heads, width).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * heads, tokens, width)
        context = attend_square(q, k, v, scale=width**-0.5)
        context = context.reshape(b, heads, tokens, width).swapaxes(1, 2)
        return dense("proj", config.width, config.dtype)(context.reshape(b, tokens, config.width))


class Block(nn.Module):
    """A transformer block."""

    config: EfficientSamConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], _: None = None):
        config = self.config
        y = layer_norm("norm1", LAYER_NORM_EPSILON, config.dtype)(x)
        x = x + Attention(config, name="attn")(y)
        y = layer_norm("norm2", LAYER_NORM_EPSILON, config.dtype)(x)
        hidden = config.mlp_ratio * config.width
        mlp = Mlp((hidden, config.width), "gelu", config.dtype, ("fc1", "fc2"), name="mlp")
        return split_by_batch(x + mlp(y)), None


class ImageEncoder(nn.Module):
    """The image encoder, from pixels to the image embedding."""

    config: EfficientSamConfig
    profile: str

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"]
    ) -> Float[Array, "b g g d"]:
        """Returns the image embedding in float32; arguments as of `normalize_and_stretch`."""
        config = self.config
        x = normalize_and_stretch(image, size, self.profile)
        x = PatchEmbed(config.width, config.patch_size, config.dtype, name="patch_embed")(x)
        # The first row is of a [CLS] token that there is none of; it is kept to go back to torch.
        rows = 1 + config.table_size**2
        pos_embed = self.param(
            "pos_embed", nn.initializers.zeros, (rows, config.width), jnp.float32
        )
        table = pos_embed[1:].reshape(config.table_size, config.table_size, config.width)
        x = x.astype(jnp.float32) + resize_bicubic(table, config.grid, config.grid)[None]
        x, _ = nn.scan(
            scanned(Block, config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.depth,
        )(config, name="blocks")(x.reshape(x.shape[0], -1, config.width), None)
        x = x.reshape(-1, config.grid, config.grid, config.width)
        return Neck(config.out_channels, name="neck")(x)
