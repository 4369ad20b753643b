"""A program of torch.export, which torch alone loads."""

import json
from pathlib import Path

import torch

from dino_sd.exported import Exported, Usage

TOLERANCE = 1e-5
GRAPH = True
FILE = "model.pt2"


def refuse(exported: Exported) -> None:
    """What cannot be traced is known when it is."""


def write(folder: Path, exported: Exported) -> None:
    """The metadata lies in the file as metadata.json: torch.export.load(FILE, extra_files={"metadata.json": ""})."""
    torch.export.save(
        exported.program, folder / FILE, extra_files={"metadata.json": json.dumps(exported.metadata(), indent=2)}
    )


def usages(exported: Exported) -> list[Usage]:
    call = "outputs = model(images)\n" + ", ".join(exported.outputs)
    call += " = " + ", ".join(f'outputs["{name}"]' for name in exported.outputs)
    return [Usage("torch.export", f'import torch\nmodel = torch.export.load("FOLDER/{FILE}").module()', call)]
