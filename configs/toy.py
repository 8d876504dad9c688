"""A toy of the embedded data set, made in a minute: something to try the commands on.

    python -m evf_sam_jax.main --config configs/toy.py --workdir runs/toy

Scenes of 64 x 64 pixels with three shapes; phrases of sizes, colours and shapes alone; and a model
of half a million parameters, all trained at once. configs/shapes.py is the experiment.
"""

from ml_collections import ConfigDict

from configs import shapes
from configs.arguments import parse_arguments


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    parse_arguments(argument)  # it takes none
    config = shapes.get_config("fusion=late")

    # Model
    encoder = dict(width=64, layers=2, mlp_width=128, image_size=32)
    segmenter = dict(
        width=64, depth=2, image_size=64, patch_size=8, out_channels=64, decoder_mlp_width=128
    )
    config.update(model=dict(encoder=encoder, segmenter=segmenter))

    # Data
    config.data = dict(
        shapes=dict(sides=(64, 64), objects=(3, 3), weights=(1.0, 0.0, 0.0, 0.0)),
        text_length=14,
        canvas=(64, 64),
    )

    # Training
    config.stage_order = ("referring",)
    config.stages = dict(
        referring=dict(
            prompts="text",
            steps=300,
            batch_size=16,
            trainable=(
                # The random Fourier features of positions are a constant of SAM.
                (".*/positional_encoding_gaussian_matrix", False),
                (".*", True),
            ),
            optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup_steps=100),
        )
    )

    # Checkpoints and evaluation
    config.checkpoints = dict(every=300, keep=1, keep_best=1)
    config.evaluation = dict(split="val", images=64, batch_size=16, every=300, panel_images=4)
    return config
