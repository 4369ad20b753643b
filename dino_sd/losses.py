"""What several terms are made of: cross-entropy with labels, and divergence from a softened teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_sd.shapes import NO_LABEL


def label_losses(logits_BC: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each image, (B,) in nats; 0 where there is no label.

    labels: int64 (B,), -1 for none, or probabilities (B, C). smoothing: share of the target that is spread evenly.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits_BC, labels, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction="none")
    return F.cross_entropy(logits_BC, labels.to(logits_BC.dtype), label_smoothing=smoothing, reduction="none")


def label_loss(logits_BC: Tensor, labels: Tensor, smoothing: float = 0.0, labelled: float = 1.0) -> Tensor:
    """Mean of `label_losses` over the images that have a label.

    labelled: their share of the set that batches are drawn from. The sum is divided by the number expected in a batch,
    not by the number found: then no image weighs more for having come with few others, and a batch is the sum of its
    parts, on however many ranks.
    """
    return label_losses(logits_BC, labels, smoothing).sum() / (len(logits_BC) * labelled)


def softened_kl(student_logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)): its mean over images, in nats.

    The gradient of a softened softmax shrinks as 1 / T^2, hence the factor (Hinton et al. 2015). The teacher's side
    gets no gradient. Any dimensions before the last are images. Raises ValueError when T <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected above 0")
    teacher = (teacher_logits_BC.detach() / temperature).log_softmax(-1)
    student = (student_logits_BC / temperature).log_softmax(-1)
    divergence = F.kl_div(student.flatten(0, -2), teacher.flatten(0, -2), log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def taught_loss(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    labels: Tensor | None,
    *,
    label_share: float,
    temperature: float,
    labelled: float = 1.0,
) -> Tensor:
    """label_share * CE(labels) + (1 - label_share) * T^2 * KL(teacher || student), a scalar in nats."""
    loss = (1 - label_share) * softened_kl(student_logits_BC, teacher_logits_BC, temperature)
    if labels is None or not label_share:
        return loss
    return loss + label_share * label_loss(student_logits_BC, labels, labelled=labelled)


def of_views(labels: Tensor | None, views: int) -> Tensor | None:
    """Labels of `views` views, view after view."""
    return None if labels is None else labels.repeat(views, *[1] * (labels.ndim - 1))


@torch.no_grad()
def hits(logits_BC: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled images whose likeliest class is their label (the likeliest one, of mixed labels)."""
    own_B = labels if labels.ndim == 1 else labels.argmax(-1)
    known = own_B != NO_LABEL
    right = (logits_BC.argmax(-1) == own_B) & known
    return right.sum() / known.sum().clamp(min=1)
