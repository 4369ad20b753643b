import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import TINY as TINY_RUN
from conftest import command, tiny_pairs
from PIL import Image

import dino_sd.export
from dino_sd import checkpoint, recipe
from dino_sd.config import ExportSettings
from dino_sd.errors import UserError
from dino_sd.export import check_differences, export, frozen
from dino_sd.exported import Usage
from dino_sd.exports import pt2, safetensors
from dino_sd.exports import timm as timm_format
from dino_sd.exports import torchvision as torchvision_format
from dino_sd.loading import load_model, shallow
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import Classifier, Exit, ExitFeatures
from dino_sd.models.model import Model
from dino_sd.reloading import sizes, verify
from dino_sd.settings import parse
from dino_sd.train import train

TINY = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
ALL = ["timm", "safetensors", "pt2", "onnx"]  # what a ViT goes to
OUTPUTS = ("features", "patches", "logits")
RUNS = ("plain", "compiled", "on 2 ranks")


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
        "model": name, "model_args": model_args, "channels": channels, "drop_path": 0.1, "batch_size": 16,
        "data": {"source": ["some/images"]}, "terms": {"dino": {}},
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


def agreed(folder, exported, formats):
    """In the place of `verify`, for tests of something else."""
    return {name: {"somebody, features, 28x28, batch of 1": 0.0} for name in formats}, []


@pytest.fixture
def unverified(monkeypatch):
    monkeypatch.setattr(dino_sd.export, "verify", agreed)


def trained(folder: Path, how: str, **changes: Any) -> Path:
    """A run of two steps with labels, as the command line makes it."""
    terms = {"dino": {"prototypes": 64, "hidden": 32, "bottleneck": 16}, "labels": {}}
    folder.mkdir()
    recipe_file = folder / "tiny.yaml"
    recipe_file.write_text(yaml.safe_dump({**TINY_RUN, "terms": terms, "steps": 2, **changes}))
    pairs = tiny_pairs(folder / "run", compile=str(how == "compiled").lower())
    if how == "on 2 ranks":
        done = command("train", recipe_file, *pairs, ranks=2)
        assert done.returncode == 0, done.stderr
        return folder / "run"
    with pytest.MonkeyPatch.context() as patched:
        # What a checkpoint holds does not depend on the compiler's backend; inductor's takes a minute here.
        patched.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        train(recipe.load_config(str(recipe_file), pairs))
    return folder / "run"


