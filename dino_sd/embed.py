"""Features of a whole source from a frozen backbone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino_sd.data.evaluation import eval_batches
from dino_sd.data.geometry import make_views
from dino_sd.data.loader import in_workers
from dino_sd.data.source import WHITE, Source
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.distributed import all_gather_rows, rank, world_size
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone, Features
from dino_sd.models.pixels import Pixels
from dino_sd.shapes import NO_LABEL

Pool = Literal["default", "cls", "mean", "cls+mean"]


def embed(
    backbone: Backbone | Pixels,
    source: Source,
    *,
    size: tuple[int, int],
    crop: float,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int = 256,
    workers: int = 0,
    precision: Literal["bf16", "fp32"] = "fp32",
    of: Callable[[Tensor], Tensor] | None = None,
    augment: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(features_ND float32, labels_N int64), both on the CPU and in the source's order; labels are -1 where none are.

    The backbone (on `device` already) runs in eval mode. Each rank works on its share and ends with everything.
    size: (height, width) in pixels; crop: share of the resized image that is kept; mean, std: per channel, pixels from
    0 to 1. of: what is to be had of a batch of normalised images, (N, D), such as logits; None: the model's own output.
    augment: (seed, epoch) of random resized crops and flips in place of the centre crop. progress: called with
    (images done, images in all) of this rank. Images that cannot be read are left out, and said (with augment, the next
    one stands in). Raises UserError where none can be read.
    """
    device = torch.device(device)
    features_of = extractor(backbone, mean, std, device, precision, of or (lambda images: backbone(images).pooled_ND))
    share = len(range(len(source) * rank() // world_size(), len(source) * (rank() + 1) // world_size()))
    if augment is None:
        batches = eval_batches(source, size, crop, batch_size, workers, rank(), world_size())
    else:
        batches = _augmented_batches(source, size, batch_size, workers, *augment)

    was_training = backbone.training
    backbone.eval()
    try:
        # the width, also for a rank that has no image
        blank_1CHW = torch.zeros(1, len(mean), *size, dtype=torch.uint8)
        features_ND = torch.empty(share, features_of(blank_1CHW).shape[1])
        labels_N, done = torch.empty(share, dtype=torch.int64), 0
        for images_BCHW, labels_B, _ in batches:
            part = slice(done, done + len(images_BCHW))
            features_ND[part], labels_N[part], done = features_of(images_BCHW), labels_B, part.stop
            if progress is not None:
                progress(done, share)
        features_ND, labels_N = features_ND[:done], labels_N[:done]
    finally:
        backbone.train(was_training)
    if world_size() == 1:
        return features_ND, labels_N
    # nccl gathers what is on the device, gloo what is on the CPU
    place = device if device.type == "cuda" else torch.device("cpu")
    features_ND, labels_N = all_gather_rows(features_ND.to(place)).cpu(), all_gather_rows(labels_N.to(place)).cpu()
    if not len(labels_N):
        raise UserError(f"data: no image of '{source.name}' can be read")
    return features_ND, labels_N


def extractor(
    backbone: Backbone | Pixels,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: Literal["bf16", "fp32"],
    of: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """A function from images as sources hold them, (N, C, H, W) on the CPU, to what `of` makes of normalised ones."""
    dtype = _dtype_of(backbone)
    mean_C11, std_C11 = (torch.tensor(list(x), device=device, dtype=dtype).view(-1, 1, 1) for x in (mean, std))

    @torch.inference_mode()
    def features_of(images_BCHW: Tensor) -> Tensor:
        white = WHITE[images_BCHW.dtype]
        images_BCHW = images_BCHW.to(device, non_blocking=True).to(dtype, copy=True)
        images_BCHW = images_BCHW.div_(white).sub_(mean_C11).div_(std_C11)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return of(images_BCHW)

    return features_of


class Parts:
    """What can be had of one pass, side by side: "block_3" (from 0), "mean" of the last patches, "pooled".

    names: in the order of the columns. From normalised images to (N, widths of all parts).
    """

    def __init__(self, backbone: Backbone | Pixels, names: Sequence[str]):
        self.backbone, self.names = backbone, list(names)
        self.layers = [int(name.removeprefix("block_")) for name in names if name.startswith("block_")]
        self.columns: dict[str, slice] = {}  # of each part, once it has been called

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        features = self.backbone(images_BCHW, self.layers)
        found = {f"block_{layer}": seen[0] for layer, seen in zip(self.layers, features.layers, strict=True)}
        found["pooled"] = features.pooled_ND
        if "mean" in self.names:
            found["mean"] = features.patches_NPD.mean(1)
        ends = np.cumsum([0] + [found[name].shape[1] for name in self.names]).tolist()
        self.columns = {name: slice(*pair) for name, *pair in zip(self.names, ends, ends[1:], strict=False)}
        return torch.cat([found[name] for name in self.names], 1)


def parts_of(backbone: Backbone | Pixels, blocks: int | None, pool: Pool) -> list[str]:
    """The parts that `pooled` concatenates for the last `blocks` blocks. Raises UserError where there are fewer."""
    heads = [f"block_{index}" for index in last_blocks(backbone, blocks)] or ["pooled"]
    return [*([] if pool == "mean" else heads), *(["mean"] if pool in ("mean", "cls+mean") else [])]


def pooled(features: Features, pool: Pool = "default") -> Tensor:
    """(N, D) of a batch. Blocks that were asked for are concatenated, in the order asked for.

    default, cls: the pooled output (class token, or the model's own pooling) of each; mean: the mean of the last one's
    patches; cls+mean: both, the published probe of ViT-B.
    """
    heads = [pooled_ND for pooled_ND, _ in features.layers] or [features.pooled_ND]
    patches_NPD = features.layers[-1][1] if features.layers else features.patches_NPD
    parts = [] if pool == "mean" else heads
    if pool in ("mean", "cls+mean"):
        parts = [*parts, patches_NPD.mean(1)]
    return torch.cat(parts, 1)


def last_blocks(backbone: Backbone | Pixels, count: int | None) -> tuple[int, ...]:
    """Indices of the last blocks, for `layers`. None: as published, four with a class token and the output without.

    Raises UserError where the model has fewer.
    """
    if count is None:
        count = min(4, backbone.depth) if backbone.blocks_have_class_token else 1
    if count > backbone.depth:
        raise UserError(f"blocks={count}, but model={backbone.name} has {backbone.depth}; use at most that")
    return () if count == 1 else tuple(range(backbone.depth - count, backbone.depth))


def _dtype_of(backbone: Backbone | Pixels) -> torch.dtype:
    return next((parameter.dtype for parameter in backbone.parameters()), torch.float32)


def _augmented_batches(
    source: Source, size: tuple[int, int], batch_size: int, workers: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in in_workers(_Augmented(source, size, batch_size, seed, epoch), workers):
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


class _Augmented(Dataset):
    """This rank's share as batches of one random view an image, by the published linear protocol."""

    def __init__(self, source: Source, size: tuple[int, int], batch_size: int, seed: int, epoch: int):
        count = len(source)
        share = np.arange(count * rank() // world_size(), count * (rank() + 1) // world_size())
        self.chunks = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        self.source, self.seed, self.epoch = source, seed, epoch
        self.spec = ViewSpec(
            (ViewGroup(1, size, (0.08, 1.0)),), source.channels, jitter_probability=0.0, grayscale=0.0
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor] | str:
        indices_B = self.chunks[index]
        try:
            views = make_views(self.source, self.spec, self.seed, self.epoch, indices_B)
        except UserError as error:  # its message alone: raised here it would arrive with a worker's traceback in it
            return str(error)
        labels_N = self.source.labels()
        labels_B = np.full(len(indices_B), NO_LABEL) if labels_N is None else labels_N[views.indices]
        return views.groups[0], torch.from_numpy(labels_B), torch.from_numpy(views.indices)
