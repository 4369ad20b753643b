"""How good a frozen model is: one function for each evaluator, from settings to what is written.

All of them work alike: every rank takes part and gets the same numbers; rank 0 prints a table and writes a JSON file;
json_only: stdout gets exactly one JSON object, the rest is on stderr. They raise UserError on models, data and labels
that do not fit together.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_sd.data.source import Chosen, Source, open_source
from dino_sd.distributed import all_gather_rows, rank, setup, world_size
from dino_sd.embed import parts_of
from dino_sd.errors import UserError
from dino_sd.evaluator_config import (
    AccuracySettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RanksSettings,
    RetrievalSettings,
)
from dino_sd.evaluators.accuracy import scores_of
from dino_sd.evaluators.knn import knn
from dino_sd.evaluators.linear import linear_probe
from dino_sd.evaluators.logistic import logistic_regression
from dino_sd.evaluators.ranks import ranks
from dino_sd.evaluators.retrieval import check, retrieval
from dino_sd.features import Embedding, labelled_pair, number_of_classes, prepare
from dino_sd.intervals import bootstrap, over_seeds, wilson
from dino_sd.method import Network
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model, check_same_classes
from dino_sd.subsets import class_balanced, share, shots
from dino_sd.tables import INTERVAL, about, accuracies, deliver, describe, percent

Spec = str | Path | Model


def evaluate_knn(spec: Spec, settings: KnnSettings, json_only: bool = False) -> dict[str, Any]:
    """Weighted k-NN of a model's features, with all training images and with few of each class."""
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    train, test = labelled_pair(model, settings.train, settings.test)
    features = Embedding(model, device, settings, batch_size=settings.batch_size)
    train_ND, train_labels_N = features(train, "train")
    test_ND, test_labels_N = features(test, "test") if settings.test is not None else (train_ND, train_labels_N)
    classes, alone = number_of_classes(train, test), settings.test is None

    def scored(ks: list[int], rows_n: np.ndarray | None = None) -> dict[int, tuple[float, float]]:
        kept = slice(None) if rows_n is None else torch.from_numpy(rows_n)
        return knn(
            train_ND[kept].to(device), train_labels_N[kept], test_ND, test_labels_N, ks, settings.temperature, classes,
            leave_one_out=alone,
        )  # fmt: skip

    if alone and settings.shots:
        raise UserError("shots: few images of a class are judged on a set of their own; set test=DATA")
    results = [{"k": k} | accuracies(*score, len(test_labels_N)) for k, score in scored(settings.k).items()]
    for count in settings.shots:
        draws: dict[int, list[tuple[float, float]]] = {}
        for draw in range(settings.seeds):
            rows_n = class_balanced(train_labels_N.numpy(), shots(count), settings.seed + draw)
            for k, score in scored([min(k, len(rows_n)) for k in settings.k], rows_n).items():
                draws.setdefault(k, []).append(score)
        results += [{"shots": count, "seeds": settings.seeds, "k": k} | mean_of(scores) for k, scores in draws.items()]
    judged = about(test, len(test_labels_N)) | ({"leave_one_out": True} if alone else {})
    report = describe(
        "knn",
        model,
        features.size,
        settings,
        results,
        began,
        judged=judged,
        learned=about(train, len(train_labels_N)),
        classes=classes,
    )
    deliver(report, model, settings.out, json_only)
    return report


def mean_of(scores: list[tuple[float, float]]) -> dict[str, Any]:
    """A row's scores over several seeds: mean and interval (Student's t)."""
    row: dict[str, Any] = {}
    for key, values in zip(("top1", "top5"), zip(*scores, strict=True), strict=True):
        interval = over_seeds(values)
        row |= {key: float(np.mean(values)), key + INTERVAL: interval and list(interval)}
    return row


