"""SAM-2 on images as a promptable segmenter: encode once, decode any number of prompts.

Reference: facebookresearch/sam2 at 2b90b9f, `sam2_image_predictor.py`; with text, hustvl/EVF-SAM
at 9935dc5, `model/evf_sam2.py` (current profile), and before its commit 9d00853 (legacy).

Differences: the two halves are separate methods; masks stay at the decoder's resolution, since
`mask_geometry` resamples them, and are not clamped; prompts and decoder are float32 whatever the
image encoder is. What belongs to videos (memory) is not here.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from evf_sam_jax.models.frame import normalize_and_stretch
from evf_sam_jax.models.interfaces import ImageFeatures, MaskPrediction, Prompts
from evf_sam_jax.models.layers import gathering, split_by_batch
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.sam2.image_encoder import ImageEncoder
from evf_sam_jax.models.sam2.mask_decoder import MaskDecoder
from evf_sam_jax.models.sam2.prompt_encoder import PromptEncoder, token_valid


class Sam2(nn.Module):
    """The promptable segmenter; `profile` is "current" or "legacy"."""

    config: Sam2Config
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
        """Encodes images that fill the frame or, in the legacy profile, lie in it top-left.

        The finer levels are those of the pyramid, as far as the original's image encoder goes.

        Args:
          size: height and width of the content; only the legacy profile looks at it.
        """
        return self.image_encoder(normalize_and_stretch(image, size, self.profile))

    def finish(self, features: ImageFeatures) -> ImageFeatures:
        """Brings finer levels into the decoder's channels, by what the original's decoder has."""
        return self.image_encoder.finish(features)

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
        """Decodes k prompts of each of b images.

        Args:
          multimask: the three alternatives of each prompt.
          train: one mask a prompt is the decoder's single one, however unstable; with text in the
            current profile it is the best of three, as ever.
        """
        sparse, dense = self.prompt_encoder(prompts)
        b, k = sparse.shape[:2]
        image = features.embedding.astype(jnp.float32)[:, None] + dense
        valid = token_valid(prompts)
        logits, iou, object_score = self.mask_decoder(
            split_by_batch(image.reshape(b * k, *image.shape[2:])),
            self.dense_positions() if positions is None else positions,
            features.high_res,
            split_by_batch(sparse.reshape(b * k, *sparse.shape[2:])),
            self._choice(prompts, multimask, train),
            None if valid is None else valid.reshape(b * k, valid.shape[-1]),
        )
        return MaskPrediction(
            low_res_logits=logits.reshape(b, k, *logits.shape[1:]),
            iou=iou.reshape(b, k, *iou.shape[1:]),
            object_score=object_score.reshape(b, k),
        )

    def _choice(self, prompts: Prompts, multimask: bool, train: bool) -> str:
        """Which masks the decoder returns, one of `CHOICES`."""
        if multimask:
            return "several"
        if prompts.text is not None and self.profile == "current":
            return "best"
        return "single" if train else "stable"
