"""Random numbers -> what they mean for a view: its crop box, its flip, its row of photometric parameters."""

from itertools import permutations

import numpy as np

from dino_sd.data.philox import uniforms
from dino_sd.data.views import Row, ViewSpec

_ATTEMPTS = 10
# Which of a view's numbers is used for what. To change this is to change every view of every seed.
_BOX = slice(0, 2 * _ATTEMPTS + 2)
_FLIP, _JITTER, _FACTORS, _ORDER, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = 22, 23, slice(24, 28), 28, 29, 30, 31, 32
RANDAUGMENT = 33
NUMBERS = 34
_ORDERS = np.array(list(permutations(range(4))), dtype=np.float32)
# A row that changes nothing.
_NEUTRAL = np.zeros(len(Row), dtype=np.float32)
_NEUTRAL[: Row.HUE] = 1
_NEUTRAL[Row.FIRST : Row.FOURTH + 1] = range(4)


def draw(spec: ViewSpec, seed: int, epoch: int, images_B: np.ndarray) -> np.ndarray:
    """The numbers of all views of all images: float64 (V, B, NUMBERS), a pure function of the arguments."""
    views_N = np.repeat(np.arange(spec.views), len(images_B))
    numbers = uniforms(seed, epoch, np.tile(images_B, spec.views), views_N, NUMBERS)
    return numbers.reshape(spec.views, len(images_B), NUMBERS)


def boxes(u: np.ndarray, sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]) -> np.ndarray:
    """Random resized crops: int64 (..., 4) boxes of top, left, height, width in pixels.

    u: (..., NUMBERS) from `draw`. sizes: (..., 2) heights and widths, broadcast against u.
    scale: share of the image's area, uniform; ratio: width / height, log-uniform. Of ten attempts the first that fits
    counts; where none fits, the largest centred box within the ratios (torchvision's RandomResizedCrop).
    """
    u = u[..., _BOX]
    height, width = sizes[..., 0, None].astype(np.float64), sizes[..., 1, None].astype(np.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., :_ATTEMPTS])
    log_low, log_high = np.log(ratio)
    aspect = np.exp(log_low + (log_high - log_low) * u[..., _ATTEMPTS : 2 * _ATTEMPTS])
    tall, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first = fits.argmax(-1)[..., None]
    fitted = fits.any(-1)
    height, width = height[..., 0], width[..., 0]
    fallback_tall = np.minimum(height, np.maximum(1, np.rint(width / ratio[0])))
    fallback_wide = np.minimum(width, np.maximum(1, np.rint(height * ratio[1])))
    tall = np.where(fitted, np.take_along_axis(tall, first, -1)[..., 0], fallback_tall)
    wide = np.where(fitted, np.take_along_axis(wide, first, -1)[..., 0], fallback_wide)
    top = np.where(fitted, np.floor(u[..., -2] * (height - tall + 1)), (height - tall) // 2)
    left = np.where(fitted, np.floor(u[..., -1] * (width - wide + 1)), (width - wide) // 2)
    return np.stack([top, left, tall, wide], axis=-1).astype(np.int64)


def center_box(sizes: np.ndarray, size: tuple[int, int], share: float) -> np.ndarray:
    """The largest centred box with the aspect ratio of size (height, width), its sides times share.

    sizes: (..., 2) heights and widths in pixels. Returns int64 (..., 4): top, left, height, width in pixels.
    """
    fit = share * (sizes / np.array(size)).min(-1, keepdims=True)
    lengths = np.clip(np.rint(fit * np.array(size)), 1, sizes)
    starts = np.rint((sizes - lengths) / 2)
    return np.concatenate([starts, lengths], axis=-1).astype(np.int64)


def flips(u: np.ndarray, spec: ViewSpec) -> np.ndarray:
    """Which views are mirrored: bool (V, B). u: (V, B, NUMBERS) from `draw`."""
    return (u[..., _FLIP] < spec.flip) & ~np.array(spec.clean, dtype=bool)[:, None]


def rows(u: np.ndarray, spec: ViewSpec) -> np.ndarray:
    """Photometric parameters of all views: float32 (V, B, len(Row)). u: (V, B, NUMBERS) from `draw`.

    Colour jitter is torchvision's ColorJitter: four factors and a random order of the four.
    """
    color = spec.channels == 3
    result = np.zeros((*u.shape[:-1], len(Row)), dtype=np.float32)
    jittered = u[..., _JITTER] < spec.jitter_probability
    strength = np.array([spec.brightness, spec.contrast, spec.saturation * color, spec.hue * color])
    center = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(center - strength, [0, 0, 0, -0.5])
    high = np.minimum(center + strength, [np.inf, np.inf, np.inf, 0.5])
    factors = low + (high - low) * u[..., _FACTORS]
    result[..., Row.BRIGHTNESS : Row.HUE + 1] = np.where(jittered[..., None], factors, center)
    result[..., Row.FIRST : Row.FOURTH + 1] = _ORDERS[(u[..., _ORDER] * len(_ORDERS)).astype(np.int64)]
    result[..., Row.JITTERED] = jittered
    result[..., Row.GRAYSCALE] = (u[..., _GRAYSCALE] < spec.grayscale) & color
    blurred = u[..., _BLUR] < np.array(spec.blur)[:, None]
    sigma_low, sigma_high = spec.blur_sigma
    result[..., Row.SIGMA] = np.where(blurred, sigma_low + (sigma_high - sigma_low) * u[..., _SIGMA], 0)
    result[..., Row.SOLARIZE] = u[..., _SOLARIZE] < np.array(spec.solarize)[:, None]
    result[np.array(spec.clean, dtype=bool)] = _NEUTRAL
    return result
