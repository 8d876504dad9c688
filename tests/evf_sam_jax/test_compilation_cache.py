"""Which directory compiled programs are kept in, as commands decide it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import jax
from absl import app
from evf_sam_jax import compilation_cache

def main(argv):
    compilation_cache.keep_compiled()
    print("kept in:", jax.config.jax_compilation_cache_dir)

compilation_cache.define_flag()
app.run(main)
"""


@pytest.mark.parametrize(
    ("flag", "of_jax", "expected"),
    [
        (None, None, "/users/evf_sam_jax/compiled"),
        (None, "/jaxs", "/jaxs"),
        ("/given", "/jaxs", "/given"),
        ("", "/jaxs", "None"),
    ],
)
def test_the_flag_goes_before_jaxs_own_setting(flag: str | None, of_jax: str | None, expected: str):
    environ = os.environ | {"XDG_CACHE_HOME": "/users"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    if of_jax is not None:
        environ["JAX_COMPILATION_CACHE_DIR"] = of_jax
    arguments = [] if flag is None else [f"--compilation_cache={flag}"]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout == f"kept in: {expected}\n", done.stderr
