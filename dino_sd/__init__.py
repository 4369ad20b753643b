"""Self-distillation for vision: pretrain backbones on your own images, judge them, take them elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dino_sd.models.model import Model

__version__ = "0.1.0"


def load(
    model: str | Path,
    device: "torch.device | str" = "cpu",
    *,
    network: str | None = None,
    exit: int | None = None,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> "Model":
    """A frozen model in eval mode, with its transform: `load("runs/x").features(images)`. Prints nothing.

    model: a run folder, a checkpoint, an export or another folder in timm's format (config.json with weights), a file
    of weights (.pth, .safetensors) as DINO and DINOv2 were published, or "timm:NAME". network: "teacher" or "student",
    default the one that is the result. exit: only the blocks up to this one (from 1). architecture (timm's name),
    model_args: for a file of weights that does not say them, e.g. model_args={"num_heads": 2}. `print(model)` says what
    was loaded. Raises `dino_sd.errors.UserError` where there is nothing of this name, or where anything of a backbone
    is missing or left over. Nothing is fetched from the network but timm:NAME.
    """
    from dino_sd.loading import load_model  # torch and timm take seconds, which `import dino_sd` need not

    return load_model(model, device, network=network, exit=exit, architecture=architecture, model_args=model_args)
