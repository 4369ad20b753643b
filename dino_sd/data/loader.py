"""This rank's micro-batches of views, from any step on, made in worker processes."""

import atexit
import shutil
import signal
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dino_sd.data.geometry import cuts_at_once, make_views
from dino_sd.data.order import step_indices, steps_per_epoch
from dino_sd.data.source import Bad, Source
from dino_sd.data.views import ViewSpec
from dino_sd.distributed import cores, say
from dino_sd.errors import UserError

_MOST_WORKERS = 16
_PREFETCH = 2  # batches that each worker makes ahead


@dataclass
class Batch:
    """Views of B images.

    groups: per resolution, crops (V * B, C, H, W) of the source's dtype, all images of the first view first. rows: per
    resolution, their photometric parameters, float32 (V * B, len(Row)). labels: int64 (B,), -1 where an image has
    none, or None where no image has one. indices: int64 (B,). bad: images that were to be seen and cannot be read, each
    as (index, where, reason); others took their places.
    """

    groups: list[torch.Tensor]
    rows: list[torch.Tensor]
    labels: torch.Tensor | None
    indices: torch.Tensor
    bad: list[Bad]

    def pin_memory(self) -> "Batch":
        """What goes to the device, in pinned memory; the rows are read on the CPU and stay where they are."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch([crops.pin_memory() for crops in self.groups], self.rows, labels, self.indices, self.bad)


class Batches:
    """Iterates over this rank's micro-batches, `accumulate` per step, of the steps start_step <= step < total_steps.

    batch_size: images per step over all ranks and micro-batches. The global batch of a step is cut into
    accumulate * world_size equal parts, and none of it depends on the number of workers. device: where the crops of
    images that are in memory are cut; those of others come on the CPU. Iterating raises UserError where many images in
    a row cannot be read; making it, where the batch cannot be cut or is larger than an epoch.
    """

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ):
        parts = accumulate * world_size
        if batch_size % parts:
            raise UserError(
                f"batch_size: {batch_size} cannot be cut into accumulate x processes = {accumulate} x {world_size} "
                f"equal parts; use a multiple of {parts}"
            )
        steps_per_epoch(source.epoch_images(), batch_size)
        device = torch.device(device)
        self._steps, self._accumulate = range(start_step, total_steps), accumulate
        self._workers, self._pin_memory = workers, device.type == "cuda" and source.stack is None
        # Workers would hold a copy each, and cannot reach the device.
        cut_at_once = not workers and source.stack is not None and cuts_at_once(source.stack)
        stack = source.stack.to(device) if cut_at_once and source.stack is not None else None
        self._maker = _BatchMaker(source, spec, seed, batch_size, batch_size // parts, rank, world_size, stack)

    def __len__(self) -> int:
        return len(self._steps) * self._accumulate

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        # Left in the middle, workers are stopped before multiprocessing's own way out finds and terminates them.
        atexit.register(_close, weakref.ref(batches))
        return batches

    def _batches(self) -> Generator[Batch, None, None]:
        # One pass over all steps: workers start once, and no epoch ends with empty hands.
        loader = DataLoader(
            self._maker,
            batch_size=None,
            sampler=_MicroBatches(self._steps, self._accumulate),
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            worker_init_fn=_leave_signals,
            pin_memory=self._pin_memory,
            # The loader draws a seed for its workers: not from the global generator, whose state is the training's.
            generator=torch.Generator(),
        )
        for made in loader:
            if isinstance(made, _Failure):
                raise UserError(made.message)
            yield made


def in_workers(made: Dataset, workers: int) -> DataLoader:
    """The items of a data set that makes whole batches, as they are and in order."""
    return DataLoader(
        made, batch_size=None, num_workers=workers, collate_fn=as_it_is, generator=torch.Generator(),
        worker_init_fn=_leave_signals,
    )  # fmt: skip


def _leave_signals(_: int) -> None:
    """In a loader's worker. Ctrl-C, torchrun and schedulers reach whole groups of processes: what becomes of it is the
    training's decision, and it cannot save itself where its workers are gone. They end with it all the same.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _close(batches: "weakref.ref[Generator[Batch, None, None]]") -> None:
    if (left := batches()) is not None:
        left.close()


