"""Semantic segmentation from a frozen model's patches: from settings to what is written, as in evaluate.py."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_sd.data.masks import MaskedImages, masked_batches
from dino_sd.distributed import all_gather_rows, rank, setup, world_size
from dino_sd.embed import extractor
from dino_sd.errors import UserError
from dino_sd.evaluator_config import SegmentationSettings
from dino_sd.evaluators.segmentation import (
    fit_linear,
    knn_shares,
    miou_of,
    patch_shares,
    pixel_accuracy_of,
    pixel_counts,
    scores_of,
)
from dino_sd.features import own_size, prepare, workers_of
from dino_sd.intervals import bootstrap
from dino_sd.models.model import Model
from dino_sd.progress import progress
from dino_sd.settings import size_pair
from dino_sd.softmax import logits
from dino_sd.tables import INTERVAL, about, deliver, describe, percent

MOST_CLASSES = 4096  # more are a number that stands for none


def evaluate_segmentation(
    spec: str | Path | Model, settings: SegmentationSettings, json_only: bool = False
) -> dict[str, Any]:
    """k-NN and a linear classifier of patches, judged on pixels. Ranks share out the images."""
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    train, test = (MaskedImages(folder, model.channels) for folder in (settings.train, settings.test))
    size = size_pair(settings.size) if settings.size else model.size or own_size(train.images)
    patches = Patches(model, device, settings, size)
    classes = 1 + max(patches.largest_class(part) for part in (train, test))
    if classes < 2:
        raise UserError(
            f"segmentation: beside ignore={settings.ignore} the masks hold the class 0 alone, or nothing; if "
            f"{settings.ignore} is a class, set ignore to a number that none is"
        )
    if classes > MOST_CLASSES:
        raise UserError(
            f"segmentation: the masks hold class {classes - 1:,}; expected 0 to {MOST_CLASSES - 1:,}; if it stands for "
            f"none, set ignore={classes - 1}"
        )
    train_MD, shares_MC, learned_from = patches.sample(train, classes)
    if not len(train_MD):
        raise UserError(f"train={settings.train}: no mask can be read, or every pixel is ignored ({settings.ignore})")
    weight_CE, l2 = fit_linear(train_MD, shares_MC, settings.l2, settings.seed)
    k = min(settings.k, len(train_MD))
    train_MD, shares_MC, weight_CE = train_MD.to(device), shares_MC.to(device), weight_CE.float().to(device)
    counts: dict[str, list[Tensor]] = {"knn": [], "linear": []}
    with progress("segmentation (test)") as step:
        done = 0
        for features_NPD, masks_NHW in patches(test):
            flat_ND = features_NPD.flatten(0, 1)
            said = {
                "knn": knn_shares(train_MD, shares_MC, flat_ND, k, settings.temperature),
                "linear": logits(weight_CE, flat_ND.to(device)).softmax(1),
            }
            for name, said_NC in said.items():
                said_NPC = said_NC.unflatten(0, (len(masks_NHW), -1))
                counts[name].append(pixel_counts(said_NPC, patches.grid, masks_NHW, settings.ignore))
            done += len(masks_NHW)
            step(done, len(test) // world_size())
    results, per_class, judged_on = [], {}, 0
    for name, parts in counts.items():
        ours_N3C = torch.cat(parts) if parts else torch.empty(0, 3, classes, dtype=torch.int64)
        counts_N3C = all_gather_rows(ours_N3C.to(device if device.type == "cuda" else "cpu")).cpu().numpy()
        row, per_class[name] = row_of(counts_N3C, test.name)
        judged_on = len(counts_N3C)
        results.append({"method": name} | ({"k": k} if name == "knn" else {"l2": l2}) | row)
    judged, learned = about(test, judged_on), about(train, learned_from)
    report = describe(
        "segmentation", model, size, settings, results, began, judged=judged, learned=learned, classes=classes
    )
    report |= {"iou_per_class": per_class, "train_patches": len(train_MD), "grid": patches.grid}
    deliver(report, model, settings.out, json_only)
    return report


def row_of(counts_N3C: np.ndarray, name: str) -> tuple[dict[str, Any], list[float | None]]:
    """(a row of scores with intervals over images, IoU of every class in percent)."""
    if not counts_N3C[:, 2].sum():
        raise UserError(f"test={name}: no pixel of its masks has a class")
    scores, flat_NX = scores_of(counts_N3C), counts_N3C.reshape(len(counts_N3C), -1).astype(np.float64)
    row = {
        "miou": scores.miou, "miou" + INTERVAL: percent(bootstrap(flat_NX, miou_of)),
        "pixel_accuracy": scores.pixel_accuracy,
        "pixel_accuracy" + INTERVAL: percent(bootstrap(flat_NX, pixel_accuracy_of)),
    }  # fmt: skip
    return row, [None if math.isnan(iou) else iou for iou in scores.iou_C.tolist()]


class Patches:
    """Patch features of masked images, in batches: never those of a whole set. grid: (rows, columns) of an image's."""

    def __init__(self, model: Model, device: torch.device, settings: SegmentationSettings, size: tuple[int, int]):
        self.settings, self.size, self.device = settings, size, device
        self.of = extractor(
            model.backbone, model.mean, model.std, device, settings.precision,
            lambda images: model.backbone(images).patches_NPD,
        )  # fmt: skip
        blank_1PD = self.of(torch.zeros(1, model.channels, *size, dtype=torch.uint8))
        self.grid, self.width = grid_of(blank_1PD.shape[1], size), blank_1PD.shape[2]

    def _batches(self, source: MaskedImages) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        workers = workers_of(self.settings, self.device, source.images)
        return masked_batches(source, self.size, self.settings.batch_size, workers, rank(), world_size())

    def __call__(self, source: MaskedImages) -> Iterator[tuple[Tensor, Tensor]]:
        """Of this rank's images, batch by batch: (features (N, P, D) float32, masks (N, H, W))."""
        for images, masks_NHW, _ in self._batches(source):
            yield self.of(images).float(), masks_NHW

    def largest_class(self, source: MaskedImages) -> int:
        """Over all ranks."""
        largest = 0
        for _, masks_NHW, _ in self._batches(source):
            known = masks_NHW[masks_NHW != self.settings.ignore]
            largest = max(largest, int(known.max()) if len(known) else 0)
        return int(all_gather_rows(torch.tensor([largest], device=self._place)).max())

    @property
    def _place(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def sample(self, source: MaskedImages, classes: int) -> tuple[Tensor, Tensor, int]:
        """(features_MD, shares_MC, images) of patches from all images alike, `settings.patches` at most, on all CPUs.

        Which ones is a function of the seed and of the image. Patches whose pixels are all ignored are none.
        """
        each = max(1, self.settings.patches // len(source))
        features, shares = [], []
        with progress("segmentation (train)") as step:
            for images, masks_NHW, indices_N in self._batches(source):
                features_NPD = self.of(images).float().cpu()
                shares_NPC = patch_shares(masks_NHW, self.grid, classes, self.settings.ignore)
                for one_PD, wanted_PC, index in zip(features_NPD, shares_NPC, indices_N.tolist(), strict=True):
                    known_P = wanted_PC.sum(1).nonzero()[:, 0].numpy()
                    generator = np.random.Generator(np.random.Philox(key=(self.settings.seed, index)))
                    chosen_M = torch.from_numpy(np.sort(generator.permutation(known_P)[:each]))
                    features.append(one_PD[chosen_M])
                    shares.append(wanted_PC[chosen_M])
                step(len(features), len(source) // world_size())
        rows = [torch.cat(features) if features else torch.empty(0, self.width)]
        rows.append(torch.cat(shares) if shares else torch.empty(0, classes))
        features_MD, shares_MC = (all_gather_rows(part.to(self._place)).cpu() for part in rows)
        most = self.settings.patches  # fewer than one an image
        seen = all_gather_rows(torch.tensor([len(features)], device=self._place)).sum()
        return features_MD[:most], shares_MC[:most], int(seen)


def grid_of(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many patches. Raises UserError where they do not divide the image evenly."""
    rows = round(math.sqrt(patches * size[0] / size[1]))
    if not rows or patches % rows:
        raise UserError(
            f"segmentation: {patches} patches of {size[0]} x {size[1]} pixels are no grid; set another size"
        )
    return rows, patches // rows
