"""The flags of `--mode plan`, and a plan for people."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from evf_sam_jax.experiment import PaperRow
from evf_sam_jax.flops import peak_flops
from evf_sam_jax.plan import Device, StagePlan, plan_elsewhere
from evf_sam_jax.progress import STEPS_AHEAD

# Of a device's memory: for its runtime, for what is lost between blocks, and for what no count
# sees.
MARGIN = 0.1
# What JAX takes of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing.
GPU_FRACTION = 0.75
# Model FLOPs utilisation that the estimate of the time assumes.
ASSUMED_MFU = 0.4


def define_flags() -> None:
    """The flags that describe devices which need not be there."""
    flags.DEFINE_integer("devices", 0, "For --mode plan: how many devices there will be.")
    flags.DEFINE_float(
        "device_memory_gb", None, "For --mode plan: memory of each device, in 1e9 bytes."
    )
    flags.DEFINE_string(
        "device_kind", "", "For --mode plan: what JAX calls the device, such as 'NVIDIA L40S'."
    )
    flags.DEFINE_string(
        "tpu_topology",
        "",
        "For --mode plan, with libtpu installed: the slice of TPUs to compile for, such as "
        "v5e:4x4 or v5p:2x2x4, instead of --devices.",
    )
    flags.DEFINE_integer("tpu_slices", 1, "For --mode plan: how many such slices.")


def described_device() -> Device:
    """What the flags describe. Raises UserError if nothing can be like that."""
    options = flags.FLAGS
    memory = options.device_memory_gb
    return Device(
        count=options.devices,
        memory=None if memory is None else memory * 1e9,
        device_kind=options.device_kind,
        topology=options.tpu_topology,
        slices=options.tpu_slices,
    )


def print_plan(values: Mapping[str, Any], device: Device) -> None:
    """Prints what each stage of a config file's values would need on such devices.

    Nothing of JAX is started in this process.

    Raises:
      UserError: the config describes nothing that can be.
    """
    for plan in plan_elsewhere(values, device):
        print(plan_text(plan, device), end="\n\n")
        if row := values.get("paper"):
            print(paper_text(plan.parameters, PaperRow(**row)), end="\n\n")


def plan_text(plan: StagePlan, device: Device) -> str:
    """The plan of a stage for people, with the source of each figure."""
    data, fsdp = plan.mesh
    parts = f" in {plan.accumulate} parts" if plan.accumulate > 1 else ""
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
        *_compiled_memory(plan, device),
        "",
        _verdict(plan, device),
        "",
        f"model FLOPs: {plan.flops:.4g} a step, {plan.flops / plan.images:.4g} an image (jaxpr; "
        "what is recomputed does not count)",
        *_times(plan, device),
        *_traffic(plan, device),
    ]
    return "\n".join(lines)


def paper_text(parameters: Mapping[str, tuple[int, int]], row: PaperRow) -> str:
    """The paper's figures of what is planned, beside our number of parameters.

    Args:
      parameters: as of `StagePlan`.
    """
    scores = " / ".join("not available" if one is None else f"{one:.1f}" for one in row.ciou)
    lines = [f"the paper's {row.source}: cIoU of {row.sets} {scores}"]
    if row.parameters:
        counted = [
            trained + frozen
            for module, (trained, frozen) in parameters.items()
            if module.startswith(row.modules)
        ]
        of = f" of the {row.modules}" if row.modules else ""
        lines.append(f"its parameters{of}: {row.parameters}; ours: {sum(counted):,}")
        lines += [f"({row.note})"] if row.note else []
    return "\n".join(lines)


def _compiled_for(plan: StagePlan, device: Device) -> str:
    if not plan.for_tpus:
        return f"compiled for {plan.mesh[0] * plan.mesh[1]} virtual CPU devices"
    slices = f"{device.slices} slices of " if device.slices > 1 else ""
    return f"compiled for {slices}{device.topology} of {plan.device_kind}"


def _compiled_memory(plan: StagePlan, device: Device) -> list[str]:
    source = _compiled_for(plan, device)
    if plan.refused:
        return [f"{source}, which its compiler refuses: {plan.refused}"]
    title = "the same by XLA's CPU compiler, where bfloat16 is float32 and so takes too much:"
    if plan.for_tpus:
        title = "the same by TPU's compiler, for this very step:"
    return [
        title,
        _memory_row("state and one batch", plan.arguments, source),
        _memory_row("gradients and activations", plan.temporaries, source),
    ]


def _verdict(plan: StagePlan, device: Device) -> str:
    if plan.refused:
        return f"does not fit: {plan.refused}"
    needed = f"{plan.needed / 1e9:.3g} GB"
    if plan.for_tpus:
        needed += f" by TPU's compiler, with {STEPS_AHEAD} more batches on their way"
    if device.memory is None:
        if plan.for_tpus:
            return f"fits, since the compiler refuses what does not: {needed}"
        return f"needs {needed}, and of each device's memory {MARGIN:.0%} more as a margin"
    memory = device.memory / 1e9
    usable = memory * (1 - MARGIN)
    fits = plan.needed / 1e9 <= usable
    text = (
        f"{'fits' if fits else 'does not fit'}: {needed}, where a margin of {MARGIN:.0%} leaves "
        f"{usable:.3g} GB of {memory:g} GB"
    )
    if fits and not plan.for_tpus and plan.needed / 1e9 > GPU_FRACTION * memory:
        text += (
            f"\non a GPU, set XLA_PYTHON_CLIENT_MEM_FRACTION={1 - MARGIN / 2:g}: by itself JAX "
            f"takes {GPU_FRACTION:.0%} of the memory"
        )
    return text


def _times(plan: StagePlan, device: Device) -> list[str]:
    kind = device.device_kind or (plan.device_kind if plan.for_tpus else "")
    if not kind:
        return ["time: no --device_kind given"]
    peak = peak_flops(kind)
    if peak is None:
        return [f"time: the peak of {kind!r} is not known (evf_sam_jax/flops.py)"]
    least = plan.flops / (peak * plan.mesh[0] * plan.mesh[1])
    estimate = least / ASSUMED_MFU
    hours = estimate * plan.steps / 3600
    return [
        f"at least {least:.3g} s a step, at the peak of {kind} of {peak / 1e12:g}e12 a second",
        f"an estimate at {ASSUMED_MFU:.0%} of the peak, not measured: {estimate:.3g} s a step, "
        f"{plan.images / estimate:.3g} images a second, {hours:.3g} h for {plan.steps:,} steps",
    ]


def _traffic(plan: StagePlan, device: Device) -> list[str]:
    if plan.refused:
        return []
    title = (
        f"between devices, a step, of each ({_compiled_for(plan, device)} in "
        f"{plan.compile_seconds:.0f} s"
    )
    if plan.for_tpus:
        lines = ["", f"{title}):"]
    else:
        lines = [
            "",
            f"{title}; there, bfloat16 counts as",
            "float32, and what GPUs and TPUs reduce-scatter is an all-reduce):",
        ]
    sent = [
        f"  {kind:<20} {count:>7,} x, together {size / 1e6:>12,.1f} MB"
        for kind, (count, size) in plan.collectives.items()
    ]
    return lines + (sent or ["  nothing"])


def _gradients_name(plan: StagePlan) -> str:
    return "gradients" if plan.accumulate == 1 else "gradients, of a part and their sum"


def _count_row(name: str, *counts: int) -> str:
    return f"{name:<36} " + " ".join(f"{count:>15,}" for count in counts)


def _memory_row(name: str, size: int, source: str) -> str:
    return f"  {name:<44} {size / 1e6:>10,.1f}  {source}".rstrip()
