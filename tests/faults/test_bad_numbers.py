"""Numbers that are not finite: skipped together, written down with their files, and never in a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from conftest import largest_difference, state_of

from dino_sd import checkpoint
from dino_sd.terms.dino import Dino, dino_loss
from dino_sd.train import train
from faults.conftest import finish, start

INJECT = """
import os
import torch
from dino_sd.data.photometry import Photometry
before, calls = Photometry.__call__, [0]
def call(self, crops, rows):
    views = before(self, crops, rows)
    if crops.shape[-1] == 28:  # once a step
        calls[0] += 1
        if os.environ.get("RANK", "0") == "RANK_OF_IT" and FIRST < calls[0] <= LAST:
            views[3] = float("nan")
    return views
Photometry.__call__ = call
"""


def inject(first: int, last: int, rank: int = 0) -> str:
    """NaN in one image of a rank's batch, in steps first <= step < last."""
    return INJECT.replace("RANK_OF_IT", str(rank)).replace("FIRST", str(first)).replace("LAST", str(last))


def anomalies(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "anomalies.jsonl").read_text().splitlines()]


def all_finite(path: Path) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in state_of(path).values() if tensor.is_floating_point())


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_one_bad_step(tiny_yaml: Path, tmp_path: Path, ranks: int, rank: int):
    run = tmp_path / "run"
    code, said = finish(start(tiny_yaml, run, ranks, inject(5, 6, rank)))
    assert code == 0, said
    (line,) = anomalies(run)
    (found,) = line["found"]
    assert line["step"] == 5 and found["rank"] == rank and found["terms"] == {"dino": "nan"}
    assert len(found["files"]) == 16 // ranks and all("fashion-mnist-mini:train[" in file for file in found["files"])
    assert f"step 5 is skipped: numbers that are not finite in rank {rank}: dino" in said
    assert all_finite(checkpoint.path_of(run, 20))
    lines = [json.loads(each) for each in (run / "metrics.jsonl").read_text().splitlines()]
    assert [each.get("skipped_steps") for each in lines] == [None, 1, 1, 1]
    assert all(each["loss"] == each["loss"] for each in lines)


def test_a_skipped_step_moves_nothing(tiny, tmp_path: Path, monkeypatch):
    """Weights, teacher, centre and optimizer after a run of one bad step are those of the start."""
    from dino_sd.data.photometry import Photometry

    before = Photometry.__call__
    torch.manual_seed(0)
    train(tiny(tmp_path / "good", steps=6, checkpoint__every="steps=5", checkpoint__keep=9))

    def call(self, crops, rows):
        return before(self, crops, rows) * float("nan")

    run = tmp_path / "bad"
    train(tiny(run, steps=6, checkpoint__every="steps=5", checkpoint__keep=9))
    checkpoint.path_of(run, 6).unlink()
    monkeypatch.setattr(Photometry, "__call__", call)
    train(tiny(run, steps=6, checkpoint__every="steps=5", checkpoint__keep=9))  # goes on at step 5, which is bad
    keys = (".student", ".teacher", ".terms", ".optimizer")
    assert largest_difference(checkpoint.path_of(run, 5), checkpoint.path_of(run, 6), keys) == 0
    assert len(anomalies(run)) == 1


def test_batch_norms_statistics_are_not_spoilt(tiny_yaml: Path, tmp_path: Path):
    run = tmp_path / "run"
    resnet = {"model": "resnet18", "model_args": "{channels: [8, 8, 16, 16]}", "views__global__size": 28}
    code, said = finish(start(tiny_yaml, run, 1, inject(5, 6), **resnet, views__local__size=16, steps=8))
    assert code == 0 and len(anomalies(run)) == 1, said
    assert all_finite(checkpoint.path_of(run, 8))


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_numbers_for_ever(tiny_yaml: Path, tmp_path: Path, ranks: int):
    """Back to the checkpoint once with half the rate, then exit 3; the last checkpoint is finite."""
    run = tmp_path / "run"
    code, said = finish(start(tiny_yaml, run, ranks, inject(8, 10**9, 0), most_skipped=3))
    assert (code == 3) if ranks == 1 else ("exitcode  : 3" in said and "exitcode  : 1 " not in said), said
    assert "going back to the newest checkpoint, with half the learning rate" in said
    assert "stopped: 3 steps in a row had numbers that are not finite" in said and "of 2 failed" not in said
    assert [line["step"] for line in anomalies(run)] == [8, 9, 10, 10, 11, 12]
    newest = checkpoint.newest(run)
    assert newest is not None and checkpoint.step_of(newest) == 10 and all_finite(newest)


def test_the_lowered_rate_is_kept(tiny_yaml: Path, tmp_path: Path):
    run = tmp_path / "run"
    code, said = finish(start(tiny_yaml, run, 1, inject(8, 11), most_skipped=3))
    assert code == 0, said
    assert checkpoint.load(checkpoint.path_of(run, 20))["slowed"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_extreme_outputs_are_finite(dtype: torch.dtype):
    """Batch 1, identical images, logits of 1e4 (as far as the type goes)."""
    for batch in (1, 4):
        for scale in (0.0, 1.0, 1e4):
            logits = (torch.randn(4, batch, 32).sign() * scale).to(dtype).float().requires_grad_()
            probs = torch.softmax((logits[:2].detach() - 1e4) / 0.04, -1)
            loss = dino_loss(logits, probs)
            loss.backward()
            assert torch.isfinite(loss) and logits.grad is not None and torch.isfinite(logits.grad).all()
    assert Dino.anchor


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_black_and_identical_images_train(tiny, tmp_path: Path, precision: str):
    from PIL import Image

    for index in range(8):
        Image.new("L", (28, 28), 0).save(tmp_path / f"{index}.png")
    for batch in (1, 4):
        run = tmp_path / f"run{batch}"
        saved = train(tiny(run, data=tmp_path, batch_size=batch, steps=3, precision=precision, log__every=1))
        assert all_finite(saved) and not (run / "anomalies.jsonl").exists()
