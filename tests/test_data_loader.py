"""Batches are the same for any number of workers, ranks and micro-batches, and from wherever a run goes on."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sd import distributed
from dino_sd.data import loader
from dino_sd.data.loader import Batches, auto_workers
from dino_sd.data.source import open_source
from dino_sd.data.views import Row, ViewGroup, ViewSpec
from dino_sd.errors import UserError


def spec(channels):
    return ViewSpec(
        (ViewGroup(2, (28, 28), (0.4, 1.0)), ViewGroup(2, (14, 14), (0.05, 0.4))),
        channels=channels,
        blur=(1.0, 0.1, 0.5, 0.5),
        solarize=(0.0, 0.2, 0.0, 0.0),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(20):
        (root / f"class{index % 2}").mkdir(exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = noise.resize((int(rng.integers(20, 120)), int(rng.integers(20, 120))), Image.Resampling.BICUBIC)
        image.save(root / f"class{index % 2}" / f"{index:02d}.{('jpg', 'png')[index % 3 == 0]}")
    return root


@pytest.fixture(params=["stack", "folder"])
def source(request, folder):
    return open_source("fashion-mnist-mini:test", 1) if request.param == "stack" else open_source(str(folder), 3)


def batches(source, **arguments):
    defaults = {"seed": 5, "batch_size": 8, "total_steps": 5}
    return list(Batches(source, spec(source.channels), **{**defaults, **arguments}))


def tensors(batch):
    return [*batch.groups, *batch.rows, batch.labels, batch.indices]


def assert_equal(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def joined(parts):
    """Micro-batches put together to one batch: view-major, so views first."""

    def cat(tensors, views):
        return torch.cat([tensor.unflatten(0, (views, -1)) for tensor in tensors], 1).flatten(0, 1)

    groups = [cat([part.groups[g] for part in parts], 2) for g in range(2)]
    rows = [cat([part.rows[g] for part in parts], 2) for g in range(2)]
    labels = torch.cat([part.labels for part in parts])
    bad = [entry for part in parts for entry in part.bad]
    return loader.Batch(groups, rows, labels, torch.cat([part.indices for part in parts]), bad)


def test_shapes_and_labels(source):
    for batch in batches(source):
        channels = source.channels
        assert [tuple(crops.shape) for crops in batch.groups] == [(16, channels, 28, 28), (16, channels, 14, 14)]
        assert all(crops.dtype == torch.uint8 for crops in batch.groups)
        assert [tuple(rows.shape) for rows in batch.rows] == [(16, len(Row))] * 2
        assert batch.labels.tolist() == [source.label(index) for index in batch.indices.tolist()]
        # The first global view is always blurred, so the first half of the rows is: view-major.
        assert (batch.rows[0][:8, Row.SIGMA] > 0).all()


def test_workers_change_no_bit(source):
    alone = batches(source)
    for workers in (2, 4):
        assert_equal(alone, batches(source, workers=workers))


def test_threads_change_no_bit(source):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = batches(source)
        torch.set_num_threads(3)
        assert_equal(one, batches(source))
    finally:
        torch.set_num_threads(before)


def test_ranks_and_micro_batches_share_out_the_same_batch(source):
    whole = batches(source)
    for accumulate, ranks in ((1, 2), (4, 1), (2, 2)):
        per_rank = [batches(source, accumulate=accumulate, rank=rank, world_size=ranks) for rank in range(ranks)]
        for step in range(5):
            parts = [per_rank[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(ranks)]
            assert_equal([whole[step]], [joined(parts)])


def test_a_run_goes_on_with_the_same_batches(source):
    whole = batches(source)
    assert_equal(whole[3:], batches(source, start_step=3))
    assert_equal(whole[3:], batches(source, start_step=3, workers=2))
    assert batches(source, start_step=5) == []


def test_a_view_depends_on_the_epoch_and_its_image_alone(folder):
    source = open_source(str(folder), 3)
    # Smaller batches cut the same epoch finer.
    first, again = batches(source, batch_size=10, total_steps=2), batches(source, batch_size=5, total_steps=4)
    assert_equal(first, [joined(again[:2]), joined(again[2:])])
    later = batches(source, batch_size=20, total_steps=2)
    one, two = (batch.groups[0].unflatten(0, (2, -1))[:, batch.indices.argsort()] for batch in later)
    # Other epochs and other views of an image differ; but in a long thin one no box fits, and the centre is taken.
    for a, b in ((one, two), (one[0], one[1])):
        assert (a == b).flatten(-3).all(-1).float().mean() < 0.2


def test_iterating_leaves_the_global_generator_alone(source):
    state = torch.get_rng_state()
    batches(source, workers=2, total_steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_and_their_maker_pickle(source):
    made = Batches(source, spec(source.channels), 5, 8, total_steps=2)
    assert_equal(list(pickle.loads(pickle.dumps(made))), list(made))
    assert len(made) == 2


def test_a_bad_file_is_replaced_the_same_way_with_and_without_workers(tmp_path):
    for index in range(8):
        Image.new("RGB", (40, 40), (index * 30, 0, 0)).save(tmp_path / f"{index}.jpg")
    bad = tmp_path / "5.jpg"
    bad.write_bytes(bad.read_bytes()[:-60])
    source = open_source(str(tmp_path), 3)
    one, two = (batches(source, workers=workers) for workers in (0, 2))
    for batch in one:  # of all eight: image 6 stands in for 5, in views of its own
        assert sorted(batch.indices.tolist()) == [0, 1, 2, 3, 4, 6, 6, 7]
        ((index, where, reason),) = batch.bad
        assert index == 5 and where == str(bad) and reason.startswith("cannot be read as an image (")
        reds = batch.groups[0].unflatten(0, (2, 8)).float().mean((0, 2, 3, 4)) * 3 / 30
        assert reds.round().int().tolist() == batch.indices.tolist()
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip((*a.groups, a.indices), (*b.groups, b.indices), strict=True))
    assert [batch.bad for batch in one] == [batch.bad for batch in two]


def test_batches_that_cannot_be_cut(source):
    with pytest.raises(UserError, match="batch_size: 8 cannot be cut.*multiple of 6"):
        batches(source, accumulate=2, world_size=3)
    with pytest.raises(UserError, match="is more than the"):
        batches(source, batch_size=100_000)


SCRIPT = """
import sys
import torch.multiprocessing
from dino_sd.data.loader import Batches
from dino_sd.data.source import open_source
from dino_sd.data.views import ViewGroup, ViewSpec

