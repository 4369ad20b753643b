"""The laws of purity: a run is a function of its settings, whatever it was cut into and wherever it ran."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_identical, command, largest_difference, tiny_pairs

from dino_sd import checkpoint
from dino_sd.train import train

FLOORS = {
    "errors": -4, "": -4, "settings": -3, "shapes": -3, "distributed": -3, "progress": -2, "data": -1,
    "config": 0, "evaluator_config": 0, "schedule": 0, "losses": 0, "models": 0,
    "term": 1, "optim": 1, "checkpoint": 1, "health": 1, "preemption": 1, "log": 2, "speed": 1, "published": 1,
    "allocator": 1, "nearest": 1, "graph": 1, "subsets": 1, "intervals": 1, "softmax": 1,
    "method": 2, "terms": 2, "recipe": 2, "evaluators": 2, "embed": 2, "loading": 2, "feature_cache": 2, "exported": 2,
    "tiles": 2, "seen": 2, "components": 2, "prototypes": 2, "video": 2,
    "build": 3, "features": 3, "tables": 3, "run": 3, "validation": 3, "suggestions": 3, "pictures": 3, "maps": 3,
    "exports": 3, "card": 3, "reloading": 3,
    "evaluate": 4, "segment": 4, "embed_files": 4, "export": 4, "plan": 4, "sheets": 4,
    "suite": 5, "inspection": 5, "looking": 5, "report": 5,
    "train": 6,
    "quickstart": 7, "bench": 7, "bench_views": 7, "generations": 7,
    "bench_data": 8, "gallery": 6,
    "cli": 9, "__main__": 10, "__init__": 10,  # "" is the version that it holds, which all may ask for
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """dino_sd modules that a file imports, as dotted names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dino_sd":
            inner = node.module.removeprefix("dino_sd").lstrip(".")
            found |= {f"{inner}.{name.name}".lstrip(".") for name in node.names} if not inner else {inner}
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("dino_sd.") for name in node.names if name.name.startswith("dino_sd.")}
    return found


def test_imports_only_go_down():
    package = ROOT / "dino_sd"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        here = parts[0]
        for imported in imports_of(path):
            there = "" if imported == "__version__" else imported.split(".")[0]
            assert there in FLOORS, f"{path.name} imports {imported}, which has no floor"
            within = there == here and len(parts) > 1
            assert within or FLOORS[there] < FLOORS[here], f"{path.name} (floor {FLOORS[here]}) imports {imported}"


@pytest.mark.parametrize("folder", ["terms", "evaluators", "data/sources", "exports"])
def test_siblings_do_not_import_each_other(folder: str):
    dotted = folder.replace("/", ".")
    for path in (ROOT / "dino_sd" / folder).glob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith(dotted + ".")], path


def test_same_settings_same_run(tiny, tmp_path: Path):
    a, b = train(tiny(tmp_path / "a")), train(tiny(tmp_path / "b"))
    assert_identical(a, b)
    other = train(tiny(tmp_path / "c", seed=1))
    assert largest_difference(a, other) > 1e-3


def test_written_config_gives_the_same_run(tiny, tmp_path: Path):
    a = train(tiny(tmp_path / "a"))
    done = command("train", tmp_path / "a" / "config.yaml", f"out={tmp_path / 'b'}", env=one_thread())
    assert done.returncode == 0, done.stderr
    assert_identical(a, tmp_path / "b" / "checkpoints" / a.name)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def metrics(run: Path) -> list[dict]:
    """Without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]


def test_killed_and_run_again(tiny, tiny_yaml: Path, tmp_path: Path):
    """20 steps straight == killed with SIGKILL after step 10 was saved, the same command again: to the bit."""
    straight = train(tiny(tmp_path / "straight"))
    run = tmp_path / "killed"
    arguments = [sys.executable, "-m", "dino_sd", "train", str(tiny_yaml), *tiny_pairs(run)]
    victim = subprocess.Popen(arguments, cwd=ROOT, env=one_thread(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.path_of(run, 10).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    left = checkpoint.newest(run)
    assert left is not None and checkpoint.step_of(left) >= 10
    again = command(*arguments[3:], env=one_thread())
    assert again.returncode == 0, again.stderr
    assert_identical(straight, checkpoint.path_of(run, 20))
    assert metrics(run) == metrics(tmp_path / "straight")


def test_resumes_from_any_step_between_two_lines_of_the_log(tiny, tmp_path: Path):
    """Sums of the log's window are in the checkpoint: lines after a cut in mid-window are those of the whole."""
    straight = train(tiny(tmp_path / "a", log__every=7, checkpoint__every="steps=4", checkpoint__keep=9))
    run = tmp_path / "b"
    train(tiny(run, log__every=7, checkpoint__every="steps=4", checkpoint__keep=9))
    for path in checkpoint.all_of(run)[:3]:  # back to step 8
        path.unlink()
    assert_identical(straight, train(tiny(run, log__every=7, checkpoint__every="steps=4", checkpoint__keep=9)))
    assert metrics(run) == metrics(tmp_path / "a")


def test_truncated_checkpoint_falls_back(tiny, tmp_path: Path, capsys):
    run = tmp_path / "run"
    straight = train(tiny(tmp_path / "straight"))
    newest = train(tiny(run))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_identical(straight, train(tiny(run)))
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(tiny, tmp_path: Path, workers: int):
    assert_identical(train(tiny(tmp_path / "0", workers=0)), train(tiny(tmp_path / "n", workers=workers)))


def test_accumulation_is_one_step(tiny, tmp_path: Path):
    """Batch 16 == 4 parts of 4: one update of weights, teacher and centre a step."""
    options = {"precision": "fp64", "drop_path": 0.0}
    whole = train(tiny(tmp_path / "whole", **options))
    parts = train(tiny(tmp_path / "parts", accumulate=4, **options))
    assert largest_difference(whole, parts) < 1e-6


def test_two_ranks_equal_one(tiny, tiny_yaml: Path, tmp_path: Path):
    options = {"precision": "fp64", "drop_path": 0.0}
    one = train(tiny(tmp_path / "one", **options))
    done = command("train", tiny_yaml, *tiny_pairs(tmp_path / "two", **options), ranks=2, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert largest_difference(one, checkpoint.path_of(tmp_path / "two", 20)) < 1e-6
    kept = [{k: v for k, v in line.items() if k != "gradient_norm"} for line in metrics(tmp_path / "two")]
    for ours, theirs in zip(metrics(tmp_path / "one"), kept, strict=True):
        for key, value in theirs.items():
            assert value == pytest.approx(ours[key], abs=1e-6) or key == "feature_spread", key


def test_golden_curve(tiny, tmp_path: Path):
    """The losses of 20 steps as they were when this test was written; a change here is a change of the method."""
    train(tiny(tmp_path / "run", precision="fp64", log__every=1))
    losses = torch.tensor([line["loss"] for line in metrics(tmp_path / "run")], dtype=torch.float64)
    golden = torch.tensor(json.loads((Path(__file__).parent / "golden.json").read_text()), dtype=torch.float64)
    assert torch.allclose(losses, golden, atol=1e-6, rtol=0), losses.tolist()
