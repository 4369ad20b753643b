"""RandAugment is torchvision's, and a function of each view's own number."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import RandAugment

from dino_sd.data.draws import RANDAUGMENT, draw
from dino_sd.data.geometry import make_views
from dino_sd.data.loader import Batches
from dino_sd.data.randaugment import randaugment_
from dino_sd.data.source import open_source
from dino_sd.data.views import ViewGroup, ViewSpec


def spec(channels=1, randaugment=(2, 9)):
    groups = (
        ViewGroup(2, (28, 28), (0.4, 1.0)),
        ViewGroup(1, (28, 28), center=1.0),
        ViewGroup(1, (14, 14), (0.1, 0.4)),
    )
    return ViewSpec(groups, channels, randaugment=randaugment)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_torchvisions_randaugment_seeded_by_their_number(channels):
    source = open_source("fashion-mnist-mini:test", channels)
    plain, plain_rows = make_views(source, spec(channels, None), 3, 1, np.arange(40))[:2]
    views, rows = make_views(source, spec(channels), 3, 1, np.arange(40))[:2]
    assert all(torch.equal(one, other) for one, other in zip(plain_rows, rows, strict=True))
    assert torch.equal(plain[1], views[1]), "clean views are left alone"
    seeds = (draw(spec(channels), 3, 1, np.arange(40))[..., RANDAUGMENT] * 2**32 - 0.5).astype(np.int64)
    transform = RandAugment(2, 9)
    for group, first in ((0, 0), (2, 3)):
        assert views[group].dtype == torch.uint8
        for position, (crop, view) in enumerate(zip(plain[group], views[group], strict=True)):
            torch.manual_seed(int(seeds[first:].reshape(-1)[position]))
            assert torch.equal(transform(crop), view)
        assert (plain[group] != views[group]).flatten(1).any(1).float().mean() > 0.5


def test_the_global_generator_is_neither_read_nor_moved():
    source = open_source("fashion-mnist-mini:test", 1)
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        made.append(make_views(source, spec(), 3, 1, np.arange(20))[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    # Nor does it matter which images come along.
    alone, _ = make_views(source, spec(), 3, 1, np.arange(7, 8))[:2]
    assert torch.equal(alone[0], made[0][0].unflatten(0, (2, 20))[:, 7])


def test_workers_and_threads_change_no_bit(tmp_path):
    for index in range(8):
        noise = np.random.default_rng(index).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((60, 50), Image.Resampling.BICUBIC).save(tmp_path / f"{index}.png")
    source = open_source(str(tmp_path), 3)
    one, two = (list(Batches(source, spec(3), 5, 4, total_steps=4, workers=workers)) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))
    # Large enough for torch to share out a mean among threads.
    large = torch.randint(0, 256, (30, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    u, results = (np.arange(30) + 0.5) / 30, []
    for threads in (1, 3):
        torch.set_num_threads(threads)  # conftest puts it back
        results.append(large.clone())
        randaugment_(results[-1], u, 3, 20)
        assert torch.get_num_threads() == threads
    assert torch.equal(*results)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_takes_gray_and_colour(channels):
    crops = torch.randint(0, 200, (400, channels, 12, 17), dtype=torch.uint8)
    for magnitude in (0, 30):
        changed = crops.clone()
        # Fourteen operations: that one of them comes up in none of 400 crops has a chance below 1e-12.
        randaugment_(changed, np.random.default_rng(0).random(400), 1, magnitude)
        assert changed.shape == crops.shape and (changed != crops).any()
