"""Bad input gets one clear line and exit code 2, before anything is written."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, command
from PIL import Image

from dino_sd import cli, recipe
from dino_sd.errors import UserError


def run_cli(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """(exit code, stderr) of the program, in this process."""
    monkeypatch.setattr("sys.argv", ["dino-sd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    code = stop.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["optim.learning_rate=1"], ["unknown key 'optim.learning_rate'", "the command line", "'optim.lr'"]),
        (["epoch=3"], ["unknown key 'epoch'", "'epochs'"]),
        (["terms.dino.prototype=3"], ["unknown key 'terms.dino.prototype'", "'terms.dino.prototypes'"]),
        (["views.globl.size=3"], ["unknown key 'views.globl'", "'views.global'"]),
        (["terms.dinno={}"], ["unknown term 'dinno'", "'dino'"]),
        (["teacher.momentum=1.5"], ["teacher.momentum=1.5", "at most 1"]),
        (["terms.dino.teacher_temperature=0"], ["terms.dino.teacher_temperature=0", "above 0"]),
        (["optim.weight_decay.end=-1"], ["optim.weight_decay", "at least 0"]),
        (["batch_size=many"], ["batch_size='many'", "integer"]),
        (["optim.lr=-1"], ["optim.lr=-1", "greater than 0"]),
        (["optim.warmup=5"], ["optim.warmup=5", "epochs=N"]),
        (["epochs=3", "steps=4"], ["exactly one of epochs, steps, images", "epochs and steps"]),
        (["data=/no/such/folder"], ["/no/such/folder"]),
        (["model=vit_smal_patch16_224"], ["vit_smal_patch16_224", "vit_small_patch16_224"]),
        (["views.local.size=15"], ["views.local.size=15", "patch size 7", "use 14"]),
        (["optim.warmup=steps=30"], ["optim.warmup=steps=30", "steps=20"]),
        (["batch_size=10001"], ["batch_size=10001", "10000"]),
        (["batch_size=9", "accumulate=2"], ["batch_size=9", "accumulate=2"]),
        (["model_args.wrong=1"], ["model_args", "vit_tiny_patch16_224"]),
        (["views.local.count=0", "views.global.count=1"], ["one crop an image"]),
        (["device=cuda"], ["device=cuda"]),
        (["steps"], ["key=value"]),
        (["init=/no/such/run"], ["/no/such/run"]),
        (["evaluate.every=0.5"], ["evaluate.every", "evaluate.train"]),
    ],
)
def test_wrong_setting(tiny_yaml: Path, tmp_path: Path, monkeypatch, capsys, pairs: list[str], words: list[str]):
    if pairs == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, said = run_cli(monkeypatch, capsys, "train", tiny_yaml, f"out={tmp_path / 'run'}", *pairs)
    assert code == 2
    assert len(said.strip().splitlines()) == 1 and said.startswith("error: "), said
    for word in words:
        assert word in said
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**TINY, "optim": {"learning_rate": 0.1}}))
    code, said = run_cli(monkeypatch, capsys, "train", path)
    assert code == 2
    assert f"unknown key 'optim.learning_rate' in {path}; did you mean 'optim.lr'?" in said


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "just words"])
def test_file_that_is_no_config(tmp_path: Path, monkeypatch, capsys, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    code, said = run_cli(monkeypatch, capsys, "train", path)
    assert code == 2 and str(path) in said and len(said.strip().splitlines()) == 1


def test_missing_config(monkeypatch, capsys):
    code, said = run_cli(monkeypatch, capsys, "train", "no/such.yaml")
    assert code == 2 and "no/such.yaml" in said


def test_empty_folder(tiny_yaml: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    code, said = run_cli(monkeypatch, capsys, "train", tiny_yaml, f"data={tmp_path / 'empty'}")
    assert code == 2 and str(tmp_path / "empty") in said and ".jpg" in said


def test_out_with_another_config(tiny, tiny_yaml: Path, tmp_path: Path, monkeypatch, capsys):
    from dino_sd.train import train

    train(tiny(tmp_path / "run", steps=2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.pt")}
    code, said = run_cli(
        monkeypatch, capsys, "train", tiny_yaml, f"out={tmp_path / 'run'}", "steps=2", "optim.lr=0.5", "seed=3"
    )
    line = said.strip().splitlines()[-1]
    assert code == 2 and "optim.lr: 0.001 -> 0.5" in line and "seed: 0 -> 3" in line
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.pt")}


def test_checkpoint_of_another_architecture(tiny, tiny_yaml: Path, tmp_path: Path, monkeypatch, capsys):
    from dino_sd.train import train

    train(tiny(tmp_path / "run", steps=2))
    code, said = run_cli(
        monkeypatch, capsys, "train", tiny_yaml, f"out={tmp_path / 'new'}", f"init={tmp_path / 'run'}",
        "model_args.embed_dim=48",
    )  # fmt: skip
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and "48" in line


def test_knn_settings(monkeypatch, capsys):
    code, said = run_cli(monkeypatch, capsys, "knn", "pixels", "train=fashion-mnist-mini:train", "neighbours=3")
    assert code == 2 and "unknown key 'neighbours'" in said and "'k'" in said
    code, said = run_cli(monkeypatch, capsys, "knn", "pixels", "train=fashion-mnist-mini:train")
    assert code == 2 and "'test'" in said
    code, said = run_cli(monkeypatch, capsys, "knn", "no/run", "train=a", "test=b")
    assert code == 2 and "no/run" in said


def test_too_many_unreadable_images(tiny_yaml: Path, tmp_path: Path):
    """More than the share that is allowed, met in another process: one line, no traceback, exit code 2."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(16):
        Image.new("L", (40, 40), i).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:40])
    pairs = [f"data={folder}", f"out={tmp_path / 'run'}", "workers=1", "views.mean=[0.5]", "views.std=[0.5]"]
    done = command("train", tiny_yaml, *pairs, "data.memory=0", "data.most_bad=0.05")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: data: 1 of 16 images cannot be read, more than data.most_bad=0.05")
    assert "07.png" in said
    for path in folder.iterdir():
        path.write_bytes(b"")
    done = command("train", tiny_yaml, *pairs)
    said = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.returncode == 2 and said.startswith("error: data: 16 images of") and ".png: is empty, 0 bytes" in said


