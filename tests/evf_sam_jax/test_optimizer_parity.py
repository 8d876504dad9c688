"""Six steps of training move the weights as a PyTorch loop over the originals' modules moves them.

The models are the same, small and random, and everything is float32; the optimizer alone is
compared with torch's AdamW as well. Adam divides a gradient by its own size, so that rounding noise
can move a parameter as far as a signal does: where the gradient is nothing but noise, the movements
are not compared.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert import evf_sam as evf_sam_table
from convert.table import make_plan
from convert.to_model_dir import leaf_shapes
from data_pipelines import image_input, tokenizers
from data_pipelines.batch import Batch
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from evf_sam_jax.train_state import create_state, split_params
from evf_sam_jax.train_step import LossWeights, make_train_step
from tests.parity import beit3_cases, sam_cases
from tests.parity.weights import fill, our_params

pytestmark = pytest.mark.torch

STEPS = 6
MEASURED = ("loss", "bce", "dice", "grad_norm")
CONFIG = EvfSamConfig(encoder=beit3_cases.CONFIGS["small_base"], segmenter=sam_cases.SMALL)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.95,
    epsilon=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
)
TRAINABLE = (
    ("encoder/.*", True),
    ("projector/.*", True),
    ("segmenter/mask_decoder/.*", True),
    ("segmenter/prompt_encoder/no_mask_embed", True),
    (".*", False),
)
SIZES = ((53, 80), (171, 97))  # of the images: one is enlarged to the frame of 128, one shrunk
PHRASES = (3, 1)
TEXT_LENGTHS = (9, 4, 6, 7)  # in tokens
# A gradient that stays below this share of the global norm in all steps is noise. Here the largest
# of those shares is 2e-9, and the smallest other one 2e-4.
NEGLIGIBLE = 1e-6
MEASURED_BAR = 1e-5  # relative, of losses and gradient norms; found: 2e-7
MOVED_BAR = 2e-3  # of the difference of two movements, relative to their length; found: 2e-4


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Two images with three phrases and one, as lists over images and over phrases."""

    frames: list[np.ndarray]  # uint8 [s, s, 3]
    frame_sizes: list[tuple[int, int]]
    encoder_images: list[np.ndarray]
    texts: list[list[int]]
    targets: list[np.ndarray]  # uint8 [n, h, w]


def inputs() -> Inputs:
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    framed = [image_input.sam_input(image, CONFIG.segmenter.image_size) for image in images]
    targets = []
    for (height, width), count in zip(SIZES, PHRASES, strict=True):
        masks = np.zeros((count, height, width), np.uint8)
        for mask in masks:
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            mask[top : top + height // 3, left : left + width // 2] = 1
        targets.append(masks)
    return Inputs(
        frames=[frame for frame, _ in framed],
        frame_sizes=[size for _, size in framed],
        encoder_images=[
            image_input.encoder_input(image, CONFIG.encoder.image_size) for image in images
        ],
        texts=[
            rng.integers(4, CONFIG.encoder.vocab_size, length).tolist() for length in TEXT_LENGTHS
        ],
        targets=targets,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What training measured, step by step, and how it moved the weights.

    Attributes:
      measured: `loss`, `bce`, `dice` and `grad_norm` (before clipping), each of every step.
      moved: every trained parameter's change, under the originals' names and in their layouts.
      share: the largest share of the global norm that each parameter's gradient had in any step;
        of the originals' run only.
    """

    measured: dict[str, list[float]]
    moved: dict[str, np.ndarray]
    share: dict[str, float] = dataclasses.field(default_factory=dict)


def original_model() -> Any:
    """The originals' modules under the names of a released checkpoint, filled by their names."""
    from torch import nn

    width, channels = CONFIG.encoder.width, CONFIG.segmenter.out_channels
    model = nn.ModuleDict(
        {
            "mm_extractor": nn.ModuleDict({"beit3": beit3_cases.original(CONFIG.encoder)}),
            "text_hidden_fcs": nn.ModuleList(
                [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, channels))]
            ),
            "visual_model": sam_cases.original(CONFIG.segmenter),
        }
    )
    fill(model)
    return model


