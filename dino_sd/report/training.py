"""Reports while a run trains: pictures at a few moments, and the page. They change nothing of the run itself."""

import copy
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dino_sd.build import Length
from dino_sd.config import Config
from dino_sd.data.source import Source
from dino_sd.distributed import barrier, is_main, say
from dino_sd.errors import Halted
from dino_sd.method import Network, SelfDistillation
from dino_sd.models.model import Model
from dino_sd.report import EXTRA, has_extra, write
from dino_sd.report.drawing import FixedImages
from dino_sd.report.folder import PICTURE, STARTS
from dino_sd.settings import size_pair

SHARE = 0.01  # of the time since the start that all this may take; the last page is written whatever it takes


class Reports:
    """Rank 0 draws and writes while the others wait; nothing that goes wrong here ends the run.

    data: what `run.describe` says of the source. start: step that the run goes on from. Left by a guard that stops
    the run, it writes the page a last time.
    """

    def __init__(self, cfg: Config, length: Length, source: Source, data: dict[str, Any], start: int):
        self.cfg, self.source, self.data, self.steps = cfg, source, data, length.steps
        self.run, self.folder = Path(cfg.out), Path(cfg.out) / "report"
        self.every = None if cfg.report.every is None else max(length.of(cfg.report.every), 1)
        self.able = has_extra()
        self.images: FixedImages | None = None
        self.began, self.spent, self.latest = time.perf_counter(), 0.0, 2.0  # seconds; the first page is a guess
        self.warned, self.written = False, False
        if self.every is not None and self.able and is_main():
            self._try(lambda: self._begin(start))

    def _begin(self, start: int) -> None:
        """Forgets what was drawn beyond the step that the run goes on from, and notes that it does."""
        for path in self.folder.glob("step_*.webp"):
            match = PICTURE.fullmatch(path.name)
            if match and (int(match[1]) > start or not start):
                path.unlink(missing_ok=True)
        starts = self.folder / STARTS
        known = starts.read_text(errors="replace").splitlines() if start and starts.is_file() else []
        kept = [line for line in known if _step(line, start) < start]
        if start or starts.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            starts.write_text("".join(line + "\n" for line in [*kept, *[json.dumps({"step": start})] * bool(start)]))

    def due(self, done: int) -> bool:
        """Says the same on every rank."""
        return self.every is not None and (done % self.every == 0 or done == self.steps)

    def __call__(self, done: int, method: SelfDistillation) -> None:
        """After `done` steps, 0 for the untrained network. Every rank calls it."""
        if self.able and is_main():
            self.spent += self._try(lambda: self._draw(done, getattr(method, method.result)))
            elapsed = time.perf_counter() - self.began
            if done == self.steps or (done and self.spent + self.latest < SHARE * elapsed):
                self.latest = self._try(self._write)
                self.spent += self.latest
        barrier()

    def _draw(self, done: int, network: Network) -> None:
        # A copy: no hook, mode, statistic or kernel choice of the network in training is touched.
        backbone = copy.deepcopy(network.backbone).float().eval().requires_grad_(False)
        evaluate, views = self.cfg.evaluate, self.cfg.views
        model = Model(
            backbone, size_pair(evaluate.size or views.global_.size), evaluate.crop, self.data["mean"],
            self.data["std"], self.cfg.model, {}, classes=self.data["classes"],
        )  # fmt: skip
        device = next(backbone.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self.images is None:
                self.images = FixedImages(self.source, self.cfg, self.data["range"])
            self.images.draw(model, self.folder, done)

    def _write(self) -> None:
        write([self.run], self.run / "report.html")
        self.written = True

    def _try(self, made: Callable[[], None]) -> float:
        """Returns the seconds that it took."""
        began = time.perf_counter()
        try:
            made()
        except Exception as error:  # a picture must not cost a run
            if not self.warned:
                reason = (str(error).splitlines() or [""])[0]
                say(f"warning: the report cannot be written ({type(error).__name__}: {reason}); the run goes on")
            self.warned = True
        return time.perf_counter() - began

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.every is None or not is_main() or (kind is not None and not issubclass(kind, Halted)):
            return
        if not self.able:
            say(f"no report is written: pip install {EXTRA}, then dino-sd report {self.run}")
            return
        if kind is not None:
            self._try(self._write)
        if self.written:
            say(f"report: {self.run / 'report.html'}")


def _step(line: str, otherwise: int) -> int:
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return otherwise