def test_wrong_setting_is_a_user_error_in_the_library(tiny_yaml: Path):
    with pytest.raises(UserError, match="optim.lr"):
        recipe.load_config(tiny_yaml, ["optim.lr=fast"])


@pytest.mark.parametrize(
    "written",
    [
        "optim.lr: !!python/object/apply:os.system ['touch HERE']",
        "optim: {lr: \"__import__('os').system('touch HERE')\"}",
        "model: \"__import__('os').system('touch HERE')\"",
        "model_args: {act_layer: \"__import__('os').system('touch HERE')\"}",
        "data: \"torchvision:__import__('os').system('touch HERE')\"",
        "teacher: {momentum: {start: \"open('HERE', 'w')\"}}",
    ],
)
def test_settings_are_never_run(monkeypatch, capsys, tmp_path: Path, written: str):
    here = tmp_path / "ran"
    (tmp_path / "bad.yaml").write_text(written.replace("HERE", str(here)) + "\n")
    pairs = ["data=fashion-mnist-mini:train", "steps=1", "device=cpu", f"out={tmp_path / 'run'}"]
    pairs = pairs[1:] if written.startswith("data") else pairs
    code, said = run_cli(monkeypatch, capsys, "train", tmp_path / "bad.yaml", *pairs)
    assert code == 2 and said.startswith("error: ") and "Traceback" not in said, said
    assert not here.exists() and not (tmp_path / "run").exists()
