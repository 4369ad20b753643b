"""Asked to stop, all ranks stop at the same step, save once, and the same command ends in the same bits."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_identical
from PIL import Image

from dino_sd import checkpoint
from dino_sd.errors import Interrupted
from dino_sd.preemption import Requests
from dino_sd.train import train
from dino_sd.validation import Validation
from faults.conftest import finish, metrics, newest_step, ranks_of, start, wait_for, whole

LONG = {"steps": 150, "checkpoint__every": "steps=20", "log__every": 5}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[int, Path]:
    """Nobody touches these: {ranks: folder}."""
    import yaml
    from conftest import TINY

    root = tmp_path_factory.mktemp("straight")
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for ranks in (1, 2):
        code, said = finish(start(root / "tiny.yaml", root / str(ranks), ranks, **LONG))
        assert code == 0, said
    return {ranks: root / str(ranks) for ranks in (1, 2)}


def stop_asked(run: Path) -> None:
    (run / "stop").touch()


@pytest.mark.parametrize(
    "how", ["SIGTERM", "stop", pytest.param("SIGINT", marks=whole), pytest.param("SIGUSR1", marks=whole)]
)
def test_one_process(tiny_yaml: Path, tmp_path: Path, straight: dict[int, Path], how: str):
    run = tmp_path / "run"
    process = start(tiny_yaml, run, **LONG)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 2)
    if how == "stop":
        stop_asked(run)
    else:
        process.send_signal(getattr(signal, how))
    began = time.monotonic()
    code, said = finish(process)
    assert code == 75 and time.monotonic() - began < 20, said
    assert "the same command goes on" in said.splitlines()[-1] and "Traceback" not in said
    step = newest_step(run)
    assert 0 < step < 150 and not (run / "stop").exists()
    code, said = finish(start(tiny_yaml, run, **LONG))
    assert code == 0 and f"going on from step {step} of 150" in said, said
    assert_identical(checkpoint.path_of(straight[1], 150), checkpoint.path_of(run, 150))
    assert metrics(run) == metrics(straight[1])


@pytest.mark.parametrize("victim", [pytest.param(0, marks=whole), 1])
def test_one_of_two_ranks(tiny_yaml: Path, tmp_path: Path, straight: dict[int, Path], victim: int):
    run = tmp_path / "run"
    process = start(tiny_yaml, run, ranks=2, **LONG)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 2)
    began = time.monotonic()
    os.kill(ranks_of(process)[victim], signal.SIGTERM)
    code, said = finish(process)
    assert code != 0 and time.monotonic() - began < 20, said
    assert said.count("exitcode  : 75") + said.count("exitcode: 75") >= 1 and "exitcode: -" not in said, said
    step = newest_step(run)
    assert 0 < step < 150 and len(list((run / "checkpoints").glob(f"step_{step:08d}.pt"))) == 1
    code, said = finish(start(tiny_yaml, run, ranks=2, **LONG))
    assert code == 0, said
    assert_identical(checkpoint.path_of(straight[2], 150), checkpoint.path_of(run, 150))
    assert metrics(run) == metrics(straight[2])


def test_a_second_interrupt_ends_it_at_once(tiny_yaml: Path, tmp_path: Path):
    """In the middle of a step that lasts: the last checkpoint is whole."""
    run = tmp_path / "run"
    slow = """
import time
from dino_sd.data.photometry import Photometry
before = Photometry.__call__
calls = []
def call(self, crops, rows):
    calls.append(1)
    if len(calls) == 24:
        open("MARK", "w").close()
        for _ in range(6000):
            time.sleep(0.01)
    return before(self, crops, rows)
