"""What only a CUDA device can show; tools/gpu_check.sh runs these."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, largest_difference, state_of

from dino_sd import build, checkpoint
from dino_sd.data.loader import Batches
from dino_sd.data.photometry import Photometry
from dino_sd.data.source import open_source
from dino_sd.optim import clip_each_, make_optimizer, set_rates
from dino_sd.train import Window, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTH = build.Length(steps=20, steps_per_epoch=10, batch_size=16)


def views(cfg, device: str) -> list[torch.Tensor]:
    spec = build.view_spec(cfg)
    batch = next(iter(Batches(open_source(cfg.data, cfg.channels), spec, seed=0, batch_size=16, total_steps=1)))
    photometry = Photometry(spec, [0.3], [0.3])
    return [photometry(crops.to(device), rows) for crops, rows in zip(batch.groups, batch.rows, strict=True)]


def method_on(cfg, device: str):
    torch.manual_seed(0)
    return build.make_method(cfg, build.make_backbone(cfg), LENGTH, torch.device(device))


def step(cfg, device: str, groups: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(loss, all gradients of the student in one vector) of the first step."""
    method = method_on(cfg, device)
    with torch.autocast(device, torch.bfloat16, enabled=cfg.precision == "bf16"):
        loss = method([crops.to(device) for crops in groups], 16, None, 0.5)["dino"]
    loss.backward()
    grads = [p.grad.flatten().cpu() for p in method.student.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def test_photometry_is_the_cpus(tiny, tmp_path: Path):
    cfg = tiny(tmp_path)
    for ours, theirs in zip(views(cfg, "cuda"), views(cfg, "cpu"), strict=True):
        assert torch.allclose(ours.cpu(), theirs, atol=1e-4)


def test_step_is_the_cpus(tiny, tmp_path: Path):
    """float32 to rounding; bf16 (8 bits, 2 blocks) to 2% of the loss and nearly the same direction."""
    torch.set_float32_matmul_precision("highest")
    cfg = tiny(tmp_path, drop_path=0.0)
    groups = views(cfg, "cpu")
    loss, gradient = step(cfg, "cpu", groups)
    loss_32, gradient_32 = step(cfg, "cuda", groups)
    assert loss_32 == pytest.approx(loss, rel=1e-4)
    assert torch.allclose(gradient_32, gradient, atol=1e-3 * float(gradient.abs().max()))
    loss_16, gradient_16 = step(tiny(tmp_path, drop_path=0.0, precision="bf16"), "cuda", groups)
    assert loss_16 == pytest.approx(loss, rel=2e-2)
    assert torch.cosine_similarity(gradient_16, gradient, dim=0) > 0.98


def test_compiled_step_is_the_eager_one(tiny, tmp_path: Path):
    groups = views(tiny(tmp_path), "cpu")
    eager, _ = step(tiny(tmp_path, drop_path=0.0, precision="bf16"), "cuda", groups)
    compiled, _ = step(tiny(tmp_path, drop_path=0.0, precision="bf16", compile="true"), "cuda", groups)
    assert compiled == pytest.approx(eager, rel=2e-2)


def test_resume(tiny, tmp_path: Path):
    """To 1e-5: sums over a batch may be taken in another order on a GPU."""
    straight = train(tiny(tmp_path / "a", device="cuda"))
    run = tmp_path / "b"
    train(tiny(run, device="cuda", checkpoint__keep=9))
    for path in checkpoint.all_of(run)[:2]:
        path.unlink()
    again = train(tiny(run, device="cuda", checkpoint__keep=9))
    assert largest_difference(straight, again) < 1e-5
    assert state_of(again).keys() == state_of(straight).keys()


def test_nccl(tiny, tmp_path: Path):
    """As many ranks as there are devices, two at the most; one rank still goes through DDP and nccl."""
    code = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "tests")
import test_gpu
from dino_sd import build
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
cfg = build.load_config(sys.argv[1], ["drop_path=0.0"])
groups = [crops.cuda() for crops in test_gpu.views(cfg, "cpu")]
plain, wrapped = test_gpu.method_on(cfg, "cuda"), test_gpu.method_on(cfg, "cuda")
model = DistributedDataParallel(wrapped, [0], broadcast_buffers=False, gradient_as_bucket_view=True)
for method in (plain, model):
    method(groups, 16, None, 0.5)["dino"].backward()
for ours, theirs in zip(wrapped.student.parameters(), plain.student.parameters()):
    assert ours.grad is None and theirs.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-5)
wrapped.after_step(0.5)
dist.destroy_process_group()
"""
    import yaml
    from conftest import TINY

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "nccl.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, str(tmp_path / "nccl.py"), str(tmp_path / "tiny.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_step_waits_for_the_device(tiny, tmp_path: Path):
    """The body of the loop, with every host sync an error."""
    cfg = tiny(tmp_path, precision="bf16")
    method, groups = method_on(cfg, "cuda"), views(cfg, "cuda")
    optimizer, parameters, window = make_optimizer("adamw", method.student), list(method.student.parameters()), Window()

    def body() -> None:
        set_rates(optimizer, 1e-4, 0.04)
        with torch.autocast("cuda", torch.bfloat16):
            loss = method(groups, 16, None, 0.0)["dino"]
        loss.backward()
        window.add({"loss": loss, **method.signs, "gradient_norm": clip_each_(parameters, 3.0)})
        for parameter in method.frozen_parameters(0.0):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(0.0)

    body()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        body()
    finally:
        torch.cuda.set_sync_debug_mode("default")
