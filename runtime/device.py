"""The machine under a run: its device, precision, compilation, signals, and facts to record."""

import contextlib
import ctypes
import math
import os
import platform
import signal
import stat
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, Self

import torch

from model.gpt import GPT, ModelConfig
from model.seen import Batch, document_bounds
from runtime.cli import say
from runtime.processes import world_size

# FLOP/s of dense bf16 matrix products that the makers state, by the exact name that torch gives the
# device. A laptop's chip or a slice of a card has another one: no MFU is better than a wrong one.
# fmt: off
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GH200 480GB": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12,
}
# fmt: on
# FLOPs of a run: three minutes and more on any of these. Compiling takes one and saves a third.
EARNS_COMPILING = 1e17


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": cuda, else mps, else cpu. Raises ValueError: not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that torch has given up
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # also to refuse "meta", which computes nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not available here ({reason})") from None
    return device


def set_up(device_name: str, seed: int | None = None) -> torch.device:
    """The device of `pick_device`, with torch made fast on it, and seeded if a seed is given."""
    device = pick_device(device_name)
    if seed is not None:
        torch.manual_seed(seed)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # whose streams, graphs and generator are then used
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        torch.backends.cuda.enable_cudnn_sdp(False)  # but in `cudnn_attention`
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down a hundredfold
    if device.type == "cpu":
        keep_freed_memory()
        cores, others = os.cpu_count() or 1, running() - 1
        if torch.get_num_threads() > 1 and others >= cores:  # all wait for all at every operation
            what = f"note: {cores} cores have work for {others} already, which slows all down"
            say(f"{what}; give each process OMP_NUM_THREADS=1", error=True)
    return device


def running() -> int:
    """How many threads of this machine run or could, this one included; 1 where nobody tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return 1


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks that are freed, instead of giving them back to the kernel, from
    which every step would map its activations anew, each page of them cleared.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context of bfloat16 matrix products where `has_bf16`, else of fp32. Weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


@contextlib.contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Whether cuDNN's attention, the fastest of an H100's, takes part. It plans each new shape for
    about a second, and with a mask it gave NaN (pytorch issue 196678). Around a forward pass and
    its backward pass alike, in which blocks may be computed again.
    """
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def has_bf16(device: torch.device) -> bool:
    """Whether it is a CUDA device with bfloat16 of its own. CPUs emulate it, which is slow."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_model(
    model: GPT, mode: Literal["auto", "on", "off"], flops: float = math.inf, dynamic: bool = False
) -> None:
    """Compiles `model.forward` in place; the names of its parameters stay as they are. "auto" does
    on CUDA only, for a run of EARNS_COMPILING `flops` or more, and where torch.compile fails a
    small trial it goes on without; what it decides it says. `dynamic`: one graph for all shapes.
    Raises ValueError: mode is "on" and the trial fails.
    """
    device = model.wte.weight.device
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return
    if mode == "auto" and flops < EARNS_COMPILING:
        say("not compiled: a run this short does not earn it back; run.compile=on does it anyway")
        return
    if mode == "auto" and model.is_sharded:
        say("not compiled: with run.shard that was never measured; run.compile=on does it anyway")
        return
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda t: (t * 2).relu().sum())(x).backward()
    except Exception as error:  # no compiler, no Triton, an unsupported platform, ...
        reason = f"torch.compile does not work here ({type(error).__name__})"
        if mode == "on":
            raise ValueError(f"run.compile=on: {reason}; use run.compile=off") from None
        say(f"{reason}; going on without it")
        return
    # Not its loop over chunks: each number of chunks would be compiled as another graph.
    model.chunked_loss = torch.compiler.disable(model.chunked_loss)  # type: ignore
    # In "auto", a graph that cannot be compiled after all runs uncompiled instead of failing.
    torch._dynamo.config.suppress_errors = mode == "auto"
    model.compile(dynamic=dynamic or None)
    say("to be compiled at the first step, for a minute or more; run.compile=off does without")


class StopOnSignal:
    """A context in which the first Ctrl-C, SIGTERM or SIGHUP only sets `number`, its own; a second
    one kills. A SIGHUP that nohup has told to be ignored is.
    """

    number = 0

    def __enter__(self) -> Self:
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        self._previous = {s: signal.signal(s, self._stop) for s in signals}
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # Each of several processes gets it twice: from the terminal, and from torchrun.
        if self.number or world_size() == 1:
            self.__exit__()
        self.number = number
        # Not by print, which fails if the signal came in the middle of another print.
        name = signal.Signals(number).name
        try:
            os.write(2, f"\n{name}: saving and stopping; once more to stop at once\n".encode())
        except OSError:  # the terminal is closed; what is printed there from now on would fail
            null = os.open(os.devnull, os.O_WRONLY)
            for fd in (1, 2):
                if stat.S_ISCHR(os.fstat(fd).st_mode):
                    os.dup2(null, fd)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def check_size(config: ModelConfig, vocab_size: int = 0, rows: int = 1) -> None:
    """Raises ValueError: no memory here holds the weights, or a batch of so many rows. To be called
    before anything is allocated, since that may end the process.
    """
    C, here = config.n_embd, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    numbers = 12 * config.n_layer * C**2 + 2 * C * (vocab_size + config.block_size)
    needed = {"model's weights": 4 * numbers, "batch": 16 * rows * config.block_size}
    for what, size in needed.items():
        if size > here:
            text = f"the {what} would take {min(size, 10**99):.1e} bytes"
            raise ValueError(f"{text}, and this machine has {here:.1e}; make it smaller")


def flops_per_token(model: GPT) -> int:
    """Forward and backward FLOPs per trained token at full context: 6 N + 12 L C T, where N are the
    parameters that multiply (all matrices and the head, not the embedding look-ups); attention is
    counted without its causal half (Chowdhery et al. 2022, PaLM, appendix B).
    """
    c, matrices = model.config, [p.numel() for p in model.blocks.parameters() if p.dim() == 2]
    N = sum(matrices) + model.lm_head.weight.numel()
    return 6 * N + 12 * c.n_layer * c.n_embd * c.block_size


def peak_flops(device: torch.device) -> float | None:
    """The device's largest FLOP/s in training, for MFU; None where they are not known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def environment(device: torch.device, code: Path = Path(__file__).parent) -> dict[str, str]:
    """Where a run happens: commit of the code, versions of torch and Python, the device's name."""
    commit = ""
    git = ["git", "-C", str(code), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"commit": commit or "unknown", **versions, "device": name or "cpu"}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the model's device, with what a GPU would have to be waited for to find out."""
    if batch.weights is not None and batch.kept is None:
        batch = batch._replace(kept=batch.weights.flatten().nonzero().squeeze(1))
    if device.type != "cuda":
        return batch.map(lambda t: t.to(device))
    if batch.documents is not None and has_bf16(device):
        batch = batch._replace(bounds=document_bounds(batch.documents))
    # From pinned memory the copy runs beside the step before.
    return batch.map(lambda t: t if t.is_cuda else t.pin_memory().to(device, non_blocking=True))
