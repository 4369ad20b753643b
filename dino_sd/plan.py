"""What a run would do and need, worked out on two blank images: no training, no writing."""

import weakref
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dino_sd import build, checkpoint
from dino_sd.config import Config
from dino_sd.data.source import name_of
from dino_sd.distributed import is_main, pick_device, world_size
from dino_sd.log import duration
from dino_sd.method import SelfDistillation
from dino_sd.run import labelled_share
from dino_sd.speed import matmul_speed
from dino_sd.validation import Validation

OPTIMIZER_STATES = {"adamw": 2, "sgd": 1, "lars": 1}
PROBED = 2  # images: one would not do for batch norm
USUAL_SHARE = 0.4  # of the matmul speed that a whole step reaches; `bench step` measures it


def plan(cfg: Config) -> None:
    """Prints the run's length, sizes, memory and compute. Settings, model, images and evaluation sets are checked."""
    device = pick_device(cfg.device)
    backbone = build.make_backbone(cfg, cfg.drop_path)
    source = build.open_data(cfg, decoded=False)
    length = build.length_of(cfg, source.epoch_images())
    data = {"classes": source.classes, "labelled": labelled_share(source), "mean": cfg.views.mean, "std": cfg.views.std}
    method = build.make_method(cfg.model_copy(update={"compile": False}), backbone, length, torch.device("cpu"), data)
    build.make_schedule(cfg.optim.weight_decay, length, "optim.weight_decay")
    build.make_mix(cfg, build.view_spec(cfg, method.wants_clean), data)
    Validation(cfg, method, device, data)
    flops, activations = probe(method, cfg)
    micro = cfg.batch_size // (cfg.accumulate * world_size())
    parameters = sum(p.numel() for p in method.student.parameters())
    saved = (1 + OPTIMIZER_STATES[cfg.optim.name]) * 4 * parameters + 4 * sum(
        p.numel() for p in method.teacher.parameters()
    )
    states = saved + 4 * parameters  # student, optimizer and teacher, and the gradients
    images = length.steps * cfg.batch_size
    speed = matmul_speed(device, cfg.precision)
    seconds = flops * images / (speed * world_size() * USUAL_SHARE)
    newest = checkpoint.newest(Path(cfg.out))
    crops = [f"{g.count} x {g.size[0]}x{g.size[1]}" for g in build.view_spec(cfg, method.wants_clean).groups]
    peak = cfg.optim.lr * cfg.batch_size / 256
    rows = [
        ("model", f"{cfg.model}: backbone {count(sum(p.numel() for p in backbone.parameters()))} parameters, "
                  f"heads {count(parameters - sum(p.numel() for p in backbone.parameters()))}"),
        ("data", f"{cfg.data}: {len(source):,} images, "
                 + (f"{len(source.classes)} classes, {data['labelled']:.0%} labelled" if source.classes
                    else "no labels")),
        ("views", f"{' + '.join(crops)} an image, {cfg.channels} channel(s) of {name_of(source.dtype)}"
                  + (f"; without RGB no {dropped}" if (dropped := build.view_spec(cfg).dropped) else "")),
        ("length", f"{length.steps:,} steps of {cfg.batch_size} = {images:,} images = "
                   f"{length.steps / length.steps_per_epoch:.4g} epochs of {length.steps_per_epoch:,} steps"),
        ("each rank", f"{world_size()} rank(s) x {cfg.accumulate} part(s) of {micro} images, {cfg.precision}, "
                      f"{device.type}"),
        ("learning rate", f"0 to {peak:.3g} (= {cfg.optim.lr:g} x {cfg.batch_size} / 256) in "
                          f"{length.of(cfg.optim.warmup):,} steps, then to {cfg.optim.min_lr:g}"),
        ("checkpoints", f"every {max(length.of(cfg.checkpoint.every), 1):,} steps, newest {cfg.checkpoint.keep} kept, "
                        f"{size(saved)} each, in {cfg.out}"),
        ("memory", f"{size(states)} weights and optimizer + {size(activations * micro)} activations a rank (estimate)"),
        ("compute", f"{flops / 1e9:,.1f} GFLOP an image, {flops * images / 1e15:,.3g} PFLOP in all"),
        ("time", f"about {duration(seconds)} on {world_size()} x this {device.type} at {USUAL_SHARE:.0%} of its "
                 f"measured {speed / 1e12:.3g} TFLOP/s (a guess; `dino-sd bench step` measures)"),
        ("out", f"{cfg.out}: " + (f"goes on from {newest.name}" if newest else "new")),
    ]  # fmt: skip
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    if is_main():
        Console(width=max(Console().width, 110), markup=False, emoji=False, highlight=False).print(table)


def probe(method: SelfDistillation, cfg: Config) -> tuple[float, float]:
    """(FLOPs of forward and backward, bytes kept for the backward) of one image: what two more of them add to two."""
    (flops, kept), (more_flops, more_kept) = (_probe(method, cfg, images) for images in (PROBED, 2 * PROBED))
    return (more_flops - flops) / PROBED, (more_kept - kept) / PROBED


def _probe(method: SelfDistillation, cfg: Config, images: int) -> tuple[float, float]:
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # What checkpointed parts hold on to is no saved tensor; it lives as the output of the layer before them.
    outputs: list[weakref.ref] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output)))
        for module in method.student.modules()
        if isinstance(module, nn.Linear)
    ]
    groups = [
        torch.randn(images * group.count, cfg.channels, *group.size, generator=torch.Generator().manual_seed(0))
        for group in build.view_spec(cfg, method.wants_clean).groups
    ]
    if cfg.precision == "fp64":
        groups = [crops.double() for crops in groups]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16")
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            losses: dict[str, Any] = method(groups, images, torch.zeros(images, dtype=torch.long), 0.0)
        for output in outputs:
            if (tensor := output()) is not None:
                keep(tensor)
        sum(losses.values()).backward()  # pyright: ignore
    for hook in hooks:
        hook.remove()
    method.zero_grad(set_to_none=True)
    return counter.get_total_flops(), sum(kept.values())


def count(number: float) -> str:
    return f"{number / 1e6:.1f}M"


def size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 2**29 else f"{bytes_ / 2**20:.0f} MiB"
