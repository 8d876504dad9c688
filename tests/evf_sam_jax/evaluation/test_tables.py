"""Tables say what was measured beside what the paper says, and admit what is not known."""

import json
import shutil
from pathlib import Path

from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.evaluation.scores import score_set, to_json
from evf_sam_jax.evaluation.splits import PAPER_SETS
from evf_sam_jax.evaluation.tables import PAPER, average, markdown, paper_table, variant
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import RELEASED
from tests.evf_sam_jax.evaluation.made_set import TOKENIZER
from tests.evf_sam_jax.evaluation.test_scores import columns


def scores(hundredths: int, **given):
    values = columns(intersection=[hundredths], union=[100], **given)
    return to_json(score_set(values, samples=5, by_category="category" in given))


def results(sets, paper_variant=None, left_out=()):
    model = {"path": "runs/m", "fingerprint": "abc", "paper_variant": paper_variant}
    return {"model": model, "sets": sets, "left_out": list(left_out)}


def test_the_paper_s_splits_stand_beside_its_figures_with_both_averages():
    sets = {name: scores(80 + i) for i, name in enumerate(PAPER_SETS)}
    lines = paper_table(sets, "evf-sam").splitlines()
    assert "| refcoco/val | 80.0 | 82.1 |" in lines and "| refcocog/test | 87.0 | 77.4 |" in lines
    assert lines[-1] == "| average | 83.5 | 78.0 |"


def test_the_averages_are_those_of_the_paper():
    # As its Table 1 gives them.
    for key, expected in (("evf-sam", "78.0"), ("evf-sam-multitask", "79.0")):
        assert f"{average(PAPER[key][1]):.1f}" == expected


def test_what_was_not_evaluated_or_has_no_figure_is_no_number():
    lines = paper_table({"refcoco/val": scores(50)}, None).splitlines()
    assert "| refcoco/val | 50.0 | not available |" in lines
    assert "| refcoco+/val | not evaluated | not available |" in lines
    assert lines[-1] == "| average | not evaluated | not available |"


def test_a_model_is_told_by_its_sizes():
    assert variant(RELEASED["evf-sam"], TOKENIZER) == "evf-sam"
    assert variant(RELEASED["evf-sam-base"], TOKENIZER) == "evf-sam-base"
    assert variant(EvfSamConfig.tiny(), TOKENIZER) is None


def test_a_multitask_model_is_told_by_its_token_and_not_taken_for_another(tmp_path: Path):
    directory = tmp_path / "tokenizer"
    shutil.copytree(SHAPES_TOKENIZER, directory)
    (directory / "added_tokens.json").write_text(json.dumps({"[semantic]": 127}))
    semantic = load_tokenizer(directory)
    assert variant(RELEASED["evf-sam"], semantic) == "evf-sam-multitask"
    assert variant(RELEASED["evf-sam2"], semantic) is None  # the paper has no row of it
    assert variant(RELEASED["evf-sam2"], TOKENIZER) == "evf-sam2"


def test_an_interval_needs_some_images():
    enough = to_json(score_set(columns(intersection=[1] * 10, union=[2] * 10), samples=5))
    assert "| 10 | 10 | 50.0 (50.0 to 50.0) |" in markdown(results({"own_jsonl/val": enough}))


def test_the_page_has_what_the_sets_have():
    plain = markdown(results({"own_jsonl/val": scores(50)}))
    assert "| own_jsonl/val | 1 | 1 | 50.0 | 50.0 |" in plain
    assert "N-acc" not in plain and "category" not in plain and "left out" not in plain
    full = markdown(
        results(
            {
                "ade20k/val": scores(25, category=["a|b"]),
                "grefcoco/val": scores(50, target_pixels=[0], predicted_pixels=[49]),
                "refcoco/val": scores(50),
            },
            "evf-sam",
            [{}],
        )
    )
    assert "| a\\|b | 1 | 25.0 |" in full and "mean cIoU 25.0" in full
    assert "grefcoco/val: 1 of 1 phrases name nothing" in full and "N-acc is 100.0" in full
    assert "| refcoco/val | 50.0 | 82.1 |" in full
    assert "1 images or phrases are left out" in full
