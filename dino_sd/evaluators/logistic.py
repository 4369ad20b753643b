"""Multinomial logistic regression on frozen features: no learning rate, no schedule, one answer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.softmax import fit_softmax, logits

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 10  # one train image in so many judges the strengths


class LogisticResult(NamedTuple):
    """top1, top5: percent on the test set. l2: the strength it was reached with. held_out: top-1 of each strength."""

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
    l2: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> LogisticResult:
    """Accuracy of the minimum of mean cross-entropy + l2 / 2 * |weight|^2, computed in float64 on the CPU.

    Features are centred on the training set's mean (which the bias makes up for) and divided by one number, the root
    of their mean variance, so that a strength means the same for every model. Of several strengths, the best on a tenth
    of the training set is taken (of equal ones the strongest; without ten images the middle one), and fitted again on
    all of it. The test set has no say. Raises UserError on missing labels and features that are not finite.
    """
    for name, features_ND, labels_N in (("train", train_ND, train_labels_N), ("test", test_ND, test_labels_N)):
        if len(features_ND) == 0:
            raise UserError(f"logistic: the {name} set has no images")
        if bool((labels_N < 0).any()):
            raise UserError(f"logistic: the {name} set has images without a label; it needs one for every image")
        if not bool(torch.isfinite(features_ND.sum(1, dtype=torch.float32)).all()):
            raise UserError(f"logistic: {name} features hold NaN or infinity; the model is broken or diverged")
    center_D = train_ND.double().mean(0)
    scale = (train_ND.double() - center_D).square().mean().sqrt().clamp_(min=1e-12)
    train_ND, test_ND = ((x_ND.double() - center_D) / scale for x_ND in (train_ND, test_ND))
    strengths = sorted({float(strength) for strength in l2}, reverse=True)
    best, held_out = strengths[len(strengths) // 2], {}
    held = len(train_ND) // HELD_OUT
    if len(strengths) > 1 and held > 0:
        order = np.random.Generator(np.random.Philox(key=(seed, 1))).permutation(len(train_ND))
        held_N, kept_N = torch.from_numpy(order).tensor_split([held])
        weight_CE = None
        for strength in strengths:  # each starts from the last one's end: a path
            weight_CE = fit_softmax(train_ND[kept_N], train_labels_N[kept_N], classes, strength, weight_CE)
            held_out[strength] = top(logits(weight_CE, train_ND[held_N]), train_labels_N[held_N])[0]
        best = max(strengths, key=lambda strength: held_out[strength])
    weight_CE = fit_softmax(train_ND, train_labels_N, classes, best)
    top1, top5 = top(logits(weight_CE, test_ND), test_labels_N)
    return LogisticResult(top1, top5, best, held_out)


def top(logits_NC: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """(top1, top5) in percent; among equal logits the lower class counts as likelier."""
    own_N1 = logits_NC.gather(1, labels_N[:, None])
    lower_NC = torch.arange(logits_NC.shape[1]) < labels_N[:, None]
    place_N = ((logits_NC > own_N1) | ((logits_NC == own_N1) & lower_NC)).sum(1)
    return 100 * (place_N < 1).double().mean().item(), 100 * (place_N < 5).double().mean().item()
