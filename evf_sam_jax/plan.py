"""What a training would need, before any device is there: memory, arithmetic, traffic, time.

    python -m evf_sam_jax.main --config configs/shapes.py --mode plan --devices 8 \\
        --device_memory_gb 48 --device_kind "NVIDIA L40S"

A process of its own lays the config's mesh over so many virtual CPU devices, and traces and
compiles each stage's step from shapes alone: it reads manifests of model directories, no
parameters and no data. With libtpu installed it compiles for a TPU slice itself, which need not be
there either:

    python -m evf_sam_jax.main --config configs/shapes.py --mode plan --tpu_topology v5e:2x4

Where each figure comes from:

    shapes     counted from the shapes of the state and their shardings
    jaxpr      counted from the step's equations, traced for the share of one device
    compiled   read off the program that XLA makes for the virtual CPU devices, or for the TPUs

Memory of a device, at its fullest, is what TPU's compiler says, and the batches on their way. Where
it compiled for CPUs it is taken to be

    parameters + optimizer state + moving average            as the mesh splits them
    + gradients                                              likewise, twice if parts add up
    + the batches that are in use or on their way            `STEPS_AHEAD` + 1
    + activations at their peak                              `activation_memory.peak_bytes`
"""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
from evf_sam_jax.model_dir import module_of, path_leaves
from evf_sam_jax.models.target import Target, compiled_for, target_of
from evf_sam_jax.param_rules import Params
from evf_sam_jax.progress import STEPS_AHEAD
from evf_sam_jax.sharding import (
    AXES,
    batch_sharding,
    bytes_per_device,
    make_mesh,
)
from evf_sam_jax.stage import Stage, make_stage
from evf_sam_jax.tpu_topology import ENVIRONMENT as TPU_ENVIRONMENT
from evf_sam_jax.tpu_topology import tpu_devices
from evf_sam_jax.training_data import batch_spec, open_features


@dataclasses.dataclass(frozen=True)
class Device:
    """A described device.

    Attributes:
      count: how many there are; 0 where a slice of TPUs says so.
      memory: in bytes; None: not given.
      device_kind: as JAX names it; "": not given.
      topology: a slice of TPUs to compile for, such as v5e:2x4; "": virtual CPU devices.
      slices: how many such slices.
    """

    count: int = 0
    memory: float | None = None
    device_kind: str = ""
    topology: str = ""
    slices: int = 1

    def __post_init__(self) -> None:
        if not self.topology and self.count < 1:
            raise UserError(f"--devices: expected how many there will be, found {self.count}")
        if self.topology and self.count:
            raise UserError(
                f"--devices: expected none beside --tpu_topology, which says how many there are, "
                f"found {self.count}"
            )
        if self.slices < 1 or (self.slices > 1 and not self.topology):
            raise UserError(
                f"--tpu_slices: expected 1 or more slices of a --tpu_topology, found {self.slices}"
            )
        if self.memory is not None and not self.memory > 0:
            found = f"{self.memory / 1e9:g}"
            raise UserError(f"--device_memory_gb: expected a positive number, found {found}")


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
      encoding: bytes at the peak of the frozen image encoder; None where it is trained, or where
        its features are read.
      flops: model FLOPs a step, all devices together.
      collectives: kind -> how many a step, and their bytes, as `collective_bytes` counts.
      device_kind: what was compiled for, as JAX names it: cpu, or one of TPUs.
      arguments: bytes of the compiled step's inputs.
      temporaries: bytes that the compiled step needs besides, there.
      compile_seconds: that compiling took.
      refused: what TPU's compiler said where the step does not fit; then the compiled figures
        are 0.
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
    device_kind: str
    arguments: int
    temporaries: int
    compile_seconds: float
    refused: str = ""

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
        """Bytes of a device at its fullest, as counted."""
        kept = sum(self.state.values())
        return kept + self.all_gradients + self.batches + self.activations

    @property
    def for_tpus(self) -> bool:
        """Whether the compiled figures are those of the devices that are meant."""
        return self.device_kind != "cpu"

    @property
    def needed(self) -> int:
        """Bytes of a device at its fullest, by the better source: TPU's compiler, if it took it."""
        if not self.for_tpus or self.refused:
            return self.total
        return self.arguments + self.temporaries + STEPS_AHEAD * self.batch


