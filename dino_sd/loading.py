"""MODEL on the command line -> a frozen backbone with all that is needed to feed it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dino_sd import __version__, checkpoint
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone, pretrained_cfg
from dino_sd.models.heads import Classifier, Exit, classifiers, exit_norms
from dino_sd.models.layouts import projection_of
from dino_sd.models.model import Model
from dino_sd.models.pixels import Pixels
from dino_sd.models.weights import FOREIGN, load_into, read_file, read_weights
from dino_sd.published import from_content
from dino_sd.settings import read_pairs, size_pair

EXPECTED = "a run folder, a checkpoint, an export folder, a file of weights (.pth, .safetensors), timm:NAME, or pixels"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder in timm's format


def load_model(
    spec: str | Path,
    device: torch.device | str = "cpu",
    *,
    network: str | None = None,
    channels: int | None = None,
    exit: int | None = None,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> Model:
    """The model that MODEL names, on the device. `description` and `notes` of it say what was loaded.

    network: "teacher" or "student" of a run or a published file, default the one that is its result. channels: of
    `pixels` only. exit: the shallow network that ends after this block (or stage, from 1), with the norm and classifier
    of the exit that was trained there, if one was. architecture, model_args: of a file of weights that does not say
    it, as in `published.from_content`; spec may hold them too: "x.pth,num_heads=2". Raises UserError where there is
    nothing of this name, or where it does not fit together.
    """
    spec, said = split_arguments(str(spec))
    architecture = said.pop("architecture", architecture)
    model_args = {**(model_args or {}), **said}
    path = Path(spec).expanduser()
    if path.is_file() and path.name in WEIGHTS and (path.parent / "config.json").is_file():
        path = path.parent
    if network is not None and (spec == "pixels" or spec.startswith("timm:")):
        raise UserError(f"network={network}: MODEL {spec} is one network alone; leave network out")
    if spec == "pixels":
        model = _pixels(channels or 3)
    elif spec.startswith("timm:"):
        model = _from_timm(spec.removeprefix("timm:"))
    elif path.is_dir():
        model = _from_folder(path, network)
    elif path.is_file():
        model = _from_file(path, network, architecture, model_args)
        architecture, model_args = None, {}
    else:
        raise UserError(f"MODEL {spec} does not exist; expected {EXPECTED}")
    if architecture or model_args:
        raise UserError(f"MODEL {spec}: architecture and model_args are for files of weights; this says what it is")
    if model.size is not None:
        images = f"images of {model.size[0]}x{model.size[1]} pixels (crop {model.crop:.4g})"
        model = replace(model, description=f"{model.description}, {images}")
    if exit is not None:
        model = shallow(model, exit)
    return _frozen(model, device)


def split_arguments(spec: str) -> tuple[str, dict[str, Any]]:
    """("x.pth", {"num_heads": 2}) of "x.pth,num_heads=2": what a file does not say of itself."""
    name, comma, rest = spec.partition(",")
    if not comma or Path(spec).exists() or not Path(name).expanduser().is_file():
        return spec, {}
    return name, read_pairs(rest.split(","))


def _frozen(model: Model, device: torch.device | str) -> Model:
    parts = [model.backbone, *model.heads.values(), *([model.projection] if model.projection is not None else [])]
    for module in parts:
        module.to(device).eval().requires_grad_(False)
    return model if model.center is None else replace(model, center=model.center.to(device))


def shallow(model: Model, exit: int) -> Model:
    """The part of a model up to the block `exit`; the model stays whole. Raises UserError where there is none."""
    if not isinstance(model.backbone, Backbone):
        raise UserError("exit: raw pixels have no blocks to stop at")
    backbone = copy.deepcopy(model.backbone).cut_(exit)
    place = place_of_norm(backbone.model)
    if isinstance(backbone.model, VisionTransformer) and place is None:
        raise UserError(f"exit={exit}: model={backbone.name} pools tokens in a way of its own and cannot be cut")
    heads: dict[str, nn.Module] = {}
    trained, norm = model.heads.get(f"exit_{exit}"), model.norms.get(exit)
    if isinstance(trained, Exit) and (folded := trained.folded()) is not None:
        heads["classifier"] = folded
    if norm is not None and place:
        setattr(backbone.model, place, norm)
    elif norm is not None and heads:  # a ResNet has none
        heads["classifier"] = nn.Sequential(norm, heads["classifier"])
    description = f"{model.description}, up to block {exit}"
    of_whole = ("scores", "evaluations")
    provenance = {key: value for key, value in model.provenance.items() if key not in of_whole} | {"exit": exit}
    part = replace(
        model, backbone=backbone, heads=heads, description=description, provenance=provenance, norms={},
        projection=None, center=None,
    )  # fmt: skip
    return _frozen(part, next(model.backbone.parameters()).device)


def place_of_norm(model: nn.Module) -> str | None:
    """Where a ViT norms its pooled output; None where it does not, or norms tokens before it takes their mean."""
    pool, norm = getattr(model, "global_pool", None), getattr(model, "fc_norm", None)
    if pool in ("token", "avg") and isinstance(norm, nn.LayerNorm):
        return "fc_norm"
    return "norm" if pool == "token" else None


def _pixels(channels: int) -> Model:
    return Model(Pixels(channels), None, 1.0, [0.0] * channels, [1.0] * channels, "raw pixels", {"model": "pixels"})


def _from_file(path: Path, network: str | None, architecture: str | None, model_args: dict[str, Any]) -> Model:
    found = None
    if not (ours := checkpoint.step_of(path) >= 0):
        found = read_file(path)
        ours = isinstance(found, dict) and {"format", "config", "result"} <= found.keys()
    if not ours:
        return from_content(found, path, network, architecture, model_args)
    if architecture or model_args:
        raise UserError(f"MODEL {path}: architecture and model_args are for files of weights; this checkpoint has them")
    return _from_checkpoint(path, network)


def _from_folder(path: Path, network: str | None) -> Model:
    """A run, or an export or other folder in timm's format. Raises UserError for what is neither, or both."""
    newest, weights = checkpoint.newest(path), weights_in(path)
    if newest is not None and weights is not None:
        raise UserError(f"MODEL {path} holds both a run and a model for timm; name {newest} or {weights}")
    if newest is not None:
        return _from_checkpoint(newest, network)
    if weights is not None:
        if network is not None:
            raise UserError(f"network={network}: {path} holds one network alone; leave network out")
        return _from_timm_folder(path, weights)
    raise UserError(f"MODEL {path} {_instead(path)}")


