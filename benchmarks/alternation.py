"""Times ways of doing a thing in alternation, so that a busy machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks import environment, roofline


def print_comparison(
    title: str,
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[], object] = lambda: None,
    operations: Mapping[str, float] | None = None,
    dtype: str = "float32",
    packages: Sequence[str] = (),
) -> None:
    """Runs each function `repeats` times by turns, and prints a table and ratios to the first.

    Args:
      before: what comes before each run, and is not timed.
      operations: of each, in matrix products: the table has their rate beside that of plain matrix
        products on this device in `dtype`, measured before.
      packages: whose versions matter beside the usual ones.
    """
    roof = None if operations is None else roofline.measure(dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(environment.describe(*packages))
    if roof is not None:
        print(f"{dtype}: {roof}")
    print(f"{title}, {repeats} runs in alternation\n")
    print_times(times, operations, roof)


def print_times(
    times: Mapping[str, list[float]],
    operations: Mapping[str, float] | None = None,
    roof: roofline.Roofline | None = None,
) -> None:
    """Prints a table of seconds, and ratios to the first, run by run."""
    more = "" if roof is None else " 1e12 operations | 1e9/s | of matrix products |"
    print(f"| | median s | min | max |{more}\n|---|---|---|---|{'---|' * more.count(' |')}")
    for name, found in times.items():
        middle = statistics.median(found)
        row = f"| {name} | {middle:.3f} | {min(found):.3f} | {max(found):.3f} |"
        if operations is not None and roof is not None:
            rate = operations[name] / middle
            share = rate / roof.operations[0]
            row += f" {operations[name] / 1e12:.2f} | {rate / 1e9:.0f} | {share:.0%} |"
        print(row)
    print()
    (first, base), *others = times.items()
    for name, found in others:
        ratios = [b / a for a, b in zip(base, found, strict=True)]
        print(
            f"ratio {name} / {first}: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


def median_and_range(seconds: Sequence[float], decimals: int = 2) -> str:
    """Such as "1.23 (1.20 to 1.31)"."""
    found = (statistics.median(seconds), min(seconds), max(seconds))
    middle, least, most = (f"{each:.{decimals}f}" for each in found)
    return f"{middle} ({least} to {most})"
