"""How long SAM's image encoders take to compile, from nothing and from what was compiled before.

    python -m benchmarks.compile_time

Each is traced, lowered and compiled in a process of its own, first with an empty directory of
compiled programs, then with what the one before has left there. Layers are scanned, so that the
deepest takes little longer than the shallowest.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import environment
from benchmarks.alternation import median_and_range
from evf_sam_jax.compilation_cache import WORTH_KEEPING
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.sam.config import SamConfig

SIZES = ("vit_b", "vit_l", "vit_h")


def compile_once(size: str, dtype: str, cache: str) -> dict[str, float]:
    """Seconds of each step, in this process."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    segmenter = dataclasses.replace(getattr(SamConfig, size)(), dtype=dtype)
    config = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), segmenter=segmenter)
    params = {"segmenter": evf_sam.param_shapes(config)["segmenter"]}
    image = jax.ShapeDtypeStruct((1, segmenter.image_size, segmenter.image_size, 3), jnp.uint8)
    sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    begin = time.perf_counter()
    lowered = jax.jit(evf_sam.encode_image, static_argnums=0).lower(config, params, image, sizes)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace": traced - begin, "compile": time.perf_counter() - traced}


def in_a_process(size: str, dtype: str, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", size, dtype, cache]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compile_once(*options.child)))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        for size in SIZES:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("from nothing", "from the cache"):
                    seconds = in_a_process(size, options.dtype, cache)
                    found.setdefault((size, state), []).append(seconds)
    print(environment.describe())
    print(f"{options.dtype}, median seconds of {options.repeats} processes (smallest to largest)\n")
    print("| encoder | | trace and lower | compile |\n|---|---|---|---|")
    for (size, state), seconds in found.items():
        columns = [
            median_and_range([one[step] for one in seconds], decimals=1)
            for step in ("trace", "compile")
        ]
        print(f"| {size} | {state} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