def original_losses(model: Any, given: Inputs) -> tuple[Any, Any]:
    """BCE and dice of the batch, image after image."""
    import torch
    import torch.nn.functional as F

    sam = model["visual_model"]
    ids, valid = tokenizers.pad_token_ids(given.texts, max(TEXT_LENGTHS))
    pictures = torch.from_numpy(np.stack(given.encoder_images)).permute(0, 3, 1, 2)
    encoded = model["mm_extractor"]["beit3"](
        visual_tokens=pictures.repeat_interleave(torch.tensor(PHRASES), dim=0),
        textual_tokens=torch.from_numpy(ids).long(),
        text_padding_position=torch.from_numpy(~valid),
    )["encoder_out"]
    prompts = model["text_hidden_fcs"][0](encoded[:, :1]).split(PHRASES)

    bce_sum, dice_sum = 0.0, 0.0
    for i, count in enumerate(PHRASES):
        height, width = given.frame_sizes[i]
        content = torch.from_numpy(given.frames[i][:height, :width].copy()).permute(2, 0, 1)
        with torch.no_grad():
            embedding = sam.image_encoder(sam.preprocess(content.float()[None]))
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        low_res, _ = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.cat([sparse.expand(count, -1, -1), prompts[i]], dim=1),
            dense_prompt_embeddings=dense.expand(count, -1, -1, -1),
            multimask_output=False,
        )
        frame = (CONFIG.segmenter.image_size,) * 2
        framed = F.interpolate(low_res, frame, mode="bilinear", align_corners=False)
        logits = F.interpolate(
            framed[..., :height, :width], SIZES[i], mode="bilinear", align_corners=False
        )[:, 0]

        target = torch.from_numpy(given.targets[i]).float()
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        bce = entropy.flatten(1).mean(1).sum() / (count + 1e-8)
        p, t = logits.sigmoid().flatten(1), target.flatten(1)
        overlap, total = 2 * (p / 1000 * t).sum(-1), (p / 1000).sum(-1) + (t / 1000).sum(-1)
        dice = (1 - (overlap + 1e-6) / (total + 1e-6)).sum() / (count + 1e-8)
        # Each image's mean is weighted by its number of masks.
        bce_sum, dice_sum = bce_sum + bce * count, dice_sum + dice * count
    masks = sum(PHRASES) + 1e-8
    return bce_sum / masks, dice_sum / masks


@pytest.fixture(scope="module")
def originals_run() -> Run:
    import torch

    model, given = original_model(), inputs()
    # In the original's training the whole model is in this mode; nothing in it may depend on that.
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not name.startswith(("visual_model.image_encoder.", "visual_model.prompt_encoder."))
            or "no_mask_embed" in name
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    measured: dict[str, list[float]] = {name: [] for name in MEASURED}
    share = dict.fromkeys(trained, 0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        bce, dice = original_losses(model, given)
        (bce + dice).backward()
        norms = {name: p.grad.norm() for name, p in trained.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for name, own in norms.items():
            share[name] = max(share[name], float(own / norm))
        for name, value in zip(MEASURED, (bce + dice, bce, dice, norm), strict=True):
            measured[name].append(float(value.detach()))
        optimizer.step()
    moved = {name: (p.detach() - before[name]).numpy() for name, p in trained.items()}
    return Run(measured, moved, share)


def our_batch(given: Inputs) -> Batch:
    """Both images, top-left on a canvas that is larger than either, with rows of padding.

    Targets are ones wherever they must not count: outside the image, and of no phrase.
    """
    b, k, canvas = len(SIZES), max(PHRASES), (180, 100)
    all_ids, all_valid = tokenizers.pad_token_ids(given.texts, max(TEXT_LENGTHS) + 2)
    ids = np.zeros((b, k, all_ids.shape[1]), np.int32)
    valid = np.zeros(ids.shape, bool)
    phrase_valid = np.zeros((b, k), bool)
    mask, mask_valid = np.ones((b, k, *canvas), np.uint8), np.zeros((b, *canvas), bool)
    first = 0
    for i, ((height, width), count) in enumerate(zip(SIZES, PHRASES, strict=True)):
        ids[i, :count] = all_ids[first : first + count]
        valid[i, :count] = all_valid[first : first + count]
        phrase_valid[i, :count] = True
        mask[i, :count, :height, :width] = given.targets[i]
        mask_valid[i, :height, :width] = True
        first += count
    encoder_image = np.stack(given.encoder_images)
    return Batch(
        sam_image=np.stack(given.frames),
        sam_size=np.asarray(given.frame_sizes, np.int32),
        encoder_image=encoder_image,
        text_ids=ids,
        text_valid=valid,
        phrase_valid=phrase_valid,
        mask=mask,
        mask_valid=mask_valid,
        original_size=np.asarray(SIZES, np.int32),
        example_id=np.arange(b, dtype=np.int32),
        example_valid=np.ones(b, bool),
        skipped_id=np.full(b, -1, np.int32),
    )


@pytest.fixture(scope="module")
def our_run() -> Run:
    params = our_params(evf_sam_table.table(CONFIG), CONFIG.to_dict())
    trainable, frozen = split_params(jax.tree.map(jnp.asarray, params), TRAINABLE)
    optimizer = make_optimizer(OPTIMIZER, STEPS, trainable)
    schedule = learning_rate_schedule(OPTIMIZER, STEPS)
    state = create_state(trainable, frozen, optimizer)
    step = jax.jit(make_train_step(CONFIG, "text", LossWeights(), optimizer, schedule))
    batch = jax.tree.map(jnp.asarray, our_batch(inputs()))
    measured: dict[str, list[float]] = {name: [] for name in MEASURED}
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        for name, values in measured.items():
            values.append(float(getattr(metrics, name)))

    plan = make_plan(evf_sam_table.table(CONFIG), leaf_shapes(CONFIG.to_dict()))
    before, after = path_leaves(trainable), path_leaves(state.trainable)
    moved = {
        part.key: part.transform.to_torch(np.asarray(after[path] - before[path])[part.index])
        for path in after
        for part in plan.parts[path]
    }
    return Run(measured, moved)


def test_losses_and_gradient_norms_are_those_of_the_originals(
    originals_run: Run, our_run: Run
) -> None:
    norms = originals_run.measured["grad_norm"]
    assert max(norms) > OPTIMIZER.clip_norm > min(norms)  # some steps are clipped, some are not
    for name, expected in originals_run.measured.items():
        difference = np.abs(np.divide(our_run.measured[name], expected) - 1)
        print(f"{name}: {expected}, worst relative difference {difference.max():.1e}")
        assert difference.max() <= MEASURED_BAR, name


def test_parameters_move_as_the_originals_do(originals_run: Run, our_run: Run) -> None:
    moved = dict(originals_run.moved)
    # Our model does without it, and in the originals no gradient reaches it.
    assert not moved.pop("mm_extractor.beit3.vision_embed.mask_token").any()
    assert moved.keys() == our_run.moved.keys()
    noise, worst = set(), (0.0, "")
    for name, expected in moved.items():
        found, share = our_run.moved[name], originals_run.share[name]
        if share == 0:
            assert not expected.any() and not found.any(), name
        elif share < NEGLIGIBLE:
            noise.add(name)
        else:
            distance = np.linalg.norm(expected)
            difference = float(np.linalg.norm(found - expected) / distance)
            worst = max(worst, (difference, name))
            # So the two distances differ by no more than that.
            assert difference <= MOVED_BAR, f"{name}: {distance:.3e} moved, {difference:.1e} apart"
    print(f"worst difference of a movement {worst[0]:.1e} of its length: {worst[1]}")
    # One number added to all scores of a query changes no softmax.
    assert all("mask_decoder" in n and n.endswith("k_proj.bias") for n in noise), noise


def torch_linear_rates(warmup: int, total: int) -> list[float]:
    """The rates of peak 1 by torch's schedulers, from the first that is not 0."""
    import torch
    from torch.optim.lr_scheduler import LinearLR, SequentialLR

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rises = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    falls = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=total - warmup)
    schedule = SequentialLR(optimizer, [rises, falls], milestones=[warmup - 1])
    rates = []
    for _ in range(total - 2):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()  # torch warns if a schedule goes on without it
        schedule.step()
    return rates


@pytest.mark.parametrize(("warmup", "total"), [(2, 7), (10, 50)])
def test_linear_rises_and_falls_as_torchs_schedulers(warmup: int, total: int) -> None:
    """After the two steps without a rate that are DeepSpeed's own, which torch cannot say."""
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=warmup)
    rate = learning_rate_schedule(config, total)
    found = [float(rate(step)) for step in range(total)]
    assert found[:2] == [0.0, 0.0]
    np.testing.assert_allclose(found[2:], torch_linear_rates(warmup, total), rtol=1e-6)


