"""Recipes against each other: one budget, several seeds, one table and one picture.

    python tools/compare.py [RECIPE ...] [out=runs/compare] [seeds=3] [jobs=1] [family=vit,resnet] [key=value ...]

Trains each recipe with each seed, for each family of models, then writes OUT/table.md and OUT/compare.png: accuracy
over seeds (mean and sample standard deviation), the difference to the baseline of the same seed, and minutes of
training. A run that is finished is not run again, one that was cut off goes on. Without RECIPE all that are listed
below. key=value is handed to every run. jobs: runs side by side, each with its share of the cores.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FAMILIES = {"vit": [], "resnet": ["model=resnet18", "model_args={channels: [16, 32, 64, 128]}"]}
TEACHER = ["model=resnet18", "model_args={channels: [32, 64, 128, 256]}"]  # four times the parameters of either
GENERATIONS = 3
SEED_STEP = 10  # a chain of generations takes the seeds after its first


@dataclass(frozen=True)
class Entry:
    """A recipe as it is run here. baseline: the row whose accuracy with the same seed is subtracted."""

    recipe: str
    title: str
    pairs: list[str] = field(default_factory=list)
    baseline: str = "labels"
    after: str | None = None  # an entry that has to be there first


ENTRIES = {
    "born_again": Entry("born_again", "born-again"),  # its first generation is the baseline
    "label_smoothing": Entry("label_smoothing", "label smoothing"),
    "layerwise": Entry("layerwise", "layer-wise"),
    "consistency": Entry("consistency", "consistency"),
    "labels_semi": Entry("supervised", "a tenth of the labels", ["labelled=0.1"]),
    "consistency_semi": Entry(
        "consistency_semi", "a tenth of the labels + consistency", baseline="a tenth of the labels"
    ),
    "teacher": Entry("supervised", "larger teacher", TEACHER),
    "distill": Entry("distill", "distilled from the larger teacher", after="teacher"),
}


class Comparison:
    def __init__(self, out: Path, seeds: int, jobs: int, pairs: list[str]):
        self.out, self.pairs, self.jobs = out, pairs, jobs
        self.seeds = [SEED_STEP * number for number in range(seeds)]
        self.environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        self.began, self.done, self.total = time.perf_counter(), 0, 0

    def folder(self, family: str, name: str, seed: int) -> Path:
        return self.out / ("teacher" if name == "teacher" else family) / f"{name}_{seed}"

    def run(self, job: tuple[str, str, int]) -> None:
        """One command, in a process of its own; its output in a file beside the run."""
        family, name, seed = job
        entry, folder = ENTRIES[name], self.folder(family, name, seed)
        command = "generations" if name == "born_again" else "train"
        pairs = [*FAMILIES[family], *entry.pairs, *self.pairs, f"out={folder}", f"seed={seed}"]
        if entry.after:
            pairs.append(f"teacher.init={self.folder(family, entry.after, seed)}")
        if name == "born_again":
            pairs.append(f"generations={GENERATIONS}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with open(folder.with_suffix(".log"), "a") as log:
            code = subprocess.run(
                [sys.executable, "-m", "dino_sd", command, entry.recipe, *pairs],
                stdout=log, stderr=subprocess.STDOUT, env=self.environment, check=False,
            ).returncode  # fmt: skip
        if code:
            last = (folder.with_suffix(".log").read_text().strip() or "no message").splitlines()[-1]
            raise SystemExit(
                f"error: {command} {entry.recipe} failed ({last}); all of it: {folder.with_suffix('.log')}"
            )
        timing = folder.with_suffix(".seconds")
        if not timing.exists():  # a run that was finished before only starts up and ends
            timing.write_text(str(time.perf_counter() - began))
        self.done += 1
        left = (time.perf_counter() - self.began) / self.done * (self.total - self.done)
        print(f"{self.done}/{self.total}  {folder}  ETA {left / 60:.0f} min", file=sys.stderr, flush=True)

    def train(self, names: list[str], families: list[str]) -> None:
        jobs = [(family, name, seed) for name in names for family in families for seed in self.seeds]
        jobs = [job for job in jobs if job[1] != "teacher" or job[0] == families[0]]  # one for all families
        first = [job for job in jobs if any(ENTRIES[name].after == job[1] for name in names)]
        rest = sorted(
            (job for job in jobs if job not in first), key=lambda job: job[1] != "born_again"
        )  # longest first
        self.total = len(jobs)
        for stage in (first, rest):
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self.run, stage))

    def rows(self, name: str, family: str, seed: int) -> dict[str, float]:
        """{title of a row: accuracy in percent}"""
        folder, title = self.folder(family, name, seed), ENTRIES[name].title
        if name == "born_again":
            lineage = json.loads((folder / "lineage.json").read_text())
            singles = [entry["accuracy"] for entry in lineage["generations"]]
            rows = {"labels": singles[0], **{f"{title} {k}": top1 for k, top1 in enumerate(singles) if k}}
            whole = next(
                e for e in lineage["ensembles"] if e["members"][0] == "gen1" and len(e["members"]) == GENERATIONS
            )
            return rows | {f"{title} 1 to {GENERATIONS}, ensemble": whole["accuracy"]}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        scores = [line for line in lines if "accuracy" in line][-1]
        rows = {}
        for key in sorted(key for key in scores if key.startswith("exit_") and key.endswith("/accuracy")):
            exits = sorted(
                int(k[5:].split("/")[0]) for k in scores if k.startswith("exit_") and k.endswith("/accuracy")
            )
            number = int(key[5:].split("/")[0])
            rows[f"{title}, exit {exits.index(number) + 1} of {len(exits)}"] = scores[key]
        rows[f"{title}, whole" if rows else title] = scores["accuracy"]
        if "ensemble/accuracy" in scores:
            rows[f"{title}, ensemble"] = scores["ensemble/accuracy"]
        return rows

    def results(self, names: list[str], family: str) -> dict[str, dict[str, Any]]:
        """{title: {"accuracy": one for each seed, "difference": to the baseline's, "minutes": mean of its command}}"""
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            for seed in self.seeds:
                for title, top1 in self.rows(name, family, seed).items():
                    row = found.setdefault(title, {"accuracy": [], "baseline": ENTRIES[name].baseline, "seconds": []})
                    row["accuracy"].append(top1)
                    row["seconds"].append(float(self.folder(family, name, seed).with_suffix(".seconds").read_text()))
        for row in found.values():
            base = found.get(row["baseline"])
            pairs = zip(row["accuracy"], base["accuracy"], strict=True) if base else []
            row["difference"] = [ours - theirs for ours, theirs in pairs] if base is not row else []
        return found


def spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(results: dict[str, dict[str, dict[str, Any]]], seeds: list[int]) -> str:
    families = list(results)
    heads = [column for family in families for column in (f"{family}: top-1 %", "against its baseline", "minutes")]
    lines = ["| " + " | ".join(["", *heads]) + " |", "|" + "---|" * (len(heads) + 1)]
    for title in results[families[0]]:
        cells = [title]
        for family in families:
            row = results[family][title]
            minutes = mean(row["seconds"]) / 60
            cells += [spread(row["accuracy"]), spread(row["difference"], "+"), f"{minutes:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nMean ± standard deviation over the seeds {', '.join(map(str, seeds))}.\n"


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    titles = list(next(iter(results.values())))[::-1]
    figure = Figure(figsize=(5.2 * len(results) + 2, 0.32 * len(titles) + 1.2), layout="constrained")
    for place, (axes, (family, rows)) in enumerate(
        zip(figure.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items(), strict=True)
    ):
        for y, title in enumerate(titles):
            values = rows[title]["accuracy"]
            axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.45, markersize=5)
            axes.plot([mean(values)], [y], "|", color="black", markersize=14, markeredgewidth=2)
        for title, style in (("labels", "--"), ("a tenth of the labels", ":")):
            if title in rows:
                axes.axvline(mean(rows[title]["accuracy"]), color="gray", linestyle=style, linewidth=1)
        axes.set_title(family)
        axes.set_xlabel("top-1 %: dots are seeds, bars their mean")
        axes.grid(axis="x", alpha=0.25)
        if place == 0:
            axes.set_yticks(range(len(titles)), titles)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    options = {"out": "runs/compare", "seeds": "3", "jobs": "1", "family": ",".join(FAMILIES)}
    own = [argument for argument in arguments if argument.split("=")[0] in options]
    options |= dict(argument.split("=", 1) for argument in own)
    names = [argument for argument in arguments if "=" not in argument] or list(ENTRIES)
    families = options["family"].split(",")
    for kind, given, known in (("RECIPE", names, ENTRIES), ("family", families, FAMILIES)):
        if wrong := [name for name in given if name not in known]:
            raise SystemExit(f"error: {kind} {wrong[0]!r} is not known here; expected some of {', '.join(known)}")
    needed = {ENTRIES[name].after for name in names} - {None} - set(names)
    names = [name for name in ENTRIES if name in names or name in needed]
    pairs = [argument for argument in arguments if "=" in argument and argument not in own]
    comparison = Comparison(Path(options["out"]), int(options["seeds"]), int(options["jobs"]), pairs)
    comparison.train(names, families)
    results = {family: comparison.results(names, family) for family in families}
    text = table(results, comparison.seeds)
    (comparison.out / "table.md").write_text(text)
    draw(results, comparison.out / "compare.png")
    print(text)
    print(f"written to {comparison.out / 'table.md'} and compare.png")


if __name__ == "__main__":
    main(sys.argv[1:])
