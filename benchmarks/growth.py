"""How time and memory of a training step grow, as a figure: with images, phrases, size, devices.

    pip install matplotlib
    python -m benchmarks.growth --results runs/growth.json --figure benchmarks/growth.png

BEiT-3-B and SAM ViT-B in float32 on the embedded data set, images through the segmenter's encoder,
forward and backward pass and update. From 2 images of 2 phrases in frames of 256 pixels one number
is changed at a time; devices are virtual ones of this CPU, 8 images shared out among them with
parameters split over all (ZeRO-3), so their time shows overhead and no speed. BEiT-3 has 3 of its
12 layers there, since all devices are in this machine's memory; several are in a process of their
own, with more threads than cores. Memory is what the compiler reserves on a device: inputs, outputs
and temporaries. Points that the file of `--results` holds are not measured
again, so each machine needs a file of its own.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import environment, roofline
from benchmarks.cached_step import read_batch
from configs.refcoco import get_config
from data_pipelines.batch import Batch
from evf_sam_jax.experiment import experiment_from_dict
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.evf_sam import EvfSamConfig, Params, init_params, with_dtype
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.param_rules import merge
from evf_sam_jax.plan import program_bytes
from evf_sam_jax.sharding import MeshConfig, make_mesh, put_batch
from evf_sam_jax.stage import Stage, make_stage


@dataclasses.dataclass(frozen=True)
class Point:
    """What a step is given: images, phrases of each, side of a frame, BEiT-3's layers, devices."""

    images: int = 2
    phrases: int = 2
    frame: int = 256
    layers: int = 12
    devices: int = 1