if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[2])
    spec = ViewSpec((ViewGroup(1, (16, 16), (0.4, 1.0)),))
    made = iter(Batches(open_source(sys.argv[1], 3), spec, 0, 4, total_steps=1000, workers=2))
    print(int(next(made).groups[0].sum()))
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_leaving_in_the_middle_does_not_hang(tmp_path, folder, start):
    script = tmp_path / "leave.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(loader.__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", str(script), str(folder), start]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    if "terminate called without an active exception" in done.stderr:  # seldom, where many cores are wanted: torch's
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    spec = ViewSpec((ViewGroup(1, (16, 16), (0.4, 1.0)),))
    first = next(iter(Batches(open_source(str(folder), 3), spec, 0, 4, total_steps=1)))
    assert int(done.stdout) == int(first.groups[0].sum())


def test_workers_follow_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "cores", lambda: 8)
    assert auto_workers("cuda", 1, in_memory=False) == 8
    assert auto_workers("cuda", 4, in_memory=False) == 2
    assert auto_workers("cuda", 16, in_memory=False) == 1
    assert auto_workers("cpu", 4, in_memory=False) == 0
    assert auto_workers("cpu", 1, in_memory=False) == 8
    assert auto_workers("cuda", 1, in_memory=True) == 0
    monkeypatch.setattr(loader, "cores", lambda: 200)
    assert auto_workers("cuda", 2, in_memory=False) == 16
    for text, expected in (("max 100000", None), ("250000 100000", 2.5)):
        (tmp_path / "cpu.max").write_text(text)
        assert distributed._cgroup_quota(tmp_path) == expected
    (tmp_path / "cpu.max").unlink()
    assert distributed._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert distributed._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000")
    assert distributed._cgroup_quota(tmp_path) == 4.0


def test_a_small_shared_memory_is_noticed_and_named(folder, monkeypatch, capsys):
    """64 MB, as containers have it: fewer workers where we choose, else an error that says how many fit."""
    source = open_source(str(folder), 3)
    crops = ViewSpec((ViewGroup(2, (224, 224)),))  # 301,056 bytes an image
    monkeypatch.setattr(loader, "cores", lambda: 8)
    monkeypatch.setattr(loader, "_shared_memory", lambda: 64 * 2**20)
    assert loader.pick_workers(4, "cpu", 1, source, crops, 16) == 4 and not capsys.readouterr().err
    assert loader.pick_workers("auto", "cpu", 1, source, crops, 64) == 1
    said = capsys.readouterr().err
    assert "/dev/shm has 64 MiB free" in said and "--shm-size" in said and "going on with workers=1" in said
    with pytest.raises(UserError, match="too little for workers=4 with batches of 18 MiB.*or set workers=1"):
        loader.pick_workers(4, "cpu", 1, source, crops, 64)
    assert loader.pick_workers("auto", "cpu", 4, source, crops, 64) == 0
    monkeypatch.setattr(loader, "_shared_memory", lambda: None)
    assert loader.pick_workers(4, "cpu", 1, source, crops, 64) == 4
