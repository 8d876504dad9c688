"""PyTorch's files are read exactly, without PyTorch; whatever is not a tensor is never run."""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.torch_files import TorchTensor, read_torch_file
from evf_sam_jax.errors import UserError
from tests.convert import torch_writer

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTED = np.arange(24, dtype=np.float32)
ONE_TENSOR = torch_writer.tensor(np.dtype(np.float32), "0", 6, 0, (6,), (1,))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "dtype",
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8".split(),
)
def test_every_dtype_is_read_as_it_is(dtype: str):
    tensor = read_torch_file(GOLDEN / "dtypes.pth")["model"][dtype]
    expected = COUNTED.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor.view(), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bool", COUNTED > 3),
        ("scalar", np.float32(7)),
        ("empty", np.zeros((0, 3), np.float32)),
        ("transposed", COUNTED.reshape(4, 6).T),
        ("window", COUNTED.reshape(4, 6)[1:3, 2:5]),
        ("every_fourth", COUNTED[1::4]),
        ("expanded", np.array([[1, 1, 1], [2, 2, 2]], np.float32)),
        ("parameter", COUNTED.reshape(2, 3, 4)),
    ],
)
def test_views_of_shared_storage_are_read_as_they_are(name: str, expected: np.ndarray):
    tensor = read_torch_file(GOLDEN / "dtypes.pth")["model"][name]
    assert tensor.shape == expected.shape
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor.view(), expected)


def test_what_is_no_tensor_is_read_beside_them():
    content = read_torch_file(GOLDEN / "dtypes.pth")
    assert (content["epoch"], content["name"]) == (3, "counted")


def test_a_modules_state_dict_is_a_plain_dictionary():
    state = read_torch_file(GOLDEN / "module.pth")
    assert {key: tensor.shape for key, tensor in state.items()} == {
        "0.weight": (2, 3),
        "0.bias": (2,),
        "1.weight": (2,),
        "1.bias": (2,),
    }
    np.testing.assert_array_equal(state["1.bias"].view(), [30, 31])


def test_tensors_cannot_be_changed_through_the_view():
    view = read_torch_file(GOLDEN / "module.pth")["0.bias"].view()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_the_format_before_1_6_is_recognised_and_the_way_out_given():
    message = refusal(GOLDEN / "before_1_6.pth")
    assert "before version 1.6" in message
    assert "torch.save(torch.load(" in message


@pytest.mark.parametrize("kept", [0, 1, 4, 100, 0.5, 0.99, -1])
def test_truncated_files_are_refused(tmp_path: Path, kept: float):
    whole = (GOLDEN / "dtypes.pth").read_bytes()
    size = int(kept) if isinstance(kept, int) else int(kept * len(whole))
    path = tmp_path / "truncated.pth"
    path.write_bytes(whole[:size])
    refusal(path)


