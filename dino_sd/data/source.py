"""Source: random access to images, with labels where there are any. One file in `sources/` per kind of source."""

import hashlib
import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dino_sd.errors import UserError


@dataclass(frozen=True)
class Picture:
    """An image whose size is known and whose pixels may not have been decoded yet.

    height, width: pixels, upright. decode(shrink) -> uint8 (C, H, W); with shrink > 1, a power of two up to 8, the
    image may come back at 1/shrink of its size (JPEGs decode so at a fraction of the cost) or at full size.
    """

    height: int
    width: int
    decode: Callable[[int], torch.Tensor]


class Source(ABC):
    """What training and evaluation read from. Must pickle, and give the same image for the same index in any process.

    name: what the user called it. channels: of every image. classes: their names, or None where there are no labels.
    stack: uint8 (N, C, H, W) where all images are in memory at one size, else None.
    """

    name: str
    channels: int
    classes: list[str] | None = None
    stack: torch.Tensor | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> Picture:
        """The image's size and how to get its pixels. Raises UserError where it cannot be read."""

    @abstractmethod
    def labels(self) -> np.ndarray | None:
        """All labels at once, int64 (N,), or None where there are none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of what the set is; cheap, so it does not look at every pixel."""

    def image(self, index: int) -> torch.Tensor:
        """One image at full size, uint8 (C, H, W). Raises UserError where it cannot be read."""
        return self.picture(index).decode(1)

    def label(self, index: int) -> int | None:
        labels_N = self.labels()
        return None if labels_N is None else int(labels_N[index])


class StackSource(Source):
    """A source whose images are one tensor in memory: uint8 (N, C, H, W), labels int64 (N,)."""

    def __init__(self, name: str, stack: torch.Tensor, labels: np.ndarray | None, classes: list[str] | None):
        self.name, self.stack, self.classes = name, stack, classes
        self.channels = stack.shape[1]
        self._pixels, self._labels = stack, labels

    def __len__(self) -> int:
        return len(self._pixels)

    def picture(self, index: int) -> Picture:
        image_CHW = self._pixels[index]
        return Picture(image_CHW.shape[1], image_CHW.shape[2], lambda shrink: image_CHW)

    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        some = self._pixels[:: max(1, len(self) // 256)].numpy()
        labels = b"" if self._labels is None else self._labels.tobytes()
        return short_hash(repr(tuple(self._pixels.shape)).encode(), some.tobytes(), labels)


def short_hash(*parts: bytes) -> str:
    """Sixteen hex digits that name these bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def open_source(spec: str, channels: int) -> Source:
    """The source that a data setting names, e.g. a folder's path or `fashion-mnist:train`.

    channels: 1 (gray) or 3 (RGB). Every module in `sources/` is asked in turn: its `open(spec, channels)` returns a
    Source, or None where the spec is not its kind; its FORM says in one line what it understands.
    Raises UserError where no module knows the spec, or the data is missing or empty.
    """
    if channels not in (1, 3):
        raise UserError(f"channels: {channels} is not supported; use 1 (gray) or 3 (RGB)")
    package = importlib.import_module("dino_sd.data.sources")
    forms = []
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"{package.__name__}.{name}")
        source = module.open(spec, channels)
        if source is not None:
            return source
        forms.append(module.FORM)
    problem = "is a file" if os.path.isfile(spec) else "does not exist, nor is it the name of a known set"
    raise UserError(f"data: '{spec}' {problem}; expected {', or '.join(forms)}")
