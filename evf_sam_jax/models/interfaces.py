"""What every promptable segmenter takes and returns, whatever its family.

Everything is [b, k, ...]: b images with k prompts (phrases) each. Only encoders repeat images.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """What a segmenter keeps of an image: computed once, decoded with any number of prompts.

    Attributes:
      embedding: features at the coarsest scale, g = image size / patch size.
      high_res: finer features that some decoders add while upscaling (SAM-2), finest first.
    """

    # *b: a map over images sees them one at a time, without the axis.
    embedding: Float[Array, "*b g g c"]
    high_res: tuple[Float[Array, "*b _ _ _"], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of b images with k prompts each; a prompt combines whatever is not None.

    Attributes:
      text: projected prompt features, one or more tokens a prompt.
      points: (x, y) in pixels of the segmenter's frame (the resized image), with `point_labels`.
      point_labels: 1 inside the object, 0 outside, -1 not a point.
      boxes: (x0, y0, x1, y1) in pixels of the segmenter's frame.
      mask: logits of an earlier mask, at the decoder's low resolution.
      token_valid: false at tokens that fill up a prompt and shall be as if they were not there;
        s counts points (and one more where no box follows), two corners a box, then text.
    """

    text: Float[Array, "b k t c"] | None = None
    points: Float[Array, "b k n 2"] | None = None
    point_labels: Int[Array, "b k n"] | None = None
    boxes: Float[Array, "b k 4"] | None = None
    mask: Float[Array, "b k l l"] | None = None
    token_valid: Bool[Array, "b k s"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """Masks of each prompt: m = 1, or 3 alternatives where several masks were asked for.

    Attributes:
      low_res_logits: positive inside; l = 4 g.
      iou: the decoder's own estimate of each mask's IoU.
    """

    low_res_logits: Float[Array, "b k m l l"]
    iou: Float[Array, "b k m"]
