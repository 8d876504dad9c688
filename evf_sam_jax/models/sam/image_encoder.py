"""SAM's image encoder: a ViT with windowed and global attention and relative positions.

Reference: facebookresearch/segment-anything at dca509f, `modeling/image_encoder.py`.

Differences:
  - Blocks are stacked as groups of (windowed blocks, scanned, and one global block).
  - Normalisation and zero padding of the image happen here, on the device.
  - Windows are cut after the projection to queries, keys and values, and joined before the one of
    their outputs, so that neither multiplies padding.
  - Softmax, the residual stream and the neck are float32 whatever the dtype of the products.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from evf_sam_jax.models.attention import attend_square
from evf_sam_jax.models.frame import normalize
from evf_sam_jax.models.layers import (
    TORCH_UNIFORM,
    Mlp,
    PatchConv,
    dense,
    layer_norm,
    matmul_precision,
    scanned,
    split_by_batch,
)
from evf_sam_jax.models.sam.config import SamConfig

LAYER_NORM_EPSILON = 1e-6


def normalize_and_pad(
    image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"]
) -> Float[Array, "b s s 3"]:
    """Normalises pixels and zeroes what lies outside the content, as the original pads."""
    inside = jnp.arange(image.shape[1])[None, None] < size[:, :, None]  # [b, 2, s]
    inside = inside[:, 0, :, None] & inside[:, 1, None, :]
    return jnp.where(inside[..., None], normalize(image), 0.0)


def relative_positions(table: Float[Array, "r c"], size: int) -> Float[Array, "q k c"]:
    """Returns the table's row for each (query, key) coordinate pair along one axis.

    Raises ValueError if the table was not made for `size` (the original would interpolate it).
    """
    if table.shape[0] != 2 * size - 1:
        raise ValueError(
            f"relative positions for size {size} need {2 * size - 1} rows, got {table.shape[0]}"
        )
    index = jnp.arange(size)[:, None] - jnp.arange(size)[None, :] + size - 1
    return table[index]


class Attention(nn.Module):
    """Self-attention with decomposed relative positions, within windows or the whole grid.

    Windows are padded and the padding is not masked: it attends and is attended to as the bias of
    `qkv`, as in the original, which multiplies the zeros of the padding to get it.
    """

    config: SamConfig
    window: int | None

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"]) -> Float[Array, "b g g c"]:
        config, grid = self.config, x.shape[1]
        size = self.window or grid
        tokens, heads, width = size * size, config.heads, config.head_width
        project = dense("qkv", 3 * config.width, config.dtype)
        qkv = project(x)
        if self.window is not None:
            qkv = partition_windows(qkv, self.window, fill=project(jnp.zeros_like(x[0, 0, 0])))
        n = qkv.shape[0]
        # [3, n * heads, tokens, width]
        qkv = qkv.reshape(n, tokens, 3, heads, width).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, n * heads, tokens, width)
        zeros = nn.initializers.zeros
        table_h = self.param("rel_pos_h", zeros, (2 * size - 1, width), jnp.float32)
        table_w = self.param("rel_pos_w", zeros, (2 * size - 1, width), jnp.float32)
        grid_q = q.reshape(n * heads, size, size, width)  # unscaled, as in the original
        rows = relative_positions(table_h, size).astype(config.dtype)
        columns = relative_positions(table_w, size).astype(config.dtype)
        precision = matmul_precision(config.dtype)
        bias_h = jnp.einsum("nhwc,hkc->nhwk", grid_q, rows, precision=precision)
        bias_w = jnp.einsum("nhwc,wkc->nhwk", grid_q, columns, precision=precision)
        bias_h, bias_w = (bias.reshape(n * heads, tokens, size) for bias in (bias_h, bias_w))
        context = attend_square(q, k, v, bias_h, bias_w, scale=width**-0.5)
        context = context.reshape(n, heads, tokens, width).transpose(0, 2, 1, 3)
        context = context.reshape(n, size, size, config.width)
        if self.window is not None:
            context = join_windows(context, grid)
        return dense("proj", config.width, config.dtype)(context)


def partition_windows(
    x: Float[Array, "b g g c"], window: int, fill: Float[Array, " c"]
) -> Float[Array, "n w w c"]:
    """Cuts into windows, padding with `fill` at the bottom and right."""
    b, g, _, c = x.shape
    pad = -g % window
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0)))
        inside = jnp.arange(g + pad) < g
        inside = inside[:, None] & inside[None]
        x = jnp.where(inside[None, ..., None], x, fill[None, None, None])
    side = (g + pad) // window
    x = x.reshape(b, side, window, side, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window, window, c)


def join_windows(x: Float[Array, "n w w c"], grid: int) -> Float[Array, "b g g c"]:
    """Undoes `partition_windows`, dropping the padding."""
    window, c = x.shape[1], x.shape[-1]
    side = -(-grid // window)
    x = x.reshape(-1, side, side, window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * window, side * window, c)[:, :grid, :grid]


class Block(nn.Module):
    """A transformer block; `window` tokens a side, or None for global attention."""

    config: SamConfig
    window: int | None

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"], _: None = None):
        config = self.config
        y = layer_norm("norm1", LAYER_NORM_EPSILON, config.dtype)(x)
        x = x + Attention(config, self.window, name="attn")(y)
        y = layer_norm("norm2", LAYER_NORM_EPSILON, config.dtype)(x)
        hidden = config.mlp_ratio * config.width
        mlp = Mlp((hidden, config.width), "gelu", config.dtype, ("lin1", "lin2"), name="mlp")
        return split_by_batch(x + mlp(y)), None


class Group(nn.Module):
    """Windowed blocks, then a global one."""

    config: SamConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"], _: None = None):
        config = self.config
        block = scanned(Block, config.remat)
        if config.global_every > 1:
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=config.global_every - 1,
            )(config, config.window_size, name="windowed")(x, None)
        return block(config, None, name="global")(x, None)


class Neck(nn.Module):
    """Two convolutions with a LayerNorm over channels after each, in float32."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"]) -> Float[Array, "b g g d"]:
        x = PatchConv(self.channels, 1, jnp.float32, use_bias=False, name="conv1")(x)
        x = layer_norm("norm1", LAYER_NORM_EPSILON, jnp.float32)(x)
        x = nn.Conv(
            self.channels,
            (3, 3),
            padding=((1, 1), (1, 1)),
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            precision=matmul_precision(jnp.float32),
            kernel_init=TORCH_UNIFORM,
            name="conv2",
        )(x)
        return layer_norm("norm2", LAYER_NORM_EPSILON, jnp.float32)(x)


class ImageEncoder(nn.Module):
    """The image encoder, from pixels to the image embedding."""

    config: SamConfig

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"]
    ) -> Float[Array, "b g g d"]:
        """Returns the image embedding in float32.

        Args:
          image: resized so that its longer side is the frame's, top-left.
          size: height and width of the content.
        """
        config = self.config
        x = normalize_and_pad(image, size)
        x = PatchEmbed(config.width, config.patch_size, config.dtype, name="patch_embed")(x)
        shape = (config.grid, config.grid, config.width)
        pos_embed = self.param("pos_embed", nn.initializers.zeros, shape, jnp.float32)
        # The residual stream stays float32: 64 additions in bfloat16 would cost a bit of the masks.
        x = x.astype(jnp.float32) + pos_embed.astype(jnp.float32)[None]
        x, _ = nn.scan(
            Group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.groups,
        )(config, name="groups")(x, None)
        return Neck(config.out_channels, name="neck")(x)


class PatchEmbed(nn.Module):
    """Patch embedding; the original's module of this name holds one convolution, `proj`."""

    width: int
    patch_size: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b g g c"]:
        return PatchConv(self.width, self.patch_size, self.dtype, True, name="proj")(x)
