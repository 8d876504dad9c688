"""EVF-SAM trained on referring expressions alone: the rows "RC" of the paper's Table 2.

    python -m evf_sam_jax.main --workdir runs/refcoco \\
        --config configs/refcoco.py:foundations=FOUNDATIONS,data=DATA_DIR

FOUNDATIONS holds `beit3_large` and `sam_vit_h` as `python -m convert` makes them, the first with
BEiT-3's tokenizer in `tokenizer/`; DATA_DIR holds `refer_seg`. Four GPUs of one machine, as in the
paper:

    python -m evf_sam_jax.main --workdir runs/refcoco \\
        --config configs/refcoco.py:foundations=FOUNDATIONS,data=DATA_DIR,fsdp=4

Two nodes of four GPUs under SLURM, and a slice of TPUs; all must see the three directories:

    srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 \\
        python -m evf_sam_jax.main --workdir runs/refcoco \\
        --config configs/refcoco.py:foundations=FOUNDATIONS,data=DATA_DIR,fsdp=4
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command "cd evf_sam_jax && \\
        python -m evf_sam_jax.main --coordinator auto --workdir /shared/runs/refcoco \\
        --config configs/refcoco.py:foundations=/shared/foundations,data=/shared/data,fsdp=8"

The paper's cIoU on RefCOCO val / testA / testB: 82.1 / 83.7 / 80.0 (its Table 2 has RefCOCO+ and
RefCOCOg). Ours: not run.

What is trained, with the paper's cIoU (Table 4); the projector always is:

    train_encoder=false,train_prompt_encoder=false          21.2
    train_mask_decoder=false,train_prompt_encoder=false     82.9
    train_prompt_encoder=false                              83.3
    all of them, the released model and the default         83.7

Of the prompt encoder that is `no_mask_embed`, 256 numbers, as in the original.

Cost: 15,000 steps of 128 images, in the paper about a day on four L40S with stage 2 of ZeRO; here
not run.

`strict=true` leaves out the images that any evaluation split of RefCOCO, RefCOCO+ or RefCOCOg has;
the original trains on images of one that another evaluates on. `refclef=none` does without RefCLEF.
configs/recipe.py has all arguments.
"""

from ml_collections import ConfigDict

from configs.recipe import make_recipe, parse_recipe, refer_datasets

# Holds every image of COCO and of RefCLEF.
CANVASES = ((640, 640),)


def get_config(argument: str | None = None) -> ConfigDict:
    """Returns the values of the experiment."""
    arguments = parse_recipe(argument)
    return make_recipe(arguments, refer_datasets(arguments, weight=1.0), CANVASES)