def plan_elsewhere(values: Mapping[str, Any], device: Device) -> list[StagePlan]:
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
            "JAX_NUM_CPU_DEVICES": str(max(1, device.count)),
            **(TPU_ENVIRONMENT if device.topology else {}),
        }
        command = [sys.executable, "-m", "evf_sam_jax.plan", str(request), str(answer)]
        command += [device.topology, str(device.slices)]
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


def plan_experiment(
    experiment: ExperimentConfig, devices: Sequence[Any] | None = None
) -> list[StagePlan]:
    """The plan of each stage, of which nothing runs.

    Args:
      devices: to compile for; None: those of this process.

    Raises:
      UserError: there is no such mesh, or the batch or the parameters cannot be split over it.
    """
    mesh = make_mesh(experiment.mesh, devices)
    stages = [make_stage(experiment, config, mesh) for config in experiment.stages]
    return [plan_stage(stage) for stage in stages]


def plan_stage(stage: Stage) -> StagePlan:
    """Counts, traces and compiles one stage, see the top of this file."""
    config, experiment, shapes = stage.config, stage.experiment, stage.shapes
    cached = open_features(experiment.data)
    layout = None if cached is None else cached.manifest.layout
    spec = batch_spec(experiment, config, config.batch_size, shrink=True, features=layout)
    batch = batch_shapes(spec, batch_sharding(stage.mesh))
    share = config.batch_size // (stage.mesh.size * config.accumulate)
    own = batch_shapes(dataclasses.replace(spec, batch_size=share))
    saved, peak, encoding = activation_bytes(
        experiment, config, shapes.trainable, shapes.frozen, own
    )
    compiled = compile_step(stage, batch)
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
        device_kind=stage.mesh.devices.flat[0].device_kind,
        **compiled,
    )


def compile_step(stage: Stage, batch: Batch) -> dict[str, Any]:
    """What can be read off a stage's compiled step: these fields of `StagePlan`."""
    begun = time.monotonic()
    refused = ""
    sent, arguments, temporaries = {}, 0, 0
    try:
        with jax.set_mesh(stage.mesh):
            compiled = stage.step().lower(stage.shapes, batch).compile()
        arguments, temporaries = program_bytes(compiled)
        sent = collective_bytes(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        refused = str(error).strip().splitlines()[0]
        if not refused.startswith("RESOURCE_EXHAUSTED"):
            raise
    return {
        "collectives": {kind: (one.count, one.bytes) for kind, one in sent.items() if one.count},
        "arguments": arguments,
        "temporaries": temporaries,
        "compile_seconds": time.monotonic() - begun,
        "refused": refused,
    }


def program_bytes(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Of each device: what a program is given, and what it takes beside that, results included."""
    memory = compiled.memory_analysis()
    assert memory is not None, "the compilers for CPUs and TPUs say what a program needs"
    # What is returned and takes no input's place is there beside the inputs.
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes + max(0, fresh)


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


def _from_json(values: Mapping[str, Any]) -> StagePlan:
    pairs = {
        key: {name: tuple(pair) for name, pair in values[key].items()}
        for key in ("parameters", "collectives")
    }
    sides = {key: tuple(values[key]) for key in ("mesh", "canvas")}
    return StagePlan(**{**values, **pairs, **sides})


def _answer(request: Path, answer: Path, topology: str, slices: int) -> None:
    """What the other process does."""
    try:
        experiment = experiment_from_dict(json.loads(request.read_text()))
        devices = tpu_devices(topology, slices) if topology else None
        # Virtual devices stand for accelerators, whose tiles they have, but not their kernels.
        target = Target("gpu", fused=False)
        with compiled_for(target_of(devices[0]) if devices else target):
            plans = plan_experiment(experiment, devices)
        stages = [dataclasses.asdict(plan) for plan in plans]
        answer.write_text(json.dumps({"stages": stages}))
    except UserError as error:
        answer.write_text(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
