"""Pictures of a set of images: an overview of it, and the very crops that training would see."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino_sd import build, recipe
from dino_sd.config import Config
from dino_sd.data.geometry import make_views
from dino_sd.data.order import step_indices, steps_per_epoch
from dino_sd.data.photometry import Photometry
from dino_sd.data.source import WHITE, BadImage, Source
from dino_sd.data.statistics import evenly
from dino_sd.run import describe
from dino_sd.seen import percentiles, stretched, visible
from dino_sd.suggestions import RECIPE, data_pair
from dino_sd.tiles import fit, save, short, text

_GAP = 4  # pixels between tiles, and between crops that are not small
_TILE = 96  # pixels, side of a thumbnail
_TILES = 64  # thumbnails of an overview
_STRIPS, _OF_GROUP = 12, 4  # groups of near duplicates that are shown, images of each
_DPI = 100
_COLOR = "#4c72b0"


@dataclass(frozen=True)
class Crops:
    """What training sees of B images.

    indices: of the images in their source. originals: (C, H, W) each. groups: per resolution, the crops after
    photometry, float32 (V, B, C, H, W). All in units in which WHITE is 1; channels as in the source.
    """

    indices: list[int]
    originals: list[torch.Tensor]
    groups: list[torch.Tensor]


def views(spec: str, pairs: list[str], images: int, epoch: int, out: Path) -> Path:
    """Draws the crops of the first images of an epoch of `train CONFIG data=SPEC [pairs]`; returns the picture's path.

    config=NAME among the pairs names the recipe. Raises UserError on wrong settings, data that cannot be read, and a
    picture that cannot be written.
    """
    chosen = [pair for pair in pairs if pair.startswith("config=")]
    others = [pair for pair in pairs if pair not in chosen]
    config = chosen[-1].removeprefix("config=") if chosen else RECIPE
    length = [] if any(pair.partition("=")[0] in recipe.LENGTHS for pair in others) else ["steps=1"]
    # Warm-ups and learning rates do not matter here, nor does how a batch is cut up.
    cfg = recipe.load_config(config, [data_pair(spec), *others, *length, f"batch_size={images}", "accumulate=1"])
    source = build.open_data(cfg)
    crops = first_crops(cfg, source, images, epoch)
    sheet, columns = crops_sheet(crops, source.dtype == torch.uint8, originals=True)
    names = [Path(source.path(index)).name for index in crops.indices]
    save(_labelled(sheet, columns, names, text(f"what training sees of {spec}, epoch {epoch}")), out)
    return out


def contact_sheet(cfg: Config, images: int) -> np.ndarray:
    """One row an image: its global and local crops, with the augmentation of the first step. (H, W[, 3]) in [0, 1]."""
    source = build.open_data(cfg)
    return crops_sheet(first_crops(cfg, source, images, 0), source.dtype == torch.uint8)[0]


def first_crops(cfg: Config, source: Source, images: int, epoch: int) -> Crops:
    """The crops of the first images of an epoch, cut and coloured by the training's own functions."""
    few = cfg.model_copy(update={"batch_size": min(images, source.epoch_images())})
    return crops_of_step(few, source, images, epoch * steps_per_epoch(source.epoch_images(), few.batch_size))


def crops_of_step(cfg: Config, source: Source, images: int, step: int) -> Crops:
    """The crops of the first images of the batch of a step, counted from 0: the very ones that training sees there."""
    spec = build.view_spec(cfg)
    epoch, indices = step_indices(step, cfg.seed, len(source), cfg.batch_size, source.parts)
    views = make_views(source, spec, cfg.seed, epoch, indices[:images])
    zeros, ones = [0.0] * cfg.channels, [1.0] * cfg.channels
    plain_views = cfg.views.model_copy(update={"mean": zeros, "std": ones})
    data, _ = describe(source, cfg.model_copy(update={"views": plain_views}))
    photometry = Photometry(spec, zeros, ones, data["range"])
    groups = [
        photometry(crops, rows).unflatten(0, (-1, len(views.indices)))
        for crops, rows in zip(views.groups, views.rows, strict=True)
    ]
    seen = views.indices.tolist()
    return Crops(seen, [_decoded(source, index, max(spec.groups[0].size)) for index in seen], groups)


