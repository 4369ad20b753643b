"""How good a frozen model is on labelled images: k-NN, a linear probe, and the accuracy of its own classifiers.

As a table, a JSON file and on stdout."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from dino_sd import __version__
from dino_sd.config import AccuracySettings, EvaluatorSettings, JudgeSettings, KnnSettings, LinearSettings
from dino_sd.data.loader import auto_workers
from dino_sd.data.source import Source, open_source
from dino_sd.distributed import is_main, local_world_size, say, setup, world_size
from dino_sd.embed import embed, last_blocks
from dino_sd.errors import UserError
from dino_sd.evaluators.accuracy import scores_of
from dino_sd.evaluators.knn import knn
from dino_sd.evaluators.linear import linear_probe
from dino_sd.loading import load_model, shallow
from dino_sd.method import Network
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model, check_same_classes
from dino_sd.settings import plain

OWN_SIZE_UP_TO = 64  # pixels; raw pixels of larger images are compared at 32 x 32


def evaluate_knn(spec: str | Path | Model, settings: KnnSettings, json_only: bool = False) -> dict[str, Any]:
    """Weighted k-NN of a model's features; returns what is written. Every rank takes part and gets the same numbers.

    Rank 0 prints a table and writes a JSON file; json_only: stdout gets exactly one JSON object, the rest is on stderr.
    Raises UserError on models, data and labels that do not fit together.
    """
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    train, test = labelled_pair(model, settings)
    features = Embedding(model, device, settings)
    (train_ND, train_labels_N), (test_ND, test_labels_N) = features(train, "train"), features(test, "test")
    scores = knn(
        train_ND.to(device), train_labels_N, test_ND, test_labels_N, settings.k, settings.temperature,
        number_of_classes(train, test),
    )  # fmt: skip
    results = [{"k": k, "top1": top1, "top5": top5} for k, (top1, top5) in scores.items()]
    report = describe("knn", model, features.size, settings, train, test, results, began)
    deliver(report, model, settings.out, json_only)
    return report


def evaluate_linear(spec: str | Path | Model, settings: LinearSettings, json_only: bool = False) -> dict[str, Any]:
    """A linear probe on a model's features; returns what is written. Ranks, printing and errors as in `evaluate_knn`.

    Features are computed once, or anew in every epoch with `augment`. All ranks train the same small probe.
    """
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    train, test = labelled_pair(model, settings)
    features = Embedding(model, device, settings)

    first, train_labels_N = features(train, "train", augment=(settings.seed, 0) if settings.augment else None)
    first = first.to(device)

    def of_epoch(epoch: int) -> Tensor:
        if epoch == 0:
            return first
        return features(train, f"train, epoch {epoch}", augment=(settings.seed, epoch))[0].to(device)

    train_ND = of_epoch if settings.augment else first
    test_ND, test_labels_N = features(test, "test")
    result = linear_probe(
        train_ND, train_labels_N, test_ND, test_labels_N, classes=number_of_classes(train, test),
        epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed,
    )  # fmt: skip
    row = {"lr": result.lr, "top1": result.top1, "top5": result.top5}
    report = describe("linear", model, features.size, settings, train, test, [row], began)
    report |= {"held_out_top1": {str(lr): top1 for lr, top1 in result.held_out.items()}, "losses": result.losses}
    deliver(report, model, settings.out, json_only)
    return report


def evaluate_accuracy(spec: str | Path | Model, settings: AccuracySettings, json_only: bool = False) -> dict[str, Any]:
    """Accuracy of the classifier that a model was trained with, of its exits and of all of them together.

    Returns what is written, with the accuracy of every class. Ranks, printing and errors as in `evaluate_knn`.
    """
    began = time.perf_counter()
    device = setup(settings.device)
    model = prepare(spec, device, settings)
    test = open_source(settings.test, model.channels)
    logits, labels_N = class_logits(model, test, device, settings)
    scores = scores_of(logits, labels_N)
    results = [{"output": name, "top1": result.top1, "top5": result.top5} for name, result in scores.items()]
    per_class = scores["classifier"].per_class
    names = model.classes or [str(label) for label in range(len(per_class))]
    report = describe("accuracy", model, model.size, settings, None, test, results, began)
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

    features = Embedding(model, device, settings)
    logits_NX, labels_N = features(test, "test", of=logits_of)
    return dict(zip(model.heads, logits_NX.chunk(len(model.heads), 1), strict=True)), labels_N


def prepare(spec: str | Path | Model, device: torch.device, settings: JudgeSettings) -> Model:
    model = spec
    if not isinstance(model, Model):
        channels = getattr(settings, "channels", None)
        model = load_model(model, device, network=settings.network, channels=channels, exit=settings.exit)
    elif settings.exit is not None:
        model = shallow(model, settings.exit)
    for note in model.notes:
        say(f"{model.description}: {note}")
    return model


def labelled_pair(model: Model, settings: EvaluatorSettings) -> tuple[Source, Source]:
    """Both sources, opened with the model's channels and checked: labels, and the same classes."""
    train, test = (open_source(data, model.channels) for data in (settings.train, settings.test))
    for name, source in (("train", train), ("test", test)):
        if source.labels() is None:
            raise UserError(f"{name}={source.name} has no labels; evaluation needs them, e.g. one folder a class")
    if train.classes != test.classes and train.classes is not None and test.classes is not None:
        if {*test.classes} <= {*train.classes}:  # the same, or some of them
            test.name_classes(train.classes)
        elif {*test.classes} & {*train.classes} or len(train.classes) != len(test.classes):
            only = sorted({*train.classes} ^ {*test.classes})[:3]
            raise UserError(
                f"train={train.name} has {len(train.classes)} classes, test={test.name} has {len(test.classes)}; "
                f"not in both: {', '.join(only)}"
            )
        else:
            say(f"warning: train and test name their {len(train.classes)} classes differently; taken as equal in order")
    return train, test