def evaluate_linear(spec: Spec, settings: LinearSettings, json_only: bool = False) -> dict[str, Any]:
    """A linear probe on a model's features: every rate, choice of blocks and pooling at once, the best one judged.

    Features are computed once, or anew in every epoch with `augment`. All ranks train the same small probes.
    """
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    train, test = labelled_pair(model, settings.train, settings.test)
    wanted: dict[str, list[str]] = {}  # choices that come to the same columns are one
    for blocks in settings.blocks:
        for pool in settings.pool:
            parts = parts_of(model.backbone, blocks, pool)
            named = f"{pool}, {max(len(parts) - (pool == 'cls+mean'), 1)} block(s)"
            if parts not in wanted.values():
                wanted[named] = parts
    every = sorted({part for parts in wanted.values() for part in parts}, key=_in_order)
    features = Embedding(model, device, settings, every, batch_size=settings.embed_batch_size)

    first, train_labels_N = features(train, "train", augment=(settings.seed, 0) if settings.augment else None)
    first = first.to(device)

    def of_epoch(epoch: int) -> Tensor:
        if epoch == 0:
            return first
        return features(train, f"train, epoch {epoch}", augment=(settings.seed, epoch))[0].to(device)

    train_ND = of_epoch if settings.augment else first
    test_ND, test_labels_N = features(test, "test")
    classes = number_of_classes(train, test)
    result = linear_probe(
        train_ND, train_labels_N, test_ND, test_labels_N, classes=classes,
        choices={name: [features.columns[part] for part in parts] for name, parts in wanted.items()},
        epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed,
    )  # fmt: skip
    row = {"features": result.choice, "lr": result.lr} | accuracies(result.top1, result.top5, len(test_labels_N))
    report = describe(
        "linear", model, features.size, settings, [row], began, judged=about(test, len(test_labels_N)),
        learned=about(train, len(train_labels_N)), classes=classes,
    )  # fmt: skip
    held_out = {name: {str(lr): top1 for lr, top1 in rates.items()} for name, rates in result.held_out.items()}
    report |= {"held_out_top1": held_out, "losses": result.losses}
    deliver(report, model, settings.out, json_only)
    return report


def _in_order(part: str) -> tuple[int, int]:
    """Blocks in their order, then the mean, so that most choices are neighbouring columns; the model's output last."""
    return (0, int(part.removeprefix("block_"))) if part.startswith("block_") else (1 + (part == "pooled"), 0)


def evaluate_logistic(spec: Spec, settings: LogisticSettings, json_only: bool = False) -> dict[str, Any]:
    """Logistic regression on a model's features, with shares of the labels."""
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    train, test = labelled_pair(model, settings.train, settings.test)
    parts = parts_of(model.backbone, settings.blocks, settings.pool)
    features = Embedding(model, device, settings, parts, batch_size=settings.batch_size)
    (train_ND, train_labels_N), (test_ND, test_labels_N) = features(train, "train"), features(test, "test")
    classes, results = number_of_classes(train, test), []
    for part in settings.share:
        scores: list[tuple[float, float]] = []
        penalties, images = [], 0
        for draw in range(settings.seeds if part < 1 else 1):
            rows = class_balanced(train_labels_N.numpy(), share(part), settings.seed + draw)
            rows_n = torch.from_numpy(rows)
            result = logistic_regression(
                train_ND[rows_n], train_labels_N[rows_n], test_ND, test_labels_N, classes=classes, l2=settings.l2,
                seed=settings.seed + draw,
            )  # fmt: skip
            scores.append((result.top1, result.top5))
            penalties.append(result.l2)
            images = len(rows_n)
        row = accuracies(*scores[0], len(test_labels_N)) if len(scores) == 1 else mean_of(scores)
        about_row = {"share": part, "images": images, "seeds": len(scores), "l2": float(np.median(penalties))}
        results.append(about_row | row)
    report = describe(
        "logistic", model, features.size, settings, results, began, judged=about(test, len(test_labels_N)),
        learned=about(train, len(train_labels_N)), classes=classes,
    )  # fmt: skip
    deliver(report, model, settings.out, json_only)
    return report


