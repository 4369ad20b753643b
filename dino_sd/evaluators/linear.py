"""Linear probe on frozen features, by the published protocol (Caron et al. 2021, appendix F.2)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_sd.errors import UserError

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
HELD_OUT = 10  # one train image in so many judges the learning rates

FeaturesOfEpoch = Tensor | Callable[[int], Tensor]


class LinearResult(NamedTuple):
    """top1, top5: percent on the test set. choice, lr: features and rate that it was reached with.

    losses: mean training loss of each epoch. held_out: {choice: {rate: top-1}} on the held-out train images; empty when
    there was nothing to choose. weight_CD, bias_C: the probe, for the columns of its choice.
    """

    top1: float
    top5: float
    choice: str
    lr: float
    losses: list[float]
    held_out: dict[str, dict[float, float]]
    weight_CD: Tensor
    bias_C: Tensor


def linear_probe(
    features_of_epoch: FeaturesOfEpoch,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    *,
    classes: int | None = None,
    choices: Mapping[str, Sequence[slice]] | None = None,
    epochs: int = 100,
    batch_size: int = 1024,
    lr: float | Sequence[float] = RATES,
    momentum: float = 0.9,
    seed: int = 0,
) -> LinearResult:
    """Accuracy of a linear classifier on frozen features.

    features_of_epoch: train_ND, or a function of the epoch that gives it (augmented anew), rows as train_labels_N.
    Published settings: SGD with momentum, no weight decay, cosine to 0 that moves once an epoch, 100 epochs of
    batches of 1024, weights from a normal of std 0.01. lr is for 256 images a step: the rate is lr * batch / 256, with
    the batch that is really used where the train set is smaller. choices: columns of the features that a probe may
    look at, by name (blocks and poolings; default: all columns). Of several rates and choices, all trained at once as
    by Oquab et al. 2023, the best on a tenth of the train set is taken, with which the probe is then trained on all of
    it; the test set has no say. Float32, on the features' device. Order and weights are functions of the seed and the
    epoch alone. Raises UserError on missing labels and broken features.
    """
    train_ND = features_of_epoch if isinstance(features_of_epoch, Tensor) else features_of_epoch(0)
    classes = check(train_ND, train_labels_N, test_ND, test_labels_N, classes)
    device, choices = train_ND.device, choices or {"features": [slice(0, train_ND.shape[1])]}
    train_labels_N, test_labels_N = train_labels_N.to(device), test_labels_N.to(device)
    rates = [float(rate) for rate in ([lr] if isinstance(lr, (int, float)) else lr)]
    rows_N = torch.arange(len(train_labels_N), device=device)

    def trained(
        rows_N: Tensor, choices: Mapping[str, Sequence[slice]], rates: Sequence[float]
    ) -> tuple[list["Probes"], list[float]]:
        probes = [Probes(columns, classes, rates, momentum, seed, device) for columns in choices.values()]
        return probes, fit(probes, features_of_epoch, train_labels_N, rows_N, epochs, batch_size, seed)

    held_out: dict[str, dict[float, float]] = {}
    held = len(rows_N) // HELD_OUT
    if len(rates) * len(choices) > 1 and held > 0:
        held_N, kept_N = torch.from_numpy(order_of(len(rows_N), seed, -1)).to(device).tensor_split([held])
        for name, probes in zip(choices, trained(kept_N, choices, rates)[0], strict=True):
            scores = probes.accuracy(train_ND[held_N], train_labels_N[held_N])
            held_out[name] = {rate: top1 for rate, (top1, _) in zip(rates, scores, strict=True)}
    pairs = [(name, rate) for name in choices for rate in rates]
    choice, best = max(pairs, key=lambda pair: held_out.get(pair[0], {}).get(pair[1], 0.0))
    (probe,), losses = trained(rows_N, {choice: choices[choice]}, [best])
    ((top1, top5),) = probe.accuracy(test_ND.to(device), test_labels_N)
    return LinearResult(
        top1, top5, choice, best, losses, held_out, probe.weight_DC.T.contiguous(), probe.bias_C
    )  # fmt: skip


def order_of(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the train images in an epoch (-1: which of them are held out), int64."""
    return np.random.Generator(np.random.Philox(key=(seed, epoch + 2))).permutation(images)


@torch.inference_mode()
def fit(
    probes: Sequence["Probes"],
    features_of_epoch: FeaturesOfEpoch,
    labels_N: Tensor,
    rows_N: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
) -> list[float]:
    """Mean training loss (over rates and choices) of each epoch. rows_N: the train images to learn from.

    All probes learn from the same batches, which are put together once.
    """
    batch_size = min(batch_size, len(rows_N))
    losses = []
    for epoch in range(epochs):
        order_N = torch.from_numpy(order_of(len(rows_N), seed, epoch)).to(rows_N.device)
        train_ND = features_of_epoch if isinstance(features_of_epoch, Tensor) else features_of_epoch(epoch)
        decay = batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        total = torch.zeros((), device=train_ND.device)
        for batch_B in rows_N[order_N].split(batch_size):
            features_BD, labels_B = train_ND[batch_B], labels_N[batch_B]
            for probe in probes:
                total += probe.step(features_BD, labels_B, decay)
        losses.append(total / (len(rows_N) * len(probes)))
    return torch.stack(losses).tolist() if losses else []


