import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dino_sd.data.source import StackSource
from dino_sd.embed import Parts, embed, last_blocks, parts_of, pooled
from dino_sd.errors import UserError
from dino_sd.evaluate import evaluate_knn, evaluate_linear
from dino_sd.evaluator_config import KnnSettings, LinearSettings
from dino_sd.evaluators.knn import knn
from dino_sd.features import labelled_pair
from dino_sd.loading import Model, load_model
from dino_sd.models.backbone import Backbone, Features
from dino_sd.settings import parse

MINI = {"train": "fashion-mnist-mini:train", "test": "fashion-mnist-mini:test"}
HOW: dict[str, Any] = {"size": (28, 28), "crop": 1.0, "mean": [0.3], "std": [0.2], "device": "cpu"}


def source_of(images: int, labelled: bool = True, classes: tuple[str, ...] = ("a", "b", "c")) -> StackSource:
    generator = np.random.Generator(np.random.Philox(images))
    stack = torch.from_numpy(generator.integers(0, 256, (images, 1, 28, 28), dtype=np.uint8))
    labels = generator.integers(0, len(classes), images) if labelled else None
    return StackSource("made up", stack, labels, list(classes) if labelled else None)


def vit() -> Backbone:
    args = {"patch_size": 7, "embed_dim": 32, "depth": 5, "num_heads": 2}
    return Backbone("vit_tiny_patch16_224", size=(28, 28), channels=1, model_args=args)


def test_features_come_in_order_whatever_the_batch():
    source, backbone = source_of(23), vit().train()
    features, labels = embed(backbone, source, batch_size=5, **HOW)
    assert source.stack is not None and backbone.training
    images = (source.stack.float() / 255 - 0.3) / 0.2
    with torch.no_grad():
        expected = backbone.eval()(images).pooled_ND
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [source.label(i) for i in range(23)]
    assert embed(backbone, source_of(3, labelled=False), **HOW)[1].tolist() == [-1, -1, -1]
    features_16, _ = embed(backbone, source, precision="bf16", **HOW)
    assert features_16.dtype == torch.float32
    torch.testing.assert_close(features_16, expected, rtol=0.1, atol=0.1)


def test_batch_norm_is_left_alone():
    backbone = Backbone("resnet18", size=(28, 28), channels=1).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    embed(backbone, source_of(4), **HOW)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_pooling_of_blocks():
    generator = torch.Generator().manual_seed(0)
    cls, patches = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 2, 6, 4, generator=generator)
    features = Features(cls[2], patches[2], list(zip(cls, patches, strict=True)))
    assert torch.equal(pooled(features), torch.cat(list(cls), 1))
    assert torch.equal(pooled(features, "mean"), patches[2].mean(1))
    assert torch.equal(pooled(features, "cls+mean"), torch.cat([*cls, patches[2].mean(1)], 1))
    alone = Features(cls[2], patches[2], [])
    assert torch.equal(pooled(alone), cls[2])
    assert torch.equal(pooled(alone, "cls+mean"), torch.cat([cls[2], patches[2].mean(1)], 1))


def test_last_blocks():
    backbone = vit()
    assert last_blocks(backbone, None) == (1, 2, 3, 4) and last_blocks(backbone, 1) == ()
    assert last_blocks(Backbone("resnet18", size=(28, 28)), None) == ()
    with pytest.raises(UserError, match="blocks=6.* has 5"):
        last_blocks(backbone, 6)
    features = Parts(backbone, parts_of(backbone, None, "cls+mean"))(torch.zeros(3, 1, 28, 28))
    assert features.shape == (3, 5 * 32)


def test_augmented_views_depend_on_seed_and_epoch_alone():
    source, backbone = source_of(9), vit()
    first, again, other = (
        embed(backbone, source, batch_size=batch, augment=augment, **HOW)[0]
        for batch, augment in ((9, (0, 1)), (2, (0, 1)), (9, (0, 2)))
    )
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, other)


