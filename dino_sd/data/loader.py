"""This rank's micro-batches of views, from any step on, made in worker processes."""

import atexit
import os
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dino_sd.data.geometry import make_views
from dino_sd.data.order import step_indices, steps_per_epoch
from dino_sd.data.source import Source
from dino_sd.data.views import ViewSpec
from dino_sd.errors import UserError

_MOST_WORKERS = 16


@dataclass
class Batch:
    """Views of B images.

    groups: per resolution, uint8 crops (V * B, C, H, W), all images of the first view first. rows: per resolution,
    their photometric parameters, float32 (V * B, len(Row)). labels: int64 (B,), -1 where an
    image has none, or None where no image has one. indices: int64 (B,).
    """

    groups: list[torch.Tensor]
    rows: list[torch.Tensor]
    labels: torch.Tensor | None
    indices: torch.Tensor

    def pin_memory(self) -> "Batch":
        """What goes to the device, in pinned memory; the rows are read on the CPU and stay where they are."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch([crops.pin_memory() for crops in self.groups], self.rows, labels, self.indices)


class Batches:
    """Iterates over this rank's micro-batches, `accumulate` per step, of the steps start_step <= step < total_steps.

    batch_size: images per step over all ranks and micro-batches. The global batch of a step is cut into
    accumulate * world_size equal parts, and none of it depends on the number of workers. Iterating raises UserError
    where an image cannot be read; making it, where the batch cannot be cut or is larger than the source.
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
        pin_memory: bool = False,
    ):
        parts = accumulate * world_size
        if batch_size % parts:
            raise UserError(
                f"batch_size: {batch_size} cannot be cut into accumulate x processes = {accumulate} x {world_size} "
                f"equal parts; use a multiple of {parts}"
            )
        steps_per_epoch(len(source), batch_size)
        self._steps, self._accumulate = range(start_step, total_steps), accumulate
        self._workers, self._pin_memory = workers, pin_memory
        self._maker = _BatchMaker(source, spec, seed, batch_size, batch_size // parts, rank, world_size)

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
            pin_memory=self._pin_memory,
            # The loader draws a seed for its workers: not from the global generator, whose state is the training's.
            generator=torch.Generator(),
        )
        for made in loader:
            if isinstance(made, _Failure):
                raise UserError(made.message)
            yield made


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
    def __init__(self, source, spec, seed, batch_size, part_size, rank, world_size):
        self.source, self.spec, self.seed = source, spec, seed
        self.batch_size, self.part_size, self.rank, self.world_size = batch_size, part_size, rank, world_size

    def __getitem__(self, item: tuple[int, int]) -> Batch | _Failure:
        step, micro = item
        epoch, indices = step_indices(step, self.seed, len(self.source), self.batch_size)
        start = (micro * self.world_size + self.rank) * self.part_size
        indices_B = np.array(indices[start : start + self.part_size])
        try:
            groups, rows = make_views(self.source, self.spec, self.seed, epoch, indices_B)
        except UserError as error:
            return _Failure(str(error))
        labels_N = self.source.labels()
        labels_B = None if labels_N is None else torch.from_numpy(labels_N[indices_B])
        return Batch(groups, rows, labels_B, torch.from_numpy(indices_B))


def auto_workers(device_type: str, local_world_size: int, in_memory: bool) -> int:
    """Loader processes for one of local_world_size ranks on this machine.

    None where the images are in memory, or where the device is the CPU and has at most two cores per rank: workers
    would only take the cores away from training.
    """
    cores_per_rank = cores() // max(1, local_world_size)
    if in_memory or (device_type == "cpu" and cores_per_rank <= 2):
        return 0
    return max(1, min(cores_per_rank, _MOST_WORKERS))


def cores() -> int:
    """CPU cores this process may use: its affinity, within its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return count if quota is None else max(1, min(count, int(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """Cores that a container's cgroup (version 2 or 1) allows, or None where there is no limit."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError):
        return None
