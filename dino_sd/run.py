"""The folder of a run: whose it is, what it was made with, and on what."""

import errno
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml

from dino_sd import __version__
from dino_sd.checkpoint import write_whole
from dino_sd.config import Config
from dino_sd.data.loader import Batch
from dino_sd.data.source import Bad, Source, short_hash
from dino_sd.data.statistics import statistics
from dino_sd.distributed import gather_objects, is_main, rank, say, together, world_size
from dino_sd.errors import Diverged, Halted, UserError
from dino_sd.method import SelfDistillation
from dino_sd.settings import differences, plain
from dino_sd.shapes import NO_LABEL

# Settings that a run may change when it goes on: they move no number of it by more than rounding. (That the images at
# `data` are still the same ones, wherever they lie now, is checked by their fingerprint.)
FREE_TO_CHANGE = (
    "out", "data", "workers", "device", "compile", "log", "checkpoint", "evaluate", "timeout", "most_skipped",
    "health", "report",
)  # fmt: skip


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


def claim(run: Path, cfg: Config) -> AbstractContextManager:
    """Rank 0 writes what the run is, whole or not at all; until what is returned is left, no other process may.

    Raises UserError where the folder cannot be written, or is another's.
    """
    lock: AbstractContextManager = nullcontext()

    def write() -> None:
        nonlocal lock
        if not is_main():
            return
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = locked(run)
            write_whole(run / "config.yaml", yaml.safe_dump(plain(cfg), sort_keys=False))
            write_whole(run / "environment.json", json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"out={run} cannot be written ({error.strerror}); choose another folder") from None

    together(write)
    return lock


def locked(run: Path) -> AbstractContextManager:
    """Closes with the file that holds the lock. Raises UserError where another process has it."""
    if sys.platform == "win32":
        return nullcontext()
    import fcntl  # not on Windows

    file = open(run / ".lock", "a+")  # noqa: SIM115 (open for the whole run)
    try:
        # of this process alone: loader workers that outlive it for a while hold nothing
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):  # a file system without locks
            return file
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"out={run} is being written by {owner}; wait for it, or choose another out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def introduce(cfg: Config, device: torch.device, method: SelfDistillation, data: dict[str, Any]) -> None:
    """Every rank says who it is and what it has; raises UserError on all of them where these are not the same.

    Compared: settings, code, data and first weights. Rank 0 prints where the ranks are.
    """
    if world_size() == 1:
        return
    settings = json.dumps(plain(cfg), sort_keys=True)
    ours = {
        "rank": rank(), "host": platform.node(), "device": str(device), "settings": settings, "code": code_version(),
        "data": data["fingerprint"], "weights": sum_of_weights(method),
    }  # fmt: skip
    everyone = gather_objects([ours])
    hosts: dict[str, list[str]] = {}
    for each in everyone:
        hosts.setdefault(each["host"], []).append(each["device"])
    say("ranks: " + "; ".join(f"{host}: {', '.join(devices)}" for host, devices in hosts.items()))
    for name in ("settings", "code", "data", "weights"):
        for each in everyone[1:]:
            if each[name] != everyone[0][name]:
                detail = ""
                if name == "settings":
                    trees = [json.loads(one[name]) for one in (everyone[0], each)]
                    detail = f" ({'; '.join(differences(*trees)[:3])})"
                raise UserError(
                    f"rank {each['rank']} on {each['host']} has other {name} than rank 0 on {everyone[0]['host']}"
                    f"{detail}; start all ranks with the same command, code and data"
                )


