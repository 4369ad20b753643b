"""The page that goes with an export: what it is, what it learned from, how good it was found, how to load it."""

import json
import math
from pathlib import Path
from typing import Any

from dino_sd.exported import Exported, Usage
from dino_sd.models.model import Model

ABOUT_RUN = ("dino_sd", "commit", "torch", "torchvision", "timm", "python", "ranks", "device")
OF_EVALUATION = ("evaluator", "results", "classes", "train", "test", "images", "settings", "versions")
OWN = ("preprocessing", "sha256", "formats", "position_resize", "evaluations")  # of one export, not of the weights


def provenance(exported: Exported, code: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(what is known of the weights, as plain values; what to say of it). code: that which exports."""
    model = exported.model
    known = {key: value for key, value in model.provenance.items() if key not in OWN}
    found, notes = evaluations_of(model)
    if found:
        known["evaluations"] = found
    environment = _read(model.folder / "environment.json") if model.folder is not None else None
    if environment is not None:
        known["trained_by"] = {key: environment[key] for key in ABOUT_RUN if environment.get(key) is not None}
    known |= {"exported_by": code, "preprocessing": exported.preprocessing()}
    if exported.stages is not None:
        known["stages"] = exported.stages
    if (way := getattr(exported.backbone, "position_resize", "timm")) != "timm":
        known["position_resize"] = way
        notes.append(
            f"positions of this model are resized in the way of {way}; other libraries resize them in timm's: at "
            f"{_pixels(exported.backbone.size)} they agree, at other sizes their features differ slightly"
        )
    return known, notes


def evaluations_of(model: Model) -> tuple[dict[str, Any], list[str]]:
    """({file name: report without what the export says anyway} of these very weights, which others were left out)."""
    found: dict[str, Any] = {}
    notes, weights = [], model.weights
    for path in sorted(model.folder.glob("evaluations/*.json")) if model.folder is not None else ():
        report = _read(path)
        if report is None or not isinstance(report.get("results"), list):
            continue
        if report.get("weights") == weights:
            found[path.stem] = {key: report[key] for key in OF_EVALUATION if key in report}
        else:
            notes.append(f"{path} judged other weights than these (another step, network or exit): left out")
    return found or dict(model.provenance.get("evaluations") or {}), notes


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def card(
    exported: Exported, known: dict[str, Any], usages: list[Usage], files: dict[str, tuple[int, str]], notes: list[str]
) -> str:
    """README.md, in Markdown. known: from `provenance`. files: {name: (bytes, SHA-256)} of the weights."""
    backbone, model = exported.backbone, exported.model
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    part = "" if exported.exit is None else f", its first {exported.exit} blocks (or stages) alone"
    lines = [
        f"# {backbone.architecture}{part}", "",
        f"An image backbone: {parameters / 1e6:.2f} M parameters, {model.channels} channel(s), "
        f"{_pixels(exported.size)}, features of width {backbone.width}"
        + (f", {exported.classes} classes" if exported.classes else "") + ".",
        "", "## Trained", "", *trained(known), "", "## How good", "", *judged(known), "",
        "## Images", "", *images(exported), "", "## Load it", "",
        "FOLDER is this folder. `features` are (N, D), as they come: of length 1 once they are divided by their norm. "
        "`patches` are (N, P, D)" + (", `logits` (N, classes)." if exported.head is not None else "."),
    ]  # fmt: skip
    for usage in usages:
        lines += ["", f"With {usage.library}:", "", "```python", usage.load, usage.call, "```"]
    lines += ["", *(f"Note: {note}." for note in notes)] if notes else []
    lines += ["", "## Files", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
    lines += [f"| {name} | {size:,} | `{digest}` |" for name, (size, digest) in files.items()]
    lines += ["", "All that is known of the weights, with every setting, is in config.json under `dino_sd`."]
    lines += ["", "## Licence", "", "The weights are yours: say here under which licence you give them away.", ""]
    return "\n".join(lines)


def trained(known: dict[str, Any]) -> list[str]:
    config, data = known.get("config") or {}, known.get("data") or {}
    if not config:
        origin = known.get("model") or known.get("checkpoint") or known.get("export")
        return [f"Not with this program, or it is not known how. Weights: {origin or 'unknown'}."]
    source = config.get("data")
    names = source.get("source") if isinstance(source, dict) else source
    names = ", ".join(map(str, names)) if isinstance(names, list) else names
    terms = ", ".join(config.get("terms") or {})
    by = known.get("trained_by") or {}
    lines = [
        f"- on {data.get('images', '?')} images of {names} (fingerprint `{data.get('fingerprint')}`)",
        f"- {known.get('step')} of {known.get('steps')} steps of {config.get('batch_size', '?')} images; "
        f"loss: {terms}; this is the {known.get('network')}",
    ]
    if by:
        lines.append("- by " + ", ".join(f"{key} {value}" for key, value in by.items()))
    code = known.get("exported_by") or {}
    lines.append("- exported by " + ", ".join(f"{key} {value}" for key, value in code.items() if value is not None))
    return lines


def judged(known: dict[str, Any]) -> list[str]:
    """A row for each result, and the scores that were measured while training."""
    rows = []
    for report in (known.get("evaluations") or {}).values():
        roles = (("train", "learned from"), ("test", "judged on"))
        sets = [f"{role}: {_set(report[key])}" for key, role in roles if report.get(key)]
        for result in report["results"]:
            rows.append(f"| {report.get('evaluator')} | {_values(result)} | {'; '.join(sets)} | {_settings(report)} |")
    lines = ["| evaluator | result (top: %) | images | how |", "|---|---|---|---|", *rows] if rows else []
    scores = {key: value for key, value in (known.get("scores") or {}).items() if isinstance(value, (int, float))}
    if scores:
        lines += [""] if lines else []
        lines.append(f"Measured while training, at its last evaluation: {_values(scores)}.")
    return lines or ["It was not evaluated before it was exported."]


def _set(described: dict[str, Any]) -> str:
    return f"{described.get('images', '?')} of {described.get('data')} (`{described.get('fingerprint')}`)"


def _settings(report: dict[str, Any]) -> str:
    shown = ("k", "temperature", "epochs", "pool", "blocks", "batch_size", "precision", "seed")
    settings = report.get("settings") or {}
    return _values({key: settings[key] for key in shown if settings.get(key) is not None})


def _values(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    """Numbers in four digits, in lists too."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def images(exported: Exported) -> list[str]:
    how, inside = exported.preprocessing(), exported.preprocess
    return [
        f"- {how['channels']} channel(s); the shorter side resized ({how['interpolation']}, antialiased) so that the "
        f"centre crop of {_pixels(exported.size)} is {how['crop']:.4g} of it",
        f"- pixels divided by the largest number they can be, to lie from 0 to 1; then less mean {how['mean']}, "
        f"divided by std {how['std']}",
        *(["- graphs (ONNX, pt2) take uint8 pixels from 0 to 255 and do the second step themselves"] if inside else []),
        *prepared(exported),
    ]


def prepared(exported: Exported) -> list[str]:
    """The same as lines of Python, to the pixel; none for images that Pillow does not hold as bytes."""
    how = exported.preprocessing()
    (height, width), channels = exported.size, how["channels"]
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        return []
    tall, wide = (math.floor(side / how["crop"]) for side in exported.size)
    mean, std = (f"np.reshape({how[name]}, (-1, 1, 1))" for name in ("mean", "std"))
    takes = "graphs take `pixels`, all others `torch.from_numpy(images)`" if exported.preprocess else (
        "onnxruntime takes `images`, all others `torch.from_numpy(images)`")  # fmt: skip
    return [
        "", "Exactly so, for bytes:", "", "```python", "import numpy as np", "from PIL import Image, ImageOps", "",
        f'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")',
        f"tall, wide = {tall}, {wide}  # the crop / {how['crop']:.4g}, rounded down",
        "if tall * image.width >= wide * image.height:", "    wide = max(wide, tall * image.width // image.height)",
        "else:", "    tall = max(tall, wide * image.height // image.width)",
        f"top, left = round((tall - {height}) / 2), round((wide - {width}) / 2)",
        "image = image.resize((wide, tall), Image.Resampling.BICUBIC)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
        f"pixels = np.asarray(image).reshape(1, {height}, {width}, {channels}).transpose(0, 3, 1, 2)  # uint8, NCHW",
        f"images = ((pixels / 255 - {mean}) / {std}).astype(np.float32)", "```", "", f"Of these, {takes}.",
        *(["", f"Other sizes do too; what is over a multiple of {exported.backbone.patch_size} pixels is cut off."]
          if exported.dynamic_size and exported.backbone.patch_size else []),
    ]  # fmt: skip


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"
