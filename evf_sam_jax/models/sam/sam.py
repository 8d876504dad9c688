"""Segment Anything as a promptable segmenter: encode an image once, decode any number of prompts.

Reference: hustvl/EVF-SAM at 9935dc5, `model/segment_anything/modeling/sam.py`.

Differences: the two halves are separate methods; masks stay at the decoder's resolution, since
`mask_geometry` resamples them; prompts and decoder are float32 whatever the image encoder is.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.models.layers import gathering, split_by_batch
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.models.sam.image_encoder import ImageEncoder
from evf_sam_jax.models.sam.mask_decoder import MaskDecoder
from evf_sam_jax.models.sam.prompt_encoder import PromptEncoder


class Sam(nn.Module):
    """The promptable segmenter; both profiles mean the same to it."""

    config: SamConfig
    profile: str

    def setup(self) -> None:
        self.image_encoder = ImageEncoder(self.config)
        # Little of the arithmetic, and most of what bfloat16 would cost the masks.
        exact = dataclasses.replace(self.config, dtype="float32")
        self.prompt_encoder = PromptEncoder(exact)
        self.mask_decoder = gathering(MaskDecoder)(exact)

    def encode_image(
        self, image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"]
    ) -> ImageFeatures:
        """Encodes images that were resized into the frame, top-left; `size`: height, width."""
        return ImageFeatures(embedding=self.image_encoder(image, size))

    def finish(self, features: ImageFeatures) -> ImageFeatures:
        """Leaves features as they are: nothing is left to be done."""
        return features

    def dense_positions(self) -> Float[Array, "g g c"]:
        """Returns the positional encoding of every cell of the image embedding."""
        return self.prompt_encoder.dense_positions()

    def decode(
        self,
        features: ImageFeatures,
        prompts: Prompts,
        multimask: bool,
        train: bool,
        positions: Float[Array, "g g c"] | None = None,
    ) -> MaskPrediction:
        """Decodes k prompts of each of b images, in training as ever."""
        sparse, dense = self.prompt_encoder(prompts)
        b, k = sparse.shape[:2]
        image = features.embedding.astype(jnp.float32)[:, None] + dense
        valid = prompts.token_valid
        logits, iou = self.mask_decoder(
            split_by_batch(image.reshape(b * k, *image.shape[2:])),
            self.dense_positions() if positions is None else positions,
            split_by_batch(sparse.reshape(b * k, *sparse.shape[2:])),
            multimask,
            None if valid is None else valid.reshape(b * k, valid.shape[-1]),
        )
        return MaskPrediction(
            low_res_logits=logits.reshape(b, k, *logits.shape[1:]),
            iou=iou.reshape(b, k, *iou.shape[1:]),
        )