def evaluate_retrieval(spec: Spec, settings: RetrievalSettings, json_only: bool = False) -> dict[str, Any]:
    """Mean average precision and recall at k of nearest images. Ranks share out the queries."""
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    alone = settings.train is None
    bank, queries = labelled_pair(model, settings.train or settings.test, None if alone else settings.test)
    features = Embedding(model, device, settings, batch_size=settings.batch_size)
    bank_ND, bank_labels_N = features(bank, "bank")
    queries_ND, labels_N = (bank_ND, bank_labels_N) if alone else features(queries, "queries")
    check(
        "query", queries_ND, labels_N
    )  # all of them on every rank: one that raised alone would leave the others waiting
    mine = slice(len(labels_N) * rank() // world_size(), len(labels_N) * (rank() + 1) // world_size())
    found = retrieval(
        queries_ND[mine], labels_N[mine], bank_ND.to(device), bank_labels_N, settings.k, mine.start if alone else None
    )
    place = device if device.type == "cuda" else "cpu"
    columns = [found.average_precision_N, *found.recall_N.values()]
    rows_NX = all_gather_rows(torch.stack(columns, 1).to(place)).cpu().numpy()
    if not len(rows_NX):
        raise UserError(f"retrieval: no image of test={queries.name} has another one of its class to find")
    row: dict[str, Any] = {"queries": len(rows_NX)}
    if len(rows_NX) < len(labels_N):
        row |= {"nothing to find": len(labels_N) - len(rows_NX)}
    row |= {"map": 100 * float(rows_NX[:, 0].mean())}
    row["map" + INTERVAL] = percent(bootstrap(rows_NX[:, :1], lambda sums: sums[:, 0] / len(rows_NX)))
    for k, hits_N in zip(found.recall_N, rows_NX[:, 1:].T, strict=True):
        row |= {f"recall@{k}": 100 * float(hits_N.mean())}
        row[f"recall@{k}" + INTERVAL] = percent(wilson(float(hits_N.mean()), len(hits_N)))
    report = describe(
        "retrieval", model, features.size, settings, [row], began,
        judged=about(queries, len(labels_N))
        | {"finds": "itself, leaving one out" if alone else about(bank, len(bank_labels_N))},
        classes=number_of_classes(bank, queries),
    )  # fmt: skip
    deliver(report, model, settings.out, json_only)
    return report


def evaluate_ranks(spec: Spec, settings: RanksSettings, json_only: bool = False) -> dict[str, Any]:
    """Signs of good features that need no labels."""
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    test = open_source(settings.test, model.channels)
    features = Embedding(model, device, settings, batch_size=settings.batch_size)
    all_ND, _ = features(test, "images")
    count = min(settings.images, len(test))
    some = Chosen(test, np.arange(count) * len(test) // count)
    views = [features(some, f"view {view + 1}", augment=(settings.seed, view))[0] for view in range(settings.views)]
    row = {"images": len(all_ND), "views": f"{count} x {settings.views}", **ranks(all_ND, torch.stack(views, 1))}
    report = describe("ranks", model, features.size, settings, [row], began, judged=about(test, len(all_ND)))
    deliver(report, model, settings.out, json_only)
    return report


def evaluate_accuracy(spec: Spec, settings: AccuracySettings, json_only: bool = False) -> dict[str, Any]:
    """Accuracy of the classifier that a model was trained with, of its exits and of all of them together.

    What is written has the accuracy of every class, too.
    """
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    test = open_source(settings.test, model.channels)
    logits, labels_N = class_logits(model, test, device, settings)
    scores = scores_of(logits, labels_N)
    results = [
        {"output": name} | accuracies(result.top1, result.top5, len(labels_N)) for name, result in scores.items()
    ]
    per_class = scores["classifier"].per_class
    names = model.classes or [str(label) for label in range(len(per_class))]
    report = describe(
        "accuracy",
        model,
        model.size,
        settings,
        results,
        began,
        judged=about(test, len(labels_N)),
        classes=number_of_classes(test),
    )
    report["per_class"] = dict(zip(names, per_class, strict=True))
    deliver(report, model, settings.out, json_only)
    return report


def class_logits(
    model: Model, test: Source, device: torch.device, settings: AccuracySettings
) -> tuple[dict[str, Tensor], Tensor]:
    """({output: (N, C)}, labels_N) of a model's classifier and exits, on the CPU.

    Raises UserError for a model without classes, a set without labels, and other classes.
    """
    if not isinstance(model.backbone, Backbone) or "classifier" not in model.heads:
        raise UserError(
            f"MODEL {model.description} knows no classes: it was trained without labels; judge it with knn or linear"
        )
    if test.labels() is None:
        raise UserError(f"test={test.name} has no labels; evaluation needs them, e.g. one folder a class")
    if test.classes and model.classes and {*test.classes} <= {*model.classes}:  # the same, or some of them
        test.name_classes(model.classes)
    elif test.classes:
        count = getattr(model.heads["classifier"], "out_features", len(model.classes or test.classes))
        check_same_classes(f"MODEL {model.description}", model.classes or count, f"test={test.name}", test.classes)
    network = Network(model.backbone, model.heads)

    def logits_of(images: Tensor) -> Tensor:
        outputs = network([images], len(images)).outputs
        return torch.cat([outputs[name][0] for name in model.heads], 1)

    features = Embedding(model, device, settings, batch_size=settings.batch_size)
    logits_NX, labels_N = features(test, "test", of=logits_of)
    return dict(zip(model.heads, logits_NX.chunk(len(model.heads), 1), strict=True)), labels_N
