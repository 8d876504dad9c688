"""Flags with a config file; what ml_collections reports as a traceback becomes one sentence."""

from collections.abc import Sequence

from absl import flags

from evf_sam_jax.errors import UserError


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags, of which `--config` is one, and returns the other arguments.

    Raises:
      UserError: the config file cannot be read or refuses its arguments, or has no such key.
    """
    options = flags.FLAGS
    try:
        arguments = options(argv)
        if options.config is not None:
            options.config.to_dict()  # raises where the file could not be loaded
    except (AttributeError, KeyError) as error:
        cause = error.args[0]  # ml_collections wraps one in the other, in two ways
        reason = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())
        if "get_config" in reason:
            raise UserError("--config: expected a file with get_config, found none") from None
        raise UserError(f"--config.KEY=VALUE: the config has no key {reason}") from None
    except SyntaxError as error:
        raise UserError(f"--config: expected a Python file, found {error.msg}") from None
    except OSError:
        raise UserError("--config: expected a config file, found none at that path") from None
    except flags.IllegalFlagValueError as error:
        # What a config file raises comes as its whole traceback.
        reason = str(error).strip().splitlines()[-1]
        raise UserError(reason.replace("ValueError", "--config", 1)) from None
    if options.config is None:
        raise UserError("--config: expected a file such as configs/shapes.py, found nothing")
    return arguments
