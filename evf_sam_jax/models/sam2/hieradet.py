"""SAM-2's trunk: a Hiera, whose four stages halve the resolution and double the channels.

Reference: facebookresearch/sam2 at 2b90b9f, `modeling/backbones/hieradet.py` and `utils.py`.

Differences:
  - Blocks in a row that are alike are stacked and scanned.
  - Padding of windows is not multiplied, as in SAM (`sam/image_encoder.py`).
  - Softmax and the residual stream are float32 whatever the dtype of the products.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from evf_sam_jax.models.attention import attend, attend_square
from evf_sam_jax.models.layers import (
    TORCH_UNIFORM,
    Mlp,
    dense,
    layer_norm,
    matmul_precision,
    scanned,
    split_by_batch,
)
from evf_sam_jax.models.resize import resize_bicubic
from evf_sam_jax.models.sam.image_encoder import join_windows, partition_windows
from evf_sam_jax.models.sam2.config import PATCH_STRIDE, Run, Sam2Config

LAYER_NORM_EPSILON = 1e-6
PATCH_KERNEL = 7  # patches overlap


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """Returns the largest of each two by two."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class Attention(nn.Module):
    """Self-attention within windows or the whole grid; queries may be pooled.

    Windows are padded and the padding is not masked: it attends and is attended to as the bias of
    `qkv`, as in the original, which multiplies the zeros of the padding to get it.
    """

    config: Sam2Config
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"]) -> Float[Array, "b t t d"]:
        run = self.run
        width = run.width // run.heads
        project = dense("qkv", 3 * run.width, self.config.dtype)
        qkv = project(x)
        if run.window is not None:
            qkv = partition_windows(qkv, run.window, fill=project(jnp.zeros_like(x[0, 0, 0])))
        n, side = qkv.shape[:2]
        if run.pools:
            q, k, v = jnp.split(qkv, 3, axis=-1)
            q, side = max_pool(q), side // 2
            q, k, v = (y.reshape(n, -1, run.heads, width) for y in (q, k, v))
            context = attend(q, k, v, scale=width**-0.5)
        else:
            # [3, n * heads, tokens, width]
            qkv = qkv.reshape(n, side * side, 3, run.heads, width).transpose(2, 0, 3, 1, 4)
            q, k, v = qkv.reshape(3, n * run.heads, side * side, width)
            context = attend_square(q, k, v, scale=width**-0.5)
            context = context.reshape(n, run.heads, side * side, width).transpose(0, 2, 1, 3)
        context = context.reshape(n, side, side, run.width)
        if run.window is not None:
            context = join_windows(context, x.shape[1] // 2 if run.pools else x.shape[1])
        return dense("proj", run.width, self.config.dtype)(context)


class Block(nn.Module):
    """A transformer block; where it pools, its shortcut is a projection of the normed input."""

    config: Sam2Config
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"], _: None = None):
        config, run = self.config, self.run
        y = layer_norm("norm1", LAYER_NORM_EPSILON, config.dtype)(x)
        if run.pools:
            x = max_pool(dense("proj", run.width, config.dtype)(y)).astype(jnp.float32)
        x = x + Attention(config, run, name="attn")(y)
        y = layer_norm("norm2", LAYER_NORM_EPSILON, config.dtype)(x)
        widths = (config.mlp_ratio * run.width, run.width)
        mlp = Mlp(widths, "gelu", config.dtype, ("layers_0", "layers_1"), name="mlp")
        return split_by_batch(x + mlp(y)), None


class Hiera(nn.Module):
    """The trunk, from a normalised image to the output of each stage, finest first."""

    config: Sam2Config

    @nn.compact
    def __call__(self, image: Float[Array, "b s s 3"]) -> list[Float[Array, "b _ _ _"]]:
        config = self.config
        x = PatchEmbed(config, name="patch_embed")(image)
        zeros, (window, *_), grid = nn.initializers.zeros, config.windows, config.stage_grid(0)
        shape = (config.position_grid, config.position_grid, config.width)
        coarse = resize_bicubic(self.param("pos_embed", zeros, shape, jnp.float32), grid, grid)
        shape = (window, window, config.width)
        fine = self.param("pos_embed_window", zeros, shape, jnp.float32).astype(jnp.float32)
        positions = coarse + jnp.tile(fine, (grid // window, grid // window, 1))
        # The residual stream stays float32, as SAM's does.
        x = x.astype(jnp.float32) + positions[None]
        outputs = []
        for stage in config.runs:
            for run in stage:
                if run.length == 1:
                    block = scanned(Block, config.remat, alone=True)
                    x, _ = block(config, run, name=run.name)(x, None)
                else:
                    x, _ = nn.scan(
                        scanned(Block, config.remat),
                        variable_axes={"params": 0},
                        split_rngs={"params": True},
                        length=run.length,
                    )(config, run, name=run.name)(x, None)
            outputs.append(x)
        return outputs


class PatchEmbed(nn.Module):
    """Patch embedding; the original's module of this name holds one convolution, `proj`."""

    config: Sam2Config

    @nn.compact
    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b g g c"]:
        config = self.config
        pad = PATCH_KERNEL // 2
        return nn.Conv(
            config.width,
            (PATCH_KERNEL, PATCH_KERNEL),
            strides=(PATCH_STRIDE, PATCH_STRIDE),
            padding=((pad, pad), (pad, pad)),
            dtype=config.dtype,
            param_dtype=jnp.float32,
            precision=matmul_precision(config.dtype),
            kernel_init=TORCH_UNIFORM,
            name="proj",
        )(x)
