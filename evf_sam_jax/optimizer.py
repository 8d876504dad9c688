"""AdamW with a warm-up, a decay, global-norm clipping, and rules over '/'-paths.

Reference: the original's training script was never released. hustvl/EVF-SAM descends from LISA,
whose `train_ds.py` gives the defaults below; its schedule is DeepSpeed's `WarmupDecayLR`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from evf_sam_jax.errors import UserError
from evf_sam_jax.param_rules import Rules, map_rules

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      learning_rate: its peak.
      schedule: after the warm-up: "linear" to 0 as in DeepSpeed's WarmupDecayLR, "cosine" to 0, or
        "constant".
      warmup_steps: steps over which the rate rises from 0.
      weight_decay: decoupled, multiplied by the learning rate.
      clip_norm: largest global norm of the gradients; None: as they come.
      rate_rules: (regex, factor on the learning rate) over trainable parameters.
      decay_rules: (regex, whether weight decay applies) over trainable parameters.
    """

    learning_rate: float
    schedule: str = "linear"
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    rate_rules: Rules[float] = ((".*", 1.0),)
    decay_rules: Rules[bool] = ((".*", True),)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"optimizer.schedule: expected one of {', '.join(SCHEDULES)}, "
                f"found {self.schedule!r}"
            )
        for name in ("learning_rate", "warmup_steps", "weight_decay", "epsilon"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value >= 0):
                raise UserError(f"optimizer.{name}: expected 0 or more, found {value!r}")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate of the update that ends this step, the first being step 0.

    "linear" is DeepSpeed's WarmupDecayLR as DeepSpeed steps it today: its counter k starts at 0
    after the first update and the rate is 0 before, so that steps 0 and 1 both have rate 0, and
    step i has that of k = i - 1: k / W in the warm-up, then (T - k) / (T - W). "cosine" and
    "constant" have no such past: their warm-up gives step i the share (i + 1) / W.
    """
    warmup, peak = config.warmup_steps, config.learning_rate

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        if config.schedule == "linear":
            k = jnp.maximum(step - 1.0, 0.0)
            decayed = jnp.maximum(total_steps - k, 0.0) / max(1, total_steps - warmup)
            return peak * jnp.where(k < warmup, k / max(1, warmup), decayed)
        progress = jnp.clip((step + 1.0 - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        share = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if config.schedule == "cosine" else 1.0
        return peak * jnp.minimum((step + 1.0) / max(1, warmup), 1.0) * share

    return rate


def make_optimizer(
    config: OptimizerConfig, total_steps: int, trainable: dict[str, Any]
) -> optax.GradientTransformation:
    """Returns the optimizer of the trainable parameters (arrays or their shapes).

    Raises:
      UserError: a rule covers no parameter, or a parameter has none.
    """
    rates = map_rules(lambda rate, _: rate, config.rate_rules, trainable, "optimizer.rate_rules")
    decays = map_rules(
        lambda decays, _: decays, config.decay_rules, trainable, "optimizer.decay_rules"
    )

    def scale_by_rules(updates, state, params=None):
        del params
        return jax.tree.map(lambda rate, update: rate * update, rates, updates), state

    return optax.chain(
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale_by_rules),
    )
