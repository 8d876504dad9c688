"""Both losses are the original's formulas, pixel by pixel, and ignore what is not valid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evf_sam_jax.losses import bce_and_dice, mask_losses

B, K, H, W = 3, 4, 7, 5


def example(seed: int = 0, scale: float = 3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (B, K, H, W)).astype(np.float32)
    target = rng.integers(0, 2, (B, K, H, W)).astype(np.uint8)
    mask_valid = rng.random((B, H, W)) < 0.7
    phrase_valid = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    return tuple(map(jnp.asarray, (logits, target, mask_valid, phrase_valid)))


def counted_by_hand(logits, target, mask_valid, phrase_valid) -> tuple[float, float]:
    """Phrase by phrase and pixel by pixel, in float64."""
    logits, target, mask_valid, phrase_valid = map(
        np.asarray, (logits, target, mask_valid, phrase_valid)
    )
    entropies, dices = [], []
    for b, k in zip(*np.nonzero(phrase_valid), strict=True):
        pixels = np.nonzero(mask_valid[b])
        z, t = np.float64(logits[b, k][pixels]), np.float64(target[b, k][pixels])
        p = 1 / (1 + np.exp(-z))
        entropies.append(np.mean(-t * np.log(p) - (1 - t) * np.log(1 - p)))
        numerator, denominator = 2 * sum(p / 1000 * t), sum(p / 1000) + sum(t / 1000)
        dices.append(1 - (numerator + 1e-6) / (denominator + 1e-6))
    return float(np.mean(entropies)), float(np.mean(dices))


def test_losses_are_those_counted_by_hand():
    arrays = example()
    bce, dice = bce_and_dice(*arrays)
    np.testing.assert_allclose((bce, dice), counted_by_hand(*arrays), rtol=1e-6)


def test_what_is_not_valid_does_not_matter():
    logits, target, mask_valid, phrase_valid = example()
    counted = mask_valid[:, None] & phrase_valid[..., None, None]
    changed, flipped = jnp.where(counted, logits, 1e6), jnp.where(counted, target, 1 - target)

    def losses(logits, target):
        return jnp.stack(bce_and_dice(logits, target, mask_valid, phrase_valid))

    np.testing.assert_array_equal(losses(logits, target), losses(changed, flipped))
    gradient = jax.grad(lambda z: losses(z, target).sum())(logits)
    assert (np.asarray(gradient)[~counted] == 0).all()
    assert (np.asarray(gradient)[counted] != 0).all()


def test_extreme_logits_keep_loss_and_gradient_finite():
    logits, target, mask_valid, phrase_valid = example(scale=1e4)

    def loss(z):
        return sum(bce_and_dice(z, target, mask_valid, phrase_valid))

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_empty_target_costs_what_the_epsilons_say():
    logits = jnp.full((1, 1, 4, 4), -1.0)
    _, dice = mask_losses(logits, jnp.zeros((1, 1, 4, 4), jnp.uint8), jnp.ones((1, 4, 4), bool))
    total = 16 / (1 + np.e) / 1000
    np.testing.assert_allclose(dice, 1 - 1e-6 / (total + 1e-6), rtol=1e-6)


def test_a_batch_without_phrases_has_no_loss():
    logits, target, mask_valid, _ = example()
    losses = bce_and_dice(logits, target, mask_valid, jnp.zeros((B, K), bool))
    np.testing.assert_array_equal(losses, (0.0, 0.0))


@pytest.mark.torch
def test_losses_are_those_of_torch():
    import torch
    import torch.nn.functional as F

    logits, target, _, _ = example()
    z, t = (
        torch.tensor(np.asarray(logits)).flatten(0, 1),
        torch.tensor(np.asarray(target)).flatten(0, 1).float(),
    )
    masks = len(z)
    entropy = F.binary_cross_entropy_with_logits(z, t, reduction="none").flatten(1).mean(1)
    p, t = z.sigmoid().flatten(1), t.flatten(1)
    numerator, denominator = 2 * (p / 1000 * t).sum(-1), (p / 1000).sum(-1) + (t / 1000).sum(-1)
    dice = 1 - (numerator + 1e-6) / (denominator + 1e-6)
    expected = [float(x.sum() / (masks + 1e-8)) for x in (entropy, dice)]
    found = bce_and_dice(logits, target, jnp.ones((B, H, W), bool), jnp.ones((B, K), bool))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
