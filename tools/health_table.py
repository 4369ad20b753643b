"""How well a run's verdict on itself tells learning from collapse: recipes that learn, recipes that are made to fail.

    python tools/health_table.py [RUN ...] [out=runs/health]

Trains each, one at a time, and prints a Markdown table: the first step of each verdict, the k-NN accuracy before and
after (the truth, which the verdict does not see), and what is wrong with the verdict. A run that is finished is not run
again: its verdicts are drawn anew from its metrics.jsonl.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dino_sd import build, recipe
from dino_sd.health import KEPT, history_of, verdict

RESNET = ["model=resnet18", "model_args={channels: [16, 32, 64, 128]}"]
ONE_POINT, UNIFORM, UNSTABLE, FINE = "collapsed: one point", "collapsed: uniform", "unstable", ""
POINT = ["terms.dino.center=false", "terms.dino.teacher_temperature=0.001"]
FLAT = ["terms.dino.teacher_temperature=0.1"]


@dataclass(frozen=True)
class Run:
    """steps: one to two minutes on one core. expected: the verdict it must end in; FINE: none but a good one, ever."""

    steps: int
    pairs: list[str]
    expected: str = FINE
    recipe: str = "quickstart"


RUNS = {
    "vit": Run(300, []),
    "resnet": Run(300, RESNET),
    "vit-one-point": Run(200, POINT, ONE_POINT),
    "resnet-one-point": Run(200, [*RESNET, *POINT], ONE_POINT),
    "vit-uniform": Run(300, FLAT, UNIFORM),
    "resnet-uniform": Run(300, [*RESNET, *FLAT], UNIFORM),
    "vit-batch-32": Run(500, ["batch_size=32"]),
    "resnet-batch-32": Run(500, [*RESNET, "batch_size=32"]),
    "vit-batch-256": Run(100, ["batch_size=256"]),
    "resnet-batch-256": Run(100, [*RESNET, "batch_size=256"]),
    "vit-1000-images": Run(300, ["data=THOUSAND"]),
    "resnet-1000-images": Run(300, [*RESNET, "data=THOUSAND"]),
    "vit-labels": Run(400, [], recipe="supervised"),
    "resnet-labels": Run(400, RESNET, recipe="supervised"),
    "vit-no-centre": Run(300, ["terms.dino.center=false"], ONE_POINT),
    "resnet-no-centre": Run(300, [*RESNET, "terms.dino.center=false"], ONE_POINT),
    "vit-lr-1": Run(200, ["optim.lr=1", "optim.clip=null"], UNSTABLE),
    "resnet-lr-1": Run(200, [*RESNET, "optim.lr=1", "optim.clip=null"], UNSTABLE),
    "vit-16-prototypes": Run(300, ["terms.dino.prototypes=16"]),
    "vit-batch-16-65536-prototypes": Run(150, ["batch_size=16", "terms.dino.prototypes=65536"]),
}


def train(name: str, out: Path) -> list[dict]:
    """The lines of its metrics.jsonl."""
    run, folder = RUNS[name], out / name
    if not (folder / "checkpoints" / f"step_{run.steps:08d}.pt").is_file():
        pairs = [
            "epochs=null", "images=null", f"steps={run.steps}", f"out={folder}", "evaluate.every=1", "health.every=20",
            "log.every=20", "checkpoint.every=1", "device=cpu", "precision=fp32",
            *(pair.replace("THOUSAND", str(out / "thousand")) for pair in run.pairs),
        ]  # fmt: skip
        command = [sys.executable, "-m", "dino_sd", "train", str(recipe.recipes() / f"{run.recipe}.yaml"), *pairs]
        with open(out / f"{name}.log", "w") as log:
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=log, stdout=log, check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(name: str, lines: list[dict]) -> str:
    """One line of the table."""
    run, signs = RUNS[name], history_of(lines)
    warmup = round(0.1 * run.steps)
    names = [verdict(signs[: end + 1][-KEPT:], warmup).name for end in range(len(signs))]
    firsts = [(signs[i].step, now) for i, now in enumerate(names) if i == 0 or names[i - 1] != now]
    scores = [f"{line['knn']:.1f}" for line in lines if "knn" in line]
    bad = [(signs[i].step, now) for i, now in enumerate(names) if now not in ("warming up", "learning")]
    false = [step for step, now in bad if now != run.expected]
    named = next((str(step) for step, now in bad if now == run.expected), "never") if run.expected else ""
    told = ", ".join(f"{now} ({step})" for step, now in firsts)
    return f"| {name} | {' -> '.join(scores)} | {told} | {len(false)} of {len(names)} | {named} |"


def make_thousand(folder: Path) -> None:
    """The first 1,000 training images as files."""
    if folder.is_dir():
        return
    source = build.open_data(recipe.load_config(recipe.recipes() / "quickstart.yaml", []))
    folder.mkdir(parents=True)
    for index in range(1000):
        Image.fromarray(source.image(index)[0].numpy()).save(folder / f"{index:04d}.png")


def main() -> None:
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    out = Path(dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a).get("out", "runs/health"))
    make_thousand(out / "thousand")
    print("| run | k-NN top-1 % | verdicts (first step) | false alarms | named at step |\n|---|---|---|---|---|")
    for name in names or RUNS:
        print(row(name, train(name, out)), flush=True)


if __name__ == "__main__":
    main()
