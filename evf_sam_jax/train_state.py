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
      trainable: differentiated and updated, float32.
      frozen: constants of the step.
      opt_state: of `trainable`.
    """

    step: Any
    trainable: Params
    frozen: Params
    opt_state: Any

    @property
    def params(self) -> Params:
        """The whole model."""
        return merge(self.trainable, self.frozen)


def split_params(params: Params, trainable: Rules[bool]) -> tuple[Params, Params]:
    """Returns (trainable, frozen), as the rules say. Raises UserError where none applies."""
    return split(trainable, params, "trainable")


def create_state(
    trainable: Params, frozen: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=optimizer.init(trainable),
    )
