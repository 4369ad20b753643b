"""What published files of weights hold, found out from names and shapes: ViTs of DINO and DINOv2, XCiTs, ResNets."""

import re
from math import isqrt
from typing import Any, NamedTuple

import timm
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.models.heads import ProjectionHead

# Heads are seen in no tensor; all ViTs that DINO and DINOv2 were published as have heads of 64.
WIDTHS = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768, "vit_large": 1024, "vit_giant2": 1536}
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), False): "resnet34", ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101", ((3, 8, 36, 3), True): "resnet152",
}  # fmt: skip
XCITS = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}  # by width
DINOV2_SIZE, PUBLISHED_SIZE, PUBLISHED_CROP = 518, 224, 224 / 256


class Layout(NamedTuple):
    """A network that weights fit into.

    kind: for people. architecture, model_args: as Backbone takes them; num_heads is missing where nobody knows it.
    made_for: (height, width) that its positions are for; size: that its authors evaluate at; both in pixels.
    position_resize: as Backbone has it.
    """

    kind: str
    architecture: str
    model_args: dict[str, Any]
    channels: int
    made_for: tuple[int, int]
    size: tuple[int, int]
    position_resize: str


def layout_of(state: dict[str, Tensor], arguments: dict[str, Any], where: str) -> Layout:
    """The network of a backbone's weights, under the names of `to_timm_names`.

    arguments: those that the file was trained with, where it holds them. where: what errors call the file. Raises
    UserError for weights of another kind, and where shapes and arguments contradict each other.
    """
    if any(re.match(r"blocks\.\d+\.attn\.temperature", key) for key in state):
        return _xcit(state, where)
    if any(re.match(r"blocks\.\d+\.attn\.(qkv|proj)\.", key) for key in state):
        return _vit(state, arguments, where)
    if any(key.startswith("layer1.0.") for key in state):
        return _resnet(state, where)
    raise UserError(
        f"{where}: its names ({', '.join(list(state)[:3])}, ...) are neither those of a ViT of DINO or DINOv2 nor of "
        f"an XCiT or ResNet; if timm has its architecture under these names, say architecture=NAME"
    )


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights under timm's names, where DINOv2 and XCiT have others; all others as they are.

    Left out is the mask token, which training alone reads. With registers, timm adds the class token's position to it
    and keeps positions of patches only; of XCiT, it keeps queries, keys and values of class attention apart.
    """
    if any(key.startswith("pos_embeder.") for key in state):
        return _xcit_names(state)
    if "mask_token" not in state and not any(key.endswith(".ls1.gamma") for key in state):
        return state
    named = {key: value for key, value in state.items() if key != "mask_token"}
    # Chunks of blocks go on counting. Where numbers begin anew in each, these are stages of another architecture.
    whole = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in named.items()}
    named = whole if len(whole) == len(named) else named
    named = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for key, v in named.items()}
    if {"register_tokens", "cls_token", "pos_embed"} <= named.keys():
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


def _vit(state: dict[str, Tensor], arguments: dict[str, Any], where: str) -> Layout:
    width = _width(state)
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))
    patch, channels = _patch_size(state, arguments, where)
    known = WIDTHS.get(str(arguments.get("arch")).replace("deit", "vit"))
    if known not in (None, width):
        raise UserError(
            f"{where}: its tensors are {width} wide, but its arguments say arch={arguments['arch']}, which is {known}: "
            f"they belong to different models; say which with architecture=NAME"
        )
    # a timm file would have reg_token without LayerScale too, but nobody published such a DINO
    scaled = any(key.endswith(".ls1.gamma") for key in state)
    registers = state["reg_token"].shape[1] if scaled and "reg_token" in state else 0
    side = _side(state, 0 if registers else 1, where)
    hidden, inner = (_first(state, rf"blocks\.\d+\.mlp\.{name}\.weight") for name in ("fc1", "fc2"))
    gated = hidden is not None and inner is not None and hidden.shape[0] == 2 * inner.shape[1]  # SwiGLU

    args: dict[str, Any] = {"patch_size": patch, "embed_dim": width, "depth": depth}
    if isinstance(arguments.get("num_heads"), int) or width in WIDTHS.values():
        args["num_heads"] = arguments.get("num_heads") or width // 64
    if hidden is not None and hidden.shape[0] != 4 * width:
        args["mlp_ratio"] = (hidden.shape[0] + 0.5) / width  # timm cuts the product off: the half keeps it whole
    if _first(state, r"blocks\.\d+\.attn\.qkv\.bias") is None:
        args["qkv_bias"] = False
    if scaled:
        args["init_values"] = 1e-5
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": True}
    made_for = side * patch if side else PUBLISHED_SIZE
    size = PUBLISHED_SIZE if scaled and made_for == DINOV2_SIZE else made_for
    return Layout(
        "DINOv2" if scaled else "DINO", _name(width, depth, patch, scaled, registers, gated), args, channels,
        (made_for, made_for), (size, size), "timm" if registers else "dino",
    )  # fmt: skip


def _patch_size(state: dict[str, Tensor], arguments: dict[str, Any], where: str) -> tuple[int, int]:
    """(patch size, channels). Raises UserError where they cannot be seen, or are not what the arguments say."""
    weight, said = state.get("patch_embed.proj.weight"), arguments.get("patch_size")
    if weight is None or weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        found = (
            "is missing" if weight is None else f"is {'x'.join(map(str, weight.shape))}, not width x channels x p x p"
        )
        raise UserError(f"{where}: patch_embed.proj.weight {found}: the file is incomplete or of another architecture")
    if isinstance(said, int) and said != weight.shape[2]:
        raise UserError(
            f"{where}: its patch embedding is for patches of {weight.shape[2]} pixels, but its arguments say "
            f"patch_size={said}: the file was altered, or its parts belong to different models"
        )
    return weight.shape[2], weight.shape[1]


def _side(state: dict[str, Tensor], prefix: int, where: str) -> int | None:
    """Patches along an image's side; None where there is no position embedding. Raises UserError for no square."""
    positions = state.get("pos_embed")
    if positions is None:
        return None
    patches = positions.shape[1] - prefix
    side = isqrt(max(patches, 0))
    if positions.ndim != 3 or side * side != patches:
        raise UserError(
            f"{where}: its position embedding has {positions.shape[1]} entries, and {patches} patches are no square "
            f"({side}x{side} are {side * side}): {patches - side * side} register(s) more than the published "
            f"architecture has, or images that are not square; say architecture=NAME for the one that it is of"
        )
    return side


