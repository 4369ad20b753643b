"""Stage two of the views, on the training device: colour jitter, grayscale, blur, solarise, normalise, in batches.

The same code on CPU and GPU. Which crops an operation concerns is read from rows on the CPU, so the device never waits.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from dino_sd.data.source import WHITE
from dino_sd.data.views import Row, ViewSpec

# Floats worked on at once. On a CPU the crops at hand stay in its cache; on a GPU this bounds the temporaries.
_CHUNK_CPU, _CHUNK_GPU = 2**18, 2**25
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in Pillow
# A crop rounded to bytes is at or above Pillow's threshold of 128 exactly where its value is at or above 127.5 / 255.
_SOLARIZE_FROM = 0.5
_BLUR_BLOCK = 16
_LARGE = 2**14  # numbers in a crop from which on a CPU works on each rather than on many at once
# Plain numbers: looking one up in the enumeration takes longer than many an operation on a small crop.
_FIRST, _FOURTH, _JITTERED, _HUE = int(Row.FIRST), int(Row.FOURTH), int(Row.JITTERED), int(Row.HUE)
_UNCHANGED = np.array([1, 1, 1, 0], dtype=np.float32)  # brightness, contrast, saturation, hue
_GRAYSCALE, _SIGMA, _SOLARIZE = int(Row.GRAYSCALE), int(Row.SIGMA), int(Row.SOLARIZE)


class Photometry:
    """Photometric augmentation and normalisation of crops.

    spec: the views; its blur_sigma bounds the kernel. mean, std: one number per channel, in units in which WHITE is 1.
    span: what is black and white to colour operations, in the same units: they clamp what they change to it, as they
    clamp bytes to 0 and 255. Raises ValueError where mean or std do not hold one number per channel.
    """

    def __init__(self, spec: ViewSpec, mean: Sequence[float], std: Sequence[float], span: Sequence[float] = (0.0, 1.0)):
        if not len(mean) == len(std) == spec.channels:
            raise ValueError(f"mean and std: expected {spec.channels} numbers each, got {len(mean)} and {len(std)}")
        self.black, self.width = span[0], span[1] - span[0]
        self.mean = (torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) - self.black) / self.width
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1) / self.width
        # At 4 sigma the tail that is cut off is below 1e-4 of the kernel's mass.
        self.radius = int(np.ceil(4 * spec.blur_sigma[1]))

    @torch.no_grad()
    def __call__(self, crops_NCHW: torch.Tensor, rows_NR: torch.Tensor) -> torch.Tensor:
        """crops_NCHW: of a source's dtype, on the training device. rows_NR: their parameters, float32 on the CPU.

        Returns float32 (N, C, H, W), normalised.
        """
        device = crops_NCHW.device
        if self.mean.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        out_NCHW = torch.empty_like(crops_NCHW, dtype=torch.float32, memory_format=torch.contiguous_format)
        with torch.autocast(device.type, enabled=False):
            for part in self._parts(rows_NR, out_NCHW):
                whole = part[-1] - part[0] == len(part) - 1  # neighbours are worked on where they lie
                index = slice(part[0], part[-1] + 1) if whole else _upload(part, device)
                x = out_NCHW[index].copy_(crops_NCHW[index]).div_(WHITE[crops_NCHW.dtype] * self.width)
                if self.black:
                    x.sub_(self.black / self.width)
                self._augment_(x, rows_NR.numpy()[part])
                x.sub_(self.mean).div_(self.std)
                if not whole:
                    out_NCHW[index] = x
        return out_NCHW

    def _parts(self, rows_NR: torch.Tensor, out_NCHW: torch.Tensor) -> list[np.ndarray]:
        """Indices of crops to work on together.

        Large ones on a CPU with those whose colours are jittered in the same order: every operation then concerns all
        of a part. Small ones, and a GPU, would rather have few and large parts.
        """
        on_cpu, size = out_NCHW.device.type == "cpu", out_NCHW[:1].numel()
        most = (_CHUNK_CPU if on_cpu else _CHUNK_GPU) // max(1, size) or 1
        places, ends = np.arange(len(rows_NR)), []
        if on_cpu and size >= _LARGE:
            columns = (Row.JITTERED, Row.FIRST, Row.SECOND, Row.THIRD, Row.FOURTH)
            keys_5N = rows_NR.numpy()[:, columns].T * rows_NR.numpy()[:, Row.JITTERED]
            places = np.lexsort(keys_5N)
            ends = np.flatnonzero(np.any(np.diff(keys_5N[:, places]) != 0, axis=0)) + 1
        alike = np.split(places, ends)
        return [part[start : start + most] for part in alike for start in range(0, len(part), most)]

    def _augment_(self, x_NCHW: torch.Tensor, rows: np.ndarray) -> None:
        """The published order: jitter, grayscale, blur, solarise. In place, values in [0, 1]."""
        orders_N4 = rows[:, _FIRST : _FOURTH + 1]
        changing_4 = (rows[:, :_FIRST] != _UNCHANGED).any(0)
        if not changing_4.any() or (orders_N4 == orders_N4[0]).all():
            for column in orders_N4[0].astype(int).tolist():
                if changing_4[column]:
                    _JITTER[column](x_NCHW, _upload(rows[:, column].reshape(-1, 1, 1, 1), x_NCHW.device))
        else:
            for done_N in orders_N4.T:
                _mix_(x_NCHW, rows, done_N)
                _on_some_(_hue_, x_NCHW, (done_N == _HUE) & (rows[:, _HUE] != 0), rows[:, _HUE])
        for column, operation_ in ((_GRAYSCALE, _grayscale_), (_SIGMA, self._blur_), (_SOLARIZE, _solarize_)):
            _on_some_(operation_, x_NCHW, rows[:, column] > 0, rows[:, column])

    def _blur_(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x[0].numel() < _LARGE:
            return x.copy_(gaussian_blur(x, sigma.view(-1), self.radius))
        for one_1CHW, sigma_1 in zip(x.split(1), sigma.view(-1).split(1), strict=True):
            # Most kernels are narrower than the widest: what lies beyond 5 sigma is below 1e-6 of their mass.
            radius = min(self.radius, int(np.ceil(5 * float(sigma_1))))
            one_1CHW.copy_(gaussian_blur(one_1CHW, sigma_1, radius))
        return x


def _on_some_(operation_: Callable, x_NCHW: torch.Tensor, concerned: np.ndarray, values: np.ndarray) -> None:
    """Runs operation_(crops, values as (n, 1, 1, 1)) in place on the crops concerned."""
    chosen = np.flatnonzero(concerned)
    if not len(chosen):
        return
    values_n111 = _upload(values[chosen].reshape(-1, 1, 1, 1), x_NCHW.device)
    if len(chosen) == len(x_NCHW):
        operation_(x_NCHW, values_n111)
        return
    index_n = _upload(chosen, x_NCHW.device)
    some = x_NCHW.index_select(0, index_n)
    operation_(some, values_n111)
    x_NCHW.index_copy_(0, index_n, some)


def _upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    # A small copy from pageable memory is staged at once; non_blocking: it then waits for nothing on the device.
    return torch.from_numpy(values).to(device, non_blocking=True)


def _gray(x: torch.Tensor) -> torch.Tensor:
    """Luma of RGB, mean of any other channels: (n, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x[:, 0:1] * _LUMA[0]).add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:3], alpha=_LUMA[2])


