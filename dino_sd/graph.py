"""A backbone as one graph of plain operations, for programs that know neither timm nor this package."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import Classifier

WHITE = 255  # the largest value of the pixels that a graph with `preprocess` takes


class Graph(nn.Module):
    """images (N, C, H, W) -> {"features": (N, D), "patches": (N, P, D)[, "logits": (N, classes)]}.

    preprocess: images are uint8 pixels, and the graph does the rest; otherwise they are normalised float32. mean, std:
    per channel, pixels from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classifier: nn.Module | None,
        mean: Sequence[float],
        std: Sequence[float],
        preprocess: bool,
    ):
        super().__init__()
        self.backbone, self.preprocess = backbone, preprocess
        self.classifier = None if classifier is None else without_autocast(classifier)
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.preprocess:
            images = (images.to(torch.float32) / WHITE - self.mean) / self.std
        features = self.backbone(images)
        outputs = {"features": features.pooled_ND, "patches": features.patches_NPD}
        return outputs if self.classifier is None else {**outputs, "logits": self.classifier(features.pooled_ND)}


def without_autocast(head: nn.Module) -> nn.Module:
    """A classifier, with a norm before it or not, of torch's own layers: a graph would keep autocast's region."""
    if isinstance(head, nn.Sequential):
        return nn.Sequential(*map(without_autocast, head))
    if not isinstance(head, Classifier):
        return head
    linear = nn.Linear(head.in_features, head.out_features)
    linear.load_state_dict(head.state_dict())
    return linear


def trace(graph: Graph, size: tuple[int, int], dynamic_size: bool) -> ExportedProgram:
    """The graph with a free batch size and, if wanted, free height and width; size: (height, width) in pixels.

    Raises UserError where the model takes one size alone, or branches in a way that a graph cannot hold.
    """
    backbone = graph.backbone
    dynamic: dict[int, Any] = {0: Dim("batch")}
    if dynamic_size:
        # Not a square and not the model's own size: what holds for this example must not hold for those alone.
        size = other_size(backbone, size, 1, 2)
        dynamic |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    shape = (2, backbone.channels, *size)
    example = torch.zeros(shape, dtype=torch.uint8 if graph.preprocess else torch.float32)
    if dynamic_size:
        check_sizes_are_free(graph, example)
    try:
        with torch.no_grad(), free_of_one(), positions_always_resized(backbone.model):
            program = torch.export.export(graph, (example,), dynamic_shapes={"images": dynamic}, strict=False)
    except Exception as error:  # torch raises what it likes here; whoever wants to know more has the cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        instead = "; try without dynamic_size" if dynamic_size else "; use format=timm or safetensors"
        raise UserError(f"export: torch.export cannot trace model={backbone.name}: {reason}{instead}") from error
    for node in program.graph.nodes:  # names of files on the machine that made it
        node.meta.pop("stack_trace", None)
    return program


def other_size(backbone: Backbone, size: tuple[int, int], down: int, right: int) -> tuple[int, int]:
    """A larger size, by twice as many patches as said (32 pixels where there are none) in each direction."""
    step = 2 * backbone.patch_size if backbone.patch_size else 32
    return size[0] + down * step, size[1] + right * step


def check_sizes_are_free(graph: Graph, example: Tensor) -> None:
    backbone = graph.backbone
    if getattr(backbone, "position_resize", "timm") != "timm":
        raise UserError(
            f"dynamic_size=true: model={backbone.name} was published with a way of its own to resize positions, "
            f"which a graph cannot hold for all sizes; leave dynamic_size out and export one graph a size"
        )
    try:
        with torch.inference_mode():
            graph(example)
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(
            f"dynamic_size=true: model={backbone.name} takes images of {backbone.size[0]}x{backbone.size[1]} pixels "
            f"alone; leave dynamic_size out"
        ) from None


@contextmanager
def positions_always_resized(model: nn.Module) -> Iterator[None]:
    """Tracing takes one branch for good; timm's resizing of positions branches on whether there is anything to do."""
    module: Any = sys.modules[type(model).__module__]
    before = getattr(module, "resample_abs_pos_embed", None)
    if before is None:
        yield
        return
    module.resample_abs_pos_embed = _resized
    try:
        yield
    finally:
        module.resample_abs_pos_embed = before


def _resized(
    posemb: Tensor,
    new_size: Sequence[int],
    old_size: Sequence[int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
    **_: Any,
) -> Tensor:
    """timm's `resample_abs_pos_embed` (1, P, D) for free sizes; the same size gives the same numbers."""
    if old_size is None:
        side = round((posemb.shape[1] - num_prefix_tokens) ** 0.5)
        old_size = (side, side)
    if all(isinstance(side, int) for side in new_size) and tuple(new_size) == tuple(old_size):
        return posemb
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    grid = grid.reshape(1, old_size[0], old_size[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_size), mode=interpolation, antialias=antialias)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], 1)


def free_of_one() -> Any:
    """Lets a side of the last feature map be 1 as well, which torch.export rules out unless told so (torch >= 2.8)."""
    known = hasattr(symbolic_shapes, "backed_size_oblivious")
    return symbolic_shapes.patch(backed_size_oblivious=True) if known else nullcontext()  # pyright: ignore
