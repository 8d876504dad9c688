"""The numbers of training on their way from the device to the log."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from evf_sam_jax.errors import UserError
from evf_sam_jax.metrics import IouSums, StepMetrics
from evf_sam_jax.run_log import RunLog, clock

# Steps the host may be ahead of the device: it prepares the next one while the last one runs, and
# reads no number that is not there yet.
STEPS_AHEAD = 2


class NotFinite(UserError):
    """The loss or the norm of the gradients of a step is no number.

    Attributes:
      step: the one, counted from 1.
    """

    def __init__(self, name: str, step: int, value: float):
        super().__init__(
            f"{name} at step {step}: expected a finite number, found {value}; the run stops here, "
            "a lower optimizer.learning_rate may keep it finite"
        )
        self.step = step


class Progress:
    """Means over the steps since the last line of progress, and the time that is left."""

    def __init__(
        self,
        log: RunLog,
        stage: str,
        *,
        start: int,
        steps: int,
        batch_size: int,
        every: int,
        step_flops: int | None = None,
        peak_flops: float | None = None,
    ):
        """Args:
        start: steps that had been made before.
        every: steps between two lines.
        step_flops: model FLOPs of a step, all devices together.
        peak_flops: of all devices together, a second; None: unknown, and so is utilisation.
        """
        self._log, self._stage, self._steps, self._every = log, stage, steps, every
        self._batch_size = batch_size
        self._share = None
        if step_flops is not None and peak_flops is not None:
            self._share = step_flops / peak_flops
        self._step = self._first = start
        self._begin: float | None = None  # after the first step, which compiles
        self._excluded = 0.0
        self._pending: list[StepMetrics] = []
        self._recent: list[dict[str, float]] = []

    def add(self, metrics: StepMetrics) -> None:
        """Takes the numbers of the next step, which may not have been computed yet.

        Raises:
          NotFinite: one of them, or of those before, is not finite.
        """
        self._pending.append(metrics)
        # The first is waited for: the clock starts when it is done.
        if len(self._pending) > STEPS_AHEAD or self._begin is None:
            self._read(self._pending.pop(0))

    def drain(self) -> None:
        """Waits for all steps. Raises NotFinite as `add` does."""
        while self._pending:
            self._read(self._pending.pop(0))

    def held_out(self, step: int, sums: IouSums) -> None:
        """Writes what held-out images say."""
        name = self._stage
        self._log.scalars(step, {f"{name}/val_ciou": sums.ciou, f"{name}/val_giou": sums.giou})
        self._log.line(
            f"{name} {step}/{self._steps}: held out "
            f"cIoU {sums.ciou:.3f}, gIoU {sums.giou:.3f} ({sums.masks} phrases)"
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time counts as no training."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._excluded += time.monotonic() - begin

    def _read(self, metrics: StepMetrics) -> None:
        self._step += 1
        values = {name: float(value) for name, value in jax.device_get(vars(metrics)).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise NotFinite(f"{self._stage}/{name}", self._step, values[name])
        self._recent.append(values)
        if self._begin is None:
            self._begin, self._excluded = time.monotonic(), 0.0
        if self._step % self._every == 0 or self._step == self._steps:
            self._write()

    def _write(self) -> None:
        recent, self._recent = self._recent, []
        means = {name: float(np.mean([values[name] for values in recent])) for name in recent[0]}
        ciou = means.pop("intersection") / max(means.pop("union"), 1.0)
        assert self._begin is not None
        seconds = time.monotonic() - self._begin - self._excluded
        measured = self._step - self._first - 1
        per_step = seconds / measured if measured else 0.0
        values = {**means, "ciou": ciou}
        line = (
            f"{self._stage} {self._step}/{self._steps}: loss {means['loss']:.4f}, cIoU {ciou:.3f}"
        )
        if per_step:
            values["images_per_second"] = self._batch_size / per_step
            line += f", {values['images_per_second']:.0f} images/s"
            if self._share is not None:
                values["mfu"] = self._share / per_step
                line += f", MFU {values['mfu']:.1%}"
        self._log.scalars(self._step, {f"{self._stage}/{key}": v for key, v in values.items()})
        self._log.line(f"{line}, {clock(per_step * (self._steps - self._step))} left")
