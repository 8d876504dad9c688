"""A run's directory, and where its numbers go: progress, `metrics.jsonl`, TensorBoard events."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorboardX
from jaxtyping import Int32, UInt8

from evf_sam_jax.errors import UserError


def make_workdir(workdir: Path, config: Any) -> None:
    """Makes a run's directory, with the values of its config (a dataclass) in `config.json`.

    Raises:
      UserError: it holds something already, or cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in workdir.iterdir())
        if found:
            what = "another run" if "config.json" in found else f"{found[0]!r}"
            raise UserError(f"--workdir {workdir}: expected a new or empty directory, found {what}")
        text = json.dumps(dataclasses.asdict(config), indent=2)
        (workdir / "config.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


class RunLog:
    """Writes every number twice: to `metrics.jsonl`, a line a step, and as TensorBoard events."""

    def __init__(self, workdir: Path, progress: TextIO | None = None):
        self._workdir = workdir
        self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir), write_to_disk=True)
        self._progress = sys.stdout if progress is None else progress

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._events.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers under names such as "referring/val_ciou"."""
        record = {"step": step, "time": round(time.time(), 3)}
        self._file.write(json.dumps({**record, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def skipped(self, record: Mapping[str, Any]) -> None:
        """Writes a line about an example that could not be read."""
        with open(self._workdir / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a picture as an event."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def line(self, text: str) -> None:
        """Prints a line of progress."""
        print(text, file=self._progress, flush=True)


class SkippedLog:
    """Names examples that could not be read in `skipped.jsonl`, and stops at too many."""

    def __init__(self, log: RunLog, stage: str, describe: Callable[[int], str], max_skipped: int):
        self._log, self._stage, self._describe = log, stage, describe
        self._max, self._count = max_skipped, 0
        self._held_out: set[str] = set()

    def add(self, step: int, skipped_id: Int32[np.ndarray, " b"]) -> None:
        """Takes the `Batch.skipped_id` of a step.

        Raises:
          UserError: more than `max_skipped` examples have been replaced in this stage.
        """
        for index in skipped_id[skipped_id >= 0].tolist():
            self._count += 1
            name = self._describe(index)
            self._log.skipped({"stage": self._stage, "step": step, "example": name})
            if self._count > self._max:
                raise UserError(
                    f"{self._stage}, step {step}: expected at most data.max_skipped = {self._max} "
                    f"examples that cannot be read, found more (skipped.jsonl); the last: {name}"
                )

    def add_held_out(self, step: int, name: str) -> None:
        """Names an example that a score on held-out images leaves out, once a stage."""
        if name not in self._held_out:
            self._held_out.add(name)
            example = f"{name}, held out"
            self._log.skipped({"stage": self._stage, "step": step, "example": example})


def check_finite(name: str, step: int, value: float) -> None:
    """Raises UserError if a number that training depends on is not finite."""
    if not math.isfinite(value):
        raise UserError(
            f"{name} at step {step}: expected a finite number, found {value}; the run stops here, "
            "a lower optimizer.learning_rate may keep it finite"
        )


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 1:00:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
