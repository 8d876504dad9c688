"""SAM-2's prompt encoder: SAM's, but that a box too is followed by a token that is not a point.

Reference: facebookresearch/sam2 at 2b90b9f, `modeling/sam/prompt_encoder.py` and
`sam2_image_predictor.py` (`_predict`), which gives a box as two points with labels of their own;
hustvl/EVF-SAM at 9935dc5 for the text token.

Differences: those of SAM's.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.models.sam import prompt_encoder as sam_prompt_encoder


class PromptEncoder(sam_prompt_encoder.PromptEncoder):
    """Prompts to sparse tokens and a dense map."""

    def encode_boxes(self, boxes: Float[Array, "b k 4"]) -> Float[Array, "b k 3 c"]:
        """Encodes the two corners of each box, and what stands for no more points."""
        corners = super().encode_boxes(boxes)
        b, k, _, channels = corners.shape
        end = jnp.broadcast_to(self.not_a_point_embed.astype(jnp.float32), (b, k, 1, channels))
        return jnp.concatenate([corners, end], axis=2)


def token_valid(prompts: Prompts) -> Bool[Array, "b k s"] | None:
    """Which sparse tokens count, by `Prompts.token_valid`: the one after a box as the box does."""
    valid = prompts.token_valid
    if valid is None or prompts.boxes is None:
        return valid
    corners = 0 if prompts.points is None else prompts.points.shape[2]
    end = corners + 2
    return jnp.concatenate(
        [valid[..., :end], valid[..., corners : corners + 1], valid[..., end:]], axis=-1
    )
