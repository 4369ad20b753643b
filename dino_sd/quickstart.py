"""Pretrain, judge and export on the images that come with the package: every part of the program once, in minutes."""

import json
import time
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from dino_sd import recipe, sheets
from dino_sd.config import Config, ReportSettings
from dino_sd.distributed import is_main
from dino_sd.errors import UserError
from dino_sd.evaluate import evaluate_knn, evaluate_linear
from dino_sd.evaluator_config import KnnSettings, LinearSettings
from dino_sd.export import export
from dino_sd.log import duration
from dino_sd.report import EXTRA, has_extra, report
from dino_sd.train import train

matplotlib.use("Agg")
SHOWN = 5  # images whose crops the picture shows


def quickstart(pairs: list[str]) -> None:
    """Trains configs/quickstart.yaml, then prints one table, draws one picture, and exports the teacher."""
    from matplotlib import pyplot

    began = time.perf_counter()
    cfg = recipe.load_config(recipe.recipes() / "quickstart.yaml", pairs)
    if cfg.evaluate.every is None:
        raise UserError("quickstart judges as it trains: set evaluate.every, such as 0.25")
    run = Path(cfg.out)
    voters, judged = str(cfg.evaluate.train), str(cfg.evaluate.test)
    pixels = evaluate_knn(
        "pixels", KnnSettings(train=voters, test=judged, k=[cfg.evaluate.k], channels=cfg.channels, device=cfg.device)
    )
    train(cfg)
    linear = evaluate_linear(run, LinearSettings(train=voters, test=judged, device=cfg.device))
    folder = export(run, run / "export")
    if not is_main():
        return
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [(line["step"] * cfg.batch_size, line["knn"]) for line in lines if "knn" in line]
    raw = pixels["results"][0]["top1"]
    figure = draw(cfg, lines, scores, raw)
    figure.savefig(run / "quickstart.png", dpi=120)
    pyplot.close(figure)
    table = Table(title=f"{judged}, {pixels['test']['images']:,} test images", title_justify="left")
    table.add_column("")
    table.add_column("top-1 %", justify="right")
    for name, score in (
        (f"k-NN of raw pixels (k={cfg.evaluate.k})", raw),
        ("k-NN of the untrained backbone", scores[0][1]),
        ("k-NN of the trained teacher", scores[-1][1]),
        ("linear probe on the trained teacher", linear["results"][0]["top1"]),
    ):
        table.add_row(name, f"{score:.1f}")
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print(table)
    console.print(f"picture:  {run / 'quickstart.png'}")
    console.print(f"export:   {folder}")
    page = report([run], ReportSettings(device=cfg.device)) if has_extra() else f"for one, pip install {EXTRA}"
    console.print(f"page:     {page}")
    console.print(f"in {duration(time.perf_counter() - began)}")


def draw(cfg: Config, lines: list[dict], scores: list[tuple[int, float]], raw_pixels: float):  # noqa: ANN201
    """k-NN through training, the loss taken apart, and the crops of a few images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    judged, parts, crops = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    judged.plot(*zip(*scores, strict=True), "o-", label="teacher")
    judged.axhline(raw_pixels, color="gray", ls="--", label="raw pixels")
    judged.axhline(scores[0][1], color="gray", ls=":", label="untrained")
    judged.set(xlabel="images seen", ylabel="k-NN top-1, %", title="Is it learning?")
    judged.legend()
    judged.locator_params(axis="x", nbins=5)
    logged = [line for line in lines if "loss" in line]
    seen = [line["step"] * cfg.batch_size for line in logged]
    for key, name in (("loss_share", "loss"), ("teacher_entropy", "teacher entropy"), ("kl", "KL(teacher, student)")):
        parts.plot(seen, [line[f"dino/{key}"] for line in logged], label=name)
    parts.set(xlabel="images seen", ylabel="share of ln K", title="loss = entropy + KL", ylim=(0, 1))
    parts.legend()
    parts.locator_params(axis="x", nbins=5)
    crops.imshow(sheets.contact_sheet(cfg, SHOWN), cmap="gray", vmin=0, vmax=1)
    crops.set(title="what the student sees of each image")
    crops.axis("off")
    return figure
