"""The interface of a term, one summand of the loss. A term is a file in dino_sd/terms with a class `Settings` and a
class named like the file (`born_again.py`: `BornAgain`)."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Seen:
    """What one network saw of a step's views, global views first.

    pooled: (B, D) for each view. outputs: for each head, (V, B, K). labels_B: int64, or None.
    """

    pooled: list[Tensor]
    outputs: dict[str, Tensor]
    labels_B: Tensor | None = None


class Term(nn.Module):
    """Owns its buffers (the DINO centre). `signs` holds what it noticed at the last step, as detached scalars."""

    signs: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.signs = {}

    def heads(self, width: int) -> dict[str, nn.Module]:
        """Heads that the term needs, given to student and teacher alike; a head named twice is shared."""
        return {}

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def after_step(self, t: float) -> None:
        """Called once an optimizer step, after however many accumulated parts, on every rank; here nothing moves."""
