"""How fast this device multiplies matrices: what every other speed is held against."""

import statistics
import time

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_speed(device: torch.device, precision: str, runs: int = 7) -> float:
    """FLOP/s of a large square product, median of `runs`."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(DTYPES[precision])
    times = []
    for _ in range(runs + 1):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(times[1:])
