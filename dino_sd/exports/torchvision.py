"""Weights for torchvision's ResNets. timm and torchvision give their parts the same names, so that no key changes."""

from pathlib import Path

import torchvision
from torch import nn
from torchvision.models.resnet import ResNet

from dino_sd.errors import UserError
from dino_sd.exported import WEIGHTS, Exported, Usage

TOLERANCE = 1e-5
GRAPH = False


def refuse(exported: Exported) -> None:
    backbone = exported.backbone
    theirs = theirs_of(exported)
    if theirs is None:
        raise UserError(
            f"format=torchvision is for ResNets that torchvision has too ({', '.join(known())}); "
            f"model={backbone.name} is none; use format=timm, onnx, pt2 or safetensors"
        )
    wanted = {key: value.shape for key, value in theirs.state_dict().items()}
    given = {key: value.shape for key, value in backbone.model.state_dict().items()}
    different = sorted({*wanted.items()} ^ {*given.items()})
    if different:
        raise UserError(
            f"format=torchvision: model={backbone.name} with its model_args {backbone.model_args} is another network "
            f"than torchvision's, for one in {different[0][0]}; use format=timm, onnx, pt2 or safetensors"
        )


def known() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if name.startswith(("resnet", "resnext", "wide_resnet"))]


def theirs_of(exported: Exported) -> ResNet | None:
    """torchvision's network of the same name, without classifier; None where there is none."""
    if exported.backbone.architecture not in known():
        return None
    model = torchvision.models.get_model(exported.backbone.architecture, weights=None)
    assert isinstance(model, ResNet)
    if exported.backbone.channels != 3:
        model.conv1 = nn.Conv2d(exported.backbone.channels, 64, 7, 2, 3, bias=False)
    for stage in absent(exported):
        setattr(model, f"layer{stage}", nn.Identity())
    setattr(model, "fc", nn.Identity())  # noqa: B010
    return model


def absent(exported: Exported) -> range:
    """Stages behind the exit."""
    return range(5 if exported.stages is None else exported.stages + 1, 5)


def write(folder: Path, exported: Exported) -> None:
    exported.write_weights(folder)


def usages(exported: Exported) -> list[Usage]:
    backbone, classes = exported.backbone, exported.classes if exported.classifier is not None else 0
    lines = [
        "import torch, torchvision",
        "from safetensors.torch import load_file",
        f"model = torchvision.models.{backbone.architecture}({f'num_classes={classes}' if classes else ''})",
    ]
    if backbone.channels != 3:
        lines.append(f"model.conv1 = torch.nn.Conv2d({backbone.channels}, 64, 7, 2, 3, bias=False)")
    if absent(exported):
        names = " = ".join(f"model.layer{stage}" for stage in absent(exported))
        lines.append(f"{names} = torch.nn.Identity()  # ends after stage {exported.stages}")
    loads = f'model.load_state_dict(load_file("FOLDER/{WEIGHTS}"))'
    if not classes:
        return [
            Usage(
                "torchvision",
                "\n".join([*lines, "model.fc = torch.nn.Identity()", loads, "model.eval()"]),
                "features = model(images)",
            )
        ]
    split = "classifier, model.fc = model.fc, torch.nn.Identity()"
    return [
        Usage(
            "torchvision",
            "\n".join([*lines, loads, "model.eval()", split]),
            "features = model(images)\nlogits = classifier(features)",
        )
    ]
