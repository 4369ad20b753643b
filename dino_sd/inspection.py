"""What is in a set of images, what is wrong with it, and which settings fit it."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dino_sd import sheets
from dino_sd.config import InspectSettings
from dino_sd.data.duplicates import flat, nearly_same, same
from dino_sd.data.looks import look, open_with_its_channels
from dino_sd.data.source import Source, name_of, open_source
from dino_sd.data.statistics import combine, evenly
from dino_sd.distributed import cores
from dino_sd.settings import plain
from dino_sd.shapes import NO_LABEL
from dino_sd.suggestions import suggestions, warnings

_WORTH_WORKERS = 256  # images; fewer are looked at sooner than workers start
_LINES, _GROUPS, _OF_GROUP = 20, 5, 4  # broken images, groups and images of a group that are printed; JSON has all
_ROW = re.compile(r"\[\d+\]$")  # of a table that holds images
_SIZES = ("height", "width", "shorter_side", "aspect")


def inspect(spec: str, settings: InspectSettings, json_only: bool = False) -> dict[str, Any]:
    """Looks at the images of DATA; returns what is known of them, as it is written with --json.

    Prints a table and draws a picture; json_only: stdout gets exactly one JSON object, the rest is on stderr. Broken
    images are part of what is found. Raises UserError where there is no such set, or the picture cannot be written.
    """
    source = open_with_its_channels(spec) if settings.channels is None else open_source(spec, settings.channels)
    chosen_n = evenly(len(source), settings.limit or len(source))
    workers = settings.workers
    if workers == "auto":
        workers = 0 if source.stack is not None or len(chosen_n) < _WORTH_WORKERS else cores()
    looks, bad = look(source, chosen_n, workers)
    pixels = of_pixels(looks, source.dtype)
    exact, near, blank = copies(looks, settings.near, usual_span(pixels["std"], source.dtype))
    report: dict[str, Any] = {
        "data": spec, "images": len(source), "seen": len(chosen_n), "channels": source.channels,
        "dtype": name_of(source.dtype), "fingerprint": source.fingerprint(),
        **of_files(source, looks), **of_sizes(looks), "classes": of_classes(source),
        **pixels, "duplicates": described(source, looks, exact), "near_duplicates": described(source, looks, near),
        "flat": paths_of(source, looks, blank),
        "broken": [{"index": index, "where": where, "reason": reason} for index, where, reason in bad],
    }  # fmt: skip
    report |= {"suggestions": suggestions(report), "warnings": warnings(report)}
    report |= {"picture": settings.out, "settings": plain(settings)}
    if settings.out is not None:
        groups = [looks["index"][group].tolist() for group in near]
        sheets.save(sheets.overview(source, chosen_n, looks, groups), Path(settings.out))
    console = Console(stderr=json_only, markup=False, highlight=False, emoji=False, soft_wrap=True)
    print_report(console, printable(report))
    if json_only:
        print(json.dumps(report), flush=True)
    return report


def of_files(source: Source, looks: np.ndarray) -> dict[str, Any]:
    """Kinds of files and their bytes, of those that can be read."""
    bytes_n = looks["bytes"][looks["bytes"] >= 0]
    paths = [source.path(index) for index in looks["index"].tolist()] if len(bytes_n) else []
    return {
        "extensions": counted(os.path.splitext(_ROW.sub("", path))[1].lower() for path in paths),
        "modes": counted(mode.decode() for mode in looks["mode"].tolist()),
        "bytes": {"seen": int(bytes_n.sum()), **(spread(bytes_n) or {})} if len(bytes_n) else None,
    }


def counted(names: Any) -> dict[str, int]:
    """Most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def spread(values_n: np.ndarray) -> dict[str, Any] | None:
    """Numbers that are among the values, so that a median of sizes is one; None of nothing."""
    if not len(values_n):
        return None
    shares = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    return {name: np.percentile(values_n, share, method="nearest").item() for name, share in shares.items()}


def of_sizes(looks: np.ndarray) -> dict[str, Any]:
    height_n, width_n = looks["height"], looks["width"]
    return {
        "height": spread(height_n), "width": spread(width_n), "shorter_side": spread(np.minimum(height_n, width_n)),
        "aspect": spread(width_n / height_n),
    }  # fmt: skip


def of_classes(source: Source) -> dict[str, Any] | None:
    """Images of each class of the whole set. imbalance: the largest over the smallest, None where one is empty."""
    labels_N = source.labels()
    if labels_N is None:
        return None
    known = labels_N[labels_N != NO_LABEL]
    names = source.classes or [str(label) for label in range(int(known.max(initial=-1)) + 1)]
    counts = np.bincount(known, minlength=len(names)).tolist()
    return {
        "counts": dict(zip(names, counts, strict=True)), "unlabelled": int(len(labels_N) - len(known)),
        "imbalance": max(counts) / min(counts) if counts and min(counts) else None,
    }  # fmt: skip


def of_pixels(looks: np.ndarray, dtype: torch.dtype) -> dict[str, Any]:
    """mean, std, range as in `statistics`; gray: images of three channels without colour."""
    found = {"mean": None, "std": None, "range": None, "gray": int(looks["gray"].sum())}
    if len(looks):
        measured = combine(torch.from_numpy(looks["moments"].copy()), dtype, [])
        found |= {"mean": measured.mean, "std": measured.std, "range": [measured.low, measured.high]}
    return found


def usual_span(std: list[float] | None, dtype: torch.dtype) -> float:
    """From dark to bright: all there is of bytes, four standard deviations of others, whose brightest may be alone."""
    return 1.0 if std is None or dtype == torch.uint8 else 4 * sum(std) / len(std)


