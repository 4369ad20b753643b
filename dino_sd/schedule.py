"""Schedules: pure functions of t, the share of the run that is done (step / steps, 0 <= t < 1).

They give what the published code keeps in arrays with one value a step, without the arrays: a run that goes on from
any step needs no state for them.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    return lambda t: value


def cosine(start: float, end: float, steps: int, warmup: int = 0) -> Schedule:
    """Linear from 0 to `start` in the first `warmup` of `steps` steps, then half a cosine down (or up) to `end`.

    The last step of the warm-up is at `start` itself; `end` would be reached one step after the last.
    Caron et al. 2021, `cosine_scheduler`.
    """

    def at(t: float) -> float:
        step = t * steps
        if step < warmup - 0.5:
            return start * step / max(warmup - 1, 1)
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return at


def linear(start: float, end: float, steps: int, over: int, hold: int = 1) -> Schedule:
    """Linear from `start` to `end` in the first `over` of `steps` steps, then `end`; changes once in `hold` steps.

    The last change of the ramp is at `end` itself, as in `linspace`. The published teacher temperature holds
    each value for an epoch.
    """
    stairs = over / hold

    def at(t: float) -> float:
        stair = math.floor((t * steps + 1e-6) / hold)
        return end if stair >= stairs - 1 else start + (end - start) * stair / (stairs - 1)

    return at
