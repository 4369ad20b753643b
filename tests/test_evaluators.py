"""Evaluators as functions of tensors, against closed forms, brute force and other people's code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_sd.errors import UserError
from dino_sd.evaluators.logistic import logistic_regression
from dino_sd.evaluators.ranks import alignment, alpha_req, lidar, ranks, uniformity
from dino_sd.evaluators.retrieval import retrieval
from dino_sd.evaluators.segmentation import knn_shares, miou_of, patch_shares, pixel_counts, scores_of
from dino_sd.intervals import bootstrap, over_seeds, student_t, wilson
from dino_sd.softmax import fit_best, fit_softmax, logits
from dino_sd.subsets import class_balanced, share, shots


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).normal(size=shape))


def blobs(images: int, seed: int = 0, classes: int = 5, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(images) % classes
    return normal(classes, width, seed=99)[labels] + normal(images, width, seed=seed), labels


# --- logistic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1e-4, 0.1])
def test_softmax_fit_is_where_the_gradient_vanishes(l2):
    x, labels = blobs(300)
    x = x * torch.logspace(-2, 2, 6).double()  # axes of very different lengths
    x = x - x.mean(0)
    weight = fit_softmax(x, labels, 5, l2).requires_grad_(True)
    loss = F.cross_entropy(logits(weight, x), labels) + l2 / 2 * weight[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4  # of an axis whose features are a hundred long
    shares = F.one_hot(labels, 5).double()
    torch.testing.assert_close(
        fit_softmax(x, shares, 5, l2, first=weight.detach()), weight.detach(), rtol=1e-3, atol=1e-4
    )


def test_softmax_fit_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = blobs(200)
    theirs = linear_model.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=10_000).fit(x, labels)
    ours = fit_softmax(x - x.mean(0), labels, 5, 0.01)
    said = logits(ours, x - x.mean(0)).softmax(1).numpy()
    np.testing.assert_allclose(said, theirs.predict_proba(x.numpy()), atol=1e-4)


def test_scale_and_place_of_features_do_not_matter_to_the_best_penalty():
    x, labels = blobs(200)

    def score(said, wanted):
        return -F.cross_entropy(said, wanted).item()

    weight, best, held_out = fit_best(x, labels, 5, (1e-3, 1e-1), score)
    moved, again, held_out_again = fit_best(100 * x + 7, labels, 5, (1e-3, 1e-1), score)
    assert best == again == max(held_out, key=held_out.__getitem__)
    assert held_out == pytest.approx(held_out_again, rel=1e-4)
    torch.testing.assert_close(logits(weight, x), logits(moved, 100 * x + 7), rtol=1e-3, atol=1e-3)


def test_logistic_regression_asks_the_test_set_nothing():
    (train, labels), (test, test_labels) = blobs(300), blobs(100, seed=1)
    first = logistic_regression(train, labels, test, test_labels, classes=5)
    other = logistic_regression(train, labels, test, (test_labels + 1) % 5, classes=5)
    assert first.l2 == other.l2 and first.held_out == other.held_out and len(first.held_out) == 7
    assert first.top1 > 60 > other.top1 and first.top5 == 100
    one_a_class = logistic_regression(train[:5], labels[:5], test, test_labels, classes=5)
    assert not one_a_class.held_out and 20 < one_a_class.top1 <= 100
    with pytest.raises(UserError, match="without a label"):
        logistic_regression(train, labels - 1, test, test_labels, classes=5)


# --- retrieval --------------------------------------------------------------------------------------------------------


def average_precision(similarity: list[float], same: list[bool]) -> float:
    order = sorted(range(len(same)), key=lambda i: (-similarity[i], i))
    found, total = 0, 0.0
    for place, index in enumerate(order, 1):
        if same[index]:
            found += 1
            total += found / place
    return total / found


def test_retrieval_equals_brute_force(monkeypatch):
    monkeypatch.setattr("dino_sd.evaluators.retrieval._PRODUCTS", 200)
    bank, bank_labels = blobs(60)
    queries, labels = blobs(17, seed=1)
    unit_bank, unit_queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    result = retrieval(queries, labels, bank, bank_labels, k=(1, 5))
    for i in range(17):
        similarity = (unit_bank @ unit_queries[i]).tolist()
        same = (bank_labels == labels[i]).tolist()
        assert result.average_precision_N[i].item() == pytest.approx(average_precision(similarity, same))
        order = sorted(range(60), key=lambda j: -similarity[j])
        assert [result.recall_N[k][i].item() for k in (1, 5)] == [any(same[j] for j in order[:k]) for k in (1, 5)]
    alone = retrieval(bank[20:], bank_labels[20:], bank, bank_labels, k=(59,), own_from=20)
    for i in range(20, 60):
        others = [j for j in range(60) if j != i]
        similarity = (unit_bank[others] @ unit_bank[i]).tolist()
        same = (bank_labels[others] == bank_labels[i]).tolist()
        assert alone.average_precision_N[i - 20].item() == pytest.approx(average_precision(similarity, same))
    assert alone.recall_N[59].all()


def test_queries_with_nothing_to_find_are_left_out():
    bank, labels = blobs(11)
    result = retrieval(bank, labels, bank, labels, k=(1,), own_from=0)
    assert len(result.average_precision_N) == len(labels)
    result = retrieval(bank[:6], labels[:6], bank[:6], labels[:6], k=(1,), own_from=0)
    assert len(result.average_precision_N) == 2 == len(result.recall_N[1])
    with pytest.raises(UserError, match="from 1 to 10"):
        retrieval(bank, labels, bank, labels, k=(11,), own_from=0)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_alpha_of_a_power_law():
    orthonormal = torch.linalg.qr(normal(200, 16) - normal(200, 16).mean(0)).Q
    for alpha in (0.5, 1.0, 2.0):
        features = orthonormal * torch.arange(1, 17).double() ** (-alpha / 2)
        assert alpha_req(features) == pytest.approx(alpha, abs=1e-9)
    assert math.isnan(alpha_req(torch.ones(9, 4).double()))


def test_uniformity_and_alignment_of_pairs():
    features = normal(50, 6)
    unit = F.normalize(features, dim=1)
    pairs = torch.pdist(unit).square()
    assert uniformity(features) == pytest.approx(pairs.mul(-2).exp().mean().log().item())
    assert uniformity(torch.ones(5, 3).double()) == pytest.approx(0)
    views = normal(20, 4, 6)
    unit = F.normalize(views, dim=2)
    expected = np.mean([(torch.pdist(one).square()).mean().item() for one in unit])
    assert alignment(views) == pytest.approx(expected)
    assert alignment(views[:, :1].expand(-1, 4, -1)) == pytest.approx(0)


def test_uniformity_does_not_depend_on_blocks(monkeypatch):
    features = normal(50, 6)
    whole = uniformity(features)
    monkeypatch.setattr("dino_sd.evaluators.ranks._ROWS", 7)
    assert uniformity(features) == pytest.approx(whole)


def test_lidar_against_its_definition_and_closed_forms():
    views = normal(30, 5, 4) + 3 * normal(30, 1, 4, seed=1)
    mean = views.mean(1).numpy()
    within = np.mean([np.cov(one.T.numpy(), bias=True) for one in views], axis=0) + 1e-4 * np.eye(4)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    shares = np.linalg.eigvalsh(root @ np.cov(mean.T, bias=True) @ root)
    shares /= shares.sum()
    assert lidar(views) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    # images in one direction alone: rank 1, whatever views do; in all directions alike without noise: all of them
    along = normal(30, 1, 1) * torch.eye(4)[0].double()
    assert lidar(along.expand(-1, 3, -1)) == pytest.approx(1)
    corners = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    assert lidar(corners[:, None].expand(-1, 3, -1)) == pytest.approx(4)


def test_ranks_together_and_what_they_refuse():
    found = ranks(torch.eye(6), torch.eye(6)[:, None].expand(-1, 2, -1))
    assert found["rankme"] == pytest.approx(6) and found["lidar"] == pytest.approx(5)
    assert found["uniformity"] == pytest.approx(-4) and found["alignment"] == pytest.approx(0)
    with pytest.raises(UserError, match="NaN"):
        ranks(torch.full((4, 2), math.nan), torch.zeros(4, 2, 2))
    with pytest.raises(UserError, match="two views"):
        ranks(torch.eye(3), torch.eye(3)[:, None])


# --- segmentation -----------------------------------------------------------------------------------------------------


def test_shares_of_patches():
    mask = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [255, 255, 2, 0], [255, 255, 255, 0]])
    shares = patch_shares(torch.stack([mask, mask.flip(1)]), (2, 2), 3, 255)
    expected = [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [2 / 3, 0, 1 / 3]]
    torch.testing.assert_close(shares[0], torch.tensor(expected))
    torch.testing.assert_close(shares[1], shares[0][[1, 0, 3, 2]])


def test_neighbours_that_say_shares():
    train, query = normal(40, 5), normal(7, 5, seed=1)
    said = normal(40, 3, seed=2).softmax(1)
    found = knn_shares(train, said, query, 6, 0.1, train_chunk=16)
    for row, one in zip(found, F.normalize(query, dim=1), strict=True):
        similarity = F.normalize(train, dim=1) @ one
        best = similarity.argsort(descending=True)[:6]
        weight = (similarity[best] / 0.1).exp()
        torch.testing.assert_close(row, (weight[:, None] * said[best]).sum(0) / weight.sum())


def test_scores_of_pixels():
    masks = torch.tensor([[[0, 0, 1, 1]] * 4, [[1, 1, 255, 3]] * 4])
    said = F.one_hot(torch.tensor([[0, 1], [1, 1]]), 4).float()  # halves of the image, left and right
    counts = pixel_counts(said, (1, 2), masks, 255)
    assert counts[0].tolist() == [[8, 8, 0, 0]] * 3
    assert counts[1].tolist() == [[0, 8, 0, 0], [0, 12, 0, 0], [0, 8, 0, 4]]
    scores = scores_of(counts.numpy())
    iou = [1, 16 / 20, math.nan, 0]
    np.testing.assert_allclose(scores.iou_C, [100 * x for x in iou])
    assert scores.miou == pytest.approx(100 * np.nanmean(iou)) and scores.pixel_accuracy == pytest.approx(100 * 24 / 28)
    both = miou_of(np.stack([counts.sum(0).numpy(), counts[0].numpy()]).reshape(2, -1))
    assert both.tolist() == pytest.approx([np.nanmean(iou), 1])


# --- subsets and intervals --------------------------------------------------------------------------------------------


def test_class_balanced_subsets():
    labels = np.array([0] * 30 + [1] * 7 + [4] * 100)
    five = class_balanced(labels, shots(5), seed=3)
    assert np.bincount(labels[five]).tolist() == [5, 5, 0, 0, 5] and (np.diff(five) > 0).all()
    assert {*class_balanced(labels, shots(2), 3)} <= {*five} and {*class_balanced(labels, shots(5), 4)} != {*five}
    assert np.bincount(labels[class_balanced(labels, share(0.1), 0)]).tolist() == [3, 1, 0, 0, 10]
    assert class_balanced(labels, share(1.0), 0).tolist() == list(range(137))
    with pytest.raises(UserError, match="class 1 has 7"):
        class_balanced(labels, shots(8), 0)


def test_intervals_against_tables_and_each_other():
    assert student_t(1) == pytest.approx(12.706, abs=1e-3) and student_t(4) == pytest.approx(2.776, abs=1e-3)
    assert student_t(1000) == pytest.approx(1.962, abs=1e-3)
    assert over_seeds([5.0]) is None
    assert over_seeds([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4) and wilson(0.0, 10)[0] == 0
    right = (np.arange(400) % 4 == 0).astype(np.float64)[:, None]
    low, high = bootstrap(right, lambda sums: sums[:, 0] / 400)
    assert (low, high) == pytest.approx(wilson(0.25, 400), abs=0.01)
    assert bootstrap(right, lambda sums: sums[:, 0] / 400) == (low, high)
