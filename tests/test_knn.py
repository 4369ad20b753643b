import math
import resource

import numpy as np
import pytest
import torch

from dino_sd.errors import UserError
from dino_sd.evaluators.knn import accuracy_from_ranks, knn, label_ranks
from dino_sd.nearest import nearest


def clusters(images: int, classes: int = 7, width: int = 12, seed: int = 0, dtype=torch.float64):
    generator = np.random.Generator(np.random.Philox(seed))
    centers = np.random.Generator(np.random.Philox(99)).normal(size=(classes, width))
    labels = generator.integers(classes, size=images)
    features = centers[labels] + 1.5 * generator.normal(size=(images, width))
    return torch.tensor(features, dtype=dtype), torch.tensor(labels)


def brute_force(train, train_labels, test, test_labels, k, temperature, classes):
    """One image at a time, in plain Python."""
    top1 = top5 = 0
    train = [row / row.norm() for row in train]
    for row, label in zip(test, test_labels.tolist(), strict=True):
        row = row / row.norm()
        similarity = sorted(((float(row @ other), -i) for i, other in enumerate(train)), reverse=True)[:k]
        votes = [0.0] * classes
        for value, minus_i in similarity:
            votes[int(train_labels[-minus_i])] += math.exp(value / temperature)
        order = sorted(range(classes), key=lambda c: -votes[c])
        top1 += order[0] == label
        top5 += label in order[: min(5, k)]
    return 100 * top1 / len(test), 100 * top5 / len(test)


@pytest.mark.parametrize("images", [1, 50, 99])
def test_equals_brute_force(images):
    train, train_labels = clusters(150)
    test, test_labels = clusters(images, seed=1)
    result = knn(train, train_labels, test, test_labels, k=(1, 5, 20, 150), chunk=32, train_chunk=64)
    for k, pair in result.items():
        assert pair == pytest.approx(brute_force(train, train_labels, test, test_labels, k, 0.07, 7), abs=1e-9)


def test_ten_thousand_images_equal_a_sort_of_everything():
    train, train_labels = clusters(400)
    test, test_labels = clusters(10_000, seed=1)
    result = knn(train, train_labels, test, test_labels, k=(1, 20, 100), chunk=999, train_chunk=64)
    unit_train, unit_test = (
        rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True) for rows in (train, test)
    )
    similarity = unit_test @ unit_train.T
    order = np.argsort(-similarity, axis=1, kind="stable")
    for k, pair in result.items():
        weight = np.exp(np.take_along_axis(similarity, order[:, :k], 1) / 0.07)
        votes = np.stack([(weight * (train_labels.numpy()[order[:, :k]] == c)).sum(1) for c in range(7)], 1)
        best = np.argsort(-votes, axis=1, kind="stable")[:, : min(5, k)]
        right = best == test_labels.numpy()[:, None]
        assert pair == pytest.approx((100 * right[:, 0].mean(), 100 * right.any(1).mean()), abs=1e-9)


@pytest.mark.parametrize("block", [1, 16, 100, 700])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_nearest_equals_a_stable_sort_where_many_are_equal(block, k):
    """Also where every block is nearer than all before it, so that no row can be left out by comparing."""
    generator = torch.Generator().manual_seed(0)
    train = torch.nn.functional.normalize(torch.randint(-1, 2, (600, 3), generator=generator).double(), dim=1)
    queries = torch.eye(3, dtype=torch.float64)[torch.randint(3, (40,), generator=generator)]
    for bank in (train, train[(train @ queries[0]).argsort()]):
        expected = (queries @ torch.nn.functional.normalize(bank, dim=1).T).sort(dim=1, descending=True, stable=True)
        similarity, index = nearest(bank, queries, k, block)
        assert torch.equal(index, expected.indices[:, :k]) and torch.equal(similarity, expected.values[:, :k])


def test_leaving_one_out_is_each_image_against_all_others():
    features, labels = clusters(60)
    result = knn(features, labels, features, labels, k=(1, 20, 59), leave_one_out=True, chunk=7, train_chunk=16)
    for k, (top1, top5) in result.items():
        scores = [
            brute_force(features[others], labels[others], features[i : i + 1], labels[i : i + 1], k, 0.07, 7)
            for i in range(60)
            for others in [torch.arange(60) != i]
        ]
        assert (top1, top5) == pytest.approx(tuple(np.mean(scores, axis=0)), abs=1e-9)
    with pytest.raises(UserError, match="59 train images may vote"):
        knn(features, labels, features, labels, k=(60,), leave_one_out=True)


