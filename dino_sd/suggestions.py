"""Settings that fit a set of images, and what to mind about it, from what `inspect` has found."""

import json
import math
import shlex
from typing import Any

from dino_sd.config import Data
from dino_sd.recipe import read_recipe, recipes
from dino_sd.settings import read_pairs

RECIPE = "own_images"
_PATCH = 16  # of the recipe's model
_SQUARE_UP_TO = 1.5  # median aspect
_LOCAL = 0.43  # of the global crops' side: 96 / 224
_FEW = 1_000  # images
_MANY = 0.05  # share of images from which on something is worth a warning
_UNEQUAL = 10.0  # images of the largest class for one of the smallest
Sides = int | list[int]


def suggestions(report: dict[str, Any]) -> dict[str, Any] | None:
    """{settings: ["key=value", ...], command: a line for the shell}; None where no image can be read."""
    if report["mean"] is None:
        return None
    patch, whole, local = crop_sizes(report["shorter_side"]["median"], report["aspect"]["median"])
    colourless = all_gray(report)
    channels = 1 if colourless else report["channels"]
    mean, std = (rounded(report[name][:channels]) for name in ("mean", "std"))
    found: dict[str, Any] = {"channels": channels}
    if patch != _PATCH:
        found["model_args.patch_size"] = patch
    found |= {"views.global.size": whole, "views.local.size": local}
    if isinstance(whole, list):
        aspect = whole[1] / whole[0]
        found["views.ratio"] = [round(aspect * 3 / 4, 3), round(aspect * 4 / 3, 3)]
    found |= {"views.mean": mean, "views.std": std}
    if report["dtype"] != "uint8":
        found["views.range"] = rounded(report["range"])
    if report["images"] < _FEW:
        found |= {"epochs": 200, "terms.dino.prototypes": 1024}
    if read_recipe(recipes() / f"{RECIPE}.yaml")["batch_size"] > report["images"]:  # some steps an epoch
        found["batch_size"] = min(report["images"], max(4, 2 ** int(math.log2(report["images"] / 4))))
    pairs = [data_pair(report["data"]), *(f"{key}={value}" for key, value in found.items())]
    return {"settings": pairs, "command": shlex.join(["dino-sd", "train", RECIPE, *pairs])}


def crop_sizes(shorter: int, aspect: float) -> tuple[int, Sides, Sides]:
    """(patch size, global size, local size): sides in pixels, or [height, width], multiples of the patch size.

    shorter: median shorter side of the images in pixels; aspect: median width / height.
    """
    if shorter >= 224:
        patch, side, local = 16, 224, 96
    elif shorter >= 48:
        patch = 16 if shorter >= 100 else 8
        side = nearest(shorter, patch)
        local = nearest(_LOCAL * side, patch)
    else:
        patch = 7 if shorter >= 21 and shorter % 7 == 0 else 4
        side = max(shorter // patch, 2) * patch
        local = nearest(_LOCAL * side, patch)
    if max(aspect, 1 / aspect) <= _SQUARE_UP_TO:
        return patch, side, local
    longer = max(aspect, 1 / aspect)
    pairs = [[small, nearest(small * longer, patch)] for small in (side, local)]
    whole, local = pairs if aspect > 1 else [pair[::-1] for pair in pairs]
    return patch, whole, local


def nearest(side: float, patch: int) -> int:
    return max(round(side / patch), 1) * patch


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def data_pair(spec: str) -> str:
    """`data=SPEC` that is read as that text, also where YAML would take it for a number or a list."""
    pair = f"data={spec}"
    return pair if read_pairs([pair]) == {"data": spec} else f"data={json.dumps(spec)}"


def all_gray(report: dict[str, Any]) -> bool:
    """Three channels that are the same in every image."""
    return 0 < report["gray"] == report["seen"] - len(report["broken"])


def warnings(report: dict[str, Any]) -> list[str]:
    """One line each."""
    images, read = report["images"], report["seen"] - len(report["broken"])
    found = []
    if not read:
        return [f"none of {report['seen']:,} images can be read"]
    if images < _FEW:
        found.append(f"{images:,} images are few: below {_FEW:,}, start from public weights, e.g. "
                     "init=timm:vit_small_patch16_224.dino (downloads them)")  # fmt: skip
    found += of_share(
        "broken",
        len(report["broken"]),
        report["seen"],
        Data().most_bad,
        "training stops where more than data.most_bad are; repair or remove them",
    )
    _, whole, _ = crop_sizes(report["shorter_side"]["median"], report["aspect"]["median"])
    side = min(whole) if isinstance(whole, list) else whole
    if report["shorter_side"]["p5"] < side:
        found.append(f"more than 5% of the images are smaller than the global crops of {side} pixels and are enlarged")
    copies = report["duplicates"]["images"] + report["near_duplicates"]["images"]
    found += of_share("copies of others", copies, read, _MANY, "they count several times; keep one of each")
    found += of_share("flat", len(report["flat"]), read, _MANY, "there is nothing to learn from them")
    for key, name in (("duplicates", "the same image"), ("near_duplicates", "nearly the same image")):
        if count := report[key]["of_several_classes"]:
            found.append(f"{name} has several classes in {count:,} group(s): their labels contradict each other")
    if all_gray(report):
        found.append("all images are gray, read as three channels: channels=1 is cheaper")
    classes = report["classes"]
    if classes and classes["imbalance"] is None:
        empty = [name for name, count in classes["counts"].items() if not count]
        found.append(f"{len(empty)} class(es) without images, such as {empty[0]}")
    elif classes and classes["imbalance"] > _UNEQUAL:
        found.append(f"classes are very unequal: the largest is {classes['imbalance']:.3g} times the smallest")
    return found


def of_share(what: str, count: int, of: int, most: float, advice: str) -> list[str]:
    return [f"{count:,} of {of:,} images are {what} ({count / of:.0%}): {advice}"] if count > most * of else []
