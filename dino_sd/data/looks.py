"""A look at every image of a set: its size, its kind, its brightness and a thumbnail, or why it cannot be read."""

import hashlib
import warnings
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from dino_sd.data.decode import picture, sample_count
from dino_sd.data.files import FileSource
from dino_sd.data.loader import in_workers
from dino_sd.data.source import WHITE, Bad, BadImage, Source, StackSource, name_of, open_source
from dino_sd.data.statistics import enough, evenly, moments_of
from dino_sd.progress import progress

THUMBNAIL = (8, 9)  # height, width: 64 differences between neighbours
_PROBED = 16
_CHUNK = 32  # images that a worker looks at at a time


def look_type(channels: int) -> np.dtype:
    """What is known of an image that can be read.

    index: in its source. height, width: pixels, upright. bytes: of its file, -1 without one. digest: of the file, or of
    the pixels. mode: as in `mode_of`. gray: three channels that are all the same. moments: as in `moments_of`.
    thumbnail: gray, in units in which WHITE is 1.
    """
    return np.dtype([
        ("index", "i8"), ("height", "i8"), ("width", "i8"), ("bytes", "i8"), ("digest", "S32"), ("mode", "S24"),
        ("gray", "?"), ("moments", "f8", (4, channels)), ("thumbnail", "f4", THUMBNAIL),
    ])  # fmt: skip


def look(source: Source, indices_n: np.ndarray, workers: int) -> tuple[np.ndarray, list[Bad]]:
    """(looks, of `look_type`; images that cannot be read), both in the order of indices_n, whatever the workers."""
    looks, bad, done = [np.empty(0, look_type(source.channels))], [], 0
    with progress(f"looking at {source.name}") as show:
        for some, broken in in_workers(_Chunks(source, indices_n), workers):
            looks.append(some)
            bad += broken
            done += len(some) + len(broken)
            show(done, len(indices_n))
    return np.concatenate(looks), bad


class _Chunks(Dataset):
    def __init__(self, source: Source, indices_n: np.ndarray):
        self.source, self.indices_n = source, indices_n

    def __len__(self) -> int:
        return -(-len(self.indices_n) // _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, list[Bad]]:
        looks, bad = [], []
        for index in self.indices_n[chunk * _CHUNK : (chunk + 1) * _CHUNK].tolist():
            try:
                looks.append(_look_at(self.source, index))
            except BadImage as error:
                bad.append((index, error.where, error.reason))
        return np.array(looks, look_type(self.source.channels)), bad


def _look_at(source: Source, index: int) -> tuple:
    """The fields of `look_type`. Raises BadImage."""
    if isinstance(source, FileSource):
        where = source.path(index)
        data = source.encoded(index)
        seen = picture(data, where, source.channels, source.dtype)
    else:
        data, where, seen = b"", "", source.picture(index)
    image_CHW = seen.decode(enough(seen))
    # A set of one image has that image's moments.
    moments_4C = moments_of(StackSource("", image_CHW[None], None, None), 0).numpy()
    gray_HW = image_CHW.float().mean(0).div_(WHITE[source.dtype])
    thumbnail = F.adaptive_avg_pool2d(gray_HW[None], THUMBNAIL)[0].numpy()
    gray = len(image_CHW) == 3 and all(torch.equal(image_CHW[0], image_CHW[c]) for c in (1, 2))
    if data:
        digest, mode = hashlib.sha256(data), mode_of(data, where)
    else:
        digest = hashlib.sha256(repr(tuple(image_CHW.shape)).encode() + image_CHW.contiguous().numpy().tobytes())
        mode = f"{source.channels} x {name_of(source.dtype)}"
    size = len(data) if data else -1
    return index, seen.height, seen.width, size, digest.hexdigest()[:32], mode, gray, moments_4C, thumbnail


def mode_of(data: bytes, where: str) -> str:
    """`RGB`, `L`, `P`, `CMYK`, `L, 16 bits`, `13 x uint16`, ...: what a file holds."""
    try:
        channels, mode = _sample_count(data, where)
    except BadImage:  # Pillow knows less than the decoder, which has read it
        return "unknown"
    if mode in ("uint8", "uint16", "float32"):
        return f"{channels} x {mode}"
    return mode.replace("I;16", "L").replace(" 16 bits", ", 16 bits")


def _sample_count(data: bytes, where: str) -> tuple[int, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd headers: the decoder has the last word
        return sample_count(data, where)


def open_with_its_channels(spec: str) -> Source:
    """`open_source` with as many channels as most of a few images have: 1 where all are gray, 3 where some have colour.

    Raises UserError as it does.
    """
    source = open_source(spec, 3)
    votes = []
    for index in evenly(len(source), _PROBED).tolist():
        try:
            votes.append(_own_channels(source, index))
        except BadImage:  # met again, and reported
            continue
    colours = Counter(vote for vote in votes if vote > 1)
    channels = colours.most_common(1)[0][0] if colours else 1 if votes else 3
    return source if channels == 3 else open_source(spec, channels)


def _own_channels(source: Source, index: int) -> int:
    """Channels that training would want of an image. Raises BadImage."""
    if not isinstance(source, FileSource):
        image_CHW = source.image(index)
        return 1 if all(torch.equal(image_CHW[0], image_CHW[c]) for c in (1, 2)) else 3
    where = source.path(index)
    channels, mode = _sample_count(source.encoded(index), where)
    if mode in ("uint8", "uint16", "float32"):  # bands
        return channels
    return 1 if mode.split(" ")[0] in ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B") else 3  # alpha is not looked at
