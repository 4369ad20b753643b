"""Whether a run learns, told without labels: signs of its last step, and a verdict on a short history of them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_sd.distributed import all_gather_rows, all_reduce_mean_, say, world_size
from dino_sd.errors import Halted

PREFIX = "health/"  # of the signs in metrics.jsonl
KEPT = 20  # judgements that a verdict looks back on
ROWS = 512  # images whose features are judged at most

# Measured with tools/health_table.py: two backbones, batches of 16 to 256, 16 to 65,536 prototypes.
NOTHING = 0.0015  # information; healthy beginnings fall to 0.002 and rise again
LITTLE = 0.003  # information below which nothing is said yet
EVEN = 0.9  # teacher entropy from which outputs are called uniform
SHARP = 0.1  # teacher entropy and information below which the outputs share few prototypes
EARLY = 30  # steps until the centre has caught up with a new head
REPLACED = 0.02  # update norm; healthy runs stay below 0.007
WORSE = 1.2  # loss as a share of ln K; healthy runs stay below 1.0
ALIKE = 0.05  # feature spread; that of untrained networks is 0.3 and more

REMEDIES = {
    "unstable": "a lower optim.lr, a longer optim.warmup, or a lower optim.clip",
    "collapsed: one point": "terms.dino.center=true, a higher terms.dino.teacher_temperature, or a lower optim.lr",
    "collapsed: uniform": "a lower terms.dino.teacher_temperature, or a lower optim.lr",
}


@dataclass(frozen=True)
class Signs:
    """What one step showed. None: this run has no such thing.

    loss: nats. gradient_norm: the largest of a parameter. update_norm: of the step, over that of the weights.
    teacher_entropy, kl: shares of ln K. information: how much the teacher's output tells about which view it is of,
    as a share of what it could at most; 0 in both collapses. prototypes_used: those that were the arg max of a teacher
    output since the last judgement, as a share of K or of the outputs, whichever are fewer. spread: 1 for features all
    over the sphere, 0 for one point. effective_rank: RankMe of the result's features; rank_share: of images or
    dimensions, whichever are fewer.
    """

    step: int
    loss: float
    gradient_norm: float
    update_norm: float
    teacher_entropy: float | None = None
    kl: float | None = None
    information: float | None = None
    prototypes_used: float | None = None
    spread: float | None = None
    effective_rank: float | None = None
    rank_share: float | None = None

    def line(self) -> dict[str, float]:
        """As metrics.jsonl has them."""
        return {PREFIX + key: value for key, value in asdict(self).items() if key != "step" and value is not None}


def history_of(lines: Iterable[dict[str, Any]]) -> list[Signs]:
    """The judgements in the lines of a metrics.jsonl."""
    names = [field.name for field in fields(Signs) if field.name != "step"]
    judged = (line for line in lines if f"{PREFIX}verdict" in line)
    return [Signs(line["step"], **{name: line.get(PREFIX + name) for name in names}) for line in judged]  # pyright: ignore


@torch.no_grad()
def effective_rank(features_ND: Tensor) -> Tensor:
    """RankMe: the exponential of the entropy of the singular values, taken as shares of their sum.

    features_ND: as they are, not centred. A scalar from 1, one direction, to min(N, D), all directions alike; NaN where
    a feature is not finite. Garrido et al. 2023, eq. 1.
    """
    features_ND = (features_ND.cpu() if features_ND.device.type == "mps" else features_ND).double()  # MPS has none
    wide = features_ND.shape[0] < features_ND.shape[1]
    gram = features_ND @ features_ND.T if wide else features_ND.T @ features_ND
    if not gram.isfinite().all():
        return gram.new_tensor(math.nan)
    sigmas = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    shares = sigmas / sigmas.sum().clamp_(min=torch.finfo(sigmas.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def feature_spread(pooled_ND: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit-length features, times sqrt(D).

    About 1 for features spread over the sphere, 0 when every image gets the same one.
    """
    unit_ND = nn.functional.normalize(pooled_ND.float(), dim=-1)
    return unit_ND.std(0, correction=0).mean() * unit_ND.shape[1] ** 0.5


class Verdict(NamedTuple):
    """name: as in the log. text: the numbers behind it and the setting to move, where something is wrong."""

    name: str
    text: str = ""

    @property
    def collapsed(self) -> bool:
        return self.name.startswith("collapsed")


