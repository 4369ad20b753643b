"""Everyone's weights by `dino_sd.load`, features of any layer, and what people are told who name something else."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

import dino_sd
from dino_sd import checkpoint, cli
from dino_sd.data.evaluation import EvalSet
from dino_sd.data.source import WHITE, open_source
from dino_sd.embed import last_blocks
from dino_sd.errors import UserError
from dino_sd.loading import shallow
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import ProjectionHead
from dino_sd.models.weights import load_into, read_weights
from dino_sd.train import train

TINY = {"patch_size": 7, "embed_dim": 192, "depth": 4, "num_heads": 3}  # as wide as the published ViT-Ti


def vit(size: int = 28, name: str = "vit_tiny_patch16_224", **model_args: object) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(name, size=(size, size), model_args=TINY | model_args).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():  # biases, norms and registers begin at 0 or 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def weights(backbone: Backbone) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in backbone.model.state_dict().items()}


def dinov2_names(backbone: Backbone, chunk: int | None = None) -> dict[str, Tensor]:
    """A timm ViT's weights as DINOv2's code would have saved them."""
    state: dict[str, Tensor] = {"mask_token": torch.randn(1, backbone.width)}
    for key, value in weights(backbone).items():
        if backbone.name.startswith("vit_giant"):
            key = key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
        if chunk and key.startswith("blocks."):
            key = key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // chunk}.", 1)
        state[key] = value
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position_11D = torch.randn(1, 1, backbone.width)  # of the class token, which timm has inside it
        state["cls_token"] = state["cls_token"] - position_11D
        state["pos_embed"] = torch.cat([position_11D, state["pos_embed"]], 1)
    return state


def published(path: Path, backbone: Backbone, **changes: object) -> Path:
    """A checkpoint in the authors' layout of DINO."""
    torch.manual_seed(1)
    head = ProjectionHead(backbone.width, prototypes=10, hidden=12, bottleneck=6)
    own = {f"backbone.{k}": v for k, v in weights(backbone).items()}
    own |= {f"head.{k}": v.clone() for k, v in head.state_dict().items()}
    student = {f"module.{k}": v + 1 if v.is_floating_point() else v for k, v in own.items()}
    args = argparse.Namespace(arch="vit_tiny", patch_size=backbone.patch_size, epochs=9)
    found = {"student": student, "teacher": own, "epoch": 3, "args": args, "optimizer": {"state": {}},
             "dino_loss": {"center": torch.arange(10.0)[None]}}  # fmt: skip
    torch.save(found | changes, path)
    return path


