"""Any timm model behind one small contract: images in, Features out."""

import difflib
import inspect
from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from timm.models.resnet import ResNet
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_sd.errors import UserError


class Features(NamedTuple):
    """What a backbone says of a batch.

    pooled_ND: its pooled output (the class token after the last norm, or the mean over positions).
    patches_NPD: patch tokens, or the cells of the last feature map.
    layers: (pooled_ND, patches_NPD) of every block that was asked for, normed where the model has a final norm.
    """

    pooled_ND: Tensor
    patches_NPD: Tensor
    layers: list[tuple[Tensor, Tensor]]


class Backbone(nn.Module):
    """A timm model without its classifier.

    size: (height, width) in pixels that position embeddings are made for; other sizes resize them on the way.
    position_resize: how. "timm": antialiased; "dino": as `dino_positions` does, for weights that were published so.
    Raises UserError for a name that timm does not know and for arguments that the model does not take.
    """

    position_resize = "timm"

    def __init__(
        self,
        name: str,
        *,
        size: tuple[int, int],
        channels: int = 3,
        drop_path: float = 0.0,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.name, self.size, self.channels, self.model_args = name, size, channels, dict(model_args or {})
        self.architecture = name.split(".")[0]  # without the tag of pretrained weights
        args: dict[str, Any] = {"in_chans": channels}
        if not pretrained:
            args["num_classes"] = 0
        if drop_path:
            args["drop_path_rate"] = drop_path
        self.model = _create(name, size, pretrained, {**args, **self.model_args})
        self.pretrained_classifier: list[nn.Linear] = []  # in a list: it is no part of the backbone
        if pretrained:
            if isinstance(head := self.model.get_classifier(), nn.Linear):
                self.pretrained_classifier.append(head)
            self.model.reset_classifier(0)
        # behind the pooling, some have one layer more
        self.width: int = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        taps = [(str(info["module"]), int(info["num_chs"])) for info in self.model.feature_info]
        self.depth: int = len(taps)
        self.stem = int(taps[0][0].startswith(("act", "bn", "conv", "relu", "stem")))  # a tap before the first stage
        self.widths: list[int] = [channels for _, channels in taps[self.stem :]]  # of each block, or stage
        self.prefix_tokens: int = getattr(self.model, "num_prefix_tokens", 0)
        takes = inspect.signature(self.model.forward_intermediates).parameters
        # An XCiT's class token, for one, looks at the patches after all blocks.
        self.blocks_have_class_token = self.prefix_tokens > 0 and "return_prefix_tokens" in takes
        patch_size = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        self.patch_size: int | None = patch_size[0] if isinstance(patch_size, tuple) else patch_size

    def extra_repr(self) -> str:
        """All that features depend on and no module or weight of it shows: kept features are found by it."""
        return f"{self.name}, size={self.size}, model_args={self.model_args}, position_resize={self.position_resize}"

    def forward(self, images_NCHW: Tensor, layers: Sequence[int] = ()) -> Features:
        """images_NCHW: normalised. layers: blocks (stages of a convnet), counted from 0; negative from the end."""
        if not layers:
            last = self.model.forward_features(images_NCHW)
            return Features(self.model.forward_head(last, pre_logits=True), self._patches(last), [])
        last, taps = self.intermediates(images_NCHW, layers)
        pairs = [self._pooled_and_patches(tap) for tap in taps]
        return Features(self.model.forward_head(last, pre_logits=True), self._patches(last), pairs)

    def intermediates(
        self, images_NCHW: Tensor, layers: Sequence[int], norm: bool = True
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        """(what the model's head reads, [(map_NDHW, prefix_NPD)] of each layer, as asked for).

        layers: as in `forward`. prefix: class token and registers, in this order; None where there are none. norm: the
        model's last norm is applied to each.
        """
        wanted = [index % self.depth for index in layers]
        prefix = {"return_prefix_tokens": True} if self.blocks_have_class_token else {}
        last, maps = self.model.forward_intermediates(images_NCHW, indices=sorted(set(wanted)), norm=norm, **prefix)
        by_index = dict(zip(sorted(set(wanted)), maps, strict=True))
        taps = [by_index[index] for index in wanted]
        return last, [tap if isinstance(tap, tuple) else (tap, None) for tap in taps]

    def tokens(
        self, images_NCHW: Tensor, layers: Sequence[int] | None = None, kind: str = "cls", norm: bool = True
    ) -> list[Tensor]:
        """Of each layer "cls" (N, D), as `Features.layers` has it, "patch" (N, D, h, w) or "register" (N, R, D).

        layers, norm: as in `intermediates`; None: of the output alone.
        """
        last, taps = self.intermediates(images_NCHW, [-1] if layers is None else layers, norm)
        if layers is None and norm:
            if kind == "cls":
                return [self.model.forward_head(last, pre_logits=True)]
            (map_NDHW, prefix_NPD), patches_NPD = taps[0], self._patches(last)
            prefix_NPD = None if prefix_NPD is None else last[:, : self.prefix_tokens]
            taps = [(patches_NPD.transpose(1, 2).unflatten(2, map_NDHW.shape[2:]), prefix_NPD)]
        if kind == "cls":
            return [self._pooled_and_patches(tap)[0] for tap in taps]
        if kind == "patch":
            return [map_NDHW for map_NDHW, _ in taps]
        return [
            prefix_NPD[:, prefix_NPD.shape[1] - self.registers :] for _, prefix_NPD in taps if prefix_NPD is not None
        ]

    @property
    def registers(self) -> int:
        token = getattr(self.model, "reg_token", None)
        return 0 if token is None else token.shape[1]

    def pooled(self, images_NCHW: Tensor, exits: Sequence[int] = ()) -> list[Tensor]:
        """`forward(images_NCHW).pooled_ND`, without the work that only patch tokens need; then that of each exit.

        exits: numbers of blocks (stages of a convnet) after which to read too, counted from 1; these are not normed.
        Where the pooled output is a ViT's class token, its last block is worked out for that token alone: exact, and
        a twelfth (of 12 blocks) to a quarter (of 4) of the step cheaper.
        """
        model = self.model
        if not reads_class_token_alone(model):
            if not exits:
                return [model.forward_head(model.forward_features(images_NCHW), pre_logits=True)]
            last, taps = self.intermediates(images_NCHW, [exit + self.stem - 1 for exit in exits], norm=False)
            return [model.forward_head(last, pre_logits=True), *(self._pooled_and_patches(tap)[0] for tap in taps)]
        tokens_NPD = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images_NCHW))))
        tokens: dict[int, Tensor] = {}
        for number, block in enumerate(model.blocks[:-1], 1):
            tokens_NPD = lean_block(block, tokens_NPD)
            if number in exits:  # a view keeps all tokens of its block alive
                tokens[number] = tokens_NPD[:, 0]
        last_N1D = class_token_of(model.blocks[-1], tokens_NPD)
        tokens[len(model.blocks)] = last_N1D[:, 0]
        return [model.forward_head(model.norm(last_N1D), pre_logits=True), *(tokens[exit] for exit in exits)]

    def cut_(self, exit: int) -> "Backbone":
        """Takes away, in place, all blocks (stages) after the first `exit`; returns itself.

        Raises UserError for a depth that there is not, and for models other than plain ViTs and ResNets.
        """
        model, blocks = self.model, len(self.widths)
        if not isinstance(model, (VisionTransformer, ResNet)):
            raise UserError(f"exit={exit}: only plain ViTs and ResNets can be cut, model={self.name} is neither")
        if not 1 <= exit < blocks:
            raise UserError(f"exit={exit}: model={self.name} has {blocks} blocks or stages; choose 1 to {blocks - 1}")
        pool: Any = model.global_pool
        model.prune_intermediate_layers([exit + self.stem - 1], prune_norm=False, prune_head=False)
        model.global_pool = pool  # ResNets lose theirs with the head that no longer fits
        self.width = model.num_features = self.widths[exit - 1]
        if isinstance(model, VisionTransformer):
            self.model_args["depth"] = exit
        self.widths, self.depth = self.widths[:exit], exit + self.stem
        return self

    def _pooled_and_patches(self, tap: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        map_NDHW, prefix_NPD = tap
        patches_NPD = map_NDHW.flatten(2).transpose(1, 2)
        if prefix_NPD is not None and getattr(self.model, "global_pool", "token") == "token":
            return prefix_NPD[:, 0], patches_NPD
        return patches_NPD.mean(1), patches_NPD

    def _patches(self, last: Tensor) -> Tensor:
        if last.ndim == 3:
            return last[:, self.prefix_tokens :]
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return last.flatten(1, 2)
        return last.flatten(2).transpose(1, 2)

    def resize_as_dino_(self) -> "Backbone":
        """Sets `position_resize` to "dino", in place; returns itself. For ViTs with a class token and no registers."""
        assert type(self.model) is VisionTransformer and self.prefix_tokens == 1
        self.position_resize = "dino"
        self.model._pos_embed = MethodType(dino_positions, self.model)
        return self

    def use_fused_attention(self, fused: bool) -> None:
        """On CPUs the fused kernel's backward is slower than plain matrix products; on GPUs it is the faster one."""
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", fused)  # noqa: B010


def dino_positions(model: Any, tokens_NHWD: Tensor) -> Tensor:
    """Class token and patches with their positions, (N, 1 + H * W, D), resized as in the authors' code of DINO.

    Bicubic without antialiasing, by a factor of (patches + 0.1) / (patches of before): that tenth, which was to guard
    against rounding, moves every sample. Caron et al. 2021, and Oquab et al. 2023 for models without registers.
    """
    height, width, grid = tokens_NHWD.shape[1], tokens_NHWD.shape[2], model.patch_embed.grid_size
    if (height, width) == tuple(grid):
        return VisionTransformer._pos_embed(model, tokens_NHWD)
    class_11D, positions_1PD = model.pos_embed.float().split([1, grid[0] * grid[1]], 1)
    map_1DHW = rearrange(positions_1PD, "one (h w) d -> one d h w", h=grid[0])
    factors = ((height + 0.1) / grid[0], (width + 0.1) / grid[1])
    map_1DHW = F.interpolate(map_1DHW, scale_factor=factors, mode="bicubic")
    positions_1PD = torch.cat([class_11D, map_1DHW.flatten(2).transpose(1, 2)], 1).to(tokens_NHWD.dtype)
    token_N1D = model.cls_token.expand(tokens_NHWD.shape[0], -1, -1)
    return model.pos_drop(torch.cat([token_N1D, tokens_NHWD.flatten(1, 2)], 1) + positions_1PD)


def reads_class_token_alone(model: nn.Module) -> bool:
    """True for plain timm ViTs that pool the class token: the only ones whose last block `class_token_of` knows."""
    if type(model) is not VisionTransformer or model.global_pool != "token" or not len(model.blocks):
        return False
    return all(
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and getattr(block.attn, "gate", None) is None
        for block in model.blocks
    )


def lean_block(block: Any, tokens_NPD: Tensor) -> Tensor:
    """A timm ViT block that keeps less for the backward pass: the activation's output is made again there.

    Exact. It saves a sixth of the activations for 1% of the time: no matrix product is done twice.
    """
    mlp = block.mlp
    if not torch.is_grad_enabled() or mlp.drop1.p:
        return block(tokens_NPD)
    tokens_NPD = tokens_NPD + block.drop_path1(block.ls1(block.attn(block.norm1(tokens_NPD))))
    hidden = mlp.fc1(block.norm2(tokens_NPD))
    mixed = checkpoint(lambda x: mlp.fc2(mlp.norm(mlp.act(x))), hidden, use_reentrant=False, preserve_rng_state=False)
    return tokens_NPD + block.drop_path2(block.ls2(mlp.drop2(mixed)))


def class_token_of(block: Any, tokens_NPD: Tensor) -> Tensor:
    """What a timm ViT block makes of the first token: (N, P, D) -> (N, 1, D). Keys and values come from all tokens."""
    attn = block.attn
    normed_NPD = block.norm1(tokens_NPD)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    inner = attn.num_heads * attn.head_dim
    q = F.linear(normed_NPD[:, :1], weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(normed_NPD, weight[inner:], None if bias is None else bias[inner:])
    q = rearrange(q, "n p (h d) -> n h p d", h=attn.num_heads)
    k, v = rearrange(kv, "n p (two h d) -> two n h p d", two=2, h=attn.num_heads).unbind(0)
    token_N1D = tokens_NPD[:, :1] + block.drop_path1(block.ls1(_attend(attn, q, k, v)))
    return token_N1D + block.drop_path2(block.ls2(block.mlp(block.norm2(token_N1D))))


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """timm's attention from (N, heads, P, D) queries, keys and values on: (N, P, D)."""
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        mixed = attn.attn_drop(((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1)) @ v
    mixed = rearrange(mixed, "n h p d -> n p (h d)")
    return attn.proj_drop(attn.proj(getattr(attn, "norm", nn.Identity())(mixed)))


def pretrained_cfg(name: str) -> Any:
    """What timm says of a name's weights and images; None for an unknown architecture. Raises UserError for a tag."""
    if not timm.is_model(name):
        return None
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture, _, tag = name.partition(".")
        known = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        said = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"model={architecture} has no pretrained weights '{tag}' in timm; {said}") from None


def _create(name: str, size: tuple[int, int], pretrained: bool, args: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else "; `timm.list_models()` lists them"
        raise UserError(f"config: model={name!r} is no timm model{hint}")
    # Not every family takes a size, and timm keeps no list of those that do: ask, most wanted first.
    for sized in ({"img_size": size, "dynamic_img_size": True}, {"img_size": size}, {}):
        try:
            return timm.create_model(name, pretrained=pretrained, **{**sized, **args})
        except TypeError as error:
            problem = str(error)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"model={name}: timm cannot build it: {_first_line(error)}") from None
        except Exception as error:
            if not pretrained:
                problem = f"{type(error).__name__}: {_first_line(error)}"
                raise UserError(f"model={name}: timm cannot build it with model_args ({problem})") from None
            raise UserError(
                f"model={name}: its pretrained weights cannot be had ({type(error).__name__}: {_first_line(error)}); "
                f"check the network, or put the weights in a folder and use that"
            ) from None
    raise UserError(f"config: model_args do not fit model={name}: {problem}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
