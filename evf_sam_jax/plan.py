"""What a training would need, before any device is there: memory, arithmetic, traffic, time.

    python -m evf_sam_jax.main --config configs/shapes.py --mode plan --devices 8 \\
        --device_memory_gb 48 --device_kind "NVIDIA L40S"

A process of its own lays the config's mesh over so many virtual CPU devices, and traces and
compiles each stage's step from shapes alone: it reads manifests of model directories, no
parameters and no data. Where each figure comes from:

    shapes     counted from the shapes of the state and their shardings
    jaxpr      counted from the step's equations, traced for the share of one device
    compiled   read off the program that XLA makes for the virtual CPU devices

Memory of a device, at its fullest, is taken to be

    parameters + optimizer state + moving average            as the mesh splits them
    + gradients                                              likewise, twice if parts add up
    + the batches that are in use or on their way            `STEPS_AHEAD` + 1
    + activations at their peak                              `activation_memory.peak_bytes`
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.activation_memory import NAMED_RESIDUALS, activation_bytes
from evf_sam_jax.collectives import collective_bytes
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import (
    ExperimentConfig,
    experiment_from_dict,
)
from evf_sam_jax.flops import PEAK_FLOPS
from evf_sam_jax.model_dir import module_of, path_leaves
from evf_sam_jax.models import attention
from evf_sam_jax.param_rules import Params
from evf_sam_jax.progress import STEPS_AHEAD
from evf_sam_jax.sharding import (
    AXES,
    batch_sharding,
    bytes_per_device,
    make_mesh,
)
from evf_sam_jax.stage import Stage, make_stage
from evf_sam_jax.training_data import batch_spec

# Of a device's memory: for its runtime, for what is lost between blocks, and for what no count
# sees.
MARGIN = 0.1
# What JAX takes of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing.
GPU_FRACTION = 0.75
# Model FLOPs utilisation that the estimate of the time assumes.
ASSUMED_MFU = 0.4


@dataclasses.dataclass(frozen=True)
class Device:
    """A described device.

    Attributes:
      memory: in bytes; None: not given.
      device_kind: as JAX names it; "": not given.
    """

    count: int
    memory: float | None = None
    device_kind: str = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"--devices: expected how many there will be, found {self.count}")
        if self.memory is not None and not self.memory > 0:
            found = f"{self.memory / 1e9:g}"
            raise UserError(f"--device_memory_gb: expected a positive number, found {found}")

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 operations a second of one; None where unknown."""
        kind = self.device_kind
        return next((peak for pattern, peak in PEAK_FLOPS if re.fullmatch(pattern, kind)), None)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage needs; bytes are those of each device.

    Attributes:
      mesh: sizes of the axes `data` and `fsdp`.
      images: a step, over all devices and parts.
      share: images that a device has in each of the `accumulate` parts.
      parameters: module -> how many are trained, and how many frozen.
      state: kind of state -> bytes.
      gradients: bytes where the step leaves them, before the optimizer.
      batch: bytes of one batch.
      activations: bytes at their peak, see `peak_bytes`.
      saved: bytes kept from the forward to the backward pass, see `saved_bytes`.
      largest_saved: the largest of these by dtype and shape -> bytes.
      encoding: bytes at the peak of the frozen image encoder; None where it is trained.
      flops: model FLOPs a step, all devices together.
      collectives: kind -> how many a step, and their bytes, as `collective_bytes` counts.
      arguments: bytes of the compiled step's inputs.
      temporaries: bytes that the compiled step needs besides, on a CPU.
      compile_seconds: that compiling took.
    """

    name: str
    steps: int
    mesh: tuple[int, int]
    zero_stage: int
    images: int
    accumulate: int
    share: int
    phrases: int
    text_length: int
    canvas: tuple[int, int]
    parameters: dict[str, tuple[int, int]]
    state: dict[str, int]
    gradients: int
    batch: int
    activations: int
    saved: int
    largest_saved: dict[str, int]
    encoding: int | None
    flops: int
    collectives: dict[str, tuple[int, int]]
    arguments: int
    temporaries: int
    compile_seconds: float

    @property
    def all_gradients(self) -> int:
        """Bytes of the gradients, and of their sum where parts add up."""
        return self.gradients * (1 if self.accumulate == 1 else 2)

    @property
    def batches(self) -> int:
        """Bytes of the batches that are in use or on their way."""
        return self.batch * (STEPS_AHEAD + 1)

    @property
    def total(self) -> int:
        """Bytes of a device at its fullest."""
        kept = sum(self.state.values())
        return kept + self.all_gradients + self.batches + self.activations


def define_flags() -> None:
    """The flags that describe devices which need not be there."""
    flags.DEFINE_integer("devices", 0, "For --mode plan: how many devices there will be.")
    flags.DEFINE_float(
        "device_memory_gb", None, "For --mode plan: memory of each device, in 1e9 bytes."
    )
    flags.DEFINE_string(
        "device_kind", "", "For --mode plan: what JAX calls the device, such as 'NVIDIA L40S'."
    )


def print_plan(
    values: Mapping[str, Any], devices: int, memory_gb: float | None, device_kind: str
) -> None:
    """Prints what each stage of a config file's values would need on such devices.

    Nothing of JAX is started in this process.

    Raises:
      UserError: the flags or the config describe nothing that can be.
    """
    memory = None if memory_gb is None else memory_gb * 1e9
    device = Device(devices, memory, device_kind)
    for plan in plan_elsewhere(values, device.count):
        print(plan_text(plan, device), end="\n\n")


def plan_elsewhere(values: Mapping[str, Any], devices: int) -> list[StagePlan]:
    """The plan of each stage, made by another process that has so many virtual CPU devices.

    Raises:
      UserError: as `plan_experiment`, or the process did not survive.
    """
    with tempfile.TemporaryDirectory(prefix="evf_sam_plan_") as folder:
        request, answer = Path(folder) / "config.json", Path(folder) / "plan.json"
        request.write_text(json.dumps(values))
        environment = {
            # An accelerator's flags mean nothing to a CPU, and their number of devices less.
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's warnings are about its work, not about the plan
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        command = [sys.executable, "-m", "evf_sam_jax.plan", str(request), str(answer)]
        code = subprocess.run(command, env=environment).returncode
        if code or not answer.exists():
            raise UserError(
                f"--mode plan: expected the process that compiles to end well, found exit code "
                f"{code}; -9 is a machine without enough memory"
            )
        found = json.loads(answer.read_text())
    if "error" in found:
        raise UserError(found["error"])
    return [_from_json(stage) for stage in found["stages"]]


def plan_experiment(experiment: ExperimentConfig) -> list[StagePlan]:
    """The plan of each stage on the devices of this process, on which nothing runs.

    Raises:
      UserError: there is no such mesh, or the batch or the parameters cannot be split over it.
    """
    mesh = make_mesh(experiment.mesh)
    stages = [make_stage(experiment, config, mesh) for config in experiment.stages]
    return [plan_stage(stage) for stage in stages]


def plan_stage(stage: Stage) -> StagePlan:
    """Counts, traces and compiles one stage, see the top of this file."""
    config, experiment, shapes = stage.config, stage.experiment, stage.shapes
    spec = batch_spec(experiment, config, config.batch_size, shrink=True)
    batch = batch_shapes(spec, batch_sharding(stage.mesh))
    share = config.batch_size // (stage.mesh.size * config.accumulate)
    own = batch_shapes(dataclasses.replace(spec, batch_size=share))
    saved, peak, encoding = activation_bytes(
        experiment, config, shapes.trainable, shapes.frozen, own
    )
    begun = time.monotonic()
    with jax.set_mesh(stage.mesh):
        compiled = stage.step().lower(shapes, batch).compile()
    seconds = time.monotonic() - begun
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA's CPU compiler says what it needs"
    sent = collective_bytes(compiled.as_text() or "")
    return StagePlan(
        name=config.name,
        steps=config.steps,
        mesh=(stage.mesh.shape[AXES[0]], stage.mesh.shape[AXES[1]]),
        zero_stage=experiment.mesh.zero_stage,
        images=config.batch_size,
        accumulate=config.accumulate,
        share=share,
        phrases=spec.phrases,
        text_length=spec.text_length,
        canvas=spec.canvas,
        parameters=parameter_counts(shapes.trainable, shapes.frozen),
        state=state_bytes(stage),
        gradients=bytes_per_device(shapes.trainable, stage.placement.gradients),
        batch=bytes_per_device(batch, jax.tree.map(lambda leaf: leaf.sharding, batch)),
        activations=peak,
        saved=sum(saved.values()),
        largest_saved=dict(saved.most_common(NAMED_RESIDUALS)),
        encoding=encoding,
        flops=stage.flops(batch),
        collectives={kind: (one.count, one.bytes) for kind, one in sent.items() if one.count},
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        compile_seconds=seconds,
    )


def batch_shapes(spec: BatchSpec, sharding: Any = None) -> Batch:
    """A batch of `jax.ShapeDtypeStruct`s."""
    row = assemble([Slot(None)], spec, load_tokenizer(SHAPES_TOKENIZER))  # padding needs no words

    def shape(field: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (spec.batch_size, *field.shape[1:]), field.dtype, sharding=sharding
        )

    return jax.tree.map(shape, row)


def state_bytes(stage: Stage) -> dict[str, int]:
    """Kind of state -> bytes of it on each device."""
    shapes, places = stage.shapes, stage.placement.state
    return {
        "parameters, trained": bytes_per_device(shapes.trainable, places.trainable),
        "parameters, frozen": bytes_per_device(shapes.frozen, places.frozen),
        "optimizer state": bytes_per_device(shapes.opt_state, places.opt_state),
        "moving average": bytes_per_device(shapes.ema, places.ema),
    }


def parameter_counts(trainable: Params, frozen: Params) -> dict[str, tuple[int, int]]:
    """Module -> how many parameters of it are trained, and how many frozen."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for column, tree in enumerate((trainable, frozen)):
        for path, leaf in path_leaves(tree).items():
            counts[module_of(path)][column] += leaf.size
    return {module: (counts[module][0], counts[module][1]) for module in sorted(counts)}


