"""Config -> objects: the only file that knows both. Below it everything takes plain arguments."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_sd import checkpoint, schedule
from dino_sd.config import Config
from dino_sd.data.cache import cached, in_memory
from dino_sd.data.joined import Joined
from dino_sd.data.mix import Mix
from dino_sd.data.order import steps_per_epoch
from dino_sd.data.source import Source, labelled_often, labelled_only, name_of, open_source
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.distributed import cores, local_world_size, say, world_size
from dino_sd.errors import UserError
from dino_sd.loading import load_model
from dino_sd.method import Network, SelfDistillation
from dino_sd.models.backbone import Backbone
from dino_sd.models.model import Model
from dino_sd.models.weights import load_into, read_weights, start_from
from dino_sd.schedule import Schedule
from dino_sd.settings import Curve, Settings, is_duration, parse, size_pair, to_steps
from dino_sd.term import Given, Term, term_class, term_module


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
            f"batch_size={cfg.batch_size} is larger than an epoch of data={cfg.data}, {images} image(s); "
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


def view_spec(cfg: Config, clean: bool = False) -> ViewSpec:
    """All views of an image; clean: with one more at the end, a centre crop that is left as it is."""
    views = cfg.views
    groups = [crops for crops in (views.global_, views.local) if crops.count]
    jitter, size = views.jitter, size_pair(views.global_.size)
    last = (ViewGroup(1, size, center=views.clean_crop),) if clean else ()
    return ViewSpec(
        groups=(*(ViewGroup(crops.count, size_pair(crops.size), crops.scale) for crops in groups), *last),
        channels=cfg.channels,
        ratio=views.ratio,
        flip=views.flip,
        jitter_probability=jitter.probability,
        brightness=jitter.brightness,
        contrast=jitter.contrast,
        saturation=jitter.saturation,
        hue=jitter.hue,
        grayscale=views.grayscale,
        blur=tuple(p for crops in groups for p in one_each(crops.blur, crops.count)) + (0.0,) * clean,
        blur_sigma=views.blur_sigma,
        solarize=tuple(p for crops in groups for p in one_each(crops.solarize, crops.count)) + (0.0,) * clean,
        randaugment=views.randaugment,
    )


def make_mix(cfg: Config, spec: ViewSpec, data: dict[str, Any]) -> Mix | None:
    """Mixup and cutmix of whole images with their labels. Raises UserError where these do not go together."""
    if not (cfg.views.mixup or cfg.views.cutmix):
        return None
    if data["labelled"] < 1:
        raise UserError("views.mixup and views.cutmix mix labels too: they need one for every image")
    if spec.views != 1:
        raise UserError(
            f"views.mixup and views.cutmix mix one view an image, here are {spec.views}, clean ones counted: set "
            f"views.global.count=1 and views.local.count=0 and leave terms.consistency out, or turn them off"
        )
    return Mix(cfg.views.mixup, cfg.views.cutmix, len(data["classes"]))


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
        first = first_weights(init)
        notes = start_from(backbone, first, init) if isinstance(first, Backbone) else load_into(backbone, first, init)
        for note in notes:
            say(f"init={init}: {note}")
    return backbone


def first_weights(init: str) -> Backbone | dict[str, Tensor]:
    """The backbone of a run folder, a checkpoint or an export folder; of a file of weights these alone."""
    path = Path(init)
    if path.is_file() and checkpoint.step_of(path) < 0:
        return read_weights(path)
    model = load_model(init)
    if not isinstance(model.backbone, Backbone):
        raise UserError(f"init={init}: raw pixels have no weights to start from")
    return model.backbone


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
        if problem := refusal(backbone, (height, width)):
            raise UserError(
                f"model={cfg.model} cannot take crops of {height}x{width} pixels (views.{name}.size): {problem}; "
                f"choose a size that it takes, views.local.count=0, or another model"
            )
    backbone.train()


@torch.no_grad()
def refusal(backbone: Backbone, size: tuple[int, int]) -> str | None:
    """Why a backbone in eval mode cannot take images of this size; None where it can: one blank image tells."""
    try:
        backbone(torch.zeros(1, backbone.channels, *size))
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


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


def open_data(cfg: Config, decoded: bool = True) -> Source:
    """The images to train on, with the labels that may be used; without those that no term can learn from.

    decoded: makes the raw copies, or reads small images into memory, if asked to; False leaves that for later.
    """
    sources = [open_source(spec, cfg.channels) for spec in cfg.data.source]
    source = sources[0]
    if len(sources) > 1 or cfg.data.weights is not None:
        source = Joined(sources, cfg.data.weights or [1.0] * len(sources))
    if cfg.views.randaugment is not None and source.dtype != torch.uint8:
        raise UserError(
            f"views.randaugment works on bytes, data={cfg.data} holds {name_of(source.dtype)} pixels; turn it off"
        )
    workers = max(1, cores() // local_world_size()) if cfg.workers == "auto" else cfg.workers
    if decoded and cfg.data.cache is not None:
        source = cached(source, cfg.data.cache, cfg.data.cache_side, workers)
    if cfg.labelled < 1:
        source.keep_labels(cfg.labelled, cfg.seed if cfg.labelled_seed is None else cfg.labelled_seed)
    if decoded and cfg.data.cache is None:
        source = in_memory(source, cfg.data.memory, workers)
    if source.labels() is None or any(term_class(name).unlabelled for name in cfg.terms):
        return labelled_often(source, cfg.oversample)
    known = labelled_only(source)
    if len(known) < len(source):
        say(f"{len(known):,} of {len(source):,} images have a label; {', '.join(cfg.terms)} cannot use the others")
    return known


def make_terms(cfg: Config, length: Length) -> dict[str, tuple[Schedule, Term]]:
    """{name: (weight, term)}, anchors first: companions lean on what those have said."""
    made: dict[str, tuple[Schedule, Term]] = {}
    for name, tree in cfg.terms.items():
        module = term_module(name)
        arguments = plain_arguments(parse(module.Settings, tree), length, f"terms.{name}.")
        weight = arguments.pop("weight")
        made[name] = (weight, term_class(name)(**arguments))
    if not any(counts(weight) for weight, _ in made.values()):
        raise UserError("terms: the weights add up to 0; give at least one term a weight above 0")
    return dict(sorted(made.items(), key=lambda item: not item[1][1].anchor))


def counts(weight: Schedule) -> bool:
    """Whether a weight is above 0 at any time: curves run from one end to the other."""
    return weight(0.0) > 0 or weight(1.0) > 0


def make_heads(
    cfg: Config,
    terms: dict[str, tuple[Schedule, Term]],
    backbone: Backbone,
    data: dict[str, Any],
    teacher: Model | None,
) -> dict[str, nn.Module]:
    """The heads that the terms ask for; each finds out here whether it can work."""
    views = cfg.views.global_.count + cfg.views.local.count
    heads: dict[str, nn.Module] = {}
    for _, term in terms.values():
        given = Given(backbone, views, data["classes"], data["labelled"], heads, teacher)
        heads = {**heads, **{name: head for name, head in term.heads(given).items() if name not in heads}}
    if not any(term.anchor and counts(weight) for weight, term in terms.values()):
        raise UserError(f"terms: {', '.join(terms)} collapses when it stands alone: add terms.labels or terms.dino")
    return heads


def load_teacher(cfg: Config) -> Model | None:
    """The model of `teacher.init`. Raises UserError where there is none, and for one that takes other channels."""
    if cfg.teacher.init is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):  # the student's first weights are its seed's, whoever teaches it
            teacher = load_model(cfg.teacher.init)
    except UserError as error:
        raise UserError(f"teacher.init={cfg.teacher.init}: {error}") from None
    if not isinstance(teacher.backbone, Backbone):
        raise UserError("teacher.init=pixels: raw pixels teach nothing; name a run, an export or timm:NAME")
    if teacher.channels != cfg.channels:
        raise UserError(
            f"teacher.init={cfg.teacher.init} takes {teacher.channels} channel(s), the run has "
            f"channels={cfg.channels}; set channels={teacher.channels}"
        )
    height, width = size_pair(cfg.views.global_.size)
    if problem := refusal(teacher.backbone, (height, width)):
        raise UserError(
            f"teacher.init={cfg.teacher.init} cannot take crops of {height}x{width} pixels (views.global.size): "
            f"{problem}"
        )
    for note in teacher.notes:
        say(f"teacher.init={cfg.teacher.init}: {note}")
    return teacher


def teacher_network(model: Model, data: dict[str, Any]) -> Network:
    """A loaded teacher, fed with the run's own normalised images."""
    assert isinstance(model.backbone, Backbone)
    heads = {name: head for name, head in model.heads.items() if name == "classifier"}
    if data["mean"] is None or (model.mean, model.std) == (data["mean"], data["std"]):
        return Network(model.backbone, heads)
    ours, theirs = (
        [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in pair]
        for pair in ((data["mean"], data["std"]), (model.mean, model.std))
    )
    factor, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
    return Network(model.backbone, heads, (factor.float(), shift.float()))


