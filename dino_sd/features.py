"""A frozen model and the images it is judged on -> features: with progress, on every rank, once for all evaluators."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sd import __version__, feature_cache
from dino_sd.config import LookSettings, SetSettings
from dino_sd.data.cache import dates_of
from dino_sd.data.loader import auto_workers
from dino_sd.data.source import BadImage, Source, open_source, short_hash
from dino_sd.distributed import any_rank, barrier, is_main, local_world_size, say
from dino_sd.embed import Parts, embed
from dino_sd.errors import UserError
from dino_sd.evaluator_config import FrozenSettings
from dino_sd.loading import load_model, shallow
from dino_sd.models.model import Model
from dino_sd.models.pixels import Pixels
from dino_sd.progress import progress

OWN_SIZE_UP_TO = 64  # pixels; raw pixels of larger images are compared at 32 x 32


def prepare(spec: str | Path | Model, device: torch.device, settings: FrozenSettings | LookSettings) -> Model:
    """The model that the settings ask for, on this rank's device; says what had to be adapted.

    Raises UserError as `load_model` does, and where a model that is loaded already cannot be what they ask for.
    """
    exit, channels = getattr(settings, "exit", None), getattr(settings, "channels", None)
    if not isinstance(spec, Model):
        model = load_model(spec, device, network=settings.network, channels=channels, exit=exit)
        for note in model.notes:
            say(f"{model.description}: {note}")
        return model
    for name, value in (("network", settings.network), ("channels", channels)):
        if value is not None:
            raise UserError(f"{name}={value}: the model is loaded already ({spec.description}); say it when loading")
    return spec if exit is None else shallow(spec, exit)


def labelled_pair(model: Model, train_data: str, test_data: str | None) -> tuple[Source, Source]:
    """Both sources, opened with the model's channels and checked: labels, and the same classes.

    test_data: None for the training set itself.
    """
    train = open_source(train_data, model.channels)
    test = open_source(test_data, model.channels) if test_data is not None else train
    for name, source in (("train", train), ("test", test)):
        if source.labels() is None:
            raise UserError(f"{name}={source.name} has no labels; evaluation needs them, e.g. one folder a class")
    if test is not train and train.fingerprint() == test.fingerprint():
        say("warning: train and test are the same images, which find themselves: this is no accuracy (k-NN leaves each "
            "one out with test=null)")  # fmt: skip
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
    """Features of whole sources with a model's and the settings' arguments.

    parts: names as in `embed.Parts`. Those of a set of images are read from the cache where all of them are there; else
    they are computed, with what else the same pass gives, and kept. What counts as the same: weights, images (names,
    labels, sizes and dates of files), what is done to them, precision, kind of device and versions.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        settings: FrozenSettings,
        parts: Sequence[str] = ("pooled",),
        batch_size: int = 256,
    ):
        self.model, self.device, self.settings, self.size = model, device, settings, model.size
        self.parts, self.batch_size = list(dict.fromkeys(parts)), batch_size
        self.columns: dict[str, slice] = {}  # of each part in the features, once some have been computed

    def __call__(
        self,
        source: Source,
        label: str,
        augment: tuple[int, int] | None = None,
        of: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(features_ND, labels_N) as of `embed`. augment, of: as there; with either nothing is kept."""
        self.size = self.size or own_size(source)
        keeps = getattr(self.settings, "cache", False) and not isinstance(self.model.backbone, Pixels)
        if of is not None or augment is not None or not keeps:
            parts = Parts(self.model.backbone, self.parts)
            found = self._computed(source, label, of or parts, augment)
            self.columns = parts.columns
            return found
        key = self._key(source)
        kept = feature_cache.load(key, [*self.parts, "labels"])
        (missing,) = any_rank(kept is None)
        if kept is None or missing:
            parts = Parts(self.model.backbone, list(dict.fromkeys([*self.parts, "pooled"])))  # the last one is free
            features_NX, labels_N = self._computed(source, label, parts)
            kept = {name: features_NX[:, columns] for name, columns in parts.columns.items()} | {"labels": labels_N}
            if is_main() and len(labels_N) == len(source):  # an image that cannot be read may be readable tomorrow
                feature_cache.save(key, kept)
            barrier()
        ends = torch.tensor([0] + [kept[name].shape[1] for name in self.parts]).cumsum(0).tolist()
        self.columns = {name: slice(*pair) for name, *pair in zip(self.parts, ends, ends[1:], strict=False)}
        features = [kept[name] for name in self.parts]
        return (features[0] if len(features) == 1 else torch.cat(features, 1)), kept["labels"]

    def _computed(
        self,
        source: Source,
        label: str,
        of: Callable[[Tensor], Tensor],
        augment: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        with progress(f"features ({label})") as step:
            return embed(
                model.backbone, source, size=self.size or own_size(source), crop=model.crop, mean=model.mean,
                std=model.std, device=self.device, workers=workers_of(self.settings, self.device, source),
                batch_size=self.batch_size, precision=self.settings.precision, augment=augment, of=of, progress=step,
            )  # fmt: skip

    def _key(self, source: Source) -> str:
        model, labels_N = self.model, source.labels()
        how: dict[str, Any] = {
            "size": self.size, "crop": model.crop, "mean": model.mean, "std": model.std,
            "precision": self.settings.precision, "device": self.device.type, "files": dates_of(source.files()),
            "model": repr(model.backbone),
            "versions": (__version__, torch.__version__),
        }  # fmt: skip
        data = [source.fingerprint().encode(), b"" if labels_N is None else labels_N.tobytes()]
        return short_hash(model.weights.encode(), *data, repr(how).encode())


def workers_of(settings: FrozenSettings | SetSettings, device: torch.device, source: Source) -> int:
    """Loader processes of a rank."""
    if settings.workers != "auto":
        return settings.workers
    return auto_workers(device.type, local_world_size(), source.stack is not None)


def own_size(source: Source) -> tuple[int, int]:
    """For raw pixels: the size of the images where they are small. Raises BadImage where none can be read."""
    for index in range(len(source)):
        with suppress(BadImage):
            picture = source.picture(index)
            break
    else:
        picture = source.picture(0)  # raises
    return (picture.height, picture.width) if max(picture.height, picture.width) <= OWN_SIZE_UP_TO else (32, 32)
