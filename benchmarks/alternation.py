"""Times ways of doing a thing in alternation, so that a busy machine slows both alike."""

import statistics
import time
from collections.abc import Callable, Mapping

from benchmarks import environment


def print_comparison(
    title: str,
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Runs each function `repeats` times by turns, and prints a table and ratios to the first.

    Args:
      before: what comes before each run, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(environment.describe())
    print(f"{title}, {repeats} runs in alternation\n")
    print("| | median s | min | max |\n|---|---|---|---|")
    for name, found in times.items():
        print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} |")
    print()
    (first, base), *others = times.items()
    for name, found in others:
        ratios = [b / a for a, b in zip(base, found, strict=True)]
        print(
            f"ratio {name} / {first}: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
