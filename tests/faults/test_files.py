"""Damaged files, full disks, folders that vanish: named, or without consequence, and never a silent other result."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import assert_identical

from dino_sd import checkpoint
from dino_sd.errors import UserError
from dino_sd.train import train
from faults.conftest import finish, metrics, start


def flip(path: Path, place: int, bit: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(bytes(data))


def test_a_flipped_byte_in_any_file_of_a_run(tiny, tmp_path: Path, capsys):
    """One at a time, in its beginning, middle and end; then the run goes on: to the same bits, or it says why not."""
    options = {"steps": 20, "checkpoint__every": "steps=5", "checkpoint__keep": 9, "checkpoint__best": "feature_spread"}
    straight = train(tiny(tmp_path / "straight", **options))
    half = tmp_path / "half"
    train(tiny(half, **options))
    for step in (15, 20):
        for path in (checkpoint.path_of(half, step), checkpoint.sum_of(checkpoint.path_of(half, step))):
            path.unlink()
    files = [path for path in half.rglob("*") if path.is_file() and path.stat().st_size]
    names = {"step_00000010.pt", "step_00000010.pt.sha256", "metrics.jsonl", "config.yaml", "best.json"}
    assert names <= {path.name for path in files}
    for path in files:
        small = path.suffix in (".jsonl", ".json", ".yaml")
        for share, bit in ((0.0, 0x10), (0.5, 0x10), (0.999, 0x10), *([(0.4, 0x80)] if small else [])):
            run = tmp_path / "damaged"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(half, run)
            flip(run / path.relative_to(half), int(share * path.stat().st_size), bit)
            capsys.readouterr()
            saved = train(tiny(run, **options))
            said = capsys.readouterr().err
            harmless = path.suffix == ".sha256" and share > 0.9  # in the name behind the sum
            if path.name.startswith("step_00000010") and not harmless:
                assert "step_00000010.pt is damaged" in said and "going on from step 5" in said, (path.name, share)
            assert_identical(straight, saved)
            assert metrics(run) == metrics(straight.parents[1]) or f"{run / 'metrics.jsonl'} is not as it was" in said


def test_a_checkpoint_without_its_sum_and_of_half_its_length(tiny, tmp_path: Path, capsys):
    newest = train(tiny(tmp_path / "run"))
    checkpoint.sum_of(newest).unlink()
    assert checkpoint.load(newest)["step"] == 20
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(newest)


@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_full_disk(tiny, tmp_path: Path, monkeypatch, capsys, on_error: str):
    """The third and fourth saves fail: a warning and the next one, or an error; the last good one stays."""
    before, calls = torch.save, [0]

    def full(state, file):
        calls[0] += 1
        if calls[0] in (3, 4):
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before(state, file)

    monkeypatch.setattr("torch.save", full)
    run = tmp_path / "run"
    options = {"steps": 30, "checkpoint__every": "steps=5", "checkpoint__on_error": on_error, "checkpoint__keep": 9}
    if on_error == "stop":
        with pytest.raises(UserError, match="00015.pt cannot be written .No space left.*earlier ones are whole"):
            train(tiny(run, **options))
        assert checkpoint.step_of(checkpoint.newest(run)) == 10
    else:
        train(tiny(run, **options))
        assert [checkpoint.step_of(path) for path in checkpoint.all_of(run)] == [30, 25, 10, 5]
        assert capsys.readouterr().err.count("No space left on device); earlier ones are whole; going on") == 2
    assert not list((run / "checkpoints").glob(".*.tmp"))
    for path in checkpoint.all_of(run):
        checkpoint.load(path)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(tiny_yaml: Path, tmp_path: Path, small_disk: Path):
    """Not an injected error: the second checkpoint does not fit, then it does."""
    run, options = small_disk / "run", {"checkpoint__every": "steps=5", "checkpoint__keep": 1}
    size = checkpoint.path_of(tmp_path / "straight", 20)
    code, said = finish(start(tiny_yaml, tmp_path / "straight", **options))
    assert code == 0, said
    filling = 2**21 - int(1.7 * size.stat().st_size) - 64 * 1024
    assert filling > 0, "the disk is too small for this test"
    (small_disk / "filling").write_bytes(bytes(filling))
    code, said = finish(start(tiny_yaml, run, **options))
    assert code == 2 and "step_00000020.pt cannot be written (No space left on device); earlier ones are whole" in said
    assert said.count("going on, the next save tries again") == 2 and "Traceback" not in said
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(run)] == [5]
    (small_disk / "filling").unlink()
    code, said = finish(start(tiny_yaml, run, **options))
    assert code == 0 and "going on from step 5" in said, said
    assert_identical(checkpoint.path_of(tmp_path / "straight", 20), checkpoint.path_of(run, 20))


def test_the_last_save_must_succeed(tiny, tmp_path: Path, monkeypatch):
    def full(state, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match="step_00000020.pt cannot be written"):
        train(tiny(tmp_path / "run"))


def test_a_folder_that_vanishes_comes_back(tiny_yaml: Path, tmp_path: Path):
    """Somebody deletes the checkpoints of a run at work: the next ones are written all the same."""
    run = tmp_path / "run"
    script = f"""
