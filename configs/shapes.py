"""A tiny EVF-SAM, trained from nothing on the embedded data set of coloured shapes.

    python -m evf_sam_jax.main --config configs/shapes.py --workdir runs/shapes
    python -m evf_sam_jax.main --config configs/shapes.py:fusion=late --workdir runs/shapes_late

As the real model came to be: first a small SAM learns to segment what a click or a box points at;
then its image encoder is frozen, and the multimodal encoder, the projector and the mask decoder
learn to follow phrases.

What the paper's tables compare are arguments; benchmarks/ablation_shapes.py runs them all:

    fusion=early|late|text           of image and words in the encoder (its Table 3)
    early_layers=all|0|1|2|3|4       with early fusion: in how many of the first layers
    readout=image_cls|text_cls|image_mean|concat
                                     the prompt feature (Table 5); by default image_cls with early
                                     fusion, concat with late or in 0 layers, text_cls with text
    concat=channels|tokens           how two features become prompts
    train_encoder, train_mask_decoder, train_prompt_encoder=true|false
                                     in the second stage (Table 4); of the prompt encoder that is
                                     `no_mask_embed`, as in the original
    pretrain_steps=800, steps=4000   of the two stages; 0 leaves one out. What no stage has
                                     pre-trained is trained in the second, image encoder included
    segmenter=MODEL_DIR              begins with the segmenter of a finished run, without a first
                                     stage: what many runs share is then trained once
    seed=0
    size=usual|small                 small: images of 80 pixels, half the parameters

Measured on two cores beside other work: a quarter of an hour; `pretrain/val_ciou` 0.90 and
`referring/val_ciou` 0.72 (benchmarks/RESULTS.md).
"""

from typing import Any

from ml_collections import ConfigDict

from configs.arguments import parse_arguments

# Without a fused image [CLS] token, the phrase is where both meet or all there is.
READOUTS = {"early": "image_cls", "late": "concat", "text": "text_cls"}

