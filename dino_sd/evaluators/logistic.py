"""Multinomial logistic regression on frozen features: no learning rate, no schedule, one answer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.softmax import fit_best, logits

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class LogisticResult(NamedTuple):
    """top1, top5: percent on the test set. l2: the penalty it was reached with. held_out: top-1 of each penalty."""

    top1: float
    top5: float
    l2: float
    held_out: dict[float, float]


def logistic_regression(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    *,
    classes: int,
    l2: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> LogisticResult:
    """Accuracy of the minimum of mean cross-entropy + l2 / 2 * |weight|^2, computed in float64 on the CPU.

    How features are scaled and one of several penalties is chosen: `softmax.fit_best`, by top-1 on a tenth of the
    training set. The test set has no say. Raises UserError on missing labels and features that are not finite.
    """
    for name, features_ND, labels_N in (("train", train_ND, train_labels_N), ("test", test_ND, test_labels_N)):
        if len(features_ND) == 0:
            raise UserError(f"logistic: the {name} set has no images")
        if bool((labels_N < 0).any()):
            raise UserError(f"logistic: the {name} set has images without a label; it needs one for every image")
        if not bool(torch.isfinite(features_ND.sum(1, dtype=torch.float32)).all()):
            raise UserError(f"logistic: {name} features hold NaN or infinity; the model is broken or diverged")
    train_labels_N, test_labels_N = train_labels_N.cpu(), test_labels_N.cpu()
    weight_CE, best, held_out = fit_best(
        train_ND, train_labels_N, classes, l2, lambda said_NC, labels_N: top(said_NC, labels_N)[0], seed
    )
    top1, top5 = top(logits(weight_CE, test_ND.cpu().double()), test_labels_N)
    return LogisticResult(top1, top5, best, held_out)


def top(logits_NC: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """(top1, top5) in percent; among equal logits the lower class counts as likelier."""
    own_N1 = logits_NC.gather(1, labels_N[:, None])
    lower_NC = torch.arange(logits_NC.shape[1]) < labels_N[:, None]
    place_N = ((logits_NC > own_N1) | ((logits_NC == own_N1) & lower_NC)).sum(1)
    return 100 * (place_N < 1).double().mean().item(), 100 * (place_N < 5).double().mean().item()
