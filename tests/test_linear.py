import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_sd.errors import UserError
from dino_sd.evaluators.linear import Probes, fit, linear_probe, order_of


def blobs(images: int, classes: int = 10, width: int = 16, spread: float = 0.3, seed: int = 0):
    generator = np.random.Generator(np.random.Philox(seed))
    centers = np.random.Generator(np.random.Philox(99)).normal(size=(classes, width))
    labels = generator.integers(classes, size=images)
    features = centers[labels] + spread * generator.normal(size=(images, width))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def test_separable_classes_are_told_apart():
    train, train_labels = blobs(2000)
    test, test_labels = blobs(500, seed=1)
    result = linear_probe(train, train_labels, test, test_labels, epochs=30, batch_size=256)
    assert result.top1 > 99 and result.top5 >= result.top1
    assert result.losses[-1] < 0.5 * result.losses[0]
    logits = test @ result.weight_CD.T + result.bias_C
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == test_labels).double().mean().item())


def test_same_seed_same_digits():
    train, train_labels = blobs(300, spread=2)
    test, test_labels = blobs(99, spread=2, seed=1)
    first, again, other = (
        linear_probe(train, train_labels, test, test_labels, epochs=3, batch_size=64, seed=seed) for seed in (1, 1, 2)
    )
    assert first.losses == again.losses and torch.equal(first.weight_CD, again.weight_CD)
    assert first.held_out == again.held_out
    assert first.losses != other.losses


def test_published_schedule_against_torch():
    """Autograd, torch.optim.SGD and CosineAnnealingLR stepped once an epoch, as in the published eval_linear.py."""
    images, classes, batch, epochs, lr, seed = 300, 7, 128, 5, 0.02, 3
    train, labels = blobs(images, classes, spread=1)
    result = linear_probe(train, labels, train, labels, epochs=epochs, batch_size=batch, lr=lr, seed=seed)
    first = np.random.Generator(np.random.Philox(key=(seed, 0))).normal(0, 0.01, (16, classes))
    linear = torch.nn.Linear(16, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(first.T))
        linear.bias.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr * batch / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    for epoch in range(epochs):
        losses = []
        for rows in torch.from_numpy(order_of(images, seed, epoch)).split(batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(linear(train[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
        assert result.losses[epoch] == pytest.approx(sum(losses) / images, rel=1e-5)
        schedule.step()
    torch.testing.assert_close(result.weight_CD, linear.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.bias_C, linear.bias.detach(), rtol=1e-4, atol=1e-6)


def test_rates_side_by_side_equal_rates_alone():
    features, labels = blobs(200, spread=1)
    rows = torch.arange(200)

    def trained(rates):
        probes = Probes([slice(0, 16)], 10, rates, 0.9, 0, features.device)
        fit([probes], features, labels, rows, epochs=3, batch_size=64, seed=0)
        return probes

    together = trained([0.01, 0.1])
    alone = torch.cat([trained([rate]).weight_DC for rate in (0.01, 0.1)], 1)
    torch.testing.assert_close(together.weight_DC, alone)


def test_the_best_rate_on_held_out_train_images_is_taken_whatever_the_test_set_says():
    train, labels = blobs(1000, spread=0.5)
    rates = (1e-6, 0.05, math.inf)
    for test_labels in (labels, (labels + 1) % 10):
        result = linear_probe(train, labels, train, test_labels, epochs=5, batch_size=100, lr=rates)
        assert result.lr == 0.05
        assert result.held_out["features"][math.inf] == 0, "a probe that is not a number is wrong about everything"


def test_choices_side_by_side_equal_choices_alone_and_the_best_one_is_taken():
    """Columns 0 to 15 say the class, the others are noise; a choice may be made of columns that lie apart."""
    train, labels = blobs(600, spread=0.5)
    noise = torch.from_numpy(np.random.Generator(np.random.Philox(5)).normal(size=(600, 24))).float()
    both = torch.cat([noise[:, :8], train, noise[:, 8:]], 1)
    choices = {"noise": [slice(24, 40)], "class": [slice(8, 24)], "apart": [slice(0, 8), slice(24, 32)]}
    rates = (0.001, 0.05)
    together = linear_probe(both, labels, both, labels, choices=choices, lr=rates, epochs=4, batch_size=100)
    assert together.choice == "class" and together.weight_CD.shape == (10, 16)
    for name, columns in choices.items():
        part = torch.cat([both[:, column] for column in columns], 1)
        alone = linear_probe(part, labels, part, labels, lr=rates, epochs=4, batch_size=100)
        assert together.held_out[name] == alone.held_out["features"]
        if name == "class":
            torch.testing.assert_close(together.weight_CD, alone.weight_CD)
            assert (together.top1, together.top5, together.lr) == (alone.top1, alone.top5, alone.lr)


def test_features_of_an_epoch_may_be_computed_anew():
    train, labels = blobs(300, spread=0.5)
    asked = []

    def of_epoch(epoch):
        asked.append(epoch)
        return train

    anew = linear_probe(of_epoch, labels, train, labels, epochs=3, lr=0.01)
    once = linear_probe(train, labels, train, labels, epochs=3, lr=0.01)
    assert anew.losses == once.losses and sorted(set(asked)) == [0, 1, 2]


@pytest.mark.parametrize("images", [1, 7, 50])
def test_few_images(images):
    train, labels = blobs(images)
    result = linear_probe(train, labels, train, labels, classes=10, epochs=2)
    assert 0 <= result.top1 <= result.top5 <= 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_labels_N": torch.full((50,), -1)}, ["train", "without a label"]),
        ({"test_labels_N": torch.full((50,), -1)}, ["test", "without a label"]),
        ({"classes": 3}, ["3 classes"]),
        ({"test_ND": torch.full((50, 16), torch.inf)}, ["test", "infinity"]),
        ({"test_ND": torch.zeros(50, 15)}, ["16", "15"]),
        ({"test_labels_N": torch.zeros(49, dtype=torch.int64)}, ["50", "49"]),
    ],
)
def test_bad_input_is_refused(change, words):
    features, labels = blobs(50)
    arguments = {
        "features_of_epoch": features,
        "train_labels_N": labels,
        "test_ND": features,
        "test_labels_N": labels,
    } | change
    with pytest.raises(UserError) as error:
        linear_probe(**arguments)
    assert all(word in str(error.value) for word in words), error.value
