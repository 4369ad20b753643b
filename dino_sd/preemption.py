"""Asked to stop: by a signal, as schedulers send before they kill, or by a file named `stop` in the run's folder."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is SLURM's with --signal=USR1@120; not every system has it


class Requests:
    """Listens while it is entered. It goes on listening after an exception: whoever ends the run may send more.

    A second SIGINT ends the process at once. Where it is not in the main thread, the file alone counts.
    """

    def __init__(self, run: Path):
        self.file = run / "stop"
        self.reason = ""
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader's worker: its parent decides
            return
        name = signal.Signals(number).name
        if name == self.reason == "SIGINT":
            os._exit(130)
        self.reason = self.reason if self.reason == "SIGINT" else name

    def pending(self) -> bool:
        """Whether someone has asked; `reason` then says how."""
        if not self.reason and self.file.exists():
            self.reason = f"the file {self.file}"
        return bool(self.reason)

    def forget(self) -> None:
        """Takes the file away, so that the run can go on."""
        self.file.unlink(missing_ok=True)
