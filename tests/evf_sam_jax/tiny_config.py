"""A config file of seconds, for tests that start the command: one stage on the embedded data set.

python -m evf_sam_jax.main --config tests/evf_sam_jax/tiny_config.py --workdir runs/tiny
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from evf_sam_jax.experiment import ExperimentConfig, experiment_from_dict
from tests.evf_sam_jax.tiny_experiment import CANVAS, MODEL, TEXT_LENGTH


def get_config() -> ConfigDict:
    """Returns the values of the experiment."""
    config = ConfigDict()
    config.seed = 0
    config.log_every = 1
    config.profile_every = 0  # steps
    config.model = MODEL.to_dict()
    config.data = dict(shapes=dict(seed=0), text_length=TEXT_LENGTH, canvas=CANVAS)
    config.mesh = dict(data=0, fsdp=1, zero_stage=2, min_size=64)
    config.checkpoints = dict(every=5, keep=2, keep_best=1)
    config.stages = ConfigDict()
    config.stages.referring = dict(
        prompts="text",
        steps=5,
        batch_size=8,
        accumulate=1,
        ema_decay=None,
        trainable=[
            ("(encoder|projector)/.*", True),
            ("segmenter/mask_decoder/.*", True),
            (".*", False),
        ],
        optimizer=dict(learning_rate=2e-3, schedule="linear", warmup_steps=3),
    )
    config.evaluation = dict(images=8, batch_size=8, every=100, panel_images=1)
    return config


def experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment, with other values at some dotted keys."""
    config = get_config()
    config.update_from_flattened_dict(values)
    return experiment_from_dict(config.to_dict())
