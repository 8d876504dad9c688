"""What the evaluation job costs beside its compiled calls, and what more phrases of an image cost.

    python -m benchmarks.evaluate

A model of random parameters that takes some tenths of a second a step goes through images of COCO's
size on disk, by turns: its compiled calls alone, given again and again one step's arrays, which are
on the device before the clock starts; and the whole job after its model and sets are open (plan,
reading, resizing, tokens, targets, rows with masks, shards, scores, files). Then the calls alone
for one phrase of an image and for several, which are decoded but not encoded anew.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import environment, roofline
from benchmarks.alternation import print_times
from data_pipelines.index import AnnotatedImage, Target, write_index
from data_pipelines.segmentations import encode_mask
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.source import IndexedSource, LooseFiles, ReadingRules
from evf_sam_jax.evaluation.config import EvaluationJob
from evf_sam_jax.evaluation.count import EvaluatedModel
from evf_sam_jax.evaluation.grouping import make_plan, steps
from evf_sam_jax.evaluation.job import evaluate_sets
from evf_sam_jax.evaluation.reading import Reader, Round
from evf_sam_jax.evaluation.splits import EvaluationSet
from evf_sam_jax.flops import count_flops
from evf_sam_jax.model_inputs import load_tokenizer, tower_images
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.evf_sam import EvfSamConfig, init_params
from evf_sam_jax.models.sam.config import SamConfig

HEIGHT, WIDTH = 480, 640
PHRASES = 8  # of an image that are decoded at a time
WORDS = ("red", "green", "blue", "circle", "square", "left", "right", "large", "small")


def model_config() -> EvfSamConfig:
    """Small enough for two cores: SAM ViT-B at a quarter of its frame, and the tiny encoder."""
    segmenter = dataclasses.replace(SamConfig.vit_b(), image_size=256, dtype="float32")
    return EvfSamConfig(Beit3Config.tiny(), segmenter)


def write_images(root: Path, images: int, phrases: int) -> EvaluationSet:
    """Photographs-sized noise as JPEG, each with so many phrases and targets."""
    rng = np.random.default_rng(0)
    annotated = []
    for i in range(images):
        small = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        Image.fromarray(small).resize((WIDTH, HEIGHT)).save(root / f"{i}.jpg")
        targets = []
        for k in range(phrases):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            top, left = rng.integers(0, HEIGHT - 60), rng.integers(0, WIDTH - 60)
            mask[top : top + 200, left : left + 150] = True
            phrase = " ".join(rng.choice(WORDS, 3))
            targets.append(Target(f"{i}/{k}", (phrase,), (encode_mask(mask),)))
        annotated.append(AnnotatedImage(f"made/{i}", f"{i}.jpg", HEIGHT, WIDTH, tuple(targets)))
    index = write_index(root / "index", annotated, {"name": "made", "split": "val"})
    source = IndexedSource(index, LooseFiles(root), ReadingRules(overlap="sum"))
    return EvaluationSet("made/val", source)


def make_reader(model: EvaluatedModel, one: EvaluationSet, batch_size: int) -> Reader:
    plan = make_plan([one], model.tokenizer, batch_size, phrases=PHRASES)
    return Reader(
        sets=(one,),
        steps=tuple(steps(plan.groups, model.devices)),
        tokenizer=model.tokenizer,
        devices=model.devices,
        batch_size=batch_size,
        images=tower_images(model.config),
    )


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """A step's arrays on the device, where putting them again does nothing.

    Attributes:
      encoded: arguments of `EvaluatedModel.encode`.
      encoder_image: of `decode`.
      sizes: of `count`.
      rounds: of each, the other arguments of `decode`, and of `count` for each square of pixels.
    """

    encoded: Any
    encoder_image: Any
    sizes: Any
    rounds: tuple[tuple[Any, tuple[Any, ...]], ...]


def put_on_device(model: EvaluatedModel, rounds: list[Round]) -> OnDevice:
    images = rounds[0].images
    assert images is not None
    encoder_image, sizes = model.put(images.encoder_image, images.sizes)
    found = OnDevice(
        encoded=model.put(images.sam_image, images.sizes[:, :2]),
        encoder_image=encoder_image,
        sizes=sizes,
        rounds=tuple(
            (
                model.put(one.text_ids, one.text_valid),
                tuple(model.put(*one.tile(n, images.ignore)) for n in range(one.tiles)),
            )
            for one in rounds
        ),
    )
    jax.block_until_ready(dataclasses.astuple(found))
    return found


def calls(model: EvaluatedModel, step: OnDevice) -> None:
    """All compiled calls of a step, waited for."""
    features = model.encode(*step.encoded)
    found = []
    for text, tiles in step.rounds:
        logits, iou = model.decode(features, step.encoder_image, *text)
        found.append((iou, [model.count(logits, step.sizes, *tile) for tile in tiles]))
    jax.block_until_ready(found)


def operations(model: EvaluatedModel, step: OnDevice) -> int:
    """In matrix products, of all compiled calls of a step."""
    features = model.encode(*step.encoded)
    found = count_flops(model.encode, *step.encoded)
    for text, tiles in step.rounds:
        found += count_flops(model.decode, features, step.encoder_image, *text)
        logits, _ = model.decode(features, step.encoder_image, *text)
        found += sum(count_flops(model.count, logits, step.sizes, *tile) for tile in tiles)
    return found


def rounds_of_first_step(reader: Reader) -> list[Round]:
    return [reader.read(place) for place in reader.rounds() if place[0] == 0]


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def calls_of_steps(model: EvaluatedModel, step: OnDevice, number: int) -> None:
    for _ in range(number):
        calls(model, step)


def whole_job(model: EvaluatedModel, one: EvaluationSet, batch_size: int, workdir: Path) -> None:
    """All that the job does with a model and a set; what it prints is not shown."""
    # The split has to be a known one; the sets that are evaluated are given.
    config = EvaluationJob("random", "shapes/val", batch_size=batch_size, phrases=PHRASES)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate_sets(config, [one], model, workdir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--phrases", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = model_config()
    tokenizer = load_tokenizer(SHAPES_TOKENIZER, config)
    params = init_params(config, jax.random.key(0))
    model = EvaluatedModel(config, params, tokenizer, "random", masks=True)
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        one = write_images(root / "data", options.images, options.phrases)
        reader = make_reader(model, one, options.batch_size)
        first = put_on_device(model, rounds_of_first_step(reader))
        calls(model, first)  # compiles
        whole_job(model, one, options.batch_size, root / "untimed")
        count, roof = operations(model, first), roofline.measure("float32")
        for repeat in range(options.repeats):
            number = len(reader.steps)
            alone.append(seconds_of(calls_of_steps, model, first, number) / number)
            job = seconds_of(whole_job, model, one, options.batch_size, root / f"run{repeat}")
            whole.append(job / number)
        by_phrases, counts = {}, {}
        for phrases in (1, 8, 16, 32):
            (root / f"data{phrases}").mkdir()
            some = write_images(root / f"data{phrases}", options.batch_size, phrases)
            reader = make_reader(model, some, options.batch_size)
            step = put_on_device(model, rounds_of_first_step(reader))
            calls(model, step)
            counts[phrases] = operations(model, step)
            found = [seconds_of(calls, model, step) for _ in range(5)]
            by_phrases[phrases] = statistics.median(found)
    print(environment.describe())
    print(f"float32: {roof}")
    print(
        f"{options.images} images of {WIDTH} x {HEIGHT} with {options.phrases} phrases, "
        f"{options.batch_size} images a step, {options.repeats} times by turns\n"
    )
    times = {"compiled calls alone": alone, "the whole job": whole}
    print_times(times, dict.fromkeys(times, count), roof)
    shares = [a / b for a, b in zip(alone, whole, strict=True)]
    print(
        f"\ncompiled calls / wall time of the job: median {statistics.median(shares):.1%} "
        f"({min(shares):.1%} to {max(shares):.1%})\n"
    )
    print(
        f"| phrases of an image | s of {options.batch_size} images | beside one phrase "
        "| operations beside one phrase |"
    )
    print("|---|---|---|---|")
    for phrases, seconds in by_phrases.items():
        beside, more = seconds / by_phrases[1], counts[phrases] / counts[1]
        print(f"| {phrases} | {seconds:.3f} | {beside:.2f} | {more:.2f} |")


if __name__ == "__main__":
    main()
