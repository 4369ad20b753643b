"""What every sheet is made of: tiles, tables of tiles, and letters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dino_sd.errors import UserError

INK = (38, 38, 38)
_GAP = 8  # pixels between tiles
_LINE = 17  # pixels, height of a line of text
_SMALLEST = 56  # pixels, width of a column: room for a caption


@dataclass(frozen=True)
class Tile:
    """A cell of a table: pixels, uint8 (H, W, 3), a line of text below them, and a frame where one is to stand out."""

    pixels_HWC: np.ndarray
    caption: str = ""
    color: tuple[int, int, int] = INK
    framed: bool = False


def fit(image_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The whole image within height x width, on white; small ones are enlarged by whole factors."""
    factor = min(height / image_HWC.shape[0], width / image_HWC.shape[1])
    sides = [max(round(side * (int(factor) if factor >= 1 else factor)), 1) for side in image_HWC.shape[:2]]
    mode: dict[str, Any] = {"mode": "nearest"} if factor >= 1 else {"mode": "bilinear", "antialias": True}
    inner_CHW = F.interpolate(image_HWC.movedim(-1, 0)[None], sides, **mode)[0].clamp(0, 1)
    fitted = torch.ones(height, width, image_HWC.shape[2])
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    fitted[top : top + sides[0], left : left + sides[1]] = inner_CHW.movedim(0, -1)
    return fitted


def short(name: str, most: int = 24) -> str:
    return text(name if len(name) <= most else f"...{name[3 - most :]}")


def text(name: str) -> str:
    """A name as matplotlib takes it: Unicode, and no formula between dollars."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def table(rows: Sequence[Sequence[Tile]], columns: Sequence[str] = (), names: Sequence[str] = ()) -> Image.Image:
    """Tiles in rows, which may differ in length, on white; columns, names: of the columns and of the rows."""
    count = max(len(row) for row in rows)
    widths = [_SMALLEST] * count
    for row in rows:
        widths = [max(wide, row[i].pixels_HWC.shape[1] if i < len(row) else 0) for i, wide in enumerate(widths)]
    for place, name in enumerate(columns[:count]):
        widths[place] = max(widths[place], int(font(True).getlength(name)) + 1)
    beside = max((int(font().getlength(line)) for name in names for line in name.split("\n")), default=-_GAP) + _GAP
    heights = [max(tile.pixels_HWC.shape[0] for tile in row) for row in rows]
    below = [_LINE if any(tile.caption for tile in row) else 0 for row in rows]
    top = _GAP + (_LINE + 3 if columns else 0)
    size = (_GAP + beside + sum(widths) + _GAP * count, top + sum(heights) + sum(below) + _GAP * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [_GAP + beside + sum(widths[:i]) + _GAP * i for i in range(count)]
    for left, name in zip(lefts, columns, strict=False):
        draw.text((left, _GAP - 2), name, INK, font(True))
    for place, (row, height, room) in enumerate(zip(rows, heights, below, strict=True)):
        if names:
            draw.multiline_text((_GAP, top + height // 2), names[place], INK, font(), anchor="lm")
        for left, width, tile in zip(lefts, widths, row, strict=False):
            _place(sheet, draw, tile, (left, top, width, height))
        top += height + room + _GAP
    return sheet


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    tall, wide = tile.pixels_HWC.shape[:2]
    down = top + (height - tall) // 2
    sheet.paste(Image.fromarray(tile.pixels_HWC), (left, down))
    if tile.framed:
        draw.rectangle((left - 3, down - 3, left + wide + 2, down + tall + 2), outline=INK, width=2)
    draw.text((left, top + height + 1), _within(tile.caption, width), tile.color, font())


def _within(line: str, width: int) -> str:
    """As much of a line as fits, with dots where something is left out."""
    if font().getlength(line) <= width:
        return line
    while line and font().getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


@lru_cache
def font(bold: bool = False) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), 12)


def check(out: Path, kind: type = Image.Image) -> None:
    """Raises UserError, before any work is done, where `save` knows no such kind of file."""
    known = Image.registered_extensions() if kind is Image.Image else Figure().canvas.get_supported_filetypes()
    if out.suffix.lower().lstrip(".") not in {name.lstrip(".") for name in known}:
        raise UserError(f"out={out}: expected the name of a picture, such as {out.stem or 'picture'}.png")


def save(picture: Figure | Image.Image, out: Path) -> None:
    """Raises UserError where it cannot be written, or is of no kind of picture."""
    try:
        out.expanduser().parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Figure):
            picture.savefig(out.expanduser())
        else:
            picture.save(out.expanduser())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("(")[0].strip()
        raise UserError(f"out={out}: the picture cannot be written ({reason}); choose another file") from None
