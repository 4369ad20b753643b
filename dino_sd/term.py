"""The interface of a term, one summand of the loss. A term is a file in dino_sd/terms with a class `Settings` and a
class named like the file (`born_again.py`: `BornAgain`)."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from dino_sd.errors import UserError
from dino_sd.losses import hits, of_views
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model, check_same_classes


class Objective(NamedTuple):
    """How an anchor judges the outputs of its head, for others who learn the same thing by other outputs.

    loss: (V, B, K) of all views to a scalar. temperature: what the anchor divides such outputs by.
    """

    loss: Callable[[Tensor], Tensor]
    temperature: float = 1.0


@dataclass
class Seen:
    """What one network saw of a step's views, global views first.

    pooled: (B, D) for each view. outputs: for each head, (V, B, K). labels: the student's; int64 (B,) with -1 for none,
    or probabilities (B, C), or None. clean: the same of the clean image, one view, no gradient, where a term needs it.
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

    def taught_classes(self, term: str, labels_needed: bool) -> int:
        """How many classes the teacher knows. Raises UserError where it knows none, or others than the data.

        labels_needed: the data has to have them too.
        """
        if self.teacher is None:
            raise UserError(f"terms.{term} learns from another model: set teacher.init=RUN, an export or timm:NAME")
        teacher, ours = self.teacher, self.classes
        where = f"teacher.init: {teacher.description}"
        if "classifier" not in teacher.heads:
            raise UserError(
                f"{where} was trained without labels and knows no classes; "
                f"terms.distill.target=features learns from what it says of images without them"
            )
        theirs = teacher.classes
        count: int = teacher.heads["classifier"].out_features  # pyright: ignore[reportAssignmentType]
        if ours:
            check_same_classes(where, theirs or count, "data", ours)
        if labels_needed and not (ours and self.labelled):
            raise UserError(f"terms.{term}: data has no labels; set label_share=0 to learn from the teacher alone")
        return count


class Term(nn.Module):
    """Owns its buffers (the DINO centre). `signs` holds what it noticed at the last step, as detached scalars.

    anchor: it has a target of its own, so that it does not collapse when it stands alone; anchors are asked first.
    needs: what it reads beside the student: "teacher", and what either saw of the clean image, "teacher.clean" and
    "student.clean".
    unlabelled: it learns from images without a label too.
    targets: of the last step, where it made targets without labels: their mean (K,) and which of the K outputs is the
    largest in each (N,), so that one can tell whether they differ between images.
    """

    anchor: bool = False
    needs: frozenset[str] = frozenset()
    unlabelled: bool = True
    signs: dict[str, Tensor]
    targets: tuple[Tensor, Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.signs = {}

    def heads(self, given: Given) -> dict[str, nn.Module]:
        """Heads that the term needs; a head named twice is shared. One with an attribute `exit` reads that block."""
        return {}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def skip_step(self) -> None:
        """Forgets what was gathered for a step that is not made: its numbers were not finite."""

    def after_step(self, t: float) -> None:
        """Called once an optimizer step, after however many accumulated parts, on every rank; here nothing moves."""


def learn_from_teacher(
    student: Seen, teacher: Seen, loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, signs) of a student's classes against those of a teacher that saw the same global views.

    loss: of (N, C) logits of the student and of the teacher, and the N labels or None. It becomes the objective of the
    head "classifier".
    """
    labels, targets_VBC = student.labels, teacher.outputs["classifier"]

    def objective(logits_VBC: Tensor) -> Tensor:
        seen_VBC = logits_VBC[: len(targets_VBC)]  # the teacher sees no local views
        return loss(seen_VBC.flatten(0, 1), targets_VBC.flatten(0, 1), of_views(labels, len(seen_VBC)))

    student.objectives["classifier"] = Objective(objective)
    logits_VBC = student.outputs["classifier"]
    value = objective(logits_VBC)
    signs = {"loss": value.detach(), "agreement": hits(logits_VBC[0], targets_VBC[0].argmax(-1))}
    if labels is not None:
        signs |= {"accuracy": hits(logits_VBC[0], labels), "teacher_accuracy": hits(targets_VBC[0], labels)}
    return value, signs


def term_module(name: str) -> ModuleType:
    """The file of a term. Raises UserError where there is none of this name."""
    try:
        return importlib.import_module(f"dino_sd.terms.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"dino_sd.terms.{name}":
            raise
        known = [module.name for module in pkgutil.iter_modules(importlib.import_module("dino_sd.terms").__path__)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0) or known
        raise UserError(f"config: unknown term {name!r} in terms; did you mean {near[0]!r}?") from None


def term_class(name: str) -> type[Term]:
    return getattr(term_module(name), name.title().replace("_", ""))
