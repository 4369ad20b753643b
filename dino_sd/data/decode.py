"""The bytes of an image file -> upright pixels of the channels and the type that are asked for.

JPEGs are decoded by simplejpeg, to the bit as in Pillow, in 0.64 ms where Pillow takes 0.89, torchvision 0.77 and
OpenCV 0.66 (500x375, quality 90, one core of an AMD EPYC, medians, 2026-11-24), and at reduced scale, which torchvision
cannot. For other formats Pillow is as fast as any; what it cannot hold goes to torchvision (PNG of 16 bits) and to
tifffile (TIFF of many bands or of 16 bits and colours).
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps

from dino_sd.data.source import NUMPY, BadImage, Picture

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy")
DEEP_EXTENSIONS = (b".png", b".tif", b".tiff", b".npy")  # of formats that can hold more than bytes
MOST_PIXELS = 178_956_970  # of an image; more is taken for a decompression bomb, as by Pillow
_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXIF_WITHIN = 2**16  # bytes from the beginning of a JPEG
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601-2, as in Pillow


def picture(data: bytes, where: str, channels: int, dtype: torch.dtype = torch.uint8) -> Picture:
    """An image file in memory as a Picture of so many channels and of a source's dtype.

    One channel is gray, three are RGB: palettes, CMYK and other colours are converted, alpha is dropped. Four are RGBA
    or any four; these and other numbers are taken as they are, and the file must hold as many. Bytes are scaled to
    16 bits, 16 bits to bytes (0 and the largest value stay such); floats are not scaled, and not turned into whole
    numbers. Of several frames or pages the first counts, unless the pages are the channels. where: the file's name for
    messages. Raises BadImage, now or in decode, where the file cannot be read whole: never half an image.
    """
    if not data.startswith(_JPEG):
        with _readable(where):
            pixels_CHW = torch.from_numpy(as_asked(_native(data, channels), channels, dtype))
            return Picture(pixels_CHW.shape[1], pixels_CHW.shape[2], lambda shrink: pixels_CHW)
    with _readable(where):
        orientation = 1
        try:
            header = simplejpeg.decode_jpeg_header(data)
            height, width, colors = int(header[0]), int(header[1]), header[2]
            if data.find(b"Exif\0\0", 0, _EXIF_WITHIN) >= 0:
                orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
        except ValueError:  # an unusual one, or none at all: Pillow's word counts
            (width, height), colors = Image.open(io.BytesIO(data)).size, "unknown"
        _check_size(height, width)
        tall, wide = (width, height) if orientation in _SIDEWAYS else (height, width)

    def decode(shrink: int) -> torch.Tensor:
        with _readable(where):
            if colors not in ("YCbCr", "Gray", "RGB") or channels not in (1, 3):
                # Pillow's reduced scale is the same libjpeg's; CMYK wants its conversion.
                return torch.from_numpy(as_asked(_from_pillow(data, channels), channels, dtype))
            # Four bytes a pixel: torch cuts and resizes those a third faster, and the fourth plane is never looked at.
            pixels_HWC = simplejpeg.decode_jpeg(
                data,
                "RGBX" if channels == 3 else "GRAY",
                min_height=-(-height // shrink),
                min_width=-(-width // shrink),
            )
            pixels_CHW = torch.from_numpy(upright(pixels_HWC.transpose(2, 0, 1), orientation))[:channels]
            return pixels_CHW if dtype == torch.uint8 else torch.from_numpy(_scaled(pixels_CHW.numpy(), dtype))

    return Picture(tall, wide, decode)


def native_dtype(data: bytes, where: str) -> torch.dtype:
    """The type of an image file's pixels as they are stored: uint8, uint16 or float32 (for all that is wider)."""
    if data.startswith(_PNG):  # the bit depth stands in the header, always at the same place
        return torch.uint16 if data[24:25] == b"\x10" else torch.uint8
    if not data.startswith((_NPY, *_TIFF)):
        return torch.uint8
    with _readable(where):
        return torch.from_numpy(_native(data, None)[:1, :1, :1].copy()).dtype


def sample_count(data: bytes, where: str) -> tuple[int, str]:
    """(channels that a file holds, what Pillow calls their mode, or the type of the numbers)."""
    with _readable(where):
        if not data.startswith((_NPY, *_TIFF)):
            image = Image.open(io.BytesIO(data))
            deep = data.startswith(_PNG) and data[24:25] == b"\x10"
            return (1 if image.mode == "P" else len(image.getbands())), image.mode + (" 16 bits" if deep else "")
        pixels_CHW = _native(data, None)
        return len(pixels_CHW), str(pixels_CHW.dtype)


