"""A set of images on a plane."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from dino_sd.seen import Picture, thumbnail
from dino_sd.shapes import NO_LABEL
from dino_sd.tiles import text

_THUMBNAILS = 150  # images of a map up to which they are drawn themselves
_LEGEND = 20  # classes of a map up to which they are named


def map_figure(
    places_N2: Tensor, axes_are: str, labels_N: Tensor, classes: Sequence[str] | None, title: str,
    pictures: Sequence[Picture] = (),
) -> Figure:  # fmt: skip
    """Images as points, coloured by label (-1: gray); the images themselves where there are at most 150.

    places_N2: coordinates. pictures: one a point, or none.
    """
    figure = Figure(figsize=(11, 9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    found = [label for label in labels_N.unique().tolist() if label != NO_LABEL]
    names = {label: str(classes[label] if classes else label) for label in found}
    palette = matplotlib.colormaps[
        "tab10" if len(found) <= 10 else "tab20" if len(found) <= _LEGEND else "gist_rainbow"
    ]
    many = len(found) > _LEGEND
    colors = {label: palette(i / len(found) if many else i) for i, label in enumerate(found)} | {NO_LABEL: "0.6"}
    places, area = places_N2.numpy(), float(np.clip(20000 / max(len(places_N2), 1), 3, 60))
    for label in [NO_LABEL, *found]:
        chosen = (labels_N == label).numpy()
        if chosen.any():
            axes.scatter(*places[chosen].T, s=area, color=[colors[label]], alpha=0.8, linewidths=0,
                         label=None if label == NO_LABEL else text(names[label]))  # fmt: skip
    for place, label, picture in zip(places, labels_N.tolist(), pictures[:_THUMBNAILS], strict=False):
        pixels_HWC = thumbnail(picture, 34 if len(pictures) > 60 else 52)
        frame = {"edgecolor": colors[label], "linewidth": 2.0}
        axes.add_artist(AnnotationBbox(OffsetImage(pixels_HWC, zoom=0.72), place, pad=0.06, bboxprops=frame))
    if 1 < len(found) <= _LEGEND:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=(50 / area) ** 0.5)
    axes.set(xticks=[], yticks=[], xlabel=axes_are)
    axes.margins(0.05)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(text(title), loc="left", fontsize=12)
    return figure


def draws_thumbnails(count: int) -> bool:
    """Whether `map_figure` draws the images of so many points."""
    return count <= _THUMBNAILS