def images(size: int = 28, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


# Files of weights


def test_a_published_checkpoint_needs_no_more_than_its_name(tmp_path: Path, capsys):
    backbone = vit()
    path = published(tmp_path / "x.pth", backbone)
    model = dino_sd.load(path)
    features_ND = model.features(images())
    assert torch.equal(features_ND, backbone(images()).pooled_ND)
    assert "teacher after epoch 3 of 9" in model.description and "28x28 pixels" in model.description
    assert "3 heads" in model.description and "ImageNet's" in str(model)
    assert model.center is not None and model.center.tolist() == list(range(10))
    head = ProjectionHead(192, prototypes=10, hidden=12, bottleneck=6)
    state = {k.removeprefix("head."): v for k, v in torch.load(path, weights_only=False)["teacher"].items()}
    head.load_state_dict({key: state[key] for key in head.state_dict()})
    assert model.projection is not None and torch.equal(model.projection(features_ND), head(features_ND))
    student = dino_sd.load(path, network="student")
    assert "student" in student.description and not torch.allclose(student.features(images()), features_ND)
    assert model.backbone.position_resize == "dino"  # pyright: ignore
    assert capsys.readouterr() == ("", "")


def test_bare_files_of_a_backbone(tmp_path: Path):
    backbone = vit()
    torch.save(weights(backbone), tmp_path / "bare.pth")
    save_file(weights(backbone), tmp_path / "bare.safetensors")
    for name in ("bare.pth", "bare.safetensors"):
        model = dino_sd.load(tmp_path / name)
        assert torch.equal(model.features(images()), backbone(images()).pooled_ND) and model.projection is None


def test_positions_of_a_published_file_go_the_authors_way_in_every_forward(tmp_path: Path):
    model = dino_sd.load(published(tmp_path / "x.pth", vit()))
    backbone, larger = model.backbone, images(49)
    assert isinstance(backbone, Backbone)
    ways = [backbone.pooled(larger)[0], backbone(larger).pooled_ND, backbone(larger, [-1]).layers[0][0]]
    for pooled_ND in ways:
        torch.testing.assert_close(pooled_ND, ways[0], atol=1e-5, rtol=0)
    assert (vit()(larger).pooled_ND - ways[0]).abs().max() > 1e-3, "timm's way"
    assert vit().position_resize == "timm"
    part = shallow(model, 2)  # a copy: its positions are its own
    torch.testing.assert_close(part.features(larger), backbone(larger, [1]).layers[0][0], atol=1e-5, rtol=0)
    with torch.no_grad():
        backbone.model.pos_embed.zero_()
    assert not torch.equal(part.features(larger), backbone(larger, [1]).layers[0][0])
    assert part.backbone.model._pos_embed.__self__ is part.backbone.model  # pyright: ignore


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("vit_tiny_patch16_224", {"init_values": 1e-5}),
        ("vit_tiny_patch16_224", {"init_values": 1e-5, "reg_tokens": 2, "no_embed_class": True}),
        ("vit_giant_patch14_dinov2", {"reg_tokens": 4, "no_embed_class": True}),
    ],
    ids=["plain", "registers", "swiglu"],
)
def test_dinov2(tmp_path: Path, name: str, model_args: dict, chunk: int | None):
    backbone = vit(name=name, **model_args)
    torch.save(dinov2_names(backbone, chunk), tmp_path / "dinov2.pth")
    model = dino_sd.load(tmp_path / "dinov2.pth")
    for layer in (0, 3):
        for tokens in ["cls", "patch"] + ["register"] * bool(backbone.registers):
            ours, theirs = model.features(images(), layer, tokens), backbone.tokens(images(), [layer], tokens)[0]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert "DINOv2's ViT" in model.description and model.size == (28, 28)
    # with registers the authors resize as timm does
    assert model.backbone.position_resize == ("timm" if backbone.registers else "dino")  # pyright: ignore
    target = vit(size=42, name=name, **model_args)  # and as first weights of a run
    notes = load_into(target, read_weights(tmp_path / "dinov2.pth"))
    assert notes == ["resized the position embedding from 4x4 to 6x6 patches"]