_LAYERS = 4
_ARGUMENTS: dict[str, Any] = dict(
    size=("usual", "small"),
    fusion=tuple(READOUTS),
    early_layers=("all", *range(_LAYERS + 1)),
    readout=("usual", "image_cls", "text_cls", "image_mean", "concat"),
    concat=("channels", "tokens"),
    train_encoder=True,
    train_mask_decoder=True,
    train_prompt_encoder=True,
    segmenter="",
    pretrain_steps=800,
    steps=4000,
    seed=0,
)


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    arguments = parse_arguments(argument, **_ARGUMENTS)
    fusion, segmenter = arguments["fusion"], arguments["segmenter"]
    stages = {"pretrain": 0 if segmenter else arguments["pretrain_steps"]}
    stages["referring"] = arguments["steps"]
    if min(stages.values()) < 0 or not any(stages.values()):
        raise ValueError(
            "config arguments 'pretrain_steps' and 'steps': expected 0 or more, and not 0 for "
            f"both, found {stages['pretrain']} and {stages['referring']}"
        )
    readout = arguments["readout"]
    if readout == "usual":
        apart = fusion == "early" and arguments["early_layers"] == 0
        readout = READOUTS["late" if apart else fusion]
    config = ConfigDict()
    config.seed = arguments["seed"]
    config.log_every = 50
    config.profile_every = 0  # steps

    # Model
    config.model = ConfigDict()
    config.model.profile = "current"
    config.model.encoder = dict(
        width=96,
        heads=4,
        layers=_LAYERS,
        mlp_width=192,
        vocab_size=128,
        image_size=64,
        patch_size=16,
        max_text_positions=32,
        fusion=fusion,
        early_layers=None if arguments["early_layers"] == "all" else arguments["early_layers"],
        readout=readout,
        concat=arguments["concat"],
        init_stddev=0.19,
        dtype="float32",
    )
    config.model.segmenter = dict(
        width=96,
        depth=4,
        heads=4,
        global_every=2,
        window_size=4,
        image_size=128,
        patch_size=16,
        mlp_ratio=2,
        out_channels=96,
        decoder_heads=4,
        decoder_mlp_width=256,
        iou_head_width=64,
        dtype="float32",
        encoder_chunk=None,
    )
    config.init = ConfigDict()
    config.init.segmenter = segmenter
    config.init.scale = [
        # The original's initialisation drowns words in their positions (N(0, 1/width) against
        # N(0, 1)), which a pretrained encoder has long overcome and a new one would have to.
        ("encoder/(text|vision)_positions/.*", 0.2),
        ("encoder/text_embed/.*", 5.0),
        # LayerNorm inside a branch blows up what nearly even attention leaves of its input:
        # branches begin small, and in early fusion with more of the words than of the image.
        ("encoder/.*/(out_proj|fc2)/(text/|vision/)?kernel", 0.2),
        *([("encoder/.*/v_proj/vision/kernel", 0.1)] if fusion == "early" else []),
        ("projector/out/kernel", 4.0),
        # Pixels stay visible in the residual stream: clicks and boxes alone would train the image
        # encoder to forget colours, and once frozen it cannot learn them again.
        *([] if segmenter else [("segmenter/image_encoder/patch_embed/proj/kernel", 4.0)]),
        (".*", 1.0),
    ]

    # Data
    config.data = ConfigDict()
    config.data.shapes = dict(seed=0)
    config.data.text_length = 14
    config.data.canvas = (128, 128)

    # Training
    config.stage_order = tuple(name for name, steps in stages.items() if steps)
    config.stages = ConfigDict()
    config.stages.pretrain = dict(
        prompts="points_and_boxes",
        steps=stages["pretrain"],
        batch_size=16,
        trainable=(
            # The random Fourier features of positions are a constant of SAM.
            (".*/positional_encoding_gaussian_matrix", False),
            ("segmenter/.*", True),
            ("(encoder|projector)/.*", False),
        ),
        optimizer=dict(
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=100,
            rate_rules=(("segmenter/image_encoder/.*", 0.25), (".*", 1.0)),
        ),
    )
    untrained = not (segmenter or stages["pretrain"])
    config.stages.referring = dict(
        prompts="text",
        steps=stages["referring"],
        batch_size=16,
        trainable=(
            ("encoder/.*", arguments["train_encoder"]),
            ("projector/.*", True),
            ("segmenter/mask_decoder/.*", arguments["train_mask_decoder"]),
            ("segmenter/prompt_encoder/no_mask_embed", arguments["train_prompt_encoder"]),
            ("segmenter/image_encoder/.*", untrained),
            ("segmenter/.*", False),
        ),
        optimizer=dict(
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=100,
            rate_rules=(
                *([("encoder/.*", 0.5)] if arguments["train_encoder"] else []),
                *([("segmenter/image_encoder/.*", 0.25)] if untrained else []),
                (".*", 1.0),
            ),
        ),
    )

    for name in [name for name, steps in stages.items() if not steps]:
        del config.stages[name]

    if arguments["size"] == "small":
        make_small(config)

    # Devices and checkpoints
    config.mesh = dict(data=0, fsdp=1, zero_stage=2)
    config.checkpoints = dict(every=1000, keep=2, keep_best=1)

    # Evaluation
    config.evaluation = dict(split="val", images=512, batch_size=16, every=1000, panel_images=4)
    return config


def make_small(config: Any) -> None:
    """Changes the experiment to one that takes a minute or two of one core.

    Three shapes an image, told apart by their looks and places, not by their relations.
    """
    config.model.encoder.update(width=64, mlp_width=128, image_size=32, patch_size=8)
    config.model.segmenter.update(
        width=64, depth=2, image_size=80, out_channels=64, decoder_mlp_width=128
    )
    config.data.shapes = dict(
        seed=0, sides=(80, 80), objects=(3, 3), weights=(0.55, 0.35, 0.10, 0.0)
    )
    config.data.canvas = (80, 80)
    for stage in config.stages.values():
        stage.optimizer.update(learning_rate=2e-3, warmup_steps=50)
