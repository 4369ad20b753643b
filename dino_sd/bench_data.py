"""`dino-sd bench data`: how fast images become views, stage by stage, beside the same recipe of torchvision and Pillow.

Everything on one core unless more are asked for. Rounds of all that is compared take turns.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import functional as TF

from dino_sd import build, recipe
from dino_sd.allocator import reuse_freed_memory
from dino_sd.bench_views import MEAN, STD, PilRecipe, draw
from dino_sd.config import Config
from dino_sd.data.cache import cached
from dino_sd.data.files import FileSource
from dino_sd.data.geometry import make_views
from dino_sd.data.photometry import Photometry
from dino_sd.data.source import BadImage, Chosen, Source
from dino_sd.data.views import ViewSpec
from dino_sd.distributed import cores, pick_device
from dino_sd.errors import UserError
from dino_sd.speed import synchronize
from dino_sd.suggestions import data_pair

IMAGES = 70  # JPEGs made from the photographs
SIZE = (500, 375)  # width and height of the average ImageNet picture
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")  # of scikit-image


def photographs(folder: Path, count: int = IMAGES, size: tuple[int, int] = SIZE) -> None:
    """Writes JPEGs of `size` (width, height) made from the photographs that scikit-image and scikit-learn ship.

    Raises UserError where these are not installed.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError(
            f"bench data: {error.name} is not installed; name your own images (dino-sd bench data DATA), or install "
            f"the extra with pictures: pip install 'dino-sd[bench]'"
        ) from None
    pictures = [getattr(skimage.data, name)() for name in PHOTOGRAPHS] + list(load_sample_images().images)
    for number in range(count):
        image = Image.fromarray(pictures[number % len(pictures)]).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:04d}.jpg", quality=90)


def bench_data(
    data: str | None,
    pairs: list[str],
    feed: float | None = None,
    picture: Path | None = None,
    threads: int = 1,
    json_only: bool = False,
    rounds: int = 9,
) -> dict[str, Any]:
    """Prints and returns milliseconds an image of every stage, medians over the rounds, and what follows from them.

    data: images; None: 500x375 JPEGs made for it. feed: images/s that are wanted. picture: file for `draw`. threads:
    cores to work on. json_only: stdout gets exactly one JSON object, the table is on stderr.
    """
    cfg = recipe.load_config("own_images", [*pairs, "data=none" if data is None else data_pair(data)])
    spec, device = build.view_spec(cfg), pick_device(cfg.device)
    with tempfile.TemporaryDirectory() as scratch, on_cores(threads):
        if data is None:
            (Path(scratch) / "images").mkdir()
            photographs(Path(scratch) / "images")
            cfg = recipe.load_config("own_images", [*pairs, f"data={scratch}/images"])
        source = build.open_data(cfg)
        batch = min(cfg.batch_size, len(source))
        raw = cached_part(source, Path(scratch), cfg.data.cache_side, batch)
        times = measure(source, raw, spec, device, batch, rounds)
        if "pil" in times:
            times["pil"] /= threads  # it runs on one, in a process for each
        if picture is not None:
            draw(source, spec, picture)
    report = summary(times)
    show(Console(width=max(Console().width, 110), stderr=json_only, markup=False, emoji=False, highlight=False),
         cfg, source, device, report, feed, threads)  # fmt: skip
    report = {"milliseconds": times, **report}
    if json_only:
        print(json.dumps(report), flush=True)
    return report


