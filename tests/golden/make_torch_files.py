"""Writes dtypes.pth, module.pth and before_1_6.pth: small files as PyTorch itself writes them.

Run with PyTorch (tests/install_parity.sh): `python tests/golden/make_torch_files.py`. The values
are counted, not drawn, so that `tests/convert/test_torch_files.py` can say what they must be.
"""

import pathlib

import torch

GOLDEN = pathlib.Path(__file__).parent
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


def main() -> None:
    counted = torch.arange(24, dtype=torch.float32)
    tensors = {str(dtype).removeprefix("torch."): counted.to(dtype) for dtype in DTYPES}
    tensors |= {
        "bool": counted > 3,
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "transposed": counted.view(4, 6).T,
        "window": counted.view(4, 6)[1:3, 2:5],
        "every_fourth": counted[1::4],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "parameter": torch.nn.Parameter(counted.view(2, 3, 4)),
    }
    torch.save({"model": tensors, "epoch": 3, "name": "counted"}, GOLDEN / "dtypes.pth")

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 10 * index)
    torch.save(module.state_dict(), GOLDEN / "module.pth")
    torch.save(module.state_dict(), GOLDEN / "before_1_6.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
