"""Schedules step by step, and one update of AdamW against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


def rates(schedule: str, warmup: int, steps: int) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
    rate = learning_rate_schedule(config, steps)
    return [float(rate(step)) for step in range(steps)]


def test_linear_is_deepspeeds_warmup_decay_lr():
    # k = -1 (rate 0), 0, 1, ...: k / 4, and from k = 4 on (10 - k) / 6.
    expected = [0, 0, 1 / 4, 2 / 4, 3 / 4, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6]
    np.testing.assert_allclose(rates("linear", 4, 10), expected, rtol=1e-6)


def test_cosine_rises_and_falls_to_zero():
    expected = [1 / 2, 1, *(0.5 + 0.5 * np.cos(np.pi * np.arange(1, 5) / 4))]
    np.testing.assert_allclose(rates("cosine", 2, 6), expected, atol=1e-6)


def test_constant_stays_after_the_warmup():
    np.testing.assert_allclose(rates("constant", 4, 6), [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rates("constant", 0, 3), [1, 1, 1])


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="optimizer.schedule: .* found 'square'"):
        OptimizerConfig(learning_rate=1.0, schedule="square")


def test_updates_are_adamw_of_clipped_gradients():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.5,
        clip_norm=1.0,
        rate_rules=(("slow/.*", 0.1), (".*", 1.0)),
        decay_rules=((".*/bias", False), (".*", True)),
    )
    params = {
        "fast": {"kernel": np.array([1.0, -2.0]), "bias": np.array([0.5])},
        "slow": {"kernel": np.array([3.0])},
    }
    gradients = [
        {"fast": {"kernel": a, "bias": b}, "slow": {"kernel": c}}
        for a, b, c in (
            (np.array([3.0, 0.0]), np.array([4.0]), np.array([0.0])),  # norm 5: clipped
            (np.array([0.1, -0.2]), np.array([0.1]), np.array([0.3])),
        )
    ]
    optimizer = make_optimizer(config, 10, params)
    state = optimizer.init(jnp_tree(params))
    moments: dict = {}
    for step, gradient in enumerate(gradients, start=1):
        updates, state = optimizer.update(jnp_tree(gradient), state, jnp_tree(params))
        leaves = {(m, n): g for m, tree in gradient.items() for n, g in tree.items()}
        norm = np.sqrt(sum((g**2).sum() for g in leaves.values()))
        for (module, name), g in leaves.items():
            g = g / max(norm, 1.0)
            m, v = moments.get((module, name), (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            moments[module, name] = m, v
            direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
            decay = 0.0 if name == "bias" else 0.5 * params[module][name]
            expected = -0.1 * (0.1 if module == "slow" else 1.0) * (direction + decay)
            np.testing.assert_allclose(updates[module][name], expected, rtol=1e-5, atol=1e-8)


def test_a_rule_for_no_parameter_is_named():
    config = OptimizerConfig(learning_rate=1.0, rate_rules=(("decoder/.*", 1.0), (".*", 1.0)))
    with pytest.raises(UserError, match="optimizer.rate_rules: the rule 'decoder/.\\*'"):
        make_optimizer(config, 10, {"encoder": {"kernel": np.zeros(1)}})


def jnp_tree(tree: dict) -> dict:
    return {m: {n: jnp.asarray(x, jnp.float32) for n, x in t.items()} for m, t in tree.items()}
