"""The transformer layer that CLIP and ViLT share: a norm before attention, a norm before the MLP.

Reference: `CLIPEncoderLayer` and `ViltLayer` of huggingface/transformers 5.24.

Differences:
  - Query, key and value are one parameter of three matrices.
  - Layers are stacked and scanned. The residual stream and softmax are float32 whatever the dtype
    of the products.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from evf_sam_jax.models.attention import attend
from evf_sam_jax.models.layers import (
    dense,
    gelu_float32,
    layer_norm,
    matmul_precision,
    scanned,
    split_by_batch,
)

ACTIVATIONS = ("gelu", "quick_gelu")


@dataclasses.dataclass(frozen=True)
class PreNormConfig:
    """Sizes of a stack of layers.

    Attributes:
      activation: of the MLP: the exact GELU, or x sigmoid(1.702 x).
      epsilon: of the norms.
      init: standard deviation of each matrix where no checkpoint is loaded: query, key and value;
        the attention's output; the MLP's two.
    """

    width: int
    heads: int
    layers: int
    mlp_width: int
    activation: str
    epsilon: float
    init: tuple[float, float, float, float]
    dtype: str
    remat: bool | str


def stacked(config: PreNormConfig, name: str) -> Any:
    """Returns the layers as one module, called as `PreNormLayer`; `free` has a value a layer."""
    return nn.scan(
        scanned(PreNormLayer, config.remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (Flax forgets it)
        length=config.layers,
    )(config, name=name)


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns x sigmoid(1.702 x), evaluated in float32 and cast back to the dtype of `x`."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


class PreNormLayer(nn.Module):
    """One layer."""

    config: PreNormConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n t d"],
        key_valid: Bool[Array, "n t"] | None,
        allowed: Bool[Array, "t t"] | None,
        free: Bool[Array, ""],
    ) -> tuple[Float[Array, "n t d"], None]:
        """Returns the tokens after this layer, and nothing for the scan to stack.

        Args:
          key_valid: false at tokens that nothing may attend to.
          allowed: false where a query must not see a key.
          free: whether this layer's queries may see all keys, whatever is `allowed`.
        """
        config = self.config
        if allowed is not None:
            allowed = allowed | free
        y = layer_norm("norm1", config.epsilon, config.dtype)(x)
        x = x + SelfAttention(config, name="attention")(y, key_valid, allowed)
        y = layer_norm("norm2", config.epsilon, config.dtype)(x)
        hidden_init, out_init = (nn.initializers.normal(stddev) for stddev in config.init[2:])
        y = dense("fc1", config.mlp_width, config.dtype, kernel_init=hidden_init)(y)
        y = {"gelu": gelu_float32, "quick_gelu": quick_gelu}[config.activation](y)
        y = dense("fc2", config.width, config.dtype, kernel_init=out_init)(y)
        return split_by_batch(x + y), None


class SelfAttention(nn.Module):
    """Attention over all tokens; `qkv` is [3, in, out], so that each is a layer's part of a stack.

    A checkpoint has them as three tensors or as one; either way the conversion moves whole parts.
    """

    config: PreNormConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n t d"],
        key_valid: Bool[Array, "n t"] | None,
        allowed: Bool[Array, "t t"] | None,
    ) -> Float[Array, "n t d"]:
        config, width = self.config, self.config.width
        in_init, out_init = (nn.initializers.normal(stddev) for stddev in config.init[:2])
        qkv = Qkv(width, config.dtype, in_init, name="qkv")(x)
        q, k, v = qkv.reshape(3, *x.shape[:2], config.heads, width // config.heads)
        context = attend(
            q, k, v, scale=q.shape[-1] ** -0.5, key_valid=key_valid, allowed=allowed
        ).reshape(x.shape)
        return dense("out_proj", width, config.dtype, kernel_init=out_init)(context)


class Qkv(nn.Module):
    """Three Linear layers of the same input."""

    width: int
    dtype: str
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "3 n t d"]:
        shape = (3, self.width, self.width)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[:2], jnp.float32).astype(self.dtype)
        precision = matmul_precision(self.dtype)
        return jnp.einsum("ntd,cde->cnte", x, kernel, precision=precision) + bias[:, None, None]