def _decoded(source: Source, index: int, side: int) -> torch.Tensor:
    """An image, (C, H, W) float32 in units in which WHITE is 1, not smaller than side unless it is. Raises BadImage."""
    picture = source.picture(index)
    shrink = next((s for s in (8, 4, 2) if min(picture.height, picture.width) >= s * side), 1)
    return picture.decode(shrink).float() / WHITE[source.dtype]


def crops_sheet(crops: Crops, bytes_: bool, originals: bool = False) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """One row an image: (pixels, float32 (H, W[, 3]) in [0, 1]; [(middle of a column, what it holds)]).

    bytes_: whether the source's pixels are; others are scaled by the 1st and 99th percentile of the global crops. Crops
    of about half the height stand below each other.
    """
    height, width = crops.groups[0].shape[-2:]
    gap = _GAP if height >= _TILE else 1
    low, high = (0.0, 1.0) if bytes_ else percentiles(visible(crops.groups[0]))
    columns: list[tuple[str, np.ndarray]] = []
    if originals:
        fitted = [fit(stretched(image, low, high), height, width).numpy() for image in crops.originals]
        columns.append(("original", np.stack(fitted)))
    for name, group in zip(("global", "local"), crops.groups, strict=False):
        views_VBHWC = stretched(group, low, high).numpy()
        at_once = max(round((height + gap) / (group.shape[-2] + gap)), 1)
        for start in range(0, len(views_VBHWC), at_once):
            some = views_VBHWC[start : start + at_once]
            span = f"{start + 1}" if len(some) == 1 else f"{start + 1} - {start + len(some)}"
            padded = np.pad(some, ((0, 0), (0, 0), (0, gap), (0, 0), (0, 0)), constant_values=1.0)
            columns.append((f"{name} {span}", np.concatenate(list(padded), axis=1)[:, :-gap]))
    tallest = max(column_BHWC.shape[1] for _, column_BHWC in columns)
    strips, middles, left = [], [], gap
    for name, column_BHWC in columns:
        below, wide = tallest - column_BHWC.shape[1] + gap, column_BHWC.shape[2]
        strip = np.pad(column_BHWC, ((0, 0), (0, below), (0, gap), (0, 0)), constant_values=1.0)
        strips.append(strip.reshape(-1, *strip.shape[2:]))
        middles.append((left + wide / 2, name))
        left += wide + gap
    sheet = np.pad(np.concatenate(strips, axis=1), ((gap, 0), (gap, 0), (0, 0)), constant_values=1.0)
    return (sheet[..., 0] if sheet.shape[-1] == 1 else sheet), middles