def verdict(history: list[Signs], warmup: int) -> Verdict:
    """What a run's last judgements, oldest first, say of it. warmup: steps of the learning rate's.

    `warming up`, `learning`, `unstable`, `collapsed: one point` or `collapsed: uniform`. What is wrong has to be so at
    two judgements in a row. A beginning looks like a uniform collapse; what tells them apart is what follows, so that
    this one is named after the warm-up only.
    """
    if len(history) < 2:
        return Verdict("warming up")
    now = history[-1]
    for name, holds in zip(REMEDIES, (_unstable, _one_point, _uniform), strict=True):
        if holds(history, warmup) and holds(history[:-1], warmup):
            no_dino = name == "collapsed: one point" and now.information is None
            remedy = "a lower optim.lr, or other weights of the terms" if no_dino else REMEDIES[name]
            return Verdict(name, f"{name} at step {now.step} ({_numbers(now)}); try {remedy}")
    unclear = all(signs.information is not None and signs.information < LITTLE for signs in history[-2:])
    return Verdict("warming up" if now.step <= warmup or unclear else "learning")


def _numbers(now: Signs) -> str:
    """Those that a reader needs to check the verdict."""
    shown = ("loss", "teacher_entropy", "kl", "information", "prototypes_used", "spread", "effective_rank",
             "gradient_norm", "update_norm")  # fmt: skip
    values = ((key, getattr(now, key)) for key in shown)
    return ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in values if value is not None)


def _unstable(history: list[Signs], warmup: int) -> bool:
    """Weights that are replaced rather than moved, or a student that knows less than nothing."""
    now = history[-1]
    if not math.isfinite(now.loss + now.gradient_norm + now.update_norm) or now.update_norm > REPLACED:
        return True
    if now.information is None or now.teacher_entropy is None or now.kl is None:
        return False
    return now.teacher_entropy + now.kl > WORSE and now.information >= NOTHING and now.step > warmup


def _one_point(history: list[Signs], warmup: int) -> bool:
    now = history[-1]
    if now.information is None or now.teacher_entropy is None:  # no targets: the features have to tell
        if now.spread is None or now.effective_rank is None:
            return False
        return now.step > warmup and now.spread < ALIKE and now.effective_rank < 1.5
    if now.step > EARLY and now.teacher_entropy < SHARP and now.information < SHARP:
        return True  # all outputs together, too, have few prototypes
    return now.teacher_entropy < EVEN and _says_nothing(history, warmup)


def _uniform(history: list[Signs], warmup: int) -> bool:
    now = history[-1]
    return now.teacher_entropy is not None and now.teacher_entropy >= EVEN and _says_nothing(history, warmup)