def upright(pixels_CHW: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation of 1 to 8; others leave the pixels where they are."""
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    if flipped is None:
        return pixels_CHW
    if orientation in _SIDEWAYS:
        pixels_CHW = pixels_CHW.swapaxes(1, 2)
    return np.ascontiguousarray(np.flip(pixels_CHW, flipped))


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns whatever a decoder raises (they raise anything) into one clear line, and its warnings of bombs too."""
    try:
        yield
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage(where, "cannot be read as an image (no known image format)") from error
    except Exception as error:
        reason = str(error).replace("<_io.BytesIO object at ", "<").strip().split("\n")[0] or type(error).__name__
        raise BadImage(where, f"cannot be read as an image ({reason})") from error


def _check_size(height: int, width: int, samples: int = 1) -> None:
    if not height * width * samples:
        raise ValueError("holds no pixels")
    if height * width > MOST_PIXELS or height * width * samples > 4 * MOST_PIXELS:
        raise ValueError(f"{height}x{width} is more than {MOST_PIXELS:,} pixels: a decompression bomb, or to be cut up")


def _native(data: bytes, channels: int | None) -> np.ndarray:
    """Pixels as they are stored, (C, H, W): uint8, uint16 or float32. channels: decides which axis of npy they are."""
    if data.startswith(_NPY):
        return _from_npy(data, channels)
    if data.startswith(_PNG) and data[24:25] == b"\x10":
        from torchvision.io import ImageReadMode, decode_png  # costs two seconds, which most runs need not spend

        _check_size(int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big"))
        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()
        return upright(pixels, Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1))
    if data.startswith(_TIFF):
        return _from_tiff(data, channels)
    return _from_pillow(data, channels)


def _from_pillow(data: bytes, channels: int | None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes below the limit, of odd metadata
        return pixels_of(Image.open(io.BytesIO(data)), channels)


def pixels_of(image: Image.Image, channels: int | None) -> np.ndarray:
    """An image of Pillow's, upright, as uint8 (C, H, W): gray, RGB, or RGBA where channels are 4 and it is RGBA."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    gray = channels == 1 or image.mode in ("1", "L", "LA", "La")
    image = image.convert("L" if gray else "RGBA" if channels == 4 and image.mode == "RGBA" else "RGB")
    return np.array(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def _from_tiff(data: bytes, channels: int | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
        pages = getattr(image, "n_frames", 1)
    except Exception:  # more bands, or more bits of colour, than Pillow knows
        image, pages = None, 0
    if image is not None and not (pages > 1 and pages == channels):
        if image.mode[0] not in "IF":
            return _from_pillow(data, channels)
        _check_size(image.height, image.width)
        return _plain_numbers(np.asarray(ImageOps.exif_transpose(image)))[None]
    try:
        import tifffile
    except ImportError:
        raise ValueError("a TIFF that Pillow does not know; install the extra: pip install 'dino-sd[tiff]'") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        if len(file.pages) > 1 and page.samplesperpixel == 1 and len(file.pages) == channels:
            shapes = {one.shape for one in file.pages}
            if shapes != {page.shape}:
                raise ValueError(f"its {channels} pages are not of one size")
            _check_size(page.imagelength, page.imagewidth, len(file.pages))
            return _plain_numbers(np.stack([one.asarray() for one in file.pages]))
        _check_size(page.imagelength, page.imagewidth, page.samplesperpixel * page.imagedepth)
        pixels = page.asarray()
        pixels = pixels.reshape(page.shaped[-4:][0] if pixels.ndim > 3 else pixels.shape)
        if pixels.ndim == 2:
            pixels = pixels[None]
        elif page.planarconfig == tifffile.PLANARCONFIG.CONTIG:
            pixels = pixels.transpose(2, 0, 1)
    return _plain_numbers(pixels)


def _from_npy(data: bytes, channels: int | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W); where both the first and the last axis could be the channels, the last one is."""
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise ValueError(f"an array of shape {pixels.shape}; expected height x width, with or without channels")
    else:
        last = pixels.shape[2] == channels or (pixels.shape[0] != channels and pixels.shape[2] <= pixels.shape[0])
        pixels = pixels.transpose(2, 0, 1) if last else pixels
    _check_size(pixels.shape[1], pixels.shape[2], len(pixels))
    return _plain_numbers(pixels)


def _plain_numbers(pixels: np.ndarray) -> np.ndarray:
    """As uint8, uint16 or float32, without a loss: signed and wider integers are floats of the same value."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return pixels.astype(pixels.dtype.newbyteorder("="))
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {pixels.dtype}; expected whole or floating-point numbers")
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("holds NaN or infinite pixels")
    return pixels


def as_asked(pixels_CHW: np.ndarray, channels: int, dtype: torch.dtype) -> np.ndarray:
    """Stored pixels (C, H, W) with the channels and the type asked for, as in `picture`. Raises ValueError."""
    stored = len(pixels_CHW)
    if stored == channels or (channels == 3 and stored == 4):
        pixels_CHW = pixels_CHW[:channels]
    elif channels == 3 and stored <= 2:  # gray, or gray and alpha
        pixels_CHW = np.repeat(pixels_CHW[:1], 3, axis=0)
    elif channels == 1 and stored == 2:
        pixels_CHW = pixels_CHW[:1]
    elif channels == 1 and stored in (3, 4):
        gray_HW = np.tensordot(_LUMA, pixels_CHW[:3].astype(np.float32), 1)
        pixels_CHW = (np.rint(gray_HW) if pixels_CHW.dtype.kind == "u" else gray_HW).astype(pixels_CHW.dtype)[None]
    else:
        raise ValueError(f"holds {stored} channel(s) where channels={channels}")
    return _scaled(pixels_CHW, dtype)


def _scaled(pixels: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    wanted = NUMPY[dtype]
    if pixels.dtype == wanted:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.float32:
        raise ValueError(f"holds floating-point pixels in a set of {np.dtype(wanted)}; convert one or the other")
    if wanted == np.float32:
        return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return (pixels >> 8).astype(np.uint8) if wanted == np.uint8 else pixels.astype(np.uint16) * 257
