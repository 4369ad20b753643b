"""MODEL on the command line -> a frozen backbone with all that is needed to feed it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from dino_sd import __version__, checkpoint
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.pixels import Pixels
from dino_sd.models.weights import load_into, read_weights
from dino_sd.settings import size_pair

EXPECTED = "a run folder, a checkpoint file, an export folder, timm:NAME, or pixels"


@dataclass(frozen=True)
class Model:
    """A frozen backbone in eval mode and the images it expects.

    size: (height, width) in pixels, None where the data decides; crop: share of the resized image's side that is kept;
    mean, std: per channel, pixels from 0 to 1. description: one line for people. provenance: where the weights come
    from, plain values. folder: where results belong, if anywhere. notes: what had to be adapted, to be said.
    """

    backbone: Backbone | Pixels
    size: tuple[int, int] | None
    crop: float
    mean: list[float]
    std: list[float]
    description: str
    provenance: dict[str, Any]
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.backbone.channels


def load_model(
    spec: str | Path, device: torch.device | str = "cpu", *, network: str | None = None, channels: int | None = None
) -> Model:
    """The model that MODEL names, on the device.

    network: "teacher" or "student" of a run, default the one that is its result. channels: of `pixels` only.
    Raises UserError where there is nothing of this name, or where it does not fit together.
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
    model.backbone.to(device).eval().requires_grad_(False)
    return model


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
            "config": config, "data": {key: value for key, value in data.items() if key != "classes"},
            "versions": {"dino_sd": __version__, "torch": torch.__version__, "timm": timm.__version__},
        },
        run,
        notes,
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
    notes = load_into(backbone, read_weights(folder / "model.safetensors"), source=str(folder))
    description = f"{name}, export {folder}"
    provenance = {"export": str(folder), **(config.get("dino_sd") or {})}
    return Model(backbone, size, crop, mean, std, description, provenance, folder, notes)


def _from_timm(name: str) -> Model:
    images = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    size = _pair(images.input_size[1:]) if images else (224, 224)  # an unknown name is refused by Backbone
    backbone = Backbone(name, size=size, pretrained=True)
    images = backbone.model.pretrained_cfg
    provenance = {"model": f"timm:{name}", "versions": {"torch": torch.__version__, "timm": timm.__version__}}
    crop, mean, std = images.get("crop_pct") or 0.875, list(images["mean"]), list(images["std"])
    return Model(backbone, size, crop, mean, std, f"{name}, timm's pretrained weights", provenance)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size_pair(tuple(size) if isinstance(size, list) else size)
    return int(height), int(width)
