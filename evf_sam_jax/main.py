"""The command that trains, evaluates, plans a training, caches features, and replays a failure.

    python -m evf_sam_jax.main --config configs/shapes.py --workdir runs/shapes
    python -m evf_sam_jax.main --config configs/evaluate.py:model=runs/shapes/model \
        --workdir runs/shapes_val --mode evaluate
    python -m evf_sam_jax.main --config configs/shapes.py --workdir runs/shapes --mode replay
    python -m evf_sam_jax.main --config configs/shapes.py --mode plan --devices 8
    python -m evf_sam_jax.main --config CONFIG --workdir FEATURES --mode cache_features

Any value of the config can be changed: `--config.stages.referring.steps=100`.
"""

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from evf_sam_jax import compilation_cache, plan_command, processes
from evf_sam_jax.command_line import parse_flags
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.evaluation.config import job_from_dict
from evf_sam_jax.evaluation.job import evaluate
from evf_sam_jax.experiment import experiment_from_dict
from evf_sam_jax.feature_cache import cache_features
from evf_sam_jax.replay import replay
from evf_sam_jax.train import train

MODES = ("train", "evaluate", "replay", "plan", "cache_features")


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    config_flags.DEFINE_config_file(
        "config", None, "The config file, with arguments after a colon."
    )
    flags.DEFINE_string("workdir", None, "The directory of the run: new, or to go on with.")
    flags.DEFINE_enum("mode", "train", MODES, "What to do.")
    compilation_cache.define_flag()
    processes.define_flags()
    plan_command.define_flags()


def main(argv: list[str]) -> None:
    """Checks the flags and does what `--mode` says."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    if options.mode == "plan":
        return plan_command.print_plan(options.config.to_dict(), plan_command.described_device())
    if not options.workdir:
        raise UserError("--workdir: expected a directory, found nothing")
    values, workdir = options.config.to_dict(), epath.Path(options.workdir)
    compilation_cache.keep_compiled()
    with processes.joined_by_flags():
        logging.info("devices: %s", jax.devices())
        if options.mode == "train":
            train(experiment_from_dict(values), workdir)
        elif options.mode == "cache_features":
            cache_features(experiment_from_dict(values), workdir)
        elif options.mode == "replay":
            replay(experiment_from_dict(values), workdir)
        else:
            evaluate(job_from_dict(values), workdir)


if __name__ == "__main__":
    define_flags()
    run_app(main, parse_flags)
