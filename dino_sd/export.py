"""A trained backbone as files that other tools load without dino_sd."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_sd.distributed import is_main
from dino_sd.errors import UserError
from dino_sd.load import Model, load_model
from dino_sd.models.backbone import Backbone

TOLERANCE = 1e-5

# Runs in a fresh process that knows torch, timm and safetensors only: argv = export folder, images, where features go.
RELOAD = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
assert not any(name.split(".")[0] == "dino_sd" for name in sys.modules)
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, num_classes=0).eval()
features = {}
for name, images in load_file(sys.argv[2]).items():
    for fused in (False, True):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        with torch.inference_mode():
            features[f"{name} fused={fused}"] = model(images).contiguous()
save_file(features, sys.argv[3])
"""


def export(spec: str | Path | Model, out: str | Path, format: str = "timm", network: str | None = None) -> Path:
    """Writes a model's backbone into the folder `out`, reloads it in a fresh process and compares its features.

    format: "timm", a folder that `timm.create_model("local-dir:OUT", pretrained=True, num_classes=0)` loads.
    network: "teacher" or "student" of a run, default the one that is its result. The folder appears as a whole or not
    at all. Prints the largest difference and how to load the export. Raises UserError where the model cannot be
    exported, features differ by more than 1e-5, or `out` holds anything but an earlier export.
    """
    if format != "timm":
        raise UserError(f"format={format}: this version exports format=timm only")
    out = Path(out)
    if not is_main():
        return out
    check_replaceable(out)
    model = spec if isinstance(spec, Model) else load_model(spec, network=network)
    if not isinstance(model.backbone, Backbone) or model.size is None:
        raise UserError(f"MODEL {spec}: raw pixels have no weights to export")
    for note in model.notes:
        print(f"{model.description}: {note}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
    try:
        write_timm(folder, model.backbone, model)
        differences = verify(folder, model.backbone.cpu(), model.size)
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
    print(loading_lines(out))
    return out


def write_timm(folder: Path, backbone: Backbone, model: Model) -> None:
    """config.json and model.safetensors in timm's format. What timm does not know stands under "dino_sd"."""
    assert model.size is not None
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in backbone.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args = model_args(backbone)
    config = {
        "architecture": backbone.name.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.width,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [backbone.channels, *model.size],
            "fixed_input_size": "img_size" in args and not args.get("dynamic_img_size", False),
            "mean": model.mean, "std": model.std, "interpolation": "bicubic",
            "crop_pct": model.crop, "crop_mode": "center",
            "num_classes": 0, "classifier": backbone.model.pretrained_cfg.get("classifier"),
            "first_conv": backbone.model.pretrained_cfg.get("first_conv"),
        },
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


def verify(folder: Path, backbone: Backbone, size: tuple[int, int]) -> dict[str, float]:
    """{"HxW fused=B": largest absolute difference} of features here and in a fresh process that reloads the folder.

    At the model's size and, where it takes another one, at that too. Raises UserError when the reload fails.
    """
    images, expected = {}, {}
    step = 2 * backbone.patch_size if backbone.patch_size else 32
    for height, width in (size, (size[0] + step, size[1] + step)):
        name = f"{height}x{width}"
        generator = np.random.Generator(np.random.Philox(height))
        images_NCHW = torch.from_numpy(generator.normal(size=(2, backbone.channels, height, width))).float()
        try:
            expected |= {f"{name} fused={fused}": features(backbone, images_NCHW, fused) for fused in (False, True)}
        except (RuntimeError, AssertionError, ValueError):
            if name not in expected and images:  # the second size: not every model takes more than one
                continue
            raise
        images[name] = images_NCHW
    with tempfile.TemporaryDirectory() as scratch:
        given, answered = Path(scratch) / "images.safetensors", Path(scratch) / "features.safetensors"
        save_file(images, given)
        command = [sys.executable, "-c", RELOAD, str(folder.resolve()), str(given), str(answered)]
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


def loading_lines(out: Path) -> str:
    return (
        f"import timm\n"
        f'model = timm.create_model("local-dir:{out}", pretrained=True, num_classes=0).eval()\n'
        f"transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )
