"""What surviving costs: 1,000 steps of the quickstart as they are, and without saving, health and checks, in pairs.

    python tools/costs.py [pairs=3] [NAME=VALUE ...]

Both of a pair run at the same time, each on a core of its own with one thread, and change cores for the next pair: what
else the machine does hits both alike. Prints the seconds of both for each pair, and the medians of their ratios: of the
clock, and of the processor's time. Linux; two cores.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


class Nothing:
    """Stands in for what is to cost nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.in_a_row = self.count = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: {}


def seconds(bare: bool, pairs: list[str]) -> tuple[float, float]:
    """Of one run in this process: by the clock, and of its processors with those of its loader."""
    from dino_sd import checkpoint, recipe, train

    if bare:
        train.Health, train.BatchNorms = Nothing, Nothing  # pyright: ignore
        train.check_equal_weights = lambda *args: None
        train.any_rank = lambda *flags: (False, False)
        checkpoint.Saver.save = lambda *args: None  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        given = ["epochs=null", "steps=1000", "evaluate.every=null", f"out={folder}/run", *pairs]
        cfg = recipe.load_config(RECIPE, given)
        began, before = time.perf_counter(), processor_seconds()
        train.train(cfg)
        return time.perf_counter() - began, processor_seconds() - before


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    if sys.argv[1:2] in (["whole"], ["bare"]):
        print(*seconds(sys.argv[1] == "bare", sys.argv[2:]))
        return
    count = next((int(word[6:]) for word in sys.argv[1:] if word.startswith("pairs=")), 3)
    rest = [word for word in sys.argv[1:] if not word.startswith("pairs=")]
    cores = sorted(os.sched_getaffinity(0))[:2]
    ratios: list[tuple[float, float]] = []
    for _ in range(count):
        cores.reverse()
        running = [on_core(core, [mode, *rest]) for mode, core in zip(("whole", "bare"), cores, strict=True)]
        said = [process.communicate()[0].split()[-2:] for process in running]
        (clock, used), (bare_clock, bare_used) = ([float(word) for word in words] for words in said)
        ratios.append((clock / bare_clock, used / bare_used))
        print(f"{clock:.1f} s and {used:.1f} s of processor, without {bare_clock:.1f} and {bare_used:.1f}: "
              f"x {ratios[-1][0]:.4f} and {ratios[-1][1]:.4f}", flush=True)  # fmt: skip
    for name, found in zip(("clock", "processor"), zip(*ratios, strict=True), strict=True):
        print(f"{name}: median x {statistics.median(found):.4f} (from {min(found):.4f} to {max(found):.4f})")


def on_core(core: int, words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
