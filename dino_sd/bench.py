"""`dino-sd bench step`: a training step of this code beside one written as the published code does it.

Every variant runs in a process of its own, so that its peak memory is its own; data is random and on the device.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dino_sd import build, recipe
from dino_sd.allocator import return_free_memory, reuse_freed_memory
from dino_sd.config import Config
from dino_sd.distributed import pick_device
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.optim import clip_each_, make_optimizer, set_rates
from dino_sd.plan import probe
from dino_sd.speed import matmul_speed, synchronize

WARMUP = 3  # steps until memory has settled
LENGTH = build.Length(steps=1000, steps_per_epoch=100, batch_size=1)  # schedules are not what is measured


def variants(device: torch.device) -> dict[str, str]:
    """Variant -> what the table calls it."""
    named = {"published-fp32": "published code's step, float32", "ours-bf16": "dino_sd, bf16"}
    if device.type == "cuda":
        named = {
            "published-fp32": "published code's step, float32", "published-fp16": "published code's step, fp16",
            "ours-bf16": "dino_sd, bf16", "ours-compiled": "dino_sd, bf16, compiled",
        }  # fmt: skip
    return named


def bench_step(pairs: list[str], steps: int, markdown: Path | None) -> list[dict[str, Any]]:
    """Prints images/s (median), peak memory and model FLOP utilisation of every variant; returns the rows."""
    pairs = ["steps=1000", *pairs]
    cfg = recipe.load_config(recipe.recipes() / "bench.yaml", pairs)
    device = pick_device(cfg.device)
    flops, _ = probe(our_method(cfg, torch.device("cpu")), cfg)
    peaks = {name: matmul_speed(device, name) for name in ("fp32", "bf16", *(["fp16"] * (device.type == "cuda")))}
    rows, failures = [], []
    for variant, title in variants(device).items():
        try:
            row = in_own_process(variant, pairs, steps)
        except UserError as error:  # out of memory, say; the others still count
            failures.append(str(error))
            row = {"images_per_s": math.nan, "peak_bytes": math.nan}
        peak = peaks["bf16" if variant == "ours-compiled" else variant.split("-")[1]]
        rows.append({"variant": title, **row, "mfu": flops * row["images_per_s"] / peak})
    show(cfg, device, rows, peaks, markdown)
    if failures:
        raise UserError("; ".join(failures))
    return rows


def in_own_process(variant: str, pairs: list[str], steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "dino_sd.bench", variant, str(steps), *pairs]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench: {variant} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(cfg: Config, device: torch.device, rows: list[dict], peaks: dict[str, float], out: Path | None) -> None:
    first = rows[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    crops = " + ".join(f"{g.count}x{g.size[0]}" for g in build.view_spec(cfg).groups)
    title = f"{cfg.model}, {crops}, {cfg.terms['dino']['prototypes']:,} prototypes, batch {cfg.batch_size}: {name}"
    header = ["step", "images/s", "x", "peak memory", "MFU"]
    lines = [
        [row["variant"], f"{row['images_per_s']:.1f}", f"{row['images_per_s'] / first['images_per_s']:.2f}",
         f"{row['peak_bytes'] / 1e9:.2f} GB", f"{row['mfu']:.0%}"]
        for row in rows
    ]  # fmt: skip
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column)
    for line in lines:
        table.add_row(*line)
    speeds = ", ".join(f"{name} {speed / 1e12:.2f}" for name, speed in peaks.items())
    footnote = f"medians; torch {torch.__version__}; MFU against measured matmul TFLOP/s: {speeds}"
    Console(width=max(Console().width, 110), markup=False, emoji=False, highlight=False).print(table, footnote)
    if out is not None:
        with open(out, "a") as file:
            file.write(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n")
            file.writelines(f"| {' | '.join(line)} |\n" for line in lines)
            file.write(f"\n{footnote}\n")


def our_method(cfg: Config, device: torch.device) -> Any:
    torch.manual_seed(0)
    return build.make_method(cfg, build.make_backbone(cfg, cfg.drop_path), LENGTH, device)


def our_step(cfg: Config, device: torch.device, groups: list[Tensor]) -> Callable[[], None]:
    """The body of train.py's loop, on the same crops every time."""
    method = our_method(cfg, device)
    optimizer = make_optimizer(cfg.optim.name, method.student)
    parameters = list(method.student.parameters())
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    def step() -> None:
        set_rates(optimizer, 1e-4, 0.04)
        with autocast:
            losses = method(groups, cfg.batch_size, None, 0.5)
        sum(losses.values()).backward()  # pyright: ignore
        clip_each_(parameters, cfg.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(0.5)

    return step


class PublishedHead(nn.Module):
    def __init__(self, width: int, prototypes: int):
        super().__init__()
        layers = [nn.Linear(width, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(256, prototypes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def published_step(cfg: Config, device: torch.device, groups: list[Tensor], half: bool) -> Callable[[], None]:
    """A step as facebookresearch/dino takes it: eager, plain attention, one loss term after the other, an optimizer
    and a teacher that walk the parameters one by one, and a look at the loss in every step."""
    torch.manual_seed(0)
    prototypes = cfg.terms["dino"]["prototypes"]

    def network(drop_path: float) -> nn.Module:
        size = build.view_spec(cfg).groups[0].size
        backbone = Backbone(cfg.model, size=size, channels=cfg.channels, drop_path=drop_path, model_args=cfg.model_args)
        backbone.use_fused_attention(False)
        return nn.ModuleDict({"backbone": backbone, "head": PublishedHead(backbone.width, prototypes)}).to(device)

    student, teacher = network(cfg.drop_path), network(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, foreach=False)
    scaler = torch.amp.GradScaler(device.type, enabled=half)  # pyright: ignore[reportPrivateImportUsage]
    center = torch.zeros(1, prototypes, device=device)

    def outputs(network: Any, crops: list[Tensor]) -> Tensor:
        return network["head"](torch.cat([network["backbone"](images).pooled_ND for images in crops]))

    def step() -> None:
        with torch.autocast(device.type, torch.float16, enabled=half):
            with torch.no_grad():
                targets = outputs(teacher, groups[:1])
            views = (outputs(student, groups) / 0.1).split(cfg.batch_size)
            probs = F.softmax((targets - center) / 0.04, dim=-1).detach().split(cfg.batch_size)
            terms = [
                torch.sum(-p * F.log_softmax(view, dim=-1), dim=-1).mean()
                for i, p in enumerate(probs)
                for j, view in enumerate(views)
                if i != j
            ]
            loss = torch.stack(terms).sum() / len(terms)
        center.mul_(0.9).add_(targets.float().mean(0, keepdim=True), alpha=0.1)
        loss.item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for parameter in student.parameters():
            if parameter.grad is not None:
                factor = cfg.optim.clip / (parameter.grad.norm(2) + 1e-6)  # pyright: ignore
                if factor < 1:
                    parameter.grad.mul_(factor)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.mul_(0.996).add_(theirs.detach(), alpha=0.004)

    return step


def measure(variant: str, steps: int, pairs: list[str]) -> dict[str, float]:
    """Runs in the child: seconds a step (median after WARMUP more) and peak bytes."""
    cfg = recipe.load_config(recipe.recipes() / "bench.yaml", pairs)
    device = pick_device(cfg.device)
    ours = variant.startswith("ours")
    if ours and device.type == "cpu":
        reuse_freed_memory()
    cfg = cfg.model_copy(update={"precision": "bf16", "compile": variant == "ours-compiled"})
    torch.set_float32_matmul_precision("highest" if device.type == "cpu" or "published" in variant else "high")
    groups = [
        torch.randn(group.count * cfg.batch_size, cfg.channels, *group.size, device=device)
        for group in build.view_spec(cfg).groups
    ]
    step = our_step(cfg, device, groups) if ours else published_step(cfg, device, groups, variant == "published-fp16")
    times = []
    for done in range(WARMUP + steps):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
        if ours and done == 0:
            return_free_memory()
    return {"images_per_s": cfg.batch_size / statistics.median(times[WARMUP:]), "peak_bytes": peak_bytes(device)}


def peak_bytes(device: torch.device) -> float:
    """Most memory so far: of the device, or of this process where the CPU is the device."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return math.nan
    import resource  # not on Windows

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
