"""What this device can do at most: its rate of matrix products and its memory bandwidth, measured.

    python -m benchmarks.roofline [--dtype bfloat16]

Beside them, other benchmarks say how near they come: a program of `operations` that moves `bytes`
takes at least operations / rate and bytes / bandwidth.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import environment
from evf_sam_jax.models.layers import matmul_precision

# Sides of the matrices, and elements of the array that is copied: far more than caches hold.
SIDES = {"cpu": 2048}
ELEMENTS = {"cpu": 2**26}
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Medians, with the smallest and largest: operations a second, and bytes a second."""

    operations: tuple[float, float, float]
    bandwidth: tuple[float, float, float]

    def __str__(self) -> str:
        (rate, *rates), (band, *bands) = self.operations, self.bandwidth
        return (
            f"matrix products at {rate / 1e9:.0f}e9 operations/s "
            f"({rates[0] / 1e9:.0f} to {rates[1] / 1e9:.0f}), "
            f"memory at {band / 1e9:.1f} GB/s ({bands[0] / 1e9:.1f} to {bands[1] / 1e9:.1f})"
        )


def measure(dtype: str) -> Roofline:
    """Multiplies two square matrices, and adds 1 to an array, which is read and written."""
    backend = jax.default_backend()
    side, elements = SIDES.get(backend, 8192), ELEMENTS.get(backend, 2**28)
    rng = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), dtype) for key in rng)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=matmul_precision(dtype)))
    array = jax.random.normal(rng[0], (elements,), jnp.float32)
    plus_one = jax.jit(lambda x: x + 1)
    return Roofline(
        rates(lambda: product(a, b), 2 * side**3),
        rates(lambda: plus_one(array), 2 * array.nbytes),
    )


def rates(run: Callable[[], jax.Array], amount: float) -> tuple[float, float, float]:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    found = [amount / each for each in seconds]
    return statistics.median(found), min(found), max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    print(environment.describe())
    print(f"{options.dtype}: {measure(options.dtype)}")


if __name__ == "__main__":
    main()
