"""glibc's allocator on a CPU: keep what a step frees for the next one, and do not keep what none will need.

By default every block over 32 MB goes back to the system when it is freed and is faulted in again, page by page, at
its next use: a tenth of a step of a small ViT. Elsewhere (macOS, Windows, musl) both functions do nothing.
"""

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_UP_TO = 2**30  # bytes; larger blocks are few, and rest heavily on the peak
MOST = 2**31 - 1  # bytes; mallopt takes an int


def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def reuse_freed_memory() -> None:
    """From now on freed blocks stay in the process."""
    if (library := _glibc()) is not None:
        library.mallopt(M_MMAP_THRESHOLD, KEPT_UP_TO)
        library.mallopt(M_TRIM_THRESHOLD, MOST)


def return_free_memory() -> None:
    """Once, after the first step: the optimizer's state now lies in the holes of that step's activations, and the
    pages left free around it would otherwise stay resident beside the next steps' activations."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
