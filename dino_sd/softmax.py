"""Multinomial logistic regression with an L2 penalty: convex, so that the result is a function of the data alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 10  # one row in so many judges the penalties
_ROWS = 32768  # at a time, so that no matrix of all images by all classes is held


def fit_softmax(
    x_ND: Tensor, targets: Tensor, classes: int, l2: float, first: Tensor | None = None, most_steps: int = 1000
) -> Tensor:
    """weight_CE, E = D + 1, whose last column is the bias: the minimum of mean cross-entropy + l2 / 2 * |weight|^2.

    x_ND: centred, float64 is what the tolerance (1e-6) is made for. targets: labels, int64 (N,), or probabilities
    (N, C). l2: above 0. The bias is not penalised. first: weight_CE to start from. L-BFGS (Liu and Nocedal 1989) with a
    line search that satisfies the strong Wolfe conditions, on the features' device.
    """
    # In the covariance's axes, each stretched so that all curve alike where the classes are equally likely: on
    # features with a few strong directions this takes a fifth of the steps.
    variance_D, axes_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    stretch_D = (variance_D.clamp_(min=0) * (1 - 1 / classes) / classes + l2).rsqrt()
    x_ND = x_ND @ (axes_DD * stretch_D)
    weight_CE = x_ND.new_zeros(classes, x_ND.shape[1] + 1)
    if first is not None:
        weight_CE[:, :-1], weight_CE[:, -1] = first[:, :-1] @ axes_DD / stretch_D, first[:, -1]
    weight_CE.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight_CE], max_iter=most_steps, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    @torch.no_grad()
    def objective() -> Tensor:
        inner_CD, bias_C = weight_CE[:, :-1], weight_CE[:, -1]
        gradient_CE = torch.zeros_like(weight_CE)
        total = x_ND.new_zeros(())
        for start in range(0, len(x_ND), _ROWS):
            x_BD, wanted = x_ND[start : start + _ROWS], targets[start : start + _ROWS]
            wanted_BC = F.one_hot(wanted, classes).to(x_BD) if wanted.ndim == 1 else wanted.to(x_BD)
            log_probs_BC = torch.addmm(bias_C, x_BD, inner_CD.T).log_softmax(1)
            total -= (wanted_BC * log_probs_BC).sum()
            error_BC = log_probs_BC.exp_().sub_(wanted_BC)
            gradient_CE[:, :-1].addmm_(error_BC.T, x_BD)
            gradient_CE[:, -1].add_(error_BC.sum(0))
        gradient_CE /= len(x_ND)
        gradient_CE[:, :-1] += l2 * inner_CD * stretch_D.square()
        weight_CE.grad = gradient_CE
        return total / len(x_ND) + l2 / 2 * (inner_CD * stretch_D).square().sum()

    optimizer.step(objective)
    found_CE = weight_CE.detach()
    return torch.cat([(found_CE[:, :-1] * stretch_D) @ axes_DD.T, found_CE[:, -1:]], 1)


def fit_best(
    x_ND: Tensor,
    targets: Tensor,
    classes: int,
    l2: Sequence[float],
    score: Callable[[Tensor, Tensor], float],
    seed: int = 0,
) -> tuple[Tensor, float, dict[float, float]]:
    """(weight_CE for x_ND as it is, the penalty taken, {penalty: score on the held-out rows}).

    The penalty is that of rows centred on their mean (which the bias makes up for) and divided by one number, the root
    of their mean variance, so that it means the same for every model. Of several, the one with the highest
    score(logits, targets) on a tenth of the rows is taken (of equal ones the largest; where there are not ten rows the
    middle one) and fitted again on all of them. float64, on the CPU.
    """
    x_ND, targets = x_ND.cpu().double(), targets.cpu()
    center_D = x_ND.mean(0)
    x_ND = x_ND - center_D
    scale = x_ND.square().mean().sqrt().clamp_(min=1e-12)
    x_ND /= scale
    penalties = sorted({float(penalty) for penalty in l2}, reverse=True)
    best, held_out = penalties[len(penalties) // 2], {}
    held = len(x_ND) // HELD_OUT
    if len(penalties) > 1 and held > 0:
        order = np.random.Generator(np.random.Philox(key=(seed, 1))).permutation(len(x_ND))
        held_N, kept_N = torch.from_numpy(order).tensor_split([held])
        kept_ND, kept_targets, weight_CE = x_ND[kept_N], targets[kept_N], None
        for penalty in penalties:  # each starts where the last one ended
            weight_CE = fit_softmax(kept_ND, kept_targets, classes, penalty, weight_CE)
            held_out[penalty] = score(logits(weight_CE, x_ND[held_N]), targets[held_N])
        best = max(penalties, key=lambda penalty: held_out[penalty])
    weight_CE = fit_softmax(x_ND, targets, classes, best)
    inner_CD = weight_CE[:, :-1] / scale
    bias_C = weight_CE[:, -1] - inner_CD @ center_D
    return torch.cat([inner_CD, bias_C[:, None]], 1), best, held_out


def logits(weight_CE: Tensor, x_ND: Tensor) -> Tensor:
    """(N, C)."""
    return torch.addmm(weight_CE[:, -1], x_ND, weight_CE[:, :-1].T)
