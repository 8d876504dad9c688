"""Where compiled programs are kept for the next run: the flag of all commands that compile."""

import jax
from absl import flags

from data_pipelines.index import user_cache


def define_flag() -> None:
    """The flag that says where."""
    flags.DEFINE_string(
        "compilation_cache",
        str(user_cache("compiled")),
        "Where compiled programs are kept for the next run; '' keeps none.",
    )


def keep_compiled() -> None:
    """Keeps what is compiled where the flag says.

    Without the flag, a directory that jax has already stays, such as JAX_COMPILATION_CACHE_DIR's.
    """
    flag = flags.FLAGS["compilation_cache"]
    if flag.present or jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", flag.value or None)
