"""Where compiled programs are kept for the next run: the flag of all commands that compile."""

import errno
import os
from pathlib import Path

import jax
from absl import flags, logging

from data_pipelines.index import user_cache
from evf_sam_jax.errors import UserError


def define_flag() -> None:
    """The flag that says where."""
    flags.DEFINE_string(
        "compilation_cache",
        str(user_cache("compiled")),
        "Where compiled programs are kept for the next run; '' keeps none.",
    )


def keep_compiled() -> None:
    """Keeps what is compiled where the flag says.

    Without the flag, a directory that jax has already stays, such as JAX_COMPILATION_CACHE_DIR's,
    and none is kept where the user's own cannot be written, which is logged.

    Raises:
      UserError: the directory that was given cannot be written.
    """
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