def test_dinov2_teacher_of_a_training_run(tmp_path: Path):
    backbone, head = vit(init_values=1e-5), ProjectionHead(192, prototypes=10, hidden=12, bottleneck=6)
    state = {f"backbone.{key}": value for key, value in dinov2_names(backbone, 2).items()}
    state |= {f"dino_head.{key}": value for key, value in head.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    torch.save({"model": {f"teacher.{key}": value for key, value in state.items()}}, tmp_path / "model.rank_0.pth")
    for name in ("teacher_checkpoint.pth", "model.rank_0.pth"):
        model = dino_sd.load(tmp_path / name)
        features_ND = model.features(images())
        torch.testing.assert_close(features_ND, backbone(images()).pooled_ND)
        assert model.projection is not None and torch.equal(model.projection(features_ND), head(features_ND))


def test_dinov2_is_judged_at_224_as_published(tmp_path: Path):
    backbone = vit(518, patch_size=14, depth=1, init_values=1e-5)
    torch.save(dinov2_names(backbone), tmp_path / "dinov2.pth")
    model = dino_sd.load(tmp_path / "dinov2.pth")
    assert (model.size, model.crop, model.backbone.size) == ((224, 224), 0.875, (518, 518))  # pyright: ignore
    assert "positions are for 518x518" in str(model)


def test_published_resnets(tmp_path: Path):
    torch.manual_seed(0)
    backbone = Backbone("resnet18", size=(64, 64)).eval()
    state = {key: value for key, value in weights(backbone).items() if not key.endswith("num_batches_tracked")}
    torch.save({"student": {f"module.backbone.{key}": value for key, value in state.items()}}, tmp_path / "full.pth")
    torch.save(state | {"fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}, tmp_path / "bare.pth")
    for name in ("full.pth", "bare.pth"):
        model = dino_sd.load(tmp_path / name)
        assert torch.equal(model.features(images(64)), backbone(images(64)).pooled_ND)
        assert model.backbone.name == "resnet18" and model.size == (224, 224)
    del state["layer3.1.conv1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match="missing layer3.1.conv1.weight"):
        dino_sd.load(tmp_path / "less.pth")


def xcit_names(backbone: Backbone) -> dict[str, Tensor]:
    """A timm XCiT's weights as they were published."""
    state: dict[str, Tensor] = {}
    for key, value in weights(backbone).items():
        if key.startswith("cls_attn_blocks") and ".attn.q." in key:
            parts = [weights(backbone)[key.replace(".q.", f".{part}.")] for part in "qkv"]
            state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not (key.startswith("cls_attn_blocks") and re.search(r"\.attn\.[kv]\.", key)):
            state[key.replace("pos_embed.", "pos_embeder.")] = value
    return state


@pytest.mark.parametrize("patch", [8, 16])
def test_published_xcits(tmp_path: Path, patch: int):
    torch.manual_seed(0)
    backbone = Backbone(f"xcit_nano_12_p{patch}_224", size=(224, 224)).eval()
    state = xcit_names(backbone)
    assert len(state) < len(weights(backbone)) and "pos_embeder.token_projection.weight" in state
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "full.pth")
    for name in ("bare.pth", "full.pth"):
        model = dino_sd.load(tmp_path / name)
        assert model.backbone.name == backbone.name and model.size == (224, 224) and model.mean[0] == 0.485
        assert torch.equal(model.features(images(64)), backbone(images(64)).pooled_ND)
    block, output = model.features(images(64), layers=[3])[0], model.features(images(64), tokens="patch")
    assert block.shape == (2, 128) and output.shape == (2, 128, 64 // patch, 64 // patch)
    assert last_blocks(backbone, None) == ()
    del state["patch_embed.proj.0.0.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match="patch_embed|never published"):
        dino_sd.load(tmp_path / "less.pth")


def test_heads_that_nobody_knows_are_asked_for(tmp_path: Path):
    backbone = vit(embed_dim=32, num_heads=2)
    path = published(tmp_path / "x.pth", backbone, args=argparse.Namespace(arch="own"))
    with pytest.raises(UserError, match=r"attention heads.*32 is no width.*num_heads=N"):
        dino_sd.load(path)
    by_argument, by_name = dino_sd.load(path, model_args={"num_heads": 2}), dino_sd.load(f"{path},num_heads=2")
    for model in (by_argument, by_name):
        assert torch.equal(model.features(images()), backbone(images()).pooled_ND)
    with pytest.raises(UserError, match="cannot build it"):
        dino_sd.load(f"{path},num_heads=5")
    with pytest.raises(UserError, match="model_args do not fit"):
        dino_sd.load(f"{path},heads=2")


def test_an_architecture_that_is_named(tmp_path: Path):
    """Timm's weights with a classifier: what they expect of images stands in timm alone."""
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="say architecture=NAME"):
        dino_sd.load(tmp_path / "x.pth")
    loaded = dino_sd.load(tmp_path / "x.pth", architecture="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert (loaded.mean, loaded.crop) == ([0.5, 0.5, 0.5], 0.9) and "left out the classifier" in loaded.notes[0]
    assert torch.equal(loaded.features(images(224)), model.forward_head(model.forward_features(images(224)), True))
    with pytest.raises(UserError, match="another width|blocks"):
        dino_sd.load(tmp_path / "x.pth", architecture="vit_small_patch16_224")


def test_a_named_architecture_leaves_published_files_what_they_are(tmp_path: Path):
    """Timm's own ViT-Ti of this name has another mean; DINO's weights have not."""
    path = published(tmp_path / "x.pth", vit())
    named = dino_sd.load(path, architecture="vit_tiny_patch16_224", model_args={"patch_size": 7, "depth": 4})
    plain = dino_sd.load(path)
    assert (named.mean, named.crop, named.description) == (plain.mean, plain.crop, plain.description)
    assert torch.equal(named.features(images(49)), plain.features(images(49)))


# What does not fit


def altered(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    state, key = dict(state), "backbone.blocks.1.attn.qkv.weight"
    if how == "dropped":
        del state[key]
    elif how == "renamed":
        state["backbone.blocks.1.attn.kqv.weight"] = state.pop(key)
    elif how == "surplus":
        state["backbone.surplus"] = torch.zeros(1)
    elif how == "patch":
        width, channels, side, _ = state["backbone.patch_embed.proj.weight"].shape
        state["backbone.patch_embed.proj.weight"] = torch.zeros(width, channels, side // 2, side // 2)
    elif how in ("registers", "timm registers"):
        name = "register_tokens" if how == "registers" else "reg_token"
        state[f"backbone.{name}"] = torch.zeros(1, 2, state["backbone.cls_token"].shape[2])
    elif how == "positions":
        state["backbone.pos_embed"] = torch.cat([state["backbone.pos_embed"], state["backbone.pos_embed"][:, :2]], 1)
    elif how == "depth":
        state["backbone.blocks.9.attn.qkv.weight"] = state[key]
    elif how == "width":
        state["backbone.norm.weight"] = torch.ones(64)
    elif how == "head":
        del state["head.mlp.2.weight"]
    elif how == "nan":
        state[key] = torch.full_like(state[key], torch.nan)
    return state


ALTERED = {
    "dropped": ["missing blocks.1.attn.qkv.weight", "incomplete or was altered"],
    "renamed": ["renamed", "blocks.1.attn.qkv.weight seems to stand there as blocks.1.attn.kqv.weight"],
    "surplus": ["unexpected surplus"],
    "patch": ["patch_size=", "patches of"],
    "registers": ["2 register token(s), the model has 0", "unexpected register_tokens"],
    "timm registers": ["2 register token(s), the model has 0", "unexpected reg_token"],
    "positions": ["no square", "2 register(s) more"],
    "depth": ["missing"],
    "width": ["64 wide"],
    "head": ["no whole DINO head", "mlp.2.weight"],
    "nan": ["NaN"],
}


@pytest.mark.parametrize("how", ALTERED)
def test_altered_files_exit_with_2_and_say_why(tmp_path: Path, monkeypatch, capsys, how: str):
    path = published(tmp_path / "x.pth", vit(patch_size=8, size=32, depth=2))
    found = torch.load(path, weights_only=False)
    torch.save(found | {"teacher": altered(found["teacher"], how)}, path)
    code, said = refusal(monkeypatch, capsys, path)
    assert code == 2 and len(said.strip().splitlines()) == 1 and said.startswith("error: "), said
    assert all(word in said for word in ["x.pth", *ALTERED[how]]), said


def refusal(monkeypatch, capsys, model: object) -> tuple[object, str]:
    """(exit code, stderr) of `dino-sd export MODEL`."""
    monkeypatch.setattr("sys.argv", ["dino-sd", "export", str(model), "out=/nowhere/at/all"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return (exec, ("import os; os.environ['DINO_SD_TEST_RAN'] = '1'",))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pth", None, ["does not exist", "a run folder, a checkpoint"]),
        ("empty.pth", b"", ["empty"]),
        ("page.pth", b"<!DOCTYPE html>", ["web page"]),
        ("lfs.bin", b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS"]),
        ("cut.pth", b"PK\x03\x04 and no more", ["cannot be read", "download it again"]),
        ("photo.jpg", b"\xff\xd8\xff\xe0 JFIF", ["no file of weights", "expected .pt, .pth"]),
        ("model.onnx", b"\x08\x07", ["export for onnxruntime", "run, checkpoint"]),
        ("model.pt2", b"PK\x03\x04", ["torch.export"]),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, monkeypatch, capsys, name: str, content: bytes | None, words: list):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, said = refusal(monkeypatch, capsys, tmp_path / name)
    assert code == 2 and len(said.strip().splitlines()) == 1
    assert all(word in said for word in [name, *words]), said


def test_a_file_that_would_run_code_is_not_opened(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("DINO_SD_TEST_RAN", raising=False)
    for arguments in (Malicious(), argparse.Namespace(inside=Malicious())):
        code, said = refusal(monkeypatch, capsys, published(tmp_path / "x.pth", vit(), args=arguments))
        assert code == 2 and "could run code" in said
    assert "DINO_SD_TEST_RAN" not in os.environ


def test_foreign_networks_are_named(tmp_path: Path):
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="neither those of a ViT of DINO or DINOv2 nor of an XCiT or ResNet"):
        dino_sd.load(tmp_path / "x.pth")
    found = dino_sd.load(tmp_path / "x.pth", architecture="mobilenetv3_small_050")
    assert found.features(images(64)).shape == (2, 1024)
    with pytest.raises(UserError, match="arch=vit_base, which is 768"):
        dino_sd.load(published(tmp_path / "y.pth", vit(), args=argparse.Namespace(arch="vit_base")))
    with pytest.raises(UserError, match="network=student: .* has none, only its teacher"):
        dino_sd.load(published(tmp_path / "y.pth", vit(), student={}), network="student")


# Folders


def test_runs(tiny, tmp_path: Path, capsys):
    """A run, its checkpoint under any name and the folders around it."""
    saved = train(tiny(tmp_path / "runs" / "a", steps=2, checkpoint__every="steps=1", model_args__num_heads=2))
    state, run = checkpoint.load(saved), tmp_path / "runs" / "a"
    model = dino_sd.load(run)
    assert "teacher at step 2 of 2" in model.description and "images of 28x28 pixels" in model.description
    assert "normalised by mean" in str(model)
    features_ND = model.features(images(28, 1))
    head = ProjectionHead(32, prototypes=64, hidden=32, bottleneck=16)
    own = {k.removeprefix("heads.dino."): v for k, v in state["teacher"].items() if k.startswith("heads.dino.")}
    head.load_state_dict(own)
    assert model.projection is not None and torch.equal(model.projection(features_ND), head(features_ND))
    assert model.center is not None and torch.equal(model.center, state["terms"]["dino.center"])
    shutil.copy(saved, tmp_path / "copied.pt")
    assert torch.equal(dino_sd.load(tmp_path / "copied.pt").features(images(28, 1)), features_ND)
    for wrong, words in (
        (tmp_path / "runs", "1 runs or exports .a.; name one"),
        (run / "checkpoints", "name the run"),
        (tmp_path, "1 files of weights .copied.pt."),
    ):
        with pytest.raises(UserError, match=words):
            dino_sd.load(wrong)
    with pytest.raises(UserError, match="this checkpoint has them"):
        dino_sd.load(f"{saved},num_heads=2")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="run without a checkpoint"):
        dino_sd.load(run)


def hub_folder(folder: Path, name: str = "vit_tiny_patch16_224", **model_args: object) -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **model_args).eval()
    save_for_hf(model, folder, model_args=model_args, safe_serialization="both")
    return model


def test_a_folder_of_the_hub(tmp_path: Path):
    model = hub_folder(tmp_path, img_size=28, **TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 28, 28], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected_ND = model(images())
    for spec in (tmp_path, tmp_path / "model.safetensors"):
        loaded = dino_sd.load(spec)
        assert torch.equal(loaded.features(images()), expected_ND)
        assert loaded.mean == config["pretrained_cfg"]["mean"] and "interpolation=bilinear" in loaded.notes[-1]
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(dino_sd.load(tmp_path).features(images()), expected_ND)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        dino_sd.load(tmp_path)


def test_what_an_export_says_of_itself(tmp_path: Path):
    """The sum of its weights, and the way that positions are resized."""
    hub_folder(tmp_path, img_size=28, **TINY)
    path, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 28, 28]
    config["dino_sd"] = {"sha256": {"model.safetensors": checkpoint.digest(path)}, "position_resize": "dino"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dino_sd.load(tmp_path).backbone.position_resize == "dino"  # pyright: ignore
    state = load_file(path)
    save_file(state | {"norm.bias": state["norm.bias"] + 1}, path)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        dino_sd.load(tmp_path)


def test_a_folder_of_transformers(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 384}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"of transformers \(model_type=dinov2\)"):
        dino_sd.load(tmp_path)


# Features


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("vit_tiny_patch16_224", TINY),
        ("vit_tiny_patch16_224", TINY | {"reg_tokens": 2, "no_embed_class": True}),
        ("vit_tiny_patch16_224", TINY | {"class_token": False, "global_pool": "avg"}),
        ("resnet18", {}),
        ("convnext_atto", {}),
    ],
    ids=["class token", "registers", "no class token", "resnet", "convnext"],
)
def test_features_are_those_of_the_backbone(tmp_path: Path, name: str, model_args: dict):
    height, width = (28, 42) if model_args else (64, 96)
    torch.manual_seed(0)
    backbone = Backbone(name, size=(height, height), model_args=model_args).eval()
    model = dino_sd.load(_saved(tmp_path, backbone, name, model_args))
    pictures = torch.randn(2, 3, height, width)
    whole, depth = backbone(pictures, list(range(backbone.depth))), backbone.depth
    assert torch.equal(model.features(pictures), whole.pooled_ND)
    patches_NPD = model.features(pictures, tokens="patch", as_map=False)
    assert torch.equal(patches_NPD, whole.patches_NPD)
    map_NDHW = model.features(pictures, tokens="patch")
    assert torch.equal(map_NDHW.flatten(2).transpose(1, 2), patches_NPD)
    if model_args:
        assert map_NDHW.shape == (2, 192, 4, 6)
    for index, (pooled_ND, layer_NPD) in enumerate(whole.layers):
        assert torch.equal(model.features(pictures, index - depth), pooled_ND)
        assert torch.equal(model.features(pictures, index, "patch", as_map=False), layer_NPD)
    first, last = model.features(pictures, layers=[0, -1])
    assert torch.equal(first, whole.layers[0][0]) and torch.equal(last, whole.layers[-1][0])
    raw_NPD = model.features(pictures, -1, "patch", as_map=False, norm=False)
    norm = getattr(backbone.model, "norm", torch.nn.Identity())
    torch.testing.assert_close(norm(raw_NPD), whole.layers[-1][1])
    if backbone.registers:
        tokens_NPD = backbone.model.forward_features(pictures)
        assert torch.equal(model.features(pictures, tokens="register"), tokens_NPD[:, 1:3])
    else:
        with pytest.raises(UserError, match="has no register tokens"):
            model.features(pictures, tokens="register")


def _saved(folder: Path, backbone: Backbone, name: str, model_args: dict) -> Path:
    """A folder in timm's format."""
    config = {
        "architecture": name, "model_args": model_args,
        "pretrained_cfg": {"input_size": [3, *backbone.size], "mean": [0.5] * 3, "std": [0.5] * 3},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(backbone), folder / "model.safetensors")
    return folder


def test_a_map_shows_where(tmp_path: Path):
    """A bright patch is seen in its row and column: rows are not columns."""
    model = dino_sd.load(published(tmp_path / "x.pth", vit()))
    dark = torch.zeros(1, 3, 28, 42)
    lit = dark.clone()
    lit[:, :, 7:14, 28:35] = 3.0  # row 1, column 4 of 4 x 6
    moved_HW = (model.features(lit, 0, "patch") - model.features(dark, 0, "patch"))[0].norm(dim=0)
    assert moved_HW.shape == (4, 6) and divmod(int(moved_HW.argmax()), 6) == (1, 4)


def test_features_can_be_learned_from(tmp_path: Path):
    model = dino_sd.load(published(tmp_path / "x.pth", vit()))
    probe = torch.nn.Linear(192, 2)
    probe(model.features(images())).sum().backward()
    assert probe.weight.grad is not None and model.backbone.training is False


def test_pixels_have_features_too():
    model, pictures = dino_sd.load("pixels"), images(8)
    assert torch.equal(model.features(pictures), pictures.flatten(1))
    assert torch.equal(model.features(pictures, tokens="patch"), pictures)


def test_wrong_calls(tmp_path: Path):
    model = dino_sd.load(published(tmp_path / "x.pth", vit()))
    for arguments, words in (
        ({"layers": 4}, "has 4; use 0 to 3"),
        ({"layers": [0, -5]}, "layers=-5"),
        ({"tokens": "patches"}, "expected cls, patch or register"),
        ({"images": images()[0]}, "expected normalised floats"),
        ({"images": images(28, 1)}, r"\(N, 3, H, W\)"),
        ({"images": torch.zeros(1, 3, 28, 28, dtype=torch.uint8)}, "torch.uint8"),
        ({"images": images(30)}, "cannot take them"),
        ({"images": ["a.jpg"]}, "images of Pillow|image of Pillow"),
    ):
        with pytest.raises(UserError, match=words):
            model.features(**{"images": images(), **arguments})  # pyright: ignore


def test_pictures_are_prepared_as_in_evaluation(tmp_path: Path):
    """To the bit: JPEG, upside down by EXIF, gray, with alpha, of 16 bits."""
    model = dino_sd.load(published(tmp_path / "x.pth", vit()))
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = (rng.random((40, 61, 4)) * 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "a.jpg")
    Image.fromarray(pixels[..., :3]).save(folder / "b.jpg", exif=exif)
    Image.fromarray(pixels[..., 0]).save(folder / "c.png")
    Image.fromarray(pixels).save(folder / "d.png")
    source = open_source(str(folder), 3)
    dataset = EvalSet(source, (28, 28), model.crop)
    opened = [Image.open(source.path(index)) for index in range(4)]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (model.mean, model.std))
    for index, image in enumerate(opened):
        expected = dataset[index][0].float().div_(WHITE[source.dtype]).sub_(mean).div_(std)
        assert torch.equal(model.transform(image), expected), source.path(index)
    together = model.features(opened)
    assert torch.equal(together, model.features(torch.stack([model.transform(image) for image in opened])))
    torch.testing.assert_close(model.features(opened[0]), together[:1])

    deep = Image.fromarray((rng.random((40, 61)) * 65535).astype(np.uint16))
    white = Image.fromarray(np.full((40, 61), 65535, np.uint16))
    assert len(model.transform(deep).unique()) > 300  # not clipped to white
    assert torch.equal(model.transform(white), model.transform(Image.new("RGB", (61, 40), "white")))
    with pytest.raises(UserError, match="32-bit"):
        model.transform(deep.convert("I"))


def test_import_is_light():
    code = "import sys, dino_sd; print(dino_sd.__version__, sorted({'torch', 'timm', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == f"{dino_sd.__version__} []"
