"""Several sources as one, each with its weight."""

from collections.abc import Sequence

import numpy as np
import torch

from dino_sd.data.source import WHITE, Picture, Source, short_hash
from dino_sd.shapes import NO_LABEL


class Joined(Source):
    """The images of several sources, one source after the other.

    weights: how often an image of each comes in an epoch: 2 is twice, each time with other views; 0.1 is a tenth of its
    images, others in the next epoch until all have come. Classes of the same name are one class; images of a source
    without labels have none. Raises UserError where the sources' pixels are of types that do not go together.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self._sources = list(sources)
        self.name = ", ".join(source.name for source in sources)
        self.channels = sources[0].channels
        self.dtype = max((source.dtype for source in sources), key=list(WHITE).index)
        for source in sources:
            source.hold_as(self.dtype)
        self.parts = tuple(
            (len(source), max(1, round(len(source) * weight))) for source, weight in zip(sources, weights, strict=True)
        )
        self._ends = np.cumsum([len(source) for source in sources])
        self._join_labels()
        stacks = [source.stack for source in sources if source.stack is not None]
        if len(stacks) == len(sources) and len({stack.shape[1:] for stack in stacks}) == 1:
            self.stack = torch.cat(stacks)
            for source in sources:  # what is not held twice
                source.stack = None

    def _join_labels(self) -> None:
        named: list[str] = []
        for source in self._sources:
            named += [name for name in source.classes or () if name not in named]
        if not named:
            return
        parts = []
        for source in self._sources:
            source.name_classes(named)
            labels_N = source.labels()
            parts.append(np.full(len(source), NO_LABEL) if labels_N is None else labels_N)
        self.classes, self._labels = named, np.concatenate(parts).astype(np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[which], index - int(self._ends[which]) + len(self._sources[which])

    def picture(self, index: int) -> Picture:
        source, within = self._place(index)
        return source.picture(within)

    def path(self, index: int) -> str:
        source, within = self._place(index)
        return source.path(within)

    def files(self) -> list[str]:
        return [path for source in self._sources for path in source.files()]

    def fingerprint(self) -> str:
        hidden = [self._labels.tobytes()] if self._labels_hidden and self._labels is not None else []
        return short_hash(*(s.fingerprint().encode() for s in self._sources), repr(self.parts).encode(), *hidden)
