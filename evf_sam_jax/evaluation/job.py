"""The evaluation job: sets, model, rows, numbers; goes on where it was killed.

    RUN/config.json, data.json     what it evaluates; fingerprints of model and data
    RUN/predictions/               rows as they come
    RUN/phrases.parquet            all of them, by set, image and phrase
    RUN/results.json, results.md   numbers, and tables of them
    RUN/predictions.json           masks in COCO's format, if asked for
    RUN/metrics.jsonl              the main numbers, as a training run has them

Every process evaluates its share of the images on its own devices, and all meet at the beginning
and the end. Nothing in `results.json` depends on how many they are, or on when it was written.
An image that cannot be read is left out, and tried again when the job is started again.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation import rows as rows_files
from evf_sam_jax.evaluation import tables
from evf_sam_jax.evaluation.config import AUTO, FREE, EvaluationJob
from evf_sam_jax.evaluation.count import EvaluatedModel
from evf_sam_jax.evaluation.grouping import Group, Plan, make_plan, share, steps
from evf_sam_jax.evaluation.loading import load_model
from evf_sam_jax.evaluation.loop import Evaluated, evaluate_steps
from evf_sam_jax.evaluation.reading import Reader
from evf_sam_jax.evaluation.rows import LeftOut, PhraseRow
from evf_sam_jax.evaluation.scores import score_set, to_json
from evf_sam_jax.evaluation.splits import EvaluationSet, open_sets, split_names
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.processes import on_first_process
from evf_sam_jax.run_log import RunLog, clock, make_workdir, run_directory, run_files

FORMAT_VERSION = 1
RESULTS, TABLES, COCO = "results.json", "results.md", "predictions.json"
# Of the config, what says how it was computed and not what.
_HOW = ("devices", "threads", "shard_phrases", "coco_json")
_PROGRESS_SECONDS, _SHARD_SECONDS = 10, 60


def evaluate(config: EvaluationJob, workdir: epath.PathLike) -> dict[str, Any]:
    """Evaluates a model directory or a checkpoint, and writes what the file's head says.

    Returns:
      What `results.json` has.

    Raises:
      UserError: there is no such model or set, or the directory holds something else.
    """
    names = split_names(config.split)
    sets = open_sets(
        names, config.data, config.images, config.ignore_unlabelled, config.semantic_prefix
    )
    return evaluate_sets(config, sets, _open_model(config), workdir)


def evaluate_sets(
    config: EvaluationJob,
    sets: Sequence[EvaluationSet],
    model: EvaluatedModel,
    workdir: epath.PathLike,
) -> dict[str, Any]:
    """As `evaluate`, of a model and sets that have been opened."""
    workdir = run_directory(workdir)
    fingerprints = {"model": model.fingerprint, **{one.name: one.fingerprint for one in sets}}
    on_first_process(lambda: _open_workdir(config, workdir, fingerprints), workdir)
    plan = make_plan(sets, model.tokenizer, config.batch_size, config.phrases)
    on_first_process(lambda: _try_again(sets, plan, workdir), workdir)
    done = rows_files.read_shards(workdir)
    # Nobody writes before all have read, so that all see the same.
    _meet("evaluation begins")
    left = [group for group in plan.groups if group.number not in done.groups]
    mine = share(left, jax.process_index(), jax.process_count())
    with RunLog(workdir, silent=jax.process_index() > 0) as log:
        log.line(_beginning(sets, plan, left))
        _run(config, sets, model, mine, workdir, log)
        _meet("evaluation ends")
        finish = functools.partial(_finish, config, sets, model, plan, workdir, log)
        results = on_first_process(finish, workdir)
    if results is None:  # another process has made them
        results = json.loads((workdir / RESULTS).read_text())
    return results


def _open_model(config: EvaluationJob) -> EvaluatedModel:
    loaded = load_model(config.model, config.checkpoint, config.dtype)
    local = jax.local_devices()
    return EvaluatedModel(
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        loaded.fingerprint,
        config.masks,
        local[: config.devices or len(local)],
    )


def _try_again(sets: Sequence[EvaluationSet], plan: Plan, workdir: epath.Path) -> None:
    """Forgets the groups of images that could not be read before and now can."""
    shards = rows_files.read_shards(workdir)
    failed = {(one.set, one.image_index) for one in shards.left_out}
    groups = [
        group
        for group in (plan.groups if failed else ())
        if any(
            (sets[image.set].name, image.image) in failed
            and _can_be_read(sets[image.set], image.image, image.chosen[: group.shape.phrases])
            for image in group.images
        )
    ]
    images = {(sets[one.set].name, one.image) for group in groups for one in group.images}
    rows_files.forget(shards, {group.number for group in groups}, images)


def _can_be_read(one: EvaluationSet, image: int, chosen: Sequence[int]) -> bool:
    try:
        one.read(image, chosen)
    except UserError:
        return False
    return True


def _run(
    config: EvaluationJob,
    sets: Sequence[EvaluationSet],
    model: EvaluatedModel,
    groups: Sequence[Group],
    workdir: epath.Path,
    log: RunLog,
) -> None:
    """Evaluates groups and writes shards of their rows."""
    reader = Reader(
        sets=tuple(sets),
        steps=tuple(steps(groups, model.devices)),
        tokenizer=model.tokenizer,
        devices=model.devices,
        batch_size=config.batch_size,
        images=tower_images(model.config),
    )
    evaluated = evaluate_steps(model, reader, config.threads)
    waiting: list[Evaluated] = []
    written = time.monotonic()
    for one in _with_progress(evaluated, sum(len(group.images) for group in groups), log):
        waiting.append(one)
        late = time.monotonic() - written > _SHARD_SECONDS
        if late or sum(len(step.rows) for step in waiting) >= config.shard_phrases:
            _write(workdir, waiting)
            waiting, written = [], time.monotonic()
    if waiting:
        _write(workdir, waiting)


def _write(workdir: epath.Path, evaluated: Sequence[Evaluated]) -> None:
    rows: list[PhraseRow] = []
    groups: list[int] = []
    left_out: list[LeftOut] = []
    for one in evaluated:
        rows += one.rows
        groups += [group.number for group in one.groups]
        left_out += one.left_out
    rows_files.write_shard(workdir, jax.process_index(), rows, groups, left_out)


def _with_progress(evaluated: Iterator[Evaluated], images: int, log: RunLog) -> Iterator[Evaluated]:
    """Passes steps on, and says from time to time how many images are left."""
    done, begin, said = 0, 0.0, 0.0
    before = 0  # images of the first step, which compiles
    for one in evaluated:
        yield one
        now = time.monotonic()
        done += sum(len(group.images) for group in one.groups)
        if not begin:
            begin, before, said = now, done, now
        elif now - said > _PROGRESS_SECONDS or done == images:
            rate = (done - before) / (now - begin)
            left = clock((images - done) / rate)
            log.line(f"{done:,}/{images:,} images, {rate:.1f} images/s, {left} left")
            said = now


def _finish(
    config: EvaluationJob,
    sets: Sequence[EvaluationSet],
    model: EvaluatedModel,
    plan: Plan,
    workdir: epath.Path,
    log: RunLog,
) -> dict[str, Any]:
    """Puts the rows of all processes together and scores them."""
    shards = rows_files.read_shards(workdir)
    missing = len(plan.groups) - len(shards.groups)
    if missing:
        raise UserError(
            f"--workdir {workdir}: expected the rows of all processes there, found "
            f"{missing} of {len(plan.groups)} groups of images missing; all processes must see it "
            "under the same path"
        )
    table = rows_files.merge_shards(shards)
    # Until it is there again, nothing here is finished.
    (workdir / RESULTS).unlink(missing_ok=True)
    rows_files.write_rows(workdir, table)
    left_out = sorted((*plan.left_out, *shards.left_out), key=dataclasses.astuple)
    scores = {}
    for one in sets:
        columns = rows_files.columns_of(table, one.name, _SCORED)
        if not len(columns["union"]):
            raise UserError(f"{one.name}: expected phrases that can be evaluated, found none")
        found = score_set(
            columns,
            no_target_pixels=config.no_target_pixels,
            samples=config.bootstrap_samples,
            seed=config.bootstrap_seed,
            by_category=one.by_category,
        )
        scores[one.name] = to_json(found)
    results = {
        "format_version": FORMAT_VERSION,
        "model": {
            "path": config.model,
            "fingerprint": model.fingerprint,
            "paper_variant": tables.variant(model.config, model.tokenizer)
            if config.paper == AUTO
            else config.paper,
        },
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in _HOW},
        "sets": scores,
        "left_out": list(map(dataclasses.asdict, left_out)),
    }
    if config.coco_json:
        _write_text(workdir / COCO, _coco_lines(table))
    _write_text(workdir / TABLES, [tables.markdown(results)])
    # The last, so that what has it is finished.
    _write_text(workdir / RESULTS, [json.dumps(results, indent=2) + "\n"])
    for name, found in scores.items():
        ciou, giou = (found["as_original"][key]["value"] for key in ("ciou", "giou"))
        log.scalars(0, {f"{name}_ciou": ciou, f"{name}_giou": giou})
        log.line(
            f"{name}: cIoU {ciou:.3f}, gIoU {giou:.3f} "
            f"({found['images']} images, {found['phrases']} phrases)"
        )
    if left_out:
        first = left_out[0]
        log.line(f"{len(left_out)} left out ({RESULTS}), the first: {first.name}: {first.reason}")
    return results


_SCORED = (
    "image_index",
    "category",
    "target_pixels",
    "predicted_pixels",
    "intersection",
    "union",
    "intersection_parts_union",
    "union_parts_union",
)


def _coco_lines(table: Any) -> Iterator[str]:
    """The predictions as a JSON list, an entry a phrase in COCO's format for results.

    `image_id` is text, as in the rows, which pycocotools takes where the ground truth has the same.
    `category_id` is the place of the category among those of its set in alphabetical order, from 1;
    "", of phrases without one, is one of them. A score that is no number is null.
    """
    pairs = table.select(["set", "category"]).group_by(["set", "category"]).aggregate([])
    names: dict[str, list[str]] = {}
    for pair in pairs.to_pylist():
        names.setdefault(pair["set"], []).append(pair["category"])
    ids = {
        (one, category): number
        for one, categories in names.items()
        for number, category in enumerate(sorted(categories), 1)
    }
    yield "["
    separator = "\n"
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            entry = {
                "image_id": row["image_id"],
                "set": row["set"],
                "phrase_index": row["phrase_index"],
                "phrase": row["phrase"],
                "category": row["category"],
                "category_id": ids[row["set"], row["category"]],
                "score": row["predicted_iou"] if math.isfinite(row["predicted_iou"]) else None,
                "segmentation": {
                    "size": [row["height"], row["width"]],
                    "counts": row["prediction_rle"],
                },
            }
            yield separator + json.dumps(entry, allow_nan=False)
            separator = ",\n"
    yield "\n]\n"


def _write_text(path: epath.Path, parts: Sequence[str] | Iterator[str]) -> None:
    """Writes a file, whole or not at all."""
    partial = path.parent / f"{path.name}.partial"
    try:
        with partial.open("w") as file:
            for part in parts:
                file.write(part)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _beginning(sets: Sequence[EvaluationSet], plan: Plan, left: Sequence[Group]) -> str:
    names = ", ".join(one.name for one in sets)
    remaining = sum(len(group.images) for group in left)
    text = f"{names}: {plan.images:,} images in {len(plan.groups):,} groups"
    if remaining < plan.images:
        text += f", going on: {remaining:,} images are left"
    return text


def _open_workdir(
    config: EvaluationJob, workdir: epath.Path, fingerprints: Mapping[str, str]
) -> None:
    """Makes the directory of an evaluation, or finds this one in it."""
    if not (workdir.is_dir() and run_files(workdir)):
        make_workdir(workdir, config, fingerprints)
        return
    where = f"--workdir {workdir}"
    try:
        before = json.loads((workdir / "config.json").read_text())
        made_of = json.loads((workdir / "data.json").read_text())
        same_kind = "split" in before and "model" in made_of
    except (OSError, ValueError, TypeError):
        same_kind = False
    if not same_kind:
        found = sorted(path.name for path in workdir.iterdir())[0]
        raise UserError(
            f"{where}: expected a new or empty directory, or that of an evaluation, found {found!r}"
        )
    if made_of["model"] != fingerprints["model"]:
        raise UserError(
            f"{where}: expected results of the model {config.model} ({fingerprints['model']}), "
            f"found those of another one, {before['model']} ({made_of['model']})"
        )
    for key, value in dataclasses.asdict(config).items():
        # The model is the same, wherever it is.
        if key not in (*FREE, "model", "checkpoint") and before.get(key) != value:
            raise UserError(
                f"{where}: expected the evaluation that is there, with {key} = "
                f"{before.get(key)!r}, found {value!r}; another one needs another directory"
            )
    for name in fingerprints:
        if made_of.get(name) != fingerprints[name]:
            raise UserError(
                f"{where}: expected the data that the evaluation began with, found other "
                f"annotations in {name}"
            )


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
