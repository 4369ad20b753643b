"""What goes into an export: one network, the images it expects, and all that is known of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import nn
from torch.export import ExportedProgram

from dino_sd.graph import WHITE, Graph, trace
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import Classifier
from dino_sd.models.model import Model

WEIGHTS = "model.safetensors"


class Usage(NamedTuple):
    """How a library loads an export: Python lines. The very lines are run when the export is checked.

    load: run once; FOLDER stands for the export's folder. call: makes `features`, and `patches` and `logits` where the
    format has them, of `images`. optional: the export is good without that library.
    """

    library: str
    load: str
    call: str
    optional: bool = False


@dataclass(frozen=True)
class Exported:
    """A network on its way out: on the CPU, in float32, frozen.

    model: of a Backbone, and with a size. exit: the block after which it was cut, None for the whole. dynamic_size,
    preprocess: of formats that hold a graph.
    """

    model: Model
    exit: int | None = None
    dynamic_size: bool = False
    preprocess: bool = False

    @property
    def backbone(self) -> Backbone:
        assert isinstance(self.model.backbone, Backbone)
        return self.model.backbone

    @property
    def size(self) -> tuple[int, int]:
        assert self.model.size is not None
        return self.model.size

    @property
    def classes(self) -> int:
        return len(self.model.classes or ()) if self.head is not None else 0

    @property
    def head(self) -> nn.Module | None:
        """What says classes, where their names are known."""
        return self.model.heads.get("classifier") if self.model.classes else None

    @property
    def classifier(self) -> Classifier | None:
        """The head where timm can hold it: one linear layer behind the pooled output."""
        known = isinstance(self.backbone.model.pretrained_cfg.get("classifier"), str)
        return self.head if known and isinstance(self.head, Classifier) else None

    @property
    def stages(self) -> int | None:
        """The last of a ResNet's stages, from 1, where it was cut; a ViT is cut by its depth."""
        return self.exit if self.exit is not None and "depth" not in self.backbone.model_args else None

    def graph(self, preprocess: bool) -> Graph:
        return Graph(self.backbone, self.head, self.model.mean, self.model.std, preprocess).eval()

    @cached_property
    def program(self) -> ExportedProgram:
        """Raises UserError as `trace` does."""
        return trace(self.graph(self.preprocess), self.size, self.dynamic_size)

    @property
    def outputs(self) -> list[str]:
        return ["features", "patches"] + (["logits"] if self.head is not None else [])

    def model_args(self) -> dict[str, Any]:
        """What timm has to be told to build this very network; drop path and the like are training's."""
        backbone = self.backbone
        args = {key: value for key, value in backbone.model_args.items() if not key.startswith("drop")}
        args["in_chans"] = backbone.channels
        if getattr(backbone.model, "dynamic_img_size", False):
            args |= {"img_size": list(backbone.size), "dynamic_img_size": True}
        elif getattr(getattr(backbone.model, "patch_embed", None), "img_size", None) is not None:
            args["img_size"] = list(backbone.size)
        return args

    def preprocessing(self) -> dict[str, Any]:
        """From a picture to what the network takes. The shorter side is resized to size / crop, then comes the centre.

        range: of the pixels before mean and std; 0 is black and 1 the largest number that a pixel can be.
        """
        model = self.model
        return {
            "channels": model.channels, "size": list(self.size), "crop": model.crop, "crop_mode": "center",
            "interpolation": "bicubic", "range": [0, 1], "mean": model.mean, "std": model.std,
        }  # fmt: skip

    def metadata(self) -> dict[str, str]:
        """For a file that travels alone: what it takes and gives."""
        height, width = ("H", "W") if self.dynamic_size else self.size
        shape = f"(N, {self.model.channels}, {height}, {width})"
        if self.preprocess:
            takes = f"uint8 {shape}: pixels from 0 to {WHITE}, resized and cropped; mean and std are in the graph"
        else:
            takes = f"float32 {shape}: pixels from 0 to 1, resized and cropped, less mean, divided by std"
        gives = ["features (N, D), pooled", "patches (N, P, D)", "logits (N, classes), before softmax"]
        return {
            "architecture": self.backbone.architecture,
            "input": takes,
            "outputs": "; ".join(gives[: len(self.outputs)]),
            "preprocessing": json.dumps({**self.preprocessing(), "normalised_in_graph": self.preprocess}),
            **({"classes": json.dumps(self.model.classes)} if self.head is not None else {}),
        }  # fmt: skip

    def config(self) -> dict[str, Any]:
        """config.json in timm's format. What timm does not know stands under "dino_sd"."""
        classes, args = self.classes if self.classifier is not None else 0, self.model_args()
        known = self.backbone.model.pretrained_cfg
        return {
            "architecture": self.backbone.architecture,
            "num_classes": classes,
            "num_features": self.backbone.width,
            "model_args": args,
            "pretrained_cfg": {
                "input_size": [self.backbone.channels, *self.size],
                "fixed_input_size": "img_size" in args and not args.get("dynamic_img_size", False),
                "mean": self.model.mean, "std": self.model.std, "interpolation": "bicubic",
                "crop_pct": self.model.crop, "crop_mode": "center",
                "num_classes": classes, "classifier": known.get("classifier"), "first_conv": known.get("first_conv"),
            },
            **({"label_names": self.model.classes} if classes else {}),
        }  # fmt: skip

    def write_weights(self, folder: Path) -> None:
        """model.safetensors under timm's names, with the classifier that timm can hold."""
        state = self.backbone.model.state_dict()
        if self.classifier is not None:
            name = self.backbone.model.pretrained_cfg["classifier"]
            state |= {f"{name}.{key}": value for key, value in self.classifier.state_dict().items()}
        save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
