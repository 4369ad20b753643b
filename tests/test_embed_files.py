"""Features of whole sets in files: what is in them, and that a kill, other ranks and a second run change no byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dino_sd.config import Config
from dino_sd.data.source import open_source
from dino_sd.embed import embed, pooled
from dino_sd.embed_files import embed_files
from dino_sd.errors import UserError
from dino_sd.evaluator_config import EmbedSettings
from dino_sd.loading import load_model
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model
from dino_sd.settings import parse
from dino_sd.train import train

IMAGES = 103
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embed") / "run"
    train(parse(Config, TINY | {"steps": 1, "out": str(out), "batch_size": 4, "checkpoint": {"every": 1.0}}))
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; image 7, and all of what is the third chunk of 20, cannot be read."""
    root = tmp_path_factory.mktemp("images") / "set"
    generator = np.random.Generator(np.random.Philox(0))
    for index in range(IMAGES):
        place = root / ("fox" if index < 60 else "öl") / f"{index:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (28, 28)).astype(np.uint8)).save(place)
        if index == 7 or 40 <= index < 60:
            place.write_bytes(b"no image")
    return root


READABLE = [index for index in range(IMAGES) if index != 7 and not 40 <= index < 60]


def settings(out: Path, **own: Any) -> EmbedSettings:
    return parse(EmbedSettings, {"out": str(out), "device": "cpu", "workers": 0, "batch_size": 10, "chunk": 20} | own)


