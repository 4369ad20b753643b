"""Config -> objects: the only file that knows both. Below it everything takes plain arguments."""

import copy
import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_sd import checkpoint, schedule, terms
from dino_sd.config import Config
from dino_sd.data.order import steps_per_epoch
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.distributed import say, world_size
from dino_sd.errors import UserError
from dino_sd.load import load_model
from dino_sd.method import Network, SelfDistillation
from dino_sd.models.backbone import Backbone
from dino_sd.models.weights import load_into, read_weights
from dino_sd.schedule import Schedule
from dino_sd.settings import (
    Curve,
    Settings,
    check_keys,
    complete_curves,
    is_duration,
    merge,
    parse,
    plain,
    read_pairs,
    read_yaml,
    size_pair,
    to_steps,
)
from dino_sd.term import Term


def recipes() -> Path:
    """The folder of recipes: beside the package in a clone, inside it in a wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def load_config(path: str | Path, pairs: list[str]) -> Config:
    """A YAML file (or the name of a recipe) with `key=value` over it. Every mistake is a UserError with its place."""
    file = Path(path)
    if "=" in file.name and not file.exists():
        raise UserError(f"command line: the config file or recipe comes first, then key=value; found {path} first")
    if not file.exists() and (recipes() / f"{file.name}.yaml").exists():
        file = recipes() / f"{file.name}.yaml"
    if not file.exists():
        names = sorted(recipe.stem for recipe in recipes().glob("*.yaml"))
        near = difflib.get_close_matches(file.stem, names, n=1, cutoff=0.6) or names
        raise UserError(f"config: {path} does not exist; recipes that come with dino_sd: {', '.join(near)}")
    from_file, from_line = read_yaml(file), read_pairs(pairs)
    tree = merge(from_file, from_line)
    groups = term_settings(tree.get("terms") or {"dino": {}})
    check_keys(from_file, Config, str(path), groups)
    check_keys(from_line, Config, "the command line", groups)
    lengths = {"epochs", "steps", "images"}
    if lengths & from_line.keys():  # a length on the command line takes the place of the file's
        tree = {key: value for key, value in tree.items() if key not in lengths or key in from_line}
    return finish(complete_curves(tree, Config, groups))


def finish(tree: dict[str, Any]) -> Config:
    """The typed config with the settings of its terms filled in."""
    parsed: Config = parse(Config, tree)
    filled = {
        name: plain(parse(term_module(name).Settings, parsed.terms[name] or {}, f"terms.{name}."))
        for name in parsed.terms
    }
    return parsed.model_copy(update={"terms": filled})


def term_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"dino_sd.terms.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"dino_sd.terms.{name}":
            raise
        known = [module.name for module in pkgutil.iter_modules(terms.__path__)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0) or known
        raise UserError(f"config: unknown term {name!r} in terms; did you mean {near[0]!r}?") from None


def term_settings(chosen: dict[str, Any]) -> dict[str, type[Settings]]:
    if not isinstance(chosen, dict) or not chosen:
        raise UserError("config: terms should be a mapping such as {dino: {prototypes: 4096}} with at least one term")
    return {f"terms.{name}": term_module(name).Settings for name in chosen}


@dataclass(frozen=True)
class Length:
    """A run in optimizer steps, and what turns durations into steps."""

    steps: int
    steps_per_epoch: int
    batch_size: int

    def of(self, duration: float | str) -> int:
        return to_steps(duration, steps=self.steps, steps_per_epoch=self.steps_per_epoch, batch_size=self.batch_size)


def length_of(cfg: Config, images: int) -> Length:
    """Raises UserError when the data does not fill one batch, or a warm-up does not fit into the run."""
    if cfg.batch_size > images:
        raise UserError(
            f"batch_size={cfg.batch_size} is larger than data={cfg.data}, which has {images} image(s); "
            f"set batch_size={images} or less"
        )
    per_rank = world_size() * cfg.accumulate
    if cfg.batch_size % per_rank:
        raise UserError(
            f"batch_size={cfg.batch_size} cannot be shared out evenly over {world_size()} rank(s) x "
            f"accumulate={cfg.accumulate}; choose a multiple of {per_rank}"
        )
    epoch = steps_per_epoch(images, cfg.batch_size)
    if cfg.steps is not None:
        steps = cfg.steps
    elif cfg.epochs is not None:
        steps = max(round(cfg.epochs * epoch), 1)
    else:
        steps = max(round((cfg.images or 0) / cfg.batch_size), 1)
    length = Length(steps, epoch, cfg.batch_size)
    given = next(f"{name}={getattr(cfg, name):g}" for name in ("epochs", "steps", "images") if getattr(cfg, name))
    warmup = length.of(cfg.optim.warmup)
    if warmup >= steps and warmup > 1:
        raise UserError(
            f"optim.warmup={cfg.optim.warmup} is {warmup} steps but the run ({given}) has {steps}: "
            f"the learning rate would never come down; shorten the warm-up or lengthen the run"
        )
    return length


def make_schedule(curve: Curve, length: Length, key: str) -> Schedule:
    if curve.start == curve.end:
        return schedule.constant(curve.start)
    if curve.shape == "cosine":
        return schedule.cosine(curve.start, curve.end, length.steps)
    over = length.of(curve.over)
    if over > length.steps:
        raise UserError(f"{key}.over={curve.over} is {over} steps but the run has {length.steps}; shorten it")
    hold = length.steps_per_epoch if curve.change == "epoch" else 1
    return schedule.linear(curve.start, curve.end, length.steps, over, hold)


def learning_rate(cfg: Config, length: Length) -> Schedule:
    peak = cfg.optim.lr * cfg.batch_size / 256
    return schedule.cosine(peak, cfg.optim.min_lr, length.steps, length.of(cfg.optim.warmup))


def view_spec(cfg: Config) -> ViewSpec:
    views = cfg.views
    groups = [crops for crops in (views.global_, views.local) if crops.count]
    jitter = views.jitter
    return ViewSpec(
        groups=tuple(ViewGroup(crops.count, size_pair(crops.size), crops.scale) for crops in groups),
        channels=cfg.channels,
        ratio=views.ratio,
        flip=views.flip,
        jitter_probability=jitter.probability,
        brightness=jitter.brightness,
        contrast=jitter.contrast,
        saturation=jitter.saturation,
        hue=jitter.hue,
        grayscale=views.grayscale,
        blur=tuple(p for crops in groups for p in one_each(crops.blur, crops.count)),
        blur_sigma=views.blur_sigma,
        solarize=tuple(p for crops in groups for p in one_each(crops.solarize, crops.count)),
    )


def one_each(probabilities: list[float], count: int) -> list[float]:
    return (probabilities + [probabilities[-1]] * count)[:count]


def make_backbone(cfg: Config, drop_path: float = 0.0, resuming: bool = False) -> Backbone:
    """The backbone with its first weights (drawn ones when resuming: the checkpoint brings its own).

    Refuses crop sizes that it cannot take, before any data is read.
    """
    init = "" if resuming else cfg.init or ""
    pretrained = init.startswith("timm:")
    if pretrained and init.removeprefix("timm:").split(".")[0] != cfg.model.split(".")[0]:
        raise UserError(f"init={init} is another architecture than model={cfg.model}; set model={init[5:]}")
    backbone = Backbone(
        init.removeprefix("timm:") if pretrained else cfg.model,
        size=size_pair(cfg.views.global_.size),
        channels=cfg.channels,
        drop_path=drop_path,
        model_args=cfg.model_args,
        pretrained=pretrained,
    )
    check_sizes(backbone, cfg)
    if init and not pretrained:
        for note in load_into(backbone, first_weights(init), source=init):
            say(f"init={init}: {note}")
    return backbone


def first_weights(init: str) -> dict[str, Tensor]:
    """Backbone weights of a run folder, a checkpoint, an export folder or a file of weights."""
    path = Path(init)
    if path.is_file() and checkpoint.step_of(path) < 0:
        return read_weights(path)
    model = load_model(init)
    if not isinstance(model.backbone, Backbone):
        raise UserError(f"init={init}: raw pixels have no weights to start from")
    return model.backbone.state_dict()


@torch.no_grad()
def check_sizes(backbone: Backbone, cfg: Config) -> None:
    """One blank image of each size through the backbone: what cannot work fails here, with its reason."""
    backbone.eval()
    crops = [("global", cfg.views.global_)] + ([("local", cfg.views.local)] if cfg.views.local.count else [])
    for name, group in crops:
        height, width = size_pair(group.size)
        patch = backbone.patch_size
        if patch and (height % patch or width % patch):
            nearest = max(round(min(height, width) / patch), 1) * patch
            raise UserError(
                f"views.{name}.size={group.size} is not a multiple of the patch size {patch} of model={cfg.model}; "
                f"use {nearest}"
            )
        try:
            backbone(torch.zeros(1, cfg.channels, height, width))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"model={cfg.model} cannot take crops of {height}x{width} pixels (views.{name}.size): {reason}; "
                f"choose a size that it takes, views.local.count=0, or another model"
            ) from None
    backbone.train()


def plain_arguments(settings: Settings, length: Length, prefix: str) -> dict[str, Any]:
    """Settings as a term's constructor takes them: curves become schedules, durations shares of the run."""
    arguments: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Curve):
            value = make_schedule(value, length, prefix + name)
        elif is_duration(field) and value is not None:
            if length.of(value) >= length.steps:
                raise UserError(
                    f"{prefix}{name}={value} is {length.of(value)} steps but the run has {length.steps}: "
                    f"it would last to the end; shorten it"
                )
            value = length.of(value) / length.steps
        arguments[name] = value
    return arguments


