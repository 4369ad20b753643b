"""The weights alone, under timm's names."""

from pathlib import Path

from dino_sd.exported import WEIGHTS, Exported, Usage

TOLERANCE = 1e-5
GRAPH = False


def refuse(exported: Exported) -> None:
    """Every network has weights."""


def write(folder: Path, exported: Exported) -> None:
    exported.write_weights(folder)


def usages(exported: Exported) -> list[Usage]:
    backbone = exported.backbone
    args = {"num_classes": exported.classes if exported.classifier is not None else 0, **exported.model_args()}
    given = ", ".join(f"{key}={value!r}" for key, value in args.items())
    lines = [
        "import timm",
        "from safetensors.torch import load_file",
        f'model = timm.create_model("{backbone.architecture}", {given})',
    ]
    if exported.stages is not None:
        lines += [
            "pool = model.global_pool  # lost with the stages",
            f"model.prune_intermediate_layers([{backbone.depth - 1}])  # 0 is the stem",
            "model.global_pool = pool",
        ]
    lines += [f'model.load_state_dict(load_file("FOLDER/{WEIGHTS}"))', "model.eval()"]
    if exported.classifier is None:
        return [Usage("safetensors", "\n".join(lines), "features = model(images)")]
    call = "tokens = model.forward_features(images)\nfeatures = model.forward_head(tokens, pre_logits=True)"
    return [Usage("safetensors", "\n".join(lines), f"{call}\nlogits = model.forward_head(tokens)")]
