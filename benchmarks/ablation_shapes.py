"""The paper's comparisons on the embedded data set, each row trained with three seeds.

    python -m benchmarks.ablation_shapes --out runs/ablation

Fusion (the paper's Table 3), read-out (Table 5) and trainable modules (Table 4), in a small size of
configs/shapes.py, whose arguments a row consists of. The paper's encoder and segmenter are
pre-trained, these are not, and a mask decoder that is trained can fuse text and image by itself.
So there are three settings, which were written down before the first run and are all reported:

    decoder_trained   The segmenter is pre-trained on clicks and boxes, once a seed, and its image
                      encoder frozen then. Encoder, projector and mask decoder learn from phrases,
                      as in the released model. All three tables.
    decoder_frozen    The same, but the mask decoder stays as clicks and boxes have left it: what it
                      is told has to say where. Fusion and read-out.
    from_nothing      Nothing is pre-trained: the segmenter, its image encoder included, learns from
                      phrases together with all the rest. All three tables.

(A decoder that is neither pre-trained nor trained makes no masks, so there is no fourth.) In the
row of Table 4 whose decoder is frozen, `from_nothing` freezes a random one, and shows just that.

Three more are controls, added after the first results, which differ from the paper's order:

    encoder_frozen    As decoder_trained, but of the encoder only a projection of its random
                      features is learnt. What it scores the mask decoder has made of words alone.
    longer            As decoder_frozen, for four times as many steps: whether an encoder that has
                      to say where needs them.
    longer_trained    As decoder_trained, for four times as many steps: whether what reads the words
                      is ahead only while what reads the image too has yet to learn.

"fusion, both with text and image CLS concatenated" compares rows of two tables once more, since by
default late fusion reads out more than early fusion does.

The result of a row is the cIoU on held-out images at the end. The seed decides parameters and order
of the data; rows of one seed see the same batches, and begin with the same segmenter. So rows are
compared seed by seed: a difference counts where it has the same sign with every seed.

A row that is finished is not run again, one that was interrupted goes on; of that one, CPU seconds
are those of the last go. Each is a process whose products have one thread, as many at a time as
there are cores. benchmarks/ablation_shapes.json has the results of the runs that
benchmarks/RESULTS.md shows:

    python -m benchmarks.ablation_shapes --out runs --results benchmarks/ablation_shapes.json
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment

SEEDS = (0, 1, 2)
# Of a run, whose steps are tiny: a product is not shared out, and glibc keeps the memory of a step
# for the next, instead of giving it back.
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}
PRETRAIN_STEPS = 600
STEPS = 600


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
      arguments: of configs/shapes.py.
      paper: cIoU on RefCOCO testA; None: not available.
    """

    name: str
    arguments: str
    paper: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that the paper compares.

    Attributes:
      claims: (worse row, better row), as the paper says.
    """

    name: str
    rows: tuple[Row, ...]
    claims: tuple[tuple[str, str], ...]


FUSION = Table(
    "fusion (Table 3, BEiT-3-L)",
    (
        Row("text only", "fusion=text", 65.1),
        Row("late", "fusion=late", 70.2),
        Row("early in the first half of the layers", "early_layers=2", 82.2),
        Row("early", "", 83.7),
    ),
    (
        ("text only", "late"),
        ("late", "early in the first half of the layers"),
        ("early in the first half of the layers", "early"),
    ),
)
READOUT = Table(
    "read-out (Table 5, early fusion)",
    (
        Row("text CLS", "readout=text_cls"),
        Row("image CLS", ""),
        Row("mean of image tokens", "readout=image_mean"),
        Row("text and image CLS concatenated", "readout=concat"),
    ),
    (
        ("text CLS", "image CLS"),
        ("mean of image tokens", "image CLS"),
        ("text and image CLS concatenated", "image CLS"),
    ),
)
# Late fusion reads out a concatenation, early fusion image CLS: what of their difference is fusion?
SAME_READOUT = Table(
    "fusion, both with text and image CLS concatenated",
    (Row("late", "fusion=late"), Row("early", "readout=concat")),
    (("late", "early"),),
)
MODULES = Table(
    "trained modules (Table 4)",
    (
        Row("mask decoder", "train_encoder=false,train_prompt_encoder=false", 21.2),
        Row("encoder", "train_mask_decoder=false,train_prompt_encoder=false", 82.9),
        Row("encoder, mask decoder", "train_prompt_encoder=false", 83.3),
        Row("encoder, mask decoder, prompt encoder", "", 83.7),
    ),
    (
        ("mask decoder", "encoder"),
        ("encoder", "encoder, mask decoder"),
        ("encoder, mask decoder", "encoder, mask decoder, prompt encoder"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How all rows of some tables are trained.

    Attributes:
      arguments: of configs/shapes.py, beside those of a row.
      steps: on phrases.
    """

    name: str
    arguments: str
    tables: tuple[Table, ...]
    steps: int = STEPS


