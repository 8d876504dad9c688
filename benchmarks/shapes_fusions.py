"""The three fusions on the embedded data set, each trained from nothing: scores and wall time.

    python -m benchmarks.shapes_fusions --out runs/fusions [--fusions early late]

Each is the command that the README gives, run one after another.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import environment

FUSIONS = ("text", "late", "early")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=FUSIONS)
    options = parser.parse_args()
    print(environment.describe(), flush=True)
    print("\n| fusion | pretrain cIoU | referring cIoU | gIoU | seconds |\n|---|---|---|---|---|")
    for fusion in options.fusions:
        workdir = options.out / fusion
        start = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                "-m",
                "evf_sam_jax.main",
                f"--config=configs/shapes.py:fusion={fusion}",
                f"--workdir={workdir}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        found: dict[str, float] = {}
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            found |= json.loads(line)
        scores = [
            found[key] for key in ("pretrain/val_ciou", "referring/val_ciou", "referring/val_giou")
        ]
        columns = " | ".join(f"{score:.3f}" for score in scores)
        print(f"| {fusion} | {columns} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
