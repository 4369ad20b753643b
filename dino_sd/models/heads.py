"""Heads: small networks on top of a backbone's pooled output, which are left behind after training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
