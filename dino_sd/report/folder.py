"""What the folders of runs hold, read with patience: what a crash cut short, or never wrote, is left out and said."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from dino_sd import build
from dino_sd.data.statistics import evenly
from dino_sd.errors import UserError
from dino_sd.recipe import LENGTHS, finish
from dino_sd.settings import Curve, plain

PICTURE = re.compile(r"step_(\d+)_([a-z]+)\.webp")
STARTS = "starts.jsonl"  # in the folder of pictures: a line for every time that the run went on
SCHEDULE_POINTS = 200
MOST = 2**53  # larger numbers of steps and images are damage


@dataclass
class Run:
    """A run's folder, as plain values. Everything in it may have been written by anyone.

    lines: of metrics.jsonl. starts: steps from which it went on. pictures: {step: {kind: file}}. schedules: series
    that the settings tell. notes: what could not be read, a sentence each.
    """

    folder: Path
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    anomalies: list[dict[str, Any]] = field(default_factory=list)
    bad_files: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    pictures: dict[int, dict[str, Path]] = field(default_factory=dict)
    schedules: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the lines that hold a number of this name; what is not finite comes as it is."""
        if key in self.schedules:
            return self.schedules[key]
        found = [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]
        return [step for step, _ in found], [float(value) for _, value in found]

    def last(self, key: str) -> float | None:
        return next((float(line[key]) for line in reversed(self.lines) if is_number(line.get(key))), None)

    def names(self) -> list[str]:
        """Names of all numbers in the lines, in the order of their first appearance."""
        logged = dict.fromkeys(key for line in self.lines for key, value in line.items() if is_number(value))
        return [*logged, *self.schedules]

    def count(self, key: str) -> float | None:
        """A setting that one can reckon with: a number above 0 that is finite."""
        value = self.config.get(key)
        return value if is_number(value) and 0 < value < MOST else None

    @property
    def terms(self) -> list[str]:
        """Names of the loss's terms."""
        terms = self.config.get("terms")
        return [name for name in terms if str(name).isidentifier()] if isinstance(terms, dict) else []

    @property
    def steps_per_epoch(self) -> int | None:
        """As its newest line has it."""
        found = (line for line in reversed(self.lines) if is_number(line.get("epoch")) and 1e-9 < line["epoch"] < MOST)
        last = next(found, None)
        return max(round(last["step"] / last["epoch"]), 1) if last else None

    def verdicts(self) -> list[tuple[int, str]]:
        key = "health/verdict"
        return [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key), str)]


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(folder: Path) -> Run:
    """Raises UserError where there is no run."""
    if not folder.is_dir():
        raise UserError(f"report: {folder} is no folder; expected that of a run, the `out` it was trained with")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise UserError(f"report: {folder} holds no run (no metrics.jsonl, no config.yaml); give the folder of one")
    run = Run(folder, folder.resolve().name)
    run.config = _mapping(run, "config.yaml")
    run.environment = _mapping(run, "environment.json")
    run.lines = [line for line in _lines(run, "metrics.jsonl") if is_number(line.get("step"))]
    run.lines = [{**line, "step": int(line["step"])} for line in run.lines if abs(line["step"]) < MOST]
    run.anomalies, run.bad_files = _lines(run, "anomalies.jsonl"), _lines(run, "bad_files.jsonl")
    for path in sorted((folder / "evaluations").glob("*.json")):
        if found := _mapping(run, str(path.relative_to(folder))):
            run.evaluations[path.stem] = found
    starts = (line.get("step") for line in _lines(run, f"report/{STARTS}"))
    run.starts = sorted({int(step) for step in starts if is_number(step) and abs(step) < MOST})
    for path in sorted((folder / "report").glob("step_*.webp")):
        if match := PICTURE.fullmatch(path.name):
            run.pictures.setdefault(int(match[1]), {})[match[2]] = path
    run.schedules = schedules(run)
    return run


def name_apart(runs: list[Run]) -> None:
    """Runs whose folders have the same name get that of the folder above too, or a number."""
    names = [run.name for run in runs]
    for number, run in enumerate(runs, 1):
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
        if run.name in [other.name for other in runs[: number - 1]]:
            run.name = f"{run.name} ({number})"


def _text(run: Run, name: str) -> str:
    try:
        return (run.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror})")
        return ""


def _mapping(run: Run, name: str) -> dict[str, Any]:
    text = _text(run, name)
    try:
        found = (yaml.safe_load if name.endswith(".yaml") else json.loads)(text) if text else {}
    except (ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        run.notes.append(f"{name} is damaged")
        return {}
    return found


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    found, cut = [], 0
    for line in _text(run, name).split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            cut += 1
    if cut:
        run.notes.append(f"{name}: {cut} line(s) are damaged, or were cut off, and are left out")
    return found


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("optim.lr", 0.001), ... of a tree of settings."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(run: Run) -> list[tuple[str, Any, Any]]:
    """[(dotted key, value, default)] of the settings that are not at their default; of the length, the one that is set.

    What the run knows and this version does not comes with a default of None.
    """
    try:
        defaults = dict(flat(plain(finish({"steps": 1, "terms": {name: {} for name in run.terms}}))))
    except (UserError, AttributeError):  # terms that this version does not know
        defaults = dict(flat(plain(finish({"steps": 1}))))
    defaults |= dict.fromkeys(LENGTHS)
    return [(key, value, defaults.get(key)) for key, value in flat(run.config) if value != defaults.get(key)]


def length(run: Run) -> int | None:
    """Steps of the whole run, where its settings and its lines tell."""
    batch = run.count("batch_size")
    if steps := run.count("steps"):
        return int(steps)
    if batch and (images := run.count("images")):
        return max(round(images / batch), 1)
    if run.steps_per_epoch and (epochs := run.count("epochs")):
        return max(round(epochs * run.steps_per_epoch), 1)
    return None


def schedules(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Settings that move, from the first step to the newest: {"schedule/teacher.momentum": (steps, values)}."""
    steps, batch = length(run), run.count("batch_size")
    if not steps or not run.step or not batch or not run.steps_per_epoch:
        return {}
    whole = build.Length(steps, run.steps_per_epoch, int(batch))
    at = sorted({int(step) for step in evenly(min(run.step, steps), SCHEDULE_POINTS)})
    found = {}
    for key, tree in curves(run.config):
        try:
            curve = Curve.model_validate(tree)
            if curve.start != curve.end:
                moves = build.make_schedule(curve, whole, key)
                found[f"schedule/{key}"] = at, [moves(step / steps) for step in at]
        except (ValueError, UserError, ArithmeticError):  # of a version with other settings
            continue
    return found


def curves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups that look like a Curve."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if {"start", "end"} <= value.keys():
                yield f"{prefix}{key}", value
            else:
                yield from curves(value, f"{prefix}{key}.")


def seconds(run: Run) -> float | None:
    """Time spent in training steps, from the speeds that were logged; evaluation and start-up are not in it."""
    batch, steps, total, before = run.count("batch_size"), 0, 0.0, 0
    if not batch:
        return None
    for step, speed in zip(*run.series("images_per_s"), strict=True):
        if speed > 0 and step > before:
            total += (step - before) * batch / speed
            steps += step - before
        before = step
    return total if steps else None
