"""The folder of a run: whose it is, what it was made with, and on what."""

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml

from dino_sd import __version__
from dino_sd.config import Config
from dino_sd.data.source import Source
from dino_sd.data.statistics import mean_std
from dino_sd.distributed import barrier, is_main, world_size
from dino_sd.errors import UserError
from dino_sd.settings import differences, plain
from dino_sd.shapes import NO_LABEL

# Settings that a run may change when it goes on: they move no number of it by more than rounding. (That the images at
# `data` are still the same ones, wherever they lie now, is checked by their fingerprint.)
FREE_TO_CHANGE = ("out", "data", "workers", "device", "compile", "log", "checkpoint", "evaluate")


def describe(source: Source, cfg: Config) -> dict[str, Any]:
    """What a checkpoint says of the data. labelled: share of the images that have a label."""
    mean, std = cfg.views.mean, cfg.views.std
    if mean is None or std is None:
        measured_mean, measured_std = mean_std(source)
        mean, std = mean or measured_mean, std or measured_std
    return {
        "images": len(source), "mean": list(mean), "std": list(std), "classes": source.classes,
        "labelled": labelled_share(source), "fingerprint": source.fingerprint(),
    }  # fmt: skip


def labelled_share(source: Source) -> float:
    labels_N = source.labels()
    return 0.0 if labels_N is None else float((labels_N != NO_LABEL).mean())


def check_same_run(resumed: dict[str, Any], run: Path, cfg: Config, source: Source) -> None:
    """Refuses a checkpoint that was made with other settings or other data."""
    old, new = (
        {key: value for key, value in tree.items() if key not in FREE_TO_CHANGE}
        for tree in (resumed["config"], plain(cfg))
    )
    if changed := differences(old, new):
        raise UserError(
            f"out={run} holds a run with another config ({'; '.join(changed)}); "
            f"choose another out, or the same settings to go on with that run"
        )
    if resumed["data"]["fingerprint"] != source.fingerprint():
        raise UserError(
            f"data={cfg.data} is not the set that the run in {run} was trained on "
            f"({resumed['data']['images']} images then, {len(source)} now, or other files); choose another out"
        )


def claim(run: Path, cfg: Config) -> None:
    """Rank 0 writes what the run is, whole or not at all."""
    if is_main():
        try:
            run.mkdir(parents=True, exist_ok=True)
            for name, text in (
                ("config.yaml", yaml.safe_dump(plain(cfg), sort_keys=False)),
                ("environment.json", json.dumps(environment(), indent=2) + "\n"),
            ):
                temporary = run / f".{name}.tmp"
                temporary.write_text(text)
                os.replace(temporary, run / name)
        except OSError as error:
            raise UserError(f"out={run} cannot be written ({error.strerror}); choose another folder") from None
    barrier()


def environment() -> dict[str, Any]:
    """What one needs to know to get the same numbers again."""
    here, commit = Path(__file__).parents[1], ""
    if (here / ".git").exists():  # a clone; installed elsewhere, a repository around it would be another one
        with suppress(OSError):  # git need not be there
            describe_commit = ["git", "-C", str(here), "describe", "--always", "--dirty"]
            commit = subprocess.run(describe_commit, capture_output=True, text=True).stdout.strip()
    return {
        "command": sys.argv, "dino_sd": __version__, "commit": commit or None, "ranks": world_size(),
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "platform": platform.platform(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cores": os.cpu_count(),
    }  # fmt: skip
