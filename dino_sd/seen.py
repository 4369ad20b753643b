"""Images as the eye wants them, and as a model does that is to be looked at."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_sd.data.decode import pixels_of
from dino_sd.data.evaluation import resize_crop
from dino_sd.data.source import WHITE
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model

Picture = Image.Image | Tensor  # a tensor is (C, H, W) of a source's type: uint8, uint16 or float32
_STRIDE = 32  # pixels, between the last cells of a convnet


class Seen(NamedTuple):
    """An image on its way into the model and back: (C, H, W), the size it is seen at, and (1, C, H, W) normalised."""

    image_CHW: Tensor
    size: tuple[int, int]
    input_1CHW: Tensor


def see(model: Model, picture: Picture, size: int | None = None) -> Seen:
    """A picture as the model is to see it: whole, but for a part of a patch at its sides; size as in `seen_size`.

    Raises UserError where its channels are not the model's.
    """
    image_CHW = as_image(picture, model.channels)
    height, width = seen_size(model, image_CHW.shape[1], image_CHW.shape[2], size)
    weight = next(model.backbone.parameters(), torch.empty(0))
    mean_C11, std_C11 = (
        torch.tensor(x, device=weight.device, dtype=weight.dtype).view(-1, 1, 1) for x in (model.mean, model.std)
    )
    pixels_CHW = resize_crop(image_CHW, (height, width), 1.0).to(weight.device).to(weight.dtype)
    input_CHW = (pixels_CHW / WHITE[image_CHW.dtype] - mean_C11) / std_C11
    return Seen(image_CHW, (height, width), input_CHW[None])


def seen_size(model: Model, height: int, width: int, size: int | None) -> tuple[int, int]:
    """(height, width) in whole patches, the shorter side about `size` pixels (None: what the model expects).

    At most 1 : 2; what is longer is cut at both ends. Models that take one size alone see all images at that. Raises
    UserError for raw pixels, and for a size that the model does not take.
    """
    backbone = model.backbone
    if not isinstance(backbone, Backbone):
        raise UserError("pictures: raw pixels have no patches to show; use a model")
    own, step = model.size or backbone.size, backbone.patch_size or _STRIDE
    if backbone.patch_size and not getattr(backbone.model, "dynamic_img_size", False):
        if size is not None and (size, size) != own:
            raise UserError(f"size={size}: model={backbone.name} takes {own[0]} x {own[1]} pixels alone; leave it out")
        return own
    if size is not None and size < step:
        raise UserError(f"size={size}: model={backbone.name} works in steps of {step} pixels; use at least that")
    if size is None and own[0] != own[1]:
        return own
    short, ratio = size or min(own), min(max(width / height, 0.5), 2.0)
    tall, wide = short / min(ratio, 1.0), short * max(ratio, 1.0)
    return max(round(tall / step), 1) * step, max(round(wide / step), 1) * step


def cells(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of `count` cells that cover an image of (height, width): the nearest to its shape."""
    shape = size[0] / size[1]
    rows = [rows for rows in range(1, count + 1) if count % rows == 0]
    return min(((n, count // n) for n in rows), key=lambda grid: abs(np.log(grid[0] / grid[1] / shape)))


def at_side(seen: Seen, grid: tuple[int, ...], side: int) -> np.ndarray:
    """The image as the model saw it, uint8 (H, W, 3), its longer side at most `side` pixels, each cell whole ones."""
    factor = side // max(seen.size)
    if factor >= 2:  # small: its pixels are to be seen
        pixels_HWC = pixels_for_the_eye(resize_crop(seen.image_CHW, seen.size, 1.0))
        return pixels_HWC.repeat(factor, 0).repeat(factor, 1)
    cell = max(side // max(grid), 1)
    size = seen.size if factor else (grid[0] * cell, grid[1] * cell)
    return pixels_for_the_eye(resize_crop(seen.image_CHW, size, 1.0))


def as_image(picture: Image.Image | torch.Tensor, channels: int | None = None) -> torch.Tensor:
    """(C, H, W), uint8 or uint16, of a picture of Pillow's; a tensor, (C, H, W) of a source's type, stays as it is.

    channels: 1 gray, 3 RGB, 4 RGBA; None: as the picture has them. Raises UserError for other channels.
    """
    if isinstance(picture, torch.Tensor):
        image_CHW = picture
    elif picture.mode.startswith("I;16"):
        image_CHW = torch.from_numpy(np.array(picture)[None].astype(np.uint16))
    else:
        image_CHW = torch.from_numpy(pixels_of(picture, channels).copy())
    if channels == 3 and len(image_CHW) == 1:
        return image_CHW.expand(3, -1, -1)
    if channels is not None and len(image_CHW) != channels:
        raise UserError(f"pictures: an image has {len(image_CHW)} channel(s), the model takes {channels}")
    return image_CHW


def pixels_for_the_eye(image_CHW: torch.Tensor) -> np.ndarray:
    """uint8 (H, W, 3) of an image of a source's type; other pixels than bytes are stretched: 1st to 99th percentile."""
    units_CHW = image_CHW.float() / WHITE[image_CHW.dtype]
    low, high = (0.0, 1.0) if image_CHW.dtype == torch.uint8 else percentiles(visible(units_CHW))
    shown_HWC = stretched(units_CHW, low, high).expand(-1, -1, 3)
    return (shown_HWC * 255).round().byte().numpy()


def thumbnail(picture: Image.Image | torch.Tensor, side: int) -> np.ndarray:
    """uint8 (H, W, 3) with the longer side at most `side`; small images are enlarged by whole factors."""
    pixels_HWC = pixels_for_the_eye(as_image(picture))
    height, width = pixels_HWC.shape[:2]
    factor = side // max(height, width)
    if factor >= 1:
        return pixels_HWC.repeat(factor, 0).repeat(factor, 1)
    scale = side / max(height, width)
    small = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.array(Image.fromarray(pixels_HWC).resize(small, Image.Resampling.LANCZOS))


def visible(image_CHW: torch.Tensor) -> torch.Tensor:
    """(..., C, H, W) -> (..., H, W, 3 or 1): channels other than RGB as the gray of their mean."""
    visible_CHW = image_CHW if image_CHW.shape[-3] == 3 else image_CHW.mean(-3, keepdim=True)
    return visible_CHW.movedim(-3, -1)


def stretched(image_CHW: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """What is seen of an image, (..., H, W, 3 or 1), with low and high as black and white."""
    return ((visible(image_CHW) - low) / (high - low)).clamp(0, 1)


def percentiles(values: torch.Tensor) -> tuple[float, float]:
    low, high = np.percentile(values.numpy(), (1, 99))
    return float(low), float(high) if high > low else float(low) + 1.0
