"""95% confidence intervals of scores: over the images judged, or over repetitions with other seeds."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Interval = tuple[float, float]
_Z = 1.959963984540054  # the normal distribution's 97.5% quantile
_DRAWS = 1000


def wilson(share: float, images: int) -> Interval:
    """Of a share (0 to 1) of so many images that are right or wrong each. Wilson 1927.

    It stays within 0 and 1, and says something of 0 and 1 as well.
    """
    spread = _Z**2 / images
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Of the mean of values that differ in their seed alone: Student's t. None for one value, which says nothing."""
    if len(values) < 2:
        return None
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - half, mean + half


def student_t(degrees: int) -> float:
    """The 97.5% quantile of Student's t.

    With t = sqrt(degrees) tan(a) the density becomes cos(a) ** (degrees - 1), which is easily summed up.
    """
    edges = np.linspace(0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1))
    return math.sqrt(degrees) * math.tan(np.interp(0.95, np.append(0, mass / mass[-1]), edges))


def bootstrap(rows_NX: np.ndarray, score: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Interval:
    """Of a score of means: images are drawn again with replacement, 1,000 times (Efron 1979, percentiles).

    rows_NX: what is known of each image. score: from sums over images, (draws, X), to the score of each draw, (draws,).
    """
    count = len(rows_NX)
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, count], dtype=np.uint64)))
    scores = []
    step = max(1, 2**22 // count)  # draws at a time
    for start in range(0, _DRAWS, step):
        draws = min(step, _DRAWS - start)
        times_RN = generator.multinomial(count, np.full(count, 1 / count), size=draws)
        scores.append(score(times_RN.astype(np.float64) @ rows_NX))
    low, high = np.nanpercentile(np.concatenate(scores), [2.5, 97.5])
    return float(low), float(high)
