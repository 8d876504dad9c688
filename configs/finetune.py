"""Goes on training a finished model on one's own images, phrases and masks.

    python -m evf_sam_jax.main --workdir runs/own \\
        --config configs/finetune.py:model=MODEL_DIR,data=DATA_DIR,steps=500

DATA_DIR holds `train.jsonl` and `val.jsonl` (data_pipelines/own_data.py says what is in them). As
in the original's recipe, the encoder, the projector and the mask decoder are trained, and the image
encoder is not. `form=own_coco` reads COCO files with phrases instead.

Not run on a released model yet: the learning rate, a fifth of the paper's, is a cautious guess.
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arguments
from configs.recipe import begun_towers, trainable_rules


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    arguments = parse_arguments(
        argument,
        model="",
        data="",
        form=("own_jsonl", "own_coco"),
        steps=500,
        batch_size=4,
        learning_rate=2e-5,
        workers=0,
        features="",
    )
    for name in ("model", "data"):
        if not arguments[name]:
            raise ValueError(f"config argument {name!r}: expected a directory, found nothing")
    config = ConfigDict()
    config.seed = 0
    config.log_every = 10
    config.profile_every = 0  # steps
    config.init = dict(model=arguments["model"])

    # Data
    own = dict(name=arguments["form"], root=arguments["data"])
    config.data = ConfigDict()
    config.data.train = [dict(own, split="train")]
    config.data.held_out = [dict(own, split="val")]
    config.data.phrases = 3
    config.data.text_lengths = (16, 32, 64)
    config.data.canvases = ((640, 640), (1024, 1024))
    config.data.workers = arguments["workers"]
    config.data.max_skipped = 10
    config.data.features = arguments["features"]
    # How --mode cache_features writes features: bfloat16, float32, or int8.
    config.feature_cache = dict(dtype="bfloat16", batch_size=8, images_a_file=500)

    # Training
    config.stages = ConfigDict()
    config.stages.finetune = dict(
        prompts="text",
        steps=arguments["steps"],
        batch_size=arguments["batch_size"],
        trainable=trainable_rules(begun_towers(arguments)[1]),
        optimizer=dict(
            learning_rate=arguments["learning_rate"], schedule="cosine", warmup_steps=20
        ),
    )

    # Devices and checkpoints
    config.mesh = dict(data=0, fsdp=1, zero_stage=2)
    config.checkpoints = dict(every=100, keep=2, keep_best=1)

    # Evaluation
    config.evaluation = dict(
        images=256, batch_size=arguments["batch_size"], every=100, panel_images=4
    )
    return config
