"""One student, one teacher, a weighted sum of terms."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_sd.health import feature_spread
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import exit_of
from dino_sd.schedule import Schedule
from dino_sd.term import Seen, Term


class Network(nn.Module):
    """A backbone with the heads that the terms asked for.

    rescale: (factor, shift) per channel, (C, 1, 1) each, for a network that was trained with another normalisation.
    """

    backbone: Backbone
    heads: nn.ModuleDict
    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, backbone: Backbone, heads: dict[str, nn.Module], rescale: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.backbone = backbone
        self.compiled: Callable[..., list[Tensor]] | None = None  # of backbone.pooled, for training steps
        self.heads = nn.ModuleDict(heads)
        for name, values in zip(("factor", "shift"), rescale or (None, None), strict=True):
            self.register_buffer(name, values, persistent=False)

    def forward(self, groups: list[Tensor], batch: int, heads: Collection[str] | None = None) -> Seen:
        """groups: crops of one size each, (views * batch, C, H, W), view-major. One backbone pass for each size.

        heads: those wanted; None: all.
        """
        if self.factor is not None and self.shift is not None:
            groups = [images * self.factor + self.shift for images in groups]
        wanted = {name: head for name, head in self.heads.items() if heads is None or name in heads}
        exits = sorted({exit for head in wanted.values() if (exit := exit_of(head)) is not None})
        pooled = self.compiled or self.backbone.pooled
        taps = zip(*(pooled(images, exits) for images in merge_sizes(groups)), strict=True)
        pooled_ND, *rest = (torch.cat(tap) for tap in taps)
        read: dict[int | None, Tensor] = {None: pooled_ND, **dict(zip(exits, rest, strict=True))}
        outputs = {name: full(head(read[exit_of(head)])).unflatten(0, (-1, batch)) for name, head in wanted.items()}
        return Seen(list(full(pooled_ND).split(batch)), outputs)


def full(tensor: Tensor) -> Tensor:
    """In at least float32: what losses read."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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
    """The student learns from the teacher through the terms; the teacher follows the student, or is frozen, or is not.

    teacher: None where no term reads one. momentum: share of the teacher that is kept at each step; None: it is frozen.
    terms: {name: (weight as a function of t, term)}, anchors first. The result of a run is the teacher where it
    follows: an average of students that is better than the last of them (Caron et al. 2021, section 5.2). Otherwise
    it is the student. Raises ValueError when teacher and student share a parameter.
    """

    student: Network
    teacher: Network | nn.Module
    terms: nn.ModuleDict

    def __init__(
        self,
        student: Network,
        teacher: Network | None,
        terms: dict[str, tuple[Schedule, Term]],
        momentum: Schedule | None,
    ):
        super().__init__()
        own = {parameter.data_ptr() for parameter in student.parameters()} - {0}  # 0: no memory, on a meta device
        if teacher is not None and any(parameter.data_ptr() in own for parameter in teacher.parameters()):
            raise ValueError("teacher and student share parameters: the teacher would be the student, and collapse")
        self.student = student
        self.teacher = nn.Module() if teacher is None else teacher.requires_grad_(False)  # an empty one has no weights
        self.terms = nn.ModuleDict({name: term for name, (_, term) in terms.items()})
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.needs = frozenset().union(*(term.needs for _, term in terms.values()))
        self.momentum = momentum if teacher is not None else None
        self.result = "student" if self.momentum is None else "teacher"
        self.signs: dict[str, Tensor] = {}
        self.pooled_BD = torch.empty(0)  # the result's features of the last images, first view
        self.targets: tuple[Tensor, Tensor] | None = None  # see Term

    @property
    def wants_clean(self) -> bool:
        """The groups of a batch end with the clean images."""
        return any(need.endswith(".clean") for need in self.needs)

    def train(self, mode: bool = True) -> "SelfDistillation":
        """The teacher has no dropout and no drop-path; following, its batch norm uses the batch, as published."""
        super().train(mode)
        self.teacher.eval()
        if self.momentum is not None:
            for module in self.teacher.modules():
                if isinstance(module, _BatchNorm):
                    module.train(mode)
        return self

    def forward(self, groups: list[Tensor], batch: int, labels: Tensor | None, t: float) -> dict[str, Tensor]:
        """groups: normalised crops, (views * batch, C, H, W): global ones, local ones, and the clean images if wanted.

        Returns each term's weighted loss. The teacher sees the global crops alone, and no exits are asked of it.
        """
        clean, groups = (groups[-1:], groups[:-1]) if self.wants_clean else ([], groups)
        teacher = Seen()
        with torch.no_grad():
            if "teacher" in self.needs:
                teacher = self.teacher(groups[:1], batch, deepest_heads(self.teacher))
            if "teacher.clean" in self.needs:
                teacher.clean = self.teacher(clean, batch, deepest_heads(self.teacher))
        student = self.student(groups, batch)
        student.labels = labels
        if "student.clean" in self.needs:
            with torch.no_grad():
                student.clean = self.student(clean, batch, deepest_heads(self.student))
        with torch.autocast(groups[0].device.type, enabled=False):  # losses are no place for three digits
            losses = {name: self.weights[name](t) * term(student, teacher, t) for name, term in self.terms.items()}
        self.signs = {
            f"{name}/{sign}": value
            for name, term in self.terms.items()
            for sign, value in term.signs.items()  # pyright: ignore
        }
        result = teacher if self.momentum is not None and teacher.pooled else student
        self.pooled_BD = result.pooled[0].detach()
        self.signs["feature_spread"] = feature_spread(self.pooled_BD)
        targets = (term.targets for term in self.terms.values())
        self.targets = next((pair for pair in targets if pair is not None), None)  # pyright: ignore
        return losses

    def skip_step(self) -> None:
        """In place of `after_step`, for a step whose numbers are not finite."""
        for term in self.terms.values():
            term.skip_step()  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def after_step(self, t: float) -> None:
        """Once an optimizer step: the teacher and the terms' buffers move.

        Batch-norm statistics of the teacher come from its own forward passes: they belong to its weights, and the
        student's are also of local crops. Any other floating-point buffer follows as the weights do.
        """
        for term in self.terms.values():
            term.after_step(t)  # pyright: ignore[reportCallIssue]
        if self.momentum is None:
            return
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        for (name, mine), theirs in zip(self.teacher.named_buffers(), self.student.buffers(), strict=True):
            if mine.is_floating_point() and not name.endswith(("running_mean", "running_var")):
                teacher.append(mine)
                student.append(theirs)
        torch._foreach_lerp_(teacher, student, 1 - self.momentum(t))

    def frozen_parameters(self, t: float) -> list[nn.Parameter]:
        return [
            parameter
            for head in self.student.heads.values()
            if hasattr(head, "frozen_parameters")
            for parameter in head.frozen_parameters(t)  # pyright: ignore[reportCallIssue]
        ]


def deepest_heads(network: Network | nn.Module) -> list[str]:
    """Names of the heads that read the network's output."""
    heads: nn.ModuleDict = network.heads  # pyright: ignore
    return [name for name, head in heads.items() if exit_of(head) is None]
