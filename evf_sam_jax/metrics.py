"""cIoU and gIoU from exact pixel counts, and the running means of training.

Reference: hustvl/EVF-SAM at 9935dc5, `eval.py` and `utils/utils.py:16-92`.

Differences:
  - Sums are integers, so no pixel is lost in a large set; the original sums in float32.
  - gIoU divides by the number of phrases, without the 1e-5 that the original adds to it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

EPSILON = 1e-10


def overlap_counts(
    logits: Float[Array, "b k h w"],
    target: UInt8[Array, "b k h w"],
    mask_valid: Bool[Array, "b h w"],
    phrase_valid: Bool[Array, "b k"],
) -> tuple[Int32[Array, "b k"], Int32[Array, "b k"]]:
    """Pixels in the intersection and in the union of each mask; 0 where there is no phrase.

    A pixel is predicted where its logit is above 0. A target above 1 (overlapping parts, summed)
    is no part of the target's area: predicting it only widens the union, as in the original.
    """
    counted = mask_valid[:, None] & phrase_valid[:, :, None, None]
    predicted = (logits > 0) & counted
    inside = (target == 1) & counted
    intersection = (predicted & inside).sum((-2, -1), dtype=jnp.int32)
    union = (predicted | inside).sum((-2, -1), dtype=jnp.int32)
    return intersection, union


@dataclasses.dataclass(frozen=True)
class IouSums:
    """What cIoU and gIoU of a set of masks are computed from; sums of parts add up.

    Attributes:
      intersection: pixels, over all masks.
      union: pixels, over all masks.
      iou: sum of each mask's own IoU.
      masks: their number.
    """

    intersection: int = 0
    union: int = 0
    iou: float = 0.0
    masks: int = 0

    @classmethod
    def count(
        cls,
        intersection: Int[np.ndarray, "b k"],
        union: Int[np.ndarray, "b k"],
        counted: Bool[np.ndarray, "b k"],
    ) -> "IouSums":
        """Sums of the masks that `counted` names. An empty mask of an empty target has IoU 1."""
        intersection = np.asarray(intersection, np.int64)[counted]
        union = np.asarray(union, np.int64)[counted]
        iou = intersection / (union + EPSILON) + (union == 0)
        return cls(int(intersection.sum()), int(union.sum()), float(iou.sum()), iou.size)

    def merge(self, other: "IouSums") -> "IouSums":
        """Sums of both sets."""
        return IouSums(
            self.intersection + other.intersection,
            self.union + other.union,
            self.iou + other.iou,
            self.masks + other.masks,
        )

    @property
    def ciou(self) -> float:
        """Cumulative IoU: all intersections over all unions."""
        return self.intersection / (self.union + EPSILON)

    @property
    def giou(self) -> float:
        """Generalised IoU: the mean of the masks' IoUs (0 without any mask)."""
        return self.iou / max(self.masks, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one training step measures.

    Attributes:
      loss: weighted sum of the two losses.
      grad_norm: global norm of the gradients, before clipping.
      update_norm: global norm of what was added to the parameters.
      learning_rate: of this step.
      intersection: pixels, over the batch.
      union: pixels, over the batch.
    """

    loss: Float[Array, ""]
    bce: Float[Array, ""]
    dice: Float[Array, ""]
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    intersection: Int32[Array, ""]
    union: Int32[Array, ""]
