"""Which images a step sees: a pure function of (seed, step), the same for any number of ranks and workers."""

from functools import lru_cache

import numpy as np

from dino_sd.errors import UserError

# In the keys of the generators of parts' orders: no epoch gets there, no part has so many rounds.
_PARTS, _ROUNDS = 1 << 62, 1 << 40


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` images in an epoch: a read-only int64 permutation."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
    order_N = np.random.Generator(np.random.Philox(key=key)).permutation(n)
    order_N.setflags(write=False)
    return order_N


@lru_cache(maxsize=2)
def weighted_order(seed: int, epoch: int, parts: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The order of an epoch in which `count` of the `images` of each part come: read-only int64 (sum of counts,).

    Every part is gone through again and again, in an order of its own each time, so that in the long run all its images
    come equally often. One that comes again within an epoch is index + (images of all parts) * times.
    """
    total, start, chosen = sum(images for images, _ in parts), 0, []
    for part, (images, count) in enumerate(parts):
        turns = np.arange(epoch * count, (epoch + 1) * count)
        rounds, places = np.divmod(turns, images)
        orders = np.concatenate([
            epoch_order.__wrapped__(seed, _PARTS + part * _ROUNDS + turn, images)
            for turn in range(int(rounds[0]), int(rounds[-1]) + 1)
        ])  # fmt: skip
        again = rounds - rounds[0]
        chosen.append(start + orders[again * images + places] + again * total)
        start += images
    indices_N = np.concatenate(chosen)
    order_N = indices_N[epoch_order.__wrapped__(seed, epoch, len(indices_N))]
    order_N.setflags(write=False)
    return order_N


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches in an epoch of n images; the remainder is dropped, another one in every epoch.

    Raises UserError when not even one batch can be filled.
    """
    if batch_size > n:
        raise UserError(f"batch_size: {batch_size} is more than the {n} images there are; use at most {n}")
    return n // batch_size


def step_indices(
    step: int, seed: int, n: int, batch_size: int, parts: tuple[tuple[int, int], ...] = ()
) -> tuple[int, np.ndarray]:
    """The epoch of a step and the image indices (int64, batch_size) of its global batch, over all ranks.

    n: images in all. parts: as in `weighted_order`, where they do not all come once an epoch. Raises UserError when
    batch_size is more than come in an epoch.
    """
    images = sum(count for _, count in parts) or n
    epoch, position = divmod(step, steps_per_epoch(images, batch_size))
    order_N = weighted_order(seed, epoch, parts) if parts else epoch_order(seed, epoch, n)
    start = position * batch_size
    return epoch, order_N[start : start + batch_size]
