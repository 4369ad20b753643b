"""Born-again generations: a chain of ordinary runs, each taught by the one before it (Furlanello et al. 2018)."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino_sd import checkpoint
from dino_sd.config import Config, GenerationsSettings
from dino_sd.data.source import open_source
from dino_sd.distributed import barrier, is_main, say, setup
from dino_sd.errors import UserError
from dino_sd.evaluate import class_logits
from dino_sd.evaluator_config import AccuracySettings
from dino_sd.evaluators.accuracy import accuracy, mean_probabilities
from dino_sd.loading import load_model
from dino_sd.recipe import finish
from dino_sd.settings import plain
from dino_sd.tables import write_json
from dino_sd.train import train


def generations(cfg: Config, settings: GenerationsSettings) -> dict[str, Any]:
    """Trains out/gen0 on the labels alone, then gen1 to genN by `cfg`, each with the one before it as its teacher.

    Goes on where it was cut off. Prints a table, writes out/lineage.json and returns what is in it. Raises UserError
    for a config without terms.born_again or evaluate.test, and where a generation's folder holds another run.
    """
    check(cfg)
    out, device = Path(cfg.out), setup(cfg.device)
    judged = AccuracySettings(test=str(cfg.evaluate.test), device=cfg.device, workers=cfg.workers)
    test = open_source(judged.test, cfg.channels)
    lineage: list[dict[str, Any]] = []
    logits, labels_N = [], torch.empty(0, dtype=torch.int64)
    for number in range(settings.generations + 1):
        run = out / f"gen{number}"
        parent = out / f"gen{number - 1}" if number else None
        saved = train(generation_config(cfg, number))
        # judged here and not when it was trained: that may have been on another set, or in bfloat16
        of_model, labels_N = class_logits(load_model(saved, device), test, device, judged)
        logits.append(of_model["classifier"])
        result = accuracy(logits[-1], labels_N)
        lineage.append({
            "name": run.name, "seed": cfg.seed + number, "parent": parent and parent.name,
            "parent_sha256": lineage[-1]["sha256"] if lineage else None, "sha256": sha256_of(saved),
            "accuracy": result.top1, "accuracy_top5": result.top5, "knn": knn_of(saved, cfg),
            "checkpoint": str(saved.relative_to(out)),
        })  # fmt: skip
        if settings.stop_early and number and result.top1 <= lineage[-2]["accuracy"]:
            say(f"{run.name} is no better than {lineage[-2]['name']}: stopped early")
            break
    report = {
        "generations": lineage, "ensembles": ensembles(logits, labels_N), "test": test.name,
        "images": len(test), "config": plain(cfg),
    }  # fmt: skip
    if is_main():
        write_json(out / "lineage.json", report)
        print_table(report, out)
    barrier()
    return report


def knn_of(saved: Path, cfg: Config) -> float | None:
    """k-NN at the end of a run, if it was on the sets of the config."""
    state = checkpoint.load(saved)
    sets = [(evaluate["train"], evaluate["test"]) for evaluate in (state["config"]["evaluate"], plain(cfg.evaluate))]
    return state["scores"].get("knn") if sets[0] == sets[1] else None


def check(cfg: Config) -> None:
    if "born_again" not in cfg.terms:
        raise UserError("generations: the config has no terms.born_again; start from configs/born_again.yaml")
    if cfg.teacher.init is not None:
        raise UserError("generations: leave teacher.init out; each generation's teacher is the one before it")
    if cfg.evaluate.test is None or cfg.evaluate.every is None:
        raise UserError("generations: each is judged; set evaluate.test=DATA and evaluate.every=1.0")


def generation_config(cfg: Config, number: int) -> Config:
    """The run of one generation: the first learns from labels alone; each has a seed of its own."""
    tree = plain(cfg) | {"out": str(Path(cfg.out) / f"gen{number}"), "seed": cfg.seed + number}
    tree["labelled_seed"] = cfg.seed if cfg.labelled_seed is None else cfg.labelled_seed  # all know the same labels
    if number:
        tree["teacher"] = {"init": str(Path(cfg.out) / f"gen{number - 1}")}
    else:
        tree["terms"] = {"labels": {}} | {name: term for name, term in cfg.terms.items() if name != "born_again"}
    return finish(tree)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def ensembles(logits: list[Tensor], labels_N: Tensor) -> list[dict[str, Any]]:
    """Means of the probabilities of two generations and more: from the first one on, and of the born-again alone."""
    found = []
    for first in (0, 1):
        for last in range(first + 1, len(logits)):
            result = accuracy(mean_probabilities(logits[first : last + 1]), labels_N)
            found.append({
                "members": [f"gen{number}" for number in range(first, last + 1)], "accuracy": result.top1,
                "accuracy_top5": result.top5,
            })  # fmt: skip
    return found


def print_table(result: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{result['test']}, {result['images']:,} images", title_justify="left")
    for column in ("", "parent", "seed", "top-1 %", "k-NN %"):
        table.add_column(column, justify="right" if column.endswith("%") else "left")
    for entry in result["generations"]:
        knn = "" if entry["knn"] is None else f"{entry['knn']:.2f}"
        table.add_row(entry["name"], entry["parent"] or "labels", str(entry["seed"]), f"{entry['accuracy']:.2f}", knn)
    for entry in result["ensembles"]:
        table.add_row(
            f"ensemble {entry['members'][0]} to {entry['members'][-1]}", "", "", f"{entry['accuracy']:.2f}", ""
        )
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print(table)
    console.print(f"written to {out / 'lineage.json'}")
