"""What each number of metrics.jsonl means to a reader: which belong in one chart, and what is healthy."""

import re
from typing import NamedTuple

from dino_sd.health import ALIKE, EVEN, LITTLE, NOTHING, REPLACED, SHARP, WORSE


class Zone(NamedTuple):
    """Values of a chart that are no good; None: without end."""

    low: float | None
    high: float | None


class Chart(NamedTuple):
    """lines: (pattern of the key, label). format: of the axis, as Bokeh's numbers. log: "offer" it, or "first".

    about: a sentence or two for someone who has never seen such a curve. healthy: what one wants to see.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    about: str
    healthy: str
    unit: str = ""
    format: str = "0.[000]"
    log: str = ""
    zones: tuple[Zone, ...] = ()


GROUPS: tuple[tuple[str, str, tuple[Chart, ...]], ...] = (
    (
        "Is it learning?",
        "Scores on labelled images where there are any, and the loss. The loss of self-distillation is a moving "
        "target: it may rise while the network gets better, so scores and health signs count for more.",
        (
            Chart(
                "Accuracy",
                (
                    ("knn", "k-NN"),
                    ("accuracy", "top-1"),
                    ("accuracy_top5", "top-5"),
                    (r"(exit_\d+|ensemble)/accuracy", r"top-1, \1"),
                    (r"(exit_\d+|ensemble)/accuracy_top5", r"top-5, \1"),
                ),
                "Share of test images that are named rightly. k-NN: each image is named by the training images whose "
                "features are most like its own; nothing is trained for it.",
                "Rising. The first point is the untrained network.",
                "%",
            ),
            Chart(
                "Loss",
                (("loss", "loss"),),
                "What training minimises: the weighted sum of all terms, in nats.",
                "Falling in the long run; a rise while the teacher sharpens is no harm.",
                "nats",
                log="offer",
            ),
            Chart(
                "Loss taken apart",
                (
                    ("dino/loss_share", "loss"),
                    ("dino/teacher_entropy", "teacher's entropy"),
                    ("dino/kl", "KL(teacher, student)"),
                ),
                "As shares of ln K, the most that K prototypes allow. The loss is the sum of two things: how undecided "
                "the teacher is (entropy), and how far the student is from it (KL divergence).",
                f"Entropy well between 0 (one point) and 1 (uniform); loss below {WORSE:g}.",
                "share of ln K",
                log="offer",
                zones=(Zone(WORSE, None),),
            ),
            Chart(
                "Loss of each term",
                ((r"(.+)/loss", r"\1"),),
                "The summands of the loss before their weights, in nats.",
                "Falling in the long run.",
                "nats",
                log="offer",
            ),
            Chart(
                "Accuracy on training crops",
                (
                    (r"(.+)/accuracy", r"\1: student"),
                    (r"(.+)/teacher_accuracy", r"\1: teacher"),
                    (r"(.+)/agreement", r"\1: student says what the teacher says"),
                ),
                "Share of the labelled training crops that are named rightly.",
                "Rising; far above the test accuracy means that it learns by heart.",
                "share",
                "0%",
            ),
            Chart(
                "Exits and the deepest layer",
                ((r"layerwise/exit_(\d+)_kl", r"exit \1"),),
                "How far what each exit says is from what the whole network says (KL divergence, in nats).",
                "Falling; deeper exits lie lower.",
                "nats",
                log="offer",
            ),
        ),
    ),
    (
        "Has it collapsed?",
        "A network that gives every image the same answer has a perfect loss and has learnt nothing. These signs need "
        "no labels.",
        (
            Chart(
                "Feature spread",
                (("feature_spread", "training batch"), ("health/spread", "health check")),
                "How far the features of different images lie apart: 1 when they are all over the sphere, 0 when every "
                "image gets the same one.",
                f"Steady or rising, often 0.3 to 0.9; below {ALIKE:g} all images look the same.",
                "of 1",
                zones=(Zone(None, ALIKE),),
            ),
            Chart(
                "Effective rank",
                (("health/effective_rank", "effective rank"),),
                "How many directions the features of a batch really use (RankMe); at most the number of images or "
                "dimensions, whichever is smaller.",
                "Rising or steady; near 1 everything lies on one line.",
                "directions",
                "0,0.[0]",
            ),
            Chart(
                "Information in the teacher's output",
                (("health/information", "information"),),
                "How much the teacher's output tells about which image it is of, as a share of the most possible. 0 in "
                "both kinds of collapse.",
                f"Above {LITTLE:g} and rising; below {NOTHING:g} the teacher says nothing.",
                "share",
                "0.[0000]",
                log="first",
                zones=(Zone(None, NOTHING),),
            ),
            Chart(
                "Prototypes in use",
                (("health/prototypes_used", "prototypes in use"),),
                "Share of the prototypes (the K answers that the teacher chooses from) that were its first choice for "
                "some image since the last check.",
                "Steady or rising; few, and falling, means a collapse to one point.",
                "share",
                "0%",
            ),
            Chart(
                "Teacher's entropy at health checks",
                (("health/teacher_entropy", "entropy"), ("health/kl", "KL(teacher, student)")),
                "The same two numbers as in the loss, of single steps.",
                f"Entropy between {SHARP:g} and {EVEN:g}; outside of it only together with information near 0 a sign "
                f"of collapse.",
                "share of ln K",
                log="offer",
            ),
        ),
    ),
    (
        "Is the optimisation calm?",
        "Sizes of gradients and steps, and the schedules that the run follows.",
        (
            Chart(
                "Gradient norm",
                (("gradient_norm", "mean"), ("health/gradient_norm", "health check")),
                "Length of the largest gradient of a parameter, before clipping.",
                "No sudden jumps by factors of ten.",
                log="first",
            ),
            Chart(
                "Size of a step",
                (("health/update_norm", "step / weights"),),
                "How far one step moves the weights, as a share of their length.",
                f"Below 0.007; above {REPLACED:g} weights are replaced rather than moved.",
                "share",
                "0.[00000]",
                log="first",
                zones=(Zone(REPLACED, None),),
            ),
            Chart(
                "Centre",
                (("dino/center_rms", "centre, root mean square"),),
                "The running mean of the teacher's outputs that is taken off them, against collapse to one point.",
                "Settles after the beginning.",
            ),
            Chart("Learning rate", (("lr", "learning rate"),), "As it was used.", "", format="0.[0]e+0", log="offer"),
            Chart("Weight decay", (("schedule/optim.weight_decay", "weight decay"),), "From the settings.", ""),
            Chart(
                "Teacher's momentum",
                (("schedule/teacher.momentum", "momentum"),),
                "Share of the teacher that stays at each step; the rest comes from the student. From the settings.",
                "",
                format="0.[00000]",
            ),
            Chart(
                "Temperatures",
                ((r"schedule/terms\.(.+temperature)", r"\1"),),
                "What outputs are divided by before the softmax: lower is sharper. From the settings.",
                "",
            ),
            Chart("Other schedules", ((r"schedule/(?:terms\.)?(.+)", r"\1"),), "From the settings.", ""),
        ),
    ),
    (
        "Is the machine busy?",
        "Speed, and what is waited for.",
        (
            Chart(
                "Speed", (("images_per_s", "images/s"),), "Images trained on, a second.", "Steady.", "images/s", "0,0"
            ),
            Chart(
                "Waiting for data",
                (("data_wait", "waiting"),),
                "Share of the time that the network waited for images.",
                "Near 0; otherwise more workers, data.cache, or smaller images on disk.",
                "share",
                "0.[0]%",
            ),
            Chart("Unreadable images", (("bad_files", "images"),), "Others stood in for them.", "0", "images", "0,0"),
            Chart(
                "Skipped steps",
                (("skipped_steps", "steps"),),
                "Steps whose numbers were not finite, in all so far; nothing was learnt from them.",
                "0",
                "steps",
                "0,0",
            ),
        ),
    ),
)
HEALTH = {  # keys whose first and last values say how a run is doing
    "health/spread": "Feature spread",
    "health/effective_rank": "Effective rank",
    "health/information": "Information",
    "health/prototypes_used": "Prototypes in use",
    "health/teacher_entropy": "Teacher's entropy",
    "dino/loss_share": "Loss / ln K",
    "health/gradient_norm": "Gradient norm",
    "health/update_norm": "Size of a step",
}
REST = Chart("", (), "A number of metrics.jsonl that this page knows nothing about.", "")
UNSHOWN = {"step", "epoch", "health/loss", "health/rank_share"}  # shown elsewhere, or nothing by themselves


def label_of(chart: Chart, key: str) -> str | None:
    """How a key is called in a chart; None where it does not belong there."""
    for pattern, label in chart.lines:
        if match := re.fullmatch(pattern, key):
            return match.expand(label) if match.groups() else label
    return None


def charts_of(keys: list[str]) -> list[tuple[str, str, list[tuple[Chart, dict[str, str]]]]]:
    """[(heading, about, [(chart, {key: label})])] of those that have something to show; every key is in one chart."""
    left = [key for key in keys if key not in UNSHOWN]
    found = []
    for heading, about, charts in GROUPS:
        here = []
        for chart in charts:
            labels = {key: label for key in left if (label := label_of(chart, key)) is not None}
            left = [key for key in left if key not in labels]
            if labels:
                here.append((chart, labels))
        if here:
            found.append((heading, about, here))
    if left:
        rest = [(REST._replace(title=key), {key: key}) for key in left]
        found.append(("Other numbers", "Numbers of metrics.jsonl that have no place of their own.", rest))
    return found