def test_what_is_in_the_file(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = embed_files(run, str(images), settings(tmp_path / "f.npz"))
    assert "21 image(s) of" in capsys.readouterr().err
    with np.load(out) as found:  # allow_pickle is off
        assert {*found.files} == {"features", "index", "label", "path", "classes"}
        assert found["index"].tolist() == READABLE and found["classes"].tolist() == ["fox", "öl"]
        assert found["label"].tolist() == [int(index >= 60) for index in READABLE]
        source = open_source(str(images), 1)
        assert found["path"].tolist() == [source.path(index) for index in READABLE]
        model = load_model(run)
        assert model.size is not None
        how: dict[str, Any] = {"size": model.size, "crop": model.crop, "mean": model.mean, "std": model.std}
        expected, _ = embed(model.backbone, source, device="cpu", batch_size=10, **how)
        torch.testing.assert_close(torch.from_numpy(found["features"]), expected, rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def of(model: Model, layers: list[int], pool: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: pooled(model.backbone(images, layers), pool)


def test_layers_pooling_and_patches(run: Path, images: Path, tmp_path: Path):
    model, few = load_model(run), str(images / "öl")
    source = open_source(few, 1)
    assert model.size is not None
    how: dict[str, Any] = {"size": model.size, "crop": model.crop, "mean": model.mean, "std": model.std}
    for layers, pool in (([0, -1], "cls"), ([1], "cls+mean"), ([], "mean")):
        out = embed_files(run, few, settings(tmp_path / "f.npz", layers=layers, pool=pool))
        expected, _ = embed(model.backbone, source, device="cpu", of=of(model, layers, pool), **how)
        torch.testing.assert_close(torch.from_numpy(np.load(out)["features"]), expected, rtol=1e-5, atol=1e-5)
    out = embed_files(run, few, settings(tmp_path / "f.npz", tokens="patch", layers=[0]))
    patches = np.load(out)["features"]
    assert patches.shape == (43, 16, 32)
    means, _ = embed(model.backbone, source, device="cpu", of=of(model, [0], "mean"), **how)
    torch.testing.assert_close(torch.from_numpy(patches.mean(1)), means, rtol=1e-5, atol=1e-5)
    flat = embed_files("pixels", few, settings(tmp_path / "p.npz", channels=1))
    assert np.load(flat)["features"].shape == (43, 28 * 28)


def test_registers(images: Path, tmp_path: Path):
    args = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 1, "reg_tokens": 3}
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", size=(28, 28), channels=1, model_args=args).eval()
    model = Model(backbone, (28, 28), 1.0, [0.5], [0.5], "a ViT with registers", {})
    source, few = open_source(str(images / "öl"), 1), str(images / "öl")
    normalised = torch.stack([source.image(index) for index in range(len(source))]) / 127.5 - 1
    for layers in ([], [0]):
        found = np.load(embed_files(model, few, settings(tmp_path / "r.npz", tokens="register", layers=layers)))
        expected = model.features(normalised, layers=layers or None, tokens="register")
        expected = expected[0] if layers else expected
        assert expected.shape == (43, 3, 32)
        torch.testing.assert_close(torch.from_numpy(found["features"]), expected, rtol=1e-5, atol=1e-5)


def test_parquet(run: Path, images: Path, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = embed_files(run, str(images), settings(tmp_path / "f.parquet"))
    rows = parquet.read_table(out)
    plain = np.load(embed_files(run, str(images), settings(tmp_path / "f.npz")))
    assert np.array_equal(np.array(rows["features"].to_pylist(), np.float32), plain["features"])
    for name in ("path", "index", "label"):
        assert rows[name].to_pylist() == plain[name].tolist()
    first = out.read_bytes()
    assert embed_files(run, str(images), settings(tmp_path / "f.parquet")).read_bytes() == first


def test_chunks_that_lie_there_are_used_and_change_nothing(run: Path, images: Path, tmp_path: Path, monkeypatch):
    import dino_sd.embed_files as module

    whole = embed_files(run, str(images), settings(tmp_path / "whole.npz")).read_bytes()
    saved: list[Path] = []

    def save_until(last: float) -> None:
        saved.clear()

        def save(tensors: Any, path: Path) -> None:
            if len(saved) == last:
                raise KeyboardInterrupt
            save_file(tensors, path)
            saved.append(path)

        monkeypatch.setattr(module, "save_file", save)

    for stop_after in (1, 2, 4):
        out = tmp_path / f"cut_{stop_after}.npz"
        save_until(stop_after)
        with pytest.raises(KeyboardInterrupt):
            embed_files(run, str(images), settings(out))
        (out.parent / f"{out.name}.parts" / "00000005.tmp").write_bytes(b"half")
        save_until(np.inf)
        assert embed_files(run, str(images), settings(out)).read_bytes() == whole
        assert len(saved) == 6 - stop_after
    kept = tmp_path / "other.npz.parts"
    kept.mkdir()
    (kept / "what.json").write_text('{"settings": "others"}')
    save_file({"features": torch.zeros(3, 32)}, kept / "00000000.safetensors")
    assert embed_files(run, str(images), settings(tmp_path / "other.npz")).read_bytes() == whole


def test_ranks_share_out_the_chunks(run: Path, images: Path, tmp_path: Path, monkeypatch):
    """As two processes would, one after the other: rank 0, who joins, comes last."""
    import dino_sd.embed_files as module

    whole = embed_files(run, str(images), settings(tmp_path / "whole.npz")).read_bytes()
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "rank", lambda: 1)
    with pytest.raises(UserError, match="00000000.safetensors cannot be read"):
        embed_files(run, str(images), settings(tmp_path / "two.npz"))
    parts = tmp_path / "two.npz.parts"
    assert sorted(path.stem for path in parts.glob("*.safetensors")) == ["00000001", "00000003", "00000005"]
    monkeypatch.setattr(module, "rank", lambda: 0)
    assert embed_files(run, str(images), settings(tmp_path / "two.npz")).read_bytes() == whole


def test_killed_and_run_again(run: Path, images: Path, tmp_path: Path):
    """SIGKILL once a few chunks are there, the same command again: the bytes of one pass."""
    data = tmp_path / "many.txt"
    data.write_text("".join(f"{images}/öl/{60 + i % 43:03d}.png\n" for i in range(1500)))
    whole = embed_files(run, str(data), settings(tmp_path / "whole.npz")).read_bytes()
    out = tmp_path / "killed.npz"
    arguments = ["embed", str(run), str(data), f"out={out}", "device=cpu", "workers=0", "batch_size=10", "chunk=20"]
    victim = subprocess.Popen(
        [sys.executable, "-m", "dino_sd", *arguments], cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    parts = tmp_path / "killed.npz.parts"
    while len([*parts.glob("*.safetensors")]) < 3 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not out.exists() and 3 <= len([*parts.glob("*.safetensors")]) < 75
    done = command(*arguments, env=ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out) and "going on with" in done.stderr
    assert out.read_bytes() == whole and not parts.exists()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"out": "f.csv"}, [".npz or .parquet"]),
        ({"layers": [2]}, ["layers=2", "2 blocks"]),
        ({"tokens": "register"}, ["tokens=register", "no register tokens"]),
        ({"out": "/proc/nowhere/f.npz"}, ["cannot be written"]),
    ],
)
def test_what_cannot_be_is_refused(own, words, run: Path, images: Path, tmp_path: Path):
    with pytest.raises(UserError) as error:
        embed_files(run, str(images / "öl"), settings(Path(own.pop("out", tmp_path / "f.npz")), **own))
    assert all(word in str(error.value) for word in words), error.value


def test_no_rank_waits_for_one_that_has_failed(run: Path, images: Path):
    """Under SLURM, where nothing stops the others: rank 0 alone makes the folder, and cannot."""
    ranks = []
    for rank in ("0", "1"):
        env = ENV | {
            "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": rank, "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()),
        }  # fmt: skip
        words = ["embed", str(run), str(images / "öl"), "out=/proc/nowhere/f.npz", "device=cpu", "workers=0"]
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "dino_sd", *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
            )
        )
    for process, said in zip(ranks, ("cannot be written", "rank 1 stops"), strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and said in err, err


def test_a_set_without_a_readable_image(run: Path, tmp_path: Path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image of .* can be read"):
        embed_files(run, str(tmp_path), settings(tmp_path / "f.npz"))
