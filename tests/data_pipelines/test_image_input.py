"""Images: every kind of file reads, both resizes equal the original's, bad files say so."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from data_pipelines.image_input import (
    decode_image,
    encoder_input,
    read_image,
    read_size,
    sam_input,
    sam_size,
    stretched_input,
)
from evf_sam_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"

# The segmenter's normalisation, which the device does (hustvl/EVF-SAM inference.py:42-43).
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


def smooth(height: int = 64, width: int = 96) -> np.ndarray:
    """No two rows, columns or channels alike, yet kind to lossy formats."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 2, y * 3, x + y], axis=-1).astype(np.uint8)


# Golden file, key of the segmenter's input, key of the encoder's: image 0, 1, 2.
ORIGINAL = [
    ("evf_sam.npz", "sam_input_0", "evf_input_0"),
    ("evf_sam.npz", "sam_input_1", None),
    ("evf_sam_extra.npz", "large_sam_input", "large_evf_input"),
]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_segmenter_input_is_the_originals(i: int):
    file, key, _ = ORIGINAL[i]
    frame, (height, width) = sam_input(read_image(GOLDEN / "evf_sam" / f"image_{i}.png"))
    normalised = (frame - MEAN) / STD
    normalised[height:] = 0
    normalised[:, width:] = 0
    golden = np.load(GOLDEN / "evf_sam" / file)[key]
    np.testing.assert_array_equal(normalised.transpose(2, 0, 1)[:, ::32, ::32], golden)


@pytest.mark.parametrize("i", [0, 2])
def test_encoder_input_is_the_originals(i: int):
    file, _, key = ORIGINAL[i]
    ours = encoder_input(read_image(GOLDEN / "evf_sam" / f"image_{i}.png"))
    golden = np.load(GOLDEN / "evf_sam" / file)[key]
    np.testing.assert_allclose(ours.transpose(2, 0, 1)[:, ::8, ::8], golden, rtol=0, atol=5e-6)


# As in golden/make_image_input.py, which needs torch: shrunk, enlarged, one pixel wide, prime.
CASES = [
    (427, 640, 224),
    (640, 480, 224),
    (50, 60, 224),
    (97, 331, 224),
    (1, 1, 224),
    (1, 700, 64),
    (300, 2, 64),
    (1080, 1920, 224),
    (13, 7, 5),
]


