"""Heads: small networks on top of a backbone's pooled output, which are left behind after training."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of an exit's norm, as in timm's ViTs, whose last norm it becomes
CACHED_ROWS = 2048  # of the prototypes' weight; 2 MB at the published width


class _NormedLinear(torch.autograd.Function):
    """x @ (v * s).T with s = g / |v| per row, in float32 (TF32 on CUDA) or float64, whatever autocast says.

    Plain autograd keeps and walks the (K, D) weight some ten times a step; at 65,536 prototypes that is what a small
    backbone's step waits for. Here a CPU works through it in parts that stay in its cache.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_v: Tensor, weight_g: Tensor) -> Tensor:
        scale_K1 = weight_g / weight_v.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x_ND, weight_v, scale_K1, weight_g)
        if len(x_ND) < weight_v.shape[1]:  # scale the smaller one, logits or weights
            return (x_ND @ weight_v.T).mul_(scale_K1.T)
        return x_ND @ (weight_v * scale_K1).T

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore
        x_ND, weight_v, scale_K1, weight_g = ctx.saved_tensors
        grad_x, grad_v, along_K1 = torch.zeros_like(x_ND), torch.empty_like(weight_v), torch.empty_like(scale_K1)
        step = CACHED_ROWS if x_ND.device.type == "cpu" else len(weight_v)
        for start in range(0, len(weight_v), step):
            rows = slice(start, start + step)
            v, s, grad = weight_v[rows], scale_K1[rows], grad_NK[:, rows]
            grad_x.addmm_(grad * s.T, v)
            grad_w = torch.mm(grad.T, x_ND, out=grad_v[rows])
            along_K1[rows] = torch.linalg.vecdot(grad_w, v).unsqueeze(1) * s
            # d(g v/|v|): along v only g moves, across it only the direction does
            grad_w.addcmul_(v, s * along_K1[rows] / weight_g[rows] ** 2, value=-1).mul_(s)
        return grad_x, grad_v, along_K1 / weight_g if ctx.needs_input_grad[2] else None


class PrototypeLayer(nn.Module):
    """Weight-normed linear layer without bias: logit k = weight_g[k] * <x, weight_v[k] / |weight_v[k]|>.

    learned_norm=False fixes weight_g at 1, so that logits of unit vectors are cosines. Never in bfloat16: the teacher
    divides its logits by temperatures such as 0.04, which three digits do not bear.
    """

    def __init__(self, width: int, prototypes: int, learned_norm: bool):
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(width, prototypes, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=learned_norm)

    def forward(self, x_ND: Tensor) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            return _NormedLinear.apply(x_ND, self.weight_v, self.weight_g)  # pyright: ignore


class ProjectionHead(nn.Module):
    """DINO's head: MLP with GELU, L2 normalisation, prototypes. (N, width) -> (N, prototypes).

    layers counts the linear layers of the MLP. frozen_until: share of the run in which the prototypes get no update.
    Caron et al. 2021, section 3.2 and appendix C.
    """

    def __init__(
        self,
        width: int,
        *,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        learned_norm: bool = False,
        frozen_until: float = 0.0,
    ):
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        mlp: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            mlp.append(nn.Linear(before, after))
            if i < layers - 1:
                mlp += [nn.BatchNorm1d(after), nn.GELU()] if batch_norm else [nn.GELU()]
        for module in mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.mlp = nn.Sequential(*mlp)
        self.small_args: dict[str, Any] = {
            "prototypes": prototypes, "bottleneck": bottleneck, "learned_norm": learned_norm,
            "frozen_until": frozen_until, "layers": 2,
        }  # fmt: skip
        self.last_layer = PrototypeLayer(bottleneck, prototypes, learned_norm)
        self.frozen_until = frozen_until

    def forward(self, x_ND: Tensor) -> Tensor:
        x_ND = self.mlp(x_ND)
        # Normalised in float32: a square of 256 bfloat16 values keeps two digits.
        x_ND = F.normalize(x_ND.float() if x_ND.dtype in (torch.bfloat16, torch.float16) else x_ND, dim=-1)
        return self.last_layer(x_ND)

    def frozen_parameters(self, t: float) -> list[nn.Parameter]:
        """Parameters that must not move at time t."""
        return list(self.last_layer.parameters()) if t < self.frozen_until else []

    def small(self, width: int) -> "ProjectionHead":
        """A smaller head with the same outputs, for an exit."""
        return ProjectionHead(width, hidden=width, **self.small_args)


