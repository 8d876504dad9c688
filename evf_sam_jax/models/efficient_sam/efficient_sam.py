"""EfficientSAM as a promptable segmenter: encode an image once, decode any number of prompts.

Reference: hustvl/EVF-SAM at 9935dc5, `model/evf_effisam.py`, and yformer/EfficientSAM at d525f62,
`efficient_sam/efficient_sam.py`.

Differences: those of `models/sam/sam.py`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.efficient_sam.efficient_sam_decoder import MaskDecoder, PromptEncoder
from evf_sam_jax.models.efficient_sam.efficient_sam_encoder import ImageEncoder
from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.models.layers import gathering, split_by_batch


class EfficientSam(nn.Module):
    """The promptable segmenter."""

    config: EfficientSamConfig
    profile: str

    def setup(self) -> None:
        self.image_encoder = ImageEncoder(self.config, self.profile)
        # Little of the arithmetic, and most of what bfloat16 would cost the masks.
        exact = dataclasses.replace(self.config, dtype="float32")
        self.prompt_encoder = PromptEncoder(exact)
        self.mask_decoder = gathering(MaskDecoder)(exact)

    def encode_image(
        self, image: UInt8[Array, "b s s 3"], size: Int[Array, "b 2"]
    ) -> ImageFeatures:
        """Encodes images as `frame.normalize_and_stretch` takes them; `size`: height, width."""
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
        train: bool = False,
        positions: Float[Array, "g g c"] | None = None,
    ) -> MaskPrediction:
        """Decodes k prompts of each of b images, in training as ever."""
        tokens, valid = self.prompt_encoder(prompts)
        b, k = tokens.shape[:2]
        image = features.embedding.astype(jnp.float32)
        logits, iou = self.mask_decoder(
            split_by_batch(jnp.repeat(image, k, axis=0)),
            self.dense_positions() if positions is None else positions,
            split_by_batch(tokens.reshape(b * k, *tokens.shape[2:])),
            multimask,
            None if valid is None else valid.reshape(b * k, valid.shape[-1]),
        )
        return MaskPrediction(
            low_res_logits=logits.reshape(b, k, *logits.shape[1:]),
            iou=iou.reshape(b, k, *iou.shape[1:]),
        )
