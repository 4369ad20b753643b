"""Mixed batches are what the papers say, and torch's global generator decides them."""

import pytest
import torch

from dino_sd.data.mix import Mix
from dino_sd.errors import UserError

IMAGES = torch.rand(6, 3, 8, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def mixed(mixup, cutmix, seed):
    torch.manual_seed(seed)
    return Mix(mixup, cutmix, 5)(IMAGES, LABELS)


def test_mixup_is_the_convex_combination_that_the_labels_tell():
    shares = []
    for seed in range(20):
        images, labels = mixed(0.8, 0.0, seed)
        assert labels.shape == (6, 5) and labels.dtype == torch.float32
        # Image 1 keeps the share that its own label has; the rest is image 0.
        own = labels[1, 1].item()
        assert labels[1].tolist() == pytest.approx([1 - own, own, 0, 0, 0])
        assert labels[0, 0] == pytest.approx(1), "image 0 is mixed with the last one, of its own class"
        assert torch.allclose(images, own * IMAGES + (1 - own) * IMAGES.roll(1, 0), atol=1e-6)
        shares.append(own)
    assert min(shares) < 0.3 and max(shares) > 0.7


def test_cutmix_pastes_a_box_whose_area_the_labels_tell():
    areas = []
    for seed in range(20):
        images, labels = mixed(0.0, 1.0, seed)
        theirs = (images != IMAGES).all(1)
        assert torch.equal(images, torch.where(theirs[:, None], IMAGES.roll(1, 0), IMAGES))
        assert (theirs == theirs[0]).all()
        rows, columns = theirs[0].any(1), theirs[0].any(0)
        assert torch.equal(theirs[0], rows[:, None] & columns)
        area = theirs[0].float().mean().item()
        assert labels[1].tolist() == pytest.approx([area, 1 - area, 0, 0, 0], abs=1e-6)
        areas.append(area)
    assert max(areas) > 0.3


def test_with_both_on_each_batch_gets_one_of_them():
    kinds = []
    for seed in range(200):
        images, labels = mixed(1.0, 1.0, seed)
        assert labels.sum(1).tolist() == pytest.approx([1] * 6)
        kinds.append(torch.isclose(images, IMAGES).float().mean() < 0.1 and labels[1, 1].item() < 0.9)
        again = mixed(1.0, 1.0, seed)
        assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    # MixUp that keeps more than 0.9 of itself, and CutMix that keeps nothing, count wrong; both are rare.
    assert 70 < sum(map(bool, kinds)) < 120


def test_with_both_off_labels_become_rows():
    images, labels = mixed(0.0, 0.0, 0)
    assert torch.equal(images, IMAGES) and labels.argmax(1).tolist() == LABELS.tolist() and labels.sum() == 6


def test_images_and_labels_given_are_not_changed():
    before = IMAGES.clone(), LABELS.clone()
    for mixup, cutmix in ((1.0, 0.0), (0.0, 1.0)):
        mixed(mixup, cutmix, 0)
    assert torch.equal(IMAGES, before[0]) and torch.equal(LABELS, before[1])


def test_an_image_without_a_label_cannot_be_mixed():
    with pytest.raises(UserError, match="mix: 2 of 6 images have no label.*turn mixup and cutmix off"):
        Mix(1.0, 0.0, 5)(IMAGES, torch.tensor([0, -1, 2, 3, -1, 0]))
