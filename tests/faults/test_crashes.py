"""Killed, raising, hanging: the job ends soon, says who it was, and the same command goes on to the same bits."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, assert_identical, largest_difference, tiny_pairs

from dino_sd import checkpoint
from dino_sd.errors import UserError
from faults.conftest import ENVIRONMENT, finish, metrics, newest_step, ranks_of, start, wait_for, whole

LONG = {"steps": 200, "checkpoint__every": "steps=5", "log__every": 7, "workers": 0}
# `make test-faults` asks for thirty
KILLS = int(os.environ.get("DINO_SD_KILLS", "3"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[int, Path]:
    """Nobody touches these: {ranks: folder}."""
    root = tmp_path_factory.mktemp("straight")
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for ranks in (1, 2):
        code, said = finish(start(root / "tiny.yaml", root / str(ranks), ranks, **LONG))
        assert code == 0, said
    return {ranks: root / str(ranks) for ranks in (1, 2)}


# The process dies at a certain place of its n-th save.
PLACES = ("in the file", "before its name", "behind its name")
DIES = """
import os, signal, torch
write, rename, saves = torch.save, os.replace, [0]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def save(state, file):
    saves[0] += 1
    if saves[0] == NUMBER and "PLACE" == "in the file":
        file.write(b"half of it")
        file.flush()
        die()
    write(state, file)
def replace(old, new):
    now = saves[0] == NUMBER and str(new).endswith(".pt")
    if now and "PLACE" == "before its name":
        die()
    rename(old, new)
    if now and "PLACE" == "behind its name":
        die()
torch.save, os.replace = save, replace
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moment", ["any", "in a save"])
def test_killed_again_and_again(tiny_yaml: Path, tmp_path: Path, straight: dict[int, Path], ranks: int, moment: str):
    """SIGKILL at random times, a third of them while a checkpoint is being written: nothing is lost or done twice."""
    run, dice = tmp_path / "run", random.Random(ranks + 10 * (moment == "any"))
    kills, done = max(1, KILLS // 6 if moment == "in a save" else KILLS // 3), 0

    def ends_well(code: int, said: str) -> None:
        assert code == 0, said
        assert_identical(checkpoint.path_of(straight[ranks], 200), checkpoint.path_of(run, 200))
        assert metrics(run) == metrics(straight[ranks])
        assert not list((run / "checkpoints").glob(".*.tmp"))

    while done < kills:
        before, script = newest_step(run), None
        if moment == "in a save":
            script = DIES.replace("PLACE", dice.choice(PLACES)).replace("NUMBER", str(dice.randint(1, 4)))
        process = start(tiny_yaml, run, ranks, script, **LONG)
        if moment == "any":
            wait_for(lambda: newest_step(run) > before or process.poll() is not None)  # noqa: B023
            time.sleep(dice.random() * 0.5)
            with suppress(OSError):  # it has just ended
                os.kill(process.pid if ranks == 1 else dice.choice(ranks_of(process)), signal.SIGKILL)
        code, said = finish(process)
        if code == 0:  # through before it was hit: another one
            ends_well(code, said)
            shutil.rmtree(run)
        else:
            assert code == (-signal.SIGKILL if ranks == 1 else 1), said
            done += 1
    ends_well(*finish(start(tiny_yaml, run, ranks, **LONG)))


RAISES = """
import os
from dino_sd.data.photometry import Photometry
before, calls = Photometry.__call__, [0]
def call(self, crops, rows):
    calls[0] += 1
    if os.environ.get("RANK", "0") == "1" and calls[0] == 8:
        BREAK
    return before(self, crops, rows)
Photometry.__call__ = call
"""


def test_a_rank_that_raises_takes_the_job_down(tiny_yaml: Path, tmp_path: Path):
    process = start(tiny_yaml, tmp_path / "run", 2, RAISES.replace("BREAK", "raise ZeroDivisionError('boom')"))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or process.poll() is not None)
    began = time.monotonic()
    code, said = finish(process)
    assert code != 0 and time.monotonic() - began < 30
    first = said.index("failed:\n")
    assert said[:first].endswith("rank 1 of 2 ") and "ZeroDivisionError: boom" in said[first:]
    assert "Traceback" not in said[:first]


@whole
def test_a_rank_that_hangs_is_named(tiny_yaml: Path, tmp_path: Path):
    hang = RAISES.replace("BREAK", "import time; time.sleep(1000)")
    code, said = finish(start(tiny_yaml, tmp_path / "run", 2, hang, timeout=5))
    assert code != 0 and "rank 0: no answer from rank(s) 1: they hang or are gone" in said, said


