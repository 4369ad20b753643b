"""Accuracy of the result so far, on the labelled sets of the config."""

from typing import Any

import torch
from torch import Tensor

from dino_sd.config import Config
from dino_sd.data.loader import auto_workers
from dino_sd.data.source import open_source
from dino_sd.distributed import local_world_size
from dino_sd.embed import embed
from dino_sd.errors import UserError
from dino_sd.evaluators.accuracy import scores_of
from dino_sd.evaluators.knn import knn
from dino_sd.method import Network, SelfDistillation
from dino_sd.models.heads import says_classes
from dino_sd.models.model import check_same_classes
from dino_sd.settings import size_pair


class Validation:
    """Classifiers on `evaluate.test`, and k-NN where there is an `evaluate.train`. Made before the run, to fail early.

    data: what `run.describe` says of the training set. Raises UserError on sets without labels or with other classes.
    """

    def __init__(self, cfg: Config, method: SelfDistillation, device: torch.device, data: dict[str, Any]):
        self.settings, self.device, self.arguments = cfg.evaluate, device, {}
        if cfg.evaluate.every is None:
            return
        self.heads = [name for name, head in method.student.heads.items() if says_classes(head)]
        names = [name for name in ("train", "test") if getattr(cfg.evaluate, name) is not None]
        if "train" not in names and not self.heads:
            raise UserError("evaluate.every: without labels in training there is k-NN alone; set evaluate.train for it")
        self.sources = {name: open_source(str(getattr(cfg.evaluate, name)), cfg.channels) for name in names}
        known = data["classes"] if self.heads else None
        for name, source in self.sources.items():
            where = f"evaluate.{name}={source.name}"
            if source.labels() is None:
                raise UserError(f"{where} has no labels; use class folders")
            if known is not None and source.classes is not None and {*source.classes} <= {*known}:
                source.name_classes(known)
            elif known is not None and source.classes is not None:
                check_same_classes(where, source.classes, f"data={cfg.data}", known)
        if "train" in names:
            train, test = (self.sources[name].classes or [] for name in ("train", "test"))
            if {*test} <= {*train}:  # the same, or some of them
                self.sources["test"].name_classes(train)
            elif {*test} & {*train} or len(train) != len(test):
                raise UserError(
                    f"evaluate.train has {len(train)} classes, evaluate.test {len(test)} others; k-NN needs the same "
                    f"ones in both"
                )
        workers = cfg.workers
        if workers == "auto":
            in_memory = all(source.stack is not None for source in self.sources.values())
            workers = auto_workers(device.type, local_world_size(), in_memory)
        self.arguments: dict[str, Any] = {
            "size": size_pair(cfg.evaluate.size or cfg.views.global_.size), "crop": cfg.evaluate.crop,
            "mean": data["mean"], "std": data["std"], "device": device, "batch_size": cfg.evaluate.batch_size,
            "workers": workers,
            "precision": "bf16" if cfg.precision == "bf16" else "fp32",
        }  # fmt: skip

    def __call__(self, method: SelfDistillation) -> dict[str, Any]:
        """{"knn", "accuracy", "accuracy_top5", "accuracy_per_class", "exit_3/accuracy", "ensemble/accuracy", ...}"""
        result: Network = getattr(method, method.result)
        network = Network(result.backbone, {name: result.heads[name] for name in self.heads})  # runs uncompiled
        width = network.backbone.width

        def everything(images: Tensor) -> Tensor:
            seen = network([images], len(images))
            return torch.cat([seen.pooled[0], *(seen.outputs[name][0] for name in self.heads)], 1)

        found_NX, labels_N = embed(network.backbone, self.sources["test"], of=everything, **self.arguments)
        scores: dict[str, Any] = {}
        if "train" in self.sources:
            train_ND, train_labels_N = embed(network.backbone, self.sources["train"], **self.arguments)
            k, train_ND = min(self.settings.k, len(train_ND)), train_ND.to(self.device)
            votes = knn(train_ND, train_labels_N, found_NX[:, :width], labels_N, (k,), self.settings.temperature)
            scores["knn"] = votes[k][0]
        method.train()
        if self.heads:
            parts = found_NX[:, width:].chunk(len(self.heads), 1)
            for name, score in scores_of(dict(zip(self.heads, parts, strict=True)), labels_N).items():
                prefix = "" if name == "classifier" else f"{name}/"
                scores |= {f"{prefix}accuracy": score.top1, f"{prefix}accuracy_top5": score.top5}
                if name == "classifier":
                    scores["accuracy_per_class"] = score.per_class
        return scores