@contextmanager
def on_cores(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    reuse_freed_memory()  # as train does on a CPU
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cached_part(source: Source, scratch: Path, side: int, batch: int) -> Source | None:
    """The first images as raw copies; None for images that are in memory anyway."""
    if source.stack is not None:
        return None
    some = Chosen(source, np.arange(min(len(source), 2 * batch)))
    return cached(some, scratch / "raw", side)


def measure(
    source: Source, raw: Source | None, spec: ViewSpec, device: torch.device, batch: int, rounds: int
) -> dict[str, float]:
    """{stage: milliseconds an image}; `pil` is the published recipe, all stages of it."""
    photometry = Photometry(spec, MEAN[:1] * spec.channels, STD[:1] * spec.channels)
    parts: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        synchronize(device)
        began = time.perf_counter()
        yield
        synchronize(device)
        parts.setdefault(name, []).append((time.perf_counter() - began) / batch * 1e3)

    pil = PilRecipe(spec) if spec.channels in (1, 3) and source.dtype == torch.uint8 else None
    known = readable(source, (rounds + 1) * batch)
    for number in range(rounds + 1):
        indices = known[(np.arange(batch) + number * batch) % len(known)]
        if isinstance(source, FileSource):
            with timed("read"):
                files = [source.read(index) for index in indices.tolist()]
            with timed("read and decode"):
                for index in indices.tolist():
                    source.image(index)
            if pil is not None:
                with timed("pil"):
                    for data in files:
                        pil(opened(data, spec.channels))
        elif pil is not None:
            images = [TF.to_pil_image(source.image(index)) for index in indices.tolist()]
            with timed("pil"):
                for image in images:
                    pil(image)
        with timed("stage one"):
            views = make_views(source, spec, 0, number, indices)
        if raw is not None:
            with timed("stage one, raw"):
                make_views(raw, spec, 0, number, indices % len(raw))
        with timed("transfer"):
            groups = hand_over(views.groups, device)
        with timed("photometry"):
            for crops, rows in zip(groups, views.rows, strict=True):
                photometry(crops, rows)
        if number == 0:
            parts.clear()  # the first round warms up
    return {name: statistics.median(values) for name, values in parts.items()}


def readable(source: Source, most: int) -> np.ndarray:
    """Indices of the first images, at most so many, without those that cannot be read. Raises UserError on none."""
    indices, reason = [], ""
    for index in range(min(len(source), most)):
        try:
            source.image(index)
            indices.append(index)
        except BadImage as error:
            reason = reason or str(error)
    if not indices:
        raise UserError(f"bench data: no image of '{source.name}' can be read; {reason}")
    return np.array(indices)


def hand_over(groups: list[Tensor], device: torch.device) -> list[Tensor]:
    """What a batch costs on its way: into memory that processes share, and to the device."""
    return [crops.clone().share_memory_().to(device) for crops in groups]


def opened(data: bytes, channels: int) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L")


def summary(times: dict[str, float]) -> dict[str, Any]:
    """Images/s a core, and against the published recipe in the same rounds."""
    totals = {"elsewhere": times["stage one"], "one_core": times["stage one"] + times["photometry"]}
    if "stage one, raw" in times:
        totals |= {"raw": times["stage one, raw"], "raw_one_core": times["stage one, raw"] + times["photometry"]}
    if "pil" in times:
        totals["pil"] = times["pil"]
    speeds = {name: 1e3 / milliseconds for name, milliseconds in totals.items()}
    ratios = {name: speed / speeds["pil"] for name, speed in speeds.items() if name != "pil"} if "pil" in times else {}
    decode = times.get("read and decode", 0.0) - times.get("read", 0.0)
    stages = {
        "read": times.get("read", 0.0), "decode": decode,
        "crop": max(0.0, times["stage one"] - times.get("read and decode", 0.0)),
        "transfer": times["transfer"], "photometry": times["photometry"],
    }  # fmt: skip
    return {
        "images_per_s": speeds,
        "times_pil": ratios,
        "stages": stages,
        "limit": max(stages, key=lambda k: stages[k]),
    }


def show(
    console: Console,
    cfg: Config,
    source: Source,
    device: torch.device,
    report: dict[str, Any],
    feed: float | None,
    threads: int,
) -> None:
    spec = build.view_spec(cfg)
    crops = " + ".join(f"{group.count}x{group.size[0]}" for group in spec.groups)
    table = Table(title=f"{source.name}: {len(source):,} images, {crops}, {threads} core(s)", title_justify="left")
    for column in ("stage", "ms an image", "images/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, milliseconds in report["stages"].items():
        table.add_row(name, f"{milliseconds:.2f}", f"{1e3 / milliseconds:,.0f}" if milliseconds else "")
    table.add_section()
    rows = {
        "elsewhere": f"read to crop (photometry elsewhere{', on ' + device.type if device.type != 'cpu' else ''})",
        "one_core": "all here", "raw": "read to crop from raw copies", "raw_one_core": "all, from raw copies",
        "pil": "torchvision's transforms on Pillow images",
    }  # fmt: skip
    for name, speed in report["images_per_s"].items():
        against = f"  x {report['times_pil'][name]:.1f}" if name in report["times_pil"] else ""
        table.add_row(rows[name] + against, f"{1e3 / speed:.2f}", f"{speed:,.0f}")
    console.print(table)
    stage_one = report["images_per_s"]["elsewhere"]
    console.print(f"the most time goes into {report['limit']}; torch {torch.__version__}, {cores()} core(s) here")
    wanted = [feed] if feed else [500, 1000, 3500]
    for rate in wanted:
        needed = f"{rate:,.0f} images/s need {threads * rate / stage_one:.1f} cores"
        if "raw" in report["images_per_s"]:
            needed += f", or {threads * rate / report['images_per_s']['raw']:.1f} with data.cache=DIR"
        console.print(needed)
