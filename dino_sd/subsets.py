"""Few labelled images: which ones, as a function of a seed."""

from collections.abc import Callable

import numpy as np

from dino_sd.errors import UserError

_DRAWING = 0x5B5E75 << 32  # added to a class in the key of its generator


def class_balanced(labels_N: np.ndarray, count: Callable[[int], int], seed: int) -> np.ndarray:
    """Indices, int64 and ascending, of `count(images of the class)` images of every class there is.

    labels_N: int64, all at least 0. For one seed the images of a smaller count are among those of a larger one. Raises
    UserError where a class has fewer.
    """
    chosen = []
    for label in np.unique(labels_N).tolist():
        members = np.flatnonzero(labels_N == label)
        wanted = count(len(members))
        if wanted > len(members):
            raise UserError(f"shots={wanted}: class {label} has {len(members)} training images; ask for at most that")
        key = np.array([seed, _DRAWING + label], dtype=np.uint64)
        chosen.append(np.random.Generator(np.random.Philox(key=key)).permutation(members)[:wanted])
    return np.sort(np.concatenate(chosen))


def shots(count: int) -> Callable[[int], int]:
    """So many images of every class."""
    return lambda images: count


def share(share: float) -> Callable[[int], int]:
    """This share of the images of every class: rounded, at least one."""
    return lambda images: max(1, round(share * images))
