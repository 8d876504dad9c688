"""The command that trains and evaluates.

    python -m evf_sam_jax.main --config configs/shapes.py --workdir runs/shapes
    python -m evf_sam_jax.main --config configs/evaluate.py:model=runs/shapes/model \
        --workdir runs/shapes_val --mode evaluate

Any value of the config can be changed: `--config.stages.referring.steps=100`.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import config_flags

from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.evaluate import evaluate_directory
from evf_sam_jax.experiment import evaluation_from_dict, experiment_from_dict
from evf_sam_jax.train import train

MODES = ("train", "evaluate")


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    config_flags.DEFINE_config_file(
        "config", None, "The config file, with arguments after a colon."
    )
    flags.DEFINE_string("workdir", None, "The directory of the run, new or empty.")
    flags.DEFINE_enum("mode", "train", MODES, "What to do.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; what ml_collections reports as a traceback becomes one sentence."""
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


def main(argv: list[str]) -> None:
    """Checks the flags and does what `--mode` says."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    if not options.workdir:
        raise UserError("--workdir: expected a directory, found nothing")
    values, workdir = options.config.to_dict(), Path(options.workdir)
    logging.info("devices: %s", jax.devices())
    if options.mode == "train":
        train(experiment_from_dict(values), workdir)
    else:
        evaluate_directory(evaluation_from_dict(values), workdir)


if __name__ == "__main__":
    define_flags()
    run_app(main, parse_flags)
