"""What a run does besides learning: any images, any backbone, its files, its log."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, state_of, tiny_pairs
from PIL import Image

from dino_sd import build, checkpoint, recipe
from dino_sd.data.loader import Batches
from dino_sd.data.source import open_source
from dino_sd.errors import UserError
from dino_sd.log import Log
from dino_sd.method import SelfDistillation
from dino_sd.models.backbone import Backbone
from dino_sd.train import train


def draw_images(folder: Path, count: int, mode: str, suffix: str) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        shape = (48, 64) if mode == "L" else (48, 64, 3)
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{i:03d}{suffix}")


def test_folder_of_jpegs_without_classes_and_the_same_as_class_folders(tiny, tmp_path: Path):
    draw_images(tmp_path / "flat", 64, "RGB", ".jpg")
    for path in sorted((tmp_path / "flat").iterdir()):
        target = tmp_path / "classes" / f"class{int(path.stem) % 3}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    flat, classes = (
        tiny(tmp_path / f"run_{name}", data=tmp_path / name, channels=3, steps=3) for name in ("flat", "classes")
    )
    views = [
        next(iter(Batches(open_source(str(cfg.data), 3), build.view_spec(cfg), seed=0, batch_size=16, total_steps=3)))
        for cfg in (flat, classes)
    ]
    for ours, theirs in zip(views[0].groups + views[0].rows, views[1].groups + views[1].rows, strict=True):
        assert torch.equal(ours, theirs)
    assert views[0].labels is None and views[1].labels is not None
    one, other = state_of(train(flat)), state_of(train(classes))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_gray_pngs(tiny, tmp_path: Path, channels: int):
    draw_images(tmp_path / "gray", 20, "L", ".PNG")
    saved = train(tiny(tmp_path / "run", data=tmp_path / "gray", channels=channels, steps=2))
    assert checkpoint.load(saved)["data"]["images"] == 20


@pytest.mark.parametrize(
    ("name", "sizes", "arguments"),
    [
        ("vit_tiny_patch16_224", (64, 32), {}),
        ("vit_small_patch8_224", (32, 16), {"depth": 2}),
        ("vit_base_patch16_224", (64, 32), {"depth": 1}),
        ("vit_small_patch14_reg4_dinov2", (56, 28), {"depth": 2}),
        ("resnet18", (64, 32), {}),
        ("resnet50", (64, 32), {}),
        ("convnext_tiny", (64, 32), {"depths": [1, 1, 1, 1]}),
    ],
)
def test_backbones_train(tiny, tmp_path: Path, name: str, sizes: tuple[int, int], arguments: dict):
    draw_images(tmp_path / "images", 8, "RGB", ".jpg")
    cfg = tiny(
        tmp_path / "run", data=tmp_path / "images", channels=3, steps=2, batch_size=4, model=name,
        views__global__size=sizes[0], views__local__size=sizes[1], precision="bf16",
    )  # fmt: skip
    cfg = cfg.model_copy(update={"model_args": arguments})
    state = checkpoint.load(train(cfg))
    assert all(torch.isfinite(value).all() for value in state["teacher"].values() if value.is_floating_point())
    moved = [key for key, value in state["student"].items() if not torch.equal(value, state["teacher"][key])]
    assert any("backbone" in key for key in moved)


def test_model_that_takes_one_size_is_refused_before_data_is_read(tiny, tmp_path: Path):
    cfg = tiny(tmp_path / "run", data="/not/read", model="mixer_s16_224", channels=3, views__local__size=96)
    cfg = cfg.model_copy(update={"model_args": {}})
    cfg.views.global_.size = 224
    with pytest.raises(UserError, match=r"mixer_s16_224.*96"):
        train(cfg)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "resnet18", "convnext_tiny"])
def test_pooled_is_the_pooled_output(name: str):
    """The shortcut through the last block, gradients included, and any block's outputs."""
    size = 56 if "14" in name else 64
    arguments = {"depth": 3, "qk_norm": True, "init_values": 0.5} if name.startswith("vit") else {}
    backbone = Backbone(name, size=(size, size), model_args=arguments).double().eval()
    backbone.use_fused_attention(False)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    whole, short = backbone(images).pooled_ND, backbone.pooled(images)[0]
    assert torch.allclose(whole, short, atol=1e-12)
    parameters = list(backbone.parameters())
    ours, theirs = (torch.autograd.grad(pooled.square().sum(), parameters) for pooled in (short, whole))
    for mine, yours in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, yours, atol=1e-9)
    features = backbone(images, layers=[-1, 0])
    assert features.pooled_ND.shape == (2, backbone.width)
    assert len(features.layers) == 2
    if name.startswith("vit"):
        assert torch.allclose(features.layers[0][0], whole, atol=1e-9)
        assert features.patches_NPD.shape == (2, (size // backbone.patch_size) ** 2, backbone.width)  # pyright: ignore


def test_local_crops_can_be_turned_off(tiny, tmp_path: Path):
    state = checkpoint.load(train(tiny(tmp_path / "run", steps=2, views__local__count=0)))
    assert state["step"] == 2


def test_frozen_prototypes_do_not_move(tiny, tmp_path: Path):
    frozen = tiny(
        tmp_path / "a",
        steps=4,
        terms__dino__freeze_last_layer="steps=3",
        checkpoint__every="steps=1",
        checkpoint__keep=9,
    )
    first = state_of(checkpoint.path_of(tmp_path / "a", 2)) if train(frozen) else {}
    last = state_of(checkpoint.path_of(tmp_path / "a", 3))
    key = ".student.heads.dino.last_layer.weight_v"
    assert torch.equal(first[key], last[key])
    assert not torch.equal(first[".student.heads.dino.mlp.0.weight"], last[".student.heads.dino.mlp.0.weight"])
    free = tiny(
        tmp_path / "b",
        steps=4,
        terms__dino__freeze_last_layer="steps=1",
        checkpoint__every="steps=1",
        checkpoint__keep=9,
    )
    train(free)
    assert not torch.equal(state_of(checkpoint.path_of(tmp_path / "b", 2))[key], last[key])


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_other_optimizers(tiny, tmp_path: Path, name: str):
    straight = train(tiny(tmp_path / "a", steps=6, optim__name=name, checkpoint__every="steps=3"))
    run = tmp_path / "b"
    train(tiny(run, steps=6, optim__name=name, checkpoint__every="steps=3")).unlink()
    again = train(tiny(run, steps=6, optim__name=name, checkpoint__every="steps=3"))
    one, other = state_of(straight), state_of(again)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_starting_from_a_run(tiny, tmp_path: Path):
    first = train(tiny(tmp_path / "first", steps=2))
    cfg = tiny(tmp_path / "second", steps=1, init=tmp_path / "first", optim__lr=1e-12, seed=5)
    second = state_of(train(cfg))
    key = ".teacher.backbone.model.blocks.0.attn.qkv.weight"
    assert torch.allclose(second[key], state_of(first)[key], atol=1e-6)
    fresh = state_of(train(tiny(tmp_path / "fresh", steps=1, optim__lr=1e-12, seed=5)))
    assert not torch.allclose(second[key], fresh[key], atol=1e-3)


def test_teacher_that_is_the_student_is_refused(tiny, tmp_path: Path):
    cfg = tiny(tmp_path / "run")
    length = build.Length(20, 10, 16)
    method = build.make_method(cfg, build.make_backbone(cfg), length, torch.device("cpu"))
    with pytest.raises(ValueError, match="share parameters"):
        SelfDistillation(method.student, method.student, {}, lambda t: 1.0)


def test_knn_during_the_run_and_before_it(tiny, tmp_path: Path):
    (tmp_path / "labelled").mkdir()
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 150)):
        (tmp_path / "labelled" / name).mkdir()
        for i in range(12):
            pixels = random.integers(low, low + 100, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "labelled" / name / f"{name}{i}.png")
    labelled = tmp_path / "labelled"
    train(tiny(tmp_path / "run", evaluate__every=0.5, evaluate__train=labelled, evaluate__test=labelled, evaluate__k=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["knn"] for line in lines if "knn" in line}
    assert scores.keys() == {0, 10, 20} and scores[0] > 90
    logged = next(line for line in lines if line["step"] == 20 and "loss" in line)
    shares = logged["dino/loss_share"], logged["dino/teacher_entropy"], logged["dino/kl"]
    assert shares[0] == pytest.approx(shares[1] + shares[2], abs=1e-5)
    assert logged["loss"] == pytest.approx(shares[0] * math.log(64), rel=1e-4)


def test_checkpoints_kept(tiny, tmp_path: Path):
    run = tmp_path / "run"
    train(tiny(run, checkpoint__every="steps=2", checkpoint__keep=2, checkpoint__milestone="steps=8"))
    assert sorted(checkpoint.step_of(path) for path in checkpoint.all_of(run)) == [8, 16, 18, 20]
    assert not list((run / "checkpoints").glob(".*"))


def test_finished_run_is_left_alone(tiny, tmp_path: Path, capsys):
    saved = train(tiny(tmp_path / "run", steps=2))
    before = saved.read_bytes()
    assert train(tiny(tmp_path / "run", steps=2)) == saved
    assert "is finished" in capsys.readouterr().err and saved.read_bytes() == before


def test_pickle_that_would_run_code_is_refused(tmp_path: Path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 1, "bad": Harmful()}, path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "made").exists()