def test_updates_are_those_of_torchs_adamw() -> None:
    """Gradients above and below the clipping norm, weight decay, rules, and a schedule."""
    import torch

    total, warmup, peak = 9, 3, 0.1
    config = OptimizerConfig(
        learning_rate=peak,
        schedule="linear",
        warmup_steps=warmup,
        b1=0.8,
        b2=0.95,
        epsilon=1e-2,  # large enough for where it is added to matter
        weight_decay=0.1,
        clip_norm=1.0,
        rate_rules=(("slow/.*", 0.1), (".*", 1.0)),
        decay_rules=((".*/bias", False), (".*", True)),
    )
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> dict[str, dict[str, np.ndarray]]:
        return {
            module: {
                "kernel": rng.normal(0, scale, (4, 3)).astype(np.float32),
                "bias": rng.normal(0, scale, 3).astype(np.float32),
            }
            for module in ("fast", "slow")
        }

    start = drawn(1.0)
    gradients = [drawn(scale) for scale in (3.0, 0.05, 1.0, 0.1, 30.0, 0.01, 0.1, 1.0, 0.05)]
    assert len(gradients) == total

    theirs = {path: torch.tensor(leaf) for path, leaf in path_leaves(start).items()}
    factors = {path: 0.1 if path.startswith("slow/") else 1.0 for path in theirs}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.0 if path.endswith("/bias") else 0.1}
            for path, p in theirs.items()
        ],
        betas=(0.8, 0.95),
        eps=1e-2,
    )
    ours = jax.tree.map(jnp.asarray, start)
    our_optimizer = make_optimizer(config, total, ours)
    state, update = our_optimizer.init(ours), jax.jit(our_optimizer.update)

    for rate, gradient in zip(
        [0.0, 0.0, *torch_linear_rates(warmup, total)], gradients, strict=True
    ):
        for path, leaf in path_leaves(gradient).items():
            theirs[path].grad = torch.tensor(leaf)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group, factor in zip(optimizer.param_groups, factors.values(), strict=True):
            group["lr"] = peak * rate * factor
        optimizer.step()

        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, leaf in path_leaves(ours).items():
            np.testing.assert_allclose(leaf, theirs[path], atol=2e-6, rtol=0, err_msg=path)
