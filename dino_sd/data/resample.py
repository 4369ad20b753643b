"""Bicubic antialiased resizing, as in Pillow: of one image of any type, and of crops of many small images at once.

The latter is two matrix products with exact results: the weights are whole multiples of 2^-15 and the pixels whole
numbers, so every sum stays below 2^24 of these units. float32 holds it exactly, and no order of summation, thread count
or device can change a bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

_UNIT = 2.0**15
_A = -0.5  # Keys' cubic, as in Pillow and in torch's antialiased bicubic


def resize(image_CHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An image of uint8, uint16 or float32 at another size (height, width), of the same type; whole numbers rounded."""
    channels = len(image_CHW)
    if image_CHW.dtype == torch.uint8:
        if channels == 3 and image_CHW.stride(2) == 4:  # RGBX in memory: all four are faster than three of them
            image_CHW = image_CHW.as_strided((4, *image_CHW.shape[1:]), image_CHW.stride())
        return F.interpolate(image_CHW[None], size, mode="bicubic", antialias=True)[0, :channels]
    resized_CHW = F.interpolate(image_CHW[None].float(), size, mode="bicubic", antialias=True)[0]
    if image_CHW.dtype == torch.float32:
        return resized_CHW
    return resized_CHW.round_().clamp_(0, torch.iinfo(image_CHW.dtype).max).to(image_CHW.dtype)


def resample_stack(
    images_BCHW: torch.Tensor, boxes_VB4: np.ndarray, mirrored_VB: np.ndarray, size: tuple[int, int]
) -> torch.Tensor:
    """Crops of one size, uint8 (V * B, C, H, W), all images of the first view first, to the bit on any device.

    images_BCHW: uint8, on the device where the crops are wanted. boxes_VB4: top, left, height, width in pixels.
    mirrored_VB: bool. size: (height, width).
    After either pass, columns first, values are rounded and clamped to bytes, as Pillow and torch do.
    """
    views, images = boxes_VB4.shape[:2]
    channels, height, width = images_BCHW.shape[1:]
    device = images_BCHW.device
    numbers_5N = np.concatenate([boxes_VB4.reshape(-1, 4), mirrored_VB.reshape(-1, 1)], axis=1).T
    top_N, left_N, tall_N, wide_N, mirrored_N = torch.from_numpy(numbers_5N).to(device, non_blocking=True)
    with _full_precision(device):
        weights_NSW = _gather(_weights(width, size[1], device), wide_N, left_N)
        weights_NSW = torch.where(mirrored_N[:, None, None] > 0, weights_NSW.flip(1), weights_NSW)
        lines_BYW = images_BCHW.float().reshape(images, channels * height, width)
        pixels_NYW = lines_BYW.repeat(views, 1, 1)
        rows_NYS = _to_bytes(torch.bmm(pixels_NYW, weights_NSW.transpose(1, 2)))
        weights_NSH = _gather(_weights(height, size[0], device), tall_N, top_N)
        crops = _to_bytes(torch.matmul(weights_NSH[:, None], rows_NYS.view(-1, channels, height, size[1])))
    return crops.to(torch.uint8)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Without TF32, whose ten bits would round the sums, and whatever autocast is on."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _gather(table: torch.Tensor, length_N: torch.Tensor, start_N: torch.Tensor) -> torch.Tensor:
    """The table's weights of crops of these lengths, moved to where the crops start: (N, S, full)."""
    full = table.shape[-1] // 2
    # A window of the padded table that starts `start` before the crop does.
    windows = table.unfold(-1, full, 1).permute(0, 2, 1, 3)
    return windows[length_N, full - start_N]


@lru_cache(maxsize=16)
def _weights(full: int, size: int, device: torch.device) -> torch.Tensor:
    """Weights of the pixels of a line, for crops of every length 0..full resized to `size`: (full + 1, size, 2 * full).

    The crop starts in the middle, at `full`, so that a window of `full` pixels places it anywhere in the line.
    """
    table = np.zeros((full + 1, size, 2 * full), dtype=np.float32)
    for length in range(1, full + 1):
        table[length, :, full : full + length] = cubic_weights(length, size)
    return torch.from_numpy(table).to(device)


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
