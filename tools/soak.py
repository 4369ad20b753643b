"""Whether a long run stays what it was: 20,000 tiny steps with everything on, watched from outside.

    python tools/soak.py [steps=20000] [NAME=VALUE ...]

Prints, for memory, open files, threads and the time of a step, the slope over the run (its first fifth left out) with
its 95% confidence; exit code 1 where one has grown: its slope is above zero with that confidence, and over the whole
run it comes to more than a hundredth.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = {
    "data": "fashion-mnist-mini:train", "model": "vit_tiny_patch16_224", "channels": 1, "batch_size": 8, "workers": 1,
    "model_args": "{patch_size: 14, embed_dim: 32, depth: 1, num_heads: 1}", "views.global.size": 28,
    "views.local.size": 14, "views.local.count": 1, "device": "cpu", "precision": "fp32",
    "terms.dino": "{prototypes: 64, hidden: 32, bottleneck: 16}", "log.every": 50, "health.every": 50,
    "checkpoint.every": "steps=500", "checkpoint.milestone": "steps=10000", "evaluate.every": "steps=2000",
    "evaluate.train": "fashion-mnist-mini:test", "evaluate.test": "fashion-mnist-mini:test",
}  # fmt: skip
BLOCKS = 20  # means of so many stretches of the run are fitted: samples near each other are not independent
T95 = 2.101  # of Student's t with BLOCKS - 2 degrees of freedom


def main() -> int:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    settings = SETTINGS | {"steps": "20000"} | given
    with tempfile.TemporaryDirectory() as folder:
        run, recipe = Path(folder) / "run", Path(folder) / "empty.yaml"
        recipe.write_text("{}\n")
        pairs = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "dino_sd", "train", str(recipe), *pairs, f"out={run}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(Path(folder) / "said", "w") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            samples = watch(process, run, int(settings["batch_size"]))
        if process.returncode != 0:
            print((Path(folder) / "said").read_text()[-2000:], file=sys.stderr)
            return 2
        return judge(samples, int(settings["steps"]))


def watch(process: subprocess.Popen, run: Path, batch_size: int) -> list[dict[str, float]]:
    """One line for each line of the log that appears, with what the process and its loader hold at that time."""
    samples: list[dict[str, float]] = []
    place, seen = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        try:
            with open(run / "metrics.jsonl") as file:
                file.seek(place)
                text = file.read()
        except OSError:
            continue
        whole = text[: text.rfind("\n") + 1]
        place += len(whole.encode())
        lines = [line for line in map(json.loads, whole.splitlines()) if "images_per_s" in line]
        if lines and (held := holdings(process.pid)):
            milliseconds = 1000 * batch_size / float(np.mean([x["images_per_s"] for x in lines]))
            samples.append({"step": lines[-1]["step"], **held, "step time, ms": milliseconds})
        if time.monotonic() - seen > 60 and samples:
            seen = time.monotonic()
            print(f"step {samples[-1]['step']:.0f}: {samples[-1]}", file=sys.stderr, flush=True)
    return samples


def holdings(pid: int) -> dict[str, float]:
    """Memory of its own, open files and threads of a process and its children; nothing where one has just ended."""
    total = {"memory, MB": 0.0, "open files": 0.0, "threads": 0.0}
    try:
        children = [Path(task, "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
        for each in (pid, *(int(child) for found in children for child in found)):
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            total["memory, MB"] += (
                next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss_Anon:")) / 1024
            )
            total["open files"] += len(os.listdir(f"/proc/{each}/fd"))
            total["threads"] += len(os.listdir(f"/proc/{each}/task"))
    except (OSError, StopIteration):
        return {}
    return total


def judge(samples: list[dict[str, float]], steps: int) -> int:
    """Prints the table; returns the exit code."""
    kept = [sample for sample in samples if sample["step"] > steps / 5]
    if len(kept) < 2 * BLOCKS:
        print(
            f"{len(kept)} samples say nothing, {2 * BLOCKS} are needed: more steps, or a smaller log.every",
            file=sys.stderr,
        )
        return 2
    grown = []
    print(f"{'':14}{'median':>10}{'slope per 1,000 steps':>24}{'95% confidence':>18}")
    for name in ("memory, MB", "open files", "threads", "step time, ms"):
        at = np.array([sample["step"] for sample in kept]) / 1000
        level, slope, sure = fit(at, np.array([sample[name] for sample in kept]))
        says = "grows" if slope - sure > 0 and slope * steps / 1000 > 0.01 * level else "flat"
        grown += [name] if says == "grows" else []
        print(f"{name:14}{level:10.2f}{slope:24.5f}{'± ' + format(sure, '.5f'):>18}  {says}")
    print(f"{len(kept)} samples from step {kept[0]['step']:.0f} to {kept[-1]['step']:.0f}")
    return 1 if grown else 0


def fit(at_N: Any, values_N: Any) -> tuple[float, float, float]:
    """(median, slope, half width of its 95% confidence) by least squares on the medians of BLOCKS stretches."""
    blocks = [(np.mean(a), np.median(v)) for a, v in zip(
        np.array_split(at_N, BLOCKS), np.array_split(values_N, BLOCKS), strict=True)]  # fmt: skip
    x, y = np.array(blocks).T
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * y).sum() / spread
    rest = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt((rest**2).sum() / (len(x) - 2) / spread)
    return float(np.median(values_N)), float(slope), T95 * error


if __name__ == "__main__":
    sys.exit(main())
