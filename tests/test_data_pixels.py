"""Pixels as they are: any number of channels, bytes, 16 bits and floats, from the file to the loss and the judge."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image

from dino_sd.data.decode import native_dtype, picture
from dino_sd.data.evaluation import eval_batches, resize_crop
from dino_sd.data.geometry import make_views
from dino_sd.data.photometry import Photometry
from dino_sd.data.source import BadImage, open_source
from dino_sd.data.statistics import statistics
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError
from dino_sd.recipe import load_config
from dino_sd.train import train

tifffile = pytest.importorskip("tifffile")


def image_of(seed: int, channels: int, dtype: type, size: tuple[int, int] = (40, 36)) -> np.ndarray:
    """(H, W, C), smooth, over the whole range of the type."""
    noise = torch.from_numpy(np.random.default_rng(seed).random((1, channels, 6, 5), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(noise, size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    return smooth if dtype == np.float32 else np.rint(smooth * np.iinfo(dtype).max).astype(dtype)


def write(path: Path, pixels_HWC: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, pixels_HWC)
    elif path.suffix == ".tif":
        several = {"planarconfig": "contig"} if pixels_HWC.shape[2] > 1 else {}
        tifffile.imwrite(path, pixels_HWC.squeeze(), photometric="minisblack", **several)
    else:
        Image.fromarray(pixels_HWC.squeeze()).save(path)


def folder_of(root: Path, channels: int, dtype: type, suffix: str, count: int = 16) -> Path:
    for index in range(count):
        target = root / f"class{index % 2}"
        target.mkdir(parents=True, exist_ok=True)
        write(target / f"{index:02d}{suffix}", image_of(index, channels, dtype))
    return root


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_files_are_decoded_as_numpy_has_them(tmp_path: Path, channels: int, dtype: type, suffix: str):
    folder_of(tmp_path, channels, dtype, suffix, count=3)
    source = open_source(str(tmp_path), channels)
    assert source.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype and len(source) == 3
    for index in range(3):
        assert np.array_equal(source.image(index).numpy(), image_of(index, channels, dtype).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint8, ".npy"), (np.uint16, ".tif"), (np.float32, ".npy")])
def test_any_channels_train_and_are_evaluated(tiny, tmp_path: Path, capsys, channels: int, dtype: type, suffix: str):
    images = folder_of(tmp_path / "images", channels, dtype, suffix)
    options = {"channels": channels, "data": images, "steps": 2, "batch_size": 8}
    train(tiny(tmp_path / "run", **options, evaluate__every=0.5, evaluate__train=images, evaluate__test=images))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert any("knn" in line for line in lines)
    done = command("knn", tmp_path / "run", f"train={images}", f"test={images}", "k=1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["results"][0]["top1"] == 100.0, done.stderr


def test_colour_operations_without_colour_are_said(tiny, tmp_path: Path, capsys):
    images = folder_of(tmp_path / "images", 13, np.uint8, ".npy")
    train(tiny(tmp_path / "run", channels=13, data=images, steps=1, batch_size=8))
    assert "channels=13: hue, saturation and grayscale" in capsys.readouterr().err
    with pytest.raises(UserError, match="randaugment is for gray and RGB images, not for channels=13"):
        tiny(tmp_path / "run2", channels=13, data=images, views__randaugment="[2,9]")


def test_randaugment_is_for_bytes(tiny, tmp_path: Path):
    images = folder_of(tmp_path / "images", 1, np.uint16, ".tif")
    with pytest.raises(UserError, match="views.randaugment works on bytes, .* holds uint16 pixels; turn it off"):
        train(tiny(tmp_path / "run", data=images, views__randaugment="[2,9]", batch_size=8))


def test_the_wrong_number_of_channels_is_one_clear_line(tiny, tmp_path: Path):
    images = folder_of(tmp_path / "images", 13, np.uint8, ".npy")
    with pytest.raises(UserError, match=r"none of 16 .*holds 13 channel\(s\) where channels=4"):
        train(tiny(tmp_path / "run", channels=4, data=images))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_normalised_views_are_those_of_the_pixels(tmp_path: Path, dtype: type):
    """Crops of the whole image at its own size: what reaches the network is (pixel - mean) / std, for every type."""
    folder_of(tmp_path, 2, dtype, ".npy", count=4)
    source = open_source(str(tmp_path), 2)
    found = statistics(source)
    spec = ViewSpec(
        (ViewGroup(1, (40, 36), center=1.0),), channels=2, flip=0.0
    )  # fmt: skip
    views = make_views(source, spec, 0, 0, np.arange(4))
    normalised = Photometry(spec, found.mean, found.std, (found.low, found.high))(views.groups[0], views.rows[0])
    white = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = np.stack([image_of(index, 2, dtype) for index in range(4)]).transpose(0, 3, 1, 2) / np.float64(white)
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    assert found.mean == pytest.approx(mean) and found.std == pytest.approx(std)
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    assert np.abs(normalised.numpy() - expected).max() < 1e-5


def test_twelve_bits_in_sixteen_keep_their_levels_and_their_range(tmp_path: Path):
    ramp = np.tile(np.linspace(100, 4095, 400).astype(np.uint16), (300, 1))
    for index in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{index}.png")
    source = open_source(str(tmp_path), 1)
    found = statistics(source)
    assert (found.low, found.high) == (100 / 65535, 4095 / 65535)
    spec = ViewSpec((ViewGroup(1, (64, 64), (0.9, 1.0)),), channels=1, brightness=0.2, contrast=0.2, solarize=(1.0,))
    views = make_views(source, spec, 0, 0, np.arange(3))
    x = Photometry(spec, [0.0], [1.0], (found.low, found.high))(views.groups[0], views.rows[0])
    x = (x - found.low) / (found.high - found.low)
    # 64 columns of three images, each its own level; solarised about the middle of the range, not of 16 bits.
    assert len(x.unique()) > 150 and x.min() >= -1e-6 and 0.4 < x.max() <= 0.5 + 1e-6


def test_floats_beyond_one_are_not_clipped(tmp_path: Path):
    pixels = np.linspace(-1000, 3000, 40 * 36, dtype=np.float32).reshape(40, 36, 1)  # Hounsfield units
    np.save(tmp_path / "a.npy", pixels)
    source = open_source(str(tmp_path), 1)
    found = statistics(source)
    assert (found.low, found.high) == (-1000, 3000)
    spec = ViewSpec((ViewGroup(1, (40, 36), center=1.0),), channels=1)
    views = make_views(source, spec, 0, 0, np.arange(1))
    x = Photometry(spec, found.mean, found.std, (found.low, found.high))(views.groups[0], views.rows[0])
    assert np.allclose(x[0, 0].numpy() * found.std[0] + found.mean[0], pixels[..., 0], atol=0.01)


def test_mixed_depths_are_scaled_to_that_of_most(tmp_path: Path):
    ramp = np.tile(np.arange(0, 65536, 256, dtype=np.uint16), (20, 1))
    for index in range(3):
        Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / f"{index}.png")
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    source = open_source(str(tmp_path), 1)
    assert source.dtype == torch.uint8
    assert np.array_equal(source.image(3)[0], np.tile(np.arange(256, dtype=np.uint8), (20, 1)))
    data = (tmp_path / "0.png").read_bytes()
    assert np.array_equal(picture(data, "", 1, torch.uint16).decode(1)[0], np.tile(np.arange(256) * 257, (20, 1)))
    assert float(picture(data, "", 1, torch.float32).decode(1).max()) == 1.0


def test_npy_axes_and_numbers(tmp_path: Path):
    def saved(array) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    rng = np.random.default_rng(0)
    chw = rng.integers(0, 255, (5, 30, 40), dtype=np.uint8)
    assert np.array_equal(picture(saved(chw), "", 5).decode(1), chw)
    assert np.array_equal(picture(saved(chw.transpose(1, 2, 0)), "", 5).decode(1), chw)
    assert np.array_equal(picture(saved(chw[0]), "", 1).decode(1), chw[:1])
    for wide in (np.int16, np.int32, np.uint32, np.float64):  # by their type, whatever the values are
        assert native_dtype(saved(chw.astype(wide)), "") == torch.float32
    signed = picture(saved(-chw.astype(np.int16)), "", 5, torch.float32).decode(1)
    assert np.array_equal(signed, -chw.astype(np.float32))
    assert picture(saved(chw > 100), "", 5).decode(1).unique().tolist() == [0, 255]
    for wrong, reason in (
        (np.full((4, 4), np.nan, np.float32), "holds NaN"),
        (np.zeros((2, 3, 4, 5), np.uint8), "shape"),
        (np.zeros((4, 4), "<U3"), "type <U3"),
    ):
        with pytest.raises(BadImage, match=reason):
            picture(saved(wrong), "a.npy", 1, torch.float32)
    file = io.BytesIO()
    np.save(file, np.array([[print]]), allow_pickle=True)
    with pytest.raises(BadImage, match="allow_pickle=False"):
        picture(file.getvalue(), "a.npy", 1)


def test_sixteen_bit_colour_png(tmp_path: Path):
    pixels = image_of(0, 3, np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(png_of_16_bits(pixels))
    source = open_source(str(tmp_path), 3)
    assert source.dtype == torch.uint16 and np.array_equal(source.image(0).numpy(), pixels.transpose(2, 0, 1))


def png_of_16_bits(pixels_HWC: np.ndarray) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_evaluation_of_sixteen_bits(tmp_path: Path):
    folder_of(tmp_path, 1, np.uint16, ".tif", count=4)
    source = open_source(str(tmp_path), 1)
    ((images, labels, _),) = eval_batches(source, (20, 20), 0.9)
    assert images.dtype == torch.uint16 and labels.tolist() == [0, 1, 0, 1]
    exact = resize_crop(source.image(0).float(), (20, 20), 0.9)
    assert (images[0].float() - exact).abs().max() <= 0.5


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_few_images_with_default_settings(tmp_path: Path, count: int):
    """They train, or one line says why not and what to do; done as it says, they train."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(count):
        Image.fromarray(image_of(index, 3, np.uint8, (64, 72))).save(images / f"{index}.jpg")
    pairs = [f"data={images}", "steps=2", f"out={tmp_path / 'run'}", "optim.warmup=0", "workers=0"]
    small = ["model=vit_tiny_patch16_224", "views.global.size=32", "views.local.size=16", "terms.dino.prototypes=64"]
    done = command("train", "own_images", *pairs, *small)
    (line,) = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2 and line.startswith("error: batch_size=64") and f"set batch_size={count} or less" in line
    )
    train(load_config("own_images", [*pairs, *small, f"batch_size={count}"]))
    assert (tmp_path / "run" / "checkpoints").is_dir()
