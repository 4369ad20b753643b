import json

import pytest
import torch

import dino_sd.export
from dino_sd import checkpoint
from dino_sd.errors import UserError
from dino_sd.export import export, verify, write_timm
from dino_sd.loading import load_model
from dino_sd.models.backbone import Backbone

TINY = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}


def run_folder(folder, name="vit_tiny_patch16_224", channels=1, model_args=TINY, size=28):
    """A run as training leaves it, with another teacher than student and an unfinished head."""
    networks = {}
    for network in ("student", "teacher"):
        backbone = Backbone(name, size=(size, size), channels=channels, model_args=model_args)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for key, buffer in backbone.named_buffers():
                if key.endswith("running_mean"):
                    buffer.normal_()
        state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
        networks[network] = state | {"heads.dino.last.weight": torch.zeros(3, 4)}
    config = {
        "model": name, "model_args": model_args, "channels": channels, "drop_path": 0.1,
        "views": {"global": {"size": size}}, "evaluate": {"crop": 0.9, "size": None},
    }  # fmt: skip
    data = {
        "images": 5,
        "mean": [0.3] * channels,
        "std": [0.2] * channels,
        "range": [0, 1],
        "classes": None,
        "fingerprint": "abc",
    }
    state = {"step": 7, "steps": 10, "config": config, "data": data, "result": "teacher", **networks}
    checkpoint.save(checkpoint.path_of(folder, 7), state)
    return folder


@pytest.mark.parametrize(
    ("name", "channels", "model_args", "sizes"),
    [
        ("vit_tiny_patch16_224", 1, TINY, "28x28, 42x42"),
        ("vit_tiny_patch16_224", 3, {**TINY, "reg_tokens": 4}, "28x28, 42x42"),
        ("resnet18", 1, {}, "28x28, 60x60"),
    ],
)
def test_reloads_without_dino_sd(tmp_path, capsys, name, channels, model_args, sizes):
    run = run_folder(tmp_path / "run", name, channels, model_args)
    out = export(run, tmp_path / "export")
    printed = capsys.readouterr().out
    assert f"({sizes} pixels)" in printed and f'create_model("local-dir:{out}"' in printed
    config = json.loads((out / "config.json").read_text())
    images = config["pretrained_cfg"]
    assert (images["input_size"], images["mean"], images["crop_pct"]) == ([channels, 28, 28], [0.3] * channels, 0.9)
    assert images["interpolation"] == "bicubic"
    assert config["dino_sd"]["step"] == 7 and config["dino_sd"]["data"]["fingerprint"] == "abc"
    assert not any("drop" in key for key in config["model_args"])
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []

    loaded, teacher, student = load_model(out), load_model(run), load_model(run, network="student")
    pictures = torch.randn(2, channels, 28, 28)
    features, teachers, students = (model.backbone(pictures).pooled_ND for model in (loaded, teacher, student))
    assert torch.equal(features, teachers) and not torch.allclose(features, students)
    assert (loaded.size, loaded.crop, loaded.mean, loaded.std) == (teacher.size, 0.9, teacher.mean, teacher.std)


def test_difference_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")

    def write_other_weights(folder, backbone, model):
        student = load_model(run, network="student").backbone
        assert isinstance(student, Backbone)
        write_timm(folder, student, model)

    monkeypatch.setattr(dino_sd.export, "write_timm", write_other_weights)
    with pytest.raises(UserError, match="differ by"):
        export(run, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_timm_cannot_load_is_an_error(tmp_path):
    model = load_model(run_folder(tmp_path / "run"))
    assert isinstance(model.backbone, Backbone)
    write_timm(tmp_path, model.backbone, model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"timm cannot load.*blocks\.2|timm cannot load.*Missing"):
        verify(tmp_path, model.backbone, (28, 28))


def test_only_exports_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(dino_sd.export, "verify", lambda *_: {"28x28 fused=False": 0.0})
    run, out = run_folder(tmp_path / "run"), tmp_path / "export"
    out.mkdir()
    export(run, out)
    (out / "stale").touch()
    export(run, out, network="student")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text())["dino_sd"]["network"] == "student"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
    with pytest.raises(UserError, match="no export of dino_sd"):
        export(run, run)
    assert checkpoint.newest(run) is not None


@pytest.mark.parametrize(
    ("spec", "format", "words"),
    [("nowhere", "timm", "nowhere"), ("pixels", "timm", "raw pixels"), ("pixels", "onnx2", "format=onnx2")],
)
def test_bad_input_is_refused(tmp_path, spec, format, words):
    with pytest.raises(UserError, match=words):
        export(spec, tmp_path / "export", format=format)
