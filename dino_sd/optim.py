"""Optimizers with the published parameter groups, and the published clipping."""

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

DECAYED, PLAIN = 0, 1  # parameter groups


def make_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """Group 0 gets weight decay; biases and one-dimensional parameters are in group 1, which never does.

    Rates and decays are set before each step; the values here are placeholders. Caron et al. 2021,
    `get_params_groups`. LARS is timm's: it leaves group 1 without a trust ratio, and
    its ratio has |g| + decay |w| where the published class has |g + decay w|.
    """
    decayed, plain = [], []
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if key.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if name == "lars":
        return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0)  # pyright: ignore[reportArgumentType]
    return torch.optim.AdamW(groups, lr=0.0, fused=next(module.parameters()).device.type in ("cpu", "cuda"))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[DECAYED]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_each_(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scales down each gradient whose own norm is over `limit`; returns the largest norm found. No host sync.

    Clipping parameter by parameter is what the published code does; it differs from clipping the norm of all.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(grads)
    if limit is not None:
        factors = (limit / (torch.stack(norms) + 1e-6)).clamp_(max=1)
        torch._foreach_mul_(grads, list(factors.unbind()))
    return torch.stack(norms).max()
