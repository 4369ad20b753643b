"""Which images a step sees: a pure function of (seed, step), the same for any number of ranks and workers."""

from functools import lru_cache

import numpy as np

from dino_sd.errors import UserError


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` images in an epoch: a read-only int64 permutation."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
    order_N = np.random.Generator(np.random.Philox(key=key)).permutation(n)
    order_N.setflags(write=False)
    return order_N


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder is dropped, another one in every epoch.

    Raises UserError when not even one batch can be filled.
    """
    if batch_size > n:
        raise UserError(f"batch_size: {batch_size} is more than the {n} images there are; use at most {n}")
    return n // batch_size


def step_indices(step: int, seed: int, n: int, batch_size: int) -> tuple[int, np.ndarray]:
    """The epoch of a step and the image indices (int64, batch_size) of its global batch, over all ranks.

    Raises UserError when batch_size > n.
    """
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    start = position * batch_size
    return epoch, epoch_order(seed, epoch, n)[start : start + batch_size]
