"""Which directory compiled programs are kept in, as commands decide it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import jax
from evf_sam_jax import compilation_cache
from evf_sam_jax.errors import run_app

def main(argv):
    compilation_cache.keep_compiled()
    print("kept in:", jax.config.jax_compilation_cache_dir)
    print("from:", jax.config.jax_persistent_cache_min_compile_time_secs)

compilation_cache.define_flag()
run_app(main)
"""


def run(user_cache: str, of_jax: str | None, *flags: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"XDG_CACHE_HOME": user_cache}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    if of_jax is not None:
        environ["JAX_COMPILATION_CACHE_DIR"] = of_jax
    command = [sys.executable, "-c", PROGRAM, *flags]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flag", "of_jax", "expected"),
    [
        (None, None, "{users}/evf_sam_jax/compiled"),
        (None, "/jaxs", "/jaxs"),
        ("{users}/given", "/jaxs", "{users}/given"),
        ("", "/jaxs", "None"),
    ],
)
def test_the_flag_goes_before_jaxs_own_setting(
    flag: str | None, of_jax: str | None, expected: str, tmp_path: Path
):
    flags = [] if flag is None else [f"--compilation_cache={flag.format(users=tmp_path)}"]
    done = run(str(tmp_path), of_jax, *flags)
    assert done.stdout.splitlines()[0] == f"kept in: {expected.format(users=tmp_path)}", done.stderr


@pytest.mark.parametrize(
    ("directory", "seconds", "expected"),
    [(None, None, "0.1"), (None, "3", "3.0"), ("/jaxs", None, "0.1")],
)
def test_what_compiles_within_a_second_is_kept_too_unless_jax_is_told_otherwise(
    directory: str | None,
    seconds: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if seconds is not None:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", seconds)
    assert run(str(tmp_path), directory).stdout.splitlines()[1] == f"from: {expected}"


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    given = run(str(tmp_path), None, f"--compilation_cache={file}/compiled")
    said = f"--compilation_cache: expected a directory to write to, found {file}/"
    assert given.returncode == 2
    assert given.stderr == f"error: {said}compiled: Not a directory\n"
    own = run(str(file), None)
    assert own.stdout.splitlines()[0] == "kept in: None"
    assert (
        f"{said}evf_sam_jax/compiled: Not a directory; compiled programs are not kept" in own.stderr
    )
