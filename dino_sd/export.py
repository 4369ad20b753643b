"""A trained backbone as files that other tools load without dino_sd."""

import copy
import importlib
import json
import os
import pkgutil
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from dino_sd import __version__, card, exports
from dino_sd.checkpoint import digest
from dino_sd.distributed import is_main, say
from dino_sd.errors import UserError
from dino_sd.exported import Exported
from dino_sd.loading import load_model, shallow
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model
from dino_sd.reloading import BATCHES, verify
from dino_sd.run import code_version
from dino_sd.tables import write_json

BESIDE = ("config.json", "README.md", "hubconf.py")  # of an export, and no weights


def export(
    spec: str | Path | Model,
    out: str | Path,
    format: str | Sequence[str] = "timm",
    network: str | None = None,
    exit: int | None = None,
    dynamic_size: bool = False,
    preprocess: bool = False,
) -> Path:
    """Writes a model's backbone into the folder `out`, reloads it in a fresh process and compares what it says.

    format: one or several of the files in dino_sd/exports: timm (transformers and torch.hub load it too), torchvision,
    onnx, pt2, safetensors. network: "teacher" or "student" of a run, default the one that is its result. exit: the
    shallow network up to this block alone; its size, speed and accuracy are printed beside those of the whole.
    dynamic_size, preprocess: of onnx and pt2: height and width are free; the graph takes uint8 pixels of the right size
    and does the rest. The folder appears as a whole or not at all. Prints the largest difference and how to load the
    export. Raises UserError where the model cannot be exported, outputs differ by more than 1e-5 (onnx: 1e-4), or
    `out` holds anything but an earlier export.
    """
    formats = {name: format_module(name) for name in ([format] if isinstance(format, str) else format)}
    for option, wanted in (("dynamic_size", dynamic_size), ("preprocess", preprocess)):
        if wanted and not any(module.GRAPH for module in formats.values()):
            raise UserError(f"{option}=true is for formats that hold a graph (onnx, pt2), not {', '.join(formats)}")
    out = Path(out).expanduser()
    if not is_main():
        return out
    check_replaceable(out)
    whole = spec if isinstance(spec, Model) else load_model(spec, network=network)
    model = whole if exit is None else shallow(whole, exit)
    if not isinstance(model.backbone, Backbone) or model.size is None:
        raise UserError(f"MODEL {spec}: raw pixels have no weights to export")
    for note in model.notes:
        say(f"{model.description}: {note}")
    exported = frozen(model, model.provenance.get("exit"), dynamic_size, preprocess)
    for module in formats.values():
        module.refuse(exported)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
        try:
            differences, notes = fill(folder, exported, formats, out)
            take_place(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    for note in notes:
        say(f"note: {note}")
    report(out, exported, formats, differences)
    if exit is not None:
        compare_with_whole(model, whole, exit)
    return out


def format_module(name: str) -> ModuleType:
    """The file in dino_sd/exports. Raises UserError where there is none."""
    known = [module.name for module in pkgutil.iter_modules(exports.__path__)]
    if name not in known:
        raise UserError(f"format={name}: expected one or several of {', '.join(known)}")
    return importlib.import_module(f"dino_sd.exports.{name}")


def frozen(model: Model, exit: int | None, dynamic_size: bool, preprocess: bool) -> Exported:
    """A copy on the CPU, in float32; a caller's model stays as it is."""
    backbone = copy.deepcopy(model.backbone).cpu().float().eval().requires_grad_(False)
    assert isinstance(backbone, Backbone)
    backbone.use_fused_attention(True)
    heads = {name: copy.deepcopy(head).cpu().float().eval().requires_grad_(False) for name, head in model.heads.items()}
    return Exported(replace(model, backbone=backbone, heads=heads), exit, dynamic_size, preprocess)


def fill(
    folder: Path, exported: Exported, formats: dict[str, ModuleType], out: Path
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Writes every format into the folder and checks each. Returns ({format: differences}, what to say)."""
    code = {"dino_sd": __version__, "commit": code_version(), "torch": torch.__version__, "timm": timm.__version__}
    known, notes = card.provenance(exported, code)
    config = {**exported.config(), "dino_sd": known}
    write_json(folder / "config.json", config)
    for name, module in formats.items():
        say(f"export: writing format={name}")
        module.write(folder, exported)
    say("export: reading it back in a fresh process")
    differences, more = verify(folder, exported, formats)
    notes += more
    for name, module in formats.items():
        check_differences(name, differences[name], module.TOLERANCE, out)
    usages = [usage for module in formats.values() for usage in module.usages(exported)]
    weights = [path for path in sorted(folder.iterdir()) if path.name not in BESIDE]
    files = {path.name: (path.stat().st_size, digest(path)) for path in weights}
    known["sha256"] = {name: found for name, (_, found) in files.items()}
    known["formats"] = {
        name: {"largest_difference": max(found.values()), "allowed": formats[name].TOLERANCE}
        for name, found in differences.items()
    }
    write_json(folder / "config.json", config)
    (folder / "README.md").write_text(card.card(exported, known, usages, files, notes), encoding="utf-8")
    return differences, notes


def check_differences(name: str, differences: dict[str, float], allowed: float, out: Path) -> None:
    """Raises UserError where one is too large, or no number."""
    wrong = {what: found for what, found in differences.items() if not found <= allowed}
    if wrong:
        what, found = next(iter(wrong.items()))
        raise UserError(
            f"export: format={name}, reloaded: {what}: outputs differ by {found:.1e} (allowed: {allowed:.0e}); nothing "
            f"was written to {out}"
        )


def report(out: Path, exported: Exported, formats: dict[str, ModuleType], differences: dict[str, dict]) -> None:
    """Says what was written and found, and how to load it."""
    print(f"exported {exported.model.description} to {out}")
    for name, found in differences.items():
        parts = zip(*(key.split(", ") for key in found), strict=True)
        libraries, outputs, places, _ = (dict.fromkeys(part) for part in parts)
        print(
            f"reloaded in a fresh process without dino_sd, by {', '.join(libraries)}: largest difference of "
            f"{', '.join(outputs)} {max(found.values()):.1e} ({', '.join(places)} pixels, batches of "
            f"{' and '.join(map(str, BATCHES))})"
        )
        for usage in formats[name].usages(exported):
            print(f"\n# {usage.library}\n{usage.load}\n{usage.call}".replace("FOLDER", out.as_posix()))
    print(f"\nhow to prepare images, and all that is known of the weights: {out / 'README.md'}")


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


def check_replaceable(out: Path) -> None:
    """Only an earlier export may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = "dino_sd" in json.loads((out / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"out={out} exists and is no export of dino_sd, so it is not replaced; choose another folder")


def take_place(folder: Path, out: Path) -> None:
    """The finished folder takes its place; evaluations of an earlier export go with it: they judged other weights."""
    mask = os.umask(0)
    os.umask(mask)
    for path, mode in ((folder, 0o777), *((file, 0o666) for file in folder.iterdir())):
        path.chmod(mode & ~mask)  # temporary folders, and safetensors' files, are for their owner alone
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
        os.replace(out, old / out.name)  # into it: Windows puts no folder in the place of another
        os.replace(folder, out)
        shutil.rmtree(old)
    else:
        os.replace(folder, out)