def _says_nothing(history: list[Signs], warmup: int) -> bool:
    """The teacher says the same of every image, and it does not get better."""
    told = [signs.information for signs in history if signs.information is not None]
    if not told or history[-1].step <= max(warmup, EARLY) or told[-1] >= NOTHING:
        return False
    half = max(len(told) // 2, 1)
    return sum(told[-half:]) / half <= 1.5 * max(sum(told[:half]) / half, NOTHING / 10)


class Health:
    """Judges a run every `every` steps and at the end. Between judgements it only notes which prototypes are in use.

    stop: a collapse ends the run. warmup: steps of the learning rate's. steps: of the run.
    """

    def __init__(self, *, every: int, stop: bool, warmup: int, steps: int):
        self.every, self.stop, self.warmup, self.steps = every, stop, warmup, steps
        self.used_K: Tensor | None = None
        self.outputs = 0  # of the teacher, over all ranks, since the last judgement
        self.history: list[Signs] = []
        self.verdict, self.said = Verdict("warming up"), ""
        self._forget()

    def _forget(self) -> None:
        self.seen: list[tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor] | None]] = []
        self.weights: list[Tensor] = []
        self.moved: Tensor | None = None

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def see(
        self, step: int, signs: dict[str, Tensor], pooled_BD: Tensor, targets: tuple[Tensor, Tensor] | None
    ) -> None:
        """After each part of a sound step; step: its number from 1."""
        if targets is not None:
            mean_K, picks_N = targets
            if self.used_K is None:
                self.used_K = torch.zeros_like(mean_K, dtype=torch.bool)
            self.used_K.index_fill_(0, picks_N, True)
            self.outputs += len(picks_N) * world_size()
        if self._due(step):
            self.seen.append((signs, pooled_BD, targets))

    @torch.no_grad()
    def before_step(self, step: int, parameters: list[nn.Parameter]) -> None:
        """Before the optimizer moves the weights."""
        if self._due(step):  # a copy of the student, at a time when no activation is kept
            self.weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def after_step(self, parameters: list[nn.Parameter], gradient_norm: Tensor) -> None:
        """gradient_norm: as it was before clipping."""
        if self.weights:
            length = torch.stack(torch._foreach_norm(self.weights)).norm()
            torch._foreach_sub_(self.weights, parameters)  # pyright: ignore
            moved = torch.stack(torch._foreach_norm(self.weights)).norm() / length
            self.moved = torch.stack([gradient_norm, moved])
            self.weights = []

    def judge(self, step: int) -> dict[str, Any]:
        """The signs and the verdict's name for metrics.jsonl; nothing between judgements, and after a skipped step.

        Every rank calls it at every step, and finds the same.
        """
        if self.moved is None:
            return {}
        signs = self._signs(step, self.moved)
        self.history = [*self.history, signs][-KEPT:]
        self.verdict = verdict(self.history, self.warmup)
        self._forget()
        return {**signs.line(), f"{PREFIX}verdict": self.verdict.name}

    def _signs(self, step: int, moved: Tensor) -> Signs:
        """Waits for the device, and for the other ranks."""
        names = [name for name in ("loss", "dino/teacher_entropy", "dino/kl") if name in self.seen[0][0]]
        parts = [torch.stack([signs[name].detach() for name in names]) for signs, _, _ in self.seen]
        means = torch.stack(parts).mean(0)
        numbers = all_reduce_mean_(torch.cat([means, moved.to(means)])).tolist()
        keys = [*(name.removeprefix("dino/") for name in names), "gradient_norm", "update_norm"]
        found = dict(zip(keys, numbers, strict=True))
        most = max(ROWS // world_size(), 1)
        features_ND = all_gather_rows(torch.cat([pooled_BD[:most] for _, pooled_BD, _ in self.seen])[:most])
        if len(features_ND) > 1:
            rank = effective_rank(features_ND).item()
            found |= {"effective_rank": rank, "rank_share": rank / min(features_ND.shape)}
            found["spread"] = feature_spread(features_ND).item()
        targets = [targets for _, _, targets in self.seen if targets is not None]
        if self.used_K is not None and targets:
            prototypes, outputs = len(self.used_K), sum(len(picks_N) for _, picks_N in targets) * world_size()
            mean_K = all_reduce_mean_(torch.stack([mean_K for mean_K, _ in targets]).mean(0))
            whole = -torch.dot(mean_K, mean_K.clamp(min=torch.finfo(mean_K.dtype).tiny).log()).item()
            if outputs > 1:
                told = whole - found["teacher_entropy"] * math.log(prototypes)
                found["information"] = told / math.log(min(prototypes, outputs))
            self._share()
            found["prototypes_used"] = self.used_K.sum().item() / min(prototypes, self.outputs)
            self.used_K.zero_()
            self.outputs = 0
        return Signs(step, **found)

    def _share(self) -> None:
        if self.used_K is not None and world_size() > 1:
            self.used_K = all_reduce_mean_(self.used_K.float()) > 0

    def act(self) -> None:
        """After a judgement: says a bad verdict when it is new. Raises Halted on a collapse where that ends the run."""
        if self.verdict.collapsed and self.stop:
            raise Halted(self.verdict.text)
        if self.verdict.text and self.verdict.name != self.said:
            say(f"warning: {self.verdict.text}")
        self.said = self.verdict.name

    def state_dict(self) -> dict[str, Any]:
        """Every rank calls it, and finds the same."""
        self._share()
        return {
            "used": self.used_K, "outputs": self.outputs, "history": [asdict(signs) for signs in self.history],
            "said": self.said,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.used_K = state["used"].to(device) if state["used"] is not None else None
        self.outputs, self.said = state["outputs"], state["said"]
        self.history = [Signs(**signs) for signs in state["history"]]