def noise(height: int, width: int) -> np.ndarray:
    """An image whose neighbouring pixels have nothing in common: the hardest for a filter."""
    rng = np.random.Generator(np.random.Philox(key=np.array([height, width], np.uint64)))
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("height, width, size", CASES)
def test_bicubic_equals_stored_outputs_of_torch(height: int, width: int, size: int):
    golden = np.load(GOLDEN / "image_torch.npz")[f"bicubic_{height}_{width}_{size}"]
    step = max(1, size // 16)
    ours = encoder_input(noise(height, width), size)[::step, ::step]
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("height, width", [(427, 640), (1, 1), (1, 900), (223, 224), (1301, 1900)])
@pytest.mark.parametrize("size", [224, 65])
def test_bicubic_equals_torch(height: int, width: int, size: int):
    import torch

    image = noise(height, width)
    tensor = torch.from_numpy(image).permute(2, 0, 1).float().div(255)[None]
    theirs = torch.nn.functional.interpolate(
        tensor, (size, size), mode="bicubic", align_corners=False, antialias=False
    )
    theirs = theirs.sub(0.5).div(0.5)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(encoder_input(image, size), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width, size", CASES)
def test_stretching_without_antialias_equals_stored_outputs_of_torch(height, width, size):
    golden = np.load(GOLDEN / "image_torch.npz")[f"stretched_{height}_{width}_{size}"]
    step = max(1, size // 16)
    ours = stretched_input(noise(height, width), size, antialias=False)[::step, ::step]
    np.testing.assert_array_equal(ours, golden)


@pytest.mark.torch
@pytest.mark.parametrize("height, width", [(427, 640), (1, 1), (1, 900), (223, 224), (1301, 1900)])
@pytest.mark.parametrize("size", [224, 65, 1024])
def test_stretching_without_antialias_equals_torch(height: int, width: int, size: int):
    import torch

    image = noise(height, width)
    tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()[None]
    theirs = torch.nn.functional.interpolate(
        tensor, (size, size), mode="bilinear", align_corners=False
    )
    theirs = theirs[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(stretched_input(image, size, antialias=False), theirs)


def test_antialias_makes_no_difference_where_no_side_shrinks():
    image = noise(48, 60)
    with_antialias = stretched_input(image, 64)
    np.testing.assert_array_equal(stretched_input(image, 64, antialias=False), with_antialias)
    shrunk = stretched_input(noise(200, 50), 64).astype(int)
    without = stretched_input(noise(200, 50), 64, antialias=False)
    assert np.abs(shrunk - without).max() > 50


def test_an_image_of_the_encoders_size_is_not_filtered():
    image = noise(224, 224)
    expected = (image.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(encoder_input(image), expected)


def test_bicubic_overshoots_and_is_not_clamped():
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    ours = encoder_input(edge, 32)
    assert ours.min() < -1.05 and ours.max() > 1.05


@pytest.mark.parametrize(
    "original, expected",
    [  # what the original's int(x + 0.5) gives
        ((480, 640), (768, 1024)),
        ((427, 640), (683, 1024)),
        ((1080, 1920), (576, 1024)),
        ((333, 500), (682, 1024)),
        ((1, 1), (1024, 1024)),
        ((1, 5000), (1, 1024)),
        ((4000, 1), (1024, 1)),
    ],
)
def test_longest_side_fills_the_frame(original: tuple[int, int], expected: tuple[int, int]):
    assert sam_size(*original) == expected


@pytest.mark.parametrize("height, width", [(1, 3000), (3000, 1), (1, 1), (70, 50)])
def test_frame_holds_the_image_top_left_and_zeros(height: int, width: int):
    frame, size = sam_input(np.full((height, width, 3), 200, np.uint8), frame=64)
    assert frame.shape == (64, 64, 3)
    assert size == sam_size(height, width, frame=64)
    assert (frame[: size[0], : size[1]] == 200).all()
    assert not frame[size[0] :].any() and not frame[:, size[1] :].any()


def test_an_image_that_fills_the_frame_is_not_filtered():
    image = noise(40, 64)
    frame, _ = sam_input(image, frame=64)
    np.testing.assert_array_equal(frame[:40], image)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_lossless_formats_read_exactly(tmp_path: Path, suffix: str):
    if suffix == ".webp" and not features.check("webp"):
        pytest.skip("this Pillow reads no WebP")
    path = tmp_path / f"image{suffix}"
    Image.fromarray(smooth()).save(path, lossless=True)
    np.testing.assert_array_equal(read_image(path), smooth())


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpeg_reads_closely(tmp_path: Path, mode: str):
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth()).convert(mode).save(path, quality=98, subsampling=0)
    assert np.abs(read_image(path).astype(int) - smooth()).mean() < 2


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str):
    # What a camera stores for an upright scene, by the EXIF standard's table of orientations.
    store = {
        1: lambda scene: scene,
        2: lambda scene: scene[:, ::-1],
        3: lambda scene: scene[::-1, ::-1],
        4: lambda scene: scene[::-1],
        5: lambda scene: scene.swapaxes(0, 1),
        6: lambda scene: np.rot90(scene),
        7: lambda scene: scene[::-1, ::-1].swapaxes(0, 1),
        8: lambda scene: np.rot90(scene, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    stored = Image.fromarray(np.ascontiguousarray(store[orientation](smooth())))
    stored.save(path, exif=exif, lossless=True, quality=98, subsampling=0)
    ours = read_image(path)
    assert ours.shape == smooth().shape
    assert np.abs(ours.astype(int) - smooth()).mean() < 2


def test_a_broken_exif_block_does_not_hide_the_image(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.fromarray(smooth()).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(path), smooth())


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P"])
def test_greys_and_palettes_are_expanded(tmp_path: Path, mode: str):
    image = Image.fromarray(smooth()).convert(mode)
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image.convert("RGB"))


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped_not_blended(tmp_path: Path, alpha: int):
    rgba = np.dstack([smooth(), np.full(smooth().shape[:2], alpha, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), smooth())


def test_a_transparent_colour_of_a_palette_keeps_its_colour(tmp_path: Path):
    image = Image.fromarray(smooth()).convert("P")
    image.save(tmp_path / "image.png", transparency=3)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image.convert("RGB"))


def test_sixteen_bit_grey_keeps_the_upper_byte(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    for suffix in (".png", ".tif"):
        path = tmp_path / f"image{suffix}"
        Image.fromarray(values).save(path)
        expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
        np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("channels, colour_type", [(3, 2), (4, 6)])
def test_sixteen_bit_colour_keeps_the_upper_byte(tmp_path: Path, channels: int, colour_type: int):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # filter 0: as it is
    path = tmp_path / "image.png"
    path.write_bytes(png(width=30, height=20, depth=16, colour_type=colour_type, rows=rows))
    np.testing.assert_array_equal(read_image(path), values[..., :3] >> 8)


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "image.gif") == 10).all()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file from its raw rows, which Pillow cannot write for 16-bit colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere.png: expected an image file, found nothing"):
        read_image(tmp_path / "nowhere.png")


def test_a_directory(tmp_path: Path):
    with pytest.raises(UserError, match="found a directory"):
        read_image(tmp_path)


def test_an_empty_file(tmp_path: Path):
    path = tmp_path / "image.png"
    path.touch()
    with pytest.raises(UserError, match="image.png: expected an image file, found an empty one"):
        read_image(path)


@pytest.mark.parametrize("content", [b"no image\n" * 100, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_file_that_is_no_image(tmp_path: Path, content: bytes):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="image.png: expected"):
        read_image(path)


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "EPS", "PDF", "TGA", "PPM"])
def test_other_formats_are_not_opened(tmp_path: Path, kind: str):
    path = tmp_path / "image.png"  # whatever it is called
    Image.fromarray(smooth()).save(path, format=kind)
    for read in (read_image, read_size, lambda file: decode_image(file.read_bytes(), "image.png")):
        with pytest.raises(UserError, match="image.png: expected an image file, found something e"):
            read(path)


def test_a_cameras_file_of_two_pictures_is_read(tmp_path: Path):
    path = tmp_path / "image.jpg"
    first = Image.fromarray(smooth())
    first.save(path, format="MPO", save_all=True, append_images=[first.rotate(180)], quality=98)
    with Image.open(path) as opened:
        assert opened.format == "MPO"
    assert np.abs(read_image(path).astype(int) - smooth()).mean() < 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_image(tmp_path: Path, suffix: str, kept: float):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="image.*: expected"):
        read_image(path)


def test_a_billion_pixels_are_refused_by_the_header(tmp_path: Path):
    path = tmp_path / "image.png"
    # The file holds one row: an attempt to decode it would find it broken, not large.
    path.write_bytes(png(width=40_000, height=40_000, depth=8, colour_type=2, rows=b"\0"))
    with pytest.raises(UserError, match="expected at most 178,956,970 pixels, found more"):
        read_image(path)


def test_the_pixel_limit_is_the_callers(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.fromarray(smooth(64, 96)).save(path)
    assert read_image(path, max_pixels=64 * 96).shape == (64, 96, 3)
    with pytest.raises(UserError, match="expected at most 6,143 pixels, found 96 x 64"):
        read_image(path, max_pixels=64 * 96 - 1)


def test_floating_point_and_32_bit_pixels_are_refused(tmp_path: Path):
    path = tmp_path / "image.tif"
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(path)
    with pytest.raises(UserError, match="image.tif: expected 8 or 16 bits a pixel"):
        read_image(path)
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(path)
    with pytest.raises(UserError, match="image.tif: expected at most 16 bits a pixel"):
        read_image(path)


def test_bytes_are_read_as_their_file_is(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.fromarray(smooth()).save(path)
    np.testing.assert_array_equal(decode_image(path.read_bytes(), "record 3"), smooth())
    with pytest.raises(UserError, match="record 3: expected an image file, found an empty one"):
        decode_image(b"", "record 3")
    with pytest.raises(UserError, match="record 3: expected an image file, found something else"):
        decode_image(b"no image", "record 3")
