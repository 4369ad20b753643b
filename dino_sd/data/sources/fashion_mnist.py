"""Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 gray images of 28x28 in ten classes, and a small cut of it."""

import gzip
import os
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from dino_sd.data.index import cache_folder
from dino_sd.data.source import StackSource
from dino_sd.errors import UserError

FORM = "fashion-mnist:train|test[@FOLDER], or fashion-mnist-mini:train|test (comes with the package)"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_DEBIAN = "/usr/share/datasets/fashion-mnist"
_PREFIX = {"train": "train", "test": "t10k"}


def open(spec: str, channels: int) -> StackSource | None:
    kind, _, rest = spec.partition(":")
    if kind not in ("fashion-mnist", "fashion-mnist-mini"):
        return None
    split, _, folder = rest.partition("@")
    if split not in _PREFIX or (folder and kind == "fashion-mnist-mini"):
        raise UserError(f"data: '{spec}' has no such split; expected {FORM}")
    images_NHW, labels_N = _mini(split) if kind == "fashion-mnist-mini" else _full(split, folder)
    stack = torch.from_numpy(images_NHW)[:, None].repeat(1, channels, 1, 1)
    return StackSource(spec, stack, labels_N.astype(np.int64), list(CLASSES))


def _mini(split: str) -> tuple[np.ndarray, np.ndarray]:
    with resources.files("dino_sd").joinpath("assets/fashion_mnist_mini.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def _full(split: str, folder: str) -> tuple[np.ndarray, np.ndarray]:
    asked = folder or os.environ.get("DINO_SD_FASHION_MNIST")
    for place in [asked] if asked else [_DEBIAN, cache_folder() / "FashionMNIST" / "raw"]:
        files = _idx_files(Path(place).expanduser(), split)
        if files:
            return read_idx(files[0], 3), read_idx(files[1], 1)
    if asked:
        raise UserError(f"data: no Fashion-MNIST in '{asked}': expected {_PREFIX[split]}-images-idx3-ubyte[.gz] there")
    _download(split)
    files = _idx_files(cache_folder() / "FashionMNIST" / "raw", split)
    assert files, "torchvision reported a download but left no idx files"
    return read_idx(files[0], 3), read_idx(files[1], 1)


def _idx_files(folder: Path, split: str) -> list[Path]:
    """The images' and the labels' file, or nothing unless both are there."""
    found = []
    for stem in (f"{_PREFIX[split]}-images-idx3-ubyte", f"{_PREFIX[split]}-labels-idx1-ubyte"):
        found += [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()][:1]
    return found if len(found) == 2 else []


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A file in MNIST's idx format, plain or gzipped -> uint8 array. Raises UserError where it is not a whole one."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = np.frombuffer(data, dtype=">i4", count=1 + dimensions)
        if header[0] != 0x0800 + dimensions:
            raise ValueError(f"magic number {header[0]:#x}")
        return np.frombuffer(data, dtype=np.uint8, offset=header.nbytes).reshape(header[1:]).copy()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"data: '{path}' is not a whole idx file ({error}); fetch it again") from error


def _download(split: str) -> None:
    from torchvision.datasets import FashionMNIST  # drags in every data set torchvision knows

    try:
        FashionMNIST(str(cache_folder()), train=split == "train", download=True)
    except Exception as error:  # a failing download raises anything
        raise UserError(
            f"data: Fashion-MNIST is neither in {_DEBIAN} nor in {cache_folder()}, and the download failed ({error}); "
            "install Debian's dataset-fashion-mnist, or name the folder of its idx files: "
            f"fashion-mnist:{split}@FOLDER or DINO_SD_FASHION_MNIST=FOLDER"
        ) from error
