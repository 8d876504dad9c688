"""Being told to stop: SIGTERM, as schedulers send it before they take a machine away."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

# What a shell reports of a process that SIGTERM ended. Not 0: a scheduler shall start the run
# again, and not take it for finished.
EXIT_CODE = 128 + signal.SIGTERM


class Preempted(SystemExit):
    """The run has saved its state and ends, with `EXIT_CODE`."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message


class PreemptionNotice:
    """A context in which SIGTERM ends nothing, but is noticed between two steps."""

    def __init__(self) -> None:
        self._received = False
        self._asked = 0
        self._before: object = None

    def __enter__(self) -> "PreemptionNotice":
        # Of several processes, jax hears the signal, and tells all of them at which step to stop.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # pyright: ignore[reportArgumentType]
            self._before = None

    def received(self) -> bool:
        """Whether to stop after this step, the same answer on every process; asked at each."""
        if jax.process_count() == 1:
            return self._received
        # Not the step, which begins anew with each stage: jax agrees on a number that rises.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._received = True