def make_method(
    cfg: Config, backbone: Backbone, length: Length, device: torch.device, data: dict[str, Any] | None = None
) -> SelfDistillation:
    """Student and teacher on the device; the student's first weights are drawn from the seed alone.

    data: what `run.describe` says of it; None: images without labels. Raises UserError where the terms, the teacher and
    the data do not fit.
    """
    data = data or {"classes": None, "labelled": 0.0, "mean": None, "std": None}
    parts, loaded = make_terms(cfg, length), load_teacher(cfg)
    student = Network(backbone, make_heads(cfg, parts, backbone, data, loaded))
    needs_teacher = any(need.startswith("teacher") for _, term in parts.values() for need in term.needs)
    teacher, momentum = None, None
    if loaded is not None:
        if not needs_teacher:
            raise UserError(
                f"teacher.init={cfg.teacher.init}: no term learns from a teacher; add terms.born_again or distill"
            )
        teacher = teacher_network(loaded, data)
        if data["classes"] is None and "classifier" in student.heads:  # images without labels, named as it was taught
            data["classes"] = loaded.classes
    elif needs_teacher:
        teacher = copy.deepcopy(student)
        momentum = make_schedule(cfg.teacher.momentum, length, "teacher.momentum")
    method = SelfDistillation(student, teacher, parts, momentum)
    if any(isinstance(module, _BatchNorm) for module in method.modules()):
        if world_size() > 1 and device.type != "cuda":
            say(f"warning: {cfg.model} has batch norm, which is not shared between ranks on {device.type}: "
                f"the number of ranks changes the result")  # fmt: skip
        if cfg.accumulate > 1:
            say(f"warning: {cfg.model} has batch norm, which sees a part of the batch at a time: accumulate changes it")
    networks = [student] if teacher is None else [student, teacher]
    for network in networks:
        network.backbone.use_fused_attention(device.type != "cpu")
    if cfg.precision == "fp64":
        if device.type == "mps":
            raise UserError("precision=fp64: MPS has no float64; use precision=fp32 or device=cpu")
        method = method.double()
    method = method.to(device).train()
    if world_size() > 1 and device.type == "cuda":
        convert_sync_batchnorm(method)  # timm's knows batch norms with an activation inside; torch's would drop it
    if cfg.compile:
        for network in networks:  # what a step calls; evaluation makes networks of its own
            network.compiled = torch.compile(network.backbone.pooled, dynamic=False)
    return method
