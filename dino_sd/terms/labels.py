"""Cross-entropy with labels: the supervised baseline, and the anchor of layer-wise and consistency training."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from dino_sd import settings
from dino_sd.errors import UserError
from dino_sd.losses import hits, label_loss, of_views
from dino_sd.models.heads import Classifier
from dino_sd.term import Given, Objective, Seen, Term


class Settings(settings.Settings):
    weight: Annotated[settings.Curve, settings.between(0)] = Field(
        default_factory=lambda: settings.Curve(start=1, end=1), description="factor of this term in the loss"
    )
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of each label that is spread over all classes")


class Labels(Term):
    """Mean over views and over the images that have a label (Szegedy et al. 2016 for the smoothing)."""

    anchor = True
    unlabelled = False

    def __init__(self, *, smoothing: float = 0.0):
        super().__init__()
        self.smoothing, self.labelled = smoothing, 1.0

    def heads(self, given: Given) -> dict[str, nn.Module]:
        if not given.classes or not given.labelled:
            raise UserError("terms.labels: data has no labels; use class folders, or another term such as dino")
        self.labelled = given.labelled
        return {"classifier": Classifier(given.backbone.width, len(given.classes))}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        labels = student.labels
        assert labels is not None

        def loss(logits_VBC: Tensor) -> Tensor:
            every = of_views(labels, len(logits_VBC))
            assert every is not None
            return label_loss(logits_VBC.flatten(0, 1), every, self.smoothing, self.labelled)

        student.objectives["classifier"] = Objective(loss)
        logits_VBC = student.outputs["classifier"]
        value = loss(logits_VBC)
        self.signs = {"loss": value.detach(), "accuracy": hits(logits_VBC[0], labels)}
        return value
