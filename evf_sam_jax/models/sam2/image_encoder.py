"""SAM-2's image encoder: trunk, feature pyramid, and what the decoder adds while it upscales.

Reference: facebookresearch/sam2 at 2b90b9f, `modeling/backbones/image_encoder.py`,
`modeling/sam2_base.py` (`forward_image`) and `sam2_image_predictor.py` (`set_image`).

Differences:
  - All that is computed once an image is here: `no_mem_embed` of the original's top module, and
    `conv_s0` and `conv_s1` of its mask decoder.
  - The neck is float32 whatever the dtype of the trunk. The pyramid's positional encodings, which
    only the memory of videos uses, are not computed.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from evf_sam_jax.models.interfaces import ImageFeatures
from evf_sam_jax.models.layers import PatchConv
from evf_sam_jax.models.sam2.config import EMBEDDED_STAGE, STAGES, Sam2Config
from evf_sam_jax.models.sam2.hieradet import Hiera


class Neck(nn.Module):
    """A feature pyramid: all levels in the channels of the embedding, and the finer two in fewer.

    Only the embedding has something of the coarser level above it, which goes no further.
    """

    config: Sam2Config

    def setup(self) -> None:
        channels = self.config.out_channels

        def convolution(features: int) -> PatchConv:
            return PatchConv(features, 1, jnp.float32, use_bias=True)

        # Numbered from the coarsest level on, as in the original.
        self.convs = [convolution(channels) for _ in range(STAGES)]
        self.conv_s0, self.conv_s1 = convolution(channels // 8), convolution(channels // 4)

    def __call__(self, stages: list[Float[Array, "b _ _ _"]]) -> list[Float[Array, "b _ _ c"]]:
        """Returns the levels, finest first, without the coarsest."""
        levels = [
            convolution(stage.astype(jnp.float32))
            for stage, convolution in zip(stages, reversed(self.convs), strict=True)
        ]
        coarsest = levels.pop()
        doubled = jnp.repeat(jnp.repeat(coarsest, 2, axis=1), 2, axis=2)  # nearest neighbour
        levels[EMBEDDED_STAGE] = levels[EMBEDDED_STAGE] + doubled
        return levels

    def high_res(
        self, finest: Float[Array, "b g g c"], finer: Float[Array, "b h h c"]
    ) -> tuple[Float[Array, "b g g _"], Float[Array, "b h h _"]]:
        """Returns what the decoder adds while it upscales, finest first."""
        return self.conv_s0(finest), self.conv_s1(finer)


class ImageEncoder(nn.Module):
    """The image encoder, from a normalised image to features, all in float32."""

    config: Sam2Config

    def setup(self) -> None:
        self.trunk, self.neck = Hiera(self.config), Neck(self.config)
        normal = nn.initializers.truncated_normal(stddev=0.02)
        self.no_mem_embed = self.param("no_mem_embed", normal, (self.config.out_channels,))

    def __call__(self, image: Float[Array, "b s s 3"]) -> ImageFeatures:
        """Returns the image embedding, and the finer levels of the pyramid as they are there."""
        finest, finer, embedding = self.pyramid(image)
        # An image is a video's first frame, which has no memory.
        embedding = embedding + self.no_mem_embed.astype(jnp.float32)[None, None, None]
        return ImageFeatures(embedding=embedding, high_res=(finest, finer))

    def finish(self, features: ImageFeatures) -> ImageFeatures:
        """Brings the finer levels into the channels that the decoder adds."""
        finest, finer = features.high_res
        return dataclasses.replace(features, high_res=self.neck.high_res(finest, finer))

    def pyramid(self, image: Float[Array, "b s s 3"]) -> list[Float[Array, "b _ _ c"]]:
        """Returns the levels of the feature pyramid, finest first."""
        return self.neck(self.trunk(image))