def test_damaged_files_are_read_or_refused_but_raise_nothing_else(tmp_path: Path):
    whole = np.frombuffer((GOLDEN / "module.pth").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(whole.size, size=rng.integers(1, 5))] = rng.integers(256)
        path.write_bytes(damaged.tobytes())
        try:
            read_torch_file(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n....", "not a PyTorch checkpoint"),
        (b"<html>404</html>", "not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04 and then nothing", "truncated or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "some.pth"
    path.write_bytes(content)
    assert said in refusal(path)


def test_missing_files_and_directories_are_refused(tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "none.pth")
    assert "directory" in refusal(tmp_path)


def test_other_zip_archives_are_named(tmp_path: Path):
    path = tmp_path / "some.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"")
    assert "no data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/constants.pkl", b"")
    assert "TorchScript" in refusal(path)


class Evil:
    """Creates a file when it is unpickled by something careless."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_executes_code_is_refused_and_not_run(tmp_path: Path, protocol: int):
    mark = tmp_path / "executed"
    program = pickle.dumps({"weight": Evil(mark)}, protocol)
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    assert "refused" in refusal(tmp_path / "evil.pth")
    assert not mark.exists()
    pickle.loads(program)["weight"].close()  # the same pickle does run where nobody looks
    assert mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cposix\nsystem\n" + torch_writer.text("true") + b"\x85R",
        b"cbuiltins\neval\n" + torch_writer.text("1") + b"\x85R",
        b"ctorch.hub\nload\n)R",
        b"ctorch.storage\n_load_from_bytes\n)R",
        b"ccollections\nUserDict\n)R",
        b"cevf_sam_jax.errors\nrun_command\n)R",
        b"\x8c\x08builtins\x8c\x04exec\x93)R",
    ],
)
def test_every_other_name_is_refused_without_importing_it(tmp_path: Path, program: bytes):
    torch_writer.write_archive(tmp_path / "evil.pth", program)
    assert "only tensors are read" in refusal(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch\nFloatStorage\n)R",  # a storage type called as if it were a function
        b"ccollections\nOrderedDict\n(" + torch_writer.text("x") + b"K\x01tR",
        # BUILD (b) sets attributes of whatever it is applied to; the second of two dictionaries
        # even those of classes with slots.
        b"ctorch._utils\n_rebuild_tensor_v2\n}" + torch_writer.text("call") + b"K\x01sb",
        b"ctorch._utils\n_rebuild_tensor_v2\n(}}" + torch_writer.text("call") + b"K\x01stb",
        ONE_TENSOR + b"}" + torch_writer.text("start") + b"K\x09sb",
        b"(" + torch_writer.text("storage") + b"K\x01tQ",
    ],
)
def test_allowed_names_cannot_be_abused(tmp_path: Path, program: bytes):
    torch_writer.write_archive(tmp_path / "odd.pth", program, [bytes(24)])
    assert "damaged" in refusal(tmp_path / "odd.pth")
    read_torch_file(GOLDEN / "dtypes.pth")  # and reading still works


@pytest.mark.parametrize(
    ("storage_size", "start", "shape", "strides"),
    [
        (6, 0, (7,), (1,)),
        (6, 1, (6,), (1,)),
        (6, 0, (2, 3), (4, 1)),
        (6, -1, (2,), (1,)),
        (6, 5, (2,), (-1,)),
        (6, 0, (2, 3), (1,)),
        (10**12, 0, (2,), (1,)),
        (6, 0, (10**6, 10**6), (0, 10**6)),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path: Path, storage_size: int, start: int, shape: tuple, strides: tuple
):
    program = torch_writer.tensor(np.dtype(np.float32), "0", storage_size, start, shape, strides)
    torch_writer.write_archive(tmp_path / "odd.pth", program, [bytes(24)])
    assert "damaged" in refusal(tmp_path / "odd.pth")


def test_a_missing_storage_is_refused(tmp_path: Path):
    program = torch_writer.tensor(np.dtype(np.float32), "1", 6, 0, (6,), (1,))
    torch_writer.write_archive(tmp_path / "odd.pth", program, [bytes(24)])
    assert "storage 1 is missing" in refusal(tmp_path / "odd.pth")


def test_compressed_archives_are_refused(tmp_path: Path):
    path = tmp_path / "compressed.pth"
    with (
        zipfile.ZipFile(GOLDEN / "module.pth") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in refusal(path)


def test_big_endian_files_are_refused(tmp_path: Path):
    path = tmp_path / "big.pth"
    with (
        zipfile.ZipFile(GOLDEN / "module.pth") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target,
    ):
        for name in source.namelist():
            odd = name.endswith("byteorder")
            target.writestr(name, b"big" if odd else source.read(name))
    assert "big-endian" in refusal(path)


@pytest.mark.torch
def test_fresh_files_of_torch_are_read_bit_for_bit(tmp_path: Path):
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 30, generator=generator)
    tensors = {
        "float32": noise,
        "float16": noise.half(),
        "bfloat16": noise.bfloat16(),
        "permuted": torch.randn(2, 3, 4, 5, generator=generator).permute(2, 0, 3, 1),
        "strided": noise[3:30:4, 1::3],
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "long": torch.randint(-(2**62), 2**62, (5,), generator=generator),
    }
    torch.save(tensors, tmp_path / "fresh.pth")
    read = read_torch_file(tmp_path / "fresh.pth")
    for name, tensor in tensors.items():
        assert isinstance(read[name], TorchTensor)
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert np.ascontiguousarray(read[name].view()).tobytes() == raw, name


@pytest.mark.torch
def test_torch_reads_what_the_tests_write(tmp_path: Path):
    import torch

    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3, dtype=np.float16),
        "c": np.arange(3).astype(ml_dtypes.bfloat16),
        "d": np.arange(3, dtype=np.int64),
        "e": np.float32(2),
    }
    torch_writer.save(tmp_path / "ours.pth", tensors, wrapped_in="model")
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert list(loaded) == list(tensors)
    for name, expected in tensors.items():
        assert tuple(loaded[name].shape) == expected.shape
        np.testing.assert_array_equal(loaded[name].float().numpy(), expected.astype(np.float32))


@pytest.mark.torch
def test_the_stored_files_are_what_torch_writes_today(tmp_path: Path):
    import torch

    for name in ("dtypes.pth", "module.pth", "before_1_6.pth"):
        torch.load(GOLDEN / name, weights_only=True)
    state = torch.load(GOLDEN / "module.pth", weights_only=True)
    torch.save(state, tmp_path / "again.pth")
    again = read_torch_file(tmp_path / "again.pth")
    for key, tensor in read_torch_file(GOLDEN / "module.pth").items():
        np.testing.assert_array_equal(tensor.view(), again[key].view())