def said_by_the_run(run: Path, images: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    model = load_model(run, **options)
    with torch.inference_mode():
        features = model.backbone(images)
        said = {"features": features.pooled_ND, "patches": features.patches_NPD}
        return {**said, "logits": model.heads["classifier"](features.pooled_ND)} if model.heads else said


def said_by(usage: Usage, folder: Path, batches: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    loaded: dict[str, Any] = {}
    exec(usage.load.replace("FOLDER", str(folder)), loaded)
    found = []
    for images in batches:
        names = {**loaded, "images": images}
        with torch.inference_mode():
            exec(usage.call, names)
        found.append({name: torch.as_tensor(names[name]) for name in OUTPUTS if name in names})
    return found


@pytest.mark.parametrize("how", RUNS)
def test_every_run_goes_to_every_format(tmp_path: Path, capsys, monkeypatch, how: str):
    """The plain one is read back by the export itself, in a fresh process; this test reads back all three."""
    run = trained(tmp_path / "trained", how)
    if how != "plain":
        monkeypatch.setattr(dino_sd.export, "verify", agreed)
    out = export(run, tmp_path / "out", ALL, dynamic_size=True)
    printed, config = capsys.readouterr().out, json.loads((out / "config.json").read_text())
    if how == "plain":
        for libraries, outputs in (
            ("timm, torch.hub, transformers", "features, logits"), ("safetensors", "features, logits"),
            ("torch.export", "features, logits, patches"), ("onnxruntime", "features, logits, patches"),
        ):  # fmt: skip
            assert re.search(
                rf"fresh process without dino_sd, by {libraries}: largest difference of {outputs} \S+ "
                r"\(28x28, 42x42 pixels, batches of 1 and 3\)", printed,
            ), printed  # fmt: skip
        assert f'timm.create_model("local-dir:{out}"' in printed
    allowed = {"timm": 1e-5, "safetensors": 1e-5, "pt2": 1e-5, "onnx": 1e-4}
    assert {name: found["allowed"] for name, found in config["dino_sd"]["formats"].items()} == allowed
    assert config["dino_sd"]["sha256"] == {
        name: checkpoint.digest(out / name) for name in ("model.safetensors", "model.pt2", "model.onnx")
    }
    assert config["label_names"][0] == "T-shirt/top" and config["num_classes"] == 10

    exported = frozen(load_model(run), None, True, False)
    usages = {usage: name for name in ALL for usage in dino_sd.export.format_module(name).usages(exported)}
    assert {usage.library for usage in usages} == {
        "timm", "torch.hub", "transformers", "safetensors", "torch.export", "onnxruntime",
    }  # fmt: skip
    images = [torch.randn(1, 1, 28, 28), torch.randn(3, 1, 35, 49)]  # by this test's own measure
    expected = [said_by_the_run(run, batch) for batch in images]
    for usage, name in usages.items():
        for ours, theirs in zip(expected, said_by(usage, out, images), strict=True):
            assert {"features", "logits"} <= theirs.keys()
            for output, tensor in theirs.items():
                assert (tensor - ours[output]).abs().max() <= allowed[name], (usage.library, output)


def test_resnet_goes_to_torchvision(tmp_path: Path, unverified):
    """A compiled run of one: its names are those of timm and of torchvision."""
    run = trained(tmp_path / "trained", "compiled", model="resnet18", model_args={}, batch_size=2, steps=1)
    out = export(run, tmp_path / "out", ["torchvision", "timm"])
    exported = frozen(load_model(run), None, False, False)
    images = [torch.randn(1, 1, 28, 28), torch.randn(3, 1, 64, 40)]
    expected = [said_by_the_run(run, batch) for batch in images]
    for usage in (*torchvision_format.usages(exported), *timm_format.usages(exported)):
        for ours, theirs in zip(expected, said_by(usage, out, images), strict=True):
            assert theirs.keys() == {"features", "logits"}
            for output, tensor in theirs.items():
                assert (tensor - ours[output]).abs().max() <= 1e-5, (usage.library, output)


def test_reloads_as_it_was(tmp_path, unverified):
    run = run_folder(tmp_path / "run", channels=3, model_args={**TINY, "reg_tokens": 4})
    out = export(run, tmp_path / "export")
    config = json.loads((out / "config.json").read_text())
    images = config["pretrained_cfg"]
    assert (images["input_size"], images["mean"], images["crop_pct"]) == ([3, 28, 28], [0.3] * 3, 0.9)
    assert images["interpolation"] == "bicubic"
    assert config["dino_sd"]["step"] == 7 and config["dino_sd"]["data"]["fingerprint"] == "abc"
    assert not any("drop" in key for key in config["model_args"])
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []

    loaded, teacher, student = load_model(out), load_model(run), load_model(run, network="student")
    pictures = torch.randn(2, 3, 28, 28)
    features, teachers, students = (model.backbone(pictures).pooled_ND for model in (loaded, teacher, student))
    assert torch.equal(features, teachers) and not torch.allclose(features, students)
    assert (loaded.size, loaded.crop, loaded.mean, loaded.std) == (teacher.size, 0.9, teacher.mean, teacher.std)


def shallow_resnet(tmp_path: Path) -> tuple[Path, Model]:
    run = run_folder(tmp_path / "run", "resnet18", 3, {})
    model = load_model(run)
    torch.manual_seed(0)
    exit = Exit(ExitFeatures(2, 128, 16), Classifier(16, 3))
    model.heads["exit_2"], model.norms[2] = exit, exit.features.norm
    return run, Model(**{**vars(model), "classes": ["a", "b", "c"]})


def test_shallow_resnet_goes_where_timm_cannot(tmp_path, unverified, capsys):
    _, model = shallow_resnet(tmp_path)
    with pytest.raises(UserError, match="exit=2: timm builds a part of plain ViTs only.*safetensors"):
        export(model, tmp_path / "out", exit=2)
    out = export(model, tmp_path / "out", ["torchvision", "safetensors", "pt2"], exit=2)
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected = model.backbone.pooled(images, [2])[1]
        logits = model.heads["exit_2"](expected)
    for module in (torchvision_format, safetensors, pt2):
        (usage,) = module.usages(frozen(shallow(model, 2), 2, False, False))
        (found,) = said_by(usage, out, [images])
        assert (found["features"] - expected).abs().max() <= 1e-5, usage.library
        if module.GRAPH:
            assert (found["logits"] - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_graph_takes_pixels(tmp_path, format, unverified):
    run = run_folder(tmp_path / "run", channels=3)
    out = export(run, tmp_path / "out", format, preprocess=True)
    pixels = torch.randint(0, 256, (3, 3, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = said_by_the_run(run, (pixels / 255 - 0.3) / 0.2)["features"]
    if format == "pt2":
        metadata = {"metadata.json": ""}
        found = torch.export.load(out / "model.pt2", extra_files=metadata).module()(pixels)["features"]
        said = json.loads(metadata["metadata.json"])
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(out / "model.onnx")
        found = torch.from_numpy(session.run(["features"], {"images": pixels.numpy()})[0])
        assert session.get_inputs()[0].shape == ["batch", 3, 28, 28]
        said = session.get_modelmeta().custom_metadata_map
        assert b"/tests/" not in (out / "model.onnx").read_bytes()
        assert b"site-packages" not in (out / "model.onnx").read_bytes()
    assert (found - expected).abs().max() <= 1e-4
    assert said["input"].startswith("uint8 (N, 3, 28, 28)")
    preprocessing = json.loads(said["preprocessing"])
    assert preprocessing["normalised_in_graph"] and preprocessing["std"] == [0.2] * 3
    assert "take uint8 pixels" in (out / "README.md").read_text()


def test_card_says_what_is_known(tmp_path, unverified, capsys):
    run = run_folder(tmp_path / "run")
    (run / "evaluations").mkdir()
    (run / "environment.json").write_text(json.dumps({"dino_sd": "0.0.1", "commit": "c0ffee", "command": ["secret"]}))
    report = {
        "evaluator": "knn", "results": [{"k": 20, "top1": 81.25}], "settings": {"k": [20], "exit": None},
        "train": {"data": "voters", "images": 70, "fingerprint": "f1"},
        "test": {"data": "judged", "images": 30, "fingerprint": "f2"},
        "weights": load_model(run).weights,
    }  # fmt: skip
    (run / "evaluations" / "knn.json").write_text(json.dumps(report))
    stale = {**report, "evaluator": "linear", "weights": load_model(run, exit=1).weights}
    (run / "evaluations" / "linear.json").write_text(json.dumps(stale))
    (run / "evaluations" / "broken.json").write_text("{")
    out = export(run, tmp_path / "out")
    page, known = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())["dino_sd"]
    assert "linear.json judged other weights" in capsys.readouterr().err
    assert list(known["evaluations"]) == ["knn"] and known["evaluations"]["knn"]["results"] == report["results"]
    assert known["trained_by"] == {"dino_sd": "0.0.1", "commit": "c0ffee"}
    assert known["preprocessing"]["size"] == [28, 28] and known["preprocessing"]["crop"] == 0.9
    for words in ("81.25", "30 of judged (`f2`)", "70 of voters", "5 images of some/images", "7 of 10 steps", "c0ffee",
                  "AutoModel.from_pretrained", known["sha256"]["model.safetensors"]):  # fmt: skip
        assert words in page, words
    again = export(out, tmp_path / "again", "safetensors")  # what is known of the weights goes with them
    after = json.loads((again / "config.json").read_text())["dino_sd"]
    assert after["evaluations"] == known["evaluations"] and list(after["formats"]) == ["safetensors"]
    assert (after["step"], after["trained_by"], after["data"]) == (7, known["trained_by"], known["data"])


def test_a_part_has_its_own_scores(tmp_path, unverified):
    """A model that was cut when it was loaded is what it is: its own evaluations, none of the whole's scores."""
    run = run_folder(tmp_path / "run")
    part = load_model(run, exit=1)
    assert part.provenance["exit"] == 1 and not {"scores", "evaluations"} & part.provenance.keys()
    (run / "evaluations").mkdir()
    for name, model in (("whole", load_model(run)), ("part", part)):
        report = {"evaluator": name, "results": [{"top1": 50.0}], "weights": model.weights}
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(report))
    for name, spec, options in (("whole", run, {}), ("part", part, {}), ("part", run, {"exit": 1})):
        out = export(spec, tmp_path / "out", **options)
        known = json.loads((out / "config.json").read_text())["dino_sd"]
        assert list(known["evaluations"]) == [name] and known.get("exit") == {"whole": None, "part": 1}[name]
        assert ("first 1 blocks" in (out / "README.md").read_text()) == (name == "part")


@pytest.mark.parametrize("where", ["file/out", "file"])
def test_places_that_cannot_be_written(tmp_path, where: str, unverified):
    (tmp_path / "file").write_text("here already")
    with pytest.raises(UserError, match="out=.*(cannot be written|no export)"):
        export(run_folder(tmp_path / "run"), tmp_path / where)


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (28, 42))])
def test_the_cards_lines_prepare_images_as_evaluation_does(tmp_path, channels: int, size, monkeypatch, unverified):
    """Run as they stand, on photographs of any shape: what `transform` makes, to the last bit of a byte."""
    backbone = Backbone("vit_tiny_patch16_224", size=size, channels=channels, model_args=TINY).eval()
    model = Model(backbone, size, 0.9, [0.4] * channels, [0.2] * channels, "a ViT", {})
    card = (export(model, tmp_path / "out", "safetensors") / "README.md").read_text()
    lines = next(block for block in card.split("```python\n")[1:] if "photo.jpg" in block).split("```")[0]
    monkeypatch.chdir(tmp_path)
    for width, height, mode in ((211, 317, "RGB"), (90, 31, "L"), (40, 400, "RGB")):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width // 3, height // 3)).resize((width, height)).convert(mode)
        image.save(tmp_path / "photo.jpg")
        names: dict[str, Any] = {}
        exec(lines, names)
        ours = model.transform(Image.open(tmp_path / "photo.jpg"))
        assert names["images"].shape == (1, channels, *size) and names["images"].dtype == np.float32
        assert np.abs(names["images"][0] - ours.numpy()).max() * 0.2 * 255 <= 1.01


