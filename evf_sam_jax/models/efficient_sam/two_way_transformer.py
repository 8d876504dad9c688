"""EfficientSAM's two-way transformer: SAM's, but for how tokens attend to each other, and GELU.

Reference: yformer/EfficientSAM at d525f62, `efficient_sam/two_way_transformer.py`.

Differences: those of `models/sam/transformer.py`.
"""

from typing import ClassVar

from jaxtyping import Array, Bool, Float

from evf_sam_jax.models.sam import transformer


class TwoWayAttentionBlock(transformer.TwoWayAttentionBlock):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens."""

    activation: ClassVar[str] = "gelu"

    def attend_to_tokens(
        self,
        attention: transformer.Attention,
        queries: Float[Array, "n t c"],
        query_pe: Float[Array, "n t c"],
        query_valid: Bool[Array, "n t"] | None,
    ) -> Float[Array, "n t c"]:
        """Returns the tokens after they have attended to each other, before the norm.

        The first block adds to them too, and where positions are added they stay in values and sum.
        """
        if not self.first:
            queries = queries + query_pe
        return queries + attention(queries, queries, queries, query_valid)


class TwoWayTransformer(transformer.TwoWayTransformer):
    """The blocks, then a last attention from the tokens to the image."""

    block_type: ClassVar[type[transformer.TwoWayAttentionBlock]] = TwoWayAttentionBlock