def labels_of(source: Source) -> Any:
    labels_N = source.labels()
    assert labels_N is not None
    return labels_N


def number_of_classes(*sources: Source) -> int:
    return max(1 + max(int(labels_of(source).max()), len(source.classes or ()) - 1) for source in sources)


class Embedding:
    """`embed` with a model's and the settings' arguments, and a progress bar on a terminal."""

    def __init__(self, model: Model, device: torch.device, settings: JudgeSettings):
        self.model, self.device, self.settings, self.size = model, device, settings, model.size
        size = getattr(settings, "embed_batch_size", None) or getattr(settings, "batch_size", 256)
        self.arguments: dict[str, Any] = {"batch_size": size}
        if isinstance(settings, LinearSettings):
            layers = () if settings.pool == "mean" else last_blocks(model.backbone, settings.blocks)
            self.arguments |= {"layers": layers, "pool": settings.pool}

    def __call__(
        self,
        source: Source,
        label: str,
        augment: tuple[int, int] | None = None,
        of: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        model, workers = self.model, self.settings.workers
        if workers == "auto":
            workers = auto_workers(self.device.type, local_world_size(), source.stack is not None)
        self.size = self.size or own_size(source)
        with progress_bar(label) as progress:
            return embed(
                model.backbone, source, size=self.size, crop=model.crop, mean=model.mean, std=model.std,
                device=self.device, workers=workers, precision=self.settings.precision, augment=augment,
                of=of, progress=progress, **self.arguments,
            )  # fmt: skip


def own_size(source: Source) -> tuple[int, int]:
    """For raw pixels: the size of the images themselves where they are small."""
    picture = source.picture(0)
    return (picture.height, picture.width) if max(picture.height, picture.width) <= OWN_SIZE_UP_TO else (32, 32)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    if not is_main() or not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"features ({label})")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def describe(
    evaluator: str,
    model: Model,
    size: tuple[int, int] | None,
    settings: JudgeSettings,
    train: Source | None,
    test: Source,
    results: list[dict[str, Any]],
    began: float,
) -> dict[str, Any]:
    """All one needs to get the same numbers again, and the numbers (percent)."""
    return {
        "evaluator": evaluator, "model": model.description, "results": results,
        "classes": number_of_classes(*([train] if train else []), test),
        "train": train and {"data": train.name, "images": len(train), "fingerprint": train.fingerprint()},
        "test": {"data": test.name, "images": len(test), "fingerprint": test.fingerprint()},
        "images": {"size": size, "crop": model.crop, "mean": model.mean, "std": model.std, "channels": model.channels},
        "settings": plain(settings), "provenance": model.provenance,
        "versions": {"dino_sd": __version__, "torch": torch.__version__}, "ranks": world_size(),
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def deliver(report: dict[str, Any], model: Model, out: str | None, json_only: bool) -> None:
    """Rank 0 prints the table, and writes the file where there is a place for it."""
    if not is_main():
        return
    console = Console(stderr=json_only)
    print_table(console, report)
    path = Path(out) if out else model.folder / "evaluations" / f"{report['evaluator']}.json" if model.folder else None
    if path is not None:
        write_json(path, report)
        console.print(f"written to {path}", soft_wrap=True, highlight=False, markup=False)
    if json_only:
        print(json.dumps(report), flush=True)


def print_table(console: Console, report: dict[str, Any]) -> None:
    train, test = report["train"], report["test"]
    table = Table()
    if train is None:
        trained = "its own classifiers"
    else:
        trained = f"trained on {train['images']:,} labelled images of {train['data']}"
    columns = [name for name in report["results"][0] if name != "top5" or report["classes"] > 5]
    for name in columns:
        table.add_column({"top1": "top-1 %", "top5": "top-5 %"}.get(name, name), justify="right")
    for row in report["results"]:
        table.add_row(*(shown(name, row[name]) for name in columns))
    console.print(f"{report['evaluator']} of {report['model']}", soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(
        f"{trained}, judged on {test['images']:,} of "
        f"{test['data']}; {report['classes']} classes; {report['seconds']} s",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


def shown(name: str, value: Any) -> str:
    return f"{value:.2f}" if name.startswith("top") else value if isinstance(value, str) else f"{value:g}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises UserError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror}); choose another with out=FILE") from None
