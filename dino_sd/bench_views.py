"""The published recipe of torchvision's transforms on Pillow images, and whether our views are like its views."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from dino_sd.data.draws import draw as draw_numbers
from dino_sd.data.draws import flips
from dino_sd.data.geometry import make_views
from dino_sd.data.photometry import Photometry
from dino_sd.data.source import Source
from dino_sd.data.views import Row, ViewGroup, ViewSpec
from dino_sd.sheets import Crops, crops_sheet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BINS = 32
SHOWN = 4  # images
COMPARED = 2_000  # views of each group
_FLAGS = {"jittered": Row.JITTERED, "gray": Row.GRAYSCALE, "blurred": Row.SIGMA, "solarised": Row.SOLARIZE}


class PilRecipe:
    """The spec's views as the published code makes them: torchvision's transforms on Pillow images, crop by crop.

    happened: how many crops were flipped, jittered, made gray, blurred and solarised.
    """

    def __init__(self, spec: ViewSpec):
        self.spec, self.happened = spec, Counter()
        self.jitter = T.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
        self.normalize = T.Normalize(MEAN[: spec.channels], STD[: spec.channels])

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Normalised views, (C, H, W) each."""
        groups = [group for group in self.spec.groups for _ in range(group.count)]
        return [self.view(image, group, number) for number, group in enumerate(groups)]

    def view(self, image: Image.Image, group: ViewGroup, number: int) -> Tensor:
        return self.normalize(TF.to_tensor(self.crop(image, group, number)))

    def crop(self, image: Image.Image, group: ViewGroup, number: int) -> Image.Image:
        spec = self.spec
        box = T.RandomResizedCrop.get_params(image, list(group.scale), list(spec.ratio))  # pyright: ignore
        image = TF.resized_crop(image, *box, list(group.size), T.InterpolationMode.BICUBIC)  # pyright: ignore
        if self.happens("flipped", spec.flip):
            image = TF.hflip(image)  # pyright: ignore
        if self.happens("jittered", spec.jitter_probability):
            image = self.jitter(image)
        if spec.channels == 3 and self.happens("gray", spec.grayscale):
            image = TF.rgb_to_grayscale(image, 3)  # pyright: ignore
        if self.happens("blurred", spec.blur[number]):
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*spec.blur_sigma)))
        if self.happens("solarised", spec.solarize[number]):
            image = ImageOps.solarize(image)
        return image

    def happens(self, what: str, probability: float) -> bool:
        happens = random.random() < probability
        self.happened[what] += happens
        return happens


class Seen:
    """What some views are like.

    shares: {"flipped", "jittered", "gray", "blurred", "solarised": share of the views}. numbers: per group, float64
    (views, 2 C + C * BINS): mean and variance of each channel, then its histogram. shown: per group, some views,
    (V, SHOWN, C, H, W).
    """

    def __init__(self):
        self.shares: dict[str, float] = {}
        self.numbers: list[np.ndarray] = []
        self.shown: list[Tensor] = []


