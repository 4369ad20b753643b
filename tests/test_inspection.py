"""`inspect` finds what is there, to the number; `views` shows what training sees, to the pixel."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_errors import run_cli

from dino_sd import build, recipe, sheets
from dino_sd.config import InspectSettings
from dino_sd.data import duplicates
from dino_sd.data.duplicates import nearly_same
from dino_sd.data.loader import Batches
from dino_sd.data.photometry import Photometry
from dino_sd.data.source import open_source
from dino_sd.data.statistics import statistics
from dino_sd.errors import UserError
from dino_sd.inspection import inspect
from dino_sd.suggestions import crop_sizes, data_pair


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes, a copy, a re-encoded copy, a flat, a gray, a 16-bit and two broken images."""
    photos = pytest.importorskip("skimage.data")
    root = tmp_path / "mixed"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    photo = Image.fromarray(photos.astronaut()).resize((100, 120))
    photo.save(root / "a/photo.jpg", quality=95)
    (root / "b/same.jpg").write_bytes((root / "a/photo.jpg").read_bytes())
    photo.save(root / "b/again.jpg", quality=40)
    Image.fromarray(photos.coffee()).resize((110, 90)).save(root / "a/coffee.png")
    Image.new("RGB", (50, 50), (90, 80, 70)).save(root / "a/flat.png")
    Image.fromarray(photos.camera()).resize((64, 64)).save(root / "b/gray.png")
    ramp = np.linspace(0, 65535, 80 * 60).astype(np.uint16).reshape(80, 60)
    Image.fromarray(ramp).save(root / "b/deep.png")
    (root / "b/cut.jpg").write_bytes((root / "b/again.jpg").read_bytes()[:1500])
    (root / "b/empty.png").touch()
    return root


def look_at(spec: object, **settings: Any) -> dict[str, Any]:
    return inspect(str(spec), InspectSettings(**{"out": None, "workers": 0, **settings}))


def test_every_number_of_a_folder(mixed: Path):
    report = look_at(mixed)
    where = {path.name: str(path) for path in mixed.glob("*/*")}
    assert (report["images"], report["seen"], report["channels"], report["dtype"]) == (9, 9, 3, "uint8")
    assert report["height"] == {"min": 50, "p5": 50, "median": 90, "p95": 120, "max": 120}
    assert report["width"] == {"min": 50, "p5": 50, "median": 100, "p95": 110, "max": 110}
    assert report["shorter_side"] == {"min": 50, "p5": 50, "median": 90, "p95": 100, "max": 100}
    assert report["aspect"] == pytest.approx({"min": 3 / 4, "p5": 3 / 4, "median": 5 / 6, "p95": 11 / 9, "max": 11 / 9})
    assert report["extensions"] == {".png": 4, ".jpg": 3}
    assert report["modes"] == {"RGB": 5, "L": 1, "L, 16 bits": 1}
    sizes = [path.stat().st_size for path in mixed.glob("*/*") if path.name not in ("cut.jpg", "empty.png")]
    assert report["bytes"] == {"seen": sum(sizes), **{k: pytest.approx(v) for k, v in quantiles(sizes).items()}}
    assert report["classes"] == {"counts": {"a": 3, "b": 6}, "unlabelled": 0, "imbalance": 2.0}
    groups = [[where["photo.jpg"], where["same.jpg"]]]
    assert report["duplicates"] == {"images": 1, "of_several_classes": 1, "groups": groups}
    groups = [[where["again.jpg"], where["photo.jpg"]]]
    assert report["near_duplicates"] == {"images": 1, "of_several_classes": 1, "groups": groups}
    assert report["flat"] == [where["flat.png"]] and report["gray"] == 2
    assert [item["where"] for item in report["broken"]] == [where["cut.jpg"], where["empty.png"]]
    assert [item["index"] for item in report["broken"]] == [2, 4]
    assert "cannot be read" in report["broken"][0]["reason"] and "0 bytes" in report["broken"][1]["reason"]
    assert report["fingerprint"] == open_source(str(mixed), 3).fingerprint()


def quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)  # of seven: nearest places
    return {"min": ordered[0], "p5": ordered[0], "median": ordered[3], "p95": ordered[6], "max": ordered[6]}


