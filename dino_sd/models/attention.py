"""What a ViT's block attends to: the rows of its softmax, which fused kernels never give out."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.pixels import Pixels


class Attended(NamedTuple):
    """What a block's attention did to a batch. P counts all tokens: class token, registers, patches, in this order.

    weights: (N, heads, queries, P), rows sum to 1. values: (N, heads, P, D of a head).
    mixed: (N, heads, queries, D of a head), what the kernel made of them: weights @ values, but for rounding.
    """

    weights: Tensor
    values: Tensor
    mixed: Tensor


def attention(backbone: Backbone | Pixels, images_NCHW: Tensor, layer: int = -1) -> Tensor:
    """Softmax rows of a ViT's block, (N, heads, P, P): how much each token (row) reads of each (column).

    images_NCHW: normalised, of any size that the backbone takes. layer: block, counted from 0; negative from the end.
    Tokens are the class token, registers, patches; backbone.prefix_tokens of them are no patches. P * P numbers a head:
    `class_attention` gives what pictures need of it. The model is left as it was. Raises UserError for convnets, for
    kinds of attention that do not let every token read every other one, and for a block that there is not.
    """
    return attended(backbone, images_NCHW, layer).weights


def class_attention(backbone: Backbone | Pixels, images_NCHW: Tensor, layer: int = -1) -> Tensor:
    """How much the class token reads of each patch, (N, heads, patches); registers and itself are left out.

    Rows sum to at most 1. Caron et al. 2021, figure 1. Raises UserError as `attention` does, and for ViTs without a
    class token.
    """
    _block(backbone, layer)  # says it of convnets
    if getattr(backbone.model, "cls_token", None) is None:
        raise UserError(f"attention: model={backbone.name} has no class token whose attention could be shown; use pca")
    return attended(backbone, images_NCHW, layer, queries=1).weights[:, :, 0, backbone.prefix_tokens :]


@torch.no_grad()
def attended(backbone: Backbone | Pixels, images_NCHW: Tensor, layer: int = -1, queries: int | None = None) -> Attended:
    """Weights, values and output of a block's attention, of the first `queries` tokens (None: of all).

    The block's own code works out queries and keys with their norms and position codes; they are read where it hands
    them to the fused kernel. So this holds for every kind of attention that ends there. Arguments and errors as in
    `attention`.
    """
    attn, last = _block(backbone, layer), {}
    model: Any = backbone.model

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        last.update(args=args, kwargs=kwargs)

    handle = attn.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        model.forward_features(images_NCHW)
    finally:
        handle.remove()
    with _Kernel() as kernel:
        _fused(attn)(*last["args"], **last["kwargs"])
    tokens = last["args"][0]
    if len(kernel.calls) != 1 or tokens.ndim != 3 or kernel.calls[0][0].shape[::2] != tokens.shape[:2]:
        raise UserError(
            f"attention: model={backbone.name} attends in a way of its own ({type(attn).__name__}), not from every "
            f"token to every other; use a plain ViT, or pca"
        )
    q, k, v, mask, scale, mixed = kernel.calls[0]
    logits = (q[:, :, :queries] * scale) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits + mask[..., :queries, :]
    return Attended(logits.softmax(-1), v, mixed[:, :, :queries])


def _block(backbone: Backbone | Pixels, layer: int) -> Any:
    """The attention module of a block. Raises UserError."""
    blocks = getattr(backbone.model, "blocks", None) if isinstance(backbone, Backbone) else None
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not hasattr(blocks[0], "attn"):
        raise UserError(f"attention: model={backbone.name} is no plain ViT, it has none to show; use pca")
    if not -len(blocks) <= layer < len(blocks):
        raise UserError(f"layer={layer}: model={backbone.name} has {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    attn: Any = blocks[layer].attn
    if not hasattr(attn, "fused_attn"):
        raise UserError(
            f"attention: model={backbone.name} attends in a way that is not known here ({type(attn).__name__}); "
            f"use a plain ViT, or pca"
        )
    return attn


def _fused(attn: nn.Module) -> Callable[..., Any]:
    """The same module, sharing all weights, that calls the fused kernel whatever the other one does."""
    twin: Any = copy.copy(attn)
    twin.fused_attn = True
    return twin.forward


class _Kernel(TorchFunctionMode):
    """Notes what is handed to the fused kernel: (queries, keys, values, mask to be added or None, scale, output)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, float, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append(_read(*args, **(kwargs or {}), output=result))
        return result


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    output: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, Tensor]:
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale, output
