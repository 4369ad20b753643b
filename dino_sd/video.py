"""Moving pictures: animated GIFs and WebPs with Pillow alone, video files with PyAV (extra: video)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from dino_sd.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_ANIMATED = (".gif", ".webp")
FPS = 10.0  # where nothing says it
_EXTRA = "pip install 'dino-sd[video]'"


@dataclass(frozen=True)
class Clip:
    """frames: one after the other, Pillow's or (C, H, W). count: how many, None where nobody knows. fps: a second."""

    frames: Iterable[Image.Image | Tensor]
    count: int | None
    fps: float

    def thinned(self, every: int, most: int) -> "Clip":
        """Each `every`-th frame at as many frames a second less, at most `most` of them (0: all)."""
        chosen = islice(self.frames, 0, every * most if most else None, every)
        count = None if self.count is None else -(-self.count // every)
        return Clip(chosen, min(count, most) if count is not None and most else count, self.fps / every)


def moves(path: Path) -> bool:
    """Whether a file is a video, or an image of several frames."""
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return True
    if path.suffix.lower() not in _ANIMATED:
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, UnidentifiedImageError):
        return False  # whoever reads it says what is wrong


def open_clip(path: Path) -> Clip:
    """A video or an animated image. Raises UserError where it cannot be read or PyAV is needed and not installed."""
    if path.suffix.lower() not in VIDEO_EXTENSIONS:
        image = Image.open(path)
        shown_ms = float(image.info.get("duration") or 1000 / FPS)
        return Clip(_frames(image, path), getattr(image, "n_frames", 1), 1000 / shown_ms)
    av = _pyav(f"{path} is a video file: reading it", "animated GIFs and folders of frames work without")
    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"{path}: cannot be read as a video ({_reason(error)})") from None
    return Clip(_decoded(av, container, path), stream.frames or None, float(stream.average_rate or FPS))


def write_clip(frames: Iterable[Image.Image], path: Path, fps: float) -> None:
    """Writes a .gif or an .mp4 (H.264), frame by frame. Raises UserError where that fails or PyAV is missing."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".mp4":
            _write_mp4(iter(frames), path, fps)
            return
        rest = iter(frames)
        first = next(rest)
        # Browsers take less than 20 ms for 100 ms.
        first.save(path, save_all=True, append_images=rest, duration=max(round(1000 / fps), 20), loop=0)
    except StopIteration:
        raise UserError(f"{path.stem}: holds no frames") from None
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror or error}); choose another folder") from None


def check_can_write(suffix: str) -> None:
    """Raises UserError, before any work is done, where PyAV is needed and not installed."""
    if suffix == ".mp4":
        _pyav("format=mp4", "or use format=gif")


def _pyav(what: str, otherwise: str) -> Any:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{what} needs PyAV: {_EXTRA}; {otherwise}") from None
    return av


def _frames(image: Image.Image, path: Path) -> Iterator[Image.Image]:
    try:
        for frame in ImageSequence.Iterator(image):
            yield frame.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read to its end ({_reason(error)})") from None


def _decoded(av: Any, container: Any, path: Path) -> Iterator[Image.Image]:
    try:
        for frame in container.decode(video=0):
            yield frame.to_image()
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot be read to its end as a video ({_reason(error)})") from None
    finally:
        container.close()


def _write_mp4(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    av = _pyav("format=mp4", "or use format=gif")
    first = next(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height = first.width // 2 * 2, first.height // 2 * 2  # its colours come in fours
        stream.pix_fmt = "yuv420p"
        for image in chain([first], frames):
            pixels_HWC = np.array(image)[: stream.height, : stream.width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")))
        container.mux(stream.encode())


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
