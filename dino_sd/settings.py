"""How settings are read: YAML plus `key=value` into typed groups, and what is said when one is wrong."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dino_sd.errors import UserError

BARE = ""  # the key of a value that stands beside others of its group: data=X data.cache=DIR


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors, every field says what it is and in which unit."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False)

    shorthand: ClassVar[str | None] = None  # the field that a bare value in place of the group stands for

    @model_validator(mode="before")
    @classmethod
    def _bare_value(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {cls.shorthand if name == BARE and cls.shorthand else name: inner for name, inner in value.items()}
        return {cls.shorthand: value} if cls.shorthand and not isinstance(value, cls) else value


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


def as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


Probabilities = Annotated[list[Probability], BeforeValidator(as_list), Field(min_length=1)]


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


def between(low: float, high: float = math.inf, open_low: bool = False) -> AfterValidator:
    """Bounds for a Curve: both its ends lie between low and high."""

    def check(curve: Curve) -> Curve:
        for name, value in (("start", curve.start), ("end", curve.end)):
            if not low <= value <= high or (open_low and value == low):
                bounds = f"{'above' if open_low else 'at least'} {low:g}"
                bounds += f" and at most {high:g}" if high < math.inf else ""
                raise ValueError(f"{name}={value:g}: expected {bounds}")
        return curve

    return AfterValidator(check)


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
            inside = place.setdefault(part, {})
            if not isinstance(inside, dict):
                inside = place[part] = {BARE: inside}
            place = inside
        if isinstance(place.get(last), dict) and not isinstance(value, dict):
            place[last][BARE] = value
        else:
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


def spell_out(tree: dict[str, Any], cls: type[Settings]) -> dict[str, Any]:
    """The tree with every bare value that stands for a group as that group, so that groups can be merged."""
    spelt = dict(tree)
    for name, field in cls.model_fields.items():
        key, inner = field.alias or name, group_of(field.annotation)
        if key in spelt and inner is not None and inner.shorthand is not None:
            value = spelt[key] if isinstance(spelt[key], dict) else {BARE: spelt[key]}
            spelt[key] = {inner.shorthand if name == BARE else name: bare for name, bare in value.items()}
    return spelt


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
            if name == BARE:
                raise UserError(f"{where}: {prefix[:-1]}={value!r} and keys below {prefix[:-1]} do not go together")
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


def complete_curves(tree: dict[str, Any], cls: type[Settings], groups: dict[str, type[Settings]]) -> dict[str, Any]:
    """`teacher.momentum.start=0.99` alone leaves the rest of that curve at its default."""
    for key, field in fields(cls, groups):
        *path, last = key.split(".")
        node: Any = tree
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if group_of(field.annotation) is Curve and isinstance(node, dict) and isinstance(node.get(last), dict):
            node[last] = {**plain(field.get_default(call_default_factory=True)), **node[last]}
    return tree


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
