"""The settings of a run: one typed tree, read from YAML plus `key=value`. It knows no objects; build.py makes those."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dino_sd.errors import UserError


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors, every field says what it is and in which unit."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False)


def _check_duration(value: float | str) -> float | str:
    if isinstance(value, str):
        if not re.fullmatch(r"(epochs|steps|images)=\d+(\.\d+)?(e\d+)?", value):
            raise ValueError("expected a share of the run (0 to 1) or epochs=N, steps=N, images=N")
    elif not 0 <= value <= 1:
        raise ValueError("a share of the run lies between 0 and 1; for a count write epochs=N, steps=N or images=N")
    return value


Duration = Annotated[float | str, AfterValidator(_check_duration)]
Probability = Annotated[float, Field(ge=0, le=1)]
Size = int | tuple[int, int]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


Probabilities = Annotated[list[Probability], BeforeValidator(_as_list), Field(min_length=1)]


def size_pair(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def is_duration(field: Any) -> bool:
    return any(getattr(mark, "func", None) is _check_duration for mark in field.metadata)


def to_steps(duration: float | str, *, steps: int, steps_per_epoch: int, batch_size: int) -> int:
    """A duration in optimizer steps of a run that has `steps` of them."""
    if not isinstance(duration, str):
        return round(duration * steps)
    unit, count = duration.split("=")
    return math.ceil(float(count) * {"epochs": steps_per_epoch, "steps": 1, "images": 1 / batch_size}[unit] - 1e-9)


class Curve(Settings):
    """A value that moves during the run. A bare number in place of the group is a constant."""

    start: float = Field(description="value at the first step")
    end: float = Field(description="value at the end")
    shape: Literal["cosine", "linear"] = Field(default="cosine", description="cosine over the whole run, or linear")
    over: Duration = Field(default=1.0, description="linear only: where `end` is reached; duration")
    change: Literal["step", "epoch"] = Field(
        default="step", description="linear only: a new value every step or every epoch"
    )

    @model_validator(mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        return {"start": value, "end": value} if isinstance(value, (int, float, str)) else value


class GlobalCrops(Settings):
    count: int = Field(default=2, ge=1, description="global crops an image")
    size: Size = Field(default=224, description="side in pixels, or [height, width]")
    scale: tuple[float, float] = Field(default=(0.4, 1.0), description="share of the image's area that a crop covers")
    blur: Probabilities = Field(default=[1.0, 0.1], description="probability of blur, one a crop; the last is repeated")
    solarize: Probabilities = Field(default=[0.0, 0.2], description="probability of solarising, one a crop; likewise")


class LocalCrops(Settings):
    count: int = Field(default=8, ge=0, description="local crops an image; 0 turns them off")
    size: Size = Field(default=96, description="side in pixels, or [height, width]")
    scale: tuple[float, float] = Field(default=(0.05, 0.4), description="share of the image's area that a crop covers")
    blur: Probabilities = Field(default=[0.5], description="probability of blur, one a crop; the last is repeated")
    solarize: Probabilities = Field(default=[0.0], description="probability of solarising, one a crop; likewise")


class Jitter(Settings):
    probability: Probability = Field(default=0.8, description="share of crops whose colours are jittered")
    brightness: float = Field(default=0.4, ge=0, le=1, description="factor drawn from 1 - x to 1 + x")
    contrast: float = Field(default=0.4, ge=0, le=1, description="factor drawn from 1 - x to 1 + x")
    saturation: float = Field(
        default=0.2, ge=0, le=1, description="factor drawn from 1 - x to 1 + x; three channels only"
    )
    hue: float = Field(default=0.1, ge=0, le=0.5, description="shift drawn from -x to x of a turn; three channels only")


class Views(Settings):
    global_: GlobalCrops = Field(default_factory=lambda: GlobalCrops(), alias="global")
    local: LocalCrops = Field(default_factory=lambda: LocalCrops())
    ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="width / height of a crop before it is resized"
    )
    flip: Probability = Field(default=0.5, description="probability of a horizontal flip")
    jitter: Jitter = Field(default_factory=lambda: Jitter())
    grayscale: Probability = Field(default=0.2, description="share of crops made gray; three channels only")
    blur_sigma: tuple[float, float] = Field(
        default=(0.1, 2.0), description="standard deviation of the blur, pixels, from - to"
    )
    mean: list[float] | None = Field(
        default=None, description="per channel, pixels from 0 to 1; null: measured on the data"
    )
    std: list[float] | None = Field(
        default=None, description="per channel, pixels from 0 to 1; null: measured on the data"
    )


class Teacher(Settings):
    momentum: Curve = Field(
        default_factory=lambda: Curve(start=0.996, end=1.0), description="share of the teacher kept at each step"
    )


class Optim(Settings):
    name: Literal["adamw", "sgd", "lars"] = Field(default="adamw", description="sgd and lars use momentum 0.9")
    lr: float = Field(
        default=5e-4, gt=0, description="peak learning rate for 256 images a step; scaled by batch_size / 256"
    )
    min_lr: float = Field(default=1e-6, ge=0, description="learning rate at the end; not scaled")
    warmup: Duration = Field(default=0.1, description="linear warm-up of the learning rate; duration")
    weight_decay: Curve = Field(
        default_factory=lambda: Curve(start=0.04, end=0.4), description="not applied to biases and 1-d parameters"
    )
    clip: float | None = Field(
        default=3.0, gt=0, description="largest gradient norm of each parameter by itself; null: off"
    )


class Evaluate(Settings):
    every: Duration | None = Field(
        default=None, description="k-NN on `test` this often, and before the first step; duration"
    )
    train: str | None = Field(default=None, description="labelled set that votes: DATA")
    test: str | None = Field(default=None, description="labelled set that is judged: DATA")
    k: int = Field(default=20, ge=1, description="neighbours that vote")
    temperature: float = Field(default=0.07, gt=0, description="a vote weighs exp(similarity / temperature)")
    size: Size | None = Field(default=None, description="side of evaluation images in pixels; null: the global crops'")
    crop: float = Field(
        default=0.875, gt=0, le=1, description="share of the resized image's side that the centre crop keeps"
    )
    batch_size: int = Field(default=256, ge=1, description="images at a time")

    @model_validator(mode="after")
    def _both_sets(self) -> "Evaluate":
        if self.every is not None and (self.train is None or self.test is None):
            raise ValueError("evaluate.every needs labelled sets: set evaluate.train and evaluate.test")
        return self


class Checkpoint(Settings):
    every: Duration = Field(default=0.05, description="save this often; duration")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    milestone: Duration | None = Field(default=None, description="checkpoints this far apart stay for good; duration")


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


class Log(Settings):
    every: int = Field(
        default=50, ge=1, description="steps between two lines of metrics.jsonl (means over these steps)"
    )
    wandb: Annotated[Literal["off", "online", "offline"], BeforeValidator(_off)] = Field(
        default="off", description="send the metrics to Weights & Biases too"
    )


class Config(Settings):
    model: str = Field(default="vit_small_patch16_224", description="any timm model name")
    model_args: dict[str, Any] = Field(default={}, description="passed on to timm.create_model")
    channels: Literal[1, 3] = Field(default=3, description="1: images are read as gray; 3: as RGB")
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="stochastic depth of the student")
    init: str | None = Field(
        default=None, description="start from these weights: timm:NAME, a run, a checkpoint or an export"
    )
    data: str = Field(default="fashion-mnist-mini:train", description="images to train on: DATA")
    out: str = Field(default="runs/dino", description="folder of the run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="every random number of the run derives from it")
    epochs: float | None = Field(default=None, gt=0, description="length of the run in passes over the data")
    steps: int | None = Field(default=None, gt=0, description="length of the run in optimizer steps")
    images: float | None = Field(default=None, gt=0, description="length of the run in images seen")
    batch_size: int = Field(default=512, ge=1, description="images a step, over all ranks and accumulated parts")
    accumulate: int = Field(
        default=1, ge=1, description="parts that a step's batch is worked through in, to save memory"
    )
    views: Views = Field(default_factory=lambda: Views())
    terms: dict[str, Any] = Field(default={"dino": {}}, description="summands of the loss: file names in dino_sd/terms")
    teacher: Teacher = Field(default_factory=lambda: Teacher())
    optim: Optim = Field(default_factory=lambda: Optim())
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        default="bf16", description="of the networks; losses are never in bf16"
    )
    compile: bool = Field(default=False, description="torch.compile the backbones")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to train")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="loader processes a rank"
    )
    evaluate: Evaluate = Field(default_factory=lambda: Evaluate())
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint())
    log: Log = Field(default_factory=lambda: Log())

    @model_validator(mode="after")
    def _cross_checks(self) -> "Config":
        lengths = [name for name in ("epochs", "steps", "images") if getattr(self, name) is not None]
        if len(lengths) != 1:
            found = f"found {' and '.join(lengths)}" if lengths else "found none"
            raise ValueError(f"set exactly one of epochs, steps, images as the length of the run; {found}")
        for name, crops in (("global", self.views.global_), ("local", self.views.local)):
            low, high = crops.scale
            if not 0 < low <= high <= 1:
                raise ValueError(f"views.{name}.scale=[{low}, {high}]: expected 0 < from <= to <= 1")
        for name in ("mean", "std"):
            values = getattr(self.views, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"views.{name} has {len(values)} value(s) but channels={self.channels}")
        if self.views.std is not None and min(self.views.std) <= 0:
            raise ValueError(f"views.std={self.views.std}: expected values above 0")
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self.views, name)
            if not 0 < low <= high:
                raise ValueError(f"views.{name}=[{low}, {high}]: expected 0 < from <= to")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        return self


class KnnSettings(Settings):
    """Weighted k-NN on frozen features (Caron et al. 2021, appendix F.1)."""

    train: str = Field(description="labelled set that votes: DATA")
    test: str = Field(description="labelled set that is judged: DATA")
    k: Annotated[list[int], BeforeValidator(_as_list)] = Field(
        default=[20], description="neighbours that vote; one or a list"
    )
    temperature: float = Field(default=0.07, gt=0, description="a vote weighs exp(similarity / temperature)")
    batch_size: int = Field(default=256, ge=1, description="images at a time")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="loader processes a rank"
    )
    precision: Literal["bf16", "fp32"] = Field(default="fp32", description="of the backbone")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to compute")
    network: Literal["teacher", "student"] | None = Field(
        default=None, description="of a checkpoint; null: the run's result"
    )
    channels: Literal[1, 3] | None = Field(default=None, description="for MODEL `pixels` only: gray or RGB; null: 3")
    out: str | None = Field(default=None, description="JSON file; null: evaluations/ beside the model")


class LinearSettings(Settings):
    """Linear probe on frozen features (Caron et al. 2021, appendix F.2)."""

    train: str = Field(description="labelled set to learn from: DATA")
    test: str = Field(description="labelled set that is judged: DATA")
    blocks: int | None = Field(
        default=None,
        ge=1,
        description="last blocks whose pooled outputs are concatenated; null: 4 with a class token, else 1",
    )
    pool: Literal["cls", "mean", "cls+mean"] = Field(
        default="cls",
        description="class token (or the model's own pooling) of each block; mean: of the last block's patches",
    )
    lr: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        default=[0.001, 0.003, 0.01, 0.03, 0.1],
        description="learning rate for 256 images a step; of a list, the best on a tenth of the training set is taken",
    )
    epochs: int = Field(default=100, ge=1, description="passes over the training set")
    batch_size: int = Field(default=1024, ge=1, description="features a step")
    augment: bool = Field(
        default=False, description="random resized crops and flips; features are computed anew every epoch"
    )
    seed: int = Field(default=0, ge=0, description="order of the features and first weights")
    embed_batch_size: int = Field(default=256, ge=1, description="images at a time through the backbone")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="loader processes a rank"
    )
    precision: Literal["bf16", "fp32"] = Field(default="fp32", description="of the backbone")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where to compute")
    network: Literal["teacher", "student"] | None = Field(
        default=None, description="of a checkpoint; null: the run's result"
    )
    channels: Literal[1, 3] | None = Field(default=None, description="for MODEL `pixels` only: gray or RGB; null: 3")
    out: str | None = Field(default=None, description="JSON file; null: evaluations/ beside the model")


class ExportSettings(Settings):
    out: str = Field(description="folder of the export")
    format: Literal["timm"] = Field(default="timm", description="timm: a folder for timm.create_model('local-dir:DIR')")
    network: Literal["teacher", "student"] | None = Field(
        default=None, description="of a checkpoint; null: the run's result"
    )


def group_of(annotation: Any) -> type[Settings] | None:
    """The group of settings that an annotation stands for, if any."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def fields(cls: type[Settings], groups: dict[str, type[Settings]], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted key, field). `groups` adds what the tree cannot know: {"terms.dino": its class}."""
    for name, field in cls.model_fields.items():
        key = prefix + (field.alias or name)
        inner = group_of(field.annotation)
        if inner is not None and inner is not Curve:
            yield from fields(inner, groups, key + ".")
        elif nested := {k: v for k, v in groups.items() if k.startswith(key + ".")}:
            for nested_key, nested_cls in nested.items():
                yield from fields(nested_cls, groups, nested_key + ".")
        else:
            yield key, field


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-5 is one. PyYAML's own rule wants 1.0e-5 and takes the rest for text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """["optim.lr=1e-3"] -> {"optim": {"lr": "1e-3"}}; values are read as YAML."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"command line: expected key=value, found {pair!r}")
        try:
            value = yaml.load(text, _Yaml)  # a SafeLoader
        except yaml.YAMLError:
            value = text
        *path, last = key.strip().lstrip("-").split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UserError(f"command line: {key!r} goes into {part!r}, which is set to a value already")
        place[last] = value
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Yaml)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config: {path} should hold `key: value` lines, found a {type(tree).__name__}")
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def check_keys(tree: dict[str, Any], cls: type[Settings], where: str, groups: dict[str, type[Settings]]) -> None:
    """Raises UserError on the first unknown key and says which known one is nearest."""
    known = dict(fields(cls, groups))
    inner = {key.rsplit(".", 1)[0] for key in known if "." in key}
    inner |= {key.split(".")[0] for key in known}
    opaque = {key for key, field in known.items() if field.annotation is dict or "dict" in str(field.annotation)}
    curves = {key for key, field in known.items() if group_of(field.annotation) is Curve}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in opaque:
                continue
            if key not in known and key not in inner and not (prefix[:-1] in curves and name in Curve.model_fields):
                raise UserError(f"config: unknown key {key!r} in {where}{_suggestion(key, known, inner)}")
            if isinstance(value, dict):
                walk(value, key + ".")

    walk(tree, "")


