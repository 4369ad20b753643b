"""Views are those of the published recipe, in distribution; and what the bench says of their speed is whole."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import command
from PIL import Image

from dino_sd import bench_views, build, recipe
from dino_sd.data.source import open_source
from dino_sd.data.views import ViewGroup, ViewSpec

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from dino_sd.bench_data import photographs, summary  # noqa: E402

# Pillow cuts fractions off after every operation on bytes: with the same numbers its jittered views are 1.2 to 1.7
# levels of 255 darker than those of floats (measured by channel on these photographs).
TRUNCATED = 2 / 255


def test_views_are_like_those_of_torchvision_and_pillow(tmp_path: Path):
    """Mean, variance and histogram of every channel, and the shares of what was done, over more than 2,000 views."""
    photographs(tmp_path, 35)
    source = open_source(str(tmp_path), 3)
    spec = build.view_spec(recipe.load_config("own_images", [f"data={tmp_path}"]))
    ours, theirs = bench_views.compare(source, spec, 420)
    assert [len(numbers) for numbers in ours.numbers] == [420, 1680]
    for apart, a, b in zip(bench_views.deviations(ours, theirs), ours.numbers, theirs.numbers, strict=True):
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        difference = np.abs(a.mean(0) - b.mean(0))
        assert (difference[:3] < 4 * error[:3] + TRUNCATED).all(), difference[:3] * 255
        assert np.abs(apart[3:]).max() < 4.5, np.abs(apart[3:]).max()
        assert np.sqrt((apart[6:] ** 2).mean()) < 2
    views = sum(len(numbers) for numbers in ours.numbers)
    expected = {"flipped": 0.5, "jittered": 0.8, "gray": 0.2, "blurred": (1 + 0.1 + 8 * 0.5) / 10, "solarised": 0.02}
    for seen in (ours, theirs):
        for name, share in expected.items():
            assert abs(seen.shares[name] - share) < 4 * np.sqrt(share * (1 - share) / views), name


def test_another_recipe_is_noticed(tmp_path: Path):
    """The comparison can fail."""
    photographs(tmp_path, 35)
    source = open_source(str(tmp_path), 3)
    spec = ViewSpec((ViewGroup(2, (48, 48), (0.4, 1.0)),), solarize=(0.5, 0.5))
    plain = ViewSpec((ViewGroup(2, (48, 48), (0.4, 1.0)),), solarize=(0.0, 0.0))
    ours, _ = bench_views.compare(source, plain, 400)
    _, theirs = bench_views.compare(source, spec, 400)
    apart = np.abs(bench_views.deviations(ours, theirs)[0])
    assert apart.max() > 6 and ours.shares["solarised"] == 0 and 0.4 < theirs.shares["solarised"] < 0.6


def test_pictures_of_both(tmp_path: Path, monkeypatch):
    photographs(tmp_path, 7)
    monkeypatch.setattr(bench_views, "COMPARED", 14)
    source = open_source(str(tmp_path), 3)
    bench_views.draw(source, ViewSpec((ViewGroup(2, (32, 32)), ViewGroup(2, (16, 16)))), tmp_path / "views.png")
    assert np.asarray(Image.open(tmp_path / "views.png").convert("L")).std() > 20


def test_bench_data_says_every_stage(tmp_path: Path):
    small = ["views.global.size=48", "views.local.size=24", "views.local.count=2", "batch_size=8"]
    done = command("bench", "data", *small, "--json", "--feed", "500")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["stages"].keys() == {"read", "decode", "crop", "transfer", "photometry"}
    assert all(milliseconds > 0 for milliseconds in report["stages"].values())
    speeds = report["images_per_s"]
    assert speeds.keys() == {"elsewhere", "one_core", "raw", "raw_one_core", "pil"}
    assert speeds["elsewhere"] > speeds["one_core"] and report["times_pil"]["elsewhere"] > 1
    assert report["limit"] in report["stages"] and "500 images/s need" in done.stderr
    for index in range(5):
        np.save(
            tmp_path / f"{index}.npy", np.random.default_rng(index).integers(0, 9999, (40, 40, 5)).astype(np.uint16)
        )
    done = command("bench", "data", tmp_path, "channels=5", *small, "--json")
    assert done.returncode == 0 and "pil" not in json.loads(done.stdout)["images_per_s"], done.stderr


def test_summary_adds_up():
    times = {"read": 1.0, "read and decode": 3.0, "stage one": 7.0, "photometry": 5.0, "transfer": 0.5, "pil": 24.0}
    found = summary(times)
    assert found["stages"] == {"read": 1.0, "decode": 2.0, "crop": 4.0, "transfer": 0.5, "photometry": 5.0}
    assert found["limit"] == "photometry" and found["times_pil"] == pytest.approx({"elsewhere": 24 / 7, "one_core": 2})
