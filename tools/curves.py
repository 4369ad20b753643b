"""The picture of docs/curves.md: a run that learns beside the three ways to fail, sign by sign.

    OMP_NUM_THREADS=1 python tools/curves.py [out=runs/curves] [picture=docs/curves.png]

Trains four runs of tools/health_table.py, 200 steps each and judged every 10, one at a time (about a minute each on one
core), draws their metrics.jsonl, and prints a Markdown table of their last lines. A finished run is not run again.
"""

import io
import sys
from dataclasses import replace
from pathlib import Path

import health_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

STEPS = 200
SHOWN = {"vit": "learns", "vit-one-point": "one point", "vit-uniform": "uniform", "vit-lr-1": "learning rate 1"}
MARKS = {"vit": "C0-", "vit-one-point": "C3--", "vit-uniform": "C1-.", "vit-lr-1": "C2:"}
PANELS = {
    "dino/loss_share": "loss, share of ln K",
    "dino/teacher_entropy": "teacher entropy, share of ln K",
    "dino/kl": "KL(teacher, student), share of ln K",
    "health/information": "information",
    "health/spread": "spread of the features",
    "health/effective_rank": "effective rank of the features",
    "health/gradient_norm": "largest gradient norm",
    "health/update_norm": "update norm",
    "knn": "k-NN top-1, % (needs labels)",
}
LOGARITHMIC = {"dino/kl": 1e-4, "health/information": 1e-5, "health/gradient_norm": 1e-3, "health/update_norm": 1e-6}


def draw(axes: Axes, key: str, runs: dict[str, list[dict]]) -> None:
    for name, lines in runs.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot(*zip(*points, strict=True), MARKS[name], label=SHOWN[name], lw=1.8)
    axes.set_title(PANELS[key], fontsize=10)
    axes.set_xlim(0, STEPS)
    axes.grid(alpha=0.25)
    if key in LOGARITHMIC:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=LOGARITHMIC[key])  # what is shown as 0 there
    else:
        axes.set_ylim(bottom=0)


def row(name: str, lines: list[dict]) -> str:
    """One line of the table: the last judgement, and the step that first named it."""
    judged = [line for line in lines if "health/verdict" in line]
    last = judged[-1]
    since = next(line["step"] for line in judged if line["health/verdict"] == last["health/verdict"])
    scores = [f"{line['knn']:.1f}" for line in lines if "knn" in line]
    cells = [f"{last[key]:.3g}" for key in PANELS if key != "knn"]
    verdict = f"{last['health/verdict']}, from step {since}"
    return f"| {SHOWN[name]} | {' | '.join(cells)} | {scores[0]} -> {scores[-1]} | {verdict} |"


def main() -> None:
    chosen = {"out": "runs/curves", "picture": "docs/curves.png"} | dict(a.split("=", 1) for a in sys.argv[1:])
    out = Path(chosen["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        run = health_table.RUNS[name]
        finer = [*run.pairs, "health.every=10", "log.every=10", "evaluate.every=0.25"]
        health_table.RUNS[name] = replace(run, steps=STEPS, pairs=finer)
    runs = {name: health_table.train(name, out) for name in SHOWN}
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, key in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        draw(axes, key, runs)
    figure.axes[0].legend(fontsize=9)
    figure.supxlabel("step", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("RGB").quantize(64).save(chosen["picture"], optimize=True)  # a third of the bytes
    print(f"| run | {' | '.join(PANELS.values())} | verdict |\n{'|---' * (len(PANELS) + 2)}|")
    for name, lines in runs.items():
        print(row(name, lines))


if __name__ == "__main__":
    main()
