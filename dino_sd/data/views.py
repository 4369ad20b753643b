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
    """Crops of one resolution. size: (height, width) in pixels; scale: share of the image's area, (low, high).

    center: makes the crops clean, as evaluation sees the image: this share of the largest centred box that has the
    aspect ratio of `size`, and nothing random; scale is then unused. Raises ValueError when it is not above 0 and at
    most 1.
    """

    count: int
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    center: float | None = None

    def __post_init__(self):
        if self.center is not None and not 0 < self.center <= 1:
            raise ValueError(f"center: {self.center} is no share of the side; above 0 and at most 1")


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image: groups of crops, the global group first, and the chances of what happens to them.

    blur and solarize hold one probability per view, over all groups in order; empty means never.
    brightness, contrast, saturation: factors are drawn from [1 - x, 1 + x]; hue: shift in turns from [-x, x].
    blur_sigma: pixels, (low, high). With channels != 3, hue, saturation and grayscale mean nothing and are dropped.
    randaugment: (operations, magnitude of 0 to 30), done to the crop before everything else (Cubuk et al. 2020).
    Views of clean groups get none of all this, whatever their probabilities say.
    The defaults are those of Caron et al. 2021. Raises ValueError when the probabilities are not one per view, or
    randaugment is out of range.
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
    randaugment: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("blur", "solarize"):
            probabilities = tuple(getattr(self, name)) or (0.0,) * self.views
            if len(probabilities) != self.views:
                raise ValueError(f"{name}: {len(probabilities)} probabilities for {self.views} views; one per view")
            object.__setattr__(self, name, probabilities)
        if self.randaugment is not None:
            operations, magnitude = self.randaugment
            if operations < 1 or not 0 <= magnitude <= 30:
                raise ValueError(
                    f"randaugment: {operations} operations of magnitude {magnitude}; at least 1, and 0 to 30"
                )

    @property
    def dropped(self) -> str:
        """The colour operations that were asked for and mean nothing for these channels, as words; else empty."""
        asked = {"hue": self.hue, "saturation": self.saturation, "grayscale": self.grayscale}
        names = [name for name, value in asked.items() if value and self.channels not in (1, 3)]
        return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))

    @property
    def views(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def clean(self) -> tuple[bool, ...]:
        """Which views are clean, over all groups in order."""
        return tuple(group.center is not None for group in self.groups for _ in range(group.count))
