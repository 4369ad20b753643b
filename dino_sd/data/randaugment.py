"""RandAugment (Cubuk et al. 2020), torchvision's, with derived random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def randaugment_(crops_NCHW: torch.Tensor, u_N: np.ndarray, operations: int, magnitude: int) -> None:
    """Does `operations` random operations to each crop, in place: a function of the crop and its number alone.

    crops_NCHW: uint8, of 1 or 3 channels. u_N: one of Philox' numbers per crop. magnitude: 0 to 30, of 31 bins.
    Of the fourteen operations Color leaves gray crops as they are, as Identity leaves all.
    """
    from torchvision.transforms.v2 import RandAugment  # costs a second, which most runs need not spend

    transform = RandAugment(operations, magnitude, num_magnitude_bins=31)
    seeds_N = (u_N * 2.0**32).astype(np.int64)  # the 32-bit words that the numbers were made of
    with torch.random.fork_rng(devices=[]), _one_thread():
        for position, seed in enumerate(seeds_N.tolist()):
            # Not torch.manual_seed, which would seed the accelerators too.
            torch.default_generator.manual_seed(seed)
            crops_NCHW[position] = transform(crops_NCHW[position])


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: the last bits of a sum over a large crop may depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
