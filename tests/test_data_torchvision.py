"""The data sets of torchvision are sources: no network is needed for what is on the disk, and none is asked for it."""

import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sd.data.decode import picture
from dino_sd.data.source import BadImage, StackSource, open_source
from dino_sd.data.sources.torchvision import TorchvisionSource
from dino_sd.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "cache"))


def offline(*arguments, **named):
    raise OSError("no route to host\nand no other")


def cifar(root, monkeypatch):
    """Files that torchvision takes for CIFAR-10, of three images."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for name in ["test_batch", *(f"data_batch_{number}" for number in range(1, 6))]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 0, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return pixels.reshape(3, 3, 32, 32), names


def test_a_set_in_one_array_becomes_a_stack(tmp_path, monkeypatch):
    pixels, names = cifar(tmp_path / "cache/torchvision", monkeypatch)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    source = open_source("torchvision:cifar10:test", 3)
    assert isinstance(source, StackSource) and source.stack is not None
    assert np.array_equal(source.stack, pixels)
    assert source.classes == names and source.labels().tolist() == [3, 0, 9]
    assert len(open_source("torchvision:CIFAR10:train", 3)) == 15
    gray = open_source("torchvision:CIFAR10:test", 1)
    expected = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in pixels]
    assert gray.stack.shape == (3, 1, 32, 32)
    assert np.abs(gray.stack[:, 0].numpy().astype(int) - np.stack(expected)).max() <= 1  # Pillow sums in 16 bits
    with pytest.raises(UserError, match=r"channels=5; use 1 or 3"):
        open_source("torchvision:CIFAR10:test", 5)


@pytest.mark.parametrize("layout", ["NHW", "NHW1", "NCHW"])
def test_arrays_of_any_layout(tmp_path, monkeypatch, layout):
    class Set:
        def __init__(self, root, split="train"):
            shape = {"NHW": (4, 8, 9), "NHW1": (4, 8, 9, 1), "NCHW": (4, 3, 8, 9)}[layout]
            self.data = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
            self.data = torch.from_numpy(self.data) if layout == "NHW" else self.data
            self.labels = torch.tensor([2, 0, 1, -1])

        def __len__(self):
            return 4

    monkeypatch.setattr("torchvision.datasets.SVHN", Set)
    source = open_source("torchvision:SVHN:train", 3)
    data = np.asarray(Set("").data)
    expected = data if layout == "NCHW" else np.broadcast_to(data.reshape(4, 1, 8, 9), (4, 3, 8, 9))
    assert np.array_equal(source.stack, expected)
    assert source.classes == ["0", "1", "2"] and source.labels().tolist() == [2, 0, 1, -1]


def test_a_set_of_files_is_read_lazily(tmp_path, monkeypatch):
    base = tmp_path / "root/imagenette2/train"
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        for split in ("train", "val"):
            target = base.parent / split / ("n01440764", "n02102040")[index % 2]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(target / f"{index}.JPEG")
    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    source = open_source(f"torchvision:Imagenette:val@{tmp_path}/root", 3)
    assert isinstance(source, TorchvisionSource) and len(source) == 4
    files = sorted((base.parent / "val").rglob("*.JPEG"))
    gray = open_source(f"torchvision:Imagenette:val@{tmp_path}/root", 1)
    for index, path in enumerate(files):
        assert torch.equal(source.image(index), picture(path.read_bytes(), "", 3).decode(1))
        # Not a JPEG's own gray: torchvision made it RGB.
        assert np.array_equal(gray.image(index)[0], np.asarray(Image.open(path).convert("RGB").convert("L")))
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.image(2), source.image(2)) and copy.fingerprint() == source.fingerprint()
    files[1].write_bytes(files[1].read_bytes()[:100])
    with pytest.raises(BadImage, match=r"\[1\]: cannot be read as an image"):
        source.image(1)
    with pytest.raises(IndexError):
        source.image(4)


def test_images_made_up_need_no_network_nor_a_split():
    source = open_source("torchvision:FakeData:train", 3)
    assert len(source) == 1000 and source.image(7).shape == (3, 224, 224) and source.labels() is None
    assert torch.equal(open_source("torchvision:fakedata:any", 3).image(7), source.image(7))
    assert open_source("torchvision:FakeData:train", 1).image(7).shape == (1, 224, 224)


def test_labels_come_without_a_look_at_the_images(monkeypatch):
    class Set:
        classes = [("tench", "Tinca tinca"), ("goldfish",)]
        targets = ["1.xml", "2.xml"]  # of other things than classes
        _labels = [1, 0]

        def __init__(self, root, image_set="train"):
            assert image_set == "val"

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise AssertionError("looked at")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", Set)
    source = open_source("torchvision:VOCDetection:val", 3)
    assert source.classes == ["tench, Tinca tinca", "goldfish"] and source.labels().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("torchvision:Cifar11:train", "names no data set of torchvision; did you mean CIFAR10 or"),
        ("torchvision:xyzzyxyz:train", "names no data set of torchvision; expected torchvision:NAME:SPLIT"),
        ("torchvision:ImageFolder:train", "names no data set of torchvision"),
        ("torchvision:CIFAR10:validation", r"has no such split; expected torchvision:CIFAR10:train\|test"),
        ("torchvision:Flowers102:dev", "is refused by torchvision .*train"),
        ("torchvision:CocoDetection:train", "CocoDetection of torchvision wants annFile, which .* cannot say"),
    ],
)
def test_what_is_not_there(spec, problem):
    with pytest.raises(UserError, match=problem) as caught:
        open_source(spec, 3)
    assert "\n" not in str(caught.value)


def test_an_offline_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    root = tmp_path / "cache/torchvision"
    problem = rf"CIFAR10 is not in '{root}' and could not be fetched \(no route to host\); place its files there .*"
    with pytest.raises(UserError, match=problem + "torchvision:CIFAR10:train@FOLDER") as caught:
        open_source("torchvision:CIFAR10:train", 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"ImageNet is not in '/nowhere' \(.*place its files there"):
        open_source("torchvision:ImageNet:train@/nowhere", 3)


def test_other_specs_do_not_wait_for_torchvision(tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "gone"), 3)
    assert time.monotonic() - began < 2
