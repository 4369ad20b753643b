"""Checkpoints: tensors and plain containers, written whole or not at all, never unpickled into arbitrary objects."""

import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dino_sd.errors import UserError

FORMAT = 1


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    match = re.fullmatch(r"step_(\d+)\.pt", path.name)
    return int(match[1]) if match else -1


def all_of(run: Path) -> list[Path]:
    """Newest first."""
    found = (path for path in (run / "checkpoints").glob("step_*.pt") if step_of(path) >= 0)
    return sorted(found, key=step_of, reverse=True)


def newest(run: Path) -> Path | None:
    return next(iter(all_of(run)), None)


def save(path: Path, state: dict[str, Any]) -> None:
    """A reader sees the old file or the new one, never half of it, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(interned({"format": FORMAT, **state}), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C inside torch's writer, which reports its own end
            raise KeyboardInterrupt from None
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"checkpoint: {path} cannot be written ({reason}); earlier ones are whole") from None


def interned(node: Any) -> Any:
    """Equal strings become one object: pickle writes those once, so that a run that was cut off ends in equal bytes."""
    if type(node) is str:
        return sys.intern(node)
    if isinstance(node, dict):
        return {interned(key): interned(value) for key, value in node.items()}
    return type(node)(interned(item) for item in node) if type(node) in (list, tuple) else node


def sync_folder(folder: Path) -> None:
    """Makes a rename in it last. Not every system lets one open a folder; there the rename has to do."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is missing, cut short, of another kind, or would run code when unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint: {path} does not exist") from None
    except pickle.UnpicklingError:
        raise UserError(f"checkpoint: {path} cannot be read: it is cut short, or holds more than tensors") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"checkpoint: {path} cannot be read ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"checkpoint: {path} is no dino_sd checkpoint of format {FORMAT}")
    return state


def newest_good(run: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; says so where a newer one cannot."""
    for path in all_of(run):
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    return None


def prune(run: Path, keep: int, milestone: int | None) -> None:
    """Removes all but the newest `keep` and those at multiples of `milestone` steps."""
    for path in all_of(run)[keep:]:
        if not milestone or step_of(path) % milestone:
            path.unlink(missing_ok=True)
    for leftover in _temporaries(run):
        leftover.unlink(missing_ok=True)


def _temporaries(run: Path) -> Iterator[Path]:
    yield from (run / "checkpoints").glob(".step_*.tmp")
