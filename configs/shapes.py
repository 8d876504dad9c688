"""A tiny EVF-SAM, trained from nothing on the embedded data set of coloured shapes.

    python -m evf_sam_jax.main --config configs/shapes.py --workdir runs/shapes
    python -m evf_sam_jax.main --config configs/shapes.py:fusion=late --workdir runs/shapes_late

As the real model came to be: first a small SAM learns to segment what a click or a box points at;
then its image encoder is frozen, and the multimodal encoder, the projector and the mask decoder
learn to follow phrases. `fusion` is `early` (default), `late` or `text`.

Measured on two cores: 8 to 9 minutes; `pretrain/val_ciou` 0.90, and `referring/val_ciou` 0.72 with
early fusion, 0.73 with late fusion, 0.71 with text alone (one seed each; benchmarks/RESULTS.md).
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arguments


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    arguments = parse_arguments(argument, fusion=("early", "late", "text"))
    fusion = arguments["fusion"]
    config = ConfigDict()
    config.seed = 0
    config.log_every = 50
    config.profile_every = 0  # steps

    # Model
    config.model = ConfigDict()
    config.model.profile = "current"
    config.model.encoder = dict(
        width=96,
        heads=4,
        layers=4,
        mlp_width=192,
        vocab_size=128,
        image_size=64,
        patch_size=16,
        max_text_positions=32,
        fusion=fusion,
        # Without a fused image [CLS] token, the phrase is where both meet or all there is.
        readout={"early": "image_cls", "late": "concat", "text": "text_cls"}[fusion],
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
        ("segmenter/image_encoder/patch_embed/proj/kernel", 4.0),
        (".*", 1.0),
    ]

    # Data
    config.data = ConfigDict()
    config.data.shapes = dict(seed=0)
    config.data.text_length = 14
    config.data.canvas = (128, 128)

    # Training
    config.stage_order = ("pretrain", "referring")
    config.stages = ConfigDict()
    config.stages.pretrain = dict(
        prompts="points_and_boxes",
        steps=800,
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
    config.stages.referring = dict(
        prompts="text",
        steps=4000,
        batch_size=16,
        trainable=(
            ("(encoder|projector)/.*", True),
            ("segmenter/mask_decoder/.*", True),
            ("segmenter/prompt_encoder/no_mask_embed", True),
            ("segmenter/.*", False),
        ),
        optimizer=dict(
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=100,
            rate_rules=(("encoder/.*", 0.5), (".*", 1.0)),
        ),
    )

    # Devices and checkpoints
    config.mesh = dict(data=0, fsdp=1, zero_stage=2)
    config.checkpoints = dict(every=1000, keep=2, keep_best=1)

    # Evaluation
    config.evaluation = dict(split="val", images=512, batch_size=16, every=1000, panel_images=4)
    return config
