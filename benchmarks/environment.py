"""What a measured number depends on: the device, its cores, the load, and the versions."""

import importlib.metadata
import os
import platform

import jax


def describe(*packages: str) -> str:
    """Returns one line for a results table."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    names = ("jax", "jaxlib", "flax", "torch", *packages)
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    load = f"load {os.getloadavg()[0]:.1f}"
    return (
        f"{device.device_kind}, {cores} cores ({platform.machine()}), {load}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )
