"""EVF-SAM trained on objects, classes and parts too: the rows "RC, O, A, PP, PIN, HP" of Table 2.

    python -m evf_sam_jax.main --workdir runs/multitask \\
        --config configs/multitask.py:foundations=FOUNDATIONS,data=DATA_DIR

On referring expressions (RC), Objects365 (O), ADE20K (A), PASCAL-Part (PP), PartImageNet (PIN) and
HumanParsing (HP). Of the last four, phrases begin with `[semantic] `, one token of its own, for
which the encoder's `tokenizer/` needs an `added_tokens.json`: `{"[semantic]": 64002}`, as the
released checkpoint has it. Other machines: the commands of configs/refcoco.py.

    srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 \\
        python -m evf_sam_jax.main --workdir runs/multitask \\
        --config configs/multitask.py:foundations=FOUNDATIONS,data=DATA_DIR,fsdp=4
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command "cd evf_sam_jax && \\
        python -m evf_sam_jax.main --coordinator auto --workdir /shared/runs/multitask \\
        --config configs/multitask.py:foundations=/shared/foundations,data=/shared/data,fsdp=8"

The paper's cIoU on RefCOCO testA: 84.2 (its Table 2 has the others). Ours: not run.

The paper does not say how often each data set is drawn from, for how long it is trained, nor
whether from the foundations or from the model of configs/refcoco.py (`model=DIR` begins there).
By default RC is drawn three times where O is drawn once, as in the released code, and each of the
other four as often as O: 3 of 8 images are of RC. `refer=3`, `objects365=1`, `ade20k=1`,
`pascal_part=1`, `partimagenet=1` and `human_parsing=1` say so, and 0 leaves one out.

The masks of Objects365 that the authors made are not published; `python -m evf_sam_jax.annotate`
makes them of its boxes as the paper did (A.2), with SAM 2. Its file says how.

Cost: of the paper's run not known; 15,000 steps here by default, not run.

HumanParsing's background is a class like others, as in the original; `background=false` leaves it
out.
"""

from ml_collections import ConfigDict

from configs.recipe import (
    dataset,
    make_recipe,
    parse_recipe,
    refer_datasets,
    require_semantic_token,
)

# Targets of larger images, which Objects365 and ADE20K have, are shrunk to it.
CANVASES = ((1024, 1024),)
SEMANTIC = ("ade20k", "pascal_part", "partimagenet", "human_parsing")


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    arguments = parse_recipe(
        argument,
        refer=3.0,
        objects365=1.0,
        **dict.fromkeys(SEMANTIC, 1.0),
        background=True,
    )
    train = refer_datasets(arguments, arguments["refer"])
    for name in ("objects365", *SEMANTIC):
        if weight := arguments[name]:
            without = name == "human_parsing" and not arguments["background"]
            rules = dict(without_categories=("background",)) if without else {}
            train.append(dataset(arguments, name, weight, **rules))
    if any(arguments[name] for name in SEMANTIC):
        require_semantic_token(arguments)
    return make_recipe(arguments, train, CANVASES)
