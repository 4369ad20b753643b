"""What a run says while it works: a progress line, metrics.jsonl, and Weights & Biases when asked."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dino_sd.checkpoint import write_whole

COLUMNS = (  # metric, its name on the progress line, format
    ("loss", "loss", ".4f"),
    ("dino/loss_share", "/lnK", ".3f"),
    ("dino/teacher_entropy", "entropy", ".3f"),
    ("dino/kl", "KL", ".3f"),
    ("feature_spread", "spread", ".3f"),
    ("accuracy", "top-1", ".1f"),
    ("knn", "k-NN", ".1f"),
)
CLOCK = ("images_per_s", "data_wait")  # say how fast the machine was
VERDICT = "health/verdict"  # what the line ends with


def duration(seconds: float) -> str:
    """4000 -> '1:06:40', 95 -> '1:35'."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Log:
    """Rank 0 writes; every other rank has one that is silent.

    Lines of metrics.jsonl after `start_step` are dropped: a run that goes on says each step once. known: `state` of
    when that step was saved.
    """

    def __init__(
        self,
        run: Path,
        *,
        start_step: int,
        steps: int,
        active: bool,
        wandb: str,
        config: dict[str, Any],
        known: dict[str, Any] | None = None,
    ):
        self.steps, self.active, self.start_step = steps, active, start_step
        self.began = time.perf_counter()
        self.latest: dict[str, Any] = {}
        self.wandb: Any = None
        if not active:
            return
        self.path = run / "metrics.jsonl"
        self.lines, self.sum = 0, hashlib.sha256()
        self._keep_until(start_step, known)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (open for the whole run)
        if wandb != "off":
            self._start_wandb(run, wandb, config)

    def _keep_until(self, step: int, known: dict[str, Any] | None) -> None:
        if not self.path.exists():
            return
        # A run that starts anew has said nothing yet.
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if step else []
        kept = lines[: known["lines"]] if known else [line for line in lines if _step_of(line, step + 1) <= step]
        self._count(kept)
        if known and self.state() != known:
            kept = [line for line in lines if _step_of(line, step + 1) <= step]
            print(f"warning: {self.path} is not as it was when step {step} was saved: it was changed, or is damaged; "
                  f"{len(kept)} of its {known['lines']} lines go on", file=sys.stderr, flush=True)  # fmt: skip
            self.lines, self.sum = 0, hashlib.sha256()
            self._count(kept)
        write_whole(self.path, "".join(line + "\n" for line in kept))

    def _count(self, lines: list[str]) -> None:
        self.lines += len(lines)
        for line in lines:
            self.sum.update(f"{_without_clock(line)}\n".encode(errors="replace"))

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the lines that belong to it, after they have reached the disk."""
        return {"lines": self.lines, "sha256": self.sum.hexdigest()} if self.active else {}

    def _start_wandb(self, run: Path, mode: str, config: dict[str, Any]) -> None:
        try:
            import wandb

            known = run / "wandb_id.txt"  # a run that goes on is the same run there too
            if not known.exists():
                known.write_text(secrets.token_hex(4))
            self.wandb = wandb.init(
                project="dino_sd",
                name=run.name,
                dir=run,
                mode=mode,  # pyright: ignore[reportArgumentType]
                config=config,
                id=known.read_text(),
                resume="allow",
                settings=wandb.Settings(init_timeout=30),
            )
        except Exception as error:  # a tracker that fails must not cost the run
            self._without_wandb(error)

    def _without_wandb(self, error: Exception) -> None:
        print(f"warning: wandb failed, going on without it: {error}", file=sys.stderr, flush=True)
        self.wandb = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; `step` is the number of steps done."""
        self.latest.update(values)
        if not self.active:
            return
        try:
            line = json.dumps({"step": step, **values})
            self.file.write(f"{line}\n")
            self._count([line])
        except OSError as error:  # a disk that is full, or gone, must not cost the run
            print(f"warning: {self.path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        if self.wandb is not None:
            try:
                self.wandb.log(values, step=step)
            except Exception as error:
                self._without_wandb(error)

    def sync(self) -> None:
        """What is written stays, also after a power cut: a checkpoint is never ahead of its lines."""
        if self.active:
            with suppress(OSError):
                os.fsync(self.file.fileno())

    def progress(self, step: int) -> None:
        """One line on stderr, over itself on a terminal."""
        if not self.active:
            return
        done = max(step - self.start_step, 1)
        eta = (time.perf_counter() - self.began) / done * (self.steps - step)
        parts = [f"step {step}/{self.steps}", f"ETA {duration(eta)}"]
        if "images_per_s" in self.latest:
            parts += [f"{self.latest['images_per_s']:.0f} images/s", f"data wait {self.latest['data_wait']:.0%}"]
        parts += [f"{name} {self.latest[key]:{spec}}" for key, name, spec in COLUMNS if key in self.latest]
        parts += [self.latest[VERDICT]] if VERDICT in self.latest else []
        line = "  ".join(parts)
        # where it does not fit, a line each: what is cut off are the signs of collapse
        terminal = sys.stderr.isatty() and len(line) < shutil.get_terminal_size().columns
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self.active:
            return
        if sys.stderr.isatty():
            print(file=sys.stderr)
        with suppress(OSError):  # what could not be written has been said
            self.file.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:
                self._without_wandb(error)


def _without_clock(line: str) -> str:
    """What is the same in a run that was cut off and goes on: checkpoints hold a sum of it and are equal to the bit."""
    try:
        return json.dumps({key: value for key, value in json.loads(line).items() if key not in CLOCK})
    except (ValueError, AttributeError):
        return line


def _step_of(line: str, otherwise: int) -> int:
    """A line that a crash cut short counts as not written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return otherwise
