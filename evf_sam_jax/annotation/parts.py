"""Masks that have been made so far, so that a job that was killed goes on where it was.

    OUT.parts/job.json       what the masks are made of, and how
    OUT.parts/masks.jsonl    a line a group of images, as they are finished
    OUT.parts/result.json    in the end, what becomes OUT

Of several lines of a group the last one counts. A line that was cut short is made again, and so is
whatever comes after it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evf_sam_jax.errors import UserError

JOB, MASKS, RESULT = "job.json", "masks.jsonl", "result.json"
_PARTIAL_JOB = "job.json.partial"


@dataclasses.dataclass(frozen=True)
class GroupMasks:
    """The masks of a group of images.

    Attributes:
      group: its number.
      counts: of each box of each of its images, compressed run lengths; "": the mask is empty;
        None: the image could not be read.
      failures: a sentence for each image that could not be read.
    """

    group: int
    counts: tuple[str | None, ...]
    failures: tuple[str, ...] = ()


class Parts:
    """The directory, open for writing; only one job at a time may have it.

    Attributes:
      directory: its path.
      result: a path in it, for a file that will be moved out of it.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]):
        """Makes the directory, or opens one that was left by the same job.

        Args:
          job: what all masks depend on, by the flag that says it.

        Raises:
          UserError: it holds masks of another job, or something else.
          OSError: it cannot be written.
        """
        self.directory = directory
        self.result = directory / RESULT
        self._begin(job)
        self._places: dict[int, int] = {}  # byte at which the line of a group begins
        self._failed: set[int] = set()
        self._file = (directory / MASKS).open("a+b")
        self._recover()

    @property
    def finished(self) -> frozenset[int]:
        """The groups whose images all have their masks."""
        return frozenset(self._places.keys() - self._failed)

    def append(self, masks: GroupMasks) -> None:
        """Adds the masks of a group; once this returns, the job may be killed."""
        line = json.dumps(dataclasses.asdict(masks)).encode() + b"\n"
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        self._add(place, masks)

    def read(self, group: int) -> GroupMasks:
        """The masks of a group."""
        self._file.seek(self._places[group])
        masks = _parse(self._file.readline())
        assert masks is not None and masks.group == group, "only one job may write here"
        return masks

    def close(self) -> None:
        """Ends writing."""
        self._file.close()

    def remove(self) -> None:
        """Removes the directory, last of all what tells whose it was."""
        self.close()
        for name in (RESULT, MASKS, JOB):
            (self.directory / name).unlink(missing_ok=True)
        self.directory.rmdir()

    def _begin(self, job: Mapping[str, Any]) -> None:
        file = self.directory / JOB
        self.directory.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            others = [one.name for one in self.directory.iterdir() if one.name != _PARTIAL_JOB]
            if others:
                raise UserError(f"{self.directory}: expected {JOB} in it, found {others[0]} alone")
            partial = self.directory / _PARTIAL_JOB
            partial.write_text(json.dumps(job))
            partial.replace(file)
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file}: expected json, found {error}") from None
        other = [key for key in job if not isinstance(found, dict) or found.get(key) != job[key]]
        if other:
            raise UserError(
                f"{self.directory}: expected masks made with the same {other[0]}, found them made "
                "with another; remove the folder to begin anew"
            )

    def _recover(self) -> None:
        """Finds the lines, and cuts off what is none."""
        place = self._file.seek(0)
        for line in self._file:
            masks = _parse(line)
            if masks is None:
                break
            self._add(place, masks)
            place += len(line)
        self._file.truncate(place)

    def _add(self, place: int, masks: GroupMasks) -> None:
        self._places[masks.group] = place
        (self._failed.add if masks.failures else self._failed.discard)(masks.group)


def _parse(line: bytes) -> GroupMasks | None:
    """A line; None if it was cut short, or a crash of the machine has damaged it."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
        return GroupMasks(values["group"], tuple(values["counts"]), tuple(values["failures"]))
    except (ValueError, TypeError, KeyError):
        return None
