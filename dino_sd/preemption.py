"""Asked to stop: by a signal, as schedulers send before they kill, or by a file named `stop` in the run's folder."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from dino_sd.errors import Interrupted

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is SLURM's with --signal=USR1@120; not every system has it


class Requests:
    """Listens while it is entered. It goes on listening after an exception: whoever ends the run may send more.

    Until `started` there is nothing to save: a signal ends the run there and then. A second SIGINT ends the process at
    once. Where it is not in the main thread, the file alone counts.
    """

    def __init__(self, run: Path):
        self.file = run / "stop"
        self.reason, self.started = "", False
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
        if not self.started:
            if name == "SIGINT":
                raise KeyboardInterrupt
            raise Interrupted(f"{name} came before the first step; the same command begins again")

    def pending(self) -> bool:
        """Whether someone has asked; `reason` then says how."""
        if not self.reason and os.path.exists(self.file):  # false also where the file system fails for a moment
            self.reason = f"the file {self.file}"
        return bool(self.reason)

    def forget(self) -> None:
        """Takes the file away, so that the run can go on; not where torchrun would start it again at once.

        Raises Interrupted in a run that torchrun has started again although the file asked it to stop.
        """
        again, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        if not self.started and again and os.path.exists(self.file):
            raise Interrupted(f"the file {self.file} asks to stop; start it anew to go on")
        if not self.started or again >= most:
            self.file.unlink(missing_ok=True)