def _instead(folder: Path) -> str:
    """What a folder holds that is no model, and what to do."""
    graphs = [name for name in ("model.onnx", "model.pt2") if (folder / name).is_file()]
    if (folder / "config.json").is_file() and graphs:
        return (
            f"is an export of graphs alone ({', '.join(graphs)}); name what it was made from, or export format=timm too"
        )
    if (folder / "config.json").is_file():
        return f"holds config.json, but neither {' nor '.join(WEIGHTS)}: it is incomplete; copy or download it again"
    if checkpoint.newest(folder.parent) is not None and folder.name == "checkpoints":
        return f"holds the checkpoints of a run; name the run, {folder.parent}, or one of the files"
    if (folder / "config.yaml").is_file():
        return "is a run without a checkpoint: it has saved none yet (checkpoint.every); run its command again"
    models = [path for path in sorted(folder.iterdir()) if (path / "checkpoints").is_dir() or weights_in(path)]
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".pth", ".pt", ".bin", ".safetensors")]
    for kind, found in (("runs or exports", models), ("files of weights", files)):
        if found:
            more = ", ..." if len(found) > 3 else ""
            return f"holds {len(found)} {kind} ({', '.join(path.name for path in found[:3])}{more}); name one of them"
    foreign = next((path for path in sorted(folder.iterdir()) if path.suffix in FOREIGN), None)
    if foreign is not None:
        return f"holds {foreign.name}, {FOREIGN[foreign.suffix]}; load the run or checkpoint that it was made from"
    return f"holds neither checkpoints/step_*.pt nor an export (config.json); expected {EXPECTED}"


def weights_in(folder: Path) -> Path | None:
    """The weights of an export, or of another folder in timm's format; None where it is none."""
    files = (folder / name for name in WEIGHTS if (folder / "config.json").is_file())
    return next((path for path in files if path.is_file()), None)


def _from_checkpoint(path: Path, network: str | None) -> Model:
    state = checkpoint.load(path)
    config, data, network = state["config"], state["data"], network or state["result"]
    if network not in ("teacher", "student"):
        raise UserError(f"network={network}: expected teacher or student")
    trained_size = _pair(config["views"]["global"]["size"])
    backbone = Backbone(
        config["model"], size=trained_size, channels=config["channels"], model_args=config.get("model_args")
    )
    if not state[network]:
        raise UserError(f"network={network}: {path} has none; its terms needed no teacher")
    weights = {key: value for key, value in state[network].items() if key.startswith("backbone.")}
    notes = load_into(backbone, weights, source=str(path))
    evaluate = config.get("evaluate") or {}
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Model(
        backbone,
        _pair(evaluate["size"]) if evaluate.get("size") else trained_size,
        evaluate.get("crop", 0.875),
        list(data["mean"]),
        list(data["std"]),
        f"{config['model']}, {network} at step {state['step']} of {state['steps']} ({path})",
        {
            "checkpoint": str(path), "network": network, "step": state["step"], "steps": state["steps"],
            "scores": state.get("scores", {}),
            "config": config, "data": {key: value for key, value in data.items() if key != "classes"},
            "versions": {"dino_sd": __version__, "torch": torch.__version__, "timm": timm.__version__},
        },
        run,
        notes,
        classifiers(state[network]),
        data["classes"],
        exit_norms(state[network]),
        projection_of(state[network], str(path)),
        (state.get("terms") or {}).get("dino.center"),
    )  # fmt: skip


