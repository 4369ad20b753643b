"""Mean and standard deviation of a source's channels, for normalising."""

import numpy as np
import torch

from dino_sd.data.source import Source

_MOST_FILES = 2_000
_SIDE = 64  # the mean does not need more pixels of an image than this
_SMALLEST_STD = 1e-3  # of flat images; keeps normalising finite


def mean_std(source: Source, limit: int = 10_000) -> tuple[list[float], list[float]]:
    """Per channel, in units of [0, 1], over at most `limit` evenly spaced images (of files, at most 2,000).

    Deterministic. Every image counts the same, whatever its size. Raises UserError where an image cannot be read.
    """
    if source.stack is not None:
        pixels = source.stack[_evenly(len(source), limit)].double().div_(255)
        mean, square = pixels.mean((0, 2, 3)), pixels.square().mean((0, 2, 3))
    else:
        chosen = _evenly(len(source), min(limit, _MOST_FILES))
        moments = torch.stack([_moments(source, index) for index in chosen.tolist()])
        mean, square = moments.mean(0)
    std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(_SMALLEST_STD)
    return mean.tolist(), std.tolist()


def _evenly(count: int, limit: int) -> torch.Tensor:
    return torch.from_numpy(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def _moments(source: Source, index: int) -> torch.Tensor:
    picture = source.picture(index)
    # At half its size the image keeps its mean, and nearly its variance, at a fraction of the decoding.
    shrink = 2 if min(picture.height, picture.width) >= 2 * _SIDE else 1
    pixels_CP = picture.decode(shrink).flatten(1).double().div_(255)
    return torch.stack([pixels_CP.mean(1), pixels_CP.square().mean(1)])
