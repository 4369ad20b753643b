"""Runs in processes of their own, which the tests then break."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_pairs

from dino_sd import checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


# Minutes of them; a short form of the suite is part of every test run.
whole = pytest.mark.skipif(os.environ.get("DINO_SD_FAULTS") != "whole", reason="`make test-faults` runs it")


def start(
    yaml: Path, run: Path, ranks: int = 1, script: str | None = None, group: bool = False, **changes: Any
) -> subprocess.Popen:
    """The training command; script: Python that is run before it, in the same process. group: it leads one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    program = ["-m", "dino_sd"]
    if script is not None:
        path = run.parent / f"{run.name}_program.py"
        path.write_text(f"{script}\nfrom dino_sd.cli import main\nmain()\n")
        program = [str(path)]
    return subprocess.Popen(
        [sys.executable, *launcher, *program, "train", str(yaml), *tiny_pairs(run, **changes)],
        cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), start_new_session=group,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 180) -> tuple[int, str]:
    """(exit code, what it said on stderr)."""
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that torchrun has started, in the order of ranks."""
    found = []
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((entry[5:] for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found.append((int(rank), int(child)))
    return [pid for _, pid in sorted(found)]


def metrics(run: Path) -> list[dict]:
    """Without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]


def newest_step(run: Path) -> int:
    newest = checkpoint.newest(run)
    return checkpoint.step_of(newest) if newest else 0


@pytest.fixture(autouse=True)
def _linux():
    if not os.path.isdir("/proc/self"):
        pytest.skip("faults are made with Linux' /proc")
