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
from dino_sd.shapes import NO_LABEL

# Added to a class in the key of its generator: no epoch gets there, so no epoch's order (data/order.py) is related.
_KEEPING = 1 << 63


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
    stack: uint8 (N, C, H, W) where all images are in memory at one size, else None. A subclass sets _labels where it
    has some, and its fingerprint covers them at least where _labels_hidden.
    """

    name: str
    channels: int
    classes: list[str] | None = None
    stack: torch.Tensor | None = None
    _labels: np.ndarray | None = None
    _labels_hidden: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> Picture:
        """The image's size and how to get its pixels. Raises UserError where it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of what the set is and which labels are known; cheap, so it does not look at every pixel."""

    def image(self, index: int) -> torch.Tensor:
        """One image at full size, uint8 (C, H, W). Raises UserError where it cannot be read."""
        return self.picture(index).decode(1)

    def labels(self) -> np.ndarray | None:
        """All labels at once, int64 (N,), -1 for an image without one; None where no image has one."""
        return self._labels

    def label(self, index: int) -> int | None:
        """One image's label, or None where it has none."""
        labels_N = self.labels()
        return None if labels_N is None or labels_N[index] == NO_LABEL else int(labels_N[index])

    def keep_labels(self, share: float, seed: int) -> None:
        """Hides labels, until only `share` of those of each class are left: rounded, at least one.

        Which ones is a function of the seed; for one seed, those of a smaller share are among those of a larger one.
        Raises UserError when there are no labels, or share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise UserError(f"labelled: {share:g} is no share of the labels; use one above 0 and at most 1")
        if self._labels is None:
            raise UserError(f"data: '{self.name}' has no labels to keep {share:g} of; use one folder a class")
        kept_N = np.full_like(self._labels, NO_LABEL)
        for label in np.unique(self._labels[self._labels != NO_LABEL]).tolist():
            members = np.flatnonzero(self._labels == label)
            key = np.array([seed & 0xFFFFFFFFFFFFFFFF, _KEEPING + label], dtype=np.uint64)
            members = np.random.Generator(np.random.Philox(key=key)).permutation(members)
            kept_N[members[: max(1, round(share * len(members)))]] = label
        self._labels_hidden |= not np.array_equal(kept_N, self._labels)
        self._labels = kept_N


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

    def fingerprint(self) -> str:
        some = self._pixels[:: max(1, len(self) // 256)].numpy()
        labels = b"" if self._labels is None else self._labels.tobytes()
        return short_hash(repr(tuple(self._pixels.shape)).encode(), some.tobytes(), labels)


class _Chosen(Source):
    """Some images of a source, in the order given: int64 (n,) indices into it."""

    def __init__(self, whole: Source, chosen_n: np.ndarray):
        self.name, self.channels, self.classes = whole.name, whole.channels, whole.classes
        self.stack = None if whole.stack is None else whole.stack[torch.from_numpy(chosen_n)]
        labels_N = whole.labels()
        self._labels = None if labels_N is None else labels_N[chosen_n]
        self._whole, self._chosen = whole, chosen_n

    def __len__(self) -> int:
        return len(self._chosen)

    def picture(self, index: int) -> Picture:
        return self._whole.picture(int(self._chosen[index]))

    def fingerprint(self) -> str:
        labels = b"" if self._labels is None else self._labels.tobytes()
        return short_hash(self._whole.fingerprint().encode(), self._chosen.tobytes(), labels)


def labelled_only(source: Source) -> Source:
    """The images of a source that have a label, in its order; itself where all have one.

    Raises UserError where no image has one.
    """
    labels_N = source.labels()
    if labels_N is None:
        raise UserError(f"data: no image of '{source.name}' has a label; use one folder a class")
    if (labels_N != NO_LABEL).all():
        return source
    return _Chosen(source, np.flatnonzero(labels_N != NO_LABEL))


def labelled_often(source: Source, times: int) -> Source:
    """A source whose labelled images come `times` as often as the others; itself where all or none have a label.

    Each time an image comes it has views of its own.
    """
    labels_N = source.labels()
    if times == 1 or labels_N is None or (labels_N != NO_LABEL).all():
        return source
    return _Chosen(source, np.repeat(np.arange(len(source)), np.where(labels_N != NO_LABEL, times, 1)))


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