def _name(width: int, depth: int, patch: int, scaled: bool, registers: int, gated: bool) -> str:
    """The timm model that needs the fewest other arguments."""
    size = "giant" if gated else SIZES.get((width, depth), "tiny")
    names = [f"vit_{size}_patch{patch}_224", f"vit_{size}_patch16_224", "vit_tiny_patch16_224"]
    if scaled or gated:
        names = [f"vit_{size}_patch14_reg4_dinov2"] * (registers == 4) + [f"vit_{size}_patch14_dinov2", *names]
    return next(name for name in names if timm.is_model(name))


def _xcit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)qkv(\.weight|\.bias)", key):
            named |= {f"{match[1]}{part}{match[2]}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            named[re.sub(r"^pos_embeder\.", "pos_embed.", key)] = value
    return named


def _xcit(state: dict[str, Tensor], where: str) -> Layout:
    width = _width(state)
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))
    # every convolution of the patch embedding halves the image
    patch = 2 ** sum(bool(re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", key)) for key in state)
    name = f"xcit_{XCITS.get(width)}_{depth}_p{patch}_224"
    if not timm.is_model(name):
        raise UserError(
            f"{where}: an XCiT of {depth} blocks, {width} wide, for patches of {patch} pixels was never published: the "
            f"file is incomplete, or say architecture=NAME"
        )
    size = (PUBLISHED_SIZE, PUBLISHED_SIZE)
    first = state.get("patch_embed.proj.0.0.weight")
    return Layout("XCiT", name, {}, 3 if first is None else first.shape[1], size, size, "timm")


def _resnet(state: dict[str, Tensor], where: str) -> Layout:
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    name = RESNETS.get((blocks, "layer1.0.conv3.weight" in state))
    if name is None:
        raise UserError(
            f"{where}: a ResNet of {'+'.join(map(str, blocks))} blocks, which is none of "
            f"{', '.join(RESNETS.values())}: incomplete, or say architecture=NAME"
        )
    first = state.get("conv1.weight")
    size = (PUBLISHED_SIZE, PUBLISHED_SIZE)
    return Layout("ResNet", name, {}, 3 if first is None else first.shape[1], size, size, "timm")


def projection_of(state: dict[str, Tensor], where: str) -> ProjectionHead | None:
    """The DINO head beside a backbone, with its weights; None where there is none. Raises UserError for half of one.

    state: a whole network's, as published (`head.`, `dino_head.`) or of a run (`heads.dino.`).
    """
    state = {re.sub(r"(^|\.)(_orig_mod|module)\.", r"\1", key): value for key, value in state.items()}
    for prefix in ("heads.dino.", "dino_head.", "head."):
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        own = {re.sub(r"^mlp\.(weight|bias)$", r"mlp.0.\1", key): value for key, value in own.items()}
        for old, new in (("original0", "weight_g"), ("original1", "weight_v")):  # torch's newer weight norm
            own = {re.sub(rf"parametrizations\.weight\.{old}$", new, key): value for key, value in own.items()}
        if any(key.startswith(("mlp.", "last_layer.")) for key in own):
            return _projection(own, f"{where}: {prefix[:-1]}")
    return None


def _projection(own: dict[str, Tensor], where: str) -> ProjectionHead:
    linear = [key for key, value in own.items() if key.startswith("mlp.") and value.ndim == 2]
    linear.sort(key=lambda key: int(key.split(".")[1]))
    prototypes = own.get("last_layer.weight_v")
    problem: object = "prototypes (last_layer.weight_v) or linear layers are missing"
    if linear and prototypes is not None:
        try:
            head = ProjectionHead(
                own[linear[0]].shape[1],
                prototypes=prototypes.shape[0], hidden=own[linear[0]].shape[0], bottleneck=own[linear[-1]].shape[0],
                layers=len(linear), batch_norm=any(key.endswith("running_mean") for key in own),
            )  # fmt: skip
            head.load_state_dict(own)
            return head
        except RuntimeError as error:  # says which keys, one a line
            problem = " ".join(str(error).split("\n")[1:3]).replace("\t", "")
    raise UserError(f"{where} is no whole DINO head: the file is incomplete or was altered ({problem})")


def _width(state: dict[str, Tensor]) -> int:
    return next((state[key].shape[-1] for key in ("norm.weight", "pos_embed", "cls_token") if key in state), 0)


def _first(state: dict[str, Tensor], pattern: str) -> Tensor | None:
    return next((value for key, value in state.items() if re.fullmatch(pattern, key)), None)
