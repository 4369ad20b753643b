"""A run small enough to be trained many times over in the tests."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dino_sd import recipe
from dino_sd.config import Config

ROOT = Path(__file__).parent.parent

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "channels": 1,
    "data": "fashion-mnist-mini:train",
    "steps": 20,
    "batch_size": 16,
    "drop_path": 0.1,
    "precision": "fp32",
    "views": {"global": {"size": 28}, "local": {"count": 2, "size": 14}},
    "terms": {"dino": {"prototypes": 64, "hidden": 32, "bottleneck": 16}},
    "teacher": {"momentum": {"start": 0.9, "end": 1.0}},
    "optim": {"lr": 0.001},
    "checkpoint": {"every": "steps=5"},
    "log": {"every": 5},
    "report": {"every": None},
    "device": "cpu",
}


def tiny_pairs(out: Path, **changes: Any) -> list[str]:
    """`key=value` arguments over TINY; `__` in a name stands for a dot."""
    return [f"out={out}", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def tiny(tiny_yaml: Path):
    def make(out: Path, **changes: Any) -> Config:
        return recipe.load_config(tiny_yaml, tiny_pairs(out, **changes))

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are many small things; threads that wait for each other make them slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """What tests keep is not the user's, and what the user has kept is no part of a test."""
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def command(*arguments: str | Path, ranks: int = 1, **options: Any) -> subprocess.CompletedProcess:
    """The program in a process of its own, under torchrun when ranks > 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dino_sd", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        **options,
    )


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under one flat name."""
    from dino_sd import checkpoint

    flat: dict[str, torch.Tensor] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, torch.Tensor):
            flat[name] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}")
        elif isinstance(node, (list, tuple)):
            for key, value in enumerate(node):
                walk(value, f"{name}.{key}")

    walk({k: v for k, v in checkpoint.load(path).items() if k not in ("config", "data")}, "")
    return flat


def largest_difference(a: Path, b: Path, keys: tuple[str, ...] = (".student", ".teacher", ".terms")) -> float:
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    chosen = [key for key in first if key.startswith(keys)]
    assert chosen
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in chosen)


def assert_identical(a: Path, b: Path) -> None:
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), f"{key} differs"
