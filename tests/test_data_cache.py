"""Images decoded once, several sets as one, and lists of a million: the same views, and nothing that grows."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from dino_sd import build, checkpoint
from dino_sd.data import cache
from dino_sd.data.cache import cached, in_memory
from dino_sd.data.geometry import make_views
from dino_sd.data.joined import Joined
from dino_sd.data.loader import Batches
from dino_sd.data.order import step_indices, weighted_order
from dino_sd.data.source import BadImage, open_source
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError
from dino_sd.train import train

SPEC = ViewSpec((ViewGroup(2, (24, 24), (0.4, 1.0)), ViewGroup(2, (12, 12), (0.05, 0.4))))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "home"))


def folder_of(root: Path, count: int, size: tuple[int, int] | None, classes: int = 2, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for index in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        target = root / f"class{index % classes}"
        target.mkdir(parents=True, exist_ok=True)
        sides = size or (int(rng.integers(60, 300)), int(rng.integers(60, 300)))
        noise.resize(sides, Image.Resampling.BICUBIC).save(target / f"{index:03d}.png")
    return root


def assert_same_views(one, other, tolerance: int = 0) -> None:
    for ours, theirs in zip(one.groups, other.groups, strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= tolerance
    assert all(torch.equal(a, b) for a, b in zip(one.rows, other.rows, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_raw_copies_are_the_images(tmp_path: Path, workers: int, monkeypatch):
    source = open_source(str(folder_of(tmp_path / "images", 40, None)), 3)
    monkeypatch.setattr(cache, "_CHUNK", 4)
    (tmp_path / "images" / "class1" / "007.png").write_bytes(b"")
    raw = cached(source, tmp_path / "raw", 384, workers)
    for index in range(40):
        if index == 7:
            with pytest.raises(BadImage, match="007.png: is empty"):
                raw.image(index)
        else:
            assert torch.equal(raw.image(index), source.image(index))
    assert_same_views(make_views(raw, SPEC, 0, 0, np.arange(40)), make_views(source, SPEC, 0, 0, np.arange(40)))
    assert raw.labels().tolist() == source.labels().tolist() and raw.fingerprint() != source.fingerprint()
    again = pickle.loads(pickle.dumps(raw))
    assert len(pickle.dumps(raw)) < 20_000 and torch.equal(again.image(3), source.image(3))
    monkeypatch.setattr(type(source), "picture", None)  # made once: no image is decoded again
    assert torch.equal(cached(source, tmp_path / "raw", 384).image(5), again.image(5))
    monkeypatch.undo()
    Image.new("RGB", (70, 80), (9, 8, 7)).save(tmp_path / "images" / "class1" / "005.png")  # unless it has changed
    assert cached(source, tmp_path / "raw", 384).image(5).flatten(1).float().mean(1).tolist() == [9, 8, 7]


def test_larger_images_are_made_smaller(tmp_path: Path):
    source = open_source(str(folder_of(tmp_path / "images", 6, (200, 120))), 3)
    raw = cached(source, tmp_path / "raw", 60)
    assert raw.image(0).shape == (3, 60, 100)
    exact = torch.nn.functional.interpolate(source.image(0)[None], (60, 100), mode="bicubic", antialias=True)[0]
    assert torch.equal(raw.image(0), exact)
    assert len(list((tmp_path / "raw").glob("*/pixels"))) == 1
    cached(source, tmp_path / "raw", 100)  # another size has a place of its own
    assert len(list((tmp_path / "raw").glob("*/pixels"))) == 2


def test_raw_copies_in_vain(tmp_path: Path, monkeypatch):
    source = open_source(str(folder_of(tmp_path / "images", 6, (200, 120))), 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache=.*file/x.*cannot be written"):
        cached(source, tmp_path / "file" / "x", 60)
    monkeypatch.setattr(cache, "_ESTIMATED", 2)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"raw copies of .* take about .* GB.*smaller data.cache_side"):
        cached(source, tmp_path / "raw", 60)
    assert not list((tmp_path / "raw").glob("*/pixels"))


def test_two_sets_of_the_same_names_have_copies_of_their_own(tmp_path: Path):
    for value, name in ((10, "a"), (200, "b")):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (150, 140), (value, 0, 0)).save(tmp_path / name / f"{index}.png")
    sources = [open_source(str(tmp_path / name), 3) for name in "ab"]
    assert [int(cached(source, tmp_path / "raw", 384).image(0)[0, 0, 0]) for source in sources] == [10, 200]


def test_damaged_copies_are_made_again(tmp_path: Path):
    source = open_source(str(folder_of(tmp_path / "images", 6, (200, 150))), 3)
    exact = cached(source, tmp_path / "raw", 384).image(5).clone()
    (place,) = [path.parent for path in (tmp_path / "raw").glob("*/pixels")]
    for damage in (
        lambda: (place / "pixels").write_bytes(b"short"),
        lambda: (place / "bad.json").unlink(),
        lambda: (place / "index.safetensors").write_bytes(b""),
    ):
        damage()
        assert torch.equal(cached(source, tmp_path / "raw", 384).image(5), exact)


def test_small_images_are_read_into_memory(tmp_path: Path):
    source = open_source(str(folder_of(tmp_path / "images", 30, (32, 28))), 3)
    held = in_memory(source, 1e6)
    assert held.stack is not None and held.stack.shape == (30, 3, 28, 32)
    assert torch.equal(held.image(4), source.image(4)) and held.fingerprint() == source.fingerprint()
    # Cut a whole batch at a time, with weights of another precision: at most two levels apart.
    assert_same_views(make_views(held, SPEC, 0, 0, np.arange(30)), make_views(source, SPEC, 0, 0, np.arange(30)), 2)
    assert in_memory(source, 1e4) is source  # too large
    assert in_memory(open_source(str(folder_of(tmp_path / "mixed", 30, None)), 3), 1e9).stack is None
    assert in_memory(open_source(str(folder_of(tmp_path / "large", 3, (140, 100))), 3), 1e9).stack is None


def test_bad_images_in_memory(tmp_path: Path):
    images = folder_of(tmp_path / "images", 12, (32, 28))
    for name in ("class1/003.png", "class0/004.png", "class1/011.png"):
        (images / name).write_bytes(b"")
    source = open_source(str(images), 3)
    held = in_memory(source, 1e6)
    assert [bad[0] for bad in held.bad] == [3, 4, 11]
    views, files = (make_views(each, SPEC, 0, 0, np.arange(12)) for each in (held, source))
    assert_same_views(views, files, 2)
    assert held.labels()[[3, 4, 11]].tolist() == source.labels()[[5, 5, 0]].tolist()


def test_memory_and_cache_change_no_run_by_more_than_rounding(tiny, tmp_path: Path):
    images = folder_of(tmp_path / "images", 24, (36, 36))
    options = {"channels": 3, "data": images, "precision": "fp64", "drop_path": 0.0, "steps": 4, "log__every": 1}
    states = [
        checkpoint.load(train(tiny(tmp_path / f"run{number}", **options, **extra)))
        for number, extra in enumerate(
            ({"data__memory": 0}, {}, {"data__cache": tmp_path / "raw"}, {"data__cache": tmp_path / "raw"})
        )
    ]
    weights = [state["student"]["backbone.model.patch_embed.proj.weight"] for state in states]
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[2], weights[3])
    assert (weights[0] - weights[1]).abs().max() < 1e-3


def test_several_sources(tmp_path: Path):
    a = folder_of(tmp_path / "a", 8, (40, 40), classes=2)
    b = folder_of(tmp_path / "b", 6, (40, 40), classes=3, seed=1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(5):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(flat / f"{index}.png")
    sources = [open_source(str(path), 3) for path in (a, b, flat)]
    joined = Joined(sources, [1, 1, 1])
    assert len(joined) == 19 and joined.classes == ["class0", "class1", "class2"]
    assert joined.labels().tolist() == [*sources[0].labels(), *sources[1].labels(), *[-1] * 5]
    assert torch.equal(joined.image(8), sources[1].image(0)) and torch.equal(joined.image(18), sources[2].image(4))
    assert joined.path(13) == sources[1].path(5)
    assert len({Joined(sources, weights).fingerprint() for weights in ([1, 1, 1], [2, 1, 1], [1, 2, 1])}) == 3
    mixed = [open_source("fashion-mnist-mini:test", 1), open_source("fashion-mnist-mini:train", 1)]
    stacked = Joined(mixed, [1, 1])
    assert stacked.stack is not None and len(stacked.stack) == 12_000


def test_weights_say_how_often_an_image_comes():
    parts = ((10, 10), (7, 21), (100, 10))  # weights 1, 3 and 0.1
    seen = np.zeros(117, dtype=int)
    for epoch in range(10):
        order = weighted_order(3, epoch, parts)
        assert len(order) == len(set(order.tolist())) == 41  # one that comes again has views of its own
        seen += np.bincount(order % 117, minlength=117)
    assert (seen[:10] == 10).all() and (seen[10:17] == 30).all() and (seen[17:] == 1).all()
    assert (weighted_order(3, 0, parts) != weighted_order(4, 0, parts)).any()
    epoch, first = step_indices(0, 3, 117, 20, parts)
    again = step_indices(3, 3, 117, 20, parts)
    assert epoch == 0 and (first == weighted_order(3, 0, parts)[:20]).all() and again[0] == 1


def test_weights_through_the_settings(tiny, tmp_path: Path):
    a, b = folder_of(tmp_path / "a", 8, (40, 40)), folder_of(tmp_path / "b", 6, (40, 40), seed=1)
    cfg = tiny(tmp_path / "run", channels=3, data=f"[{a},{b}]", data__weights="[2,0.5]", batch_size=4, steps=9)
    source = build.open_data(cfg)
    assert (len(source), source.epoch_images()) == (14, 19)
    made = list(Batches(source, build.view_spec(cfg), seed=0, batch_size=4, total_steps=4))
    counts = np.bincount(torch.cat([batch.indices for batch in made]).numpy(), minlength=14)
    assert counts[:8].sum() >= 13 and counts.max() == 2
    twice = next(index for index in range(8) if counts[index] == 2)
    crops = [batch.groups[0].unflatten(0, (2, 4))[:, batch.indices == twice] for batch in made]
    one, other = torch.cat(crops, 1).unbind(1)
    assert not torch.equal(one, other)
    train(cfg)
    with pytest.raises(UserError, match=r"data.weights=\[1.0\]: expected one for each of 2"):
        tiny(tmp_path / "run", data=f"[{a},{b}]", data__weights="[1]")
    with pytest.raises(UserError, match="is not the set that the run"):
        train(tiny(tmp_path / "run", channels=3, data=f"[{a},{b}]", data__weights="[3,0.5]", batch_size=4, steps=9))


def test_bare_and_spelt_out_data(tiny, tmp_path: Path):
    one = tiny(tmp_path, data="x", data__cache="y")
    assert (str(one.data), one.data.cache) == ("x", "y")
    other = tiny(tmp_path, data__cache="y", data="x")
    assert other.data == one.data
    assert tiny(tmp_path, data__memory=5).data.source == ["fashion-mnist-mini:train"]
    with pytest.raises(UserError, match="unknown key 'data.cash'.*did you mean 'data.cache'"):
        tiny(tmp_path, data__cash="y")
    with pytest.raises(UserError, match="optim=3 and keys below optim do not go together"):
        tiny(tmp_path, optim="3", optim__lr="1")


MILLION = """
import os, resource, sys, time
import numpy as np, torch
from pathlib import Path
from dino_sd.data import loader
from dino_sd.data.loader import Batches
from dino_sd.data.source import open_source
from dino_sd.data.views import ViewGroup, ViewSpec