def test_wandb_that_fails_does_not_stop_a_run(tmp_path: Path, monkeypatch, capsys):
    class Broken:
        def __getattr__(self, name: str):
            raise ConnectionError("refused")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    log = Log(tmp_path, start_step=0, steps=2, active=True, wandb="online", config={})
    log.write(1, {"loss": 1.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    assert "going on without it" in capsys.readouterr().err


def test_log_forgets_what_a_resumed_run_will_say_again(tmp_path: Path):
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    Log(tmp_path, start_step=2, steps=9, active=True, wandb="off", config={}).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_slurm_variables_make_two_ranks(tiny_yaml: Path, tmp_path: Path):
    """srun's environment alone, as two processes."""
    import os
    import subprocess

    from conftest import ROOT

    processes = []
    for procid in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_PROCID": str(procid), "SLURM_STEP_NUM_TASKS": "2",
               "SLURM_LOCALID": str(procid), "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost",
               "SLURM_JOB_ID": str(os.getpid())}  # fmt: skip
        arguments = [sys.executable, "-m", "dino_sd", "train", str(tiny_yaml), *tiny_pairs(tmp_path / "run", steps=2)]
        processes.append(subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2


def test_plan_trains_nothing(tiny_yaml: Path, tmp_path: Path):
    done = command("plan", tiny_yaml, *tiny_pairs(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    for words in ("20 steps of 16 = 320 images", "0.001 x 16 / 256", "10,000 images", "memory", "GFLOP"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


def test_every_recipe_is_valid():
    for path in recipe.recipes().glob("*.yaml"):
        cfg = recipe.load_config(path, [])
        assert path.read_text().startswith("# "), f"{path.name} has no header"
        assert cfg.terms


def test_part_of_a_curve_keeps_the_rest(tiny_yaml: Path, tmp_path: Path):
    cfg = recipe.load_config(tiny_yaml, [f"out={tmp_path}", "optim.weight_decay.end=0.2", "teacher.momentum.end=0.95"])
    assert (cfg.optim.weight_decay.start, cfg.optim.weight_decay.end) == (0.04, 0.2)
    assert (cfg.teacher.momentum.start, cfg.teacher.momentum.end) == (0.9, 0.95)


def test_interrupted_by_hand(tiny_yaml: Path, tmp_path: Path):
    """Ctrl-C: the step is finished and saved, exit code 75, one line that says how to go on."""
    import signal
    import subprocess
    import time

    from conftest import ROOT

    run = tmp_path / "run"
    arguments = [sys.executable, "-m", "dino_sd", "train", str(tiny_yaml), *tiny_pairs(run, steps=100000)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while checkpoint.newest(run) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "the same command goes on" in said.strip().splitlines()[-1] and "Traceback" not in said
    newest = checkpoint.newest(run)
    assert newest is not None and checkpoint.load(newest)["step"] == checkpoint.step_of(newest)
