"""A folder for timm, for transformers, and for torch.hub."""

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from dino_sd.errors import UserError
from dino_sd.exported import Exported, Usage

TOLERANCE = 1e-5
GRAPH = False

HUBCONF = '''"""For torch.hub.load(FOLDER, "backbone", source="local"). Needs torch, timm and safetensors."""

from pathlib import Path

import timm

dependencies = ["torch", "timm", "safetensors"]

_NAME = "local-dir:" + str(Path(__file__).resolve().parent)


def backbone(**kwargs):
    """Normalised images (N, C, H, W) -> features (N, D). kwargs go to timm.create_model."""
    return timm.create_model(_NAME, pretrained=True, num_classes=0, **kwargs).eval()


def transform():
    """A picture of Pillow's -> a normalised image (C, H, W)."""
    return timm.data.create_transform(**timm.data.resolve_model_data_config(backbone()))
'''

CLASSIFIER = '''

def classifier(**kwargs):
    """Normalised images (N, C, H, W) -> logits (N, classes). kwargs go to timm.create_model."""
    return timm.create_model(_NAME, pretrained=True, **kwargs).eval()
'''


def refuse(exported: Exported) -> None:
    if exported.exit is not None and not isinstance(exported.backbone.model, VisionTransformer):
        raise UserError(
            f"exit={exported.exit}: timm builds a part of plain ViTs only, and model={exported.backbone.name} is none; "
            f"format=safetensors, onnx, pt2 and, for ResNets, torchvision can hold it"
        )


def write(folder: Path, exported: Exported) -> None:
    exported.write_weights(folder)
    (folder / "hubconf.py").write_text(HUBCONF + (CLASSIFIER if exported.classifier is not None else ""))


def usages(exported: Exported) -> list[Usage]:
    timm = Usage(
        "timm",
        'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "features = model(images)",
    )
    hub = Usage(
        "torch.hub",
        'import torch\nmodel = torch.hub.load("FOLDER", "backbone", source="local")',
        "features = model(images)",
    )
    transformers = Usage(
        "transformers",
        "from transformers import AutoImageProcessor, AutoModel\n"
        'model = AutoModel.from_pretrained("FOLDER")\nprocessor = AutoImageProcessor.from_pretrained("FOLDER")',
        "features = model(images).pooler_output",
        optional=True,
    )
    if exported.classifier is None:
        return [timm, hub, transformers]
    return [
        timm._replace(
            load=f'{timm.load}\nclassifier = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
            call=f"{timm.call}\nlogits = classifier(images)",
        ),
        hub._replace(
            load=f'{hub.load}\nclassifier = torch.hub.load("FOLDER", "classifier", source="local")',
            call=f"{hub.call}\nlogits = classifier(images)",
        ),
        transformers._replace(
            load=transformers.load.replace("AutoModel\n", "AutoModel, AutoModelForImageClassification\n")
            + '\nclassifier = AutoModelForImageClassification.from_pretrained("FOLDER")',
            call=f"{transformers.call}\nlogits = classifier(images).logits",
        ),
    ]