def part(table: Table, *names: str) -> Table:
    """A table of these rows, which are compared in this order."""
    rows = tuple(row for name in names for row in table.rows if row.name == name)
    return Table(table.name, rows, tuple(itertools.pairwise(names)))


_DECODER_FROZEN = "train_mask_decoder=false,train_prompt_encoder=false"
SETTINGS = (
    Setting("decoder_trained", "", (FUSION, SAME_READOUT, READOUT, MODULES)),
    Setting("decoder_frozen", _DECODER_FROZEN, (FUSION, SAME_READOUT, READOUT)),
    Setting("from_nothing", "pretrain_steps=0", (FUSION, SAME_READOUT, READOUT, MODULES)),
)
_WORDS_OR_IMAGE = (
    part(FUSION, "text only", "early"),
    part(READOUT, "text CLS", "image CLS"),
)
CONTROLS = (
    Setting("encoder_frozen", "train_encoder=false", (part(FUSION, "text only", "early"), READOUT)),
    Setting("longer", _DECODER_FROZEN, _WORDS_OR_IMAGE, steps=4 * STEPS),
    Setting("longer_trained", "", _WORDS_OR_IMAGE, steps=4 * STEPS),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its directory under `--out`, and the arguments of configs/shapes.py."""

    name: str
    seed: int
    arguments: str

    @property
    def directory(self) -> str:
        return f"{self.name}/seed_{self.seed}"


def pretraining(seed: int) -> Run:
    """The segmenter that the runs of a seed begin with."""
    return Run("pretrain", seed, f"size=small,seed={seed},steps=0,pretrain_steps={PRETRAIN_STEPS}")


def run_of(setting: Setting, row: Row, seed: int, out: Path) -> Run:
    """The run of a row; rows of several tables may share one."""
    own = sorted(filter(None, f"{setting.arguments},{row.arguments}".split(",")))
    name = [*own, *([f"steps={setting.steps}"] if setting.steps != STEPS else [])]
    parts = ["size=small", f"seed={seed}", f"steps={setting.steps}", *own]
    if "pretrain_steps=0" not in own:
        parts.append(f"segmenter={out / pretraining(seed).directory / 'model'}")
    return Run("+".join(name) or "usual", seed, ",".join(parts))


def all_runs(settings: Sequence[Setting], seed: int, out: Path) -> list[Run]:
    """Every training of a seed but the first one, each once."""
    runs = [
        run_of(setting, row, seed, out)
        for setting in settings
        for table in setting.tables
        for row in table.rows
    ]
    return list(dict.fromkeys(runs))


class Results:
    """Scores and costs of runs by the directory of each, kept in a JSON file.

    Args:
      file: is read if it exists, and written when a run ends.
    """

    def __init__(self, file: Path):
        self._file = file
        self._lock = threading.Lock()
        self.found: dict[str, dict[str, float]] = {}
        if file.exists():
            self.found = json.loads(file.read_text())

    def add(self, run: Run, values: dict[str, float]) -> None:
        with self._lock:
            self.found[run.directory] = values
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(dict(sorted(self.found.items())), indent=1) + "\n")
            partial.replace(self._file)

    def ciou(self, run: Run) -> float:
        return self.found[run.directory]["ciou"]


def execute(run: Run, out: Path, results: Results) -> None:
    """Trains, unless it has been done, and notes scores and costs."""
    workdir = out / run.directory
    needed = run.name == "pretrain" and not (workdir / "model").exists()
    if run.directory in results.found and not needed:
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, **ENVIRONMENT}
    command = [
        sys.executable,
        "-m",
        "evf_sam_jax.main",
        f"--config=configs/shapes.py:{run.arguments}",
        f"--workdir={workdir}",
        "--config.evaluation.panel_images=0",
    ]
    with open(f"{workdir}.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{run.directory}: exit code {process.returncode}, see {log.name}")
    found: dict[str, Any] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    stage = "pretrain" if run.name == "pretrain" else "referring"
    values = {
        "ciou": round(found[f"{stage}/val_ciou"], 5),
        "giou": round(found[f"{stage}/val_giou"], 5),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }
    results.add(run, values)
    print(f"{run.directory}: cIoU {values['ciou']:.3f}, {values['cpu_seconds']:.0f} s", flush=True)


def execute_all(runs: Sequence[Run], out: Path, results: Results, at_once: int) -> None:
    """Runs `at_once` at a time; raises what the first one raised that failed."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for finished in [pool.submit(execute, run, out, results) for run in runs]:
            finished.result()


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and the smallest to the largest."""
    form = f"{{:{sign}.3f}}".format
    return f"{form(statistics.mean(values))} ({form(min(values))} to {form(max(values))})"


def print_table(setting: Setting, table: Table, seeds: Sequence[int], results: Results) -> None:
    """Prints each row beside the paper's, and each of its claims beside the differences here."""
    scores = {
        row.name: [results.ciou(run_of(setting, row, seed, Path())) for seed in seeds]
        for row in table.rows
    }
    print(f"\n{setting.name}: {table.name}")
    print("\n| row | paper | here: mean (min to max) |\n|---|---|---|")
    for row in table.rows:
        paper = "not available" if row.paper is None else f"{row.paper:.1f}"
        print(f"| {row.name} | {paper} | {spread(scores[row.name])} |")
    print("\n| the paper's order | difference here: mean (min to max) | |\n|---|---|---|")
    for worse, better in table.claims:
        differences = [b - a for a, b in zip(scores[worse], scores[better], strict=True)]
        same, other = min(differences) > 0, max(differences) < 0
        verdict = "the same" if same else "the other way round" if other else "neither"
        print(f"| {worse} < {better} | {spread(differences, '+')} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--results",
        type=Path,
        help="a JSON file: runs that it has are not run again, others are added to it; by default "
        "results.json in --out",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--at_once", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    file = options.results or out / "results.json"
    try:
        results = Results(file)
    except ValueError as error:
        parser.error(f"--results: expected JSON in {file}, found something else ({error})")
    first = [pretraining(seed) for seed in options.seeds]
    runs = [
        run
        for settings in (SETTINGS, CONTROLS)
        for seed in options.seeds
        for run in all_runs(settings, seed, out)
    ]
    if any(run.directory not in results.found for run in runs):
        execute_all(first, out, results, options.at_once)
        execute_all(runs, out, results, options.at_once)
    print(f"\n{environment.describe()}; {PRETRAIN_STEPS} and {STEPS} steps of 16 images")
    segmenters = [results.ciou(run) for run in first]
    print(f"the pre-trained segmenter, by clicks and boxes: {spread(segmenters)}")
    for setting in (*SETTINGS, *CONTROLS):
        for table in setting.tables:
            print_table(setting, table, options.seeds, results)
    seconds = sum(found["cpu_seconds"] for found in results.found.values())
    print(f"\n{len(results.found)} runs, {seconds / 3600:.2f} CPU hours")


if __name__ == "__main__":
    main()
