"""A directory that appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evf_sam_jax.errors import UserError


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, name: str = "the output directory") -> Iterator[Path]:
    """Gives a temporary sibling of `path` to write into, and renames it to `path` at the end.

    Whatever is raised while it is written removes it again, with the parents made for it.

    Args:
      path: the directory to make; its missing parents are made too.
      name: what an error calls it, such as the flag that gave it.

    Raises:
      UserError: `path` exists, before anything is written, or it cannot be made.
    """
    path = Path(path)
    require_absent(path, name)
    missing_parents = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{name}: cannot make {path}: {error.strerror}") from error
    try:
        yield temporary
        # mkdtemp makes it private; a result has the permissions of any other new directory.
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing_parents:
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                parent.rmdir()
        raise


def require_absent(path: str | os.PathLike, name: str = "the output directory") -> None:
    """Raises UserError if there is something at `path`, for a command to call before long work."""
    if os.path.lexists(path):
        raise UserError(f"{name}: expected a path where nothing is yet, found {path}")


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
