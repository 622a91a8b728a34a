"""The machine under a bench: its name, its versions, and its physical limits, as one JSON line.

python -m bench.machine --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.cli import one_line_errors
from runtime.device import environment, peak_flops, pick_device


def fastest(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of several calls, the first not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def limits(device: torch.device, quick: bool) -> dict[str, Any]:
    """Matrix FLOP/s in the dtype that training multiplies in, and bytes/s of a large copy.

    The copy counts each byte twice, read and written.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    flops = 0.0
    for n in (256,) if quick else (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
        flops = max(flops, 2 * n**3 / seconds)
    numbers = 1 << (20 if quick else 28 if cuda else 26)
    source, target = (torch.ones(numbers, device=device) for _ in range(2))
    seconds = fastest(lambda: target.copy_(source), device)
    return {
        "matrix_flops": round(flops),
        "matrix_dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_second": round(2 * 4 * numbers / seconds),
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--quick", action="store_true", help="small sizes")
    a = p.parse_args()
    with one_line_errors():
        device = pick_device(a.device)
        found = environment(device) | {
            "type": device.type,
            "cpu": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "peak_flops": peak_flops(device),
        }
        print(json.dumps(found | limits(device, a.quick)))


if __name__ == "__main__":
    main()
