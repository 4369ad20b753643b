"""Weights files into backbones: nothing is unpickled but tensors, and nothing is left out in silence."""

import argparse
import difflib
import pickle
import re
from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone
from dino_sd.models.layouts import to_timm_names

CONTAINERS = ("state_dict", "model", "model_state_dict")
NETWORKS = ("teacher", "student")
FOREIGN = {".onnx": "an export for onnxruntime", ".pt2": "a program of torch.export", ".npz": "a file of NumPy's"}


def read_weights(path: Path | str, network: str | None = None) -> dict[str, Tensor]:
    """Backbone weights of a .safetensors, .pt, .pth or .bin file, under timm's names.

    Wrappers' prefixes (`module.`, `_orig_mod.`, `backbone.`, `model.`) are taken off; where there is a `backbone.`,
    heads beside it are left out; names of DINOv2 are turned into timm's. network: as in `network_of`. Raises UserError
    as `read_file` and `network_of` do.
    """
    path = Path(path)
    return to_timm_names(strip_prefixes(network_of(read_file(path), path, network)[0]))


def read_file(path: Path) -> Any:
    """The content of a file that torch.save or safetensors wrote, on the CPU.

    Raises UserError where the file is missing, broken, of another kind or holds anything but tensors and plain
    containers (such a pickle could run code: it is not opened). One class is allowed, the argparse.Namespace that
    published files keep their arguments in.
    """
    if not path.is_file():
        raise UserError(f"weights: {path} does not exist")
    if kind := FOREIGN.get(path.suffix):
        raise UserError(
            f"weights: {path} is {kind}, from which nothing is loaded here; name the run, checkpoint or folder that it "
            f"was made from"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return load_file(path)
        if not start.startswith((b"PK", b"\x80")):
            raise UserError(f"weights: {path} is no file of weights: {_looks_like(start)}")
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values, in published files; no other
            return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"weights: {path} holds Python objects beside tensors and could run code, so it is not opened; "
            f"save its state dict alone (torch.save(model.state_dict(), ...) or safetensors)"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"weights: {path} cannot be read ({reason}); copy or download it again") from None


def _looks_like(start: bytes) -> str:
    if not start:
        return "it is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself (git lfs pull)"
    if start.lstrip()[:1] == b"<":
        return "it is a web page; download the file itself"
    return f"it begins with {start[:12]!r}; expected .pt, .pth, .bin (torch.save) or .safetensors"


def network_of(found: Any, path: Path, network: str | None = None) -> tuple[dict[str, Tensor], str | None]:
    """(state dict, whether it is the "teacher" or the "student") of a file's content; None: it holds one alone.

    network: which of the two, default the file's result, or its teacher. Raises UserError where it has none of this
    name, or holds no state dict.
    """
    if network not in (None, *NETWORKS):
        raise UserError(f"network={network}: expected teacher or student")
    for name in CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    held = {name: found[name] for name in NETWORKS if found.get(name)} if isinstance(found, dict) else {}
    if not held and isinstance(found, dict):
        for name in NETWORKS:
            inside = [key for key in found if str(key).startswith(f"{name}.")]
            held |= {name: {key.removeprefix(f"{name}."): found[key] for key in inside}} if inside else {}
    chosen = None
    if held:
        result = found.get("result")
        chosen = network or (result if result in held else next(iter(held)))
        if chosen not in held:
            raise UserError(f"network={chosen}: {path} has none, only its {next(iter(held))}")
        found = held[chosen]
    elif network is not None:
        raise UserError(f"network={network}: {path} holds one network and does not say which; leave network out")
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        holds = f"the keys {_some(found)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise UserError(f"weights: {path} is no state dict (names and tensors); it holds {holds}")
    return found, chosen


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a state dict."""
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", key): value for key, value in state.items()}
    for prefix in ("module.", "timm_model.", "backbone.", "module.", "model."):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inside and (prefix == "backbone." or len(inside) == len(state)):  # beside a backbone are heads
            state = inside
    return state


def attention_heads(backbone: Backbone) -> int | None:
    """Of each block of a ViT. No weight's shape tells it."""
    blocks: Any = getattr(backbone.model, "blocks", None)
    first = blocks[0] if isinstance(blocks, nn.Sequential) and len(blocks) else None
    return getattr(getattr(first, "attn", None), "num_heads", None)


def start_from(backbone: Backbone, other: Backbone, source: str) -> list[str]:
    """`load_into` of a whole network. Raises UserError also where it has another number of attention heads."""
    heads, theirs = attention_heads(backbone), attention_heads(other)
    if heads != theirs and None not in (heads, theirs) and backbone.width == other.width:
        raise UserError(
            f"{source}: has {theirs} attention heads a block, model={backbone.name} has {heads}: its weights would fit "
            f"and mean something else; set model_args={{num_heads: {theirs}}}"
        )
    grid = getattr(getattr(other.model, "patch_embed", None), "grid_size", None)
    return load_into(backbone, other.state_dict(), source, grid)