def copies(looks: np.ndarray, near: int, span: float) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """(groups of the same images, of images nearly the same, flat images), as places in looks.

    The first of each group of the same stands for the others when it is about nearly the same.
    """
    exact = same(looks["digest"])
    is_flat = flat(looks["thumbnail"], span)
    asked = ~is_flat
    asked[[place for group in exact for place in group[1:]]] = False
    places = np.flatnonzero(asked)
    nearly = nearly_same(looks["thumbnail"][places], near, span)
    return exact, [places[group].tolist() for group in nearly], np.flatnonzero(is_flat).tolist()


def paths_of(source: Source, looks: np.ndarray, places: list[int]) -> list[str]:
    return [source.path(index) for index in looks["index"][places].tolist()]


def described(source: Source, looks: np.ndarray, groups: list[list[int]]) -> dict[str, Any]:
    """images: beyond one of each group. of_several_classes: groups whose labels contradict each other."""
    labels_N = source.labels()
    labels = [
        set() if labels_N is None else {*labels_N[looks["index"][group]].tolist()} - {NO_LABEL} for group in groups
    ]
    return {
        "images": sum(len(group) - 1 for group in groups), "of_several_classes": sum(len(own) > 1 for own in labels),
        "groups": [paths_of(source, looks, group) for group in groups],
    }  # fmt: skip


def print_report(console: Console, report: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows_of(report):
        table.add_row(*row)
    console.print(table)
    broken = report["broken"]
    if broken:
        console.print("\nbroken")
        for item in broken[:_LINES]:
            console.print(f"  {item['where']}: {item['reason']}")
        if len(broken) > _LINES:
            console.print(f"  and {len(broken) - _LINES:,} more; --json lists them all")
    for title, key in (("duplicates", "duplicates"), ("near duplicates", "near_duplicates")):
        groups = report[key]["groups"]
        if groups:
            console.print(f"\n{title}")
        for group in groups[:_GROUPS]:
            console.print(f"  {', '.join(group[:_OF_GROUP])}" + (", ..." if len(group) > _OF_GROUP else ""))
        if len(groups) > _GROUPS:
            console.print(f"  and {len(groups) - _GROUPS:,} more groups; --json lists them all")
    if report["warnings"]:
        console.print("\nwarnings")
    for warning in report["warnings"]:
        console.print(f"  {warning}")
    if report["suggestions"]:
        console.print(f"\nsettings that fit\n  {report['suggestions']['command']}")
    if report["picture"]:
        console.print(f"\npicture: {report['picture']}")


def printable(found: Any) -> Any:
    """The same with names of files that are not UTF-8 spelt out, which a terminal would refuse."""
    if isinstance(found, str):
        return found.encode("utf-8", "backslashreplace").decode()
    if isinstance(found, dict):
        return {printable(key): printable(value) for key, value in found.items()}
    return [printable(item) for item in found] if isinstance(found, list) else found


def rows_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table says, as (what, text)."""
    seen, bytes_, classes = report["seen"], report["bytes"], report["classes"]
    whole = seen == report["images"]
    rows = [("images", f"{report['images']:,}" + ("" if whole else f", {seen:,} of them looked at; limit=0: all"))]
    if bytes_:
        total = bytes_["seen"] if whole else bytes_["seen"] / (seen - len(report["broken"])) * report["images"]
        rows.append(("bytes", f"{'' if whole else 'about '}{size(total)}, {size(bytes_['median'])} a file (median)"))
        rows.append(("files", listed(report["extensions"])))
    rows += [("modes", listed(report["modes"])), *((name.replace("_", " "), ranged(report[name])) for name in _SIZES)]
    rows.append(("read as", f"{report['channels']} channel(s) of {report['dtype']}"))
    if classes is None:
        rows.append(("classes", "none: no labels"))
    else:
        ordered = sorted(classes["counts"].items(), key=lambda item: -item[1])
        (most, largest), (fewest, smallest) = ordered[0], ordered[-1]
        ends = f"{largest:,} each" if largest == smallest else f"{largest:,} in {most} to {smallest:,} in {fewest}"
        unlabelled = f"; {classes['unlabelled']:,} images without a label" if classes["unlabelled"] else ""
        rows.append(("classes", f"{len(ordered)}, {ends}{unlabelled}"))
    for key in ("duplicates", "near_duplicates"):
        copied, groups = report[key]["images"], len(report[key]["groups"])
        rows.append(
            (key.replace("_", " "), f"{copied:,} beyond one of each of {groups:,} group(s)" if copied else "none")
        )
    rows.append(("flat", f"{len(report['flat']):,}"))
    rows.append(("broken", f"{len(report['broken']):,}"))
    for name in ("mean", "std"):
        rows.append((name, "unknown" if report[name] is None else " ".join(f"{value:.4g}" for value in report[name])))
    return [*rows, ("fingerprint", report["fingerprint"])]


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or 'no extension'} ({count:,})" for name, count in counts.items()) or "none"


def ranged(found: dict[str, Any] | None) -> str:
    if found is None:
        return "unknown"
    low, p5, median, p95, high = (f"{found[name]:.4g}" for name in ("min", "p5", "median", "p95", "max"))
    if low == high:
        return f"{low}, all"
    return f"{low} to {high}, median {median}, nine in ten {p5} to {p95}"


def size(bytes_: float) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while bytes_ >= 1000 and power < len(units) - 1:
        bytes_, power = bytes_ / 1000, power + 1
    return f"{bytes_:.3g} {units[power]}"
