"""Born-again networks (Furlanello et al. 2018): the next generation learns from its finished former self."""

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dino_sd import settings
from dino_sd.errors import UserError
from dino_sd.losses import label_losses, taught_loss
from dino_sd.models.heads import Classifier
from dino_sd.shapes import NO_LABEL
from dino_sd.term import Given, Seen, Term, learn_from_teacher

Weighting = Literal["none", "cwtm", "dkpp"]


class Settings(settings.Settings):
    weight: Annotated[settings.Curve, settings.between(0)] = Field(
        default_factory=lambda: settings.Curve(start=1, end=1), description="factor of this term in the loss"
    )
    label_share: float = Field(
        default=0.5, ge=0, le=1, description="a in a * CE(labels) + (1 - a) * T^2 * KL(teacher); 0: the teacher alone"
    )
    temperature: float = Field(default=1.0, gt=0, description="T; softens teacher and student")
    weighting: Weighting = Field(
        default="none",
        description="cwtm: labels alone, each image weighted by the teacher's confidence (over each part of the batch: "
        "ranks and accumulate change it a little); dkpp: the teacher's other classes are shuffled",
    )


def born_again_loss(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    labels: Tensor | None = None,
    *,
    label_share: float = 0.5,
    temperature: float = 1.0,
    weighting: Weighting = "none",
    labelled: float = 1.0,
) -> Tensor:
    """label_share * CE(labels) + (1 - label_share) * T^2 * KL(teacher || student), a scalar in nats.

    labels: int64 (B,) with -1 for none, or probabilities (B, C); not needed with label_share=0. The teacher gets no
    gradient. weighting="cwtm": cross-entropy with labels alone, each image weighted by the teacher's largest
    probability over the batch's sum of them; "dkpp": as above, with the teacher's probabilities of all classes but its
    likeliest permuted, by torch's global generator of the CPU. labelled: share of images that have a label, as in
    `label_loss`. Raises ValueError where labels are needed and missing, or T <= 0. Furlanello et al. 2018, section 3.

    >>> student, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    >>> teacher = torch.randn(8, 10)  # the finished parent's logits for the same images
    >>> born_again_loss(student, teacher, labels).backward()
    """
    teacher_logits_BC = teacher_logits_BC.detach()
    if labels is None and (label_share > 0 or weighting == "cwtm"):
        raise ValueError("born_again_loss needs labels, or label_share=0 for the teacher alone")
    if weighting == "cwtm":
        assert labels is not None
        known_B = (labels != NO_LABEL) if labels.ndim == 1 else labels.new_ones(len(labels))
        confidence_B = teacher_logits_BC.softmax(-1).amax(-1) * known_B
        return (label_losses(student_logits_BC, labels) * confidence_B).sum() / confidence_B.sum().clamp(min=1e-12)
    if weighting == "dkpp":
        teacher_logits_BC = permute_dark_knowledge(teacher_logits_BC)
    return taught_loss(
        student_logits_BC, teacher_logits_BC, labels, label_share=label_share, temperature=temperature,
        labelled=labelled,
    )  # fmt: skip


def permute_dark_knowledge(logits_BC: Tensor) -> Tensor:
    """Shuffles, in each row, all but the largest logit: its confidence stays, what it says of the others goes."""
    batch, classes = logits_BC.shape
    noise_BC = torch.rand(batch, classes).to(logits_BC.device)
    top_B1 = logits_BC.argmax(-1, keepdim=True)
    places_BC = logits_BC.scatter(1, top_B1, torch.inf).argsort(1, descending=True)  # the largest first
    others_BC = logits_BC.gather(1, places_BC[:, 1:]).gather(1, noise_BC[:, 1:].argsort(1))
    return logits_BC.scatter(1, places_BC[:, 1:], others_BC)


class BornAgain(Term):
    """`born_again_loss` with the model that `teacher.init` names, on the same views."""

    anchor = True
    needs = frozenset({"teacher"})

    def __init__(
        self,
        *,
        label_share: float = 0.5,
        temperature: float = 1.0,
        weighting: Weighting = "none",
    ):
        super().__init__()
        self.label_share, self.temperature = label_share, temperature
        self.weighting: Weighting = weighting
        self.labelled = 1.0

    def heads(self, given: Given) -> dict[str, nn.Module]:
        if given.teacher is None:
            raise UserError(
                "terms.born_again learns from a finished run: set teacher.init=RUN, "
                "or let `dino-sd generations CONFIG` train the chain"
            )
        parent, labels_needed = given.teacher, self.label_share > 0 or self.weighting == "cwtm"
        classes = given.taught_classes("born_again", labels_needed)
        step, steps = parent.provenance.get("step"), parent.provenance.get("steps")
        if step != steps:
            raise UserError(
                f"teacher.init: {parent.description} is not finished; run its own command again until it is"
            )
        ours, theirs = given.backbone.model.state_dict(), parent.backbone.model.state_dict()  # pyright: ignore
        if given.backbone.architecture != parent.backbone.architecture or {k: v.shape for k, v in ours.items()} != {
            k: v.shape for k, v in theirs.items()
        }:
            raise UserError(
                f"teacher.init: {parent.description} is of another architecture than model={given.backbone.name} with "
                f"its model_args; born_again needs the same one (distill takes any)"
            )
        self.labelled = given.labelled
        return {"classifier": Classifier(given.backbone.width, classes)}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        loss, self.signs = learn_from_teacher(
            student,
            teacher,
            partial(
                born_again_loss, label_share=self.label_share, temperature=self.temperature,
                weighting=self.weighting, labelled=self.labelled,
            ),
        )  # fmt: skip
        return loss