def sum_of_weights(method: SelfDistillation) -> str:
    """A hash of all parameters, by the sum of each one's bits: exact, in whatever order a device adds."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    bits = (p.detach().view(whole[p.element_size()]) for p in method.parameters())
    return short_hash(torch.stack([each.sum(dtype=torch.int64) for each in bits]).cpu().numpy().tobytes())


def check_equal_weights(method: SelfDistillation, step: int) -> None:
    """Raises Halted on all ranks where their weights are no longer the same ones."""
    if world_size() == 1:
        return
    sums = gather_objects([sum_of_weights(method)])
    odd = [number for number, each in enumerate(sums) if each != sums[0]]
    if odd:
        raise Halted(
            f"rank(s) {', '.join(map(str, odd))} have other weights than rank 0 after step {step}: a device that "
            f"computes wrongly, or code that treats ranks differently; checkpoints are rank 0's"
        )


class Anomalies:
    """Steps that were skipped because of numbers that are not finite: a line each in `anomalies.jsonl`.

    count: of them in all; in_a_row: up to now.
    """

    def __init__(self, run: Path, source: Source, count: int = 0, in_a_row: int = 0):
        self.path, self.source, self.count, self.in_a_row = run / "anomalies.jsonl", source, count, in_a_row

    def state(self) -> dict[str, int]:
        return {"count": self.count, "in_a_row": self.in_a_row}

    def note(self, step: int, parts: Sequence[Any], gradient_norm: float) -> None:
        """Every rank calls it for the same step. parts: this rank's, with `indices`, `losses` and `loss`."""
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        found = []
        for part in parts:
            terms = {name: float(loss) for name, loss in part.losses.items()}
            if not math.isfinite(sum(terms.values())):
                files = [self.source.path(index) for index in part.indices.tolist()]
                # JSON knows no NaN
                found.append({"rank": rank(), "terms": {name: str(v) for name, v in terms.items()}, "files": files})
        everyone = gather_objects(found)
        if not is_main():
            return
        line = {"step": step, "gradient_norm": str(gradient_norm), "found": everyone}
        bad = [
            (each["rank"], [n for n, v in each["terms"].items() if not math.isfinite(float(v))]) for each in everyone
        ]
        where = ", ".join(sorted({f"rank {number}: {', '.join(names)}" for number, names in bad}))
        say(f"warning: step {step} is skipped: numbers that are not finite in {where or 'the gradient'}; {self.path}")
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            say(f"warning: {self.path} cannot be written ({error.strerror})")

    def give_up(self, slowed: float) -> None:
        """Raises Diverged, or Halted where that has happened before."""
        what = f"{self.in_a_row} steps in a row had numbers that are not finite ({self.path})"
        if slowed < 1:
            raise Halted(
                f"{what}, also with half the learning rate; the newest checkpoint is sound: start another run from its "
                f"backbone, with init={self.path.parent}, another out and a lower optim.lr, a longer optim.warmup or "
                f"precision=fp32"
            )
        raise Diverged(what)


class BadFiles:
    """The images of a run that could not be read: a line each in `bad_files.jsonl`, over all ranks and restarts.

    images: in the set. most: share of them that may be bad. until: how many were known when the run was saved that goes
    on; later ones will be met again. None: all that the file holds.
    """

    def __init__(self, run: Path, images: int, most: float, until: int | None = None):
        self.path, self.images, self.most = run / "bad_files.jsonl", images, most
        self.known: dict[str, str] = {}
        self.new: dict[str, Bad] = {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        kept = []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short is met again
                entry = json.loads(line)
                if until is None or len(self.known) < until:
                    self.known[entry["path"]] = entry["reason"]
                    kept.append(line)
        if len(kept) < len(lines) and is_main():
            write_whole(self.path, "".join(line + "\n" for line in kept))

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
        lines = []
        for index, where, reason in gather_objects(list(self.new.values())):
            if where in self.known:
                continue
            self.known[where] = reason
            lines.append(json.dumps({"index": index, "path": where, "reason": reason}) + "\n")
        self.new = {}
        if lines and is_main():
            try:
                with open(self.path, "a") as file:
                    file.write("".join(lines))
            except OSError as error:
                say(f"warning: {self.path} cannot be written ({error.strerror})")
        if len(self.known) > self.most * self.images:
            where, reason = next(iter(self.known.items()))
            raise UserError(
                f"data: {len(self.known)} of {self.images:,} images cannot be read, more than "
                f"data.most_bad={self.most:g} allows; all are in {self.path}, one is {where}: {reason}"
            )
        return len(self.known)


def code_version() -> str | None:
    """The commit of a clone; None elsewhere."""
    here, commit = Path(__file__).parents[1], ""
    if (here / ".git").exists():  # a clone; installed elsewhere, a repository around it would be another one
        with suppress(OSError):  # git need not be there
            describe_commit = ["git", "-C", str(here), "describe", "--always", "--dirty"]
            commit = subprocess.run(describe_commit, capture_output=True, text=True).stdout.strip()
    return commit or None


def environment() -> dict[str, Any]:
    """What one needs to know to get the same numbers again."""
    return {
        "command": sys.argv, "dino_sd": __version__, "commit": code_version(), "ranks": world_size(),
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "platform": platform.platform(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cores": os.cpu_count(),
    }  # fmt: skip
