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

NUMPY = {torch.uint8: np.uint8, torch.uint16: np.uint16, torch.float32: np.float32}  # what pixels may be
WHITE = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}  # what stands for 1 in a source's pixels
Bad = tuple[int, str, str]  # index, where, reason of an image that cannot be read
# Added to a class in the key of its generator: no epoch gets there, so no epoch's order (data/order.py) is related.
_KEEPING = 1 << 63


class BadImage(UserError):
    """An image that cannot be had whole. where: its file; reason: the rest of a sentence about it."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}; repair or remove it")
        self.where, self.reason = where, reason

    def __reduce__(self):
        return BadImage, (self.where, self.reason)


@dataclass(frozen=True)
class Picture:
    """An image whose size is known and whose pixels may not have been decoded yet.

    height, width: pixels, upright. decode(shrink) -> (C, H, W) of the source's dtype; with shrink > 1, a power of two
    up to 8, the image may come back at 1/shrink of its size (JPEGs decode so at less cost) or at full size. Both this
    and making the picture may raise BadImage.
    """

    height: int
    width: int
    decode: Callable[[int], torch.Tensor]


class Source(ABC):
    """What training and evaluation read from. Must pickle, and give the same image for the same index in any process.

    name: what the user called it. channels: of every image. dtype: of their pixels, uint8, uint16 or float32; WHITE
    says what stands for 1. classes: their names, or None where there are no labels. stack: (N, C, H, W) where all
    images are in memory at one size, else None. bad: images known to be unreadable that others stand in for already.
    parts: for every set that it is joined from, (images, how many of them come in an epoch); empty: all of them do.
    A subclass sets _labels where it has some, and its fingerprint covers them at least where _labels_hidden.
    """

    name: str
    channels: int
    dtype: torch.dtype = torch.uint8
    classes: list[str] | None = None
    stack: torch.Tensor | None = None
    bad: tuple[Bad, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()
    _labels: np.ndarray | None = None
    _labels_hidden: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> Picture:
        """The image's size and how to get its pixels. Raises BadImage where it cannot be read."""

    def path(self, index: int) -> str:
        """Where an image lies, for messages."""
        return f"{self.name}[{index}]"

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of what the set is and which labels are known; cheap, so it does not look at every pixel."""

    def files(self) -> list[str]:
        """Files whose times and sizes change when the images do, or some of them where they are many."""
        return []

    def image(self, index: int) -> torch.Tensor:
        """One image at full size, (C, H, W). Raises BadImage where it cannot be read."""
        return self.picture(index).decode(1)

    def labels(self) -> np.ndarray | None:
        """All labels at once, int64 (N,), -1 for an image without one; None where no image has one."""
        return self._labels

    def epoch_images(self) -> int:
        """How many images come in an epoch."""
        return sum(count for _, count in self.parts) or len(self)

    def hold_as(self, dtype: torch.dtype) -> None:
        """From now on pixels come as another dtype. Raises UserError where they cannot."""
        if dtype != self.dtype:
            raise UserError(f"data: '{self.name}' holds {name_of(self.dtype)} pixels, others {name_of(dtype)}")

    def label(self, index: int) -> int | None:
        """One image's label, or None where it has none."""
        labels_N = self.labels()
        return None if labels_N is None or labels_N[index] == NO_LABEL else int(labels_N[index])

    def label_name(self, index: int) -> str:
        """The name of one image's class, its number where classes have none, or nothing."""
        label = self.label(index)
        return "" if label is None else self.classes[label] if self.classes else str(label)

    def name_classes(self, names: list[str]) -> None:
        """Numbers the labels by these names, which hold all of the source's. Raises UserError where one is missing."""
        if self.classes is None or self._labels is None or self.classes == names:
            return
        if missing := [name for name in self.classes if name not in names]:
            raise UserError(f"data: '{self.name}' has the class '{missing[0]}', which is not among {len(names)} others")
        place = {name: label for label, name in enumerate(names)}  # the last entry is what NO_LABEL, -1, finds
        self._labels = np.array([*(place[name] for name in self.classes), NO_LABEL])[self._labels].astype(np.int64)
        self.classes = list(names)

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
    """A source whose images are one tensor in memory: (N, C, H, W) of any dtype of a source, labels int64 (N,)."""

    def __init__(self, name: str, stack: torch.Tensor, labels: np.ndarray | None, classes: list[str] | None):
        self.name, self.stack, self.classes = name, stack, classes
        self.channels, self.dtype = stack.shape[1], stack.dtype
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


class Chosen(Source):
    """Some images of a source: int64 (n,) indices into it, those of each of its parts together and in their order."""

    def __init__(self, whole: Source, chosen_n: np.ndarray):
        self.name, self.channels, self.classes = whole.name, whole.channels, whole.classes
        self.dtype = whole.dtype
        if whole.bad:
            place_of = {int(index): place for place, index in reversed(list(enumerate(chosen_n)))}
            self.bad = tuple((place_of[bad[0]], *bad[1:]) for bad in whole.bad if bad[0] in place_of)
        self.stack = None if whole.stack is None else whole.stack[torch.from_numpy(chosen_n)]
        labels_N = whole.labels()
        self._labels = None if labels_N is None else labels_N[chosen_n]
        self._whole, self._chosen = whole, chosen_n
        starts = np.cumsum([0] + [images for images, _ in whole.parts])
        left = np.diff(np.searchsorted(chosen_n, starts)).tolist()  # of each part
        self.parts = tuple(
            (chosen, max(1, round(count * chosen / images)))
            for chosen, (images, count) in zip(left, whole.parts, strict=True)
            if chosen
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def picture(self, index: int) -> Picture:
        return self._whole.picture(int(self._chosen[index]))

    def path(self, index: int) -> str:
        return self._whole.path(int(self._chosen[index]))

    def files(self) -> list[str]:
        return self._whole.files()

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
    return Chosen(source, np.flatnonzero(labels_N != NO_LABEL))


def labelled_often(source: Source, times: int) -> Source:
    """A source whose labelled images come `times` as often as the others; itself where all or none have a label.

    Each time an image comes it has views of its own.
    """
    labels_N = source.labels()
    if times == 1 or labels_N is None or (labels_N != NO_LABEL).all():
        return source
    return Chosen(source, np.repeat(np.arange(len(source)), np.where(labels_N != NO_LABEL, times, 1)))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def short_hash(*parts: bytes | memoryview) -> str:
    """Sixteen hex digits that name these bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def open_source(spec: str, channels: int) -> Source:
    """The source that a data setting names, e.g. a folder's path or `fashion-mnist:train`.

    channels: 1 (gray), 3 (RGB), or as many as the files hold. Every module in `sources/` is asked in turn: its
    `open(spec, channels)` returns a Source, or None where the spec is not its kind; its FORM says in one line what it
    understands. Raises UserError where no module knows the spec, or the data is missing or empty.
    """
    package = importlib.import_module("dino_sd.data.sources")
    forms = []
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"{package.__name__}.{name}")
        source = module.open(spec, channels)
        if source is not None:
            return source
        forms.append(module.FORM)
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        problem = "is a folder without images, also below, and holds nothing else that is known"
    elif os.path.isfile(path):
        problem = "is a file of no known kind, or holds no images"
    else:
        problem = "does not exist, nor is it the name of a known set"
    raise UserError(f"data: '{spec}' {problem}; expected {'; '.join(forms)}")