@pytest.mark.parametrize("side", [28, 96, 100])
def test_timm_cuts_as_evaluation_does(tmp_path, side: int):
    """The transform that an export hands out sees the very part of an image that was judged."""
    from dino_sd.data.evaluation import resize_crop

    pixels_HWC = np.random.default_rng(0).integers(0, 256, (211, 317, 3), dtype=np.uint8)
    transform = timm.data.create_transform((3, side, side), crop_pct=0.875, interpolation="bicubic", mean=0.0, std=1.0)
    theirs_CHW = transform(Image.fromarray(pixels_HWC)) * 255
    ours_CHW = resize_crop(torch.from_numpy(pixels_HWC).movedim(2, 0), (side, side), 0.875)
    assert (theirs_CHW - ours_CHW).abs().max() <= 1.01, "another part, or more than the last bit of a byte"


def test_difference_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    write = pt2.write
    student = frozen(load_model(run, network="student"), None, False, False)
    monkeypatch.setattr(pt2, "write", lambda folder, _: write(folder, student))
    with pytest.raises(UserError, match="format=pt2.*features, 28x28.*differ by .*nothing was written"):
        export(run, tmp_path / "export", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("bad", [2e-5, float("nan"), float("inf")])
def test_every_difference_counts(bad):
    check_differences("timm", {"a": 0.0, "b": 1e-5}, 1e-5, Path("x"))
    with pytest.raises(UserError, match=r"reloaded: b: .*\(allowed: 1e-05\)"):
        check_differences("timm", {"a": 0.0, "b": bad, "c": 0.0}, 1e-5, Path("x"))


def test_fresh_process_knows_no_dino_sd(tmp_path, monkeypatch):
    """A library that would import it is left out, and that is said; one that is needed and cannot load is an error."""
    exported = frozen(load_model(run_folder(tmp_path / "run")), None, False, False)
    zeros = Usage("zeros", "import torch", "features = torch.zeros(len(images), 32)")
    cheat = Usage("a cheat", "import dino_sd", "features = images", optional=True)
    monkeypatch.setattr(safetensors, "usages", lambda _: [zeros, cheat])
    differences, notes = verify(tmp_path, exported, {"safetensors": safetensors})
    assert len(notes) == 1 and re.match("a cheat was not tried .*dino_sd", notes[0])
    assert len(differences["safetensors"]) == 4
    images = torch.from_numpy(np.random.Generator(np.random.Philox(42)).integers(0, 256, (3, 1, 42, 42), np.uint8))
    expected = said_by_the_run(tmp_path / "run", (images / 255 - 0.3) / 0.2)["features"]
    found = differences["safetensors"]["zeros, features, 42x42, batch of 3"]
    assert found == pytest.approx(float(expected.abs().max()), abs=1e-5)
    monkeypatch.setattr(safetensors, "usages", lambda _: [cheat._replace(optional=False)])
    with pytest.raises(UserError, match="a cheat cannot load what was written: .*dino_sd"):
        verify(tmp_path, exported, {"safetensors": safetensors})


def test_only_exports_are_replaced(tmp_path, unverified):
    run, out = run_folder(tmp_path / "run"), tmp_path / "export"
    out.mkdir()
    export(run, out)
    (out / "stale").touch()
    export(run, out, "safetensors", network="student")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text())["dino_sd"]["network"] == "student"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
    with pytest.raises(UserError, match="no export of dino_sd"):
        export(run, run)
    assert checkpoint.newest(run) is not None


