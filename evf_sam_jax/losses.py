"""The two mask losses, on logits at the original resolution.

Reference: hustvl/EVF-SAM at 9935dc5, `model/evf_sam.py:11-54, 214-253`.

Differences:
  - Pixels that are ignored, or lie outside the image, count in neither loss.
  - The mean is over the valid phrases of the batch; the original adds 1e-8 to their number.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

# The original divides probabilities and targets by `scale` before it sums them, and adds `eps` to
# both sides of the fraction; together they decide how much an empty target costs.
DICE_SCALE = 1000.0
DICE_EPSILON = 1e-6


def mask_losses(
    logits: Float[Array, "b k h w"],
    target: UInt8[Array, "b k h w"],
    mask_valid: Bool[Array, "b h w"],
) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
    """Binary cross-entropy (mean over an image's valid pixels) and dice loss of each mask.

    Args:
      logits: at the original resolution, top-left on a canvas.
      target: 0 or 1 (more only where overlapping parts are summed).
      mask_valid: false outside the image and at ignored pixels.
    """
    logits = logits.astype(jnp.float32)
    valid = mask_valid[:, None].astype(jnp.float32)
    target = target.astype(jnp.float32) * valid
    pixels = jnp.maximum(valid.sum((-2, -1)), 1.0)
    # log(1 + exp(z)) - z t, in the form that overflows for no z.
    entropy = jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits))) - logits * target
    bce = (entropy * valid).sum((-2, -1)) / pixels

    probability = jax.nn.sigmoid(logits) * valid / DICE_SCALE
    overlap = 2.0 * (probability * target).sum((-2, -1))
    total = probability.sum((-2, -1)) + (target / DICE_SCALE).sum((-2, -1))
    return bce, 1.0 - (overlap + DICE_EPSILON) / (total + DICE_EPSILON)


def bce_and_dice(
    logits: Float[Array, "b k h w"],
    target: UInt8[Array, "b k h w"],
    mask_valid: Bool[Array, "b h w"],
    phrase_valid: Bool[Array, "b k"],
    phrases: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Both losses, averaged over the valid phrases of the batch (0 if there is none).

    Args:
      phrases: what the sum is divided by, where this is a part of a larger batch: the number of
        valid phrases of the whole.
    """
    weight = phrase_valid.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum() if phrases is None else phrases, 1.0)
    bce, dice = mask_losses(logits, target, mask_valid)
    # A padding row may hold anything, so it is left out rather than multiplied by zero.
    bce, dice = (jnp.where(phrase_valid, loss * weight, 0.0).sum() for loss in (bce, dice))
    return bce, dice
