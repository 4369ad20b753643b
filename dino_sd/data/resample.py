"""Bicubic antialiased crops of a stack of small images at once, as two matrix products with exact results.

The weights are whole multiples of 2^-15 and the pixels whole numbers, so every sum stays below 2^24 of these units:
float32 holds it exactly, and no order of summation, thread count or device can change a bit.
"""

from functools import lru_cache

import numpy as np
import torch

_UNIT = 2.0**15
_A = -0.5  # Keys' cubic, as in Pillow and in torch's antialiased bicubic


def resample_stack(
    images_BCHW: torch.Tensor, boxes_VB4: np.ndarray, mirrored_VB: np.ndarray, size: tuple[int, int]
) -> torch.Tensor:
    """Crops of one size, uint8 (V * B, C, H, W), all images of the first view first.

    images_BCHW: uint8. boxes_VB4: top, left, height, width in pixels. mirrored_VB: bool. size: (height, width).
    After either pass, columns first, values are rounded and clamped to bytes, as Pillow and torch do.
    """
    views, images = boxes_VB4.shape[:2]
    channels, height, width = images_BCHW.shape[1:]
    top_N, left_N, tall_N, wide_N = torch.from_numpy(boxes_VB4.reshape(-1, 4)).unbind(-1)
    weights_NSW = _gather(_weights(width, size[1]), wide_N, left_N)
    mirrored_N = torch.from_numpy(mirrored_VB.reshape(-1))
    weights_NSW = torch.where(mirrored_N[:, None, None], weights_NSW.flip(1), weights_NSW)
    lines_BYW = images_BCHW.float().reshape(images, channels * height, width)
    pixels_NYW = lines_BYW.repeat(views, 1, 1)
    rows_NYS = _to_bytes(torch.bmm(pixels_NYW, weights_NSW.transpose(1, 2)))
    weights_NSH = _gather(_weights(height, size[0]), tall_N, top_N)
    crops = _to_bytes(torch.matmul(weights_NSH[:, None], rows_NYS.view(-1, channels, height, size[1])))
    return crops.to(torch.uint8)


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _gather(table: torch.Tensor, length_N: torch.Tensor, start_N: torch.Tensor) -> torch.Tensor:
    """The table's weights of crops of these lengths, moved to where the crops start: (N, S, full)."""
    full = table.shape[-1] // 2
    # A window of the padded table that starts `start` before the crop does.
    windows = table.unfold(-1, full, 1).permute(0, 2, 1, 3)
    return windows[length_N, full - start_N]


@lru_cache(maxsize=16)
def _weights(full: int, size: int) -> torch.Tensor:
    """Weights of the pixels of a line, for crops of every length 0..full resized to `size`: (full + 1, size, 2 * full).

    The crop starts in the middle, at `full`, so that a window of `full` pixels places it anywhere in the line.
    """
    table = np.zeros((full + 1, size, 2 * full), dtype=np.float32)
    for length in range(1, full + 1):
        table[length, :, full : full + length] = cubic_weights(length, size)
    return torch.from_numpy(table)


def cubic_weights(length: int, size: int) -> np.ndarray:
    """Weights that resize a line of `length` pixels to `size`: float64 (size, length), in units of 2^-15.

    Every row sums to exactly 1. Keys' bicubic kernel, widened when shrinking, cut off at the line's ends: the
    convention of Pillow and torch.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    center = scale * (np.arange(size) + 0.5)[:, None]
    pixel = np.arange(length)[None, :]
    first = np.maximum(np.floor(center - 2 * stretch + 0.5), 0)
    end = np.minimum(np.floor(center + 2 * stretch + 0.5), length)
    x = np.abs(pixel + 0.5 - center) / stretch
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = _A * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * ((pixel >= first) & (pixel < end))
    units = np.rint(weights / weights.sum(1, keepdims=True) * _UNIT)
    # What rounding took away goes to the heaviest pixel: a flat image stays flat to the bit.
    rows = np.arange(size)
    units[rows, units.argmax(1)] += _UNIT - units.sum(1)
    return units / _UNIT
