"""The command that serves: what is wrong with its flags is said before a model is loaded."""

import socket
import subprocess
import sys

import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.serve import listening


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(
                UserError, match=rf"^--host, --port: cannot listen to 127\.0\.0\.1 {port}: Addr"
            ),
            listening("127.0.0.1", port),
        ):
            pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 70])
def test_a_host_that_is_none_is_named(host: str):
    with pytest.raises(UserError, match=f"^--host, --port: cannot listen to {host} 0: "):
        with listening(host, 0):
            pass


def test_a_free_port_is_taken():
    with listening("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        assert (host, port > 0) == ("127.0.0.1", True)


# As where a package is not installed.
WITHOUT = """
import runpy, sys
sys.modules["uvicorn"] = None
sys.argv = ["serve", *{arguments!r}]
runpy.run_module("evf_sam_jax.serve", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--model=here"],
            'expected uvicorn, which serving needs, found none: pip install ".[serve]"',
        ),
        ([], "--model: expected a path, found nothing"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], sentence: str):
    code = WITHOUT.format(arguments=arguments)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (2, f"error: {sentence}")
