"""What views of an image are asked for, and the layout of the row of numbers that stage one hands to stage two."""

from dataclasses import dataclass
from enum import IntEnum


class Row(IntEnum):
    """Columns of a crop's photometric parameters (float32). One crop's row says all that stage two does to it."""

    BRIGHTNESS = 0  # factors; 1 leaves the crop as it is
    CONTRAST = 1
    SATURATION = 2
    HUE = 3  # shift in turns, -0.5 to 0.5
    FIRST = 4  # which of the four (0 brightness, 1 contrast, 2 saturation, 3 hue) is done first, second, ...
    SECOND = 5
    THIRD = 6
    FOURTH = 7
    JITTERED = 8  # flags, 0 or 1
    GRAYSCALE = 9
    SOLARIZE = 10
    SIGMA = 11  # of the Gaussian blur, in pixels of the crop; 0 is none


@dataclass(frozen=True)
class ViewGroup:
    """Crops of one resolution. size: (height, width) in pixels; scale: share of the image's area, (low, high)."""

    count: int
    size: tuple[int, int]
    scale: tuple[float, float]


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image: groups of crops, the global group first, and the chances of what happens to them.

    blur and solarize hold one probability per view, over all groups in order; empty means never.
    brightness, contrast, saturation: factors are drawn from [1 - x, 1 + x]; hue: shift in turns from [-x, x].
    blur_sigma: pixels, (low, high). With channels != 3, hue, saturation and grayscale mean nothing and are dropped.
    The defaults are those of Caron et al. 2021. Raises ValueError when the probabilities are not one per view.
    """

    groups: tuple[ViewGroup, ...]
    channels: int = 3
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, ...] = ()
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("blur", "solarize"):
            probabilities = tuple(getattr(self, name)) or (0.0,) * self.views
            if len(probabilities) != self.views:
                raise ValueError(f"{name}: {len(probabilities)} probabilities for {self.views} views; one per view")
            object.__setattr__(self, name, probabilities)

    @property
    def views(self) -> int:
        return sum(group.count for group in self.groups)