def test_mean_and_std_are_those_of_the_pixels(mixed: Path):
    means, squares = [], []
    for path in sorted(mixed.glob("*/*")):
        if path.name in ("cut.jpg", "empty.png"):
            continue
        pixels = np.asarray(Image.open(path))
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
        pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
        means.append((pixels / 255).mean((0, 1)))
        squares.append(((pixels / 255) ** 2).mean((0, 1)))
    mean = np.mean(means, 0)
    report, measured = look_at(mixed), statistics(open_source(str(mixed), 3))
    assert report["mean"] == pytest.approx(mean, abs=1e-12)
    assert report["std"] == pytest.approx(np.sqrt(np.mean(squares, 0) - mean**2), abs=1e-12)
    assert (report["mean"], report["std"]) == (measured.mean, measured.std)


def test_large_jpegs_have_the_statistics_of_training(tmp_path: Path):
    photos = pytest.importorskip("skimage.data")
    Image.fromarray(photos.astronaut()).save(tmp_path / "large.jpg", quality=90)
    report, measured = look_at(tmp_path), statistics(open_source(str(tmp_path), 3))
    assert (report["mean"], report["std"]) == (measured.mean, measured.std)


def test_workers_change_nothing(mixed: Path):
    reports = [look_at(mixed, workers=workers) for workers in (0, 2)]
    for report in reports:
        report.pop("settings")
    assert reports[0] == reports[1]


def test_one_json_object_and_nothing_else(mixed: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dino-sd", "inspect", str(mixed), "--json", f"out={tmp_path / 'x.png'}"])
    from dino_sd import cli

    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert not stop.value.code and len(said.out.splitlines()) == 1
    assert json.loads(said.out)["duplicates"]["images"] == 1
    assert "cut.jpg" in said.err and "dino-sd train own_images" in said.err
    assert not_blank(tmp_path / "x.png")


def not_blank(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("L"))
    return min(pixels.shape) > 300 and pixels.std() > 20


def test_bands(tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(6):
        image = rng.integers(0, 3000, (48, 80, 13), dtype=np.uint16)
        image[0, 0] = 60000  # one bright pixel does not make the rest flat
        np.save(tmp_path / f"{i}.npy", image)
    report = look_at(tmp_path, out=str(tmp_path / "inspect.png"))
    assert (report["channels"], report["dtype"], report["modes"]) == (13, "uint16", {"13 x uint16": 6})
    assert report["classes"] is None and not report["flat"] and not report["near_duplicates"]["groups"]
    assert len(report["mean"]) == 13 and report["mean"][0] == pytest.approx(1500 / 65535, rel=0.05)
    assert report["range"] == pytest.approx([0, 60000 / 65535])
    assert not_blank(tmp_path / "inspect.png")
    cfg = recipe.load_config("own_images", report["suggestions"]["settings"])
    assert (cfg.views.global_.size, cfg.views.local.size, cfg.batch_size) == ((48, 80), (24, 40), 4)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)])
def test_channels_are_found(tmp_path: Path, mode: str, channels: int):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.radial_gradient("L").convert("RGB").convert(mode).save(tmp_path / f"x.{suffix}")
    if mode == "CMYK":
        Image.radial_gradient("L").convert("CMYK").save(tmp_path / "x.jpg")
        (tmp_path / "x.tif").unlink()
    assert look_at(tmp_path)["channels"] == channels


def test_gray_images_in_three_channels_are_told(tmp_path: Path):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "x.png")
    report = look_at(tmp_path)
    assert report["gray"] == 1 and report["channels"] == 3
    assert any("channels=1" in warning for warning in report["warnings"])
    assert recipe.load_config("own_images", report["suggestions"]["settings"]).channels == 1


def test_images_in_memory(tmp_path: Path):
    report = look_at("fashion-mnist-mini:train", limit=2000, out=str(tmp_path / "inspect.png"))
    assert (report["images"], report["seen"], report["channels"]) == (10_000, 2_000, 1)
    assert report["height"]["min"] == report["height"]["max"] == 28 and report["bytes"] is None
    assert set(report["classes"]["counts"].values()) == {1000}
    assert not report["broken"] and report["mean"] == pytest.approx([0.286], abs=0.01)
    assert report["near_duplicates"]["images"] < 5  # trousers are alike, but not the same
    settings = report["suggestions"]["settings"]
    assert "model_args.patch_size=7" in settings and "views.local.size=14" in settings
    assert not_blank(tmp_path / "inspect.png")


