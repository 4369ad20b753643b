"""A trained backbone as files that other tools load without dino_sd."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_sd.distributed import is_main
from dino_sd.errors import UserError
from dino_sd.loading import load_model, shallow
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import Classifier
from dino_sd.models.model import Model

TOLERANCE = 1e-5

# Runs in a fresh process that knows torch, timm and safetensors only: argv = export folder, images, where features go,
# and whether it has a classifier.
RELOAD = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
assert not any(name.split(".")[0] == "dino_sd" for name in sys.modules)
found = {}
for what in ("features", "logits")[: 1 + (sys.argv[4] == "classifier")]:
    args = {"num_classes": 0} if what == "features" else {}
    model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, **args).eval()
    for name, images in load_file(sys.argv[2]).items():
        for fused in (False, True):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            with torch.inference_mode():
                found[f"{name} {what} fused={fused}"] = model(images).contiguous()
save_file(found, sys.argv[3])
"""


def export(
    spec: str | Path | Model,
    out: str | Path,
    format: str = "timm",
    network: str | None = None,
    exit: int | None = None,
) -> Path:
    """Writes a model's backbone into the folder `out`, reloads it in a fresh process and compares its features.

    format: "timm", a folder that `timm.create_model("local-dir:OUT", pretrained=True, num_classes=0)` loads; without
    num_classes=0 it classifies, where the model was trained with labels. network: "teacher" or "student" of a run,
    default the one that is its result. exit: the shallow network up to this block alone; its size, speed and accuracy
    are printed beside those of the whole. The folder appears as a whole or not at all. Prints the largest difference
    and how to load the export. Raises UserError where the model cannot be exported, features differ by more than 1e-5,
    or `out` holds anything but an earlier export.
    """
    if format != "timm":
        raise UserError(f"format={format}: this version exports format=timm only")
    out = Path(out)
    if not is_main():
        return out
    check_replaceable(out)
    whole = spec if isinstance(spec, Model) else load_model(spec, network=network)
    model = whole if exit is None else shallow(whole, exit)
    if not isinstance(model.backbone, Backbone) or model.size is None:
        raise UserError(f"MODEL {spec}: raw pixels have no weights to export")
    if exit is not None and not isinstance(model.backbone.model, VisionTransformer):
        raise UserError(f"exit={exit}: timm builds a part of plain ViTs only, model={model.backbone.name} is none")
    for note in model.notes:
        print(f"{model.description}: {note}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
    try:
        write_timm(folder, model.backbone, model)
        differences = verify(folder, model.backbone.cpu(), model.size, classifier_of(model))
        largest = max(differences.values())
        if not largest <= TOLERANCE:
            raise UserError(
                f"export: reloaded by timm, features differ by {largest:.1e} (allowed: {TOLERANCE:.0e}) for "
                f"{max(differences, key=lambda name: differences[name])}; nothing was written to {out}"
            )
        replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = ", ".join(dict.fromkeys(name.split(" ")[0] for name in differences))
    print(f"exported {model.description} to {out}")
    print(f"reloaded in a fresh process without dino_sd: largest difference of features {largest:.1e} ({sizes} pixels)")
    if exit is not None:
        compare_with_whole(model, whole, exit)
    print(loading_lines(out, len(model.classes or ()) if classifier_of(model) is not None else 0))
    return out


def classifier_of(model: Model) -> Classifier | None:
    """The classifier that timm can hold: one linear layer behind the pooled output."""
    head = model.heads.get("classifier")
    assert isinstance(model.backbone, Backbone)
    known = isinstance(model.backbone.model.pretrained_cfg.get("classifier"), str)
    return head if isinstance(head, Classifier) and model.classes and known else None


def compare_with_whole(part: Model, whole: Model, exit: int) -> None:
    """Prints what stopping early saves, timed in turns on this machine, and what it costs by the run's evaluation."""
    assert isinstance(part.backbone, Backbone) and isinstance(whole.backbone, Backbone) and part.size is not None
    speeds = in_turns([whole.backbone.eval(), part.backbone.eval()], part.size)
    table = Table()
    for column in ("network", "blocks", "parameters", "images/s", "x", "top-1 %"):
        table.add_column(column, justify="left" if column == "network" else "right")
    scores = whole.provenance.get("scores") or {}
    for name, model, speed, score in (
        ("whole", whole.backbone, speeds[0], scores.get("accuracy")),
        (f"exit {exit}", part.backbone, speeds[1], scores.get(f"exit_{exit}/accuracy")),
    ):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        table.add_row(
            name, str(len(model.widths)), f"{parameters / 1e6:.2f}M", f"{speed:.0f}", f"{speed / speeds[0]:.2f}",
            "" if score is None else f"{score:.2f}",
        )  # fmt: skip
    Console(markup=False, highlight=False).print(table)


@torch.inference_mode()
def in_turns(backbones: list[Backbone], size: tuple[int, int], batch: int = 32, rounds: int = 7) -> list[float]:
    """Images per second of each, on the CPU: the median of rounds in which they take turns."""
    images = torch.zeros(batch, backbones[0].channels, *size)
    seconds: list[list[float]] = [[] for _ in backbones]
    for turn in range(rounds + 1):
        for taken, backbone in zip(seconds, backbones, strict=True):
            began = time.perf_counter()
            backbone.pooled(images)
            if turn:  # the first warms up
                taken.append(time.perf_counter() - began)
    return [batch / statistics.median(taken) for taken in seconds]


def write_timm(folder: Path, backbone: Backbone, model: Model) -> None:
    """config.json and model.safetensors in timm's format. What timm does not know stands under "dino_sd"."""
    assert model.size is not None
    state, classifier, name = (
        backbone.model.state_dict(),
        classifier_of(model),
        backbone.model.pretrained_cfg.get("classifier"),
    )
    if classifier is not None:
        state |= {f"{name}.{key}": value for key, value in classifier.state_dict().items()}
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    classes = len(model.classes or ()) if classifier is not None else 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args = model_args(backbone)
    config = {
        "architecture": backbone.name.split(".")[0],
        "num_classes": classes,
        "num_features": backbone.width,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [backbone.channels, *model.size],
            "fixed_input_size": "img_size" in args and not args.get("dynamic_img_size", False),
            "mean": model.mean, "std": model.std, "interpolation": "bicubic",
            "crop_pct": model.crop, "crop_mode": "center",
            "num_classes": classes, "classifier": name,
            "first_conv": backbone.model.pretrained_cfg.get("first_conv"),
        },
        **({"label_names": model.classes} if classes else {}),
        "dino_sd": model.provenance,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def model_args(backbone: Backbone) -> dict[str, Any]:
    """What timm has to be told to build this very network; drop path and the like are training's."""
    args = {key: value for key, value in backbone.model_args.items() if not key.startswith("drop")}
    args["in_chans"] = backbone.channels
    if getattr(backbone.model, "dynamic_img_size", False):
        args |= {"img_size": list(backbone.size), "dynamic_img_size": True}
    elif getattr(getattr(backbone.model, "patch_embed", None), "img_size", None) is not None:
        args["img_size"] = list(backbone.size)
    return args


def verify(
    folder: Path, backbone: Backbone, size: tuple[int, int], classifier: nn.Module | None = None
) -> dict[str, float]:
    """{"HxW features fused=B": largest absolute difference} here and in a fresh process that reloads the folder.

    With a classifier, its logits too.

    At the model's size and, where it takes another one, at that too. Raises UserError when the reload fails.
    """
    images, expected = {}, {}
    step = 2 * backbone.patch_size if backbone.patch_size else 32
    for height, width in (size, (size[0] + step, size[1] + step)):
        name = f"{height}x{width}"
        generator = np.random.Generator(np.random.Philox(height))
        images_NCHW = torch.from_numpy(generator.normal(size=(2, backbone.channels, height, width))).float()
        try:
            found = {fused: features(backbone, images_NCHW, fused) for fused in (False, True)}
            expected |= {f"{name} features fused={fused}": features_ND for fused, features_ND in found.items()}
            if classifier is not None:
                expected |= {f"{name} logits fused={fused}": classifier.cpu()(found[fused]) for fused in found}
        except (RuntimeError, AssertionError, ValueError):
            if images:  # the second size: not every model takes more than one
                continue
            raise
        images[name] = images_NCHW
    with tempfile.TemporaryDirectory() as scratch:
        given, answered = Path(scratch) / "images.safetensors", Path(scratch) / "features.safetensors"
        save_file(images, given)
        command = [sys.executable, "-c", RELOAD, str(folder.resolve()), str(given), str(answered),
                   "classifier" if classifier is not None else "features"]  # fmt: skip
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"export: timm cannot load what was written for model={backbone.name}: {last}")
        found = load_file(answered)
    return {name: difference(features_ND, found[name]) for name, features_ND in expected.items()}