Photometry.__call__ = call
""".replace("MARK", str(tmp_path / "slow"))
    process = start(tiny_yaml, run, script=slow, **LONG | {"checkpoint__every": "steps=5"})
    wait_for(lambda: (tmp_path / "slow").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, _ = finish(process)
    assert code == 130 and time.monotonic() - began < 5
    newest = checkpoint.newest(run)
    assert newest is not None and checkpoint.load(newest)["step"] == checkpoint.step_of(newest) == 10


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=whole)])
def test_another_number_of_ranks_in_mid_run(tiny, tiny_yaml: Path, tmp_path: Path, before: int, after: int):
    from conftest import largest_difference

    options = {"precision": "fp64", "drop_path": 0.0, **LONG}
    one = train(tiny(tmp_path / "one", **options))
    run = tmp_path / "run"
    process = start(tiny_yaml, run, ranks=before, **options)
    wait_for(lambda: newest_step(run) >= 20)
    stop_asked(run)
    finish(process)
    assert 20 <= newest_step(run) < 60
    code, said = finish(start(tiny_yaml, run, ranks=after, **options))
    assert code == 0 and f"{before} rank(s) until then, {after} from now on" in said, said
    assert largest_difference(one, checkpoint.path_of(run, 150)) < 1e-6


def test_a_whole_group_with_loader_workers(tiny_yaml: Path, tmp_path: Path):
    """As torchrun, SLURM and `timeout` signal: the workers, too, which must not take the run down with them."""
    for index in range(32):
        pixels = torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index}.png")
    run, data = tmp_path / "run", {"data.source": str(tmp_path), "data.memory": 0}
    process = start(tiny_yaml, run, group=True, **LONG, **data, workers=2)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 2)
    os.killpg(process.pid, signal.SIGTERM)
    code, said = finish(process)
    assert code == 75 and "is saved" in said and "Traceback" not in said, said


def test_before_the_first_step_it_ends_at_once(tiny_yaml: Path, tmp_path: Path):
    script = f"""
import time
from dino_sd import train
def describe(*_):
    open({str(tmp_path / "there")!r}, "w").close()
    time.sleep(100)
train.describe = describe
"""
    process = start(tiny_yaml, tmp_path / "run", script=script)
    wait_for((tmp_path / "there").exists)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process, timeout=20)
    assert code == 75 and "SIGTERM came before the first step" in said and "Traceback" not in said, said


def test_an_evaluation_that_is_due_is_put_off(tiny, tmp_path: Path, monkeypatch):
    """It may take longer than the time that is left: the run saves first, and evaluates when it goes on."""
    options = {"evaluate__every": "steps=5", "evaluate__train": "fashion-mnist-mini:test", "checkpoint__best": "knn",
               "evaluate__test": "fashion-mnist-mini:test", "checkpoint__every": "steps=10",
               "log__every": 5}  # fmt: skip
    straight, run, evaluated = train(tiny(tmp_path / "straight", **options)), tmp_path / "run", []
    before = Validation.__call__

    def counted(self, method):
        evaluated.append(1)
        return before(self, method)

    monkeypatch.setattr(Validation, "__call__", counted)
    pending, steps = Requests.pending, itertools.count(1)
    monkeypatch.setattr(Requests, "pending", lambda self: pending(self) or next(steps) == 10)
    with pytest.raises(Interrupted, match="step 10 of 20"):
        train(tiny(run, **options))
    assert len(evaluated) == 2 and checkpoint.load(checkpoint.path_of(run, 10))["owes"], "steps 0 and 5"
    monkeypatch.setattr(Requests, "pending", pending)
    assert_identical(straight, train(tiny(run, **options)))
    assert metrics(run) == metrics(tmp_path / "straight") and len(evaluated) == 5
    assert_identical(*(checkpoint.path_of(tmp_path / each, 10) for each in ("straight", "run")))
    best = [(tmp_path / each / "checkpoints" / "best.json").read_text() for each in ("straight", "run")]
    assert best[0] == best[1]


def test_torchrun_does_not_start_again_what_a_file_has_stopped(tmp_path: Path, monkeypatch):
    def asked(again: int, started: bool) -> Requests:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(again))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        stop_asked(tmp_path)
        requests = Requests(tmp_path)
        requests.started = started
        requests.forget()
        return requests

    assert asked(0, started=True).file.exists(), "torchrun starts all ranks again, which find it"
    with pytest.raises(Interrupted, match="asks to stop"):
        asked(1, started=False)
    assert not asked(3, started=True).file.exists(), "nobody starts it again"
    assert not asked(0, started=False).file.exists(), "a new command goes on"