import shutil
import subprocess
from dino_sd.data.photometry import Photometry
before, calls = Photometry.__call__, [0]
def call(self, crops, rows):
    calls[0] += 1
    if calls[0] == 24:
        shutil.rmtree({str(run / "checkpoints")!r}, ignore_errors=True)
    return before(self, crops, rows)
Photometry.__call__ = call
"""
    code, said = finish(start(tiny_yaml, run, script=script, steps=30))
    assert code == 0, said
    assert checkpoint.load(checkpoint.path_of(run, 30))["step"] == 30


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_wandb(tiny_yaml: Path, tmp_path: Path, how: str):
    """A tracker that refuses or is slow to start costs a warning."""
    what = "raise OSError('no route to host')" if how == "refuses" else "time.sleep(5); raise TimeoutError('init')"
    script = f"import time, wandb\ndef init(**_):\n    {what}\nwandb.init = init"
    code, said = finish(start(tiny_yaml, tmp_path / "run", script=script, log__wandb="online"))
    assert code == 0 and "warning: wandb failed, going on without it" in said, said


def test_a_clock_that_jumps(tiny_yaml: Path, tmp_path: Path):
    """Back by a year in mid-run: the same numbers."""
    code, said = finish(start(tiny_yaml, tmp_path / "straight"))
    assert code == 0, said
    script = """
import time
now, calls = time.time, [0]
def jumping():
    calls[0] += 1
    return now() - (365 * 86400 if calls[0] > 3 else 0)
time.time = jumping
"""
    code, said = finish(start(tiny_yaml, tmp_path / "jumped", script=script))
    assert code == 0, said
    assert_identical(checkpoint.path_of(tmp_path / "straight", 20), checkpoint.path_of(tmp_path / "jumped", 20))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "jumped")


def test_what_stays(tiny, tmp_path: Path):
    """The newest, every so many steps, and the best by a metric, whose place is written down."""
    run = tmp_path / "run"
    train(tiny(run, steps=40, checkpoint__every="steps=5", checkpoint__milestone="steps=20", checkpoint__keep=1,
               checkpoint__best="feature_spread", log__every=5))  # fmt: skip
    spreads = {line["step"]: line["feature_spread"] for line in metrics(run) if "feature_spread" in line}
    best = max(spreads, key=lambda step: (spreads[step], -step))
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == best
    assert {checkpoint.step_of(path) for path in checkpoint.all_of(run)} == {40, 20, best}


def test_files_that_cannot_be_read_take_no_place(tmp_path: Path, capsys):
    """Newer ones that are damaged neither hide a run nor push its good checkpoints out."""
    for step in (5, 10, 15, 20):
        checkpoint.save(checkpoint.path_of(tmp_path, step), {"step": step})
    for step in (15, 20):
        checkpoint.path_of(tmp_path, step).write_bytes(b"damaged")
    good = checkpoint.newest_good(tmp_path)
    assert good is not None and good["step"] == 10
    saver = checkpoint.Saver(tmp_path, keep=2, milestone=None, start=10)
    for step in (12, 14, 16):
        saver.save(checkpoint.path_of(tmp_path, step), {"step": step}, {})
        saver.wait(last=True)
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(tmp_path)] == [20, 16, 14]
    for path in checkpoint.all_of(tmp_path):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of its 3 checkpoint.s. can be read"):
        checkpoint.newest_good(tmp_path)
    assert checkpoint.newest_good(tmp_path / "nothing") is None


def test_the_best_one_is_what_it_says(tmp_path: Path, capsys):
    saver, place = checkpoint.Saver(tmp_path, 1, None, best="knn"), tmp_path / "checkpoints" / "best.json"
    for step, value in ((1, 50.0), (2, 70.0), (3, float("nan")), (4, 60.0)):
        saver.save(checkpoint.path_of(tmp_path, step), {"step": step}, {"knn": value})
        saver.wait(last=True)
    assert json.loads(place.read_text())["step"] == 2
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(tmp_path)] == [4, 2]
    checkpoint.path_of(tmp_path, 2).unlink()
    assert checkpoint.best_of(tmp_path) is None
    place.write_text("{")
    assert checkpoint.best_of(tmp_path) is None and "best.json is damaged" in capsys.readouterr().err


def test_whatever_fails_in_a_save_is_a_failure(tmp_path: Path, monkeypatch):
    def broken(*_):
        raise MemoryError

    saver = checkpoint.Saver(tmp_path, 1, None)
    monkeypatch.setattr("torch.save", broken)
    saver.save(checkpoint.path_of(tmp_path, 1), {"step": 1}, {})
    with pytest.raises(UserError, match="cannot be written .MemoryError"):
        saver.wait(last=True)