def compare(source: Source, spec: ViewSpec, count: int = COMPARED) -> tuple[Seen, Seen]:
    """At least `count` views of each group of a source's images, made by this code and by the published recipe."""
    random.seed(0)
    torch.manual_seed(0)
    recipe, happened, ours, theirs = PilRecipe(spec), Counter(), Seen(), Seen()
    images_B = np.arange(len(source))
    rounds = -(-count // (len(source) * min(group.count for group in spec.groups)))
    pictures = [TF.to_pil_image(source.image(index)) for index in images_B.tolist()]
    plain = Photometry(spec, [0.0] * spec.channels, [1.0] * spec.channels)
    for epoch in range(rounds):
        views = make_views(source, spec, 0, epoch, images_B)
        made = [
            plain(crops, rows).unflatten(0, (-1, len(source)))
            for crops, rows in zip(views.groups, views.rows, strict=True)
        ]
        happened["flipped"] += int(flips(draw_numbers(spec, 0, epoch, images_B), spec).sum())
        for name, column in _FLAGS.items():
            happened[name] += sum(int((rows[:, column] > 0).sum()) for rows in views.rows)
        _add(ours, made)
        _add(theirs, _as_published(recipe, pictures))
    total = rounds * len(source) * spec.views
    ours.shares = {name: happened[name] / total for name in ("flipped", *_FLAGS)}
    theirs.shares = {name: recipe.happened[name] / total for name in ("flipped", *_FLAGS)}
    return ours, theirs


def _as_published(recipe: PilRecipe, pictures: list[Image.Image]) -> list[Tensor]:
    groups, number = [], 0
    for group in recipe.spec.groups:
        views = []
        for _ in range(group.count):
            views.append(torch.stack([TF.to_tensor(recipe.crop(picture, group, number)) for picture in pictures]))
            number += 1
        groups.append(torch.stack(views))
    return groups


def _add(seen: Seen, groups: list[Tensor]) -> None:
    described = []
    for views in groups:
        pixels_NCP = views.flatten(0, 1).flatten(2).double().numpy()
        count, channels, pixels = pixels_NCP.shape
        levels_NCP = np.minimum((pixels_NCP * BINS).astype(np.int64), BINS - 1)
        places = levels_NCP + BINS * np.arange(count * channels).reshape(count, channels, 1)
        histograms = np.bincount(places.ravel(), minlength=count * channels * BINS) / pixels
        parts = [pixels_NCP.mean(2), pixels_NCP.var(2), histograms.reshape(count, -1)]
        described.append(np.concatenate(parts, axis=1))
    if seen.numbers:
        seen.numbers = [np.concatenate(pair) for pair in zip(seen.numbers, described, strict=True)]
    else:
        seen.numbers, seen.shown = described, [views[:, :SHOWN] for views in groups]


def deviations(ours: Seen, theirs: Seen) -> list[np.ndarray]:
    """Per group, how far the means of all numbers lie apart, in standard errors of their difference."""
    apart = []
    for a, b in zip(ours.numbers, theirs.numbers, strict=True):
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        apart.append((a.mean(0) - b.mean(0)) / np.maximum(error, 1e-12))
    return apart


def draw(source: Source, spec: ViewSpec, path: Path) -> None:
    """A picture of both kinds of views side by side, of their histograms, and of what was done to them how often."""
    from matplotlib.figure import Figure

    ours, theirs = compare(source, spec)
    figure = Figure(figsize=(15, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.9, 1])  # pyright: ignore
    for axes, seen, title in zip(above.subplots(1, 2), (ours, theirs), ("dino_sd", "torchvision, Pillow"), strict=True):
        axes.imshow(crops_sheet(Crops([], [], seen.shown), bytes_=True)[0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{title}: views of {len(seen.shown[0][0])} images")
        axes.axis("off")
    channels = spec.channels
    histogram, shares = below.subplots(1, 2, width_ratios=[2, 1])
    centers = (np.arange(BINS) + 0.5) / BINS
    for channel, color in enumerate(("tab:red", "tab:green", "tab:blue")[:channels] if channels == 3 else ["black"]):
        for seen, style in ((ours, "-"), (theirs, ":")):
            numbers = np.concatenate([group[:, 2 * channels :] for group in seen.numbers]).mean(0)
            histogram.plot(centers, numbers.reshape(channels, BINS)[channel], style, color=color)
    views = sum(len(group) for group in ours.numbers)
    histogram.set(xlabel="pixel value", ylabel="share of the pixels", ylim=(0, None), yscale="linear")
    histogram.set_title(f"histograms of {views:,} views: dino_sd (lines), torchvision and Pillow (dots)")
    names = list(ours.shares)
    places = np.arange(len(names))
    shares.bar(places - 0.2, [ours.shares[name] for name in names], 0.4, label="dino_sd")
    shares.bar(
        places + 0.2, [theirs.shares[name] for name in names], 0.4, label="torchvision, Pillow", color="lightgray"
    )
    shares.set_xticks(places, names)
    shares.set(ylabel="share of the views")
    shares.legend()
    figure.savefig(path, dpi=72)