AXES = {
    "images": [Point(images=n) for n in (1, 2, 4, 8)],
    "phrases": [Point(phrases=n) for n in (1, 2, 4, 8)],
    "frame": [Point(frame=n) for n in (256, 512, 768, 1024)],
    "devices": [Point(images=8, layers=3, devices=n) for n in (1, 2, 4, 8)],
}
LABELS = {
    "images": "images in a batch",
    "phrases": "phrases of an image",
    "frame": "side of the frame, pixels",
    "devices": "virtual devices, 8 images, 3 layers",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a step: median, smallest and largest seconds, GB on a device, 1e12 operations.

    Attributes:
      products: 1e12 operations a second of plain matrix products, before.
      memory: 1e9 bytes a second, likewise.
    """

    seconds: tuple[float, float, float]
    gigabytes: float
    operations: float
    products: float
    memory: float


def measure(point: Point, repeats: int) -> Cost:
    roof = roofline.measure("float32")
    stage = stage_of(point)
    batch = with_phrases(read_batch(stage.experiment, point.images, 1), point.phrases)
    places = merge(stage.placement.state.trainable, stage.placement.state.frozen)
    seconds = []
    with jax.set_mesh(stage.mesh):
        placed = put_batch(stage.mesh, batch, point.images)
        step = stage.step().lower(stage.shapes, placed).compile()
        # No step may write where these are kept for the next point.
        state = stage.create(jax.device_put(weights(stage.model), places, may_alias=False))
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, placed))
            seconds.append(time.perf_counter() - begin)
        assert np.isfinite(float(metrics.loss))
    seconds = seconds[1:]
    spread = statistics.median(seconds), min(seconds), max(seconds)
    return Cost(
        seconds=spread,
        gigabytes=sum(program_bytes(step)) / 1e9,
        operations=stage.flops(batch) / 1e12,
        products=roof.operations[0] / 1e12,
        memory=roof.bandwidth[0] / 1e9,
    )


@functools.lru_cache(maxsize=1)  # most points have the same model, and to draw takes a minute
def weights(model: EvfSamConfig) -> Params:
    """Random ones, on the host."""
    return jax.device_get(init_params(model, jax.random.key(0)))


def stage_of(point: Point) -> Stage:
    """The paper's stage with the smaller model, on so many devices."""
    config = experiment_from_dict(get_config("foundations=none,data=none").to_dict())
    segmenter = dataclasses.replace(SamConfig.vit_b(), image_size=point.frame, encoder_chunk=None)
    encoder = dataclasses.replace(Beit3Config.base(), layers=point.layers)
    model = with_dtype(EvfSamConfig(encoder, segmenter), "float32")
    config = dataclasses.replace(
        config,
        model=model,
        init=dataclasses.replace(config.init, frozen_dtype="float32"),
        mesh=MeshConfig(data=1, fsdp=point.devices, zero_stage=3),
        evaluation=dataclasses.replace(config.evaluation, batch_size=point.devices),
    )
    stage = dataclasses.replace(config.stages[0], batch_size=point.images, accumulate=1)
    config = dataclasses.replace(config, stages=(stage,))
    return make_stage(config, stage, make_mesh(config.mesh))


def with_phrases(batch: Batch, phrases: int) -> Batch:
    """The first phrase of each image as often as is wanted."""
    fields = ("text_ids", "text_valid", "phrase_valid", "mask")
    repeated = {name: np.repeat(getattr(batch, name), phrases, axis=1) for name in fields}
    return dataclasses.replace(batch, **repeated)


def in_a_process(points: Sequence[Point], repeats: int, **variables: str) -> Iterator[Cost]:
    """Measures points in a process with these variables, and gives each when it is there."""
    command = [sys.executable, "-m", "benchmarks.growth", f"--repeats={repeats}", "--child"]
    command += [json.dumps(dataclasses.asdict(point)) for point in points]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Cost(**json.loads(line))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def read_results(path: Path | None) -> dict[Point, Cost]:
    """What a file of `write_results` holds, nothing where there is none."""
    if path is None or not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {Point(**row["point"]): Cost(**row["cost"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"error: --results {path}: expected what this command has written, found {error!r}"
        ) from None


def write_results(path: Path, measured: dict[Point, Cost]) -> None:
    rows = [
        {"point": dataclasses.asdict(point), "cost": dataclasses.asdict(cost)}
        for point, cost in measured.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def draw(found: dict[str, list[tuple[int, Cost]]], figure: Path) -> None:
    """A column of two plots for each axis: seconds above, memory below."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(12, 5.5), layout="constrained")
    plots = canvas.subplots(2, len(found), sharey="row")
    for column, (axis, costs) in enumerate(found.items()):
        sizes = [size for size, _ in costs]
        middle = np.asarray([cost.seconds for _, cost in costs])
        errors = np.abs(middle[:, 1:] - middle[:, :1]).T
        above, below = plots[:, column]
        above.errorbar(sizes, middle[:, 0], yerr=errors, marker="o", capsize=3)
        below.plot(sizes, [cost.gigabytes for _, cost in costs], marker="o", color="tab:orange")
        below.set_xlabel(LABELS[axis])
        for plot in (above, below):
            plot.set_xticks(sizes)
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
    plots[0, 0].set_ylabel("seconds a step")
    plots[1, 0].set_ylabel("GB on a device")
    canvas.savefig(figure, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, help="JSON of what was measured, read and written")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", nargs="+", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figure: expected matplotlib, found that it is not installed")
    if options.child:
        points = [Point(**values) for values in options.child]
        jax.config.update("jax_num_cpu_devices", max(point.devices for point in points))
        for point in points:
            print(json.dumps(dataclasses.asdict(measure(point, options.repeats))), flush=True)
        return
    wanted = dict.fromkeys(point for axis in options.axes for point in AXES[axis])
    measured = read_results(options.results)
    missing = [point for point in wanted if point not in measured]
    one = [point for point in missing if point.devices == 1]
    several = [point for point in missing if point.devices > 1]
    # A collective of virtual devices blocks a thread of XLA's pool for each of them.
    costs = itertools.chain(
        in_a_process(one, options.repeats) if one else (),
        *(in_a_process([point], options.repeats, NPROC="64") for point in several),
    )
    for number, (point, cost) in enumerate(zip(one + several, costs, strict=True), 1):
        measured[point] = cost
        print(f"{number} of {len(missing)}: {point}", file=sys.stderr)
        if options.results:
            write_results(options.results, measured)
    print(environment.describe())
    sizes = " | ".join(field.name for field in dataclasses.fields(Point))
    print(
        f"\n| {sizes} | s a step | 1e12 operations | of matrix products | their 1e9/s "
        f"| memory, GB/s | GB |\n{'|---' * 11}|"
    )
    for point in wanted:
        cost = measured[point]
        middle, least, most = cost.seconds
        sizes = " | ".join(map(str, dataclasses.astuple(point)))
        print(
            f"| {sizes} | {middle:.2f} ({least:.2f} to {most:.2f}) | {cost.operations:.2f} "
            f"| {cost.operations / middle / cost.products:.0%} | {1e3 * cost.products:.0f} "
            f"| {cost.memory:.1f} | {cost.gigabytes:.2f} |"
        )
    if options.figure:
        axes = {
            axis: [(getattr(point, axis), measured[point]) for point in AXES[axis]]
            for axis in options.axes
        }
        draw(axes, options.figure)


if __name__ == "__main__":
    main()
