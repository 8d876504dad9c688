"""Ways to attend to a square of tokens on this device, in alternation.

    python -m benchmarks.attention [--dtype bfloat16]

`models/attention.py` chooses among them: tiles with positions added; the same tiles with positions
folded into queries and keys; XLA's own attention with folded positions, scores kept whole; and the
kernels of an accelerator, where this is one. Each is compared with the first; operations are those
of queries with keys and of weights with values, without positions.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.alternation import print_comparison
from evf_sam_jax.models import fused_attention
from evf_sam_jax.models.attention import FLASH_WIDTH, attend_square, cudnn_width
from evf_sam_jax.models.target import Target, compiled_for, target_of


@dataclasses.dataclass(frozen=True)
class Case:
    """A square of tokens.

    Attributes:
      rows: heads of all images or windows.
      side: of the square.
      width: of a head.
      positions: whether relative positions are added.
    """

    rows: int
    side: int
    width: int
    positions: bool


CASES = {
    "ViT-H, whole frame": Case(16, 64, 80, True),
    "ViT-H, 25 windows": Case(25 * 16, 14, 80, True),
    "ViT-B, whole frame": Case(12, 64, 64, True),
    "EfficientSAM-S, whole frame": Case(6, 64, 64, False),
}


def operands(case: Case, dtype: str) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    tokens = case.side**2
    shapes = 3 * [(case.rows, tokens, case.width)]
    shapes += 2 * case.positions * [(case.rows, tokens, case.side)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def folded_tiles(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Tiles as a `fused_attention.Kernel`."""
    return attend_square(query, key, value, scale=1.0)


def ways(target: Target, case: Case, dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """What is compared, by name; what is usual on CPUs comes first."""
    scale = case.width**-0.5
    side = case.side if case.positions else 0
    xla = functools.partial(fused_attention.cudnn, implementation="xla")
    blocks = target.backend == "tpu" and fused_attention.flash_block(case.side**2) > 0
    eight, lanes = fused_attention.CUDNN_MULTIPLE, fused_attention.TPU_LANES
    # With the widest queries that each takes here. Without positions nothing is folded into tiles.
    kernels = (
        ("folded tiles", folded_tiles, eight, math.inf if case.positions else 0),
        ("folded, XLA's attention", xla, eight, math.inf),
        ("cudnn", fused_attention.cudnn, eight, cudnn_width(target) if dtype != "float32" else 0),
        ("flash", fused_attention.flash, lanes, FLASH_WIDTH if blocks else 0),
    )
    found: dict[str, Callable[..., jax.Array]] = {
        "tiles": functools.partial(attend_square, scale=scale)
    }
    for name, kernel, multiple, widest in kernels:
        if fused_attention.folded_width(case.width, side, multiple) <= widest:
            found[name] = functools.partial(
                fused_attention.attend_fused, kernel, scale=scale, multiple=multiple
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    target = target_of(jax.local_devices()[0])
    for title, case in CASES.items():
        print(f"\n## {title}, {options.dtype}\n")
        with compiled_for(dataclasses.replace(target, fused=False)):
            compare(title, case, ways(target, case, options.dtype), options)


def compare(
    title: str,
    case: Case,
    attends: dict[str, Callable[..., jax.Array]],
    options: argparse.Namespace,
) -> None:
    given = operands(case, options.dtype)
    runs: dict[str, Callable[[], object]] = {}
    exact: np.ndarray | None = None
    for name, attend in attends.items():
        compiled = jax.jit(attend).lower(*given).compile()
        context = np.asarray(compiled(*given), np.float32)
        exact = context if exact is None else exact
        print(f"{name}: differs from the first by {np.abs(context - exact).max():.1e}")

        def run(compiled: Callable[..., jax.Array] = compiled) -> jax.Array:
            return jax.block_until_ready(compiled(*given))

        runs[name] = run
    print_comparison(
        title,
        runs,
        options.repeats,
        operations=dict.fromkeys(runs, 4 * case.rows * case.side**4 * case.width),
        dtype=options.dtype,
    )


if __name__ == "__main__":
    main()
