"""Be your own teacher (Zhang et al. 2019): exits at earlier blocks learn from the deepest one."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from dino_sd import settings
from dino_sd.errors import UserError
from dino_sd.losses import softened_kl
from dino_sd.models.heads import Exit, ExitFeatures
from dino_sd.term import Given, Seen, Term


class Settings(settings.Settings):
    weight: Annotated[settings.Curve, settings.between(0)] = Field(
        default_factory=lambda: settings.Curve(start=1, end=1), description="factor of this term in the loss"
    )
    layers: Annotated[
        list[Annotated[int | float, Field(gt=0)]], BeforeValidator(settings.as_list), Field(min_length=1)
    ] = Field(
        default=[0.25, 0.5],
        description="blocks (stages of a convnet) after which there is an exit: numbers from 1, or shares of the depth",
    )
    teacher_share: float = Field(
        default=0.3, ge=0, le=1, description="a in (1 - a) * the anchor's loss + a * T^2 * KL(deepest output)"
    )
    temperature: float = Field(default=3.0, gt=0, description="T; softens deepest output and exits")
    hint: float = Field(
        default=0.0,
        ge=0,
        description="factor of the squared distance to the deepest features; published for ResNets: 0.03 (far too much "
        "for a ViT, whose normed features are long)",
    )


def layerwise_loss(
    exit_logits: Sequence[Tensor],
    deepest_logits: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    teacher_share: float = 0.3,
    temperature: float = 3.0,
    exit_features: Sequence[Tensor] = (),
    deepest_features: Tensor | None = None,
    hint: float = 0.0,
) -> Tensor:
    """Sum over exits of (1 - a) * objective(exit) + a * T^2 * KL(deepest || exit) + hint * |features - deepest|^2.

    exit_logits: (..., K) each, like deepest_logits, which gets no gradient, as deepest_features do not. objective: the
    loss of the deepest output, e.g. cross-entropy with the labels; add it for that output yourself. The squared
    distance is a sum over dimensions and a mean over images. a = teacher_share. Raises ValueError when T <= 0.
    Zhang et al. 2019, section 3.2, with the factor T^2.

    >>> exits = [torch.randn(8, 10, requires_grad=True) for _ in range(2)]
    >>> deepest, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    >>> objective = lambda logits: torch.nn.functional.cross_entropy(logits, labels)
    >>> (objective(deepest) + layerwise_loss(exits, deepest, objective)).backward()
    """
    deepest_logits = deepest_logits.detach()
    loss = deepest_logits.new_zeros(())
    for logits in exit_logits:
        loss = loss + (1 - teacher_share) * objective(logits)
        loss = loss + teacher_share * softened_kl(logits, deepest_logits, temperature)
    if hint:
        assert deepest_features is not None, "a hint needs deepest_features"
        for features in exit_features:
            loss = loss + hint * (features - deepest_features.detach()).square().sum(-1).mean()
    return loss


class Layerwise(Term):
    """`layerwise_loss` for exits with the anchor's kind of head: classes with labels, prototypes with dino."""

    unlabelled = False  # of itself: what the anchor cannot use, the exits can do little with

    def __init__(
        self,
        *,
        layers: Sequence[int | float] = (0.25, 0.5),
        teacher_share: float = 0.3,
        temperature: float = 3.0,
        hint: float = 0.0,
    ):
        super().__init__()
        self.layers, self.teacher_share, self.temperature, self.hint = layers, teacher_share, temperature, hint
        self.exits: list[int] = []
        self.head = ""

    def heads(self, given: Given) -> dict[str, nn.Module]:
        self.head, anchor = given.anchor("layerwise")
        backbone = given.backbone
        self.exits = sorted({number_of(layer, backbone.name, len(backbone.widths)) for layer in self.layers})
        heads: dict[str, nn.Module] = {}
        for exit in self.exits:
            features = ExitFeatures(exit, backbone.widths[exit - 1], backbone.width)
            heads[f"exit_{exit}"] = Exit(features, anchor.small(backbone.width))  # pyright: ignore
            if self.hint:
                heads[f"hint_{exit}"] = features  # the same module: what the exit's head reads
        return heads

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        objective = student.objectives[self.head]
        exits = [student.outputs[f"exit_{exit}"] for exit in self.exits]
        deepest = student.outputs[self.head]
        unit = objective.temperature  # T is in the anchor's own: dino's logits are cosines
        with torch.no_grad():
            self.signs = {
                f"exit_{exit}_kl": softened_kl(logits / unit, deepest / unit)
                for exit, logits in zip(self.exits, exits, strict=True)
            }
        # KL of what the anchor's softmax sees; its objective divides by the unit itself
        return layerwise_loss(
            [logits / unit for logits in exits],
            deepest / unit,
            lambda logits: objective.loss(logits * unit),
            teacher_share=self.teacher_share,
            temperature=self.temperature,
            exit_features=[student.outputs[f"hint_{exit}"] for exit in self.exits] if self.hint else (),
            deepest_features=torch.stack(student.pooled) if self.hint else None,
            hint=self.hint,
        )


def number_of(layer: int | float, model: str, blocks: int) -> int:
    """The block, counted from 1, that a number or a share of the depth means. Raises UserError beyond the depth."""
    number = round(layer * blocks) if isinstance(layer, float) and layer < 1 else layer
    if number != int(number) or not 1 <= number < blocks:
        raise UserError(
            f"terms.layerwise.layers: {layer:g} is no block of model={model} with another one after it: "
            f"it has {blocks} blocks or stages; choose 1 to {blocks - 1}, or shares of the depth such as 0.5"
        )
    return int(number)
