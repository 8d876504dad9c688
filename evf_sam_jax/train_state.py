"""What a training step takes and gives back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from evf_sam_jax.param_rules import Params, Rules, merge, split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters in two trees that share no leaf, so that no gradient is taken of the frozen one.

    Attributes:
      step: updates made so far, an int32 scalar.
      finite: false from the first step on whose loss or gradient is not finite; from then on no
        step changes anything, so that what is left is the state before it.
      trainable: differentiated and updated, float32.
      frozen: constants of the step.
      opt_state: of `trainable`.
      ema: exponential moving average of `trainable`, where one is kept.
    """

    step: Any
    finite: Any
    trainable: Params
    frozen: Params
    opt_state: Any
    ema: Any = None

    @property
    def params(self) -> Params:
        """The whole model, as it is trained."""
        return merge(self.trainable, self.frozen)

    @property
    def averaged_params(self) -> Params:
        """The whole model, with the moving average where one is kept: what a run is judged by."""
        return merge(self.trainable if self.ema is None else self.ema, self.frozen)


def split_params(params: Params, trainable: Rules[bool]) -> tuple[Params, Params]:
    """Returns (trainable, frozen), as the rules say. Raises UserError where none applies."""
    return split(trainable, params, "trainable")


def create_state(
    trainable: Params,
    frozen: Params,
    optimizer: optax.GradientTransformation,
    ema: bool = False,
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        finite=jnp.ones((), bool),
        trainable=trainable,
        frozen=frozen,
        opt_state=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
    )