def test_names_that_are_hard_to_print(tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "cost $1_{ or $2"
    folder.mkdir()
    for name in (b"a\xff.png", b"b [red]$x_{$.png"):
        Image.radial_gradient("L").save(folder / "x.png")
        (folder / "x.png").rename(os.path.join(os.fsencode(folder), name).decode("utf-8", "surrogateescape"))
    report = look_at(folder, out=str(tmp_path / "x.png"))
    assert report["duplicates"]["images"] == 1 and not_blank(tmp_path / "x.png")
    said = capsys.readouterr().out
    assert "a\\udcff.png" in said and "b [red]$x_{$.png" in said
    pairs = ["channels=1", "views.global.size=64", "views.local.size=32"]
    code, said = run_cli(monkeypatch, capsys, "views", folder, *pairs, "--out", tmp_path / "views.png")
    assert code == 0 and not_blank(tmp_path / "views.png"), said


def test_nothing_but_broken_files(tmp_path: Path, monkeypatch, capsys):
    for i in range(30):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"not an image")
    report = look_at(tmp_path, out=str(tmp_path / "inspect.png"))
    assert len(report["broken"]) == 30 and report["mean"] is report["std"] is report["height"] is None
    assert report["suggestions"] is None and "none of 30" in report["warnings"][0]
    said = capsys.readouterr().out
    assert "19.jpg" in said and "20.jpg" not in said and "10 more" in said
    code, _ = run_cli(monkeypatch, capsys, "inspect", tmp_path, f"out={tmp_path / 'inspect.png'}")
    assert code == 0 and (tmp_path / "inspect.png").is_file()


def test_what_cannot_be(mixed: Path, tmp_path: Path, monkeypatch, capsys):
    for arguments, word in (
        (["/no/such"], "/no/such"), ([mixed, "outt=x"], "'out'"), ([mixed, "out=x.no"], "x.no"),
        ([mixed, "out=/proc/x.png"], "/proc/x.png"), ([mixed, "near=40"], "near=40"),
    ):  # fmt: skip
        code, said = run_cli(monkeypatch, capsys, "inspect", *arguments)
        assert code == 2 and word in said and said.splitlines()[-1].startswith("error: "), said


SMALL = ["model_args.embed_dim=32", "model_args.depth=2", "model_args.num_heads=2", "out=unused"]


@pytest.mark.parametrize("size", [(300, 320), (200, 130), (90, 60), (30, 33), (28, 28), (240, 480), (5, 9)])
def test_suggestions_are_settings_that_work(tmp_path: Path, size: tuple[int, int]):
    """height, width -> the printed command, read back, builds crops that the model takes."""
    folder = tmp_path / "2024"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    report = look_at(folder)
    pairs = report["suggestions"]["settings"]
    cfg = recipe.load_config("own_images", [*pairs, *SMALL])
    build.make_backbone(cfg)  # checks the sizes
    assert cfg.batch_size == 3 and str(cfg.data) == str(folder)
    assert report["suggestions"]["command"].startswith("dino-sd train own_images data=")
    height, width = build.size_pair(cfg.views.global_.size)
    assert abs(width / height - size[1] / size[0]) < 0.4 or max(size) / min(size) <= 1.5
    assert cfg.views.ratio[0] < width / height < cfg.views.ratio[1]


@pytest.mark.parametrize(
    ("shorter", "aspect", "expected"),
    [
        (500, 1.0, (16, 224, 96)), (128, 1.3, (16, 128, 48)), (100, 1.0, (16, 96, 48)), (96, 1.0, (8, 96, 40)),
        (48, 1.0, (8, 48, 24)), (28, 1.0, (7, 28, 14)), (32, 1.0, (4, 32, 12)), (3, 1.0, (4, 8, 4)),
        (300, 2.0, (16, [224, 448], [96, 192])), (300, 0.5, (16, [448, 224], [192, 96])),
    ],
)  # fmt: skip
def test_crop_sizes(shorter: int, aspect: float, expected: tuple):
    assert crop_sizes(shorter, aspect) == expected


