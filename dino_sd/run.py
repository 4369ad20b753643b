"""The folder of a run: whose it is, what it was made with, and on what."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml

from dino_sd import __version__
from dino_sd.config import Config
from dino_sd.data.loader import Batch
from dino_sd.data.source import Bad, Source
from dino_sd.data.statistics import statistics
from dino_sd.distributed import barrier, gather_objects, is_main, world_size
from dino_sd.errors import UserError
from dino_sd.settings import differences, plain
from dino_sd.shapes import NO_LABEL

# Settings that a run may change when it goes on: they move no number of it by more than rounding. (That the images at
# `data` are still the same ones, wherever they lie now, is checked by their fingerprint.)
FREE_TO_CHANGE = ("out", "data", "workers", "device", "compile", "log", "checkpoint", "evaluate")


def describe(source: Source, cfg: Config) -> tuple[dict[str, Any], list[Bad]]:
    """What a checkpoint says of the data, and images that were looked at for it and cannot be read.

    mean, std, range: in units in which white is 1. labelled: share of the images that have a label.
    """
    views, bad = cfg.views, []
    mean, std, span = views.mean, views.std, views.range
    if span is None and source.dtype == torch.uint8:
        span = (0.0, 1.0)
    if mean is None or std is None or span is None:
        measured = statistics(source)
        mean, std, span = mean or measured.mean, std or measured.std, span or (measured.low, measured.high)
        bad = measured.bad
    if span[0] == span[1]:
        span = (span[0], span[0] + 1)  # flat images
    return {
        "images": len(source), "mean": list(mean), "std": list(std), "range": list(span), "classes": source.classes,
        "labelled": labelled_share(source), "fingerprint": source.fingerprint(),
    }, bad  # fmt: skip


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


class BadFiles:
    """The images of a run that could not be read: a line each in `bad_files.jsonl`, over all ranks and restarts.

    images: in the set. most: share of them that may be bad.
    """

    def __init__(self, run: Path, images: int, most: float):
        self.path, self.images, self.most = run / "bad_files.jsonl", images, most
        self.known: dict[str, str] = {}
        self.new: dict[str, Bad] = {}
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short is met again
                entry = json.loads(line)
                self.known[entry["path"]] = entry["reason"]
        if len(self.known) < len(lines) and is_main():  # what is appended would stand on the line that was cut
            self.path.write_text("".join(line + "\n" for line in lines if line.endswith("}")))

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, as they come, their bad images noted."""
        for batch in batches:
            self.add(batch.bad)
            yield batch

    def add(self, bad: Iterable[Bad]) -> None:
        self.new |= {entry[1]: entry for entry in bad if entry[1] not in self.known}

    def share(self) -> int:
        """Writes down what all ranks have met since the last time; returns how many there are in all.

        Every rank calls it at the same step. Raises UserError on all of them where it is too many.
        """
        for index, where, reason in gather_objects(list(self.new.values())):
            if where in self.known:
                continue
            self.known[where] = reason
            if is_main():
                with open(self.path, "a") as file:
                    file.write(json.dumps({"index": index, "path": where, "reason": reason}) + "\n")
        self.new = {}
        if len(self.known) > self.most * self.images:
            where, reason = next(iter(self.known.items()))
            raise UserError(
                f"data: {len(self.known)} of {self.images:,} images cannot be read, more than "
                f"data.most_bad={self.most:g} allows; all are in {self.path}, one is {where}: {reason}"
            )
        return len(self.known)


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