def plan_text(plan: StagePlan, device: Device) -> str:
    """The plan of a stage for people, with the source of each figure."""
    data, fsdp = plan.mesh
    parts = f" in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    compiled = f"compiled for {data * fsdp} virtual CPU devices"
    lines = [
        f"stage {plan.name}: mesh {data}x{fsdp} (data x fsdp), ZeRO stage {plan.zero_stage}; "
        f"{plan.images} images a step{parts}, {plan.share} at a time on each device",
        f"largest batch: {plan.phrases} phrases of {plan.text_length} tokens an image, canvas "
        f"{plan.canvas[0]} x {plan.canvas[1]}",
        "",
        f"{'parameters (shapes)':<36} {'trained':>15} {'frozen':>15}",
        *(_count_row(f"  {name}", *counts) for name, counts in plan.parameters.items()),
        _count_row("  total", *map(sum, zip(*plan.parameters.values(), strict=True))),
        "",
        f"{'memory of each device':<46} {'MB':>10}  from",
        *(_memory_row(name, size, "shapes") for name, size in plan.state.items()),
        _memory_row(_gradients_name(plan), plan.all_gradients, "shapes"),
        _memory_row(f"{STEPS_AHEAD + 1} batches, in use or on their way", plan.batches, "shapes"),
        _memory_row("activations at their peak", plan.activations, "jaxpr, nothing fused"),
        _memory_row("sum", plan.total, ""),
        "of the activations:",
        _memory_row("kept for the backward pass", plan.saved, "jaxpr, the exact residuals"),
        *(_memory_row(f"  {name}", size, "jaxpr") for name, size in plan.largest_saved.items()),
    ]
    if plan.encoding is not None:
        lines.append(
            _memory_row("peak of the frozen image encoder", plan.encoding, "jaxpr, of one chunk")
        )
    lines += [
        "the same by XLA's CPU compiler, where bfloat16 is float32 and so takes too much:",
        _memory_row("state and one batch", plan.arguments, compiled),
        _memory_row("gradients and activations", plan.temporaries, compiled),
        "",
        _verdict(plan, device),
        "",
        f"model FLOPs: {plan.flops:.4g} a step, {plan.flops / plan.images:.4g} an image (jaxpr; "
        "what is recomputed does not count)",
        *_times(plan, device),
        "",
        f"between devices, a step, of each ({compiled} in {plan.compile_seconds:.0f} s; there, "
        "bfloat16 counts as",
        "float32, and what GPUs and TPUs reduce-scatter is an all-reduce):",
        *(
            f"  {kind:<20} {count:>7,} x, together {size / 1e6:>12,.1f} MB"
            for kind, (count, size) in plan.collectives.items()
        ),
    ]
    return "\n".join(lines if plan.collectives else [*lines, "  nothing"])