def _from_timm_folder(folder: Path, path: Path) -> Model:
    try:
        config = json.loads((folder / "config.json").read_text())
        if "architecture" not in config and "model_type" in config:
            raise UserError(
                f"MODEL {folder}: config.json is of transformers (model_type={config['model_type']}), not of timm; "
                f"timm has most such models too: timm:NAME, or a folder that its save_for_hf wrote"
            )
        name, args = config["architecture"], dict(config.get("model_args") or {})
        images, ours = config.get("pretrained_cfg") or config, config.get("dino_sd") or {}
        channels, size = int(images["input_size"][0]), _pair(images["input_size"][1:])
        mean, std, crop = list(images["mean"]), list(images["std"]), float(images.get("crop_pct") or 0.875)
        expected_sum = (ours.get("sha256") or {}).get(path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"MODEL {folder}: config.json is not in timm's format ({problem})") from None
    if expected_sum is not None and checkpoint.digest(path) != expected_sum:
        raise UserError(
            f"MODEL {folder}: {path.name} is damaged, or is not the file that config.json was written for (its SHA-256 "
            f"is another); copy or export it again"
        )
    args = {key: value for key, value in args.items() if key not in ("in_chans", "num_classes")}
    made_for = _pair(args.pop("img_size", size))
    backbone = Backbone(name, size=made_for, channels=channels, model_args=args)
    weights, heads, classes = read_weights(path), {}, _names(config.get("label_names"))
    prefix = f"{backbone.model.pretrained_cfg.get('classifier')}."
    weight_CD, bias_C = (weights.get(f"{prefix}{name}") for name in ("weight", "bias"))
    if classes and weight_CD is not None and bias_C is not None and weight_CD.shape == (len(classes), backbone.width):
        heads["classifier"] = Classifier(backbone.width, len(classes))
        heads["classifier"].load_state_dict({"weight": weight_CD, "bias": bias_C})
        weights = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    notes = load_into(backbone, weights, source=str(folder)) + _other_resizing(images)  # notes other classifiers
    if ours.get("position_resize") == "dino":
        backbone.resize_as_dino_()
    provenance = {"export": str(folder), **ours}
    description = f"{name}, {'export' if ours else 'folder'} {folder}"
    return Model(backbone, size, crop, mean, std, description, provenance, folder, notes, heads, classes)


def _names(labels: Any) -> list[str] | None:
    """Of a config's `label_names`: a list, or {number: name} as transformers has it; None where some are left out."""
    if isinstance(labels, dict):
        labels = [labels.get(str(number), labels.get(number)) for number in range(len(labels))]
    return labels if isinstance(labels, list) and all(isinstance(name, str) for name in labels) else None


def _other_resizing(images: dict[str, Any]) -> list[str]:
    """What timm would do to images and this package does not."""
    wanted = {"interpolation": ("bicubic", "random", ""), "crop_mode": ("center", "")}
    other = [f"{key}={images[key]}" for key, same in wanted.items() if (images.get(key) or "") not in same]
    return [f"its authors prepare images with {', '.join(other)}; here it is bicubic and center"] if other else []


def _from_timm(name: str) -> Model:
    images = pretrained_cfg(name)
    size = _pair(images.input_size[1:]) if images else (224, 224)  # an unknown name is refused by Backbone
    backbone = Backbone(name, size=size, pretrained=True)
    heads: dict[str, nn.Module] = {}
    for linear in backbone.pretrained_classifier:
        heads["classifier"] = Classifier(linear.in_features, linear.out_features)
        heads["classifier"].load_state_dict(linear.state_dict())
    images = backbone.model.pretrained_cfg
    notes = _other_resizing(images)
    provenance = {"model": f"timm:{name}", "versions": {"torch": torch.__version__, "timm": timm.__version__}}
    crop, mean, std = images.get("crop_pct") or 0.875, list(images["mean"]), list(images["std"])
    description = f"{name}, timm's pretrained weights"
    return Model(backbone, size, crop, mean, std, description, provenance, notes=notes, heads=heads)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size_pair(tuple(size) if isinstance(size, list) else size)
    return int(height), int(width)