class _MicroBatches:
    """(step, micro-batch) for every item the loader is to make; counts up without a list of all of them."""

    def __init__(self, steps: range, accumulate: int):
        self.steps, self.accumulate = steps, accumulate

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in self.steps:
            for micro in range(self.accumulate):
                yield step, micro


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker; raised there, it would arrive with the worker's traceback in its text."""

    message: str


class _BatchMaker(Dataset):
    def __init__(self, source, spec, seed, batch_size, part_size, rank, world_size, stack):
        self.source, self.spec, self.seed, self.stack = source, spec, seed, stack
        self.batch_size, self.part_size, self.rank, self.world_size = batch_size, part_size, rank, world_size

    def __getitem__(self, item: tuple[int, int]) -> Batch | _Failure:
        step, micro = item
        epoch, indices = step_indices(step, self.seed, len(self.source), self.batch_size, self.source.parts)
        start = (micro * self.world_size + self.rank) * self.part_size
        indices_B = np.array(indices[start : start + self.part_size])
        try:
            views = make_views(self.source, self.spec, self.seed, epoch, indices_B, self.stack)
        except UserError as error:
            return _Failure(str(error))
        labels_N = self.source.labels()
        labels_B = None if labels_N is None else torch.from_numpy(labels_N[views.indices])
        return Batch(views.groups, views.rows, labels_B, torch.from_numpy(views.indices), views.bad)


def auto_workers(device_type: str, local_world_size: int, in_memory: bool) -> int:
    """Loader processes for one of local_world_size ranks on this machine.

    None where the images are in memory, or where the device is the CPU and has at most two cores per rank: workers
    would only take the cores away from training.
    """
    cores_per_rank = cores() // max(1, local_world_size)
    if in_memory or (device_type == "cpu" and cores_per_rank <= 2):
        return 0
    return max(1, min(cores_per_rank, _MOST_WORKERS))


def as_it_is(made: Any) -> Any:
    """For a DataLoader whose items are batches already: it would make lists of tuples and tensors of numbers."""
    return made


def fitting(workers: int, item_bytes: float, ranks: int = 1) -> int:
    """So many workers, or as many as /dev/shm has room for, where items on their way from a worker lie.

    Containers often keep it at 64 MB; when it is full, a worker dies of a bus error. ranks: that share it.
    """
    free = _shared_memory()
    if free is None:
        return workers
    return max(0, min(workers, int(free / max(1, ranks) / max(item_bytes, 1) - 1) // _PREFETCH))


def pick_workers(
    asked: int | str, device_type: str, local_world_size: int, source: Source, spec: ViewSpec, images: int
) -> int:
    """Loader processes of a rank: as many as asked for, or `auto_workers`, or fewer where shared memory is too small.

    images: in a micro-batch. Raises UserError where the number asked for does not fit.
    """
    workers = auto_workers(device_type, local_world_size, source.stack is not None) if asked == "auto" else int(asked)
    pixels = sum(group.count * group.size[0] * group.size[1] for group in spec.groups) * spec.channels
    batch_bytes = images * pixels * source.dtype.itemsize
    room = fitting(workers, batch_bytes, local_world_size)
    if room == workers:
        return workers
    problem = (
        f"/dev/shm has {(_shared_memory() or 0) / 2**20:,.0f} MiB free, too little for workers={workers} with "
        f"batches of {batch_bytes / 2**20:,.0f} MiB; enlarge it (docker run --shm-size=8g)"
    )
    if asked != "auto":
        raise UserError(f"{problem} or set workers={room}")
    say(f"warning: {problem}; going on with workers={room}")
    return room


def _shared_memory() -> int | None:
    """Bytes free in /dev/shm; None where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
