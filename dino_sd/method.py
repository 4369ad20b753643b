"""One student, one teacher, a weighted sum of terms."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_sd.models.backbone import Backbone
from dino_sd.schedule import Schedule
from dino_sd.term import Seen, Term


class Network(nn.Module):
    """A backbone with the heads that the terms asked for."""

    backbone: Backbone
    heads: nn.ModuleDict

    def __init__(self, backbone: Backbone, heads: dict[str, nn.Module]):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, groups: list[Tensor], batch: int, labels_B: Tensor | None = None) -> Seen:
        """groups: crops of one size each, (views * batch, C, H, W), view-major. One backbone pass for each size."""
        pooled_ND = torch.cat([self.backbone.pooled(images) for images in merge_sizes(groups)])
        outputs = {name: head(pooled_ND).unflatten(0, (-1, batch)) for name, head in self.heads.items()}
        return Seen(list(pooled_ND.split(batch)), outputs, labels_B)


def merge_sizes(groups: list[Tensor]) -> list[Tensor]:
    """Neighbouring groups of one size become one batch: batch norm sees them together, as in the published code."""
    merged = groups[:1]
    for images in groups[1:]:
        if images.shape[1:] == merged[-1].shape[1:]:
            merged[-1] = torch.cat([merged[-1], images])
        else:
            merged.append(images)
    return merged


class SelfDistillation(nn.Module):
    """The student learns from the teacher through the terms; the teacher follows the student.

    The result of a run is the teacher: an average of students that is better than the last of them
    (Caron et al. 2021, section 5.2). Raises ValueError when teacher and student share a parameter.
    """

    result = "teacher"
    student: Network
    teacher: Network
    terms: nn.ModuleDict

    def __init__(self, student: Network, teacher: Network, terms: dict[str, tuple[float, Term]], momentum: Schedule):
        super().__init__()
        own = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("teacher and student share parameters: the teacher would be the student, and collapse")
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.terms = nn.ModuleDict({name: term for name, (_, term) in terms.items()})
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.momentum = momentum
        self.signs: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "SelfDistillation":
        """The teacher has no dropout and no drop-path; its batch norm uses the batch, as in the published code."""
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    def forward(self, groups: list[Tensor], batch: int, labels_B: Tensor | None, t: float) -> dict[str, Tensor]:
        """groups: normalised crops, (views * batch, C, H, W), global ones first. Returns each term's weighted loss."""
        with torch.no_grad():
            teacher = self.teacher(groups[:1], batch, labels_B)
        student = self.student(groups, batch, labels_B)
        with torch.autocast(groups[0].device.type, enabled=False):  # losses are no place for three digits
            losses = {name: self.weights[name] * term(student, teacher, t) for name, term in self.terms.items()}
        self.signs = {
            f"{name}/{sign}": value
            for name, term in self.terms.items()
            for sign, value in term.signs.items()  # pyright: ignore
        }
        self.signs["feature_spread"] = feature_spread(teacher.pooled[0])
        return losses

    @torch.no_grad()
    def after_step(self, t: float) -> None:
        """Once an optimizer step: the teacher and the terms' buffers move.

        Batch-norm statistics of the teacher come from its own forward passes: they belong to its weights, and the
        student's are also of local crops. Any other floating-point buffer follows as the weights do.
        """
        kept = self.momentum(t)
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        for (name, mine), theirs in zip(self.teacher.named_buffers(), self.student.buffers(), strict=True):
            if mine.is_floating_point() and not name.endswith(("running_mean", "running_var")):
                teacher.append(mine)
                student.append(theirs)
        torch._foreach_lerp_(teacher, student, 1 - kept)
        for term in self.terms.values():
            term.after_step(t)  # pyright: ignore[reportCallIssue]

    def frozen_parameters(self, t: float) -> list[nn.Parameter]:
        return [
            parameter
            for head in self.student.heads.values()
            if hasattr(head, "frozen_parameters")
            for parameter in head.frozen_parameters(t)  # pyright: ignore[reportCallIssue]
        ]


@torch.no_grad()
def feature_spread(pooled_ND: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit-length features, times sqrt(D).

    About 1 for features spread over the sphere, 0 when every image gets the same one.
    """
    unit_ND = nn.functional.normalize(pooled_ND.float(), dim=-1)
    return unit_ND.std(0, correction=0).mean() * unit_ND.shape[1] ** 0.5
