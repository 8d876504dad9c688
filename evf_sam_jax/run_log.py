"""A run's directory, and where its numbers go: progress, `metrics.jsonl`, TensorBoard events."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorboardX
from jaxtyping import UInt8

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

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a picture as an event."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def line(self, text: str) -> None:
        """Prints a line of progress."""
        print(text, file=self._progress, flush=True)


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
