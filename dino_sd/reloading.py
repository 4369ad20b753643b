"""An export read back by others: in a process that has no dino_sd, by the very lines that its users are given."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.exported import Exported
from dino_sd.graph import WHITE, other_size

BATCHES = (1, 3)  # images at a time

# argv: usages, images, where their outputs go. Prints a line for each library that is not needed and could not load it.
RELOAD = """
import json, sys
sys.modules["dino_sd"] = None
import torch
from safetensors.torch import load_file, save_file
given, found = load_file(sys.argv[2]), {}
for usage in json.loads(sys.argv[1]):
    try:
        loaded = {}
        exec(usage["load"], loaded)
        for place, images in usage["images"].items():
            names = {**loaded, "images": given[images]}
            with torch.inference_mode():
                exec(usage["call"], names)
            for name in ("features", "patches", "logits"):
                if name in names:
                    found[f"{usage['library']}, {name}, {place}"] = torch.as_tensor(names[name]).clone().contiguous()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not usage["optional"]:
            sys.exit(f"{usage['library']} cannot load what was written: {reason}")
        print(f"note: {usage['library']} was not tried ({reason})")
save_file(found, sys.argv[3])
"""


class Example(NamedTuple):
    """Images and what this process says of them."""

    pixels_NCHW: Tensor  # uint8
    outputs: dict[str, Tensor]


def verify(
    folder: Path, exported: Exported, formats: dict[str, ModuleType]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """({format: {"library, output, HxW, batch of B": largest absolute difference here and there}}, what to say).

    At the model's size and, where the format and the model take another one, at that too. Raises UserError where the
    export cannot be loaded or says nothing.
    """
    examples: dict[str, Example] = {}
    usages: list[dict] = []
    # Graphs come first, so that what they are loaded by has not seen timm.
    for name, module in sorted(formats.items(), key=lambda item: not item[1].GRAPH):
        places = [place for size in sizes(exported, module) for place in look(exported, size, examples)]
        kind = "pixels" if module.GRAPH and exported.preprocess else "normalised"
        images = {place: f"{kind}, {place}" for place in places}
        usages += [{**usage._asdict(), "format": name, "images": images} for usage in module.usages(exported)]
    found, notes = reload(folder, exported, usages, examples)
    differences: dict[str, dict[str, float]] = {name: {} for name in formats}
    for usage in usages:
        outputs = {key: value for key, value in found.items() if key.startswith(f"{usage['library']}, ")}
        if not usage["optional"] and not all(
            f"{usage['library']}, features, {place}" in outputs for place in usage["images"]
        ):
            raise UserError(f"export: {usage['library']} says no features of model={exported.backbone.name}")
        for key, value in outputs.items():
            _, output, place = key.split(", ", 2)
            differences[usage["format"]][key] = difference(examples[place].outputs[output], value)
    return differences, notes


def sizes(exported: Exported, module: ModuleType) -> list[tuple[int, int]]:
    """At which the export has to agree."""
    both = [exported.size, other_size(exported.backbone, exported.size, 1, 1)]
    if module.GRAPH:
        return both if exported.dynamic_size else both[:1]
    if getattr(exported.backbone, "position_resize", "timm") != "timm":
        return [exported.backbone.size]  # at others it resizes positions in a way that timm does not know
    return both


def look(exported: Exported, size: tuple[int, int], examples: dict[str, Example]) -> list[str]:
    """Adds what this process says of images of this size, once; returns their names, none where it takes no such."""
    height, width = size
    places = {f"{height}x{width}, batch of {batch}": batch for batch in BATCHES}
    if not places.keys() <= examples.keys():
        generator = np.random.Generator(np.random.Philox(height))
        shape = (max(BATCHES), exported.backbone.channels, height, width)
        pixels_NCHW = torch.from_numpy(generator.integers(0, WHITE + 1, shape, dtype=np.uint8))
        graph = exported.graph(preprocess=False)
        try:
            for place, batch in places.items():
                with torch.inference_mode():
                    outputs = graph(normalised(exported, pixels_NCHW[:batch]))
                examples[place] = Example(pixels_NCHW[:batch], outputs)
        except (RuntimeError, AssertionError, ValueError):
            if size in (exported.size, exported.backbone.size):
                raise
            return []  # not every model takes more than one size
    return list(places)


def normalised(exported: Exported, pixels_NCHW: Tensor) -> Tensor:
    mean_C11, std_C11 = (torch.tensor(list(x)).view(-1, 1, 1) for x in (exported.model.mean, exported.model.std))
    return (pixels_NCHW.float() / WHITE - mean_C11) / std_C11


def reload(
    folder: Path, exported: Exported, usages: list[dict], examples: dict[str, Example]
) -> tuple[dict[str, Tensor], list[str]]:
    """({"library, output, name of the images": (N, ...)} of a fresh process, what to say)."""
    path = json.dumps(folder.resolve().as_posix())[1:-1]  # as it stands in a string of Python
    usages = [{**usage, "load": usage["load"].replace("FOLDER", path)} for usage in usages]
    images = {f"pixels, {place}": example.pixels_NCHW.clone() for place, example in examples.items()}
    images |= {f"normalised, {place}": normalised(exported, example.pixels_NCHW) for place, example in examples.items()}
    alone = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # hubconf.py lies in the folder
    with tempfile.TemporaryDirectory() as scratch:
        given, answered = Path(scratch) / "images.safetensors", Path(scratch) / "outputs.safetensors"
        save_file(images, given)
        command = [sys.executable, "-c", RELOAD, json.dumps(usages), str(given), str(answered)]
        done = subprocess.run(command, cwd=scratch, env={**os.environ, **alone}, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"export: model={exported.backbone.name}: {last}")
        notes = [line.removeprefix("note: ") for line in done.stdout.splitlines() if line.startswith("note: ")]
        return load_file(answered), notes


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest absolute difference; infinite for another shape, and not a number where an output is none."""
    return float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
