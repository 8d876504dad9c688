"""Referring expressions mixed with classes of whole images: the paper's Table 7.

    python -m evf_sam_jax.main --workdir runs/semantic_mix \\
        --config configs/semantic_mix.py:foundations=FOUNDATIONS,data=DATA_DIR

Other machines: the commands of configs/refcoco.py.

    srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 \\
        python -m evf_sam_jax.main --workdir runs/semantic_mix \\
        --config configs/semantic_mix.py:foundations=FOUNDATIONS,data=DATA_DIR,fsdp=4
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command "cd evf_sam_jax && \\
        python -m evf_sam_jax.main --coordinator auto --workdir /shared/runs/semantic_mix \\
        --config configs/semantic_mix.py:foundations=/shared/foundations,data=/shared/data,fsdp=8"

The paper's cIoU on ADE20K val, which is also what a run is measured on while it trains (or, with
`held_out=refcoco`, another set); that on RefCOCO's family is not available here. Ours: not run.

    ade20k=0,mapillary=0    54.2, zero-shot
    mapillary=0             75.9
    ade20k=0                59.6
    both, the default       76.1

In the paper, phrases are the bare names of classes. `prefix=true` puts `[semantic] ` before them,
as the multi-task models have it, and needs that token (configs/multitask.py).

The paper does not say how often each data set is drawn from. By default referring expressions are
drawn three times where each of the others is drawn once, as the released code does with
Objects365: `refer=3`, `ade20k=1`, `mapillary=1`.

Cost: of the paper's run not known; 15,000 steps here by default, not run.
"""

from ml_collections import ConfigDict

from configs.recipe import (
    dataset,
    make_recipe,
    parse_recipe,
    refer_datasets,
    require_semantic_token,
)
from data_pipelines.source import SEMANTIC_PREFIX

# Targets of larger images, which both have, are shrunk to it.
CANVASES = ((1024, 1024),)
SEMANTIC = ("ade20k", "mapillary")


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    arguments = parse_recipe(
        argument,
        held_out=("ade20k", "refcoco", "refcoco+", "refcocog"),
        refer=3.0,
        **dict.fromkeys(SEMANTIC, 1.0),
        prefix=False,
    )
    prefix = SEMANTIC_PREFIX if arguments["prefix"] else ""
    train = refer_datasets(arguments, arguments["refer"])
    train += [
        dataset(arguments, name, arguments[name], prefix=prefix)
        for name in SEMANTIC
        if arguments[name]
    ]
    if prefix:
        require_semantic_token(arguments)
    rules = dict(prefix=prefix) if arguments["held_out"] == "ade20k" else {}
    return make_recipe(arguments, train, CANVASES, rules)
