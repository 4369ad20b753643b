"""Folders of images and masks: every pixel has a class."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dino_sd.data.loader import fitting, in_workers
from dino_sd.data.resample import resize
from dino_sd.data.source import Bad, BadImage, open_source, short_hash
from dino_sd.distributed import say
from dino_sd.errors import UserError

_INDEXED = ("P", "L", "1", "I", "I;16")  # Pillow's names of images with one number a pixel


class MaskedImages:
    """Images of `folder`/images, each with the mask of the same name, but for its ending, in `folder`/masks.

    Raises UserError where one of the two folders is missing, or an image has no mask.
    """

    def __init__(self, folder: str, channels: int):
        root = Path(folder).expanduser()
        for part in ("images", "masks"):
            if not (root / part).is_dir():
                raise UserError(
                    f"data: '{folder}' has no folder {part}/; expected images/ and masks/ of the same names"
                )
        self.name, self.images = folder, open_source(str(root / "images"), channels)
        masks = {path.relative_to(root / "masks").with_suffix(""): path for path in (root / "masks").rglob("*.png")}
        self.masks = []
        for index in range(len(self.images)):
            stem = Path(self.images.path(index)).relative_to(root / "images").with_suffix("")
            if stem not in masks:
                raise UserError(f"data: {self.images.path(index)} has no mask; expected {root / 'masks' / stem}.png")
            self.masks.append(str(masks[stem]))

    def __len__(self) -> int:
        return len(self.masks)

    def fingerprint(self) -> str:
        return short_hash(self.images.fingerprint().encode(), "\n".join(self.masks).encode())

    def pair(self, index: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (C, H, W), squeezed to `size` without a cut, and mask (H, W), int64. Raises BadImage and UserError."""
        image_CHW, mask_HW = self.images.image(index), read_mask(self.masks[index])
        if mask_HW.shape != image_CHW.shape[1:]:
            raise UserError(
                f"{self.masks[index]}: {mask_HW.shape[1]} x {mask_HW.shape[0]} pixels, but its image has "
                f"{image_CHW.shape[2]} x {image_CHW.shape[1]}"
            )
        rows, columns = ((np.arange(new) + 0.5) * old // new for new, old in zip(size, mask_HW.shape, strict=True))
        mask_HW = mask_HW[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
        return resize(image_CHW, size), torch.from_numpy(mask_HW)


def read_mask(path: str) -> np.ndarray:
    """Class numbers, int64 (H, W); of a palette image its indices. Raises BadImage, also where it is a colour image."""
    try:
        with Image.open(path) as image:
            if image.mode not in _INDEXED:
                raise BadImage(path, f"is a mask of kind {image.mode}; expected one class number a pixel, or a palette")
            return np.asarray(image).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(path, f"cannot be read ({error})") from None


def masked_batches(
    source: MaskedImages,
    size: tuple[int, int],
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's share, in order: (images (B, C, H, W) of the source's dtype, masks (B, H, W), indices (B,)).

    What cannot be read is left out, and said. Raises UserError on a mask that does not fit its image.
    """
    share = range(len(source) * rank // world_size, len(source) * (rank + 1) // world_size)
    chunks = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    item_bytes = batch_size * size[0] * size[1] * (8 + source.images.channels * source.images.dtype.itemsize)
    workers = fitting(workers, item_bytes, world_size)
    bad: list[Bad] = []
    for made in in_workers(_Pairs(source, size, chunks), workers):
        if isinstance(made, str):
            raise UserError(made)
        *batch, unreadable = made
        bad += unreadable
        if len(batch[0]):
            yield tuple(batch)
    if bad:
        _, where, reason = bad[0]
        more = ", ..." if len(bad) > 1 else ""
        say(f"warning: {len(bad)} image(s) of '{source.name}' left out: {where} ({reason}){more}")


class _Pairs(Dataset):
    """Whole batches as items; a UserError as its text, which from a worker would arrive with a traceback in it."""

    def __init__(self, source: MaskedImages, size: tuple[int, int], chunks: list[range]):
        self.source, self.size, self.chunks = source, size, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Bad]] | str:
        pairs, indices, bad = [], [], []
        for position in self.chunks[index]:
            try:
                pairs.append(self.source.pair(position, self.size))
                indices.append(position)
            except BadImage as error:
                bad.append((position, error.where, error.reason))
            except UserError as error:
                return str(error)
        images, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True)) if pairs else (torch.empty(0),) * 2
        return images, masks, torch.tensor(indices, dtype=torch.int64), bad
