"""Training with labels, with teachers and with oneself: tiny runs of every mode, from YAML to the export."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import TINY, assert_identical, command, largest_difference, state_of, tiny_pairs
from PIL import Image

from dino_sd import build, checkpoint, recipe, terms
from dino_sd.config import Config, GenerationsSettings
from dino_sd.data.source import open_source
from dino_sd.errors import UserError
from dino_sd.evaluate import class_logits, evaluate_accuracy
from dino_sd.evaluator_config import AccuracySettings
from dino_sd.evaluators.accuracy import accuracy, mean_probabilities
from dino_sd.export import export
from dino_sd.generations import generation_config, generations
from dino_sd.loading import load_model
from dino_sd.models.backbone import Backbone
from dino_sd.plan import plan
from dino_sd.train import train

SUPERVISED: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key not in ("teacher", "terms", "views")},
    "views": {"global": {"count": 1, "size": 28}, "local": {"count": 0}, "mean": [0.29], "std": [0.35]},
    "workers": 0,
    "optim": {"lr": 0.01},
}
ALL_THREE = {"labels": {}, "consistency": {}, "layerwise": {"layers": [1]}}
LARGER = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 2}


def settings(out: Path, terms: dict[str, Any], **changes: Any) -> Config:
    """A config from a YAML file with these terms; `__` in a name stands for a dot, as in conftest."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump({**SUPERVISED, "out": str(out), "terms": terms}))
    return recipe.load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def draw_classes(folder: Path, names: list[str], each: int = 8, seed: int = 0) -> Path:
    """Noise of another brightness for each class, so that some is learnt and not all."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(60 * number, 125 + 60 * number, (28, 28)) * random.uniform(0.6, 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def student_of(path: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix(".student."): v for k, v in state_of(path).items() if k.startswith(".student.")}


def teacher_of(path: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix(".teacher."): v for k, v in state_of(path).items() if k.startswith(".teacher.")}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs to learn from, trained once for all tests; nothing writes into them."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("parents")
    draw_classes(home / "cat_dog", ["cat", "dog"])
    train(settings(home / "finished", {"labels": {}}, steps=4))
    train(settings(home / "unfinished", {"labels": {}}, steps=4, checkpoint__every="steps=2")).unlink()
    train(settings(home / "wider", {"labels": {}}, steps=4, model_args__embed_dim=48))
    train(settings(home / "larger", {"labels": {}}, steps=4).model_copy(update={"model_args": LARGER}))
    train(settings(home / "unlabelled", TINY["terms"], steps=2, views__local__count=2, views__local__size=14))
    train(settings(home / "animals", {"labels": {}}, steps=2, batch_size=8, data=home / "cat_dog"))
    return {path.name: path for path in home.iterdir() if path.is_dir()}


# Supervised


def test_supervised_run_learns_and_is_judged(tmp_path: Path):
    small = draw_classes(tmp_path / "images", ["a", "b", "c"])
    run = tmp_path / "run"
    saved = train(
        settings(run, {"labels": {}}, steps=60, data=small, optim__lr=0.05, log__every=10, evaluate__every=0.5,
                 evaluate__test=small, evaluate__train=small)
    )  # fmt: skip
    lines = metrics(run)
    losses = [line["labels/loss"] for line in lines if "labels/loss" in line]
    assert losses[-1] < 0.8 * losses[0] < math.log(3)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses)
    judged = {line["step"]: line for line in lines if "accuracy" in line}
    assert judged.keys() == {0, 30, 60}
    scores = checkpoint.load(saved)["scores"]
    assert scores == {key: value for key, value in judged[60].items() if key != "step"}
    assert scores["accuracy"] == pytest.approx(np.mean(scores["accuracy_per_class"]))
    assert scores["accuracy"] > 50 and scores["accuracy_top5"] == 100 and "knn" in scores
    report = evaluate_accuracy(run, AccuracySettings(test=str(small), device="cpu", workers=0))
    (row,) = report["results"]
    assert (row["output"], row["top1"], row["top5"]) == ("classifier", scores["accuracy"], 100.0)
    assert report["per_class"] == dict(zip("abc", scores["accuracy_per_class"], strict=True))


def test_labels_of_a_tenth(tmp_path: Path, capsys):
    """Labels alone train on the labelled images; with a term that needs none, on all."""
    alone = checkpoint.load(train(settings(tmp_path / "a", {"labels": {}}, steps=1, labelled=0.1)))
    assert "1,000 of 10,000 images have a label" in capsys.readouterr().err
    assert (alone["data"]["images"], alone["data"]["labelled"]) == (1000, 1.0)
    both = checkpoint.load(train(settings(tmp_path / "b", {"labels": {}, "consistency": {}}, steps=1, labelled=0.1)))
    assert (both["data"]["images"], both["data"]["labelled"]) == (10000, 0.1)


def test_resumed_run_is_the_same_run(tmp_path: Path):
    """Labels of a half, consistency and exits: 20 steps straight == cut off after 10 and run again, to the bit."""
    options = {"labelled": 0.5, "checkpoint__every": "steps=10"}
    straight = train(settings(tmp_path / "straight", ALL_THREE, **options))
    run = tmp_path / "cut"
    train(settings(run, ALL_THREE, **options)).unlink()
    assert checkpoint.step_of(checkpoint.all_of(run)[0]) == 10
    assert_identical(straight, train(settings(run, ALL_THREE, **options)))
    clock = ("images_per_s", "data_wait")
    ours, theirs = ([{k: v for k, v in line.items() if k not in clock} for line in metrics(tmp_path / name)]
                    for name in ("cut", "straight"))  # fmt: skip
    assert ours == theirs and {"labels/loss", "consistency/loss", "layerwise/exit_1_kl"} <= ours[0].keys()


@pytest.mark.parametrize("target", ["student", "teacher"])
def test_one_batch_is_its_parts(tmp_path: Path, target: str):
    terms = {**ALL_THREE, "consistency": {"target": target}}
    options = {"precision": "fp64", "drop_path": 0.0, "steps": 6, "labelled": 0.5}
    whole = train(settings(tmp_path / "whole", terms, **options))
    parts = train(settings(tmp_path / "parts", terms, accumulate=4, **options))
    assert largest_difference(whole, parts) < 1e-6
    assert bool(teacher_of(whole)) == (target == "teacher")


def test_two_ranks_are_one(tmp_path: Path):
    """A chain of two generations with a companion, under torchrun: the same weights and the same accuracies."""
    terms = {"born_again": {}, "consistency": {}}
    options: dict[str, Any] = {"precision": "fp64", "drop_path": 0.0, "steps": 4, "labelled": 0.5, "batch_size": 64}
    options |= {"evaluate__every": 1.0, "evaluate__test": "fashion-mnist-mini:test"}
    one = generations(settings(tmp_path / "one", terms, **options), GenerationsSettings(generations=1))
    settings(tmp_path / "two", terms, **options)
    pairs = tiny_pairs(tmp_path / "two", **options)
    done = command(
        "generations",
        tmp_path / "two.yaml",
        *pairs,
        "generations=1",
        ranks=2,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for run in ("gen0", "gen1"):
        ours, theirs = (checkpoint.path_of(tmp_path / ranks / run, 4) for ranks in ("one", "two"))
        assert largest_difference(ours, theirs) < 1e-6
    two = json.loads((tmp_path / "two" / "lineage.json").read_text())
    for ours, theirs in zip(one["generations"], two["generations"], strict=True):
        assert theirs["accuracy"] == pytest.approx(ours["accuracy"], abs=0.06)  # one image in 2,000 may tip over
        assert theirs["parent"] == ours["parent"]


def test_mixed_labels_train(tmp_path: Path):
    run = tmp_path / "run"
    saved = train(settings(run, {"labels": {}}, steps=4, views__mixup=0.8, views__cutmix=1.0, log__every=1))
    plain = train(settings(tmp_path / "plain", {"labels": {}}, steps=4))
    assert largest_difference(saved, plain, (".student",)) > 1e-4
    assert all(math.isfinite(line["loss"]) for line in metrics(run))


def test_dino_with_labels_and_an_exit(tmp_path: Path):
    """Two anchors share a backbone; the exits' heads are those of one of them."""
    terms = {**TINY["terms"], "labels": {"weight": 0.5}, "layerwise": {"layers": [1]}}
    run = tmp_path / "run"
    saved = train(settings(run, terms, steps=3, views__global__count=2, log__every=1))
    state = checkpoint.load(saved)
    assert state["result"] == "teacher"
    assert {"heads.classifier.weight", "heads.dino.last_layer.weight_v"} <= teacher_of(saved).keys()
    assert {"dino/loss_share", "labels/loss", "layerwise/exit_1_kl"} <= metrics(run)[0].keys()


