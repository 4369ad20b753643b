"""Evaluation sees every image once, resized and cropped as torchvision does; mean and std are those of the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dino_sd.data.evaluation import eval_batches, resize_crop
from dino_sd.data.geometry import make_views
from dino_sd.data.source import open_source
from dino_sd.data.statistics import statistics
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError


def picture(seed=0, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mean_std(source):
    found = statistics(source)
    assert (found.low, found.high, found.bad) == (0, 1, [])
    return found.mean, found.std


def test_mean_and_std(tmp_path):
    stack = open_source("fashion-mnist-mini:test", 1)
    pixels = stack.stack.double() / 255
    mean, std = mean_std(stack)
    assert mean == pytest.approx([pixels.mean().item()]) and std == pytest.approx([pixels.std(correction=0).item()])
    for index in range(3):
        picture(index, size=(300, 200)).save(tmp_path / f"{index}.jpg", quality=95)
    files = open_source(str(tmp_path), 3)
    pixels = torch.stack([files.image(index) for index in range(3)]).double() / 255
    mean, std = mean_std(files)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=2e-3)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=0.02)
    assert (mean, std) == mean_std(files)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (90, 400)])
def test_evaluation_crop_equals_torchvisions(size):
    image = torch.from_numpy(np.array(picture(size=size))).permute(2, 0, 1)
    for target, crop in ((224, 0.875), (32, 1.0), (28, 0.9)):
        resize = v2.Resize(int(target / crop), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        expected = v2.CenterCrop(target)(resize(image))
        assert torch.equal(resize_crop(image, (target, target), crop), expected)
    assert resize_crop(image, (16, 48), 0.8).shape == (3, 16, 48)


@pytest.mark.parametrize("size", [(28, 28), (32, 32)])
def test_evaluation_covers_every_image_once_over_the_ranks(size):
    source = open_source("fashion-mnist-mini:test", 1)
    seen = []
    for rank in range(3):
        for images, labels, indices in eval_batches(source, size, 1.0, 20, 0, rank, 3):
            assert images.dtype == torch.uint8 and images.shape[1:] == (1, *size) and len(images) <= 20
            assert (labels.numpy() == source.labels()[indices.numpy()]).all()
            seen += indices.tolist()
    assert seen == list(range(len(source)))


def test_evaluation_without_labels_and_with_a_bad_file(tmp_path, capsys):
    for index in range(5):
        picture(index).save(tmp_path / f"{index}.png")
    source = open_source(str(tmp_path), 3)
    one, two = (list(eval_batches(source, (16, 16), 0.9, 2, workers)) for workers in (0, 2))
    assert [len(batch[0]) for batch in one] == [2, 2, 1] and all((batch[1] == -1).all() for batch in one)
    assert all(torch.equal(a, b) for a, b in zip(sum(one, ()), sum(two, ()), strict=True))
    (tmp_path / "3.png").write_bytes(b"")
    for workers in (0, 2):
        rest = list(eval_batches(source, (16, 16), 0.9, 2, workers))
        assert [batch[2].tolist() for batch in rest] == [[0, 1], [2], [4]] and torch.equal(rest[2][0], one[2][0])
        assert "1 image(s)" in (said := capsys.readouterr().err) and "3.png (is empty, 0 bytes)" in said
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image of .* can be read; the first, .*0.png: is empty"):
        list(eval_batches(source, (16, 16), 0.9, 2, 0))


def clean_views(source, size, crop):
    spec = ViewSpec((ViewGroup(2, size, (0.4, 1.0)), ViewGroup(1, size, center=crop)), source.channels)
    return make_views(source, spec, 0, 0, np.arange(min(len(source), 50)))[0][1]


def test_a_clean_view_is_the_evaluation_image():
    source = open_source("fashion-mnist-mini:train", 1)
    images, _, _ = next(eval_batches(source, (28, 28), 1.0, 50))
    assert torch.equal(clean_views(source, (28, 28), 1.0), images)
    # Resized, it is the same but for the rounding of the weights.
    for size in ((32, 32), (14, 14), (16, 28)):
        images, _, _ = next(eval_batches(source, size, 1.0, 50))
        assert (clean_views(source, size, 1.0).int() - images.int()).abs().max() <= 2


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_a_clean_view_of_a_file_is_nearly_the_evaluation_image(tmp_path, extension):
    sizes = [(256, 256), (300, 200), (90, 400), (40, 30), (640, 480)]
    for index, size in enumerate(sizes):
        picture(index, size).save(tmp_path / f"{index}.{extension}")
    source = open_source(str(tmp_path), 3)
    for size, crop in (((32, 32), 1.0), ((28, 28), 0.875), ((24, 36), 0.75)):
        images, _, _ = next(eval_batches(source, size, crop))
        views = clean_views(source, size, crop)
        # Boxes are of whole pixels, of JPEGs decoded at less: crops are moved by at most half of one.
        difference_B = (views.float() - images.float()).abs().mean((1, 2, 3))
        assert difference_B.max() < (2 if extension == "png" else 4), difference_B
        assert (views.flip(-1).float() - images.float()).abs().mean() > 50


@pytest.mark.parametrize("kind", ["stack", "folder"])
def test_a_clean_group_changes_no_other_view_and_none_of_them_changes_it(tmp_path, kind):
    for index in range(6):
        picture(index, (803, 601)).save(tmp_path / f"{index}.jpg")
    source = open_source("fashion-mnist-mini:test", 1) if kind == "stack" else open_source(str(tmp_path), 3)
    # Clean views of a small box: if they had a say in the scale that JPEGs are decoded at, the others would change.
    augmented = (ViewGroup(2, (32, 32), (0.6, 1.0)), ViewGroup(1, (16, 16), (0.3, 0.4)))
    clean = ViewGroup(1, (96, 96), center=0.2)
    arguments = {"channels": source.channels, "randaugment": (1, 9), "blur": (1.0, 0.5, 0.5)}
    crops, rows = make_views(source, ViewSpec(augmented, **arguments), 1, 2, np.arange(6))[:2]
    arguments["blur"] = (*arguments["blur"], 1.0)
    more_crops, more_rows = make_views(source, ViewSpec((*augmented, clean), **arguments), 1, 2, np.arange(6))[:2]
    for one, other in zip(crops + rows, more_crops[:2] + more_rows[:2], strict=True):
        assert torch.equal(one, other)
    alone, _ = make_views(source, ViewSpec((clean,), channels=source.channels), 7, 8, np.arange(6))[:2]
    assert torch.equal(alone[0], more_crops[2])