def _mix_(x_NCHW: torch.Tensor, rows: np.ndarray, done_N: np.ndarray) -> None:
    """Brightness, contrast or saturation, whichever each crop has in done_N, for all crops at once.

    All three are factor * x + (1 - factor) * base: the base is black, the mean luma, or each pixel's luma. A crop that
    has none of them here gets factor 1. Picking out the crops of each kind would cost more than it saves.
    """
    factor_N = np.ones(len(rows), dtype=np.float32)
    for column in (Row.BRIGHTNESS, Row.CONTRAST, Row.SATURATION):
        factor_N = np.where(done_N == column, rows[:, column], factor_N)
    active_N = factor_N != 1
    if not active_N.any():
        return
    to_mean_N, to_gray_N = (active_N & (done_N == column) for column in (Row.CONTRAST, Row.SATURATION))
    weights = np.stack([factor_N, (1 - factor_N) * to_mean_N, to_gray_N]).astype(np.float32)
    factor, add_mean, to_gray = _upload(weights.reshape(3, -1, 1, 1, 1), x_NCHW.device)
    if to_gray_N.any():
        gray = _gray(x_NCHW)
        mean = gray.mean((2, 3), keepdim=True)
        x_NCHW.lerp_(gray.mul_(to_gray).expand_as(x_NCHW), 1 - factor).add_(mean.mul_(add_mean)).clamp_(0, 1)
    elif to_mean_N.any():
        # Not lerp_: towards one number per image it leaves the vectorised path.
        mean = _gray(x_NCHW.mean((2, 3), keepdim=True))
        x_NCHW.mul_(factor).add_(mean.mul_(add_mean)).clamp_(0, 1)
    else:
        x_NCHW.mul_(factor).clamp_(0, 1)


