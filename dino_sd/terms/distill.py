"""Distillation from another model (Hinton et al. 2015): a larger run, a timm model, an export."""

from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dino_sd import settings
from dino_sd.losses import taught_loss
from dino_sd.models.heads import Classifier
from dino_sd.term import Given, Seen, Term, learn_from_teacher


class Settings(settings.Settings):
    weight: Annotated[settings.Curve, settings.between(0)] = Field(
        default_factory=lambda: settings.Curve(start=1, end=1), description="factor of this term in the loss"
    )
    target: Literal["logits", "features"] = Field(
        default="logits", description="logits: the teacher's classes, with labels; features: its pooled output, without"
    )
    label_share: float = Field(
        default=0.5, ge=0, le=1, description="logits only: a in a * CE(labels) + (1 - a) * T^2 * KL(teacher)"
    )
    temperature: float = Field(default=4.0, gt=0, description="logits only: T; softens teacher and student")


def feature_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean of 1 - cosine over images, a scalar from 0 to 2. The teacher gets no gradient.

    >>> student, teacher = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    >>> feature_loss(student, teacher).backward()
    """
    return 1 - F.cosine_similarity(student_ND, teacher_ND.detach(), dim=-1).mean()


class Distill(Term):
    """Knowledge of a frozen teacher of any architecture, on the same views: its classes, or its features."""

    anchor = True
    needs = frozenset({"teacher"})

    def __init__(
        self,
        *,
        target: Literal["logits", "features"] = "logits",
        label_share: float = 0.5,
        temperature: float = 4.0,
    ):
        super().__init__()
        self.target, self.label_share, self.temperature, self.labelled = target, label_share, temperature, 1.0

    def heads(self, given: Given) -> dict[str, nn.Module]:
        if self.target == "features" and given.teacher is not None:
            return {"distill": nn.Linear(given.backbone.width, given.teacher.backbone.width)}
        classes = given.taught_classes("distill", labels_needed=self.label_share > 0)
        self.labelled = given.labelled
        return {"classifier": Classifier(given.backbone.width, classes)}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        if self.target == "features":
            targets_VBD = torch.stack(teacher.pooled)
            loss = feature_loss(student.outputs["distill"][: len(targets_VBD)], targets_VBD)
            self.signs = {"loss": loss.detach()}
            return loss
        loss, self.signs = learn_from_teacher(
            student,
            teacher,
            partial(taught_loss, label_share=self.label_share, temperature=self.temperature, labelled=self.labelled),
        )
        return loss