def resident():
    total = 0
    for pid in [os.getpid(), *children()]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024

def children():
    return [int(p) for p in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]

opened = []
for _ in range(2):  # on a busy machine one of them may be slow
    began = time.perf_counter()
    source = open_source(sys.argv[1], 3)
    opened.append(time.perf_counter() - began)
spec = ViewSpec((ViewGroup(1, (8, 8), (0.4, 1.0)),))
before = None
for step, batch in enumerate(Batches(source, spec, 0, 8, total_steps=1000, workers=4)):
    if step == 50:
        before = resident()
print(len(source), min(opened), before, resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux' /proc")
def test_a_million_paths_neither_grow_nor_are_read_twice(tmp_path: Path):
    """A million different paths that lead to a few images, 4 workers, 1,000 batches."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for name in "0123456789":
        (tmp_path / name).mkdir()
    digits = np.array(list("0123456789"))
    lines = ["/../".join(digits[[int(d) for d in f"{number:06d}"]]) + "/../a.png" for number in range(1_000_000)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    os.utime(tmp_path / "list.txt", (time.time() - 60,) * 2)  # older than the walk: its index may be kept
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rows = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", MILLION, str(tmp_path / "list.txt")],
            capture_output=True, text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows.append([float(number) for number in done.stdout.split()])
    for count, _, before, after in rows:
        assert count == 1_000_000 and after - before < 50, rows
    assert rows[1][1] < 1.0, rows