def joined(columns: Sequence[slice]) -> list[slice]:
    """The same columns, neighbouring slices made one."""
    parts: list[slice] = []
    for part in columns:
        if parts and parts[-1].stop == part.start:
            parts[-1] = slice(parts[-1].start, part.stop)
        else:
            parts.append(part)
    return parts


class Probes:
    """One linear classifier for each learning rate, side by side: the columns of one matrix, rate-major.

    columns: of the features that they look at. The gradient of softmax cross-entropy is written out: for matrices this
    small autograd and an optimizer's bookkeeping cost more than the arithmetic.
    """

    def __init__(
        self,
        columns: Sequence[slice],
        classes: int,
        rates: Sequence[float],
        momentum: float,
        seed: int,
        device: torch.device,
    ):
        self.columns, self.classes, self.momentum = joined(columns), classes, momentum
        width = sum(part.stop - part.start for part in self.columns)
        first_DC = np.random.Generator(np.random.Philox(key=(seed, 0))).normal(0, 0.01, (width, classes))
        self.weight_DC = torch.tensor(first_DC, dtype=torch.float32, device=device).repeat(1, len(rates))
        self.bias_C = torch.zeros(len(rates) * classes, device=device)
        self.rate_C = torch.tensor(rates, device=device).float().repeat_interleave(classes)
        self.velocity_DC, self.bias_velocity_C = torch.zeros_like(self.weight_DC), torch.zeros_like(self.bias_C)

    def seen(self, features_BD: Tensor) -> Tensor:
        """The columns that they look at; a view where these lie together."""
        parts = [features_BD[:, part] for part in self.columns]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).float()

    def step(self, features_BD: Tensor, labels_B: Tensor, decay: float) -> Tensor:
        """One step of SGD with `decay` times each rate; the sum of the images' losses before it, on the device."""
        x_BD, rate_C = self.seen(features_BD), self.rate_C * decay
        label_BR1 = labels_B.view(-1, 1, 1).expand(-1, len(self.bias_C) // self.classes, 1)
        log_probs_BRC = torch.addmm(self.bias_C, x_BD, self.weight_DC).unflatten(1, (-1, self.classes)).log_softmax(2)
        loss = -log_probs_BRC.gather(2, label_BR1).mean(1).sum()
        error_BRC = log_probs_BRC.exp_()
        error_BRC.scatter_add_(2, label_BR1, error_BRC.new_full(label_BR1.shape, -1.0))
        error_BC = error_BRC.flatten(1)
        self.velocity_DC.addmm_(x_BD.T, error_BC, beta=self.momentum, alpha=1 / len(x_BD))
        self.bias_velocity_C.mul_(self.momentum).add_(error_BC.mean(0))
        self.weight_DC.addcmul_(self.velocity_DC, rate_C, value=-1)
        self.bias_C.addcmul_(self.bias_velocity_C, rate_C, value=-1)
        return loss

    @torch.inference_mode()
    def accuracy(self, test_ND: Tensor, labels_N: Tensor, chunk: int = 16384) -> list[tuple[float, float]]:
        """(top1, top5) in percent of every rate; equal logits are sorted by class index."""
        class_C = torch.arange(self.classes, device=test_ND.device)
        places = []
        for start in range(0, len(test_ND), chunk):
            logits_NC = torch.addmm(self.bias_C, self.seen(test_ND[start : start + chunk]), self.weight_DC)
            logits_NRC = logits_NC.unflatten(1, (-1, self.classes))
            own_N11 = labels_N[start : start + chunk].view(-1, 1, 1)
            own_logit_NR1 = logits_NRC.gather(2, own_N11.expand(-1, logits_NRC.shape[1], 1))
            # counted from behind, so that a rate that diverged to NaN is wrong and not right
            behind_NRC = (logits_NRC < own_logit_NR1) | ((logits_NRC == own_logit_NR1) & (class_C >= own_N11))
            places.append(self.classes - behind_NRC.sum(2))
        place_NR = torch.cat(places)
        first_R, fifth_R = (100 * (place_NR < n).cpu().double().mean(0) for n in (1, 5))
        return list(zip(first_R.tolist(), fifth_R.tolist(), strict=True))


def check(train_ND: Tensor, train_labels_N: Tensor, test_ND: Tensor, test_labels_N: Tensor, classes: int | None) -> int:
    """Refuses what a probe cannot work with; returns the number of classes."""
    if train_ND.shape[1] != test_ND.shape[1]:
        raise UserError(f"linear: train features are {train_ND.shape[1]} wide, test features {test_ND.shape[1]}")
    for name, features_ND, labels_N in (("train", train_ND, train_labels_N), ("test", test_ND, test_labels_N)):
        if len(features_ND) == 0:
            raise UserError(f"linear: the {name} set has no images")
        if len(features_ND) != len(labels_N):
            raise UserError(f"linear: {len(features_ND)} {name} features but {len(labels_N)} labels")
        if bool((labels_N < 0).any()):
            raise UserError(f"linear: the {name} set has images without a label; the probe needs one for every image")
        if not bool(torch.isfinite(features_ND.sum(1, dtype=torch.float32)).all()):
            raise UserError(f"linear: {name} features hold NaN or infinity; the model is broken or diverged")
    found = 1 + max(int(train_labels_N.max()), int(test_labels_N.max()))
    if classes is not None and classes < found:
        raise UserError(f"linear: label {found - 1} found, but the data has {classes} classes (0 to {classes - 1})")
    return classes or found
