"""What an evaluator found, for people and for programs: a table, a JSON file, and one object on stdout."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dino_sd import __version__
from dino_sd.checkpoint import write_whole
from dino_sd.data.source import short_hash
from dino_sd.distributed import is_main, world_size
from dino_sd.errors import UserError
from dino_sd.evaluator_config import FrozenSettings
from dino_sd.intervals import Interval, wilson
from dino_sd.models.model import Model
from dino_sd.settings import plain

# Columns that are scores: {key: heading}. All others say what was scored. "recall@5" is a "recall".
SCORES = {
    "top1": "top-1 %", "top5": "top-5 %", "map": "mAP %", "recall": "recall@{} %", "miou": "mIoU %",
    "pixel_accuracy": "pixels %", "rankme": "RankMe", "lidar": "LiDAR", "alpha": "alpha-ReQ",
    "uniformity": "uniformity", "alignment": "alignment",
}  # fmt: skip
INTERVAL = "_interval"  # ends the key of a score's 95% confidence interval
NOT_SETTINGS = ("out", "workers", "device", "cache")  # change no result


def heading(key: str) -> str:
    name, _, count = key.partition("@")
    return SCORES.get(name, key).format(count)


def is_score(key: str) -> bool:
    return key.partition("@")[0] in SCORES and not key.endswith(INTERVAL)


def accuracies(top1: float, top5: float, images: int) -> dict[str, Any]:
    """A row's scores in percent of so many images, each with its interval (Wilson)."""
    scores = {"top1": top1, "top5": top5}
    return scores | {key + INTERVAL: percent(wilson(value / 100, images)) for key, value in scores.items()}


def percent(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [100 * end for end in interval]


def describe(
    evaluator: str,
    model: Model,
    size: tuple[int, int] | None,
    settings: FrozenSettings,
    results: list[dict[str, Any]],
    began: float,
    *,
    judged: dict[str, Any],
    learned: dict[str, Any] | None = None,
    classes: int | None = None,
) -> dict[str, Any]:
    """All one needs to get the same numbers again, and the numbers.

    judged, learned: sets of images, as of `about`; learned None: the model's own classifiers, or nothing. classes: None
    where there are none.
    """
    return {
        "evaluator": evaluator, "model": model.description,
        "weights": model.weights, "results": results, "classes": classes,
        "train": learned, "test": judged,
        "images": {"size": size, "crop": model.crop, "mean": model.mean, "std": model.std, "channels": model.channels},
        "settings": plain(settings), "provenance": model.provenance,
        "versions": {"dino_sd": __version__, "torch": torch.__version__}, "ranks": world_size(),
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def about(source: Any, images: int) -> dict[str, Any]:
    """What a report says of a set of images, of which so many could be read."""
    left_out = {"unreadable": len(source) - images} if images < len(source) else {}
    return {"data": source.name, "images": images, **left_out, "fingerprint": source.fingerprint()}


def deliver(report: dict[str, Any], model: Model, out: str | None, json_only: bool) -> None:
    """Rank 0 prints the table, and writes the file where there is a place for it."""
    if not is_main():
        return
    console = console_for(json_only)
    print_report(console, report)
    path = Path(out) if out else place_of(report, model.folder)
    if path is not None:
        write_json(path, report)
        console.print(f"written to {path}", soft_wrap=True, highlight=False, markup=False)
    if json_only:
        print(as_json(report), flush=True)


def console_for(json_only: bool) -> Console:
    """On stdout, or on stderr where stdout is for JSON; wide enough for a table where nobody's terminal says less."""
    console = Console(stderr=json_only, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def place_of(report: dict[str, Any], folder: Path | None) -> Path | None:
    """Beside the model, a name of its own for each evaluator, weights, data and settings that change a number."""
    if folder is None:
        return None
    settings = {key: value for key, value in report["settings"].items() if key not in NOT_SETTINGS}
    what = [report["weights"], report["train"], report["test"], settings]
    return folder / "evaluations" / f"{report['evaluator']}-{short_hash(json.dumps(what).encode())[:8]}.json"


def print_report(console: Console, report: dict[str, Any]) -> None:
    train, test, classes = report["train"], report["test"], report["classes"]
    lines = [(f"{report['evaluator']} of {report['model']}")]
    learned = f"trained on {train['images']:,} labelled images of {train['data']}, " if train else ""
    counted = f"; {classes} classes" if classes else ""
    lines.append(f"{learned}judged on {test['images']:,} of {test['data']}{counted}; {report['seconds']} s")
    console.print(lines[0], soft_wrap=True, highlight=False, markup=False)
    hidden = ("top5",) if classes is not None and classes <= 5 else ()
    print_rows(console, report["results"], hidden)
    console.print(lines[1], soft_wrap=True, highlight=False, markup=False)


def print_rows(console: Console, rows: Sequence[dict[str, Any]], hidden: Sequence[str] = ()) -> None:
    """One table; a score's interval stands behind it."""
    columns = dict.fromkeys(key for row in rows for key in row if not key.endswith(INTERVAL) and key not in hidden)
    table = Table()
    for key in columns:
        table.add_column(heading(key), justify="right")
    for row in rows:
        table.add_row(*(cell(row, key) for key in columns))
    console.print(table)


def cell(row: dict[str, Any], key: str) -> str:
    value, interval = row.get(key), row.get(key + INTERVAL)
    if value is None:
        return ""
    if not is_score(key):
        return value if isinstance(value, str) else f"{value:g}"
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises UserError where it cannot be written."""
    write_text(path, as_json(content, indent=2) + "\n")


def as_json(content: Any, indent: int | None = None) -> str:
    """JSON knows no NaN and no infinity: these are null."""

    def sound(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sound(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [sound(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(sound(content), indent=indent, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """All or nothing. Raises UserError where it cannot be written."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror}); choose another with out=FILE") from None
