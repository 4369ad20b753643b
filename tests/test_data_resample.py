"""Crops equal Pillow's: cut, then resize with BICUBIC."""

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sd.data.geometry import crop_resize
from dino_sd.data.resample import cubic_weights, resample_stack


def pillow(image_CHW, box, size, mirrored=False):
    top, left, height, width = box
    planes = []
    for plane in image_CHW.numpy():
        crop = Image.fromarray(plane).crop((left, top, left + width, top + height))
        # In two calls: which direction comes first, and so what is clamped between, differs between Pillow's versions.
        narrow = crop.resize((size[1], height), Image.Resampling.BICUBIC)
        planes.append(np.array(narrow.resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(int))
    result = np.stack(planes)
    return result[..., ::-1] if mirrored else result


def random_boxes(rng, count, height, width):
    tall, wide = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    return np.stack([rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1), tall, wide], axis=1)


@pytest.mark.parametrize(("full", "size"), [((28, 28), (28, 28)), ((28, 28), (14, 14)), ((20, 33), (17, 40))])
@pytest.mark.parametrize("channels", [1, 3])
def test_stack_crops_equal_pillow(full, size, channels):
    rng = np.random.default_rng(0)
    # Noise is the hardest image: it overshoots everywhere.
    images = torch.from_numpy(rng.integers(0, 256, (30, channels, *full), dtype=np.uint8))
    boxes = np.stack([random_boxes(rng, 30, *full) for _ in range(2)])
    mirrored = rng.random((2, 30)) < 0.5
    crops = resample_stack(images, boxes, mirrored, size).view(2, 30, channels, *size)
    assert crops.dtype == torch.uint8
    for view in range(2):
        for image in range(30):
            expected = pillow(images[image], boxes[view, image], size, mirrored[view, image])
            assert np.abs(crops[view, image].numpy() - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_single_crops_equal_pillow(channels):
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.integers(0, 256, (120, 90, channels), dtype=np.uint8)).permute(2, 0, 1)
    for box in [*random_boxes(rng, 20, 120, 90).tolist(), [3, 5, 32, 32]]:
        crop = crop_resize(image, box, (32, 32))
        assert np.abs(crop.numpy() - pillow(image, box, (32, 32))).max() <= 2


@pytest.mark.parametrize("length", [1, 2, 7, 28, 101])
@pytest.mark.parametrize("size", [1, 14, 28, 96])
def test_sums_of_the_weights_are_exact_in_float32(length, size):
    units = cubic_weights(length, size) * 2**15
    assert (units == units.round()).all()
    assert (units.sum(1) == 2**15).all()
    # The largest partial sum there can be, over white pixels, still counts single units.
    assert np.abs(units).sum(1).max() * 255 + 2**14 < 2**24


def test_flat_images_stay_flat():
    images = torch.full((1, 1, 28, 28), 201, dtype=torch.uint8)
    boxes = random_boxes(np.random.default_rng(2), 50, 28, 28)[:, None]
    assert (resample_stack(images, boxes, np.zeros((50, 1), bool), (14, 14)) == 201).all()


def test_crops_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.integers(0, 256, (64, 1, 28, 28), dtype=np.uint8))
    boxes = random_boxes(rng, 64, 28, 28)[None]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(resample_stack(images, boxes, np.zeros((1, 64), bool), (28, 28)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # Nor on the batch they are made in.
    alone = resample_stack(images[9:10], boxes[:, 9:10], np.zeros((1, 1), bool), (28, 28))
    assert torch.equal(alone[0], results[0][9])
