"""The pictures of a run's folder on the page: the same images at several steps."""

import base64
from pathlib import Path

import numpy as np
from PIL import Image

from dino_sd.data.statistics import evenly
from dino_sd.report.folder import Run
from dino_sd.report.markup import Html, tag

MOST_BYTES = 2_000_000  # of all pictures of a page
MOMENTS = (12, 8, 6, 4, 3, 2, 1)  # shown of each run: as many as fit
KINDS = {
    "attention": ("Attention", "Where the class token of the last block looks, head by head."),
    "neighbours": ("Nearest neighbours", "On the left an image, beside it those that are most like it to the network, "
                                         "with their cosine similarity."),
    "pca": ("Patches by colour", "The three main directions of the patch features as red, green and blue: parts that "
                                 "mean the same to the network have the same colour."),
    "crops": ("Crops of one step", "What the student saw of a few images at this very step: global crops, then local "
                                   "ones, drawn again from the seed."),
}  # fmt: skip


def pictures_section(runs: list[Run]) -> list[Html]:
    chosen = _chosen(runs)
    parts = []
    for run in runs:
        steps = chosen[id(run)]
        title = [tag("h3", run.name)] if len(runs) > 1 else []
        if steps:
            parts.append(tag("div", *title, *_moments(run, steps), class_="card part"))
    return parts


def _chosen(runs: list[Run]) -> dict[int, list[int]]:
    """Steps of each run, evenly spaced and the newest among them, whose pictures fit into the page together."""
    chosen: dict[int, list[int]] = {}
    for most in MOMENTS:
        for run in runs:
            steps = np.array(sorted(run.pictures))
            chosen[id(run)] = steps[evenly(len(steps), most)].tolist() if most > 1 else steps[-1:].tolist()
        size = sum(_size(path) for run in runs for step in chosen[id(run)] for path in run.pictures[step].values())
        if size <= MOST_BYTES:
            return chosen
    return {id(run): [] for run in runs}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _moments(run: Run, steps: list[int]) -> list[Html]:
    buttons = [
        tag("button", f"{step:,}", type="button", aria_pressed="true" if step == steps[-1] else "false")
        for step in steps
    ]
    parts = [tag("div", tag("small", "step"), *buttons, class_="steps")] if len(steps) > 1 else []
    for step in steps:
        known = run.pictures[step]
        figures = [_figure(kind, step, known[kind]) for kind in KINDS if kind in known]
        parts.append(tag("div", *figures, class_="moment", hidden=step != steps[-1]))
    return parts


def _figure(kind: str, step: int, path: Path) -> Html:
    name, about = KINDS[kind]
    try:
        with Image.open(path, formats=("WEBP",)) as picture:
            width = picture.width
        data = base64.b64encode(path.read_bytes()).decode()
    except (OSError, Image.DecompressionBombError):  # damaged, or none of ours
        return Html("")
    image = Html(f'<img src="data:image/webp;base64,{data}" alt="{name} at step {step}" width="{width}">')
    caption = tag("figcaption", tag("b", f"{name}, step {step:,}. "), about)
    return tag(
        "figure", caption, tag("div", image, class_="wide scroll" if width > 800 else "scroll"), class_="picture"
    )
