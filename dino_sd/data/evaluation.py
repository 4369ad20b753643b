"""Images as evaluation sees them: resized and centre-cropped, nothing random."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from dino_sd.data.source import Source
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL


def resize_crop(image_CHW: torch.Tensor, size: tuple[int, int], crop: float) -> torch.Tensor:
    """The image resized, bicubic and antialiased, until its shorter side is size / crop, then its centre: uint8.

    size: (height, width) of the result in pixels. crop: share of the shorter side that is kept, e.g. 224 / 256.
    """
    height, width = image_CHW.shape[-2:]
    tall, wide = round(size[0] / crop), round(size[1] / crop)
    if tall * width >= wide * height:
        wide = max(wide, tall * width // height)
    else:
        tall = max(tall, wide * height // width)
    if (tall, wide) != (height, width):
        image_CHW = F.interpolate(image_CHW[None], (tall, wide), mode="bicubic", antialias=True)[0]
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    return image_CHW[:, top : top + size[0], left : left + size[1]].contiguous()


class EvalSet(Dataset):
    """A source as (uint8 image (C, H, W), label or -1, index) at one size. Raises UserError as the source does."""

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
    limit: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's contiguous share of the source, in order: (uint8 images (B, C, H, W), labels (B,), indices (B,)).

    Labels are -1 where there are none. limit: only the first so many images. Shares differ by at most one image.
    Raises UserError where an image cannot be read.
    """
    count = len(source) if limit is None else min(limit, len(source))
    share = range(count * rank // world_size, count * (rank + 1) // world_size)
    chunks = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    ready = source.stack is not None and tuple(source.stack.shape[-2:]) == tuple(size) and crop == 1.0
    if ready:
        yield from (_from_stack(source, chunk) for chunk in chunks)
        return
    maker = _EvalBatches(EvalSet(source, size, crop), chunks)
    for made in DataLoader(maker, batch_size=None, num_workers=workers, generator=torch.Generator()):
        if isinstance(made, str):
            raise UserError(made)
        yield tuple(made)  # the loader makes lists of tuples


def _from_stack(source: Source, chunk: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert source.stack is not None
    labels_N = source.labels()
    labels_B = torch.full((len(chunk),), NO_LABEL)
    if labels_N is not None:
        labels_B = torch.from_numpy(labels_N[chunk.start : chunk.stop])
    return source.stack[chunk.start : chunk.stop], labels_B, torch.arange(chunk.start, chunk.stop)


class _EvalBatches(Dataset):
    """Whole batches as items, so that an error comes back from a worker as its message alone."""

    def __init__(self, images: EvalSet, chunks: list[range]):
        self.images, self.chunks = images, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...] | str:
        try:
            images, labels, indices = zip(*(self.images[i] for i in self.chunks[index]), strict=True)
        except UserError as error:
            return str(error)
        return torch.stack(images), torch.tensor(labels), torch.tensor(indices)
