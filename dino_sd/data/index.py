"""Long lists on disk and in memory: what a walk found is kept, and a million names are two arrays, not objects."""

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dino_sd.data.source import short_hash

Index = dict[str, torch.Tensor]
_WORTH_KEEPING = 1_000  # entries; fewer are found again as fast
_FORMAT = b"1"


class Strings:
    """Many byte strings in two tensors: workers share their memory, and nothing counts references in them."""

    def __init__(self, text: torch.Tensor, ends: torch.Tensor):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> "Strings":
        strings = list(strings)
        text = np.frombuffer(bytearray(b"".join(strings)), dtype=np.uint8)
        ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
        return cls(torch.from_numpy(text), torch.from_numpy(ends))

    @classmethod
    def from_index(cls, index: Index, name: str) -> "Strings":
        return cls(index[name], index[f"{name}_ends"])

    def to_index(self, name: str) -> Index:
        return {name: self.text, f"{name}_ends": self.ends}

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> bytes:
        """Raises IndexError when there is no such string."""
        position = range(len(self))[position]
        start = int(self.ends[position - 1]) if position else 0
        return self.text[start : int(self.ends[position])].numpy().tobytes()

    def hash(self) -> bytes:
        """Bytes that say which strings these are."""
        return short_hash(self.text.numpy().data, self.ends.numpy().data).encode()


def cache_folder() -> Path:
    """Where indices are kept: DINO_SD_CACHE, else `~/.cache/dino_sd`."""
    return Path(os.environ.get("DINO_SD_CACHE") or "~/.cache/dino_sd").expanduser()


def indexed(what: str, build: Callable[[], Index], fresh: Callable[[Index], bool]) -> Index:
    """`build()`'s tensors: read, mapped into memory, from where the last call for the same `what` left them.

    what: names kind, place and everything else that the index depends on. fresh: whether an index that was kept still
    describes what lies on the disk. Small ones are not kept. A cache that cannot be written or read is done without.
    """
    path = cache_folder() / "index" / f"{short_hash(_FORMAT, what.encode())}.safetensors"
    with suppress(OSError, SafetensorError, KeyError, ValueError):
        if path.is_file():
            index = load_file(path)
            if fresh(index):
                return index
    index = build()
    if max((len(tensor) for tensor in index.values()), default=0) >= _WORTH_KEEPING:
        with suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
            try:
                save_file(index, temporary)
                os.replace(temporary, path)
            finally:
                with suppress(OSError):
                    os.unlink(temporary)
    return index