def test_positions_resized_in_another_way_are_said(tmp_path, unverified, capsys):
    model = load_model(run_folder(tmp_path / "run"))
    setattr(model.backbone, "position_resize", "dino")  # noqa: B010
    out = export(model, tmp_path / "out")
    assert "at other sizes their features differ slightly" in capsys.readouterr().err
    assert "at other sizes their features differ slightly" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["dino_sd"]["position_resize"] == "dino"
    assert sizes(frozen(model, None, False, False), safetensors) == [(28, 28)]
    with pytest.raises(UserError, match="dynamic_size=true.*way of its own"):
        export(model, tmp_path / "out", "pt2", dynamic_size=True)


@pytest.mark.parametrize(
    ("spec", "format", "options", "words"),
    [
        ("nowhere", "timm", {}, "nowhere"),
        ("pixels", "timm", {}, "raw pixels"),
        ("pixels", "onnx2", {}, "format=onnx2: expected one or several of onnx, pt2, safetensors, timm, torchvision"),
        ("pixels", ["timm", "torchvision"], {"dynamic_size": True}, "dynamic_size=true is for formats that hold"),
        ("pixels", "safetensors", {"preprocess": True}, "preprocess=true is for formats that hold a graph"),
        ({}, "torchvision", {}, "ResNets that torchvision has too.*resnet18.*vit_tiny"),
        ({"name": "resnet18d", "model_args": {}}, "torchvision", {}, "torchvision.*model=resnet18d is none"),
        (
            {"name": "resnet18", "model_args": {"stem_type": "deep"}}, "torchvision", {},
            "another network than torchvision's, for one in (conv1|bn1)",
        ),
        ({"model_args": {**TINY, "dynamic_img_size": False}}, "pt2", {"dynamic_size": True}, "28x28 pixels alone"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(tmp_path, spec, format, options, words):
    model = run_folder(tmp_path / "run", **spec) if isinstance(spec, dict) else spec
    with pytest.raises(UserError, match=words):
        export(model, tmp_path / "export", format=format, **options)
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob("*tmp*"))


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_sd.exports.onnx.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"needs onnxscript; .*pip install 'dino-sd\[onnx\]'"):
        export(run_folder(tmp_path / "run"), tmp_path / "export", "onnx")


def test_formats_on_the_command_line():
    assert parse(ExportSettings, {"out": "x"}).format == ["timm"]
    assert parse(ExportSettings, {"out": "x", "format": "timm, onnx"}).format == ["timm", "onnx"]
    assert parse(ExportSettings, {"out": "x", "format": ["pt2"]}).format == ["pt2"]
    with pytest.raises(UserError, match="format"):
        parse(ExportSettings, {"out": "x", "format": []})
