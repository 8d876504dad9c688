"""The one exception for a user's mistake, and the exit code that every command gives it."""

import functools
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(Exception):
    """One sentence for the user: the file, key or flag, what was expected, what was found."""


def run_command(main: Callable[..., None], *args: object) -> None:
    """Runs `main(*args)`; a `UserError` becomes one line on standard error and exit code 2."""
    try:
        main(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_app(
    main: Callable[[list[str]], None],
    parse: Callable[[Sequence[str]], list[str]] = flags.FLAGS,
) -> None:
    """Runs a command of absl flags: `main(argv)` as `run_command` does, wrong flags alike.

    Of what libraries log, warnings are shown; `--verbosity=0` shows all.

    Args:
      parse: reads the flags and returns the other arguments; it may raise `UserError` too.
    """
    parse_flags = functools.partial(_parse_flags, parse)
    app.run(functools.partial(run_command, main), flags_parser=parse_flags)


def _parse_flags(parse: Callable[[Sequence[str]], list[str]], argv: Sequence[str]) -> list[str]:
    try:
        arguments = parse(argv)
    except (flags.Error, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if flags.FLAGS["verbosity"].using_default_value:
        # absl's own default becomes INFO here, which Orbax fills pages with.
        flags.FLAGS["verbosity"].value = logging.WARNING
        flags.FLAGS["verbosity"].using_default_value = False
    return arguments
