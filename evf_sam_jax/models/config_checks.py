"""What the values of a model's configuration must satisfy, each said in one sentence."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evf_sam_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
# Of a layer, the backward pass recomputes nothing (False), all but its input (True), or all but the
# results of its products with weights ("dots").
REMAT = (False, True, "dots")


def check_values(config: Any, where: str) -> None:
    """Raises UserError unless every integer is positive and the dtype is one of `DTYPES`.

    Args:
      config: a frozen dataclass with the fields of a tower.
      where: what an error calls it, such as "encoder".
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and not (isinstance(value, int) and value > 0):
            raise UserError(f"{where}.{field.name}: expected a positive integer, found {value!r}")
    check_choice(f"{where}.dtype", config.dtype, DTYPES)
    check_choice(f"{where}.remat", config.remat, REMAT)


def check_choice(where: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{where}: expected {' or '.join(map(str, choices))}, found {value!r}")


def check_multiple(config: Any, where: str, name: str, divisor_name: str) -> None:
    """Raises UserError unless one field is a multiple of another."""
    value, divisor = getattr(config, name), getattr(config, divisor_name)
    if value % divisor:
        raise UserError(
            f"{where}.{name}: expected a multiple of {divisor_name} {divisor}, found {value}"
        )


def check_fusion_and_readout(
    config: Any, readouts: Mapping[str, tuple[str, ...]], early_layers: int | None = None
) -> None:
    """Raises UserError unless an encoder knows its fusion, and what is read out is there with it.

    Args:
      config: of an encoder, with `fusion`, `readout` and `concat`.
      readouts: of each fusion that the encoder can do.
      early_layers: in how many layers image and text meet; None: as the fusion says. In none of
        them, what can be read out is that of late fusion.
    """
    check_choice("encoder.fusion", config.fusion, tuple(readouts))
    met, where = config.fusion, f"encoder.readout with {config.fusion} fusion"
    if met == "early" and early_layers == 0:
        met, where = "late", f"{where} in no layer"
    check_choice(where, config.readout, readouts[met])
    check_choice("encoder.concat", config.concat, ("channels", "tokens"))


def check_early_layers(early_layers: Any, fusion: str, layers: int) -> None:
    """Raises UserError unless it is None, or with early fusion a number of layers."""
    if early_layers is None:
        return
    if fusion != "early":
        raise UserError(
            f"encoder.early_layers with {fusion} fusion: expected None, found {early_layers!r}"
        )
    if isinstance(early_layers, bool) or early_layers not in range(layers + 1):
        raise UserError(
            f"encoder.early_layers: expected None or a number from 0 to {layers}, "
            f"found {early_layers!r}"
        )