def load_into(
    backbone: Backbone, state: dict[str, Tensor], source: str = "weights", grid: tuple[int, int] | None = None
) -> list[str]:
    """Loads weights, all of them or none. Returns what had to be adapted, one line each, to be said.

    state: under timm's names, wrappers' prefixes are taken off. source: what errors call it. grid: rows and columns of
    patches that its position embedding is for; None: as many, or the same as the backbone's where their number is.
    Adapted are: a position embedding made for another grid of patches (resized), a classifier (left out). Any other
    missing, unexpected or differently shaped key raises UserError with the first few and the likely reason.
    """
    model = backbone.model
    wanted = model.state_dict()
    state, notes = _without_classifier(backbone, strip_prefixes(state))
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    state = counters | state  # older files have none, and features do not depend on them
    notes += _resize_position_embedding(backbone, state, wanted, grid)
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or unexpected or shapes:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unexpected {_some(unexpected)}"] if unexpected else []
        parts += [f"{key} is {_shape(state[key])}, expected {_shape(wanted[key])}" for key in shapes[:3]]
        parts += [f"{len(shapes) - 3} more shapes differ"] if len(shapes) > 3 else []
        reason = _reason(backbone, state, wanted, missing, unexpected, shapes)
        raise UserError(f"{source}: does not fit model={backbone.name}: {reason} ({'; '.join(parts)})")
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise UserError(f"{source}: holds NaN or infinity in {_some(broken)}; the run diverged or the file is broken")
    model.load_state_dict(state)
    return notes


def _without_classifier(backbone: Backbone, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    names = backbone.model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    kept = {key: value for key, value in state.items() if not (prefixes and key.startswith(prefixes))}
    return kept, [f"left out the classifier ({_some(state.keys() - kept.keys())})"] if len(kept) < len(state) else []


def _resize_position_embedding(
    backbone: Backbone, state: dict[str, Tensor], wanted: dict[str, Tensor], old_grid: tuple[int, int] | None
) -> list[str]:
    """In place. Where nobody knows the old grid, it was square, or has to fit as it is."""
    old, new = state.get("pos_embed"), wanted.get("pos_embed")
    grid = getattr(getattr(backbone.model, "patch_embed", None), "grid_size", None)
    if old is None or new is None or grid is None or old.ndim != 3 or new.ndim != 3:
        return []
    prefix = new.shape[1] - grid[0] * grid[1]
    patches = max(old.shape[1] - prefix, 0)
    square = (isqrt(patches), isqrt(patches))
    rows, columns = old_grid or (grid if old.shape == new.shape else square)
    if (rows, columns) == tuple(grid) or old.shape[2] != new.shape[2] or not 0 < patches == rows * columns:
        return []
    state["pos_embed"] = resample_abs_pos_embed(old, list(grid), [rows, columns], num_prefix_tokens=prefix)
    return [f"resized the position embedding from {rows}x{columns} to {grid[0]}x{grid[1]} patches"]


def _reason(
    backbone: Backbone,
    state: dict[str, Tensor],
    wanted: dict[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    """The likeliest cause, most telling sign first."""
    if len(missing) > 0.9 * len(wanted):
        return "almost none of its names occur: another architecture, or a file of another library's layout"
    registers = [state.get("reg_token", state.get("register_tokens")), wanted.get("reg_token")]
    counts = [0 if token is None else token.shape[-2] for token in registers]
    if counts[0] != counts[1]:
        return f"the weights have {counts[0]} register token(s), the model has {counts[1]}"
    blocks = [_blocks(state), _blocks(wanted)]
    if blocks[0] != blocks[1]:
        return f"another architecture: the weights have {blocks[0]} blocks, the model has {blocks[1]}"
    if renamed := [(key, new) for key in missing for new in _alike(key, wanted[key], unexpected, state)]:
        return f"renamed, or another architecture: {renamed[0][0]} seems to stand there as {renamed[0][1]}"
    if missing and not unexpected and len(missing) < 3:
        return (
            f"the file is incomplete or was altered: it has all but {len(missing)} of the model's {len(wanted)} tensors"
        )
    if missing or unexpected:
        return "another architecture or other model_args"
    first = next((key for key in shapes if state[key].ndim == 4), None)
    if first is not None and state[first].ndim == wanted[first].ndim:
        old, new = state[first].shape, wanted[first].shape
        if old[0] == new[0] and old[1] != new[1] and first == _first_convolution(wanted):
            return f"the weights take {old[1]} channel(s), the model takes {new[1]}; set channels={old[1]}"
        if old[0] == new[0] and old[2:] != new[2:] and "patch_embed" in first:
            return f"the weights have patch size {old[2]}, the model has {new[2]}"
    if shapes == ["pos_embed"]:
        return "its position embedding is for another grid of patches, which cannot be resized"
    return "another width or other model_args"


def _alike(key: str, tensor: Tensor, unexpected: list[str], state: dict[str, Tensor]) -> list[str]:
    """The unexpected name that is nearest to a missing one, of the same shape, if any."""
    same = [other for other in unexpected if state[other].shape == tensor.shape]
    return difflib.get_close_matches(key, same, n=1, cutoff=0.8)


def _first_convolution(wanted: dict[str, Tensor]) -> str | None:
    return next((key for key, value in wanted.items() if value.ndim == 4), None)


def _blocks(state: dict[str, Tensor]) -> int:
    found = (re.match(r"(blocks|stages|layer)\.?\d+(\.blocks\.\d+|\.\d+)?", key) for key in state)
    return len({match[0] for match in found if match})


def _some(names: Iterable[Any], count: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
