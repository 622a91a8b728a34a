"""Runs a script in this fresh process as `python SCRIPT` would, then prints its peak memory.

python bench/launch.py [--pin] {SCRIPT | -m MODULE} [ARGUMENT ...]

--pin keeps the process on one core. Nothing but the standard library is imported beforehand, so
that the time from process start to the first step is the script's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

MARK = "peak memory in bytes:"


def peak_memory() -> int:
    """Bytes: the most that CUDA's allocator gave out; where there is no CUDA, the resident set."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        allocated: int = torch.cuda.max_memory_allocated()
        if allocated:
            return allocated
    # Not ru_maxrss where there is better: it begins with what the parent process held.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    """Runs one command line."""
    arguments = sys.argv[1:]
    if arguments[0] == "--pin":
        del arguments[0]
        if sys.platform == "linux":
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    print(MARK, peak_memory(), flush=True)


if __name__ == "__main__":
    main()
