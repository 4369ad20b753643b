"""Self-distillation with no labels (Caron et al. 2021): each student view predicts the teacher's other global views."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dino_sd import settings
from dino_sd.distributed import all_reduce_mean_
from dino_sd.errors import UserError
from dino_sd.models.heads import ProjectionHead
from dino_sd.schedule import Schedule
from dino_sd.term import Given, Objective, Seen, Term


class Settings(settings.Settings):
    weight: Annotated[settings.Curve, settings.between(0)] = Field(
        default_factory=lambda: settings.Curve(start=1, end=1), description="factor of this term in the loss"
    )
    prototypes: int = Field(default=65536, ge=2, description="outputs of the head")
    hidden: int = Field(default=2048, ge=1, description="width of the head's hidden layers")
    bottleneck: int = Field(default=256, ge=1, description="width before the prototypes")
    layers: int = Field(default=3, ge=1, description="linear layers before the prototypes")
    batch_norm: bool = Field(default=False, description="batch norm in the head")
    norm_last_layer: bool = Field(default=True, description="prototypes of fixed length 1; false learns their lengths")
    freeze_last_layer: settings.Duration = Field(default=0.01, description="prototypes do not move at first; duration")
    student_temperature: float = Field(default=0.1, gt=0, description="divides the student's logits")
    teacher_temperature: Annotated[settings.Curve, settings.between(0, open_low=True)] = Field(
        default_factory=lambda: settings.Curve(start=0.04, end=0.04), description="divides the teacher's centred logits"
    )
    center: bool = Field(default=True, description="subtract the centre from the teacher's logits")
    center_momentum: float = Field(default=0.9, ge=0, lt=1, description="share of the centre kept at each step")


class _CrossEntropy(torch.autograd.Function):
    """Sum over views written once: the targets of a student view are the teacher's other views added up.

    The gradient is made in the forward pass, view by view, so that at most one view's (B, K) lives in temporaries
    beside it; plain autograd would keep three arrays of all views.
    """

    @staticmethod
    def forward(ctx: Any, logits_VBK: Tensor, probs_GBK: Tensor, temperature: float) -> Tensor:
        (views, batch, _), n_global = logits_VBK.shape, len(probs_GBK)
        pairs = n_global * (views - 1)
        total_BK = probs_GBK.sum(0)
        grad_VBK = torch.empty_like(logits_VBK)
        scaled_BK = torch.empty_like(total_BK)  # one view at a time, in place
        loss = total_BK.new_zeros(())
        for v in range(views):
            others = n_global - (v < n_global)
            target_BK = total_BK - probs_GBK[v] if v < n_global else total_BK
            torch.div(logits_VBK[v], temperature, out=scaled_BK)
            largest_B1 = scaled_BK.amax(-1, keepdim=True)
            loss -= torch.dot(target_BK.flatten(), scaled_BK.flatten())
            sum_B1 = scaled_BK.sub_(largest_B1).exp_().sum(-1, keepdim=True)
            loss += others * (largest_B1 + sum_B1.log()).sum()
            factor = 1 / (temperature * batch * pairs)
            torch.mul(scaled_BK, others * factor / sum_B1, out=grad_VBK[v]).sub_(target_BK, alpha=factor)
        ctx.save_for_backward(grad_VBK)
        return loss / (batch * pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_VBK,) = ctx.saved_tensors
        return grad_VBK.mul_(grad), None, None  # in place: each graph is walked once


def dino_loss(student_logits_VBK: Tensor, teacher_probs_GBK: Tensor, student_temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy of every student view against every other global view's teacher.

    student_logits_VBK: V views, global ones first. teacher_probs_GBK: G <= V global views, rows sum to 1, no gradient.
    Returns a scalar in nats. Raises ValueError when V < 2: no pair is left.
    Caron et al. 2021, eq. 3.

    >>> student = torch.randn(4, 8, 16, requires_grad=True)
    >>> teacher = torch.softmax(torch.randn(2, 8, 16) / 0.04, -1)
    >>> dino_loss(student, teacher).backward()
    """
    if len(student_logits_VBK) < 2:
        raise ValueError("dino_loss needs at least two views: no pair of different views is left")
    return _CrossEntropy.apply(student_logits_VBK, teacher_probs_GBK, student_temperature)  # pyright: ignore


class Dino(Term):
    """Cross-entropy to the centred and sharpened teacher. The centre follows the mean of the teacher's logits."""

    anchor = True
    needs = frozenset({"teacher"})
    center: Tensor
    center_sum: Tensor

    def __init__(
        self,
        *,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        freeze_last_layer: float = 0.0,
        student_temperature: float = 0.1,
        teacher_temperature: Schedule,
        center: bool = True,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        self.head_args = {
            "prototypes": prototypes,
            "hidden": hidden,
            "bottleneck": bottleneck,
            "layers": layers,
            "batch_norm": batch_norm,
            "learned_norm": not norm_last_layer,
            "frozen_until": freeze_last_layer,
        }
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.centered, self.center_momentum = center, center_momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("center_sum", torch.zeros(prototypes), persistent=False)
        self.rows = 0

    def heads(self, given: Given) -> dict[str, nn.Module]:
        if given.views < 2:
            raise UserError(
                "views: one crop an image leaves terms.dino nothing to predict; set views.global.count=2 or "
                "views.local.count=8"
            )
        if given.teacher is not None:
            raise UserError("terms.dino: its teacher is a slow average of the student; leave teacher.init out")
        return {"dino": ProjectionHead(given.backbone.width, **self.head_args)}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        logits_GBK = teacher.outputs["dino"]
        self.center_sum += logits_GBK.sum((0, 1))
        self.rows += logits_GBK[..., 0].numel()
        if self.centered:
            logits_GBK = logits_GBK - self.center
        log_probs_GBK = (logits_GBK / self.teacher_temperature(t)).log_softmax(-1)
        probs_GBK = log_probs_GBK.exp()
        student.objectives["dino"] = Objective(
            lambda logits_VBK: dino_loss(logits_VBK, probs_GBK, self.student_temperature), self.student_temperature
        )
        loss = dino_loss(student.outputs["dino"], probs_GBK, self.student_temperature)
        with torch.no_grad():
            most = math.log(probs_GBK.shape[-1])
            entropy = -torch.dot(probs_GBK.flatten(), log_probs_GBK.flatten()) / probs_GBK[..., 0].numel()
            self.signs = {
                "loss_share": loss.detach() / most,
                "teacher_entropy": entropy / most,
                "kl": (loss.detach() - entropy) / most,
                "center_rms": self.center.norm() / len(self.center) ** 0.5,
            }
            self.targets = probs_GBK.mean((0, 1)), probs_GBK.argmax(-1).flatten()
        return loss

    def after_step(self, t: float) -> None:
        """The centre moves after the loss has used it, once a step, by the mean over the whole global batch."""
        mean_K = all_reduce_mean_(self.center_sum / max(self.rows, 1))
        self.center.lerp_(mean_K, 1 - self.center_momentum)
        self.skip_step()

    def skip_step(self) -> None:
        self.center_sum.zero_()
        self.rows = 0
