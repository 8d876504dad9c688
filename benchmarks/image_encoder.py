"""SAM's image encoder beside PyPI `segment-anything`'s, in one process, in alternation.

    bash tests/install_parity.sh && python -m benchmarks.image_encoder --size vit_h

Both encode the same image with the same weights in float32 on the CPU; the outputs are compared.
Operations are the model's; the original also multiplies the padding of windows.
"""

import argparse
import dataclasses
import functools

import jax
import numpy as np
import torch

from benchmarks.alternation import print_comparison
from convert import sam as sam_table
from evf_sam_jax.flops import count_flops
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.sam.config import SamConfig
from tests.parity import sam_cases
from tests.parity.weights import our_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("vit_b", "vit_l", "vit_h"), default="vit_h")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    segmenter = dataclasses.replace(getattr(SamConfig, options.size)(), dtype="float32")
    config = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), segmenter=segmenter)
    given = sam_cases.inputs(segmenter)

    original = sam_cases.original(segmenter)
    content = torch.from_numpy(given.image[: given.size[0], : given.size[1]].copy())
    pixels = original.preprocess(content.permute(2, 0, 1).float()[None])

    params = our_params(sam_table.table(segmenter), sam_cases.section(segmenter))
    params = jax.device_put({"segmenter": {"image_encoder": params["segmenter"]["image_encoder"]}})
    image, size = jax.device_put((given.image[None], np.asarray([given.size], np.int32)))
    encode = jax.jit(evf_sam.encode_image, static_argnums=0)

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            return original.image_encoder(pixels)

    def ours() -> jax.Array:
        return jax.block_until_ready(encode(config, params, image, size)).embedding

    difference = np.abs(np.asarray(ours())[0] - theirs()[0].permute(1, 2, 0).numpy()).max()
    print(f"outputs differ by at most {difference:.1e}")
    operations = count_flops(functools.partial(evf_sam.encode_image, config), params, image, size)
    runs = {"segment-anything": theirs, "evf_sam_jax": ours}
    print_comparison(
        f"{options.size} image encoder, float32",
        runs,
        options.repeats,
        operations=dict.fromkeys(runs, operations),
    )


if __name__ == "__main__":
    main()