def test_knn_of_pixels(tmp_path, capsys):
    out = tmp_path / "knn.json"
    settings = parse(KnnSettings, MINI | {"k": [1, 20], "channels": 1, "out": str(out), "device": "cpu"})
    report = evaluate_knn("pixels", settings, json_only=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert printed.out.count("\n") == 1 and "top-1" in printed.err
    train, test = labelled_pair(load_model("pixels", channels=1), settings.train, settings.test)
    pixels = [torch.stack([s.image(i) for i in range(len(s))]).flatten(1).float() for s in (train, test)]
    labels = [torch.from_numpy(s.labels()) for s in (train, test)]
    direct = knn(pixels[0], labels[0], pixels[1], labels[1], k=(1, 20))
    assert {row["k"]: row["top1"] for row in report["results"]} == pytest.approx({k: v[0] for k, v in direct.items()})


class Nothing(nn.Module):
    """A backbone that knows the mean brightness only."""

    name, blocks_have_class_token, depth, channels = "nothing", False, 1, 1

    def forward(self, images_NCHW, layers=()):
        patches_NPD = images_NCHW.flatten(2).transpose(1, 2)
        return Features(patches_NPD.mean(1), patches_NPD, [])


def test_linear_writes_beside_the_model(tmp_path, capsys):
    model = Model(Nothing(), (28, 28), 1.0, [0.3], [0.2], "nothing", {}, tmp_path)  # pyright: ignore
    settings = parse(LinearSettings, MINI | {"epochs": 1, "device": "cpu", "augment": True, "lr": 0.1})
    report = evaluate_linear(model, settings)
    (written,) = (tmp_path / "evaluations").glob("linear-*.json")
    assert json.loads(written.read_text())["results"] == report["results"]
    assert len(report["losses"]) == 1 and report["results"][0]["lr"] == 0.1
    printed = capsys.readouterr().out
    assert "linear of nothing" in printed and "written to" in printed


def test_sources_that_do_not_fit_together_are_refused(monkeypatch, capsys):
    model = load_model("pixels", channels=1)
    sources = {}
    monkeypatch.setattr("dino_sd.features.open_source", lambda name, channels: sources[name])
    settings = parse(KnnSettings, {"train": "train", "test": "test"})
    sources |= {"train": source_of(9), "test": source_of(4, labelled=False)}
    with pytest.raises(UserError, match="test=.* has no labels"):
        labelled_pair(model, settings.train, settings.test)
    for others, differing in ((("a", "x"), "b, c, x"), (("a", "b", "x"), "c, x")):  # some in common: no mere renaming
        sources["test"] = source_of(4, classes=others)
        with pytest.raises(UserError, match=f"3 classes.* {len(others)}; not in both: {differing}"):
            labelled_pair(model, settings.train, settings.test)
    sources["test"] = source_of(4, classes=("x", "y", "z"))
    labelled_pair(model, settings.train, settings.test)
    assert "differently" in capsys.readouterr().err


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="expected a run folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither checkpoints"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no timm model"):
        load_model("timm:vit_none")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="not in timm's format"):
        load_model(tmp_path)


def test_classes_are_matched_by_name(tmp_path: Path):
    """A test list without one of the classes, and in another order: numbers are those of the training set."""
    names = ["ant", "bee", "cow", "dog"]
    for index in range(24):
        Image.new("RGB", (32, 32), (80 * (index % 4), 240 - 80 * (index % 4), index)).save(
            tmp_path / f"{index:02d}.png"
        )
    rows = [f"{index:02d}.png,{names[index % 4]}" for index in range(24)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "test.csv").write_text("\n".join(row for row in rows if "bee" not in row))
    settings = KnnSettings(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), k=[1], device="cpu")
    assert evaluate_knn("pixels", settings)["results"][0]["top1"] == 100
    (tmp_path / "other.csv").write_text("\n".join(row.replace("dog", "elk") for row in rows))
    with pytest.raises(UserError, match="not in both: dog, elk"):
        evaluate_knn("pixels", settings.model_copy(update={"test": str(tmp_path / "other.csv")}))
