"""What a model sees, as pictures: attention, components of its patches, neighbours. Images in, one sheet out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_sd.components import principal_components, split_in_two
from dino_sd.errors import UserError
from dino_sd.models.attention import class_attention
from dino_sd.models.model import Model
from dino_sd.seen import Picture, Seen, at_side, cells, see, thumbnail
from dino_sd.tiles import INK, Tile, table

Progress = Callable[[int, int], None]
SIDE = 192  # pixels, longer side of a tile in a sheet
_HEAT = "inferno"
_LINE_COLOR = (90, 230, 255)  # around the mass: stands out from every colour of the heat
_SAME, _OTHER = (0, 114, 60), (190, 60, 0)  # captions


class PatchColours(NamedTuple):
    """Patches of an image as colours, float32 in [0, 1].

    all_HWC: components of all patches; foreground_HWC: of the foreground's alone; mask_HW: what that is.
    """

    all_HWC: np.ndarray
    foreground_HWC: np.ndarray
    mask_HW: np.ndarray


def attention_sheet(
    model: Model,
    pictures: Sequence[Picture],
    *,
    size: int | None = None,
    mass: float = 0.6,
    heads: bool = True,
    layer: int = -1,
    progress: Progress | None = None,
) -> Image.Image:
    """What the class token attends to, one row an image: the image, what holds `mass`, the mean over heads, each head.

    Images keep their shape; size: their shorter side in pixels as the model sees them, None for the size it expects.
    Every map goes from 0 to its own maximum. Patches that hold `mass` of a map are encircled, as few as do. Raises
    UserError as `class_attention` does. Caron et al. 2021, figures 1 and 3.
    """
    rows = []
    for done, picture in enumerate(pictures, 1):
        rows.append(attention_tiles(model, picture, size=size, mass=mass, heads=heads, layer=layer))
        if progress is not None:
            progress(done, len(pictures))
    longest = max(rows, key=len)
    return table([[tile for _, tile in row] for row in rows], [name for name, _ in longest])


def attention_picture(
    model: Model,
    picture: Picture,
    *,
    size: int | None = None,
    mass: float = 0.6,
    heads: bool = True,
    layer: int = -1,
    side: int = 320,
) -> Image.Image:
    """`attention_sheet` of one image, larger (side: pixels of a tile's longer side), its heads in further rows."""
    tiles = attention_tiles(model, picture, size=size, mass=mass, heads=heads, layer=layer, side=side)
    named = [Tile(tile.pixels_HWC, name) for name, tile in tiles]
    across = next((n for n in (3, 4, 5) if (len(named) - 3) % n == 0), 4) if len(named) > 6 else 3
    return table([named[:3], *(named[start : start + across] for start in range(3, len(named), across))])


@torch.inference_mode()
def attention_tiles(
    model: Model, picture: Picture, *, size: int | None, mass: float, heads: bool, layer: int, side: int = SIDE
) -> list[tuple[str, Tile]]:
    """(name, tile) of an image; see `attention_sheet`."""
    seen = see(model, picture, size)
    heads_XP = class_attention(model.backbone, seen.input_1CHW, layer)[0].float().cpu()
    grid = cells(heads_XP.shape[1], seen.size)
    maps = {"mean of heads": heads_XP.mean(0)}
    if heads:
        maps |= {f"head {number}": map_P for number, map_P in enumerate(heads_XP, 1)}
    background = at_side(seen, grid, side)
    kept_HW = _spread(most_of(maps["mean of heads"], mass).view(grid).numpy(), background.shape[:2])
    tiles = [
        ("image", Tile(background)),
        (f"{mass:.0%} of the mean", Tile(np.where(kept_HW[..., None], background, background // 4 + 12))),
    ]
    for name, map_P in maps.items():
        heat_HW = (map_P / map_P.max().clamp_min(1e-30)).view(grid).numpy()
        pixels_HWC = _coloured(_spread(heat_HW, background.shape[:2]))
        inside_HW = _spread(most_of(map_P, mass).view(grid).numpy(), background.shape[:2])
        pixels_HWC[_border(inside_HW)] = _LINE_COLOR
        tiles.append((name, Tile(pixels_HWC)))
    return tiles


def most_of(attention_P: Tensor, mass: float) -> Tensor:
    """The smallest set of patches that holds at least `mass` of a map's sum, (P,) bool. Caron et al. 2021, figure 3."""
    order_P = attention_P.double().argsort(descending=True, stable=True)
    sorted_P = attention_P.double()[order_P]
    before_P = sorted_P.cumsum(0) - sorted_P
    kept_P = torch.zeros(len(attention_P), dtype=torch.bool)
    kept_P[order_P] = before_P < mass * sorted_P.sum()
    return kept_P


def pca_sheet(
    model: Model,
    pictures: Sequence[Picture],
    *,
    size: int | None = None,
    layer: int | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """First three components of all images' patches as colours, one row an image: the image, all patches, foreground.

    The same colour is the same kind of patch in every image. See `patch_components`; size as in `attention_sheet`.
    """
    return components_sheet(patch_components(model, pictures, size=size, layer=layer, progress=progress))


def components_sheet(drawn: Sequence[tuple[Seen, PatchColours]], side: int = SIDE) -> Image.Image:
    """The sheet of `pca_sheet` from what `patch_components` gives, or from a part of it."""
    rows = []
    for seen, colours in drawn:
        background = at_side(seen, colours.mask_HW.shape, side)
        shown = [_spread(part, background.shape[:2]) for part in (colours.all_HWC, colours.foreground_HWC)]
        rows.append([Tile(background), *(Tile((part * 255).round().astype(np.uint8)) for part in shown)])
    return table(rows, ["image", "components", "of the foreground"])


@torch.inference_mode()
def patch_components(
    model: Model,
    pictures: Sequence[Picture],
    *,
    size: int | None = None,
    layer: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[Seen, PatchColours]]:
    """Patch tokens (cells of a convnet) of all images, as the first three principal components of them all.

    layer: block or stage, counted from 0; None: the model's output. The first component parts foreground from
    background; foreground is the side that the images' borders are on less. Then three components of the foreground
    alone. Each goes from its 1st to its 99th percentile over all images. Deterministic, signs too. Raises UserError
    for raw pixels. Oquab et al. 2023, figure 1.
    """
    seen, tokens, grids = [], [], []
    for done, picture in enumerate(pictures, 1):
        seen.append(see(model, picture, size))
        features = model.backbone(seen[-1].input_1CHW, () if layer is None else (check_layer(model, layer),))
        patches_PD = (features.patches_NPD if layer is None else features.layers[0][1])[0].float().cpu()
        tokens.append(patches_PD)
        grids.append(cells(len(patches_PD), seen[-1].size))
        if progress is not None:
            progress(done, len(pictures))
    tokens_ND = torch.cat(tokens)
    scores_NK = principal_components(tokens_ND, 3)(tokens_ND)
    on_border_N = torch.cat([_on_border(grid) for grid in grids])
    first_N = scores_NK[:, 0]
    if not on_border_N.all() and first_N[on_border_N].mean() > first_N[~on_border_N].mean():
        scores_NK[:, 0] = first_N = -first_N
    mask_N = first_N > split_in_two(first_N)
    foreground_NK = torch.zeros_like(scores_NK)
    if mask_N.any():
        foreground_NK[mask_N] = _from_0_to_1(principal_components(tokens_ND[mask_N], 3)(tokens_ND[mask_N]))
    parts = (_from_0_to_1(scores_NK), foreground_NK, mask_N)
    counts = [len(patches_PD) for patches_PD in tokens]
    drawn = []
    for one, grid, *of_image in zip(seen, grids, *(part.split(counts) for part in parts), strict=True):
        everything, foreground, mask = (part.view(*grid, *part.shape[1:]).numpy() for part in of_image)
        drawn.append((one, PatchColours(everything.astype(np.float32), foreground.astype(np.float32), mask)))
    return drawn


def neighbour_sheet(
    queries: Sequence[Picture], rows: Sequence[Sequence[tuple[Picture, float, str]]], names: Sequence[str] = ()
) -> Image.Image:
    """Each query, framed, and beside it its neighbours: (picture, cosine similarity, label or any other text).

    names: labels of the queries; with them a neighbour's label is green where it is the same and red where not.
    """
    side = 112
    drawn = []
    for place, (query, row) in enumerate(zip(queries, rows, strict=True)):
        own = names[place] if names else ""
        tiles = [Tile(thumbnail(query, side), own, framed=True)]
        for picture, similarity, label in row:
            color = (_SAME if label == own else _OTHER) if own and label else INK
            tiles.append(Tile(thumbnail(picture, side), f"{similarity:.2f} {label}".strip(), color))
        drawn.append(tiles)
    return table(drawn, ["image", "nearest"])


def prototype_sheet(names: Sequence[str], rows: Sequence[Sequence[tuple[Picture, str]]]) -> Image.Image:
    """One row a prototype: its name, and the images that excite it most with a line of text each."""
    tiles = [[Tile(thumbnail(picture, 112), line) for picture, line in row] for row in rows]
    return table(tiles, ["most excited by"], names)


def check_layer(model: Model, layer: int) -> int:
    """The layer. Raises UserError where there is none of this number."""
    depth = model.backbone.depth
    if not -depth <= layer < depth:
        raise UserError(f"layer={layer}: model={model.backbone.name} has {depth} layers, 0 to {depth - 1}")
    return layer


def _spread(cells_HW: Any, size: tuple[int, ...]) -> np.ndarray:
    """Cells (h, w, ...) over an image of (height, width)."""
    rows, columns = (np.arange(size[axis]) * cells_HW.shape[axis] // size[axis] for axis in (0, 1))
    return cells_HW[rows][:, columns]


def _coloured(heat_HW: np.ndarray) -> np.ndarray:
    return (matplotlib.colormaps[_HEAT](heat_HW)[..., :3] * 255).round().astype(np.uint8)


def _border(mask_HW: np.ndarray, wide: int = 2) -> np.ndarray:
    """The inner border of a mask; none along the image's own."""
    mask = torch.from_numpy(~mask_HW)[None, None].float()
    padded = F.pad(mask, (wide,) * 4, mode="replicate")
    return mask_HW & (F.max_pool2d(padded, 2 * wide + 1, 1)[0, 0] > 0).numpy()


def _on_border(grid: tuple[int, int]) -> Tensor:
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()


def _from_0_to_1(values_NK: Tensor) -> Tensor:
    """Each column from its 1st percentile to its 99th; one that does not vary is 1/2."""
    low_K, high_K = (torch.from_numpy(np.percentile(values_NK.numpy(), share, axis=0)) for share in (1, 99))
    varies_K = high_K - low_K > 1e-9
    scaled_NK = (values_NK - low_K) / torch.where(varies_K, high_K - low_K, 1.0)
    return torch.where(varies_K, scaled_NK.clamp(0, 1), 0.5)
