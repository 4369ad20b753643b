"""Features kept on disk, so that what one evaluator has computed the next one reads."""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_sd.data.index import cache_folder

MOST_BYTES = 10e9
_STALE = 86_400  # seconds after which half a file is nobody's


def folder() -> Path:
    return cache_folder() / "features"


def load(key: str, names: list[str]) -> dict[str, Tensor] | None:
    """{name: tensor} as they were saved under this key; None unless all of them are there and whole."""
    found = {}
    with suppress(OSError, SafetensorError, KeyError, ValueError):
        for name in names:
            path = folder() / f"{key}-{name}.safetensors"
            found[name] = load_file(path)[name]
            os.utime(path)  # what is used stays
        return found
    return None


def save(key: str, tensors: dict[str, Tensor]) -> None:
    """Each in a file of its own; what was not used for longest makes room. A disk that cannot be written is no error.

    Files appear whole or not at all, whatever other processes do and wherever this one is killed.
    """
    with suppress(OSError, SafetensorError):
        folder().mkdir(parents=True, exist_ok=True)
        for name, tensor in tensors.items():
            if tensor.numel() * tensor.element_size() > MOST_BYTES / 2:
                continue
            with tempfile.NamedTemporaryFile(dir=folder(), suffix=".tmp", delete=False) as file:
                temporary = file.name
            try:
                save_file({name: tensor.contiguous()}, temporary)
                os.replace(temporary, folder() / f"{key}-{name}.safetensors")
            finally:
                with suppress(OSError):
                    os.unlink(temporary)
        _make_room()


def _make_room() -> None:
    """Removes the files that were not used for longest until the rest are MOST_BYTES at most."""
    files = []
    for path in folder().iterdir():
        with suppress(OSError):
            state = path.stat()
            if path.suffix == ".tmp" and time.time() - state.st_mtime > _STALE:
                path.unlink()
            elif path.suffix == ".safetensors":
                files.append((state.st_mtime, state.st_size, path))
    kept = 0
    for _, size, path in sorted(files, reverse=True):
        kept += size
        if kept > MOST_BYTES:
            with suppress(OSError):
                path.unlink()
