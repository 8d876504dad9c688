"""A run's directory, and where its numbers go: progress, `metrics.jsonl`, TensorBoard events."""

import dataclasses
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32, UInt8

from data_pipelines.record_files import is_remote
from evf_sam_jax.errors import UserError

_CONFIG, _DATA = "config.json", "data.json"
_PARTIAL = ".partial"
_METRICS, _SKIPPED = "metrics.jsonl", "skipped.jsonl"
_COPY_SECONDS = 60


def run_directory(path: epath.PathLike) -> epath.Path:
    """The path of a run's directory: in a bucket, or absolute, as Orbax wants it."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def make_workdir(
    workdir: epath.PathLike, config: Any, data: Mapping[str, str] | None = None
) -> None:
    """Makes a run's directory, with the values of its config (a dataclass) in `config.json`.

    Args:
      data: place of each data set in the config -> fingerprint, for `resume_workdir`.

    Raises:
      UserError: it holds something already, or cannot be made.
    """
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = run_files(workdir)
        if found:
            what = "another run" if _CONFIG in found else f"{found[0]!r}"
            raise UserError(f"--workdir {workdir}: expected a new or empty directory, found {what}")
        (workdir / _DATA).write_text(json.dumps(data or {}, indent=2) + "\n", encoding="utf-8")
        _write_whole(workdir / _CONFIG, dataclasses.asdict(config))  # the last: it makes it a run
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


def _write_whole(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def run_files(workdir: epath.PathLike) -> list[str]:
    """What a directory holds, but for what a kill leaves before a run has begun in it."""
    found = sorted(path.name for path in epath.Path(workdir).iterdir())
    return [] if set(found) <= {_DATA, _CONFIG + _PARTIAL} else found


# What may change between two parts of a run: it changes neither the numbers nor their order.
FREE = (
    "log_every",
    "profile_every",
    "checkpoints",
    "evaluation.batch_size",
    "evaluation.every",
    "evaluation.panel_images",
    "data.workers",
    "data.threads",
    "feature_cache",
)
# Likewise up to rounding; it is said.
RESHAPING = ("mesh",)
# Of the data, which images have features. Where some were added, examples that were left out are
# trained on; that is said, too.
FEATURE_IMAGES = "data.features.images"
# What runs had before there was a key for it.
ADDED = {"data.features": "", "model.encoder.normalisation": "openai"}


def resume_workdir(workdir: epath.PathLike, config: Any, data: Mapping[str, str]) -> list[str]:
    """Checks that the run in a directory is one of this config and this data.

    Args:
      data: place of each data set in the config -> fingerprint of its annotations.

    Returns:
      What has changed of its mesh and of what has features, a sentence each.

    Raises:
      UserError: it holds something else, or another run; the first difference is named.
    """
    workdir = epath.Path(workdir)
    if not (workdir / _CONFIG).exists():
        found = sorted(path.name for path in workdir.iterdir())
        raise UserError(
            f"--workdir {workdir}: expected a new or empty directory, or that of a run, "
            f"found {found[0]!r}"
        )
    try:
        before = json.loads((workdir / _CONFIG).read_text())
        made_of = json.loads((workdir / _DATA).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir {workdir}: expected a run, found it damaged: {error}") from None
    if not isinstance(made_of, dict):
        raise UserError(f"--workdir {workdir}: expected a run, found it damaged: {_DATA}")
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if not isinstance(before, dict) or "stages" not in before:
        raise UserError(
            f"--workdir {workdir}: expected a training run, found a run of another kind"
        )
    said = []
    for key, old, new in _differences(before, now):
        if old is None and key in ADDED and new == ADDED[key]:
            continue
        if key.startswith(RESHAPING):
            said.append(f"another mesh: {key}: {old!r} before, {new!r} now")
        elif not key.startswith(FREE):
            raise UserError(
                f"--workdir {workdir}: expected the run that is there, with {key} = {old!r}, "
                f"found {new!r}; another run needs another directory"
            )
    for name in sorted({*made_of, *data}):
        if made_of.get(name) == data.get(name):
            continue
        if name == FEATURE_IMAGES and name in data:
            if name in made_of:  # runs of earlier versions do not know
                said.append("features of other images than before")
        else:
            raise UserError(
                f"--workdir {workdir}: expected the data that the run began with, found other in "
                f"{name}"
            )
    if made_of != data:  # what features there are now; a run that is refused stays as it is
        try:
            _write_whole(workdir / _DATA, data)
        except OSError as error:
            raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None
    return said


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of each leaf of two JSON values that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            inner = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{key}.{i}")
    elif before != now:
        yield key, before, now


class RunLog:
    """Writes every number twice: to `metrics.jsonl`, a line a step, and as TensorBoard events.

    Of several processes only the first writes. Files in a bucket cannot be appended to, so there
    they are copies of local ones, made once a minute and at the end.
    """

    def __init__(
        self, workdir: epath.PathLike, progress: io.TextIOBase | None = None, silent: bool = False
    ):
        workdir = epath.Path(workdir)
        self._progress = sys.stdout if progress is None else progress
        self._file = self._events = None
        self._bucket = self._scratch = None
        self._copied = time.monotonic()
        if silent:
            return
        self._local = Path(workdir)
        if is_remote(workdir):
            self._bucket, self._scratch = workdir, tempfile.TemporaryDirectory()
            self._local = Path(self._scratch.name)
            for name in (_METRICS, _SKIPPED):
                if (workdir / name).exists():  # a run that goes on
                    (workdir / name).copy(self._local / name)
        self._file = open(self._local / _METRICS, "a", encoding="utf-8")
        # Not above: it imports torch where that is installed, for two seconds before anything is
        # said about a command's mistakes.
        import tensorboardX

        self._events = tensorboardX.SummaryWriter(str(self._local), write_to_disk=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
            self._copy()
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that does."""
        return self._file is not None

    def _copy(self) -> None:
        """Brings a bucket up to date."""
        if self._bucket is not None:
            for path in self._local.iterdir():
                epath.Path(path).copy(self._bucket / path.name, overwrite=True)
            self._copied = time.monotonic()

    def forget_after(self, stages: Sequence[str], step: int) -> None:
        """Drops from `metrics.jsonl` and `skipped.jsonl` what a run will do again.

        Args:
          stages: the one that goes on, then those after it.
          step: of the first, up to which its lines stay.
        """
        if self._file is None:
            return

        def again(stage: str | None, record: Mapping[str, Any]) -> bool:
            return stage in stages[1:] or (stage == stages[0] and record["step"] > step)

        def stage_of_numbers(record: Mapping[str, Any]) -> str | None:
            return next((key.split("/")[0] for key in record if "/" in key), None)

        self._file.flush()
        self._rewrite(_METRICS, lambda record: not again(stage_of_numbers(record), record))
        self._file.close()
        self._file = open(self._local / _METRICS, "a", encoding="utf-8")
        self._rewrite(_SKIPPED, lambda record: not again(record["stage"], record))

    def _rewrite(self, name: str, kept: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drops the lines of a file that are not kept, whole or not at all: a kill loses none."""
        lines = [json.dumps(record) + "\n" for record in self._records(name) if kept(record)]
        if lines or (self._local / name).exists():
            partial = self._local / (name + _PARTIAL)
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(self._local / name)

    def _records(self, name: str) -> Iterator[dict[str, Any]]:
        try:
            text = (self._local / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the line that a kill cut off
                continue

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers under names such as "referring/val_ciou"."""
        if self._file is None or self._events is None:
            return
        record = {"step": step, "time": round(time.time(), 3)}
        self._file.write(json.dumps({**record, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if time.monotonic() - self._copied > _COPY_SECONDS:
            self._copy()

    def skipped(self, record: Mapping[str, Any]) -> None:
        """Writes a line about an example that could not be read."""
        if self._file is None:
            return
        with open(self._local / _SKIPPED, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def skipped_before(self, stage: str) -> int:
        """How many examples of a stage have been replaced, as far as this process has written."""
        if self._file is None:
            return 0
        records = self._records(_SKIPPED)
        return sum(one["stage"] == stage and not one.get("held_out") for one in records)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a picture as an event."""
        if self._events is not None:
            self._events.add_image(name, image, step, dataformats="HWC")

    def line(self, text: str) -> None:
        """Prints a line of progress."""
        if self._file is not None:
            print(text, file=self._progress, flush=True)


class SkippedLog:
    """Names examples that could not be read in `skipped.jsonl`, and stops at too many."""

    def __init__(
        self,
        log: RunLog,
        stage: str,
        describe: Callable[[int], str],
        why: Callable[[int], str],
        max_skipped: int,
    ):
        """
        Args:
          describe: of an example, its name.
          why: of one that could not be read, the reason; "" if it can be by now.
        """
        self._log, self._stage, self._describe, self._why = log, stage, describe, why
        # A run that goes on has skipped some already.
        self._max, self._count = max_skipped, log.skipped_before(stage)
        self._held_out: set[str] = set()

    def add(self, step: int, skipped_id: Int32[np.ndarray, " b"]) -> None:
        """Takes the `Batch.skipped_id` of a step.

        Raises:
          UserError: more than `max_skipped` examples have been replaced in this stage.
        """
        for index in skipped_id[skipped_id >= 0].tolist():
            self._count += 1
            name, reason = self._describe(index), ""
            if self._log.writes or self._count > self._max:
                reason = self._why(index)
            record = {"stage": self._stage, "step": step, "example": name, "reason": reason}
            self._log.skipped(record)
            if self._count > self._max:
                raise UserError(
                    f"{self._stage}, step {step}: expected at most data.max_skipped = {self._max} "
                    f"examples that cannot be read, found more (skipped.jsonl); the last: {name}"
                    + (f": {reason}" if reason else "")
                )

    def add_held_out(self, step: int, name: str) -> None:
        """Names an example that a score on held-out images leaves out, once a stage."""
        if name not in self._held_out:
            self._held_out.add(name)
            record = {"stage": self._stage, "step": step, "example": name, "held_out": True}
            self._log.skipped(record)


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 1:00:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
