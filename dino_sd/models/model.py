"""A model as others get it: a frozen backbone, the images it expects, and the classes it knows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.pixels import Pixels


@dataclass(frozen=True)
class Model:
    """A frozen backbone in eval mode and the images it expects.

    size: (height, width) in pixels, None where the data decides; crop: share of the resized image's side that is kept;
    mean, std: per channel, pixels from 0 to 1. description: one line for people. provenance: where the weights come
    from, plain values. folder: where results belong, if anywhere. notes: what had to be adapted, to be said.
    heads: those that say classes ("classifier", "exit_3", ...), of a model that was trained with labels; classes: their
    names in order, None where nobody knows them. norms: of each trained exit, by the number of its block.
    """

    backbone: Backbone | Pixels
    size: tuple[int, int] | None
    crop: float
    mean: list[float]
    std: list[float]
    description: str
    provenance: dict[str, Any]
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    classes: list[str] | None = None
    norms: dict[int, nn.Module] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return self.backbone.channels


def check_same_classes(where: str, theirs: list[str] | int, other: str, ours: list[str]) -> None:
    """Raises UserError unless both are the same classes in the same order. theirs: a number where nobody named them."""
    if theirs in (ours, len(ours)):
        return
    count, names = (theirs, None) if isinstance(theirs, int) else (len(theirs), theirs)
    differing = ["unknown, they have no names there"] if names is None else sorted({*names} ^ {*ours})[:3]
    raise UserError(
        f"{where} has other classes than {other}: {count} against {len(ours)}, not in both: "
        f"{', '.join(differing) or 'none, but their order'}; both need the same classes, in the same order"
    )
