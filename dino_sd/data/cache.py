"""Images decoded once: kept in memory where they are small, or as raw copies in a folder, mapped into memory."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from dino_sd.data.loader import fitting, in_workers
from dino_sd.data.resample import resize
from dino_sd.data.source import NUMPY, Bad, BadImage, Picture, Source, name_of, short_hash
from dino_sd.distributed import local_world_size
from dino_sd.errors import UserError
from dino_sd.progress import progress

SMALL_SIDE = 128  # pixels; of images that are cut a whole batch at a time
_CHUNK = 8  # images that a worker decodes at a time
_ESTIMATED = 64  # images from which on it is known how much room all of them need
_PARTS = ("pixels", "index.safetensors", "bad.json")


class _Copy(Source):
    """What a source and its copy have in common."""

    def __init__(self, whole: Source):
        self.name, self.channels, self.classes, self.dtype = whole.name, whole.channels, whole.classes, whole.dtype
        self.parts, self._whole = whole.parts, whole
        labels_N = whole.labels()
        self._labels = None if labels_N is None else labels_N.copy()

    def __len__(self) -> int:
        return len(self._whole)

    def path(self, index: int) -> str:
        return self._whole.path(index)

    def files(self) -> list[str]:
        return self._whole.files()

    def fingerprint(self) -> str:
        hidden = [self._labels.tobytes()] if self._labels_hidden and self._labels is not None else []
        return short_hash(self._whole.fingerprint().encode(), *hidden) if hidden else self._whole.fingerprint()


class InMemory(_Copy):
    """All images of a source as its `stack`. For one that cannot be read, the next that can stands in."""

    def __init__(self, whole: Source, stack: torch.Tensor, bad: list[Bad]):
        super().__init__(whole)
        self.stack, self.bad = stack, tuple(bad)
        missing = {index for index, _, _ in bad}
        for index in sorted(missing, reverse=True):
            stand_in = next(i % len(self) for i in range(index + 1, index + len(self)) if i % len(self) not in missing)
            stack[index] = stack[stand_in]
            if self._labels is not None:
                self._labels[index] = self._labels[stand_in]

    def picture(self, index: int) -> Picture:
        assert self.stack is not None
        image_CHW = self.stack[index]
        return Picture(image_CHW.shape[1], image_CHW.shape[2], lambda shrink: image_CHW)


def in_memory(source: Source, most_bytes: float, workers: int = 0) -> Source:
    """A source of small images of one size with all of them in memory; any other source is returned as it is.

    most_bytes: that they may take. workers: processes that decode. Small is a side of at most SMALL_SIDE pixels.
    """
    if source.stack is not None:
        return source
    sizes = (_size_of(source, index) for index in range(min(len(source), _ESTIMATED)))
    size = next((size for size in sizes if size is not None), None)
    if size is None or max(size) > SMALL_SIDE:
        return source
    shape = (len(source), source.channels, *size)
    if np.prod(shape, dtype=np.float64) * source.dtype.itemsize > most_bytes:
        return source
    stack, bad = torch.empty(shape, dtype=source.dtype), []
    for index, image in _decoded(source, None, workers, f"reading {source.name} into memory"):
        if isinstance(image, BadImage):
            bad.append((index, image.where, image.reason))
        elif image.shape != stack.shape[1:]:
            return source
        else:
            stack[index] = image
    return InMemory(source, stack, bad) if len(bad) < len(source) else source


def _size_of(source: Source, index: int) -> tuple[int, int] | None:
    try:
        picture = source.picture(index)
    except BadImage:
        return None
    return picture.height, picture.width


class Cached(_Copy):
    """Raw copies of a source's images: one file of pixels, mapped into memory, and where in it each image lies."""

    def __init__(self, whole: Source, folder: Path, side: int):
        super().__init__(whole)
        index = load_file(folder / "index.safetensors")
        self.sizes, self._starts = index["sizes"], index["starts"]
        self._reasons = json.loads((folder / "bad.json").read_text())
        self._folder, self._side, self._pixels = folder, side, None

    def __getstate__(self):
        return {**self.__dict__, "_pixels": None}  # every process maps the file for itself

    def picture(self, index: int) -> Picture:
        if str(index) in self._reasons:
            raise BadImage(self.path(index), self._reasons[str(index)])
        if self._pixels is None:
            # Copy on write: what is never written is never copied, and torch takes it without a warning.
            self._pixels = torch.from_numpy(np.memmap(self._folder / "pixels", NUMPY[self.dtype], mode="c"))
        height, width = self.sizes[index].tolist()
        start = int(self._starts[index])
        pixels_HWC = self._pixels[start : start + height * width * self.channels].view(height, width, self.channels)
        return Picture(height, width, lambda shrink: pixels_HWC.permute(2, 0, 1))

    def fingerprint(self) -> str:
        return short_hash(super().fingerprint().encode(), b"raw", self._side.to_bytes(8, "little"))