def _suggestion(key: str, known: dict[str, Any], groups: set[str]) -> str:
    names = [*known, *groups]
    last = key.rsplit(".", 1)[-1]
    words = last.replace("_", " ").replace("-", " ")

    def likeness(name: str) -> float:
        short = name.rsplit(".", 1)[-1]
        initials = "".join(word[:1] for word in words.split()) == short  # learning_rate, lr
        described = words in (getattr(known.get(name), "description", None) or "")
        alike = difflib.SequenceMatcher(None, last, short).ratio()
        return max(alike, initials, 0.9 * described) + 0.1 * difflib.SequenceMatcher(None, key, name).ratio()

    best = max(names, key=likeness)
    return f"; did you mean {best!r}?" if likeness(best) > 0.6 else "; `dino-sd train --help` lists every key"


def parse(cls: type[Settings], tree: dict[str, Any], prefix: str = "") -> Any:
    """The typed settings, or a UserError that names the first wrong key, its value and what was expected."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-"))]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error" and not path:
            raise UserError(f"config: {message}") from None
        key = (
            prefix.rstrip(".")
            if not path
            else prefix + ".".join(part for part in path if part not in ("int", "float", "str", "tuple[int, int]"))
        )
        if first["type"] == "missing":
            raise UserError(f"config: {key!r} is missing; add {key}=... to the command line") from None
        raise UserError(f"config: {key}={first['input']!r}: {message[:1].lower()}{message[1:]}") from None


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as containers that YAML and torch.load(weights_only=True) know."""
    return settings.model_dump(mode="json", by_alias=True)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """["optim.lr: 0.001 -> 0.002", ...]"""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found
