"""One program under python, torchrun and SLURM: who am I, on which device, and the few collectives that are needed."""

import os
import re
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dino_sd.errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def say(text: str) -> None:
    """One line on stderr, from rank 0."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def adopt_slurm() -> None:
    """Says torchrun's variables where only SLURM's are there (`srun` with one task a device)."""
    env = os.environ
    # Only srun sets SLURM_STEP_NUM_TASKS: in the batch script itself, SLURM_NTASKS counts tasks that do not run.
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    per_node = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")  # "8" or "8(x2)"
    env["LOCAL_WORLD_SIZE"] = re.split(r"\D", per_node)[0]
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "127.0.0.1")))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def first_host(nodes: str) -> str:
    """`gpu[07-09,12],cpu1` -> `gpu07`: the first host of SLURM's short form of a list."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UserError(f"SLURM_NODELIST: cannot read a host name from {nodes!r}; set MASTER_ADDR yourself")
    return match[1] + (match[2] or "")


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


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, then MPS, then the CPU. Under torchrun each local rank takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; use device=auto or device=cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: torch sees no MPS device here; use device=auto or device=cpu")
    if name != "cuda":
        return torch.device(name)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if "SLURM_STEP_NUM_TASKS" in os.environ and torch.cuda.device_count() == 1:
        local = 0  # --gpus-per-task=1: each task sees its own GPU as number 0
    if local >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank()} is number {local} on this machine, which has {torch.cuda.device_count()} CUDA device(s); "
            f"start at most that many processes on it (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


_control: Any = None  # a group of CPU processes: agreeing does not wait for an accelerator


def setup(device_name: str = "auto", timeout_s: float = 600) -> torch.device:
    """Joins the process group when there is more than one rank; returns this rank's device."""
    device = pick_device(device_name)
    if "OMP_NUM_THREADS" not in os.environ:  # torch counts the machine's cores, also in a container that has fewer
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // local_world_size())))
    if world_size() > 1 and not dist.is_initialized():
        global _control
        timeout, ours = timedelta(seconds=timeout_s), rank()
        if device.type == "cuda":
            dist.init_process_group(
                "nccl", store=_store(timeout), rank=ours, world_size=world_size(), timeout=timeout, device_id=device
            )
            _control = dist.new_group(backend="gloo", timeout=timeout)
        else:
            dist.init_process_group("gloo", store=_store(timeout), rank=ours, world_size=world_size(), timeout=timeout)
    return device


def _store(timeout: timedelta) -> dist.Store:
    """Where ranks find each other. Started again by torchrun, they must not find those who were there before: its
    store is still the same one, with the addresses of processes that are gone.

    So that rank 0 opens a place of its own, and another rank enters once rank 0 has answered it there: one that is gone
    never does. (torchrun's count of restarts cannot name the place: each machine has its own.)
    """
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank() == 0:
        store.set("dino_sd/place", mine)
        for other in range(1, world_size()):
            store.set(f"{mine}/{store.get(f'{mine}/{other}').decode()}", "welcome")
        return dist.PrefixStore(mine, store)
    while True:
        place = store.get("dino_sd/place").decode()
        store.set(f"{place}/{rank()}", mine)
        time.sleep(0.02)
        if store.check([f"{place}/{mine}"]):
            return dist.PrefixStore(place, store)
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank()}: no answer from rank 0 in {timeout.total_seconds():g} s")


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag, true where it is so on any rank: the same answer on all of them."""
    if not dist.is_initialized():
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control)
    return tuple(bool(flag) for flag in tensor.tolist())


def is_of_others(error: BaseException | None) -> bool:
    """Whether an exception says that other ranks do not answer."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Timed out"))


def silent_ranks(wait_s: float = 3.0) -> list[int]:
    """Ranks that do not answer: each that calls this says so in the group's store. Empty where that is gone too."""
    if not dist.is_initialized():
        return []
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"dino_sd/alive/{rank()}", "1")
        time.sleep(wait_s)
        return [number for number in range(world_size()) if not store.check([f"dino_sd/alive/{number}"])]
    except Exception:  # the store lives in another process
        return []


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """In place; the mean over ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """(N_rank, ...) of every rank -> (sum of N_rank, ...) on every rank, in the order of ranks."""
    if not dist.is_initialized():
        return tensor
    rows = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.zeros_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, rows)
    longest = int(max(int(count) for count in counts))
    padded = torch.zeros(longest, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_objects(ours: list[Any]) -> list[Any]:
    """What the lists of all ranks hold, on every rank, in the order of ranks."""
    if not dist.is_initialized():
        return ours
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, ours, group=_control)
    return [entry for entries in lists for entry in entries]


def agree(value: int, what: str) -> None:
    """Raises UserError on every rank when they do not all hold the same value."""
    values = all_gather_rows(torch.tensor([value], device=_collective_device())).tolist()
    if len(set(values)) > 1:
        raise UserError(f"ranks disagree on {what}: {values}; `out` must be a folder that all machines share")


def _collective_device() -> torch.device | str:
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"


def together(work: Callable[[], None]) -> None:
    """Every rank works and waits for the others; where one fails, all do: none waits for a rank that is gone.

    Raises what this rank's work raised (OSError, UserError), and UserError where another one's did.
    """
    failed = None
    try:
        work()
    except (OSError, UserError) as error:
        failed = error
    (one_failed,) = any_rank(failed is not None)
    if failed is not None:
        raise failed
    if one_failed:
        raise UserError(f"rank {rank()} stops, as another one has failed; what that one said is the reason")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
