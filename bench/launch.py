"""Runs a script in this fresh process as `python SCRIPT` would, then prints its peak memory.

python bench/launch.py [FLAG ...] {SCRIPT | -m MODULE | MODULE:FUNCTION} [ARGUMENT ...]

A function is given a JSON object of arguments, and what it returns is printed too. --pin keeps
the process on one core. --first-step says when the first optimizer step is done, and --interrupt
is a Ctrl-C after a few; torch is imported here for these, a little before the script does.
Otherwise nothing but the standard library is, so that the time from process start is the script's.
"""

import importlib
import json
import os
import re
import runpy
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

FIRST_STEP = "the first step is done"


def peak_memory() -> int:
    """Bytes: the most that CUDA's allocator gave out; where there is no CUDA, the resident set."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    # Not ru_maxrss where there is better: it begins with what the parent process held.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(found[1]) * 1024
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def watch_steps(interrupts: bool) -> None:
    """Prints FIRST_STEP after any optimizer's first step; perhaps its sixth ends in a Ctrl-C."""
    torch: Any = importlib.import_module("torch")
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = count(1)

    def after_a_step(*_: object) -> None:
        if (n := next(steps)) == 1:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            print(FIRST_STEP, flush=True)
        elif n == 6 and interrupts:
            os.kill(os.getpid(), signal.SIGINT)

    register_optimizer_step_post_hook(after_a_step)


def main() -> None:
    """Runs one command line."""
    flags = [word for word in sys.argv[1:3] if word in ("--pin", "--first-step", "--interrupt")]
    words, result = sys.argv[1 + len(flags) :], {}
    is_script = words[0].endswith(".py")
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent if is_script else Path.cwd())
    if "--pin" in flags and sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if (interrupts := "--interrupt" in flags) or "--first-step" in flags:
        watch_steps(interrupts)
    if is_script:
        try:
            runpy.run_path(words[0], run_name="__main__")
            assert not interrupts, "it was not interrupted"
        except SystemExit as end:
            if end.code != 130 or not interrupts:
                raise
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        module, function = words[0].split(":")
        result = getattr(importlib.import_module(module), function)(**json.loads(words[1]))
    print(json.dumps({**result, "peak_memory": peak_memory()}), flush=True)


if __name__ == "__main__":
    main()
