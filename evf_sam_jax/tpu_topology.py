"""Devices of a TPU slice that is not there, for which libtpu compiles on any machine."""

import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from evf_sam_jax.errors import UserError

# What libtpu would otherwise ask the machine for, which here is none of the slice: how the machine
# is called, and what it is. The lock is for those who take the chips.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices to lay a mesh over and to compile for, on which nothing can run.

    Args:
      name: generation and sides of a slice as libtpu has them, such as v5e:4x4 or v5p:2x2x4.
      slices: how many such slices there are.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--tpu_topology: expected libtpu, which compiles for TPUs without any, found none "
            '(pip install "jax[tpu]")'
        )
    options: dict[str, Any] = {"num_slices": slices}
    if name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # as JAX runs: both cores of a chip are one device
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--tpu_topology: expected a slice that libtpu knows, such as v5e:4x4 or v5p:2x2x4, "
            f"found {name!r} ({reason})"
        ) from None
