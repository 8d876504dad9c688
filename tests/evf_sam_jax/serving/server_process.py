"""The command `python -m evf_sam_jax.serve` as a process."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
      url: where it listens.
      process: its process.
    """

    url: str
    process: subprocess.Popen

    def resident_megabytes(self) -> float:
        """Its memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024


@contextlib.contextmanager
def server_process(model: Path, *flags: str) -> Iterator[Server]:
    """Serves a model on a free port; on leaving, it must end by itself when asked to."""
    command = [sys.executable, "-m", "evf_sam_jax.serve", "--model", str(model), "--port=0"]
    command.append("--compilation_cache=")  # the test may kill it
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"at (http://\S+)", process.stdout.readline())
            assert found, "the server did not start"
            yield Server(found[1], process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
