"""Any folder of images is a source; what cannot be read says so in one line."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sd.data.decode import picture
from dino_sd.data.geometry import make_views
from dino_sd.data.source import open_source
from dino_sd.data.sources.fashion_mnist import CLASSES
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError

DEBIAN = "/usr/share/datasets/fashion-mnist"


def photo(seed=0, size=(40, 30), mode="RGB"):
    shape = (5, 4, 3) if mode == "RGB" else (5, 4)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def spec(channels=3):
    return ViewSpec((ViewGroup(2, (24, 24), (0.4, 1.0)), ViewGroup(2, (12, 12), (0.05, 0.4))), channels=channels)


def views_equal(one, other):
    pairs = zip([x for part in one for x in part], [x for part in other for x in part], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_class_folders_nested_and_flat_folders_give_the_same_views(tmp_path):
    for layout in ("flat", "classes", "nested"):
        for index in range(12):
            folders = {"flat": "", "classes": f"class{(index * 5) % 3}", "nested": f"all/{index % 2}/{index % 5}"}
            target = tmp_path / layout / folders[layout]
            target.mkdir(parents=True, exist_ok=True)
            photo(index).save(target / f"{index:02d}.png")
    sources = {layout: open_source(str(tmp_path / layout), 3) for layout in ("flat", "classes", "nested")}
    assert {len(source) for source in sources.values()} == {12}
    assert sources["flat"].classes is None and sources["flat"].labels() is None and sources["flat"].label(0) is None
    assert sources["nested"].classes is None
    assert sources["classes"].classes == ["class0", "class1", "class2"]
    assert sources["classes"].labels().tolist() == [(index * 5) % 3 for index in range(12)]
    assert sources["classes"].label(1) == 2
    views = [make_views(source, spec(), 3, 1, np.arange(12))[:2] for source in sources.values()]
    assert views_equal(views[0], views[1]) and views_equal(views[0], views[2])
    assert len({source.fingerprint() for source in sources.values()}) == 3


def test_images_beside_class_folders_mean_no_labels(tmp_path):
    for path in ("a/1.png", "b/2.png", "3.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        photo().save(tmp_path / path)
    assert open_source(str(tmp_path), 3).classes is None
    (tmp_path / "3.png").unlink()
    assert open_source(str(tmp_path), 3).classes == ["a", "b"]


def test_any_extension_hidden_files_and_links(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.PNG", "d.webp", "e.BMP", "f.tif", "g.TIFF", "h.gif"]
    for seed, name in enumerate(names):
        photo(seed).save(tmp_path / name)
    for name in ("notes.txt", ".hidden.png", "._a.JPG"):
        (tmp_path / name).write_text("not an image")
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    photo(9).save(outside / "i.png")
    (tmp_path / "linked").symlink_to(outside)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "j.png").symlink_to(outside / "i.png")
    source = open_source(str(tmp_path), 3)
    assert [os.path.basename(source.path(i)) for i in range(len(source))] == [*names, "i.png", "j.png"]
    for index in range(len(source)):
        assert source.image(index).shape == (3, 30, 40) and source.image(index).dtype == torch.uint8
    assert torch.equal(source.image(8), source.image(9))
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.image(4), source.image(4)) and again.path(7) == source.path(7)
    with pytest.raises(IndexError):
        source.path(10)


def read(path, channels=3):
    return open_source(str(path), channels).image(0)


def test_gray_files_as_one_and_three_channels(tmp_path):
    gray = photo(mode="L")
    gray.save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path, 1)[0], np.asarray(gray))
    assert np.array_equal(read(tmp_path, 3), np.stack([np.asarray(gray)] * 3))
    groups, _ = make_views(open_source(str(tmp_path), 1), spec(1), 0, 0, np.arange(1))[:2]
    assert groups[0].shape == (2, 1, 24, 24)


def test_colour_files_as_gray(tmp_path):
    photo().save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path, 1)[0], np.asarray(photo().convert("L")))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P with transparency", "CMYK"])
def test_modes_become_rgb_as_in_pillow(tmp_path, kind):
    image = photo()
    if kind == "RGBA":
        image.putalpha(photo(1, mode="L"))
    elif kind == "LA":
        image = image.convert("L")
        image.putalpha(photo(1, mode="L"))
    elif kind.startswith("P"):
        image = image.quantize(16)
        if "transparency" in kind:
            image.info["transparency"] = bytes(range(16))
    else:
        image = image.convert("CMYK")
    path = tmp_path / ("a.jpg" if kind == "CMYK" else "a.png")
    image.save(path)
    expected = np.asarray(Image.open(path).convert("RGBA" if kind.startswith("P") else "RGB").convert("RGB"))
    assert np.array_equal(read(tmp_path), expected.transpose(2, 0, 1))


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    for name in ("a.png", "b.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
    source = open_source(str(tmp_path), 1)
    for index in range(2):
        assert np.array_equal(source.image(index)[0], ramp)
        as_bytes = picture(Path(source.path(index)).read_bytes(), "", 1).decode(1)
        assert np.array_equal(as_bytes[0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(size=(64, 32)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    source = open_source(str(tmp_path), 3)
    upright = source.picture(0)
    assert (upright.height, upright.width) == ((64, 32) if orientation >= 5 else (32, 64))
    plain = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).permute(2, 0, 1)
    turned = {
        1: plain,
        2: plain.flip(2),
        3: plain.flip(1, 2),
        4: plain.flip(1),
        5: plain.transpose(1, 2),
        6: plain.transpose(1, 2).flip(2),
        7: plain.transpose(1, 2).flip(1, 2),
        8: plain.transpose(1, 2).flip(1),
    }[orientation]
    assert torch.equal(source.image(0), turned)
    assert upright.decode(2).shape == ((3, 32, 16) if orientation >= 5 else (3, 16, 32))


def test_jpegs_at_reduced_scale_give_nearly_the_same_crops(tmp_path, monkeypatch):
    photo(size=(803, 601)).save(tmp_path / "a.jpg", quality=95)
    source = open_source(str(tmp_path), 3)
    small = ViewSpec((ViewGroup(2, (32, 32), (0.4, 1.0)), ViewGroup(3, (16, 16), (0.05, 0.4))))
    shrinks = []
    original = source.picture

    def counted(index):
        found = original(index)
        return type(found)(found.height, found.width, lambda shrink: (shrinks.append(shrink), found.decode(shrink))[1])

    monkeypatch.setattr(source, "picture", counted)
    reduced, _ = make_views(source, small, 0, 0, np.arange(1))[:2]
    assert shrinks[0] > 1
    monkeypatch.setattr("dino_sd.data.geometry._SHRINKS", ())
    full, _ = make_views(source, small, 0, 0, np.arange(1))[:2]
    assert shrinks[1] == 1
    for one, other in zip(reduced, full, strict=True):
        # Boxes are rounded to the smaller image's pixels, which may move a crop by half of one.
        assert (one.float() - other.float()).abs().mean() < 6


def test_missing_empty_and_unknown_data(tmp_path):
    with pytest.raises(UserError, match="nowhere' does not exist.*fashion-mnist:train.*folder of images at any depth"):
        open_source(str(tmp_path / "nowhere"), 3)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"is a folder without images.*\(\.jpg .*\.gif"):
        open_source(str(tmp_path), 3)
    with pytest.raises(UserError, match="is a file"):
        open_source(str(tmp_path / "notes.txt"), 3)
    with pytest.raises(UserError, match="fashion-mnist:validation' has no such split"):
        open_source("fashion-mnist:validation", 1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, name, share):
    path = tmp_path / name
    photo(size=(200, 150)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    source = open_source(str(tmp_path), 3)
    for attempt in (lambda: source.image(0), lambda: source.picture(0).decode(4)):
        with pytest.raises(
            UserError, match=rf"{name}: (cannot be read as an image \(.+\)|is empty, 0 bytes)"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_a_text_file_and_a_vanished_file(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image at all")
    source = open_source(str(tmp_path), 3)
    with pytest.raises(UserError, match=r"a.jpg: cannot be read as an image \(no known image format\)"):
        source.image(0)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match="a.jpg: cannot be read .No such file"):
        source.image(0)


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_small_set_that_comes_with_the_package(split, per_class):
    source = open_source(f"fashion-mnist-mini:{split}", 1)
    assert source.stack is not None and source.stack.shape == (10 * per_class, 1, 28, 28)
    assert np.bincount(source.labels()).tolist() == [per_class] * 10
    assert source.classes == CLASSES and source.label(0) == source.labels()[0]
    colour = open_source(f"fashion-mnist-mini:{split}", 3)
    assert torch.equal(colour.image(5), source.image(5).expand(3, -1, -1))
    assert torch.equal(
        make_views(source, spec(1), 0, 0, np.arange(9))[0][1],
        make_views(colour, spec(3), 0, 0, np.arange(9))[0][1][:, :1],
    )


@pytest.mark.skipif(not os.path.isdir(DEBIAN), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_whole_set_and_its_cut(tmp_path, monkeypatch):
    monkeypatch.delenv("DINO_SD_FASHION_MNIST", raising=False)
    source, mini = open_source("fashion-mnist:test", 1), open_source("fashion-mnist-mini:test", 1)
    assert len(source) == 10_000
    for label in range(10):
        firsts = np.flatnonzero(source.labels() == label)[:200]
        assert torch.equal(source.stack[firsts], mini.stack[mini.labels() == label])
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copy(f"{DEBIAN}/{name}", tmp_path)
    assert open_source(f"fashion-mnist:test@{tmp_path}", 1).fingerprint() == source.fingerprint()
    monkeypatch.setenv("DINO_SD_FASHION_MNIST", str(tmp_path))
    assert len(open_source("fashion-mnist:test", 1)) == 10_000
    with pytest.raises(UserError, match="no Fashion-MNIST in .*train-images-idx3-ubyte"):
        open_source("fashion-mnist:train", 1)
    whole = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a whole idx file"):
        open_source("fashion-mnist:test", 1)


def test_an_offline_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("DINO_SD_FASHION_MNIST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("dino_sd.data.sources.fashion_mnist._DEBIAN", str(tmp_path / "none"))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(UserError, match="download failed .no route to host.*dataset-fashion-mnist.*train@FOLDER"):
        open_source("fashion-mnist:train", 1)
