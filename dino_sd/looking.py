"""What a model sees in images and videos, as files: the commands attention and pca."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from dino_sd.config import (
    AttentionSettings,
    PcaSettings,
)
from dino_sd.data.decode import EXTENSIONS
from dino_sd.data.source import BadImage, Source, open_source
from dino_sd.data.sources.glob import GlobSource
from dino_sd.data.statistics import evenly
from dino_sd.distributed import is_main, say, setup
from dino_sd.errors import UserError
from dino_sd.features import prepare
from dino_sd.pictures import attention_picture, components_sheet, patch_components
from dino_sd.progress import progress
from dino_sd.tiles import save
from dino_sd.video import FPS, VIDEO_EXTENSIONS, Clip, check_can_write, moves, open_clip, write_clip


def attention(spec: str | Path, images: Sequence[str], settings: AttentionSettings) -> list[Path]:
    """Writes what a ViT's class token attends to, a picture an image and a clip a video; returns their paths.

    Raises UserError for models without such attention and images that cannot be read.
    """
    model = prepare(spec, setup(settings.device), settings)
    if not is_main():
        return []
    clips, stills = [], []
    for image in images:
        video = moves(Path(image)) or (settings.frames and os.path.isdir(image))
        (clips if video else stills).append(image)
    draw = partial(
        attention_picture, model, size=settings.size, mass=settings.mass, heads=settings.heads, layer=settings.layer
    )
    written: list[Path] = []
    for clip in clips:
        written.append(_moving(draw, clip, model.channels, settings, written))
    chosen = _chosen(stills, model.channels, settings.limit)
    with progress("attention") as show:
        for done, (stem, image_CHW) in enumerate(_readable(chosen), 1):
            save(draw(image_CHW), path := _free(Path(settings.out), f"{stem}_attention", ".png", written))
            written.append(path)
            show(done, len(chosen))
    return written


def _moving(
    draw: Callable[..., Image.Image], name: str, channels: int, settings: AttentionSettings, written: list[Path]
) -> Path:
    """Draws a video; returns its path, which is none of those written."""
    video_file = name.lower().endswith(VIDEO_EXTENSIONS)
    suffix = f".{settings.format}" if settings.format != "auto" else ".mp4" if video_file else ".gif"
    check_can_write(suffix)
    clip = _frames(name, channels) if os.path.isdir(name) else open_clip(Path(name))
    if settings.limit and (clip.count or 0) > settings.limit * settings.every:
        say(f"{name}: its first {settings.limit * settings.every} of {clip.count:,} frames; limit=0 takes all")
    clip = clip.thinned(settings.every, settings.limit)
    path = _free(Path(settings.out), f"{Path(os.path.abspath(name)).stem}_attention", suffix, written)
    with progress(f"attention of {name}") as show:

        def drawn() -> Iterator[Image.Image]:
            first = None
            for done, frame in enumerate(clip.frames, 1):
                picture = draw(frame, side=240)
                first = first or picture.size
                if picture.size != first:
                    raise UserError(f"{name}: frame {done} has another shape than the first; a video needs one")
                yield picture
                show(done, clip.count or done)

        write_clip(drawn(), path, settings.fps or clip.fps)
    return path


def _frames(folder: str, channels: int) -> Clip:
    """The images of a folder by name, numbers in it as numbers: 9 before 10."""
    source = open_source(folder, channels)
    parts = [re.split(r"(\d+)", source.path(index)) for index in range(len(source))]
    keys = [[int(part) if part.isdigit() else part for part in name] for name in parts]
    order = sorted(range(len(source)), key=keys.__getitem__)
    return Clip((source.image(index) for index in order), len(order), FPS)


def pca(spec: str | Path, images: Sequence[str], settings: PcaSettings) -> list[Path]:
    """Writes the first three components of all images' patches as colours; returns the pictures' paths.

    Raises UserError for raw pixels and images that cannot be read.
    """
    model = prepare(spec, setup(settings.device), settings)
    if not is_main():
        return []
    folder, written = Path(settings.out), []
    chosen = list(_readable(_chosen(images, model.channels, settings.limit)))
    with progress("patches") as show:
        pictures = [image_CHW for _, image_CHW in chosen]
        drawn = patch_components(model, pictures, size=settings.size, layer=settings.layer, progress=show)
    for (stem, _), one in zip(chosen, drawn, strict=True):
        save(components_sheet([one], side=384), path := _free(folder, f"{stem}_pca", ".png", written))
        written.append(path)
    save(components_sheet(drawn), sheet := folder / "pca.png")
    return [*written, sheet]


def _chosen(specs: Sequence[str], channels: int, limit: int) -> list[tuple[Source, int]]:
    """The images that files, folders and DATA name, of each set at most `limit`."""
    chosen = []
    for spec in specs:
        path = os.path.abspath(os.path.expanduser(spec))
        if os.path.isfile(path) and path.lower().endswith(EXTENSIONS):
            source: Source = GlobSource(
                glob.escape(spec), os.path.dirname(path), channels, [os.fsencode(os.path.basename(path))]
            )
        else:
            source = open_source(spec, channels)
        indices = evenly(len(source), limit or len(source)).tolist()
        if len(indices) < len(source):
            say(f"{spec}: {len(indices)} of {len(source):,} images, evenly spaced; limit=0 takes all")
        chosen += [(source, index) for index in indices]
    return chosen


def _readable(chosen: list[tuple[Source, int]]) -> Iterator[tuple[str, Tensor]]:
    """(name for a file, image); what cannot be read is left out, and said. Raises BadImage where nothing can be."""
    bad: list[BadImage] = []
    for source, index in chosen:
        try:
            image_CHW = source.image(index)
        except BadImage as error:
            bad.append(error)
            continue
        yield re.sub(r"[^\w.+-]+", "_", Path(source.path(index)).stem).strip("_") or "image", image_CHW
    if bad and len(bad) == len(chosen):
        raise bad[0]
    for error in bad:
        say(f"warning: left out: {error}")


def _free(folder: Path, stem: str, suffix: str, written: list[Path]) -> Path:
    """A file's path in the folder that is none of those written."""
    names = (folder / f"{stem}{number}{suffix}" for number in ("", *(f"-{n}" for n in range(2, len(written) + 3))))
    return next(path for path in names if path not in written)
