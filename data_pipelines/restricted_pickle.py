"""Reads pickles from the internet without running them: plain lists, dicts, strings and numbers."""

import pickle
from pathlib import Path
from typing import Any, NoReturn

from evf_sam_jax.errors import UserError


class _RefusedGlobal(Exception):
    """A pickle asked for a class or a function."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _RefusedGlobal(f"{module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """The content of a pickle of any protocol; strings of Python 2 are read as latin-1.

    Raises:
      UserError: it refers to any class or function (which is not run), is cut short, or no pickle.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except _RefusedGlobal as refused:
        raise UserError(
            f"{path}: expected a pickle of plain lists, dicts, strings and numbers, found a "
            f"reference to {refused}: it was not run"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found: {error.strerror}") from None
    except Exception as error:  # a broken stream raises whatever its bytes happen to mean
        raise UserError(f"{path}: expected a whole pickle, found a broken one") from error
