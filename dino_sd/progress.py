"""How far long work is: a bar with an ETA on a terminal, a line now and then elsewhere. Rank 0 alone speaks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dino_sd.distributed import is_main, say

_EVERY = 30.0  # seconds between two lines


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with (done, in all), as often as one likes."""
    if not is_main():
        yield lambda done, total: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        began = last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _EVERY and done:
                last = now
                say(f"{label}: {done:,} of {total:,}, {(now - began) * (total - done) / done / 60:.1f} min to go")

        yield line
