"""Consistency: what the model says of the clean image teaches what it says of the augmented one."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from dino_sd import settings
from dino_sd.errors import UserError
from dino_sd.losses import softened_kl
from dino_sd.term import Given, Seen, Term


class Settings(settings.Settings):
    weight: Annotated[settings.Curve, settings.between(0)] = Field(
        default_factory=lambda: settings.Curve(start=1, end=1), description="factor of this term in the loss"
    )
    temperature: float = Field(default=4.0, gt=0, description="T; softens both sides")
    target: Literal["student", "teacher"] = Field(
        default="student", description="who looks at the clean image: the same weights, or their slow average"
    )


def consistency_loss(augmented_logits: Tensor, clean_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 * KL(softmax(clean / T) || softmax(augmented / T)): its mean over images, a scalar in nats.

    Both (..., K); the clean side gets no gradient. Add a loss that anchors it: alone it collapses. Raises ValueError
    when T <= 0. The loss of Yun et al. 2020 (CS-KD) with the clean view of the same image as its teacher.

    >>> import torch
    >>> augmented = torch.randn(8, 10, requires_grad=True)
    >>> with torch.no_grad():
    ...     clean = torch.randn(8, 10)  # model(clean_images)
    >>> consistency_loss(augmented, clean).backward()
    """
    return softened_kl(augmented_logits, clean_logits, temperature)


class Consistency(Term):
    """`consistency_loss` of every view, by the anchor's head."""

    def __init__(self, *, temperature: float = 4.0, target: Literal["student", "teacher"] = "student"):
        super().__init__()
        self.temperature, self.target, self.head = temperature, target, ""
        self.needs = frozenset({f"{target}.clean"})

    def heads(self, given: Given) -> dict[str, nn.Module]:
        self.head, _ = given.anchor("consistency")
        if self.target == "teacher" and given.teacher is not None:
            raise UserError("terms.consistency.target=teacher is a slow average of the student; leave teacher.init out")
        return {}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        clean = (student if self.target == "student" else teacher).clean
        assert clean is not None
        logits_VBK, unit = student.outputs[self.head], student.objectives[self.head].temperature
        loss = consistency_loss(logits_VBK / unit, clean.outputs[self.head].expand_as(logits_VBK) / unit,
                                self.temperature)  # fmt: skip
        self.signs = {"loss": loss.detach()}
        return loss
