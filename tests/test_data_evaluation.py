"""Evaluation sees every image once, resized and cropped as torchvision does; mean and std are those of the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dino_sd.data.evaluation import eval_batches, resize_crop
from dino_sd.data.source import open_source
from dino_sd.data.statistics import mean_std
from dino_sd.errors import UserError


def picture(seed=0, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


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
        resize = v2.Resize(round(target / crop), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        expected = v2.CenterCrop(target)(resize(image))
        assert torch.equal(resize_crop(image, (target, target), crop), expected)
    assert resize_crop(image, (16, 48), 0.8).shape == (3, 16, 48)


@pytest.mark.parametrize("size", [(28, 28), (32, 32)])
def test_evaluation_covers_every_image_once_over_the_ranks(size):
    source = open_source("fashion-mnist-mini:test", 1)
    seen = []
    for rank in range(3):
        for images, labels, indices in eval_batches(source, size, 1.0, 20, 0, rank, 3, limit=100):
            assert images.dtype == torch.uint8 and images.shape[1:] == (1, *size) and len(images) <= 20
            assert (labels.numpy() == source.labels()[indices.numpy()]).all()
            seen += indices.tolist()
    assert seen == list(range(100))


def test_evaluation_without_labels_and_with_a_bad_file(tmp_path):
    for index in range(5):
        picture(index).save(tmp_path / f"{index}.png")
    source = open_source(str(tmp_path), 3)
    one, two = (list(eval_batches(source, (16, 16), 0.9, 2, workers)) for workers in (0, 2))
    assert [len(batch[0]) for batch in one] == [2, 2, 1] and all((batch[1] == -1).all() for batch in one)
    assert all(torch.equal(a, b) for a, b in zip(sum(one, ()), sum(two, ()), strict=True))
    (tmp_path / "3.png").write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(UserError, match="3.png: cannot be read as an image"):
            list(eval_batches(source, (16, 16), 0.9, 2, workers))