@whole
def test_torchrun_starts_it_again(tiny_yaml: Path, tmp_path: Path):
    """--max-restarts: from the newest good checkpoint, by itself, to the same bits."""
    once = tmp_path / "once"
    script = tmp_path / "program.py"
    broken = f"import pathlib; m = pathlib.Path({str(once)!r}); m.exists() or (m.touch(), os.kill(os.getpid(), 9))"
    script.write_text(RAISES.replace("calls[0] == 8", "calls[0] == 25").replace("BREAK", broken)
                      + "\nfrom dino_sd.cli import main\nmain()\n")  # fmt: skip
    options = {"steps": 30, "checkpoint__every": "steps=5"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pairs = tiny_pairs(tmp_path / "run", **options)
    done = subprocess.run(
        [*launcher, "--max-restarts", "2", str(script), "train", str(tiny_yaml), *pairs],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and once.exists() and "going on from step" in done.stderr, done.stderr
    code, said = finish(start(tiny_yaml, tmp_path / "straight", 2, **options))
    assert code == 0, said
    assert_identical(checkpoint.path_of(tmp_path / "straight", 30), checkpoint.path_of(tmp_path / "run", 30))


@whole
def test_ranks_that_are_not_alike_are_refused(tiny_yaml: Path, tmp_path: Path):
    """Other settings, other data or other first weights on one rank: named before anything is trained."""
    here = "import os, sys\nif os.environ.get('RANK') == '1': "
    nudged = """import os, torch, dino_sd.build as build
made = build.make_backbone
def make(*arguments, **named):
    found = made(*arguments, **named)
    if os.environ.get("RANK") == "1":
        next(found.parameters()).data.add_(1)
    return found
build.make_backbone = make"""
    for script, name in (
        (here + "sys.argv.append('optim.clip=2')", "settings than rank 0 on"),
        (here + "sys.argv.append('data=fashion-mnist-mini:test')", "settings than rank 0 on"),
        (nudged, "weights than rank 0 on"),
    ):
        code, said = finish(start(tiny_yaml, tmp_path / "run", 2, script))
        assert code != 0 and f"has other {name}" in said, said
        assert not (tmp_path / "run").exists()


@whole
def test_weights_that_drift_apart_are_noticed(tiny_yaml: Path, tmp_path: Path):
    drift = RAISES.replace(
        "BREAK",
        "import gc, torch; [next(m.parameters()).data.add_(1e-3) for m in gc.get_objects() "
        "if type(m).__name__ == 'SelfDistillation']",
    )
    code, said = finish(start(tiny_yaml, tmp_path / "run", 2, drift))
    assert code != 0 and "rank(s) 1 have other weights than rank 0 after step" in said, said


def test_a_folder_has_one_writer(tiny_yaml: Path, tmp_path: Path):
    run = tmp_path / "run"
    first = start(tiny_yaml, run, steps=100000)
    wait_for(lambda: newest_step(run) > 0)
    code, said = finish(start(tiny_yaml, run, steps=100000))
    assert code == 2 and f"out={run} is being written by process {first.pid} on" in said and "Traceback" not in said
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 75


@whole
def test_two_machines_one_of_which_is_lost_and_comes_back(tiny_yaml: Path, tmp_path: Path):
    """Two torchrun agents on loopback, `--nnodes 1:2`: one is killed, the other goes on alone, then with it again."""
    run = tmp_path / "run"
    # slow enough for a machine to come and go: a step waits for the clock, which changes no number
    slow = RAISES.replace('os.environ.get("RANK", "0") == "1" and calls[0] == 8', "True")
    slow = slow.replace("BREAK", "import time; time.sleep(0.05)")
    script = tmp_path / "program.py"
    script.write_text(f"{slow}\nfrom dino_sd.cli import main\nmain()\n")
    options = {"steps": 400, "checkpoint__every": "steps=5", "precision": "fp64", "drop_path": 0.0, "log__every": 1}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def agent() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
             "--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
             "--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=15,is_host="
             + ("1" if not agents else "0"), "--local-addr", "127.0.0.1",
             str(script), "train", str(tiny_yaml), *tiny_pairs(run, **options)],
            # torch 2.14's agents tell the first address only once, which one that comes back would wait for
            cwd=ROOT, env={**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=open(tmp_path / f"agent{len(agents)}.log", "w"), start_new_session=True,
        )  # fmt: skip

    agents: list[subprocess.Popen] = []
    logs = lambda: "\n".join(path.read_text() for path in sorted(tmp_path.glob("agent*.log")))  # noqa: E731

    def lose(machine: subprocess.Popen) -> None:
        for pid in (machine.pid, *ranks_of(machine)):
            os.kill(pid, signal.SIGKILL)

    def newest_of(count: int) -> bool:
        assert all(each.poll() is None for each in agents[:1]), logs()
        path = checkpoint.newest(run)
        try:
            return path is not None and checkpoint.load(path)["ranks"] == count
        except UserError:  # just pruned
            return False

    try:
        agents.append(agent())
        agents.append(agent())
        wait_for(lambda: newest_of(2))
        lose(agents[1])
        wait_for(lambda: newest_of(1))
        agents.append(agent())
        wait_for(lambda: newest_of(2))
        assert agents[0].wait(300) == 0, logs()
        assert agents[2].wait(60) == 0, logs()
    finally:
        for each in agents:
            if each.poll() is None:
                lose(each)
    assert "1 rank(s) until then, 2 from now on" in logs() and "2 rank(s) until then, 1 from now on" in logs()
    code, said = finish(start(tiny_yaml, tmp_path / "straight", **options))
    assert code == 0, said
    assert largest_difference(checkpoint.path_of(tmp_path / "straight", 400), checkpoint.path_of(run, 400)) < 1e-6
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(tmp_path / "straight")]