def make_terms(cfg: Config, length: Length) -> dict[str, tuple[float, Term]]:
    made = {}
    for name, tree in cfg.terms.items():
        module = term_module(name)
        arguments = plain_arguments(parse(module.Settings, tree), length, f"terms.{name}.")
        weight = arguments.pop("weight")
        made[name] = (weight, getattr(module, name.title().replace("_", ""))(**arguments))
    return made


def make_method(cfg: Config, backbone: Backbone, length: Length, device: torch.device) -> SelfDistillation:
    """Student and teacher with equal weights, drawn from the seed alone, on the device."""
    views = cfg.views.global_.count + cfg.views.local.count
    if views < 2:
        raise UserError(
            "views: one crop an image leaves nothing to predict; set views.global.count=2 or views.local.count=8"
        )
    parts = make_terms(cfg, length)
    heads: dict[str, nn.Module] = {}
    for _, term in parts.values():
        heads = {**term.heads(backbone.width), **heads}
    student = Network(backbone, heads)
    momentum = make_schedule(cfg.teacher.momentum, length, "teacher.momentum")
    method = SelfDistillation(student, copy.deepcopy(student), parts, momentum)
    if any(isinstance(module, _BatchNorm) for module in method.modules()):
        if world_size() > 1 and device.type != "cuda":
            say(f"warning: {cfg.model} has batch norm, which is not shared between ranks on {device.type}: "
                f"the number of ranks changes the result")  # fmt: skip
        if cfg.accumulate > 1:
            say(f"warning: {cfg.model} has batch norm, which sees a part of the batch at a time: accumulate changes it")
    backbone.use_fused_attention(device.type != "cpu")
    method.teacher.backbone.use_fused_attention(device.type != "cpu")
    if cfg.precision == "fp64":
        if device.type == "mps":
            raise UserError("precision=fp64: MPS has no float64; use precision=fp32 or device=cpu")
        method = method.double()
    method = method.to(device).train()
    if world_size() > 1 and device.type == "cuda":
        convert_sync_batchnorm(method)  # timm's knows batch norms with an activation inside; torch's would drop it
    if cfg.compile:
        for network in (method.student, method.teacher):  # `pooled` is what a step calls, not `forward`
            network.backbone.pooled = torch.compile(network.backbone.pooled, dynamic=False)
    return method
