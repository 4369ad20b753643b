"""Random numbers become views as torchvision's transforms would draw them."""

import numpy as np
import pytest
import torch
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dino_sd.data.draws import boxes, center_box, draw, flips, rows
from dino_sd.data.views import Row, ViewGroup, ViewSpec

RATIO = (3 / 4, 4 / 3)
SPEC = ViewSpec(
    (ViewGroup(2, (32, 32), (0.4, 1.0)), ViewGroup(1, (16, 16), (0.05, 0.4))),
    blur=(1.0, 0.1, 0.5),
    solarize=(0.0, 0.2, 0.0),
)


@pytest.mark.parametrize("size", [(375, 500), (28, 28), (50, 400), (1, 9)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_lie_inside_and_follow_torchvision(size, scale):
    count = 1500
    ours = boxes(draw(SPEC, 0, 0, np.arange(count))[0], np.array(size), scale, RATIO)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(count)])
    for column in range(4):
        # Two-sample Kolmogorov-Smirnov, at a level that a right program meets but once in ten thousand.
        values = np.union1d(ours[:, column], theirs[:, column])
        shares = [np.searchsorted(np.sort(sample[:, column]), values, "right") / count for sample in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 2.23 * np.sqrt(2 / count)


def test_a_box_reaches_every_edge():
    ours = boxes(draw(SPEC, 0, 0, np.arange(4000))[0], np.array([28, 28]), (0.4, 1.0), RATIO)
    ends = ours[:, :2] + ours[:, 2:]
    assert ours[:, :2].min() == 0 and (ends.max(0) == 28).all()
    assert ours[:, 2:].max() == 28


def test_boxes_of_many_sizes_at_once_equal_boxes_one_by_one():
    u = draw(SPEC, 0, 0, np.arange(20))[0]
    sizes = np.random.default_rng(0).integers(1, 300, (20, 2))
    together = boxes(u, sizes, (0.05, 0.4), RATIO)
    for index in range(20):
        assert (boxes(u[index], sizes[index], (0.05, 0.4), RATIO) == together[index]).all()


def test_shares_and_ranges_are_those_asked_for():
    count = 4000
    u = draw(SPEC, 7, 3, np.arange(count))
    numbers = rows(u, SPEC)
    tolerance = 4 * np.sqrt(0.25 / count)

    def near(shares, expected):
        return np.abs(np.asarray(shares) - expected).max() < tolerance

    assert near(flips(u, SPEC).mean(1), [0.5] * 3)
    assert near(numbers[..., Row.JITTERED].mean(1), [0.8] * 3)
    assert near(numbers[..., Row.GRAYSCALE].mean(1), [0.2] * 3)
    assert near((numbers[..., Row.SIGMA] > 0).mean(1), SPEC.blur)
    assert near(numbers[..., Row.SOLARIZE].mean(1), SPEC.solarize)
    assert (numbers[0, :, Row.SIGMA] > 0).all() and (numbers[0, :, Row.SOLARIZE] == 0).all()
    jittered = numbers[numbers[..., Row.JITTERED] > 0]
    low, high = jittered.min(0), jittered.max(0)
    lowest, highest = np.float32([0.6, 0.6, 0.8, -0.1]), np.float32([1.4, 1.4, 1.2, 0.1])
    assert np.allclose(low[:4], lowest, atol=2e-3) and (low[:4] >= lowest).all()
    assert np.allclose(high[:4], highest, atol=2e-3) and (high[:4] <= highest).all()
    assert np.allclose(jittered[:, :4].mean(0), [1, 1, 1, 0], atol=0.02)
    untouched = numbers[numbers[..., Row.JITTERED] == 0]
    assert (untouched[:, :4] == [1, 1, 1, 0]).all()
    blurred = numbers[..., Row.SIGMA][numbers[..., Row.SIGMA] > 0]
    assert blurred.min() >= 0.1 and blurred.max() <= 2.0 and abs(blurred.mean() - 1.05) < 0.03


def test_orders_of_the_jitter_are_all_equally_likely():
    numbers = rows(draw(SPEC, 0, 0, np.arange(4000)), SPEC)
    orders, counts = np.unique(numbers[..., Row.FIRST : Row.FOURTH + 1].reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == [0, 1, 2, 3]).all()
    assert np.abs(counts / 500 - 1).max() < 0.25


def test_factors_have_torchvisions_bounds():
    # Strengths above 1 are cut at 0, as ColorJitter does.
    strong = ViewSpec((ViewGroup(1, (8, 8), (0.4, 1.0)),), brightness=1.5, hue=0.5, jitter_probability=1.0)
    numbers = rows(draw(strong, 0, 0, np.arange(3000)), strong)[0]
    expected = ColorJitter(brightness=1.5, hue=0.5)
    for column, bounds in ((Row.BRIGHTNESS, expected.brightness), (Row.HUE, expected.hue)):
        assert numbers[:, column].min() >= bounds[0] and numbers[:, column].max() <= bounds[1]
        assert np.allclose([numbers[:, column].min(), numbers[:, column].max()], bounds, atol=5e-3)


def test_gray_images_get_no_colour_operations():
    spec = ViewSpec((ViewGroup(2, (28, 28), (0.4, 1.0)),), channels=1)
    numbers = rows(draw(spec, 0, 0, np.arange(500)), spec)
    assert (numbers[..., Row.HUE] == 0).all() and (numbers[..., Row.SATURATION] == 1).all()
    assert (numbers[..., Row.GRAYSCALE] == 0).all()
    assert numbers[..., Row.BRIGHTNESS].std() > 0.1


@pytest.mark.parametrize(
    ("image", "size", "share", "box"),
    [
        ((28, 28), (28, 28), 1.0, [0, 0, 28, 28]),
        ((256, 256), (224, 224), 0.875, [16, 16, 224, 224]),
        ((200, 300), (32, 32), 1.0, [0, 50, 200, 200]),
        ((300, 200), (16, 32), 0.5, [125, 50, 50, 100]),
        ((1, 9), (8, 8), 0.1, [0, 4, 1, 1]),
    ],
)
def test_centred_boxes(image, size, share, box):
    assert center_box(np.array(image), size, share).tolist() == box


def test_nothing_happens_to_clean_views():
    always = ViewSpec(
        (ViewGroup(1, (8, 8), center=0.9), ViewGroup(1, (8, 8), (0.4, 1.0)), ViewGroup(2, (8, 8), center=1.0)),
        flip=1.0, jitter_probability=1.0, grayscale=1.0, blur=(1.0,) * 4, solarize=(1.0,) * 4,
    )  # fmt: skip
    assert always.clean == (True, False, True, True)
    u = draw(always, 0, 0, np.arange(50))
    assert flips(u, always).all(1).tolist() == [False, True, False, False] and not flips(u, always)[[0, 2, 3]].any()
    numbers = rows(u, always)
    assert (numbers[[0, 2, 3]] == [1, 1, 1, 0, 0, 1, 2, 3, 0, 0, 0, 0]).all()
    assert (numbers[1, :, [Row.JITTERED, Row.GRAYSCALE, Row.SOLARIZE]] == 1).all()


def test_shares_and_magnitudes_out_of_range():
    for center in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"center: {center} is no share"):
            ViewGroup(1, (8, 8), center=center)
    for operations, magnitude in ((0, 9), (2, 31), (2, -1)):
        with pytest.raises(ValueError, match=f"randaugment: {operations} operations of magnitude {magnitude}"):
            ViewSpec(SPEC.groups, randaugment=(operations, magnitude))


def test_one_probability_per_view():
    with pytest.raises(ValueError, match="blur: 1 probabilities for 3 views"):
        ViewSpec(SPEC.groups, blur=(0.5,))
