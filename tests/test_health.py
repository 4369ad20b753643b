"""The verdict of a run on itself: the signs behind it, histories it has to read rightly, and runs made to fail."""

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command, tiny_pairs
from test_laws import metrics

from dino_sd import checkpoint
from dino_sd.errors import Halted
from dino_sd.health import REMEDIES, Signs, effective_rank, feature_spread, history_of, verdict
from dino_sd.train import train

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ONE_POINT = {"terms__dino__center": "false", "terms__dino__teacher_temperature": 1e-3}
UNIFORM = {"terms__dino__teacher_temperature": 0.1}
OFTEN = {"health__every": 10, "log__every": 10}


# The effective rank


def by_numpy(features_ND: np.ndarray) -> float:
    sigmas = np.linalg.svd(features_ND, compute_uv=False)
    shares = sigmas[sigmas > 0] / sigmas.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16), (1, 8)])
def test_effective_rank_is_numpys(shape: tuple[int, int]):
    features_ND = np.random.default_rng(0).normal(0.5, 1, shape).astype(np.float32)
    assert effective_rank(torch.from_numpy(features_ND)).item() == pytest.approx(by_numpy(features_ND), rel=1e-5)


def test_effective_rank_of_known_matrices():
    one = torch.outer(torch.randn(20), torch.randn(300))
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(24) * 7).item() == pytest.approx(24, rel=1e-6)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(math.exp(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    ))  # fmt: skip
    assert effective_rank(torch.zeros(4, 8)).item() == 1  # nothing in it, and no NaN
    assert math.isnan(effective_rank(torch.tensor([[math.nan, 1.0], [0.0, 1.0]])).item())


def test_features_alike_have_no_spread():
    alike = torch.ones(8, 32) + 1e-4 * torch.randn(8, 32)
    assert feature_spread(alike) < 1e-3 and 0.9 < feature_spread(torch.randn(512, 32)) < 1.1


# Histories

GOOD = Signs(
    step=0, loss=6.5, gradient_norm=0.2, update_norm=1e-3, teacher_entropy=0.91, kl=0.03, information=0.05,
    prototypes_used=0.01, spread=0.5, effective_rank=8.0, rank_share=0.12,
)  # fmt: skip
POINT = {"teacher_entropy": 0.0, "kl": 0.001, "information": 0.0, "prototypes_used": 0.001}
FLAT = {"teacher_entropy": 0.9995, "kl": 0.0003, "information": 0.0005}
NO_TARGETS = {"teacher_entropy": None, "kl": None, "information": None, "prototypes_used": None}


def told(*changes: dict[str, Any], warmup: int = 100, every: int = 50) -> list[str]:
    """The verdict after each of these judgements, which differ from a good one."""
    history = [replace(GOOD, step=every * (i + 1), **change) for i, change in enumerate(changes)]
    return [verdict(history[: end + 1], warmup).name for end in range(len(history))]


def test_a_run_that_learns():
    assert told({}, {}, {}, {}) == ["warming up", "warming up", "learning", "learning"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (POINT, "collapsed: one point"),
        (FLAT, "collapsed: uniform"),
        (
            {"teacher_entropy": 0.6, "kl": 0.001, "information": 0.0},
            "collapsed: one point",
        ),  # one uneven output for all
        ({"update_norm": 0.3}, "unstable"),
        ({"loss": math.nan}, "unstable"),
        ({"kl": 0.6}, "unstable"),
        ({**NO_TARGETS, "spread": 0.001, "effective_rank": 1.01}, "collapsed: one point"),
    ],
)
def test_what_is_wrong_has_to_be_so_twice(change: dict[str, Any], name: str):
    assert told({}, {}, {}, change, {}, change, change, change, {})[2:] == [
        "learning", "learning", "learning", "learning", name, name, "learning",
    ]  # fmt: skip
    history = [replace(GOOD, step=50 * i, **change) for i in (8, 9)]
    text = verdict(history, 100).text
    assert name in text and "step 450" in text and "gradient norm 0.2" in text
    assert ("optim.lr" if name == "unstable" or change.get("spread") else "terms.dino") in text


def test_a_beginning_is_no_uniform_collapse():
    """Outputs are even before anything is learnt; after the warm-up they count unless they become less so."""
    falling = [{**FLAT, "information": value} for value in (0.01, 0.001, 0.0005, 0.0004, 0.0004, 0.0003)]
    assert told(*falling, warmup=1000) == ["warming up"] * 6
    rising = [{**FLAT, "information": 0.0003 * 1.4**i} for i in range(7)]
    assert told(*rising) == ["warming up"] * 7
    assert told(*falling, warmup=100)[-1] == "collapsed: uniform"


def test_few_prototypes_and_runs_without_them():
    even = {"teacher_entropy": 0.8, "kl": 0.1, "information": 0.2, "prototypes_used": 1.0}
    assert told(*[even] * 4)[-1] == "learning"
    sharp = {"teacher_entropy": 0.001, "kl": 0.1, "information": 0.6, "prototypes_used": 0.4}
    assert told(*[sharp] * 4)[-1] == "learning"
    assert told(*[NO_TARGETS] * 4)[-1] == "learning"
    one_image = {**NO_TARGETS, "spread": None, "effective_rank": None, "rank_share": None}
    assert told(*[one_image] * 4)[-1] == "learning"


