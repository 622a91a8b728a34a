"""The machine under a run: device, precision, compilation, signals, and facts to record."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from model.gpt import GPT
from runtime.processes import world_size

# Dense bf16 matrix FLOP/s that the makers state, by the exact name that torch gives the device: a
# laptop's or a sliced card's differs, and then no MFU is better than a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes cuda, else mps, else cpu.

    Raises:
        ValueError: an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not available here ({reason})") from None
    return device


def set_up(device_name: str, seed: int | None = None) -> torch.device:
    """Seeds torch if asked, settles what makes its device fast, and returns the device."""
    device = pick_device(device_name)
    if seed is not None:
        torch.manual_seed(seed)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # of its streams, graphs and generator
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down a hundredfold
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks that are freed, instead of giving them back to the kernel.

    Otherwise each step maps its activations anew and the kernel clears every page of them.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products on a CUDA device that has them, fp32 everywhere else.

    Weights stay in fp32. CPUs emulate bfloat16 slowly, so it is never used there.
    """
    if has_bf16(device):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 without emulating it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_model(model: GPT, mode: Literal["auto", "on", "off"]) -> None:
    """Compiles `model.forward` in place; the names of its parameters stay as they are.

    "auto" compiles on CUDA where a small trial of torch.compile works, and otherwise says in one
    line that it does not.

    Raises:
        ValueError: mode "on", and the trial fails.
    """
    device = model.wte.weight.device
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda t: (t * 2).relu().sum())(x).backward()
    except Exception as error:  # no compiler, no Triton, an unsupported platform, ...
        reason = f"torch.compile does not work here ({type(error).__name__})"
        if mode == "on":
            raise ValueError(f"run.compile=on: {reason}; use run.compile=off") from None
        print(f"{reason}; going on without it")
        return
    # Its loop has more turns the more tokens there are, each number of them another graph.
    model.chunked_loss = torch.compiler.disable(model.chunked_loss)  # type: ignore
    # A graph that cannot be compiled after all runs as it is, unless compilation was asked for.
    torch._dynamo.config.suppress_errors = mode == "auto"
    model.compile()


class StopOnSignal:
    """While entered, turns the first Ctrl-C or SIGTERM into `requested`; a second one kills."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopOnSignal:
        self._previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # With several processes everyone hears it twice: from the terminal, and from torchrun.
        if self.requested or world_size() == 1:
            self._restore()
        self.requested = True
        # Not print: it is not reentrant, and the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving and stopping; once more to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of dense bf16 matrix products that the device's maker states; None if not known."""
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def environment(device: torch.device) -> dict[str, str]:
    """Where a run happened: commit, torch, Python and device."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cuda = device.type == "cuda"
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine() or "cpu",
    }