def _verdict(plan: StagePlan, device: Device) -> str:
    needed = plan.total / 1e9
    if device.memory is None:
        return f"needs {needed:.3g} GB, and of each device's memory {MARGIN:.0%} more as a margin"
    memory = device.memory / 1e9
    usable = memory * (1 - MARGIN)
    verdict = "fits" if needed <= usable else "does not fit"
    text = (
        f"{verdict}: {needed:.3g} GB, where a margin of {MARGIN:.0%} leaves {usable:.3g} GB of "
        f"{memory:g} GB"
    )
    if verdict == "fits" and needed > GPU_FRACTION * memory:
        text += (
            f"\non a GPU, set XLA_PYTHON_CLIENT_MEM_FRACTION={1 - MARGIN / 2:g}: by itself JAX "
            f"takes {GPU_FRACTION:.0%} of the memory"
        )
    return text


def _times(plan: StagePlan, device: Device) -> list[str]:
    if not device.device_kind:
        return ["time: no --device_kind given"]
    if device.peak_flops is None:
        return [f"time: the peak of {device.device_kind!r} is not known (evf_sam_jax/flops.py)"]
    least = plan.flops / (device.peak_flops * plan.mesh[0] * plan.mesh[1])
    estimate = least / ASSUMED_MFU
    hours = estimate * plan.steps / 3600
    return [
        f"at least {least:.3g} s a step, at the peak of {device.device_kind} of "
        f"{device.peak_flops / 1e12:g}e12 a second",
        f"an estimate at {ASSUMED_MFU:.0%} of the peak, not measured: {estimate:.3g} s a step, "
        f"{plan.images / estimate:.3g} images a second, {hours:.3g} h for {plan.steps:,} steps",
    ]


def _gradients_name(plan: StagePlan) -> str:
    return "gradients" if plan.accumulate == 1 else "gradients, of a part and their sum"


def _count_row(name: str, *counts: int) -> str:
    return f"{name:<36} " + " ".join(f"{count:>15,}" for count in counts)


def _memory_row(name: str, size: int, source: str) -> str:
    return f"  {name:<44} {size / 1e6:>10,.1f}  {source}".rstrip()


def _from_json(values: Mapping[str, Any]) -> StagePlan:
    pairs = {
        key: {name: tuple(pair) for name, pair in values[key].items()}
        for key in ("parameters", "collectives")
    }
    sides = {key: tuple(values[key]) for key in ("mesh", "canvas")}
    return StagePlan(**{**values, **pairs, **sides})


def _answer(request: Path, answer: Path) -> None:
    """What the other process does."""
    # Tiles of attention as accelerators have them, since those are what is planned for.
    attention.TILE_SCORES["cpu"] = attention.TILE_SCORES["gpu"]
    try:
        experiment = experiment_from_dict(json.loads(request.read_text()))
        stages = [dataclasses.asdict(plan) for plan in plan_experiment(experiment)]
        answer.write_text(json.dumps({"stages": stages}))
    except UserError as error:
        answer.write_text(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