def _labelled(sheet: np.ndarray, columns: list[tuple[float, str]], rows: list[str], title: str) -> Figure:
    """The sheet, each of its pixels one or several of the picture, with names of columns and rows."""
    height, width = sheet.shape[:2]
    zoom = max(900 // width, 1)
    left, top = 190, 70  # pixels for the names
    inches = ((width * zoom + left + 10) / _DPI, (height * zoom + top + 10) / _DPI)
    figure = Figure(figsize=inches, dpi=_DPI)
    axes = figure.add_axes((left / inches[0] / _DPI, 10 / inches[1] / _DPI,
                            width * zoom / inches[0] / _DPI, height * zoom / inches[1] / _DPI))  # fmt: skip
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.xaxis.tick_top()
    axes.set_xticks([middle for middle, _ in columns], [name for _, name in columns])
    strip = height / len(rows)
    axes.set_yticks([(row + 0.5) * strip for row in range(len(rows))], [short(name) for name in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.text(10 / inches[0] / _DPI, 1 - 28 / inches[1] / _DPI, title, fontsize=13)
    return figure


def overview(source: Source, chosen_n: np.ndarray, looks: np.ndarray, groups: list[list[int]]) -> Figure:
    """Thumbnails of some images, distributions of their sizes, and a few groups of near duplicates.

    chosen_n: indices that were looked at. looks: as `look` gives them. groups: indices that look the same.
    """
    aspect = float(np.clip(np.median(looks["width"] / looks["height"]), 0.5, 2.0)) if len(looks) else 1.0
    box = (round(_TILE / max(aspect, 1)), round(_TILE * min(aspect, 1)))
    tiles = [_tile(source, index, box) for index in chosen_n[evenly(len(chosen_n), _TILES)].tolist()]
    across = max(ceil((len(tiles) * box[0] / box[1]) ** 0.5), 3)
    height = 8.6
    strips = [_strip([_tile(source, index, box) for index in group[:_OF_GROUP]]) for group in groups[:_STRIPS]]
    rows = ceil(len(strips) / 3)
    below = 0.5 + 1.0 * rows if strips else 0.0
    figure = Figure(figsize=(12.5, height + below), layout="constrained", dpi=_DPI)
    figure.suptitle(text(f"{source.name}: {len(source):,} images"), fontsize=14)
    grid = figure.add_gridspec(
        2 if strips else 1, 2, width_ratios=[2.2, 1], height_ratios=[height, below] if strips else None
    )
    _show(figure.add_subplot(grid[0, 0]), _table(tiles, across), f"{len(tiles)} images, evenly spaced")
    beside = grid[0, 1].subgridspec(3, 1)
    values = (looks["height"], looks["width"], looks["width"] / looks["height"])
    for place, (name, value_n) in enumerate(
        zip(("height, pixels", "width, pixels", "width / height"), values, strict=True)
    ):
        _histogram(figure.add_subplot(beside[place, 0]), value_n, name)
    if strips:
        title = f"{len(groups):,} group(s) of near duplicates" + (
            f", {len(strips)} of them" if len(strips) < len(groups) else ""
        )
        _show(figure.add_subplot(grid[1, :]), _table(strips, 3, gap=6 * _GAP), title)
    return figure


def _tile(source: Source, index: int, box: tuple[int, int]) -> torch.Tensor:
    """A thumbnail on white, (height, width, 3) of the box; crossed out where the image cannot be read."""
    try:
        image_CHW = _decoded(source, index, _TILE)
    except BadImage:
        tile = torch.full((*box, 3), 0.9)
        across = torch.linspace(0, box[1] - 1, 4 * _TILE).round().long()
        down = torch.linspace(0, box[0] - 1, 4 * _TILE).round().long()
        tile[down, across] = tile[down, across.flip(0)] = 0.6
        return tile
    low, high = (0.0, 1.0) if source.dtype == torch.uint8 else percentiles(visible(image_CHW))
    return fit(stretched(image_CHW, low, high), *box).expand(-1, -1, 3)


def _strip(tiles: list[torch.Tensor]) -> torch.Tensor:
    """Tiles side by side, filled up with white to the length of the longest strip."""
    tiles = tiles + [torch.ones_like(tiles[0])] * (_OF_GROUP - len(tiles))
    return torch.cat([F.pad(tile, (0, 0, 0, _GAP), value=1.0) for tile in tiles], 1)


def _table(tiles: list[torch.Tensor], across: int, gap: int = _GAP) -> np.ndarray:
    """Tiles of one size in rows: (H, W, 3)."""
    tall, wide, _ = tiles[0].shape
    sheet = np.ones((ceil(len(tiles) / across) * (tall + gap), across * (wide + gap), 3), dtype=np.float32)
    for place, tile in enumerate(tiles):
        top, left = place // across * (tall + gap), place % across * (wide + gap)
        sheet[top : top + tall, left : left + wide] = tile.numpy()
    return sheet


def _show(axes: Axes, sheet: np.ndarray, title: str) -> None:
    axes.imshow(sheet, interpolation="antialiased")
    axes.set_title(title, fontsize=11, loc="left")
    axes.axis("off")


def _histogram(axes: Axes, values_n: np.ndarray, name: str) -> None:
    several = len(values_n) and values_n.min() < values_n.max()
    axes.hist(values_n, bins=30 if several else 3, color=_COLOR)
    if len(values_n):
        axes.axvline(float(np.median(values_n)), color="black", lw=1, ls=":")
        name += f" (median {np.median(values_n):.4g})"
    axes.set_title(name, fontsize=11, loc="left")
    axes.set_ylabel("images", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
