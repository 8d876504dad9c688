"""SAM's two-way transformer: prompt tokens and image tokens attend to each other.

Reference: facebookresearch/segment-anything at dca509f, `modeling/transformer.py`.

Differences: softmax is computed in float32.
"""

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from evf_sam_jax.models.attention import attend
from evf_sam_jax.models.layers import Mlp, dense, layer_norm
from evf_sam_jax.models.sam.config import DecoderConfig

LAYER_NORM_EPSILON = 1e-5  # torch's default, unlike the image encoder's
DOWNSAMPLE_RATE = 2  # cross-attention works in half the channels


class Attention(nn.Module):
    """Multi-head attention with projections to `width` channels and back."""

    config: DecoderConfig
    width: int

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "n a c"],
        k: Float[Array, "n s c"],
        v: Float[Array, "n s c"],
        key_valid: Bool[Array, "n s"] | None = None,
    ) -> Float[Array, "n a c"]:
        config = self.config
        heads = config.decoder_heads

        def project(name: str, x: Float[Array, "n t c"]) -> Float[Array, "n t h d"]:
            return dense(name, self.width, config.dtype)(x).reshape(*x.shape[:2], heads, -1)

        q, k, v = project("q_proj", q), project("k_proj", k), project("v_proj", v)
        scale = (self.width // heads) ** -0.5
        context = attend(q, k, v, scale=scale, key_valid=key_valid)
        context = context.reshape(*context.shape[:2], self.width)
        return dense("out_proj", config.out_channels, config.dtype)(context)


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens."""

    config: DecoderConfig
    first: bool

    activation: ClassVar[str] = "relu"

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "n t c"],
        keys: Float[Array, "n s c"],
        query_pe: Float[Array, "n t c"],
        key_pe: Float[Array, "1 s c"],
        query_valid: Bool[Array, "n t"] | None = None,
    ) -> tuple[Float[Array, "n t c"], Float[Array, "n s c"]]:
        config = self.config
        channels, reduced = config.out_channels, config.out_channels // DOWNSAMPLE_RATE

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(name, LAYER_NORM_EPSILON, config.dtype)

        self_attention = Attention(config, channels, name="self_attn")
        queries = self.attend_to_tokens(self_attention, queries, query_pe, query_valid)
        queries = norm("norm1")(queries)

        to_image = Attention(config, reduced, name="cross_attn_token_to_image")
        queries = norm("norm2")(queries + to_image(queries + query_pe, keys + key_pe, keys))

        widths = (config.decoder_mlp_width, channels)
        mlp = Mlp(widths, self.activation, config.dtype, ("lin1", "lin2"), name="mlp")
        queries = norm("norm3")(queries + mlp(queries))

        to_tokens = Attention(config, reduced, name="cross_attn_image_to_token")
        attended = to_tokens(keys + key_pe, queries + query_pe, queries, query_valid)
        keys = norm("norm4")(keys + attended)
        return queries, keys

    def attend_to_tokens(
        self,
        attention: Attention,
        queries: Float[Array, "n t c"],
        query_pe: Float[Array, "n t c"],
        query_valid: Bool[Array, "n t"] | None,
    ) -> Float[Array, "n t c"]:
        """Returns the tokens after they have attended to each other, before the norm."""
        if self.first:  # no positions yet, and the queries are replaced, not added to
            return attention(queries, queries, queries, query_valid)
        q = queries + query_pe
        return queries + attention(q, q, queries, query_valid)


class TwoWayTransformer(nn.Module):
    """The blocks, then a last attention from the tokens to the image."""

    config: DecoderConfig

    block_type: ClassVar[type[TwoWayAttentionBlock]] = TwoWayAttentionBlock

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "n s c"],
        image_pe: Float[Array, "1 s c"],
        tokens: Float[Array, "n t c"],
        token_valid: Bool[Array, "n t"] | None = None,
    ) -> tuple[Float[Array, "n t c"], Float[Array, "n s c"]]:
        """Returns the tokens and the image after attending to each other.

        Tokens that are not valid are attended to by none; what becomes of them means nothing.
        """
        config = self.config
        queries, keys = tokens, image
        for index in range(config.decoder_depth):
            block = self.block_type(config, first=index == 0, name=f"layers_{index}")
            queries, keys = block(queries, keys, tokens, image_pe, token_valid)
        width = config.out_channels // DOWNSAMPLE_RATE
        to_image = Attention(config, width, name="final_attn_token_to_image")
        queries = queries + to_image(queries + tokens, keys + image_pe, keys)
        return layer_norm("norm_final_attn", LAYER_NORM_EPSILON, config.dtype)(queries), keys