class Classifier(nn.Linear):
    """(N, width) -> (N, classes) logits, never in bfloat16: losses read more than three digits of them."""

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))

    def small(self, width: int) -> "Classifier":
        """One with the same outputs, for an exit."""
        return Classifier(width, self.out_features)


class ExitFeatures(nn.Module):
    """Norm and projection of an exit: (N, width of its block) -> (N, width of the last)."""

    def __init__(self, exit: int, width: int, out_width: int):
        super().__init__()
        self.exit = exit
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.project = nn.Linear(width, out_width)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.project(self.norm(x_ND))


class Exit(nn.Module):
    """A head that reads what block number `exit` (from 1) says: norm, projection, and a small head of any kind.

    The projection is linear, so that with a classifier behind it both are one linear layer of a shallow network.
    """

    def __init__(self, features: ExitFeatures, head: nn.Module):
        super().__init__()
        self.exit = features.exit
        self.features, self.head = features, head

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.head(self.features(x_ND))

    def frozen_parameters(self, t: float) -> list[nn.Parameter]:
        return self.head.frozen_parameters(t) if isinstance(self.head, ProjectionHead) else []

    def folded(self) -> Classifier | None:
        """Projection and classifier as one layer behind the norm, with the same outputs; None for other heads."""
        if not isinstance(self.head, Classifier):
            return None
        whole = Classifier(self.features.project.in_features, self.head.out_features)
        with torch.no_grad():
            weight, bias = (p.double() for p in (self.features.project.weight, self.features.project.bias))
            head = self.head.weight.double()
            whole.weight.copy_(head @ weight)
            whole.bias.copy_(head @ bias + self.head.bias.double())
        return whole


def exit_of(head: nn.Module) -> int | None:
    """The number of the block that a head reads; None: the network's output."""
    return getattr(head, "exit", None)


def says_classes(head: nn.Module) -> bool:
    return isinstance(head, Classifier) or (isinstance(head, Exit) and isinstance(head.head, Classifier))


def classifiers(state: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The heads in a network's state dict that say classes: "classifier", and exits with a classifier."""
    heads: dict[str, nn.Module] = {}
    inside = {key.removeprefix("heads."): value for key, value in state.items() if key.startswith("heads.")}
    for name in dict.fromkeys(key.split(".")[0] for key in inside):
        own = {key.removeprefix(f"{name}."): value for key, value in inside.items() if key.startswith(f"{name}.")}
        if own.keys() == {"weight", "bias"} and name == "classifier":
            heads[name] = Classifier(own["weight"].shape[1], own["weight"].shape[0])
        elif name.startswith("exit_") and "head.weight" in own:
            project = own["features.project.weight"]
            features = ExitFeatures(int(name.removeprefix("exit_")), project.shape[1], project.shape[0])
            heads[name] = Exit(features, Classifier(project.shape[0], own["head.weight"].shape[0]))
        if name in heads:
            heads[name].load_state_dict(own)
    return heads


def exit_norms(state: dict[str, Tensor]) -> dict[int, nn.Module]:
    """The norm of each exit in a network's state dict, by the number of its block."""
    norms: dict[int, nn.Module] = {}
    for key, weight in state.items():
        if match := re.fullmatch(r"heads\.exit_(\d+)\.features\.norm\.weight", key):
            norm = nn.LayerNorm(len(weight), eps=EPS)
            norm.load_state_dict({"weight": weight, "bias": state[key.removesuffix("weight") + "bias"]})
            norms[int(match[1])] = norm
    return norms