def test_drawn_again_from_the_log():
    signs = [GOOD, replace(GOOD, step=50, **NO_TARGETS)]
    lines = [{"step": s.step, "loss": 1.0, **s.line(), "health/verdict": "learning"} for s in signs]
    assert history_of([{"step": 1, "loss": 2.0}, *lines]) == signs
    assert set(lines[0]) == {"step", "loss", "health/verdict", *(f"health/{k}" for k in asdict(GOOD) if k != "step")}


# Runs


def verdicts(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["health/verdict"]) for line in metrics(run) if "health/verdict" in line]


def test_one_point_is_named_early_and_stops(tiny, tiny_yaml: Path, tmp_path: Path, capsys):
    pairs = tiny_pairs(tmp_path / "a", steps=300, health__on_collapse="stop", **OFTEN, **ONE_POINT)
    done = command("train", tiny_yaml, *pairs, env=ONE_THREAD)
    assert done.returncode == 3, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "stopped: collapsed: one point at step" in last and REMEDIES["collapsed: one point"] in last
    step, name = verdicts(tmp_path / "a")[-1]
    assert name == "collapsed: one point" and step <= 50
    with pytest.raises(Halted, match="one point"):  # the same again, from the checkpoint before
        train(tiny(tmp_path / "a", steps=300, health__on_collapse="stop", **OFTEN, **ONE_POINT))


def test_uniform_is_named(tiny, tmp_path: Path, capsys):
    train(tiny(tmp_path / "a", steps=200, checkpoint__every=1.0, **OFTEN, **UNIFORM))
    names = [name for _, name in verdicts(tmp_path / "a")]
    assert names[-1] == "collapsed: uniform" and "collapsed: one point" not in names
    said = capsys.readouterr().err
    assert said.count("warning: collapsed: uniform") == 1 and "lower terms.dino.teacher_temperature" in said
    assert "  collapsed: uniform\n" in said  # on the progress line


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 4, "accumulate": 4},  # parts of one image
        {"batch_size": 1},
        {"terms__dino__prototypes": 2},
        {"terms__dino__prototypes": 4096},
        {"terms__dino__weight": 0, "terms__labels": "{}"},
    ],
)
def test_what_has_not_collapsed_is_not_called_so(tiny, tmp_path: Path, changes: dict[str, Any]):
    train(tiny(tmp_path / "a", steps=60, checkpoint__every=1.0, **OFTEN, **changes))
    named = verdicts(tmp_path / "a")
    assert len(named) == 6 and not [name for _, name in named if name.startswith("collapsed")], named


def test_labels_alone(tiny_yaml: Path, tmp_path: Path):
    pairs = tiny_pairs(tmp_path / "a", steps=80, images="null", checkpoint__every=1.0, model_args__depth=2, **OFTEN)
    done = command("train", "supervised", *pairs, "device=cpu", "evaluate.every=null", env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert [name for _, name in verdicts(tmp_path / "a")][-1] == "learning"
    last = metrics(tmp_path / "a")[-1]
    assert last["health/spread"] > 0.1 and last["health/effective_rank"] > 1.5 and "health/kl" not in last


def test_two_ranks_say_the_same_and_stop_together(tiny, tiny_yaml: Path, tmp_path: Path):
    options = {"precision": "fp64", "drop_path": 0.0, "steps": 60, **OFTEN, **ONE_POINT}
    train(tiny(tmp_path / "one", **options))
    pairs = tiny_pairs(tmp_path / "two", **options, health__on_collapse="stop")
    done = command("train", tiny_yaml, *pairs, ranks=2, env=ONE_THREAD)
    assert done.stderr.count("stopped: collapsed: one point") == 1
    one, two = (history_of(metrics(tmp_path / name)) for name in ("one", "two"))
    assert verdicts(tmp_path / "two") == verdicts(tmp_path / "one")[: len(two)]
    assert verdicts(tmp_path / "two")[-1][1] == "collapsed: one point"
    for ours, theirs in zip(one, two, strict=False):
        assert asdict(theirs) == pytest.approx(asdict(ours), rel=1e-6, abs=1e-9)


def test_a_run_that_goes_on_says_the_same(tiny, tmp_path: Path, capsys):
    options = {"steps": 60, "checkpoint__every": "steps=5", "checkpoint__keep": 12, **ONE_POINT}
    for run in ("a", "b"):
        train(tiny(tmp_path / run, **options, health__every=7))
    for path in checkpoint.all_of(tmp_path / "b")[:9]:  # back to step 15, between two judgements
        path.unlink()
    capsys.readouterr()
    train(tiny(tmp_path / "b", **options, health__every=7))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert [step for step, _ in verdicts(tmp_path / "a")] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert capsys.readouterr().err.count("warning: collapsed: one point") == 1
    checkpoint.newest(tmp_path / "b").unlink()  # pyright: ignore
    train(tiny(tmp_path / "b", **options, health__every=2))  # free to change
    assert "warning: collapsed" not in capsys.readouterr().err  # said before the cut