@pytest.mark.parametrize("classes", [1, 2, 5, 300])
def test_any_number_of_classes(classes):
    train, train_labels = clusters(600, classes)
    test, test_labels = clusters(50, classes, seed=1)
    ((top1, top5),) = knn(train, train_labels, test, test_labels).values()
    assert 0 <= top1 <= top5 <= 100
    if classes <= 5:
        assert top5 == 100


def test_result_does_not_depend_on_chunks_or_on_the_other_test_images():
    train, train_labels = clusters(500)
    test, test_labels = clusters(99, seed=1)
    whole = label_ranks(train, train_labels, test, test_labels, (1, 20))
    for chunk, train_chunk in ((7, 500), (99, 33), (5, 7), (64, 499)):
        part = label_ranks(train, train_labels, test, test_labels, (1, 20), chunk=chunk, train_chunk=train_chunk)
        assert all(torch.equal(whole[k], part[k]) for k in whole)
    halves = [label_ranks(train, train_labels, test[s], test_labels[s], (20,)) for s in (slice(40), slice(40, None))]
    assert torch.equal(whole[20], torch.cat([half[20] for half in halves]))
    assert label_ranks(train, train_labels, test[:0], test_labels[:0], (20,))[20].shape == (0,)
    assert accuracy_from_ranks(whole) == knn(train, train_labels, test, test_labels, k=(20, 1))


def test_equal_neighbours_are_taken_in_the_order_of_the_train_set():
    # integers, so that equal rows have equal similarities whatever the order of the sums
    rows = torch.tensor([[3.0, 4.0], [4.0, 3.0]], dtype=torch.float64).repeat(20, 1)
    query = torch.tensor([[3.0, 4.0]], dtype=torch.float64) / 5
    for train_chunk in (1, 3, 8, 40):
        _, index = nearest(rows, query, 25, train_chunk)
        assert index.tolist() == [[*range(0, 40, 2), *range(1, 10, 2)]]


def test_equal_votes_go_to_the_lower_class():
    train = torch.eye(2)
    query = torch.ones(1, 2)
    assert knn(train, torch.tensor([1, 0]), query, torch.tensor([0]), k=(2,))[2] == (100, 100)
    assert knn(train, torch.tensor([1, 0]), query, torch.tensor([1]), k=(2,))[2] == (0, 100)


def test_length_of_features_does_not_matter_and_half_precision_is_widened():
    train, train_labels = clusters(200, dtype=torch.float32)
    test, test_labels = clusters(50, seed=1, dtype=torch.float32)
    result = knn(train, train_labels, test, test_labels)
    lengths = torch.logspace(-3, 3, 200).unsqueeze(1)
    assert knn(train * lengths, train_labels, test * 7, test_labels) == result
    assert abs(knn(train.half(), train_labels, test.half(), test_labels)[20][0] - result[20][0]) <= 4


def test_memory_does_not_grow_with_the_number_of_images():
    def peak_growth(images: int) -> int:
        features, labels = torch.randn(images, 4), torch.arange(images) % 10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        knn(features, labels, features, labels, chunk=256, train_chunk=1024)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    peak_growth(2_000)
    # all similarities at once would be 256 MB
    assert peak_growth(8_000) < 40_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": (20, 51)}, ["51", "50"]),
        ({"k": (0,)}, ["at least 1"]),
        ({"k": ()}, ["k="]),
        ({"temperature": 0.0}, ["temperature"]),
        ({"classes": 3}, ["label 6", "3 classes"]),
        ({"train_labels_N": torch.full((50,), -1)}, ["train", "without a label"]),
        ({"test_labels_N": torch.full((50,), -1)}, ["test", "without a label"]),
        ({"test_ND": torch.full((50, 12), torch.nan)}, ["test", "NaN"]),
        ({"test_ND": torch.zeros(0, 12), "test_labels_N": torch.zeros(0, dtype=torch.int64)}, ["no images"]),
        ({"test_ND": torch.zeros(50, 11)}, ["12", "11"]),
    ],
)
def test_bad_input_is_refused(change, words):
    features, labels = clusters(50)
    labels[0] = 6
    arguments = {"train_ND": features, "train_labels_N": labels, "test_ND": features, "test_labels_N": labels} | change
    with pytest.raises(UserError) as error:
        knn(**arguments)
    assert all(word in str(error.value) for word in words), error.value