def _brightness_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    # Not lerp_: towards one number per image it leaves the vectorised path.
    mean = _gray(x.mean((2, 3), keepdim=True)).mul_(1 - factor)
    return x.mul_(factor).add_(mean).clamp_(0, 1)


def _saturation_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x.lerp_(_gray(x).expand_as(x), 1 - factor).clamp_(0, 1)


def _grayscale_(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x.copy_(_gray(x).expand_as(x))


def _solarize_(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    # With the threshold in the middle, inverting the upper half is taking the smaller of the value and its inverse.
    assert _SOLARIZE_FROM == 0.5
    return torch.minimum(x, 1 - x, out=x)


def _hue_(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turns the hue by `shift` turns at constant value and chroma of the HSV model.

    Hue is counted in sixths of a turn from red, in [-3, 3]. In the hexagon its distance from red is
    1 + (G + B - R - min) / chroma and its sign that of G - B: no branches. Back, a channel lies below the value by the
    chroma times a trapezoid of the distance of the hue from the channel's own (0, 2 and -2 for R, G and B).
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    hue = torch.copysign(distance, green - blue).add_(shift.view(-1, 1, 1), alpha=6)
    hue.sub_(torch.round(hue / 6), alpha=6)
    torch.sub(value, hue.abs().sub_(1).clamp_(0, 1).mul_(chroma), out=red)
    for channel, center in ((green, 2), (blue, -2)):
        # Distances beyond 3 go on around the circle; |d - 3| folds them back.
        folded = (hue - center).abs_().sub_(3).abs_()
        torch.sub(value, folded.neg_().add_(2).clamp_(0, 1).mul_(chroma), out=channel)
    return x


# What jitter does, by the columns of its numbers.
_JITTER = {
    int(Row.BRIGHTNESS): _brightness_, int(Row.CONTRAST): _contrast_, int(Row.SATURATION): _saturation_, _HUE: _hue_,
}  # fmt: skip


def gaussian_blur(x_NCHW: torch.Tensor, sigma_N: torch.Tensor, radius: int) -> torch.Tensor:
    """Each image blurred by its own Gaussian, edges replicated. sigma_N: > 0, in pixels; radius: of the kernel, pixels.

    Each direction is a product with a banded matrix, cut into blocks so that few of the products are with zeros: at 224
    pixels a third of the cost of whole matrices, and less than a depthwise convolution.
    """
    images, channels, height, width = x_NCHW.shape
    offset = torch.arange(-radius, radius + 1, device=x_NCHW.device, dtype=x_NCHW.dtype)
    taps_NK = torch.exp(-0.5 * (offset / sigma_N[:, None]).square())
    taps_NK = taps_NK / taps_NK.sum(1, keepdim=True)
    blocks_h, block_h = _blocks(height)
    blocks_w, block_w = _blocks(width)
    extra_h, extra_w = blocks_h * block_h - height, blocks_w * block_w - width
    padded = F.pad(x_NCHW, (radius, radius + extra_w, radius, radius + extra_h), mode="replicate")
    # Rows: blocks of lines that overlap by the kernel, as views of the padded images.
    lines = padded.unfold(2, block_h + 2 * radius, block_h).transpose(-1, -2)  # (N, C, blocks, lines, padded width)
    band_NYL = _banded(taps_NK, block_h)
    blurred = torch.matmul(band_NYL[:, None, None], lines).view(images, channels, blocks_h * block_h, -1)[:, :, :height]
    # Columns: the same from the right, all lines of an image at once.
    columns = blurred.unfold(3, block_w + 2 * radius, block_w)  # (N, C, height, blocks, columns)
    band_NLX = _banded(taps_NK, block_w).transpose(1, 2)
    blurred = torch.bmm(columns.reshape(images, -1, block_w + 2 * radius), band_NLX)
    return blurred.view(images, channels, height, blocks_w * block_w)[..., :width]


def _blocks(length: int) -> tuple[int, int]:
    """Number and length of the blocks that cover a line."""
    count = max(1, round(length / _BLUR_BLOCK))
    return count, -(-length // count)


def _banded(taps_NK: torch.Tensor, size: int) -> torch.Tensor:
    """The taps on every row of a matrix, one further right on each: (N, size, size + K - 1)."""
    count = taps_NK.shape[1]
    padded = F.pad(taps_NK, (size - 1, size - 1)).flip(1)
    # Windows of the padded taps, from the one that ends with them to the one that begins with them.
    return padded.unfold(1, size + count - 1, 1).flip(2)