@pytest.mark.parametrize("spec", ["plain/folder", "2024", "1e5", "[a, b]", "a: b", "null", "set:train"])
def test_any_spec_survives_the_command_line(spec: str):
    assert recipe.load_config("own_images", [data_pair(spec)]).data.source == [spec]


def test_bands_of_bits_find_what_comparing_all_finds(monkeypatch):
    rng = np.random.default_rng(0)
    seeds = rng.random((40, 8, 9))
    thumbnails = np.concatenate([seeds + rng.normal(0, 0.004, seeds.shape) for _ in range(8)]).astype(np.float32)
    whole = nearly_same(thumbnails, 3, 1.0)
    assert [len(group) for group in whole] == [8] * 40
    monkeypatch.setattr(duplicates, "_AT_ONCE", 16)
    assert nearly_same(thumbnails, 3, 1.0) == whole
    assert nearly_same(np.repeat(thumbnails[:1], 50, 0), 3, 1.0) == [list(range(50))]
    assert nearly_same(thumbnails[:0], 3, 1.0) == []


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Any]:
    """A config as `views` makes it: gray photographs or what the pairs say."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70 + i, 60), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return lambda *pairs: recipe.load_config("own_images", [f"data={folder}", "steps=1", *pairs])


def test_views_are_those_of_the_first_batch(own, tmp_path: Path):
    for epoch in (0, 2):
        cfg = own("batch_size=4", "seed=3", "views.global.size=48", "views.local.size=24")
        source, spec = build.open_data(cfg), build.view_spec(cfg)
        first = 3 * epoch  # steps: twelve images, four a step
        batch = next(iter(Batches(source, spec, 3, 4, start_step=first, total_steps=first + 1)))
        photometry = Photometry(spec, [0.0] * 3, [1.0] * 3)
        expected = [photometry(crops, rows) for crops, rows in zip(batch.groups, batch.rows, strict=True)]
        crops = sheets.first_crops(cfg, source, 4, epoch)
        assert crops.indices == batch.indices.tolist()
        assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(crops.groups, expected, strict=True))
        for index, original in zip(crops.indices, crops.originals, strict=True):
            assert torch.equal(original, source.image(index).float() / 255)
        sheet, columns = sheets.crops_sheet(crops, True, originals=True)
        assert [name for _, name in columns][:4] == ["original", "global 1", "global 2", "local 1 - 2"]
        for row in range(4):  # the second global crop, where its column is
            left = round(columns[2][0] - 24)
            shown = sheet[1 + row * 50 : 49 + row * 50, left : left + 48]
            assert np.array_equal(shown, expected[0][4 + row].numpy().transpose(1, 2, 0)), row


def test_picture_of_views(own, tmp_path: Path, monkeypatch, capsys):
    own()
    out = tmp_path / "views.png"
    code, said = run_cli(monkeypatch, capsys, "views", tmp_path / "photos", "views.global.size=48", "--out", out,
                         "--images", "3", "epochs=5", "optim.warmup=epochs=1", "accumulate=8")  # fmt: skip
    assert code == 0 and not_blank(out), said
    one = out.read_bytes()
    for options in (["--epoch", "1"], ["seed=1"], ["config=supervised", "views.global.count=1"]):
        code, said = run_cli(monkeypatch, capsys, "views", tmp_path / "photos", "--out", out, "--images", "3", *options)
        assert code == 0 and out.read_bytes() != one, said
    code, said = run_cli(monkeypatch, capsys, "views", tmp_path / "none", "--out", out)
    assert code == 2 and "none" in said


def test_views_of_gray_and_of_bands(tmp_path: Path):
    for name, channels in (("gray", 1), ("bands", 5)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(3):
            np.save(
                folder / f"{i}.npy", np.random.default_rng(i).integers(0, 9000, (40, 60, channels), dtype=np.uint16)
            )
        out = sheets.views(
            str(folder),
            [f"channels={channels}", "views.global.size=32", "views.local.size=16"],
            8,
            0,
            tmp_path / "x.png",
        )
        assert not_blank(out)
    with pytest.raises(UserError, match="channels"):
        sheets.views(str(tmp_path / "bands"), ["views.global.size=32"], 8, 0, tmp_path / "x.png")
