"""Files of weights that others published, or that hold a state dict alone -> Model."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dino_sd import __version__
from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone, pretrained_cfg
from dino_sd.models.layouts import PUBLISHED_CROP, Layout, layout_of, projection_of, to_timm_names
from dino_sd.models.model import Model
from dino_sd.models.weights import load_into, network_of, strip_prefixes

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
KINDS = ("DINO", "DINOv2", "XCiT", "ResNet")  # of layouts that are found out from tensors
OWN_TAGS = ("dino", "lvd142m")  # of timm's names for the same weights


def from_content(
    found: Any,
    path: Path,
    network: str | None = None,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> Model:
    """The model in a file's content, as `read_file` gives it.

    architecture: a timm name, for weights whose architecture is not found out from their tensors; where these are none
    of DINO's, or it has the tag of others, what they need of images is what timm says. model_args: what timm is to
    build otherwise, such as num_heads. Raises UserError where the weights do not fit, and where the number of attention
    heads is not known.
    """
    raw, chosen = network_of(found, path, network)
    found = found if isinstance(found, dict) else {}
    arguments, state = _arguments(found), to_timm_names(strip_prefixes(raw))
    layout = _layout(state, arguments, path, architecture)
    args = layout.model_args | (model_args or {})
    heads_known = architecture is not None or layout.kind in ("XCiT", "ResNet") or "num_heads" in args
    backbone = Backbone(
        layout.architecture, size=layout.made_for, channels=layout.channels,
        model_args=args if heads_known else args | {"num_heads": 1},
    )  # fmt: skip
    notes = load_into(backbone, state, source=str(path))
    if not heads_known:  # not before: no shape depends on it, and what does not fit is the worse fault
        raise UserError(
            f"{path}: how many attention heads its blocks have can be seen in no tensor, and {backbone.width} is no "
            f"width that was published; say it: MODEL '{path},num_heads=N', or model_args={{'num_heads': N}} of load"
        )
    if layout.position_resize == "dino" and type(backbone.model) is VisionTransformer and backbone.prefix_tokens == 1:
        backbone.resize_as_dino_()
    whose, crop, mean, std = _images(layout)
    epoch, center = found.get("epoch"), (found.get("dino_loss") or {}).get("center")
    return Model(
        backbone, layout.size, crop, mean, std, f"{_name(layout, backbone)}{_which(chosen, epoch, arguments)} ({path})",
        {
            "weights": str(path), "kind": layout.kind, "network": chosen, "epoch": epoch, "arguments": arguments,
            "position_resize": backbone.position_resize,
            "versions": {"dino_sd": __version__, "torch": torch.__version__, "timm": timm.__version__},
        },
        notes=[*notes, _assumed(layout, whose, backbone)],
        projection=projection_of(raw, str(path)),
        center=center.flatten() if isinstance(center, Tensor) else None,
    )  # fmt: skip


def _layout(state: dict[str, Tensor], arguments: dict[str, Any], path: Path, architecture: str | None) -> Layout:
    """That of the weights, or of `architecture`, to which the weights then have to fit."""
    classifies = "head.weight" in state or "norm_pre.weight" in state  # DINO's have neither
    try:
        seen = layout_of(state, arguments, str(path))
    except UserError:
        if architecture is None:
            raise
        seen = None
    if architecture is None:
        assert seen is not None
        if classifies:
            raise UserError(
                f"{path}: a ViT with names that DINO's have not (a classifier, or a norm before the blocks), so what "
                f"it expects of images is unknown; say architecture=NAME, its name in timm with the tag of its weights"
            )
        return seen
    tag = architecture.partition(".")[2]
    if seen is not None and not classifies and tag in ("", *OWN_TAGS):
        return seen._replace(architecture=architecture, model_args={})
    images = pretrained_cfg(architecture)
    own = (images.input_size[1], images.input_size[2]) if images else (224, 224)  # Backbone refuses unknown names
    made_for = seen.made_for if seen is not None and seen.kind in ("DINO", "DINOv2") else own
    return Layout(architecture, architecture, {}, seen.channels if seen else 3, made_for, made_for, "timm")


def _images(layout: Layout) -> tuple[str, float, list[float], list[float]]:
    """(whose mean and std these are, crop, mean, std)."""
    if layout.channels != 3:
        return "0.5", PUBLISHED_CROP, [0.5] * layout.channels, [0.5] * layout.channels
    if layout.kind in KINDS:
        return "ImageNet's", PUBLISHED_CROP, list(MEAN), list(STD)
    cfg = pretrained_cfg(layout.architecture)
    return "timm's for this name", cfg.crop_pct or PUBLISHED_CROP, list(cfg.mean), list(cfg.std)


def _assumed(layout: Layout, whose: str, backbone: Backbone) -> str:
    way = ", and other sizes resize positions as its authors do" if backbone.position_resize == "dino" else ""
    made = f" (its positions are for {layout.made_for[0]}x{layout.made_for[1]})" * (layout.size != layout.made_for)
    return (
        f"the file says nothing of its images: {layout.size[0]}x{layout.size[1]} pixels{made}, mean and std are "
        f"{whose}{way}"
    )


def _name(layout: Layout, backbone: Backbone) -> str:
    blocks: Any = getattr(backbone.model, "blocks", None)
    if layout.kind not in ("DINO", "DINOv2") or blocks is None:
        return layout.architecture
    registers = f", {backbone.registers} registers" if backbone.registers else ""
    return (
        f"{layout.kind}'s ViT (patch size {backbone.patch_size}, width {backbone.width}, {len(blocks)} blocks, "
        f"{blocks[0].attn.num_heads} heads{registers})"
    )


def _which(network: str | None, epoch: Any, arguments: dict[str, Any]) -> str:
    if network is None:
        return ", weights"
    if not isinstance(epoch, int):
        return f", {network}"
    epochs = arguments.get("epochs")
    return f", {network} after epoch {epoch}{f' of {epochs}' if isinstance(epochs, int) else ''}"


def _arguments(found: dict[str, Any]) -> dict[str, Any]:
    """Plain values of the arguments that published files keep."""
    kept = found.get("args")
    kept = vars(kept) if isinstance(kept, argparse.Namespace) else kept
    plain = (str, int, float, bool, type(None))
    return (
        {str(key): value for key, value in kept.items() if isinstance(value, plain)} if isinstance(kept, dict) else {}
    )
