"""Weights files into backbones: nothing is unpickled but tensors, and nothing is left out in silence."""

import argparse
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
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone

CONTAINERS = ("state_dict", "model", "model_state_dict")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Backbone weights of a .safetensors, .pt, .pth or .bin file, under timm's names.

    Wrappers' prefixes (`module.`, `_orig_mod.`, `backbone.`, `model.`) are taken off; where there is a `backbone.`,
    heads beside it are left out. Raises UserError where the file is missing, broken, holds anything but tensors and
    plain containers (such a pickle could run code: it is not opened) or holds no weights. One class is allowed, the
    argparse.Namespace that published files keep their arguments in.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: {path} does not exist")
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # plain values, in published files; no other
                found = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"weights: {path} holds Python objects beside tensors and could run code, so it is not opened; "
            f"save its state dict alone (torch.save(model.state_dict(), ...) or safetensors)"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"weights: {path} cannot be read ({reason}); copy or download it again") from None
    for name in CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        holds = f"the keys {_some(found)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise UserError(f"weights: {path} is no state dict (names and tensors); it holds {holds}")
    return strip_prefixes(found)


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a state dict, under timm's names."""
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", key): value for key, value in state.items()}
    for prefix, others_dropped in (("module.", False), ("backbone.", True), ("module.", False), ("model.", False)):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inside and (others_dropped or len(inside) == len(state)):
            state = inside
    return state


def load_into(backbone: Backbone, state: dict[str, Tensor], source: str = "weights") -> list[str]:
    """Loads weights, all of them or none. Returns what had to be adapted, one line each, to be said.

    state: under timm's names, wrappers' prefixes are taken off. source: what errors call it.
    Adapted are: a position embedding made for another grid of patches (resized), a classifier (left out). Any other
    missing, unexpected or differently shaped key raises UserError with the first few and the likely reason.
    """
    model = backbone.model
    wanted = model.state_dict()
    state, notes = _without_classifier(backbone, strip_prefixes(state))
    notes += _resize_position_embedding(backbone, state, wanted)
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


def _resize_position_embedding(backbone: Backbone, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """In place. A grid that is not square has to fit as it is: its sides cannot be told from the number of tokens."""
    old, new = state.get("pos_embed"), wanted.get("pos_embed")
    grid = getattr(getattr(backbone.model, "patch_embed", None), "grid_size", None)
    if old is None or new is None or grid is None or old.ndim != 3 or new.ndim != 3 or old.shape == new.shape:
        return []
    prefix = new.shape[1] - grid[0] * grid[1]
    side = isqrt(max(old.shape[1] - prefix, 0))
    if old.shape[2] != new.shape[2] or side == 0 or side * side != old.shape[1] - prefix:
        return []
    state["pos_embed"] = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=prefix)
    return [f"resized the position embedding from {side}x{side} to {grid[0]}x{grid[1]} patches"]


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
    registers = [state.get("reg_token"), wanted.get("reg_token")]
    counts = [0 if token is None else token.shape[1] for token in registers]
    if counts[0] != counts[1]:
        return f"the weights have {counts[0]} register token(s), the model has {counts[1]}"
    blocks = [_blocks(state), _blocks(wanted)]
    if blocks[0] != blocks[1]:
        return f"another architecture: the weights have {blocks[0]} blocks, the model has {blocks[1]}"
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
