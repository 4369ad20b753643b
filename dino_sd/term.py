"""The interface of a term, one summand of the loss. A term is a file in dino_sd/terms with a class `Settings` and a
class named like the file (`born_again.py`: `BornAgain`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model


class Objective(NamedTuple):
    """How an anchor judges the outputs of its head, for others who learn the same thing by other outputs.

    loss: (V, B, K) of all views to a scalar. temperature: what the anchor divides such outputs by.
    """

    loss: Callable[[Tensor], Tensor]
    temperature: float = 1.0


@dataclass
class Seen:
    """What one network saw of a step's views, global views first.

    pooled: (B, D) for each view. outputs: for each head, (V, B, K). labels: int64 (B,) with -1 for none, or
    probabilities (B, C), or None. clean: the same of the clean image, one view, no gradient, where a term needs it.
    objectives: what the anchors said, by head.
    """

    pooled: list[Tensor] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    clean: "Seen | None" = None
    objectives: dict[str, Objective] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """What a run has for its terms. Here a term finds out whether it can work, and raises UserError where it cannot.

    views: crops of an image. classes: their names, None without labels; labelled: share of the images that have one.
    heads: those that the anchors asked for so far. teacher: the model that `teacher.init` names.
    """

    backbone: Backbone
    views: int = 1
    classes: list[str] | None = None
    labelled: float = 1.0
    heads: dict[str, nn.Module] = field(default_factory=dict)
    teacher: Model | None = None

    def anchor(self, term: str) -> tuple[str, nn.Module]:
        """The head that a companion leans on: the first whose anchor states an objective, which can be made `small`.

        Raises UserError where there is none: what learns from itself alone learns to say the same of every image.
        """
        for name, head in self.heads.items():
            if hasattr(head, "small"):
                return name, head
        raise UserError(f"terms.{term} collapses when it stands alone: add an anchor, terms.labels or terms.dino")

    def taught_classes(self, term: str) -> Model:
        """The teacher, with a classifier of the data's classes. Raises UserError where there is none such."""
        if self.teacher is None:
            raise UserError(f"terms.{term} learns from another model: set teacher.init=RUN, an export or timm:NAME")
        teacher, ours = self.teacher, self.classes
        where = f"teacher.init: {teacher.description}"
        if "classifier" not in teacher.heads:
            raise UserError(
                f"{where} was trained without labels and knows no classes; "
                f"terms.distill.target=features learns from what it says of images without them"
            )
        count, theirs = teacher.heads["classifier"].out_features, teacher.classes
        if ours and ((theirs and theirs != ours) or count != len(ours)):
            differing = sorted({*theirs} ^ {*ours})[:3] if theirs else ["its names are unknown"]
            raise UserError(
                f"{where} knows other classes than data: {count} against {len(ours)}, not in both: "
                f"{', '.join(differing) or 'none, but their order'}; use a teacher of the same classes, in their order"
            )
        return teacher


class Term(nn.Module):
    """Owns its buffers (the DINO centre). `signs` holds what it noticed at the last step, as detached scalars.

    anchor: it has a target of its own, so that it does not collapse when it stands alone; anchors are asked first.
    needs: what it reads beside the student: "teacher", and what either saw of the clean image, "teacher.clean" and
    "student.clean".
    unlabelled: it learns from images without a label too.
    """

    anchor: bool = False
    needs: frozenset[str] = frozenset()
    unlabelled: bool = True
    signs: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.signs = {}

    def heads(self, given: Given) -> dict[str, nn.Module]:
        """Heads that the term needs; a head named twice is shared. One with an attribute `exit` reads that block."""
        return {}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def after_step(self, t: float) -> None:
        """Called once an optimizer step, after however many accumulated parts, on every rank; here nothing moves."""