def test_a_term_is_a_file(tmp_path: Path, monkeypatch):
    """Ten lines in a folder of one's own, and nothing to edit: the YAML names the file."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small_output.py").write_text(
        "from dino_sd import settings\n"
        "from dino_sd.term import Term\n"
        "class Settings(settings.Settings):\n"
        "    weight: settings.Curve\n"
        "    power: float = 2.0\n"
        "class SmallOutput(Term):\n"
        "    def __init__(self, power):\n"
        "        super().__init__(); self.power = power\n"
        "    def forward(self, student, teacher, t):\n"
        "        return student.pooled[0].abs().pow(self.power).mean()\n"
    )
    monkeypatch.setattr(terms, "__path__", [*terms.__path__, str(tmp_path / "mine")])
    with_term = {"labels": {}, "small_output": {"weight": 0.5, "power": 1.0}}
    ours = train(settings(tmp_path / "with", with_term, steps=2))
    plain = train(settings(tmp_path / "without", {"labels": {}}, steps=2))
    assert checkpoint.load(ours)["config"]["terms"]["small_output"]["power"] == 1.0
    with_it, without = student_of(ours), student_of(plain)
    assert with_it.keys() == without.keys()
    assert max(float((with_it[key] - without[key]).abs().max()) for key in with_it) > 1e-5
    with pytest.raises(UserError, match=r"small_output.powr.*'terms.small_output.power'"):
        settings(tmp_path / "wrong", {"labels": {}, "small_output": {"weight": 0.5, "powr": 1}})
    with pytest.raises(UserError, match="terms: small_output collapses when it stands alone"):
        train(settings(tmp_path / "alone", {"small_output": {"weight": 1}}, steps=1))


# Teachers


def test_born_again_child(parents: dict[str, Path], tmp_path: Path):
    parent = checkpoint.newest(parents["finished"])
    assert parent is not None
    run = tmp_path / "child"
    saved = train(settings(run, {"born_again": {}}, steps=4, seed=1, teacher__init=parents["finished"], log__every=1))
    assert checkpoint.load(saved)["result"] == "student"
    taught, parental = teacher_of(saved), student_of(parent)
    assert taught.keys() == parental.keys()
    assert all(torch.equal(taught[key], parental[key]) for key in taught)
    line = metrics(run)[0]
    assert {"born_again/agreement", "born_again/accuracy", "born_again/teacher_accuracy"} <= line.keys()
    model = load_model(run)
    assert model.classes == load_model(parents["finished"]).classes and "classifier" in model.heads
    again = train(settings(tmp_path / "again", {"born_again": {}}, steps=4, seed=1, teacher__init=parents["finished"]))
    assert largest_difference(saved, again) == 0


def test_born_again_without_labels_learns_from_the_teacher_alone(parents: dict[str, Path], tmp_path: Path):
    flat = tmp_path / "flat"
    draw_classes(tmp_path / "images", ["a"], each=16)
    (tmp_path / "images" / "a").rename(flat)
    run = tmp_path / "run"
    saved = train(
        settings(run, {"born_again": {"label_share": 0}}, data=flat, steps=2, teacher__init=parents["finished"])
    )
    assert student_of(saved)["heads.classifier.weight"].shape == (10, 32)
    assert "born_again/agreement" in metrics(run)[0] and "born_again/accuracy" not in metrics(run)[0]


BORN_AGAIN = {"born_again": {}}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("no parent", BORN_AGAIN, {}, ["terms.born_again", "teacher.init=RUN", "generations"]),
    ("missing parent", BORN_AGAIN, {"teacher__init": "no/such/run"}, ["teacher.init=no/such/run", "does not exist"]),
    ("unfinished parent", BORN_AGAIN, {"teacher__init": "unfinished"}, ["step 2 of 4", "not finished"]),
    ("wider parent", BORN_AGAIN, {"teacher__init": "wider"},
     ["another architecture", "vit_tiny_patch16_224", "distill"]),
    ("parent without classes", BORN_AGAIN, {"teacher__init": "unlabelled"}, ["trained without labels", "no classes"]),
    ("distill without classes", {"distill": {}}, {"teacher__init": "unlabelled"},
     ["trained without labels", "no classes"]),
    ("distill without teacher", {"distill": {}}, {}, ["terms.distill", "teacher.init"]),
    ("parent of other classes", BORN_AGAIN, {"teacher__init": "animals", "data": "CAT_FOX"},
     ["other classes", "dog, fox"]),
    ("distill other classes", {"distill": {}}, {"teacher__init": "animals"},
     ["other classes", "2 against 10", "Ankle boot"]),
    ("teacher of no use", {"labels": {}}, {"teacher__init": "finished"}, ["teacher.init", "no term learns"]),
    ("channels", BORN_AGAIN, {"teacher__init": "finished", "channels": 3, "views__mean": "null", "views__std": "null"},
     ["1 channel(s)", "channels=3"]),
    ("pixels", BORN_AGAIN, {"teacher__init": "pixels"}, ["teacher.init=pixels"]),
    ("moving and frozen", BORN_AGAIN, {"teacher__init": "finished", "teacher__momentum": 0.9}, ["teacher.momentum"]),
    ("T", {"born_again": {"temperature": 0}}, {"teacher__init": "finished"},
     ["terms.born_again.temperature=0", "greater than 0"]),
    ("T of exits", {"labels": {}, "layerwise": {"temperature": -1}}, {}, ["terms.layerwise.temperature=-1"]),
    ("T of consistency", {"labels": {}, "consistency": {"temperature": 0}}, {}, ["terms.consistency.temperature=0"]),
    ("weights of 0", {"labels": {"weight": 0}, "consistency": {"weight": 0}}, {}, ["weights add up to 0"]),
    ("weight below 0", {"labels": {"weight": -1}}, {}, ["terms.labels.weight", "at least 0"]),
    ("last block", {"labels": {}, "layerwise": {"layers": [2]}}, {}, ["terms.layerwise.layers: 2", "2 blocks"]),
    ("no block", {"labels": {}, "layerwise": {"layers": [1, 12]}}, {}, ["terms.layerwise.layers: 12", "2 blocks"]),
    ("no layers", {"labels": {}, "layerwise": {"layers": []}}, {}, ["terms.layerwise.layers"]),
    ("exits alone", {"layerwise": {"layers": [1]}}, {}, ["terms.layerwise", "terms.labels or terms.dino"]),
    ("consistency alone", {"consistency": {}}, {}, ["terms.consistency", "terms.labels or terms.dino"]),
    ("anchor of no weight", {"labels": {"weight": 0}, "consistency": {}}, {}, ["collapses when it stands alone"]),
    ("dino with a frozen teacher", {"dino": {"prototypes": 16}, "born_again": {}},
     {"teacher__init": "finished", "views__global__count": 2}, ["terms.dino", "leave teacher.init out"]),
    ("crops that the teacher cannot take", {"distill": {}},
     {"teacher__init": "finished", "views__global__size": 32, "model_args__patch_size": 8},
     ["teacher.init", "32x32", "divisible"]),
    ("mixup with local crops", {"labels": {}},
     {"views__mixup": 0.2, "views__local__count": 2, "views__local__size": 14},
     ["views.mixup", "views.local.count=0"]),
    ("cutmix of half the labels", {"labels": {}, "consistency": {}}, {"views__cutmix": 1, "labelled": 0.5},
     ["views.cutmix", "every image"]),
    ("labels of a folder without", {"labels": {}}, {"data": "FLAT", "batch_size": 8}, ["terms.labels", "no labels"]),
    ("labels of nobody for the child", BORN_AGAIN, {"data": "FLAT", "batch_size": 8, "teacher__init": "finished"},
     ["terms.born_again", "label_share=0"]),
    ("share of no labels", {"labels": {}, "consistency": {}}, {"data": "FLAT", "labelled": 0.5}, ["no labels to keep"]),
    ("evaluated on other classes", {"labels": {}},
     {"evaluate__every": 1.0, "evaluate__test": "CAT_FOX"}, ["evaluate.test", "cat_fox", "fashion-mnist-mini"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "changes", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refused(
    parents: dict[str, Path], tmp_path: Path, terms: dict[str, Any], changes: dict[str, Any], words: list[str]
):
    """One line that names the thing, before anything is written."""
    changes = {key: parents.get(str(value), value) for key, value in changes.items()}
    if "CAT_FOX" in changes.values():
        folder = draw_classes(tmp_path / "cat_fox", ["cat", "fox"])
        changes = {key: folder if value == "CAT_FOX" else value for key, value in changes.items()}
    if changes.get("data") == "FLAT":
        changes["data"] = draw_classes(tmp_path / "images", ["all"]) / "all"
    with pytest.raises(UserError) as error:
        train(settings(tmp_path / "run", terms, **changes))
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "terms", "head", "shape"),
    [
        ("larger", {"distill": {}}, "heads.classifier.weight", (10, 32)),
        ("larger", {"distill": {"target": "features"}}, "heads.distill.weight", (48, 32)),
        ("animals", {"distill": {"target": "features"}}, "heads.distill.weight", (32, 32)),
        (
            "larger",
            {"distill": {}, "layerwise": {"layers": [1]}, "consistency": {}},
            "heads.exit_1.head.weight",
            (10, 32),
        ),
    ],
    ids=["logits", "features", "features of other classes", "exits"],
)
def test_distill_from_another_model(
    parents: dict[str, Path], tmp_path: Path, name: str, terms: dict[str, Any], head: str, shape: tuple[int, int]
):
    parent = checkpoint.newest(parents[name])
    assert parent is not None
    run = tmp_path / "run"
    saved = train(settings(run, terms, steps=30, optim__lr=0.05, teacher__init=parents[name]))
    assert student_of(saved)[head].shape == shape
    taught, parental = teacher_of(saved), student_of(parent)
    assert all(torch.equal(taught[key], parental[key]) for key in taught) and len(taught) == len(parental)
    losses = [line["distill/loss"] for line in metrics(run)]
    assert losses[-1] < losses[0]


def test_distill_features_of_images_without_labels(parents: dict[str, Path], tmp_path: Path):
    flat = draw_classes(tmp_path / "images", ["all"], each=16) / "all"
    run = tmp_path / "run"
    terms = {"distill": {"target": "features"}}
    train(settings(run, terms, steps=30, data=flat, optim__lr=0.05, teacher__init=parents["unlabelled"]))
    losses = [line["distill/loss"] for line in metrics(run)]
    assert losses[-1] < losses[0] < 2
    model = load_model(run)
    assert model.classes is None and not model.heads
    with pytest.raises(UserError, match="knows no classes"):
        evaluate_accuracy(run, AccuracySettings(test="fashion-mnist-mini:test", device="cpu"))


# Generations


def chain(folder: Path, **changes: Any) -> Config:
    images = folder.parent / "images"
    if not images.exists():
        draw_classes(images, ["a", "b", "c"])
    terms = {"born_again": {"temperature": 2.0}, "layerwise": {"layers": [1]}}
    options = {"steps": 4, "checkpoint__every": "steps=2", "data": images, "optim__lr": 0.05,
               "evaluate__every": 1.0, "evaluate__train": images, "evaluate__test": images, "seed": 7}  # fmt: skip
    return settings(folder, terms, **{**options, **changes})


def test_generations(tmp_path: Path, capsys):
    out = tmp_path / "chain"
    found = generations(chain(out), GenerationsSettings(generations=2))
    printed = capsys.readouterr().out
    written = (out / "lineage.json").read_bytes()
    assert json.loads(written) == json.loads(json.dumps(found))
    entries = found["generations"]
    assert [entry["name"] for entry in entries] == ["gen0", "gen1", "gen2"]
    assert [entry["parent"] for entry in entries] == [None, "gen0", "gen1"]
    assert [entry["seed"] for entry in entries] == [7, 8, 9]
    hashes = [hashlib.sha256((out / entry["checkpoint"]).read_bytes()).hexdigest() for entry in entries]
    assert [entry["sha256"] for entry in entries] == hashes
    assert [entry["parent_sha256"] for entry in entries] == [None, *hashes[:2]]
    states = [checkpoint.load(out / entry["checkpoint"]) for entry in entries]
    by_teacher = {"born_again", "layerwise"}
    assert [set(state["config"]["terms"]) for state in states] == [{"labels", "layerwise"}, by_teacher, by_teacher]
    assert [state["config"]["teacher"]["init"] for state in states] == [None, str(out / "gen0"), str(out / "gen1")]
    assert [state["config"]["seed"] for state in states] == [7, 8, 9]
    for child, parent in ((states[1], states[0]), (states[2], states[1])):
        weights = {key: value for key, value in child["teacher"].items() if key.startswith(("backbone", "heads.class"))}
        assert weights.keys() == child["teacher"].keys()
        assert all(torch.equal(value, parent["student"][key]) for key, value in weights.items())
    assert [entry["accuracy"] for entry in entries] == [state["scores"]["accuracy"] for state in states]

    logits, labels_N = [], torch.empty(0)
    for entry in entries:
        judged = AccuracySettings(test=str(tmp_path / "images"), device="cpu", workers=0)
        source = open_source(judged.test, 1)
        of_model, labels_N = class_logits(load_model(out / entry["checkpoint"]), source, torch.device("cpu"), judged)
        logits.append(of_model["classifier"])
    assert [ensemble["members"] for ensemble in found["ensembles"]] == [
        ["gen0", "gen1"], ["gen0", "gen1", "gen2"], ["gen1", "gen2"]
    ]  # fmt: skip
    for ensemble in found["ensembles"]:
        members = [logits[int(name[-1])] for name in ensemble["members"]]
        assert ensemble["accuracy"] == accuracy(mean_probabilities(members), labels_N).top1

    generations(chain(out), GenerationsSettings(generations=2))
    assert capsys.readouterr().out == printed and (out / "lineage.json").read_bytes() == written
    (out / entries[2]["checkpoint"]).unlink()
    (out / "lineage.json").unlink()
    generations(chain(out), GenerationsSettings(generations=2))
    assert capsys.readouterr().out == printed and (out / "lineage.json").read_bytes() == written


def test_generations_stop_early(tmp_path: Path, capsys):
    """With a learning rate of next to nothing a child is as good as its first weights: one is soon no better."""
    found = generations(
        chain(tmp_path / "chain", optim__lr=1e-12, optim__min_lr=0, evaluate__train="null", seed=0),
        GenerationsSettings(generations=6, stop_early=True),
    )
    scores = [entry["accuracy"] for entry in found["generations"]]
    ended = next((n for n in range(1, len(scores)) if scores[n] <= scores[n - 1]), None)
    assert ended == len(scores) - 1 < 6
    assert "stopped early" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("terms", "changes", "words"),
    [
        ({"labels": {}}, {}, "no terms.born_again"),
        ({"born_again": {}}, {"teacher__init": "somewhere"}, "leave teacher.init out"),
        ({"born_again": {}}, {"evaluate__every": "null"}, "evaluate.test"),
    ],
)
def test_generations_refused(tmp_path: Path, terms: dict, changes: dict, words: str):
    options = {"evaluate__every": 1.0, "evaluate__test": "fashion-mnist-mini:test", **changes}
    with pytest.raises(UserError, match=words):
        generations(settings(tmp_path / "chain", terms, **options), GenerationsSettings(generations=1))
    assert not (tmp_path / "chain").exists()


def test_generations_in_a_folder_of_another_chain(tmp_path: Path):
    out = tmp_path / "chain"
    generations(chain(out, steps=1), GenerationsSettings(generations=1))
    with pytest.raises(UserError, match=r"gen0 holds a run with another config \(.*optim.lr"):
        generations(chain(out, steps=2, optim__lr=0.01), GenerationsSettings(generations=1))


# Exports


def same_as_ours(out: Path, logits_of: Callable[[torch.Tensor], torch.Tensor], backbone: Backbone) -> None:
    """Plain timm on the exported folder says what ours does: classes, and features."""
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        classifier = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.allclose(classifier(images), logits_of(images), atol=1e-5)
        features = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
        assert torch.allclose(features(images), backbone.pooled(images)[0], atol=1e-5)


def test_export_of_a_classifier_and_of_its_exit(tmp_path: Path, capsys):
    small = draw_classes(tmp_path / "images", ["a", "b", "c"])
    run = tmp_path / "run"
    train(
        settings(run, {"labels": {}, "layerwise": {"layers": [1]}}, steps=20, data=small, optim__lr=0.05,
                 evaluate__every=1.0, evaluate__test=small)
    )  # fmt: skip
    judge = AccuracySettings(test=str(small), device="cpu", workers=0)
    ours = {row["output"]: row for row in evaluate_accuracy(run, judge)["results"]}
    assert ours.keys() == {"classifier", "exit_1", "ensemble"}
    scores = checkpoint.load(checkpoint.all_of(run)[0])["scores"]
    assert scores["exit_1/accuracy"] == ours["exit_1"]["top1"]
    assert scores["ensemble/accuracy"] == ours["ensemble"]["top1"]

    whole, model = export(run, tmp_path / "whole"), load_model(run)
    backbone, classifier, exit = model.backbone, model.heads["classifier"], model.heads["exit_1"]
    assert isinstance(backbone, Backbone)
    same_as_ours(whole, lambda images: classifier(backbone.pooled(images)[0]), backbone)
    config = json.loads((whole / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "c"] and config["num_classes"] == 3
    assert load_model(whole).classes == ["a", "b", "c"]
    exported = evaluate_accuracy(whole, judge)
    assert exported["results"] == [ours["classifier"]]

    capsys.readouterr()
    part = export(run, tmp_path / "part", exit=1)
    assert "exit 1" in capsys.readouterr().out
    first = load_model(run, exit=1)
    assert isinstance(first.backbone, Backbone)
    same_as_ours(part, lambda images: exit(backbone.pooled(images, [1])[1]), first.backbone)
    sizes = [sum(p.numel() for p in load_model(folder).backbone.parameters()) for folder in (whole, part)]
    assert sizes[1] < 0.7 * sizes[0]
    assert evaluate_accuracy(part, judge)["results"] == [{**ours["exit_1"], "output": "classifier"}]
    stopped = evaluate_accuracy(run, judge.model_copy(update={"exit": 1, "out": str(tmp_path / "exit.json")}))
    assert stopped["results"] == [{**ours["exit_1"], "output": "classifier"}]
    for wrong in (2, 5):
        with pytest.raises(UserError, match=rf"exit={wrong}: .*2 blocks"):
            export(run, tmp_path / "none", exit=wrong)
    assert not (tmp_path / "none").exists()


# What a reviewer found


def test_generations_know_the_same_labels():
    cfg = recipe.load_config("born_again", ["labelled=0.1", "seed=3"])
    known = [build.open_data(generation_config(cfg, number)).labels() for number in (0, 1, 2)]
    chosen = [np.flatnonzero(labels != -1) for labels in known[1:]]
    assert len(known[0]) == 1000 and np.array_equal(*chosen)  # labels alone leave the others out
    assert np.array_equal(known[0], known[1][chosen[0]])


def test_generations_are_judged_on_the_set_of_the_table(tmp_path: Path):
    generations(chain(tmp_path / "chain"), GenerationsSettings(generations=1))
    other = draw_classes(tmp_path / "others", ["a", "b", "c"], each=12, seed=5)
    cfg = chain(tmp_path / "chain", evaluate__test=other)
    found = generations(cfg, GenerationsSettings(generations=1))
    judge = AccuracySettings(test=str(other), device="cpu", workers=0)
    for entry in found["generations"]:
        report = evaluate_accuracy(tmp_path / "chain" / entry["name"], judge)
        assert entry["accuracy"] == report["results"][0]["top1"] and entry["knn"] is None


def test_first_weights_do_not_depend_on_the_teacher(parents: dict[str, Path], tmp_path: Path):
    heads = []
    for name in ("larger", "finished"):
        cfg = settings(tmp_path / name, {"distill": {}}, teacher__init=parents[name])
        torch.manual_seed(0)
        data = {"classes": None, "labelled": 1.0, "mean": None, "std": None}
        data["classes"] = open_source("fashion-mnist-mini:train", 1).classes
        method = build.make_method(
            cfg, build.make_backbone(cfg), build.length_of(cfg, 10000), torch.device("cpu"), data
        )
        heads.append(method.student.heads["classifier"].weight)
    assert torch.equal(*heads)


def test_losses_get_float32_under_autocast(parents: dict[str, Path], tmp_path: Path):
    cfg = settings(tmp_path / "run", {"distill": {"target": "features"}}, teacher__init=parents["larger"])
    method = build.make_method(cfg, build.make_backbone(cfg), build.length_of(cfg, 10000), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        losses = method([torch.randn(4, 1, 28, 28)], 4, None, 0.0)
    assert losses["distill"].dtype == torch.float32


def test_part_of_a_model_leaves_it_whole(parents: dict[str, Path], tmp_path: Path, capsys):
    whole = load_model(parents["larger"])
    part = load_model(export(whole, tmp_path / "part", exit=1))
    assert isinstance(whole.backbone, Backbone) and isinstance(part.backbone, Backbone)
    assert (len(part.backbone.widths), len(whole.backbone.widths)) == (1, 3)


def test_base_is_looked_for_beside_its_recipe(tmp_path: Path, monkeypatch):
    for folder, batch in (("beside", 32), ("here", 64)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(f"base: supervised\nbatch_size: {batch}\nsteps: 3\n")
    (tmp_path / "beside" / "run.yaml").write_text("base: mine.yaml\nmodel: resnet18\nepochs: 2\n")
    monkeypatch.chdir(tmp_path / "here")
    cfg = recipe.load_config("../beside/run.yaml", [])
    assert (cfg.batch_size, cfg.model_args, cfg.epochs, cfg.steps) == (32, {}, 2, None)
    with pytest.raises(UserError, match="does not exist"):
        recipe.load_config("/nowhere/supervised", [])


@pytest.mark.parametrize(
    "changes",
    [{"views__mixup": 0.2, "views__global__count": 2}, {"evaluate__every": 1.0, "evaluate__test": "/nowhere"}],
)
def test_plan_refuses_what_train_refuses(tmp_path: Path, changes: dict):
    with pytest.raises(UserError, match="views.mixup|nowhere"):
        plan(settings(tmp_path / "run", {"labels": {}}, **changes))
