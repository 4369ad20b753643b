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
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import Classifier, Exit, classifiers, exit_norms
from dino_sd.models.model import Model
from dino_sd.models.pixels import Pixels
from dino_sd.models.weights import load_into, read_weights
from dino_sd.settings import size_pair

EXPECTED = "a run folder, a checkpoint file, an export folder, timm:NAME, or pixels"


def load_model(
    spec: str | Path,
    device: torch.device | str = "cpu",
    *,
    network: str | None = None,
    channels: int | None = None,
    exit: int | None = None,
) -> Model:
    """The model that MODEL names, on the device.

    network: "teacher" or "student" of a run, default the one that is its result. channels: of `pixels` only.
    exit: the shallow network that ends after this block (or stage, from 1), with the norm and classifier of the exit
    that was trained there, if one was. Raises UserError where there is nothing of this name, or where it does not fit
    together.
    """
    path = Path(spec)
    if str(spec) == "pixels":
        model = _pixels(channels or 3)
    elif str(spec).startswith("timm:"):
        model = _from_timm(str(spec).removeprefix("timm:"))
    elif (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        model = _from_export(path)
    elif path.is_dir():
        newest = checkpoint.newest(path)
        if newest is None:
            raise UserError(f"MODEL {path}: holds neither checkpoints/step_*.pt nor an export (config.json)")
        model = _from_checkpoint(newest, network)
    elif path.is_file():
        model = _from_checkpoint(path, network)
    else:
        raise UserError(f"MODEL {spec!s} does not exist; expected {EXPECTED}")
    if exit is not None:
        model = shallow(model, exit)
    for module in (model.backbone, *model.heads.values()):
        module.to(device).eval().requires_grad_(False)
    return model


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
    device = next(model.backbone.parameters()).device
    for module in (backbone, *heads.values()):
        module.to(device).eval().requires_grad_(False)
    description = f"{model.description}, up to block {exit}"
    return replace(model, backbone=backbone, heads=heads, description=description, norms={})


def place_of_norm(model: nn.Module) -> str | None:
    """Where a ViT norms its pooled output; None where it does not, or norms tokens before it takes their mean."""
    pool, norm = getattr(model, "global_pool", None), getattr(model, "fc_norm", None)
    if pool in ("token", "avg") and isinstance(norm, nn.LayerNorm):
        return "fc_norm"
    return "norm" if pool == "token" else None


def _pixels(channels: int) -> Model:
    return Model(Pixels(channels), None, 1.0, [0.0] * channels, [1.0] * channels, "raw pixels", {"model": "pixels"})


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
    )  # fmt: skip


def _from_export(folder: Path) -> Model:
    try:
        config = json.loads((folder / "config.json").read_text())
        name, args, images = config["architecture"], dict(config.get("model_args") or {}), config["pretrained_cfg"]
        channels, size = int(images["input_size"][0]), _pair(images["input_size"][1:])
        mean, std, crop = list(images["mean"]), list(images["std"]), float(images.get("crop_pct") or 0.875)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"MODEL {folder}: config.json is not in timm's format ({problem})") from None
    args = {key: value for key, value in args.items() if key not in ("in_chans", "num_classes")}
    made_for = _pair(args.pop("img_size", size))
    backbone = Backbone(name, size=made_for, channels=channels, model_args=args)
    weights, heads, classes = read_weights(folder / "model.safetensors"), {}, config.get("label_names")
    prefix = f"{backbone.model.pretrained_cfg.get('classifier')}."
    if classes and f"{prefix}weight" in weights:
        heads["classifier"] = Classifier(backbone.width, len(classes))
        own = {key: weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        heads["classifier"].load_state_dict({key.removeprefix(prefix): value for key, value in own.items()})
    notes = load_into(backbone, weights, source=str(folder))
    description = f"{name}, export {folder}"
    provenance = {"export": str(folder), **(config.get("dino_sd") or {})}
    return Model(backbone, size, crop, mean, std, description, provenance, folder, notes, heads, classes)


def _from_timm(name: str) -> Model:
    images = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    size = _pair(images.input_size[1:]) if images else (224, 224)  # an unknown name is refused by Backbone
    backbone = Backbone(name, size=size, pretrained=True)
    heads: dict[str, nn.Module] = {}
    for linear in backbone.pretrained_classifier:
        heads["classifier"] = Classifier(linear.in_features, linear.out_features)
        heads["classifier"].load_state_dict(linear.state_dict())
    images = backbone.model.pretrained_cfg
    provenance = {"model": f"timm:{name}", "versions": {"torch": torch.__version__, "timm": timm.__version__}}
    crop, mean, std = images.get("crop_pct") or 0.875, list(images["mean"]), list(images["std"])
    return Model(backbone, size, crop, mean, std, f"{name}, timm's pretrained weights", provenance, heads=heads)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size_pair(tuple(size) if isinstance(size, list) else size)
    return int(height), int(width)
