"""The bytes of an image file -> upright uint8 pixels, in gray or RGB."""

import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from dino_sd.data.source import Picture
from dino_sd.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def picture(data: bytes, where: str, channels: int) -> Picture:
    """An image file in memory as a Picture of 1 (gray) or 3 (RGB) channels.

    Alpha is dropped, palettes and CMYK are converted, 16-bit gray keeps its upper byte; of several frames the first
    counts. where: the file's name for messages. Raises UserError, now or in decode, where the file cannot be read
    whole: never half an image.
    """
    with _readable(where), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
        if image.format != "JPEG":
            # Other formats may find out about their orientation only while decoding, and cannot decode at less.
            pixels_CHW = _pixels(ImageOps.exif_transpose(image), channels)
            return Picture(pixels_CHW.shape[1], pixels_CHW.shape[2], lambda shrink: pixels_CHW)
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    width, height = image.size
    if orientation in _SIDEWAYS:
        width, height = height, width

    def decode(shrink: int) -> torch.Tensor:
        with _readable(where):
            fresh = Image.open(io.BytesIO(data))
            # Also at full size: a gray draft leaves the colour planes undecoded.
            fresh.draft("RGB" if channels == 3 else "L", (fresh.width // shrink, fresh.height // shrink))
            return _pixels(ImageOps.exif_transpose(fresh), channels)

    return Picture(height, width, decode)


class _readable:
    """Turns whatever a decoder raises (they raise anything) into one clear line."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = str(error).replace("<_io.BytesIO object at ", "<").split("\n")[0] or type(error).__name__
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "no known image format"
            raise UserError(f"{self.where}: cannot be read as an image ({reason}); repair or remove it") from error


def _pixels(image: Image.Image, channels: int) -> torch.Tensor:
    if image.mode.startswith("I"):
        # 16-bit gray; Pillow's own conversion would clip everything above 255 to white.
        gray_HW = (np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8).astype(np.uint8)
        image = Image.fromarray(gray_HW)
    elif image.mode == "F":
        raise ValueError("float pixels are not supported; convert it to 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels_HWC = np.array(image.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels_HWC.reshape(image.height, image.width, channels)).permute(2, 0, 1)
