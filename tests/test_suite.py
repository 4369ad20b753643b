"""Evaluators from the command line: files, tables, features that are kept, masks, several ranks."""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import command
from PIL import Image
from torch import nn

from dino_sd import feature_cache
from dino_sd.config import Config
from dino_sd.data.source import StackSource
from dino_sd.errors import UserError
from dino_sd.evaluate import evaluate_knn, evaluate_linear, evaluate_logistic, evaluate_ranks, evaluate_retrieval
from dino_sd.evaluator_config import (
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RanksSettings,
    RetrievalSettings,
    SegmentationSettings,
    SuiteSettings,
)
from dino_sd.features import Embedding, prepare
from dino_sd.loading import load_model
from dino_sd.segment import evaluate_segmentation
from dino_sd.settings import parse
from dino_sd.suite import evaluate_suite
from dino_sd.tables import write_json
from dino_sd.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import TINY

    folder = tmp_path_factory.mktemp("suite")
    small = TINY | {"steps": 2, "out": str(folder / "run"), "batch_size": 4, "checkpoint": {"every": 1.0}}
    train(parse(Config, small))
    return folder / "run"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """60 and 30 small images of three classes that brightness tells apart, in class folders."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.Generator(np.random.Philox(0))
    for part, count in (("train", 60), ("test", 30)):
        for index in range(count):
            place = root / part / "abc"[index % 3] / f"{index:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (28, 28)) + 90 * (index % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(place)
    return {"train": str(root / "train"), "test": str(root / "test")}


def quick(cls: type, images: dict[str, str], **own: Any) -> Any:
    shared = {"device": "cpu", "workers": 0} | {key: images[key] for key in images if key in cls.model_fields}
    return parse(cls, shared | own)


SUITE = {
    "evaluators": {
        "linear": {"epochs": 2, "lr": [0.01, 0.1], "blocks": [1, 2], "pool": ["cls", "mean", "cls+mean"]},
        "knn": {"k": [1, 5], "shots": [1, 4], "seeds": 2},
        "logistic": {"share": [0.2, 1.0], "seeds": 2, "l2": [0.01, 1.0]},
        "retrieval": {"k": [1]},
        "ranks": {"images": 6, "views": 2},
    }
}


def test_suite_by_the_command_line(run: Path, images: dict[str, str], tmp_path: Path, cache: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(SUITE | images))
    arguments = ["evaluate", run, f"suite={file}", "device=cpu", "workers=0"]
    done = command(*arguments, "--json", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    (written,) = (run / "evaluations").glob("suite-mine-*.json")
    assert json.loads(written.read_text()) == report
    rows = {(row["evaluator"], row["setting"], row["score"]): row for row in report["rows"]}
    assert {key[0] for key in rows} == {*SUITE["evaluators"]}
    for row in report["rows"]:
        if row["low"] is not None:
            assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9
        assert (row["low"] is None) == (row["evaluator"] == "ranks")
        assert row["score"] != "top-5 %", "three classes"
    assert ("knn", "shots=4, seeds=2, k=5", "top-1 %") in rows
    table = written.with_suffix(".md").read_text().splitlines()
    shown = [line for line in table if line.startswith("| ") and "evaluator" not in line]
    assert len(shown) == len(report["rows"]) and any(f"{report['rows'][0]['value']:.2f}" in line for line in shown)
    for name in SUITE["evaluators"]:
        assert len([*(run / "evaluations").glob(f"{name}-*.json")]) == 1
    # one pass over each set, for all of them
    assert len({path.name.split("-")[0] for path in (cache / "features").iterdir()}) == 2
    same = evaluate_suite(run, parse(SuiteSettings, {"suite": str(file), "device": "cpu", "workers": 0}))
    assert same["rows"] == report["rows"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"evaluators": {"knm": {}}}, ["evaluators.knm", "did you mean knn"]),
        ({"evaluators": {"knn": {"kk": 3}}}, ["'kk'", "did you mean 'k'"]),
        ({"evaluators": {"knn": {"k": "many"}}}, ["evaluators.knn.k"]),
        ({"evaluators": {"linear": {}}, "test": None}, ["test"]),
        ({"evaluator": {}}, ["did you mean 'evaluators'"]),
        ({"evaluators": {"knn": {"network": "student"}}}, ["knn.network", "share one model", "network=student"]),
        (None, ["does not exist", "fashion_mnist_mini"]),
    ],
)
def test_suites_that_cannot_be_are_refused_before_anything_is_computed(file, words, tmp_path: Path):
    place = tmp_path / "mine.yaml"
    if file is not None:
        place.write_text(yaml.safe_dump({"train": "nowhere", "test": "nowhere"} | file))
    with pytest.raises(UserError) as error:
        evaluate_suite("nowhere", SuiteSettings(suite=str(place)))
    assert all(word in str(error.value) for word in words), error.value


def test_a_model_that_is_loaded_stays_what_it_is(run: Path, images: dict[str, str]):
    for name, value in (("network", "student"), ("channels", 1)):
        with pytest.raises(UserError, match=f"{name}={value}: the model is loaded already"):
            evaluate_knn(load_model(run), quick(KnnSettings, images, **{name: value}))


def test_the_shipped_suite_is_sound():
    from dino_sd.recipe import recipes
    from dino_sd.settings import read_yaml
    from dino_sd.suite import settings_of

    for path in (recipes() / "suites").glob("*.yaml"):
        from dino_sd.evaluator_config import SuiteFile

        parsed = parse(SuiteFile, read_yaml(path))
        for name, own in parsed.evaluators.items():
            assert settings_of(name, own or {}, parsed, SuiteSettings(suite=path.stem), path)


def test_other_settings_have_a_file_of_their_own(run: Path, images: dict[str, str]):
    def files() -> set[str]:
        return {path.name for path in (run / "evaluations").glob("knn-*.json")}

    before = files()
    for k in (3, 4, 3):
        evaluate_knn(run, quick(KnnSettings, images, k=k))
    evaluate_knn(run, quick(KnnSettings, images, k=3, cache=False))
    assert len(files() - before) == 2


def test_few_shots_and_leaving_one_out(run: Path, images: dict[str, str], tmp_path: Path):
    report = evaluate_knn(run, quick(KnnSettings, images, k="5,10", shots="1,20", seeds=3))
    few = {(row.get("shots"), row["k"]): row for row in report["results"]}
    assert {*few} == {(None, 5), (None, 10), (1, 3), (20, 5), (20, 10)}, "of one image a class, three vote at most"
    assert few[20, 5]["top1"] == few[None, 5]["top1"], "all there are"
    assert few[20, 5]["top1_interval"] == [few[20, 5]["top1"]] * 2
    (tmp_path / "list.csv").write_text(  # two classes that are the same
        "\n".join(f"{path},{index % 2}" for index, path in enumerate(sorted(Path(images["train"]).rglob("*.png"))))
    )
    mixed = {"train": str(tmp_path / "list.csv"), "test": str(tmp_path / "list.csv")}
    alone = evaluate_knn(run, quick(KnnSettings, mixed | {"test": None}, k=1))
    assert alone["test"]["leave_one_out"] and alone["results"][0]["top1"] < 80
    assert evaluate_knn(run, quick(KnnSettings, mixed, k=1))["results"][0]["top1"] == 100
    with pytest.raises(UserError, match="class 0 has 20"):
        evaluate_knn(run, quick(KnnSettings, images, k=1, shots=21))


def test_a_list_of_one_choice_is_that_choice(run: Path, images: dict[str, str]):
    settings = {"epochs": 3, "lr": [0.05]}
    for blocks, pool in ((1, "cls"), (2, "cls+mean"), (1, "mean")):
        report = evaluate_linear(run, quick(LinearSettings, images, blocks=blocks, pool=pool, **settings))
        assert report["results"][0]["features"] == f"{pool}, {1 if pool == 'mean' else blocks} block(s)"
    both = evaluate_linear(run, quick(LinearSettings, images, blocks="1,2", pool=["cls", "mean"], **settings))
    assert {*both["held_out_top1"]} == {"cls, 1 block(s)", "cls, 2 block(s)", "mean, 1 block(s)"}
    with pytest.raises(UserError, match="blocks=3.* has 2"):
        evaluate_linear(run, quick(LinearSettings, images, blocks=[1, 3]))


class Counting(nn.Module):
    """Mean brightness, and how often it was asked."""

    name, prefix_tokens, depth, channels = "counting", 0, 1, 1

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, images_NCHW: torch.Tensor, layers: Any = ()) -> Any:
        from dino_sd.models.backbone import Features

        self.calls += 1
        patches_NPD = images_NCHW.flatten(2).transpose(1, 2) * self.scale
        return Features(patches_NPD.mean(1), patches_NPD, [])


def test_features_are_kept_for_the_same_weights_images_and_treatment(run: Path, tmp_path: Path, cache: Path):
    from dataclasses import replace

    backbone = Counting()
    model = replace(load_model(run), backbone=backbone)  # pyright: ignore
    stack = torch.arange(12 * 28 * 28, dtype=torch.int64).remainder(251).byte().view(12, 1, 28, 28)
    source = StackSource("made", stack, np.arange(12) % 3, ["a", "b", "c"])
    settings, cpu = quick(KnnSettings, {"train": "x", "test": "x"}), torch.device("cpu")

    def computed(source: StackSource = source, parts: tuple[str, ...] = ("pooled",), **how: Any) -> bool:
        before = backbone.calls
        embedding = Embedding(model, cpu, settings.model_copy(update=how), parts)
        features, labels = embedding(source, "", augment=how.get("augment"))
        assert features.shape == (12, sum(part.stop - part.start for part in embedding.columns.values()))
        assert labels.tolist() == source.labels().tolist()  # pyright: ignore
        return backbone.calls > before

    assert computed() and not computed()
    first = Embedding(model, cpu, settings)(source, "")[0]
    assert torch.equal(first, Embedding(model, cpu, settings.model_copy(update={"cache": False}))(source, "")[0])
    assert computed(cache=False) and computed(precision="bf16") and computed(augment=(0, 1))
    assert computed(parts=("mean", "pooled")) and not computed(parts=("pooled", "mean")) and not computed()
    assert computed(StackSource("made", stack, (np.arange(12) + 1) % 3, ["a", "b", "c"])), "other labels"
    assert computed(StackSource("made", 255 - stack, np.arange(12) % 3, ["a", "b", "c"])), "other images"
    with torch.no_grad():
        backbone.scale += 1
    assert computed(), "other weights"
    for path in (cache / "features").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert computed() and not computed(), "halves of files are no features"


def test_an_image_written_again_is_embedded_again(run: Path, tmp_path: Path):
    for index in range(4):
        Image.new("L", (28, 28), 60 * index).save(tmp_path / f"{index}.png")
    settings = quick(RanksSettings, {"test": str(tmp_path)})
    model = prepare(run, torch.device("cpu"), settings)

    def features() -> torch.Tensor:
        from dino_sd.data.source import open_source

        return Embedding(model, torch.device("cpu"), settings)(open_source(str(tmp_path), 1), "")[0]

    before = features()
    Image.fromarray(np.arange(784, dtype=np.uint32).astype(np.uint8).reshape(28, 28)).save(tmp_path / "2.png")
    after = features()
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]]) and not torch.equal(before[2], after[2])


def test_the_cache_stays_small_and_bears_many_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 50_000)
    tensors = {"pooled": torch.arange(2_000.0)}  # 8 kB
    for number in range(9):
        feature_cache.save(f"key{number}", tensors)
        os.utime(cache / "features" / f"key{number}-pooled.safetensors", (number, number))
        feature_cache.load("key0", ["pooled"])  # used, so that it stays
    kept = {path.name[:4] for path in (cache / "features").iterdir()}
    assert len(kept) == 6 and {"key0", "key8"} <= kept
    feature_cache.save("large", {"pooled": torch.zeros(10_000)})
    assert feature_cache.load("large", ["pooled"]) is None and feature_cache.load("key0", ["pooled", "mean"]) is None

    def write() -> None:
        for number in range(20):
            feature_cache.save(f"key{number % 3}", tensors)
            found = feature_cache.load(f"key{number % 3}", ["pooled"])
            assert found is None or torch.equal(found["pooled"], tensors["pooled"])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [*(cache / "features").glob("*.tmp")]
    monkeypatch.setenv("DINO_SD_CACHE", "/proc/nowhere")
    feature_cache.save("key", tensors)  # a place that cannot be written is done without
    assert feature_cache.load("key", ["pooled"]) is None


def test_two_ranks_equal_one(run: Path, images: dict[str, str], tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(SUITE | images))
    settings = {"suite": str(file), "device": "cpu", "workers": 0, "cache": False}
    one = evaluate_suite(run, parse(SuiteSettings, settings | {"out": str(tmp_path / "one.md")}))
    arguments = [
        "evaluate",
        run,
        f"out={tmp_path / 'two.json'}",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    done = command(*arguments, ranks=2, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        assert theirs == {
            key: pytest.approx(value) if isinstance(value, float) else value for key, value in ours.items()
        }


def masked(root: Path, count: int, seed: int) -> str:
    """A red square of class 2 on a blue ground of class 0, whose upper edge is ignored."""
    generator = np.random.Generator(np.random.Philox(seed))
    for index in range(count):
        top, left = generator.integers(0, 3, 2) * 14
        image, mask = generator.integers(0, 90, (42, 42, 3)), np.zeros((42, 42), np.uint8)
        image[..., 2] += 150
        image[top : top + 14, left : left + 14] += np.array([150, 0, -150])
        mask[top : top + 14, left : left + 14] = 2
        mask[0] = 255
        for part in ("images", "masks"):
            (root / part / "deep").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / "deep" / f"{index}.png")
        palette = Image.fromarray(mask, "P" if index % 2 else "L")
        if index % 2:
            palette.putpalette([7 * i % 256 for i in range(768)])
        palette.save(root / "masks" / "deep" / f"{index}.png")
    return str(root)


def binary_masks(root: Path) -> dict[str, str]:
    """Of 0 and 2, one image."""
    for part, pixels in (("images", np.zeros((42, 42), np.uint8)), ("masks", np.eye(42, dtype=np.uint8) * 2)):
        (root / part).mkdir(parents=True)
        Image.fromarray(pixels).save(root / part / "0.png")
    return {"train": str(root), "test": str(root)}


def test_json_has_no_nan(tmp_path: Path):
    write_json(tmp_path / "x.json", {"a": [1.0, math.nan, {"b": -math.inf}], "c": (True, None, "NaN", 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None, {"b": None}], "c": [True, None, "NaN", 2]}


def test_the_training_set_as_test_set_is_said(run: Path, images: dict[str, str], capsys):
    evaluate_knn(run, quick(KnnSettings, images | {"test": images["train"]}, k=1))
    assert "train and test are the same images" in capsys.readouterr().err
    evaluate_knn(run, quick(KnnSettings, images, k=1))
    assert "same images" not in capsys.readouterr().err


def test_segmentation_of_squares(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture):
    data = {"train": masked(tmp_path / "train", 12, 0), "test": masked(tmp_path / "test", 6, 1)}
    settings = quick(SegmentationSettings, data, size=[6, 6], batch_size=4)
    report = evaluate_segmentation("pixels", settings)
    for row in report["results"]:  # whose patches are pixels, so that the border between both is not seen quite
        assert row["miou"] > 90 and row["pixel_accuracy"] > 97
        assert row["miou_interval"][0] <= row["miou"] <= row["miou_interval"][1]
    assert [row["method"] for row in report["results"]] == ["knn", "linear"]
    assert report["iou_per_class"]["knn"][1] is None and report["classes"] == 3 and report["grid"] == (6, 6)
    vit = evaluate_segmentation(run, quick(SegmentationSettings, data, size=42, patches=40))
    assert vit["grid"] == (6, 6) and vit["train_patches"] <= 40 and all(row["miou"] > 0 for row in vit["results"])
    again = evaluate_segmentation(run, quick(SegmentationSettings, data, size=42, patches=40, batch_size=5))
    assert [row["miou"] for row in again["results"]] == pytest.approx([row["miou"] for row in vit["results"]], abs=0.1)
    with pytest.raises(UserError, match="ignore=2 .*if 2 is a class"):
        binary = quick(SegmentationSettings, binary_masks(tmp_path / "binary"), size=[6, 6], ignore=2)
        evaluate_segmentation("pixels", binary)
    with pytest.raises(UserError, match="hold class 65,535; .*set ignore=65535"):
        Image.fromarray(np.full((42, 42), 65535, np.uint16)).save(tmp_path / "binary" / "masks" / "0.png")
        evaluate_segmentation("pixels", binary)
    Image.new("RGB", (42, 42)).save(tmp_path / "test" / "masks" / "deep" / "0.png")
    (tmp_path / "test" / "images" / "deep" / "1.png").write_bytes(b"no image")
    assert evaluate_segmentation("pixels", settings)["test"] | {"fingerprint": ""} == {
        "data": data["test"], "images": 4, "unreadable": 2, "fingerprint": ""
    }  # fmt: skip
    assert "2 image(s) of" in capsys.readouterr().err
    Image.new("L", (9, 9)).save(tmp_path / "test" / "masks" / "deep" / "2.png")
    with pytest.raises(UserError, match="9 x 9 pixels, but its image has 42 x 42"):
        evaluate_segmentation("pixels", settings)
    (tmp_path / "test" / "masks" / "deep" / "2.png").unlink()
    with pytest.raises(UserError, match="has no mask"):
        evaluate_segmentation("pixels", settings)
    with pytest.raises(UserError, match="has no folder images"):
        evaluate_segmentation(
            "pixels", quick(SegmentationSettings, data | {"test": str(tmp_path / "train" / "images")})
        )


def test_retrieval_and_ranks_from_settings(run: Path, images: dict[str, str]):
    alone = evaluate_retrieval(run, quick(RetrievalSettings, {"test": images["test"]}, k=[1, 29]))
    (row,) = alone["results"]
    assert row["recall@29"] == 100 and 0 < row["map"] < 100 and row["queries"] == 30
    with pytest.raises(UserError, match="from 1 to 60"):
        evaluate_retrieval(run, quick(RetrievalSettings, images, k=61))
    first, again, other = (
        evaluate_ranks(run, quick(RanksSettings, images, views=3, seed=seed))["results"][0] for seed in (0, 0, 1)
    )
    assert first == again and first["rankme"] == other["rankme"] and first["lidar"] != other["lidar"]
    full = evaluate_logistic(run, quick(LogisticSettings, images, l2=0.01))["results"]
    assert [row["images"] for row in full] == [60] and full[0]["seeds"] == 1
