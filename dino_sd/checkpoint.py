"""Checkpoints: tensors and plain containers, written whole or not at all, never unpickled into arbitrary objects.

Beside each lies its SHA-256, in a file `step_N.pt.sha256` as sha256sum writes it.
"""

import hashlib
import json
import math
import os
import pickle
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dino_sd.distributed import say
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


def sum_of(path: Path) -> Path:
    """Where the checksum of a checkpoint lies."""
    return path.with_name(f"{path.name}.sha256")


def save(path: Path, state: dict[str, Any]) -> None:
    """A reader sees the old file or the new one, never half of it, also after a power cut.

    Raises UserError where it cannot be written; earlier checkpoints are whole then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(interned({"format": FORMAT, **state}), file)
            file.flush()
            os.fsync(file.fileno())
        # The sum first: a checkpoint without one would not be checked, a sum without its checkpoint is nothing.
        write_whole(sum_of(path), f"{digest(temporary)}  {path.name}\n")
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause: BaseException = error  # torch's writer reports its own end, and what was wrong before only as a context
        while cause.__context__ is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"checkpoint: {path} cannot be written ({reason}); earlier ones are whole") from None


def write_whole(path: Path, text: str) -> None:
    """A small file, whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:  # names of files may be no Unicode
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)


def _digest(file: Any) -> str:
    found = hashlib.sha256()
    while part := file.read(2**20):
        found.update(part)
    return found.hexdigest()


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
    """Raises UserError when the file is missing, cut short, altered, of another kind, or would run code when unpickled.

    A checkpoint that was taken elsewhere without its checksum is not checked against it.
    """
    try:
        if sum_of(path).is_file():
            check_sum(path)
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


def check_sum(path: Path) -> None:
    """Raises UserError where the file is not the one whose checksum lies beside it."""
    said = sum_of(path).read_bytes()[:64].decode("ascii", "replace")
    if said != digest(path):
        raise UserError(f"checkpoint: {path} is damaged: it, or {sum_of(path).name}, has changed since it was written")


def newest_good(run: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, None where there is none at all; says so where a newer one cannot.

    Raises UserError where there are some, and none of them can be read: a run does not silently begin anew.
    """
    found = all_of(run)
    for path in found:
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    if found:
        raise UserError(
            f"out={run}: none of its {len(found)} checkpoint(s) can be read; bring a good one back, move them away to "
            f"begin anew, or choose another out"
        )
    return None


class Saver:
    """Saves beside the training: the state is copied to the host, and a thread writes the copy.

    keep: newest ones that stay. milestone: those at multiples of so many steps stay too. best: a metric whose best
    value so far stays, higher being better; `best.json` says which that is. stop: whether a failure ends the run;
    otherwise it is said, and the next save tries again. start: the step that the run goes on from.
    """

    def __init__(
        self, run: Path, keep: int, milestone: int | None, best: str | None = None, stop: bool = False, start: int = 0
    ):
        self.run, self.keep, self.milestone, self.best, self.stop = run, keep, milestone, best, stop
        self._unreadable = {step_of(path) for path in all_of(run)} - {*range(start + 1)}
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None

    def save(self, path: Path, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Waits for the save before, and returns as soon as the state is copied. metrics: the latest ones."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(path, copied(state), metrics.get(self.best or "")))
        self._thread.start()

    def wait(self, last: bool = False) -> None:
        """Until the last save is done. Raises UserError where it failed and that ends the run, or it was the `last`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            if self.stop or last:
                raise failure
            say(f"warning: {failure}; going on, the next save tries again")

    def _write(self, path: Path, state: dict[str, Any], value: float | None) -> None:
        try:
            save(path, state)
            self._unreadable.discard(step_of(path))
            kept = self._best(step_of(path), value)
            prune(self.run, self.keep, self.milestone, kept, step_of(path), self._unreadable)
        except UserError as error:
            self._failure = error
        except Exception as error:  # whatever it is: a save that failed must not pass for one that is done
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._failure = UserError(f"checkpoint: {path} cannot be written ({reason})")

    def _best(self, step: int, value: float | None) -> int:
        """The step of the best checkpoint; -1 for none."""
        place = self.run / "checkpoints" / "best.json"
        before = best_of(self.run)
        if value is None or math.isnan(value) or (before is not None and value <= before[1]):
            return before[0] if before is not None else -1
        write_whole(place, json.dumps({"step": step, "metric": self.best, "value": value}) + "\n")
        return step


def best_of(run: Path) -> tuple[int, float] | None:
    """(step, value) of the checkpoint that `best.json` names; None without one, and where that is gone."""
    place = run / "checkpoints" / "best.json"
    try:
        said = json.loads(place.read_text())
        step, value = int(said["step"]), float(said["value"])
        return (step, value) if path_of(run, step).exists() and not math.isnan(value) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        say(f"warning: {place} is damaged; the best checkpoint is looked for anew")
        return None


def copied(node: Any) -> Any:
    """The same containers with every tensor copied to the host; one that stands in several places is copied once."""
    made: dict[int, torch.Tensor] = {}

    def copy(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            if id(node) not in made:
                made[id(node)] = node.detach().to("cpu", copy=True)
            return made[id(node)]
        if isinstance(node, dict):
            return {key: copy(value) for key, value in node.items()}
        return type(node)(copy(item) for item in node) if type(node) in (list, tuple) else node

    return copy(node)


def prune(run: Path, keep: int, milestone: int | None, best: int, saved: int, unreadable: set[int]) -> None:
    """Removes all up to the step `saved` but the newest `keep`, multiples of `milestone` steps, and the step `best`.

    unreadable: steps whose files are no good: they take no other's place.
    """
    until = [path for path in all_of(run) if step_of(path) <= saved]
    kept = {step_of(path) for path in [path for path in until if step_of(path) not in unreadable][:keep]}
    for path in until:
        step = step_of(path)
        if step not in kept and (not milestone or step % milestone) and step != best:
            path.unlink(missing_ok=True)
    for leftover in _leftovers(run):
        leftover.unlink(missing_ok=True)


def _leftovers(run: Path) -> Iterator[Path]:
    """Half-written files, and checksums of checkpoints that are gone."""
    yield from (run / "checkpoints").glob(".*.tmp")
    for path in (run / "checkpoints").glob("step_*.pt.sha256"):
        if not path.with_suffix("").exists():
            yield path
