"""Semantic segmentation from frozen patch features: each patch says what classes its pixels have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sd.nearest import nearest
from dino_sd.softmax import fit_best

_ROWS = 1024  # patches that look for neighbours at a time


class SegmentationScores(NamedTuple):
    """Percent. iou_C: intersection over union of each class over all images, NaN where it neither is nor is said.

    miou: their mean.
    """

    miou: float
    pixel_accuracy: float
    iou_C: np.ndarray


def patch_shares(masks_NHW: Tensor, grid: tuple[int, int], classes: int, ignore: int) -> Tensor:
    """(N, P, C) float32: the share that each class has of a patch's pixels; rows of zeros where all are ignored.

    masks_NHW: int64, classes or `ignore`. grid: (rows, columns) of patches that the image is divided into.
    """
    count, height, width = masks_NHW.shape
    rows = torch.arange(height) * grid[0] // height
    columns = torch.arange(width) * grid[1] // width
    patches = grid[0] * grid[1]
    place_NHW = rows[:, None] * grid[1] + columns + torch.arange(count)[:, None, None] * patches
    known_NHW = masks_NHW != ignore
    flat = (place_NHW * classes + masks_NHW)[known_NHW]
    pixels_NPC = torch.bincount(flat, minlength=count * patches * classes).view(count, patches, classes).float()
    return pixels_NPC / pixels_NPC.sum(2, keepdim=True).clamp_(min=1)


@torch.inference_mode()
def knn_shares(
    train_MD: Tensor, shares_MC: Tensor, patches_ND: Tensor, k: int, temperature: float, train_chunk: int = 8192
) -> Tensor:
    """(N, C): what the k nearest training patches by cosine similarity say, weighted by exp(similarity / T)."""
    said = []
    for start in range(0, len(patches_ND), _ROWS):
        queries_ND = F.normalize(patches_ND[start : start + _ROWS].to(train_MD), dim=1)
        similarity_NK, index_NK = nearest(train_MD, queries_ND, k, train_chunk)
        weight_NK = (similarity_NK / temperature).softmax(1)
        said.append(torch.einsum("nk,nkc->nc", weight_NK, shares_MC[index_NK].to(weight_NK)))
    return torch.cat(said)


def fit_linear(patches_MD: Tensor, shares_MC: Tensor, l2: Sequence[float], seed: int = 0) -> tuple[Tensor, float]:
    """(weight_CE, l2) of a linear classifier of patches and its penalty, as of `softmax.fit_best`.

    Its targets are the shares of pixels: cross-entropy over pixels whose logits are their patch's.
    """

    def score(said_MC: Tensor, wanted_MC: Tensor) -> float:
        return (wanted_MC * said_MC.log_softmax(1)).sum().item()

    weight_CE, best, _ = fit_best(patches_MD, shares_MC, shares_MC.shape[1], l2, score, seed)
    return weight_CE, best


@torch.inference_mode()
def pixel_counts(said_NPC: Tensor, grid: tuple[int, int], masks_NHW: Tensor, ignore: int) -> Tensor:
    """(N, 3, C) int64: of each image and class, pixels that are it and are called it, that are called it, that are it.

    said_NPC: scores of the patches; they are enlarged bilinearly to the size of the mask, and each pixel is called what
    scores highest there. Ignored pixels are not counted.
    """
    classes = said_NPC.shape[2]
    counts = []
    for said_PC, mask_HW in zip(said_NPC, masks_NHW, strict=True):  # one at a time: C x H x W is large
        map_1CHW = said_PC.float().T.view(1, classes, *grid)
        called_HW = F.interpolate(map_1CHW, mask_HW.shape, mode="bilinear", align_corners=False)[0].argmax(0).cpu()
        called, true = called_HW[mask_HW != ignore], mask_HW[mask_HW != ignore]
        counts.append(torch.stack([torch.bincount(x, minlength=classes) for x in (true[called == true], called, true)]))
    return torch.stack(counts)


def miou_of(sums_R3C: np.ndarray) -> np.ndarray:
    """(R,): the mean IoU, 0 to 1, of sums of `pixel_counts` over images, (R, 3 * C) or (R, 3, C)."""
    both_RC, called_RC, true_RC = np.moveaxis(sums_R3C.reshape(len(sums_R3C), 3, -1), 1, 0)
    union_RC = called_RC + true_RC - both_RC
    known_RC = union_RC > 0
    iou_RC = np.divide(both_RC, union_RC, out=np.zeros_like(union_RC, dtype=np.float64), where=known_RC)
    return iou_RC.sum(1) / np.maximum(known_RC.sum(1), 1)


def pixel_accuracy_of(sums_R3C: np.ndarray) -> np.ndarray:
    """(R,): the share of pixels called what they are."""
    both_RC, _, true_RC = np.moveaxis(sums_R3C.reshape(len(sums_R3C), 3, -1), 1, 0)
    return both_RC.sum(1) / np.maximum(true_RC.sum(1), 1)


def scores_of(counts_N3C: np.ndarray) -> SegmentationScores:
    """The scores of all images together."""
    sums_13C = counts_N3C.sum(0, keepdims=True).astype(np.float64)
    both_C, called_C, true_C = sums_13C[0]
    union_C = called_C + true_C - both_C
    iou_C = np.divide(both_C, union_C, out=np.full(len(union_C), np.nan), where=union_C > 0)
    miou, accuracy = (100 * float(score(sums_13C)[0]) for score in (miou_of, pixel_accuracy_of))
    return SegmentationScores(miou, accuracy, 100 * iou_C)