def cached(source: Source, folder: str | Path, side: int, workers: int = 0) -> Source:
    """The source, read from raw copies in `folder`; they are made first where they are not there yet.

    side: images are resized until their shorter side is at most that, in pixels. workers: processes that decode. Copies
    of other images, of images written again, or of another size, have places of their own in the folder. Raises
    UserError where it cannot be written or the disk is too small.
    """
    how = f"{side} {source.channels} {name_of(source.dtype)} {dates_of(source.files())}"
    key = short_hash(source.fingerprint().encode(), how.encode())
    place = Path(folder).expanduser() / key
    if (made := _whole(source, place, side)) is not None:
        return made
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(place.with_suffix(".lock")):
            if _whole(source, place, side) is None:
                shutil.rmtree(place, ignore_errors=True)
                _make(source, place, side, workers)
    except OSError as error:
        shutil.rmtree(place.with_suffix(".making"), ignore_errors=True)  # it may be what has filled the disk
        raise UserError(f"data.cache={folder}: cannot be written ({error.strerror}); choose another folder") from None
    return Cached(source, place, side)


def _whole(source: Source, place: Path, side: int) -> "Cached | None":
    """The copies in a place, where they are all there."""
    if not all((place / part).is_file() for part in _PARTS):
        return None
    try:
        made = Cached(source, place, side)
        numbers = int(made.sizes.prod(1).sum()) * source.channels
        return made if (place / "pixels").stat().st_size == numbers * source.dtype.itemsize else None
    except (OSError, ValueError, KeyError, SafetensorError):  # cut short, or altered: they are made again
        return None


def _make(source: Source, place: Path, side: int, workers: int) -> None:
    making = place.with_suffix(".making")  # one that was cut off is begun anew
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    sizes, bad = torch.zeros(len(source), 2, dtype=torch.int64), {}
    written = 0
    with open(making / "pixels", "wb") as file:
        for index, image in _decoded(source, side, workers, f"raw copies of {source.name}"):
            if isinstance(image, BadImage):
                bad[index] = image.reason
                continue
            sizes[index] = torch.tensor(image.shape[1:])
            file.write(image.permute(1, 2, 0).contiguous().numpy().data)
            written += image.numel() * image.element_size()
            if index == min(len(source), _ESTIMATED) - 1:
                need, free = written / (index + 1) * len(source), shutil.disk_usage(making).free + written
                if need > free:
                    shutil.rmtree(making, ignore_errors=True)
                    raise UserError(
                        f"data.cache: raw copies of {source.name} take about {need / 1e9:.1f} GB, {place.parent} has "
                        f"{free / 1e9:.1f} GB free; choose another folder or a smaller data.cache_side than {side}"
                    )
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (sizes.prod(1) * source.channels).cumsum(0)[:-1]])
    save_file({"sizes": sizes, "starts": starts}, making / "index.safetensors")
    (making / "bad.json").write_text(json.dumps(bad))
    os.replace(making, place)


def dates_of(paths: list[str]) -> list[tuple[int, int]]:
    """What tells that an image was written again in its place."""
    found = []
    for path in paths:
        with suppress(OSError):
            state = os.stat(path)
            found.append((state.st_size, state.st_mtime_ns))
    return found


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Ranks and runs that want the same copies wait until one has made them."""
    if sys.platform == "win32":
        yield
        return
    import fcntl  # not on Windows

    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Decode(Dataset):
    """Chunks of a source's images, decoded and made smaller, as items; what cannot be read, as the error."""

    def __init__(self, source: Source, side: int | None):
        self.source, self.side = source, side

    def __len__(self) -> int:
        return -(-len(self.source) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[torch.Tensor | BadImage]:
        indices = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.source)))
        return [self._image(index) for index in indices]

    def _image(self, index: int) -> torch.Tensor | BadImage:
        try:
            picture = self.source.picture(index)
            shorter, side = min(picture.height, picture.width), self.side or SMALL_SIDE
            image_CHW = picture.decode(next((s for s in (8, 4, 2) if shorter // s >= side), 1) if self.side else 1)
        except BadImage as error:
            return error
        if self.side is None or shorter <= side:
            return image_CHW.contiguous()
        factor = side / shorter
        return resize(image_CHW, (max(1, round(picture.height * factor)), max(1, round(picture.width * factor))))


def _decoded(
    source: Source, side: int | None, workers: int, label: str
) -> Iterator[tuple[int, torch.Tensor | BadImage]]:
    """(index, image or why there is none) of all images of a source, in order."""
    index, images = 0, _Decode(source, side)
    item_bytes = _CHUNK * 2 * (side or SMALL_SIDE) ** 2 * source.channels * source.dtype.itemsize
    workers = fitting(min(workers, len(images) // 8), item_bytes, local_world_size())
    with progress(label) as show:
        for chunk in in_workers(images, workers):
            for image in chunk:
                yield index, image
                index += 1
            show(index, len(source))
