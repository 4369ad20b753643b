"""A list of evaluators on one model: one table, with confidence intervals."""

import difflib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from rich.table import Table

from dino_sd import evaluator_config
from dino_sd.data.source import short_hash
from dino_sd.distributed import is_main, say, setup
from dino_sd.errors import UserError
from dino_sd.evaluate import (
    evaluate_accuracy,
    evaluate_knn,
    evaluate_linear,
    evaluate_logistic,
    evaluate_ranks,
    evaluate_retrieval,
)
from dino_sd.evaluator_config import CacheSettings, FrozenSettings, SuiteFile, SuiteSettings
from dino_sd.features import prepare
from dino_sd.models.model import Model
from dino_sd.recipe import recipes
from dino_sd.segment import evaluate_segmentation
from dino_sd.settings import check_keys, parse, plain, read_yaml
from dino_sd.tables import INTERVAL, NOT_SETTINGS, as_json, console_for, heading, is_score, write_json, write_text

# {name in a suite's file: its function}; the class of its settings has the same name in evaluator_config.py
EVALUATORS: dict[str, Callable[..., dict[str, Any]]] = {
    "accuracy": evaluate_accuracy, "knn": evaluate_knn, "linear": evaluate_linear, "logistic": evaluate_logistic,
    "retrieval": evaluate_retrieval, "segmentation": evaluate_segmentation, "ranks": evaluate_ranks,
}  # fmt: skip
OWN_DATA = ("segmentation",)  # does not judge the suite's images


def evaluate_suite(spec: str | Path | Model, settings: SuiteSettings, json_only: bool = False) -> dict[str, Any]:
    """Runs every evaluator of a suite's file and writes one table; returns it as {"rows": [...], ...}.

    A row has one score: {"evaluator", "setting", "score", "value", "low", "high"}, whose interval is None where there
    is none. Every evaluator also writes its own file. Rank 0 prints; json_only as in evaluate.py. Raises UserError for
    an evaluator or a setting that there is not, before anything is computed.
    """
    began = time.perf_counter()
    path = find(settings.suite)
    tree = read_yaml(path)
    check_keys(tree, SuiteFile, str(path), {})
    parsed: SuiteFile = parse(SuiteFile, tree)
    wanted = {name: settings_of(name, own or {}, parsed, settings, path) for name, own in parsed.evaluators.items()}
    model = prepare(spec, setup(settings.device), settings)
    rows: list[dict[str, Any]] = []
    reports: dict[str, dict[str, Any]] = {}
    for place, (name, own) in enumerate(wanted.items(), 1):
        say(f"{path.stem}: {name} ({place} of {len(wanted)})")
        with redirect_stdout(sys.stderr) if json_only else nullcontext():
            reports[name] = EVALUATORS[name](model, own)
        rows += rows_of(name, reports[name])
    first = next(iter(reports.values()))
    report = {
        "suite": path.stem, "model": model.description, "weights": first["weights"], "rows": rows,
        "evaluators": {name: plain(own) for name, own in wanted.items()},
        "data": {name: {part: report[part] for part in ("train", "test")} for name, report in reports.items()},
        "provenance": model.provenance, "versions": first["versions"],
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip
    if is_main():
        hand_out(report, model, settings.out, json_only)
    return report


def find(suite: str) -> Path:
    """A file, or one in configs/suites by its name. Raises UserError where there is none."""
    places = [Path(suite).expanduser(), recipes() / "suites" / f"{suite}.yaml"]
    for path in places:
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in (recipes() / "suites").glob("*.yaml")))
    raise UserError(f"suite={suite} does not exist; expected a YAML file, or one that comes with dino_sd: {shipped}")


def settings_of(name: str, own: dict[str, Any], file: SuiteFile, settings: SuiteSettings, path: Path) -> Any:
    """An evaluator's settings: its own, over what all of the suite share."""
    if name not in EVALUATORS:
        near = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0.5) or list(EVALUATORS)
        raise UserError(f"{path}: evaluators.{name} does not exist; did you mean {', '.join(near)}?")
    cls: type[FrozenSettings] = getattr(evaluator_config, f"{name.capitalize()}Settings")
    check_keys(own, cls, f"{path}, evaluators.{name}", {})
    if shares := [key for key in ("network", "channels", "device") if own.get(key) is not None]:
        raise UserError(
            f"{path}: evaluators.{name}.{shares[0]}: all evaluators share one model; give it to the command, as in "
            f"dino-sd evaluate MODEL suite={path} {shares[0]}={own[shares[0]]}"
        )
    given = settings.model_fields_set
    names = [key for key in (*FrozenSettings.model_fields, *CacheSettings.model_fields) if key in cls.model_fields]
    shared = {key: getattr(settings, key) for key in names if key in given}
    if name not in OWN_DATA:
        data = {"train": settings.train or file.train, "test": settings.test or file.test}
        shared |= {key: value for key, value in data.items() if value is not None and key in cls.model_fields}
    for done in ("network", "channels", "exit"):  # the model is loaded and cut already
        shared.pop(done, None)
    return parse(cls, shared | own, f"evaluators.{name}.")


def rows_of(name: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """A report's scores, one a row."""
    rows = []
    for result in report["results"]:
        about = {key: value for key, value in result.items() if not is_score(key) and not key.endswith(INTERVAL)}
        setting = ", ".join(f"{key}={value:g}" if not isinstance(value, str) else f"{key}={value}"
                            for key, value in about.items() if value is not None)  # fmt: skip
        for key in filter(is_score, result):
            if key == "top5" and report["classes"] is not None and report["classes"] <= 5:
                continue
            low, high = result.get(key + INTERVAL) or (None, None)
            rows.append({"evaluator": name, "setting": setting, "score": heading(key), "value": result[key],
                         "low": low, "high": high})  # fmt: skip
    return rows


COLUMNS = ("evaluator", "setting", "score", "value", "95% interval")


def cells(row: dict[str, Any]) -> list[str]:
    interval = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
    return [row["evaluator"], row["setting"], row["score"], f"{row['value']:.2f}", interval]


def markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['suite']}: {report['model']}", "", f"| {' | '.join(COLUMNS)} |", "|---|---|---|---:|---|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in report["rows"]]
    sets = {
        f"`{about['data']}` ({about['images']:,} images)": None
        for data in report["data"].values() for about in data.values() if about
    }  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["", f"Data: {', '.join(sets)}. Weights {report['weights']}, {versions}; {report['seconds']:g} s.", ""]
    lines += ["Intervals are over the images judged, or over draws of training images where there are several.", ""]
    return "\n".join(lines)


def hand_out(report: dict[str, Any], model: Model, out: str | None, json_only: bool) -> None:
    """Prints the table, and writes it as Markdown and as JSON where there is a place for them."""
    console = console_for(json_only)
    table = Table(title=f"{report['suite']}: {report['model']}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in report["rows"]:
        table.add_row(*cells(row))
    console.print(table)
    settings = {
        name: {key: value for key, value in own.items() if key not in NOT_SETTINGS}
        for name, own in report["evaluators"].items()
    }
    what = short_hash(json.dumps([report["weights"], report["data"], settings]).encode())[:8]
    beside = model.folder and model.folder / "evaluations" / f"suite-{report['suite']}-{what}"
    stem = Path(out).with_suffix("") if out else beside
    if stem:
        write_json(stem.with_name(stem.name + ".json"), report)
        write_text(stem.with_name(stem.name + ".md"), markdown(report))
        console.print(f"written to {stem}.md and {stem.name}.json", soft_wrap=True)
    if json_only:
        print(as_json(report), flush=True)
