"""What the training loop costs beside its compiled step.

    python -m benchmarks.train_step

Trains the shapes model with large batches, by turns: the compiled step alone, called with one batch
again and again; the loop (`evf_sam_jax.train.run_stage`: logging, checks, placement of batches)
with batches in memory; and the loop with batches that are drawn meanwhile.
"""

import argparse
import dataclasses
import io
import itertools
import json
import tempfile
import time

import grain
import jax
from etils import epath

from benchmarks import environment, roofline
from benchmarks.alternation import print_times
from configs.shapes import get_config
from data_pipelines.batch import Batch
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.experiment import ExperimentConfig, experiment_from_dict
from evf_sam_jax.initialize import initial_params, tokenizer_directory
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.model_inputs import load_tokenizer
from evf_sam_jax.param_rules import merge
from evf_sam_jax.preemption import PreemptionNotice
from evf_sam_jax.run_log import RunLog
from evf_sam_jax.sharding import make_mesh, put_batch
from evf_sam_jax.stage import Stage, make_stage
from evf_sam_jax.train import run_stage
from evf_sam_jax.training_data import TrainingData, open_data


@dataclasses.dataclass(frozen=True)
class InMemory(Stage):
    """A stage whose batches have been made before: a few of them, over and over."""

    made: tuple[Batch, ...] = ()

    def batches(
        self, data: TrainingData, tokenizer: Tokenizer, whole: bool = False
    ) -> grain.MapDataset[Batch]:
        steps = range(self.config.steps)
        return grain.MapDataset.source([self.made[i % len(self.made)] for i in steps])


def experiment(batch_size: int, steps: int) -> ExperimentConfig:
    """The second stage of the shapes recipe, with large batches, measured at its end alone."""
    values = get_config().to_dict()
    values["stage_order"] = ("referring",)
    values["stages"] = {"referring": values["stages"]["referring"]}
    values["stages"]["referring"] |= {"batch_size": batch_size, "steps": steps}
    values["checkpoints"]["every"] = values["evaluation"]["every"] = 10 * steps
    values["evaluation"] |= {"images": 16, "batch_size": 16, "panel_images": 1}
    values["log_every"] = 1
    return experiment_from_dict(values)


def step_alone(stage: Stage, batch: Batch) -> float:
    """Seconds of a step, without the first."""
    params = initial_params(
        stage.experiment,
        path_leaves(merge(stage.placement.state.trainable, stage.placement.state.frozen)),
    )
    with jax.set_mesh(stage.mesh):
        state, step = stage.create(params), stage.step()
        placed = put_batch(stage.mesh, batch, stage.config.batch_size)
        state, metrics = step(state, placed)
        jax.block_until_ready(metrics)
        begin = time.perf_counter()
        for _ in range(stage.config.steps - 1):
            state, metrics = step(state, placed)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - begin) / (stage.config.steps - 1)


def in_the_loop(stage: Stage, data: TrainingData, tokenizer: Tokenizer) -> float:
    """Seconds of a step, as the run's own log says."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        with RunLog(workdir, progress=io.StringIO()) as log, PreemptionNotice() as notice:
            run_stage(stage, data, None, tokenizer, log, workdir, notice)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    key = "referring/images_per_second"
    return stage.config.batch_size / [record[key] for record in records if key in record][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = experiment(options.batch_size, options.steps)
    tokenizer = load_tokenizer(tokenizer_directory(config), config.model)
    data = open_data(config)
    stage = make_stage(config, config.stages[0], make_mesh(config.mesh))
    made = tuple(itertools.islice(stage.batches(data, tokenizer), 4))
    in_memory = InMemory(**vars(stage), made=made)
    runs = {
        "compiled step alone": lambda: step_alone(stage, made[0]),
        "loop, batches in memory": lambda: in_the_loop(in_memory, data, tokenizer),
        "loop, batches drawn meanwhile": lambda: in_the_loop(stage, data, tokenizer),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # Each run compiles its functions anew: but for the first, from what is kept.
    with tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)
        for _ in range(options.repeats):
            for name, run in runs.items():
                seconds[name].append(run())
    roof = roofline.measure(config.model.segmenter.dtype)
    print(environment.describe())
    print(f"{config.model.segmenter.dtype}: {roof}")
    print(
        f"seconds of a step of {options.batch_size} images, by runs of {options.steps} steps, "
        f"{options.repeats} by turns\n"
    )
    print_times(seconds, dict.fromkeys(seconds, stage.flops(made[0])), roof)


if __name__ == "__main__":
    main()
