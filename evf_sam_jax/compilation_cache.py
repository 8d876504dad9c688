"""Where compiled programs are kept for the next run: the flag of all commands that compile."""

import errno
import os
from pathlib import Path

import jax
from absl import flags, logging

from data_pipelines.index import user_cache
from evf_sam_jax.errors import UserError

# Seconds of compiling from which a program is kept. jax's own limit of one would leave out SAM
# ViT-H's encoder, which is scanned, on many a machine.
WORTH_KEEPING = 0.1


def define_flag() -> None:
    """The flag that says where."""
    flags.DEFINE_string(
        "compilation_cache",
        str(user_cache("compiled")),
        "Where compiled programs are kept for the next run; '' keeps none.",
    )


def keep_compiled() -> None:
    """Keeps what takes `WORTH_KEEPING` to compile where the flag says.

    Without the flag, a directory that jax has already stays, such as JAX_COMPILATION_CACHE_DIR's,
    and none is kept where the user's own cannot be written, which is logged.

    Raises:
      UserError: the directory that was given cannot be written.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    flag = flags.FLAGS["compilation_cache"]
    if not flag.present and jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = flag.value or None
    if directory and (reason := _unusable(directory)):
        said = f"--compilation_cache: expected a directory to write to, found {directory}: {reason}"
        if flag.present:
            raise UserError(said)
        logging.warning("%s; compiled programs are not kept", said)
        directory = None
    jax.config.update("jax_compilation_cache_dir", directory)


def _unusable(directory: str) -> str | None:
    """Why files cannot be written there; None if they can, or for one that is not on a disk."""
    if "://" in directory:
        return None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(directory, os.W_OK) else os.strerror(errno.EACCES)
