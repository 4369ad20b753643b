"""The data sets of torchvision: `torchvision:CIFAR10:train`, `torchvision:Flowers102:test@FOLDER`."""

import difflib
import inspect
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_sd.data.decode import as_asked, pixels_of
from dino_sd.data.index import cache_folder
from dino_sd.data.source import BadImage, Picture, Source, StackSource, short_hash
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL

FORM = "torchvision:NAME:SPLIT[@FOLDER], a data set of torchvision"
_SPLITS = ("split", "image_set", "version", "classes")  # arguments that say which part; or `train`, true or false
_AT_ONCE = 4096  # images whose colours are converted


def open(spec: str, channels: int) -> Source | None:
    kind, _, rest = spec.partition(":")
    if kind != "torchvision":
        return None
    name, _, rest = rest.partition(":")
    split, _, folder = rest.partition("@")
    root = os.path.abspath(os.path.expanduser(folder)) if folder else str(cache_folder() / "torchvision")
    dataset = _made(_class(spec, name), spec, split, root)
    stack = _stack(dataset, channels, spec)
    labels_N, classes = _labels(dataset, len(dataset))
    if stack is not None:
        return StackSource(spec, stack, labels_N, classes)
    return TorchvisionSource(spec, dataset, root, channels, labels_N, classes)


class TorchvisionSource(Source):
    """A data set that is asked for each image when it is wanted. root: its folder. labels: int64 (N,) or None."""

    def __init__(
        self, name: str, dataset: Any, root: str, channels: int, labels: np.ndarray | None, classes: list[str] | None
    ):
        self.name, self.channels, self.classes, self._root = name, channels, classes, root
        self._dataset, self._labels = dataset, labels

    def __len__(self) -> int:
        return len(self._dataset)

    def picture(self, index: int) -> Picture:
        try:
            image = self._dataset[range(len(self))[index]][0]
            if not isinstance(image, Image.Image):
                raise ValueError(f"it is a {type(image).__name__}, no image")
            pixels_CHW = torch.from_numpy(as_asked(pixels_of(image, self.channels), self.channels, torch.uint8))
        except IndexError:
            raise
        except Exception as error:  # a decoder raises anything
            raise BadImage(self.path(index), f"cannot be read as an image ({_line(error)})") from error
        return Picture(pixels_CHW.shape[1], pixels_CHW.shape[2], lambda shrink: pixels_CHW)

    def files(self) -> list[str]:
        for attribute in ("_image_files", "imgs", "samples", "_samples", "images"):
            found = getattr(self._dataset, attribute, None)
            if not isinstance(found, list) or len(found) != len(self):
                continue
            paths = [str(one[0] if isinstance(one, tuple) else one) for one in found]
            if os.path.isfile(paths[0]):
                return paths
        return [self._root]

    def fingerprint(self) -> str:
        labels = b"" if self._labels is None else self._labels.tobytes()
        return short_hash(self.name.partition("@")[0].lower().encode(), str(len(self)).encode(), labels)


def _class(spec: str, name: str) -> type:
    """The class of torchvision that is called so, in any case. Raises UserError where there is none that will do."""
    from torchvision import datasets  # slow: it drags in every data set

    known = {known.lower(): getattr(datasets, known) for known in datasets.__all__}
    known = {
        key: each
        for key, each in known.items()
        if inspect.isclass(each) and key not in ("visiondataset", "imagefolder", "datasetfolder")
    }
    chosen = known.get(name.lower())
    if chosen is None:
        near = [known[key].__name__ for key in difflib.get_close_matches(name.lower(), list(known), 3)]
        raise UserError(
            f"data: '{spec}' names no data set of torchvision"
            + (f"; did you mean {' or '.join(near)}?" if near else f"; expected {FORM}")
        )
    arguments = list(inspect.signature(chosen).parameters.values())
    missing = [one.name for one in arguments if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    missing = [argument for argument in missing if argument not in ("root", *_SPLITS)]
    if missing:
        raise UserError(
            f"data: {chosen.__name__} of torchvision wants {', '.join(missing)}, which '{spec}' cannot say; name the "
            "folder of its images"
        )
    return chosen


def _made(chosen: type, spec: str, split: str, root: str) -> Any:
    """The data set, fetched where it is not there. Raises UserError where that fails, or there is no such split."""
    arguments: dict[str, Any] = {"root": root}
    parameters = inspect.signature(chosen).parameters
    if "root" not in parameters:  # FakeData
        arguments.clear()
    which = next((argument for argument in _SPLITS if argument in parameters), None)
    if which is not None:
        arguments[which] = split
    elif "train" in parameters:
        if split not in ("train", "test"):
            raise UserError(f"data: '{spec}' has no such split; expected torchvision:{chosen.__name__}:train|test")
        arguments["train"] = split == "train"
    # Some hand it on to the class they inherit from as one of **kwargs.
    constructors = [vars(each)["__init__"] for each in chosen.__mro__ if "__init__" in vars(each)]
    fetches = any("download" in inspect.signature(each).parameters for each in constructors)
    try:
        return chosen(**arguments, **({"download": False} if fetches else {}))
    except ValueError as error:  # of a split that there is not
        raise UserError(f"data: '{spec}' is refused by torchvision ({_line(error)})") from error
    except Exception as error:
        reason = error
    if fetches:
        try:
            os.makedirs(root, exist_ok=True)
            return chosen(**arguments, download=True)
        except Exception as error:  # a failing download raises anything
            reason = error
    raise UserError(
        f"data: {chosen.__name__} is not in '{root}'{' and could not be fetched' if fetches else ''} "
        f"({_line(reason)}); place its files there as torchvision wants them, or name their folder: "
        f"torchvision:{chosen.__name__}:{split}@FOLDER"
    ) from reason


def _stack(dataset: Any, channels: int, spec: str) -> torch.Tensor | None:
    """All images as uint8 (N, C, H, W), where the data set holds them as one array."""
    data = getattr(dataset, "data", None)
    data = data.numpy() if isinstance(data, torch.Tensor) else data
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or len(data) != len(dataset):
        return None
    if data.ndim == 3:
        data = data[:, None]
    elif data.ndim == 4 and data.shape[3] in (1, 3):
        data = data.transpose(0, 3, 1, 2)
    elif data.ndim != 4 or data.shape[1] not in (1, 3):
        return None
    # The conversion looks at the first axis for the channels, and leaves the others alone.
    try:
        parts = [
            as_asked(data[start : start + _AT_ONCE].swapaxes(0, 1), channels, torch.uint8).swapaxes(0, 1)
            for start in range(0, len(data), _AT_ONCE)
        ]
    except ValueError as error:
        raise UserError(f"data: '{spec}' {error}; use 1 or 3") from error
    return torch.from_numpy(np.concatenate(parts))


def _labels(dataset: Any, count: int) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels int64 (N,), classes) where the data set knows its labels without a look at the images, else Nones."""
    for attribute in ("targets", "_labels", "labels"):
        try:
            labels_N = np.asarray(getattr(dataset, attribute, None))
        except ValueError:  # lists of different lengths
            continue
        if labels_N.dtype.kind not in "iu" or labels_N.shape != (count,) or labels_N.max(initial=-1) < 0:
            continue
        names = getattr(dataset, "classes", None) or []
        names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        if len(names) <= labels_N.max():
            names = [str(label) for label in range(int(labels_N.max()) + 1)]
        return np.maximum(labels_N.astype(np.int64), NO_LABEL), names
    return None, None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
