"""Images as evaluation sees them: resized and centre-cropped, nothing random."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

from dino_sd.data.loader import fitting, in_workers
from dino_sd.data.resample import resize
from dino_sd.data.source import Bad, BadImage, Source
from dino_sd.distributed import say
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL


def resize_crop(image_CHW: torch.Tensor, size: tuple[int, int], crop: float) -> torch.Tensor:
    """The image resized, bicubic and antialiased, until its shorter side is size / crop, then its centre.

    size: (height, width) of the result in pixels. crop: share of the shorter side that is kept, e.g. 224 / 256.
    """
    height, width = image_CHW.shape[-2:]
    tall, wide = math.floor(size[0] / crop), math.floor(size[1] / crop)  # as timm and torchvision cut
    if tall * width >= wide * height:
        wide = max(wide, tall * width // height)
    else:
        tall = max(tall, wide * height // width)
    if (tall, wide) != (height, width):
        image_CHW = resize(image_CHW, (tall, wide))
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    return image_CHW[:, top : top + size[0], left : left + size[1]].contiguous()


class EvalSet(Dataset):
    """A source as (image (C, H, W), label or -1, index) at one size. Raises BadImage as the source does."""

    def __init__(self, source: Source, size: tuple[int, int], crop: float = 1.0):
        self.source, self.size, self.crop = source, size, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        label = self.source.label(index)
        image_CHW = resize_crop(self.source.image(index), self.size, self.crop)
        return image_CHW, NO_LABEL if label is None else label, index


def eval_batches(
    source: Source,
    size: tuple[int, int],
    crop: float = 1.0,
    batch_size: int = 256,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    whole: bool = True,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's contiguous share of the source, in order: (images (B, C, H, W), labels (B,), indices (B,)).

    Images are of the source's dtype, labels -1 where there are none. Shares differ by at most one image.
    An image that cannot be read is left out, and said. Raises UserError where none can be.
    whole: False where the source is part of a set whose other images may be readable: none is then no error.
    """
    count = len(source)
    share = range(count * rank // world_size, count * (rank + 1) // world_size)
    chunks = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    ready = source.stack is not None and tuple(source.stack.shape[-2:]) == tuple(size) and crop == 1.0
    if ready:
        yield from (_from_stack(source, chunk) for chunk in chunks)
        return
    bad: list[Bad] = []
    workers = fitting(workers, batch_size * source.channels * size[0] * size[1] * source.dtype.itemsize, world_size)
    maker = _EvalBatches(EvalSet(source, size, crop), chunks)
    for images, labels_B, indices_B, unreadable in in_workers(maker, workers):
        bad += unreadable
        if len(indices_B):
            yield images, labels_B, indices_B
    if bad:
        _, where, reason = bad[0]
        more = ", ..." if len(bad) > 1 else ""
        if whole and len(bad) == len(share) and world_size == 1:  # of several ranks, others may have seen some
            raise UserError(f"data: no image of '{source.name}' can be read; the first, {where}: {reason}")
        say(f"warning: {len(bad)} image(s) of '{source.name}' left out, cannot be read: {where} ({reason}){more}")


def _from_stack(source: Source, chunk: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert source.stack is not None
    labels_N = source.labels()
    labels_B = torch.full((len(chunk),), NO_LABEL)
    if labels_N is not None:
        labels_B = torch.from_numpy(labels_N[chunk.start : chunk.stop])
    return source.stack[chunk.start : chunk.stop], labels_B, torch.arange(chunk.start, chunk.stop)


class _EvalBatches(Dataset):
    """Whole batches as items: (images, labels, indices, bad ones)."""

    def __init__(self, images: EvalSet, chunks: list[range]):
        self.images, self.chunks = images, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Bad]]:
        images, labels, indices, bad = [], [], [], []
        for position in self.chunks[index]:
            try:
                image_CHW, label, _ = self.images[position]
            except BadImage as error:
                bad.append((position, error.where, error.reason))
                continue
            images.append(image_CHW)
            labels.append(label)
            indices.append(position)
        stacked = torch.stack(images) if images else torch.empty(0)
        return stacked, torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64), bad
