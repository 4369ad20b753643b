"""Accuracy of classifiers on labelled images, alone and as an ensemble."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_sd.errors import UserError


class Accuracy(NamedTuple):
    """Percent. per_class: top-1 of each class, None where the set has no image of it."""

    top1: float
    top5: float
    per_class: list[float | None]


@torch.inference_mode()
def accuracy(logits_NC: Tensor, labels_N: Tensor) -> Accuracy:
    """logits_NC: or probabilities, or anything that orders classes. labels_N: int64; every image needs one.

    Among equal logits the lower class counts as likelier. Raises UserError on missing labels, labels beyond the
    classes, and logits that are not finite.
    """
    count, classes = logits_NC.shape
    labels_N = labels_N.to(logits_NC.device)
    if count == 0:
        raise UserError("evaluate: the test set has no images")
    if int(labels_N.min()) < 0:
        raise UserError("evaluate: some test images have no label; judge on a fully labelled set")
    if int(labels_N.max()) >= classes:
        raise UserError(f"evaluate: the test set has class {int(labels_N.max())}, the model knows {classes} classes")
    if not bool(logits_NC.isfinite().all()):
        raise UserError("evaluate: the model's outputs are not finite; its training diverged")
    best_NK = logits_NC.sort(dim=1, descending=True, stable=True).indices[:, : min(5, classes)]
    right_NK = best_NK == labels_N[:, None]
    images_C = torch.bincount(labels_N, minlength=classes)
    right_C = torch.bincount(labels_N, weights=right_NK[:, 0].double(), minlength=classes)
    top1, top5 = (100 * share.double().mean().item() for share in (right_NK[:, 0], right_NK.any(1)))
    per_class = [
        100 * right / images if images else None
        for right, images in zip(right_C.tolist(), images_C.tolist(), strict=True)
    ]
    return Accuracy(top1, top5, per_class)


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The ensemble's probabilities, (N, C): the mean of its members'."""
    return torch.stack([logits_NC.double().softmax(-1) for logits_NC in logits]).mean(0)


def scores_of(logits: dict[str, Tensor], labels_N: Tensor) -> dict[str, Accuracy]:
    """Accuracy of each classifier of a network, and of all together ("ensemble") where there are several."""
    scores = {name: accuracy(logits_NC, labels_N) for name, logits_NC in logits.items()}
    if len(logits) > 1:
        scores["ensemble"] = accuracy(mean_probabilities(list(logits.values())), labels_N)
    return scores
