"""What a model is traced for: the kind of device that will run it, which need not be here."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      backend: "cpu", "gpu" or "tpu".
      fused: whether attention's kernels for it may be used.
      capability: of a GPU, as NVIDIA numbers them (9.0: Hopper); 0 for others.
    """

    backend: str
    fused: bool = True
    capability: float = 0.0


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(target: Target) -> Iterator[None]:
    """What is traced within is for `target`; otherwise it is for jax's default device."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """Returns what is traced for."""
    return _target.get() or target_of(_default_device())


def _default_device() -> Any:
    """Where jax puts what is said to be nowhere."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]


def target_of(device: Any) -> Target:
    """Returns what a model has to know of a `jax.Device`, which need not be of this machine."""
    capability = 0.0
    if device.platform == "gpu":
        with contextlib.suppress(AttributeError, ValueError):  # AMD's are called gfx90a and so on
            capability = float(device.compute_capability)
    return Target(device.platform, capability=capability)
