"""What surviving costs: 1,000 steps of the quickstart as they are, and without saving, health and checks, in pairs.

    python tools/costs.py [pairs=3] [NAME=VALUE ...]

Prints the seconds of both for each pair, in turns of order, and the median of their ratios.
"""

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


def seconds(bare: bool, pairs: list[str]) -> float:
    """Of the steps of one run in this process."""
    from dino_sd import checkpoint, recipe, train

    if bare:
        train.Health, train.BatchNorms = Nothing, Nothing  # pyright: ignore
        train.check_equal_weights = lambda *args: None
        train.any_rank = lambda *flags: (False, False)
        checkpoint.Saver.save = lambda *args: None
    with tempfile.TemporaryDirectory() as folder:
        given = ["epochs=null", "steps=1000", "evaluate.every=null", f"out={folder}/run", *pairs]
        cfg = recipe.load_config(RECIPE, given)
        began = time.perf_counter()
        train.train(cfg)
        return time.perf_counter() - began


def main() -> None:
    if sys.argv[1:2] in (["whole"], ["bare"]):
        print(seconds(sys.argv[1] == "bare", sys.argv[2:]))
        return
    count = next((int(word[6:]) for word in sys.argv[1:] if word.startswith("pairs=")), 3)
    rest = [word for word in sys.argv[1:] if not word.startswith("pairs=")]
    ratios = []
    for pair in range(count):
        taken = {}
        for mode in ("whole", "bare") if pair % 2 == 0 else ("bare", "whole"):
            command = [sys.executable, __file__, mode, *rest]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            taken[mode] = float(done.stdout.split()[-1])
        ratios.append(taken["whole"] / taken["bare"])
        print(f"{taken['whole']:.1f} s whole, {taken['bare']:.1f} s without: x {ratios[-1]:.4f}", flush=True)
    print(f"median x {statistics.median(ratios):.4f} (from {min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    main()
