"""What a source's pixels are like: mean and standard deviation of its channels, for normalising, and their range."""

from dataclasses import dataclass

import numpy as np
import torch

from dino_sd.data.source import WHITE, Bad, BadImage, Picture, Source
from dino_sd.errors import UserError
from dino_sd.progress import progress

_MOST_FILES = 2_000
_SIDE = 224  # pixels of the shorter side that are enough: crops are hardly larger
_SMALLEST_STD = 1e-3  # of flat images, as a share of the range; keeps normalising finite


@dataclass(frozen=True)
class Statistics:
    """mean, std: per channel. low, high: smallest and largest value. In units in which WHITE is 1.

    bad: images that were to be looked at and cannot be read.
    """

    mean: list[float]
    std: list[float]
    low: float
    high: float
    bad: list[Bad]


def statistics(source: Source, limit: int = 10_000) -> Statistics:
    """Of at most `limit` evenly spaced images (of files, at most 2,000).

    Deterministic. Every image counts the same, whatever its size. Raises UserError where no image can be read.
    """
    moments, bad = [], []
    chosen = evenly(len(source), limit if source.stack is not None else min(limit, _MOST_FILES)).tolist()
    with progress("mean and standard deviation") as show:
        for done, index in enumerate(chosen, start=1):
            try:
                moments.append(moments_of(source, index))
            except BadImage as error:
                bad.append((index, error.where, error.reason))
            show(done, len(chosen))
    if not moments:
        _, where, reason = bad[0]
        raise UserError(f"data: none of {len(bad)} images of '{source.name}' can be read; the first, {where}: {reason}")
    return combine(torch.stack(moments), source.dtype, bad)


def combine(moments_N4C: torch.Tensor, dtype: torch.dtype, bad: list[Bad]) -> Statistics:
    """moments_N4C: of N images, from `moments_of`."""
    mean, square = moments_N4C[:, 0].mean(0), moments_N4C[:, 1].mean(0)
    low, high = float(moments_N4C[:, 2].min()), float(moments_N4C[:, 3].max())
    std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(_SMALLEST_STD * (high - low) or _SMALLEST_STD)
    if dtype == torch.uint8:  # black and white are what they are, whatever the images hold
        std, low, high = std.clamp_min(_SMALLEST_STD), 0.0, 1.0
    return Statistics(mean.tolist(), std.tolist(), low, high, bad)


def evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, evenly spaced from the first to the last: int64."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)


def enough(picture: Picture) -> int:
    """How much smaller an image may be decoded that is only looked at; large ones at a fraction of the cost."""
    return next((shrink for shrink in (8, 4, 2) if min(picture.height, picture.width) >= shrink * _SIDE), 1)


def moments_of(source: Source, index: int) -> torch.Tensor:
    """Mean, mean square, smallest and largest value of each channel: float64 (4, C), in units in which WHITE is 1."""
    if source.stack is not None:
        image_CHW = source.stack[index]
    else:
        picture = source.picture(index)
        image_CHW = picture.decode(enough(picture))
    pixels_CP = image_CHW.flatten(1).double().div_(WHITE[source.dtype])
    return torch.stack([pixels_CP.mean(1), pixels_CP.square().mean(1), pixels_CP.amin(1), pixels_CP.amax(1)])