@torch.inference_mode()
def features(backbone: Backbone, images_NCHW: Tensor, fused: bool) -> Tensor:
    backbone.eval().use_fused_attention(fused)
    return backbone(images_NCHW).pooled_ND


def difference(expected_ND: Tensor, found_ND: Tensor) -> float:
    """Largest absolute difference; infinite for another shape, and not a number where a feature is none."""
    return float((expected_ND - found_ND).abs().max()) if expected_ND.shape == found_ND.shape else float("inf")


def check_replaceable(out: Path) -> None:
    """Only an earlier export may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = "dino_sd" in json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"out={out} exists and is no export of dino_sd, so it is not replaced; choose another folder")


def replace(folder: Path, out: Path) -> None:
    """The finished folder takes its place; evaluations of an earlier export go with it: they judged other weights."""
    mask = os.umask(0)
    os.umask(mask)
    for path, mode in ((folder, 0o777), *((file, 0o666) for file in folder.iterdir())):
        path.chmod(mode & ~mask)  # temporary folders, and safetensors' files, are for their owner alone
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
        os.replace(out, old)
        os.replace(folder, out)
        shutil.rmtree(old)
    else:
        os.replace(folder, out)


def loading_lines(out: Path, classes: int = 0) -> str:
    note = f"  # without num_classes=0: the {classes} classes" if classes else ""
    return (
        f"import timm\n"
        f'model = timm.create_model("local-dir:{out}", pretrained=True, num_classes=0).eval(){note}\n'
        f"transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )
