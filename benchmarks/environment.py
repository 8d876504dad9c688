"""What a measured number depends on, and the memory that it took."""

import importlib.metadata
import os
import platform
import resource

import jax

GLIBC_TUNABLES = "GLIBC_TUNABLES"  # see keep_memory.sh


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
    if GLIBC_TUNABLES in os.environ:
        versions.append(f"{GLIBC_TUNABLES}={os.environ[GLIBC_TUNABLES]}")
    load = f"load {os.getloadavg()[0]:.1f}"
    return (
        f"{device.device_kind}, {cores} cores ({platform.machine()}), {load}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def peak_memory() -> str:
    """The most memory that this process has held so far, such as "12.3 GiB"."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"  # KiB on Linux
