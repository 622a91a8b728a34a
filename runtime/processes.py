"""Several processes that train one model, as `torchrun` starts them, or one process alone. Data
order is a function of (seed, step), so every process knows the whole batch of a step. Each computes
its share of it, the gradients are averaged, and all take the same optimizer step.
"""

import os
import socket
import sys
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT
from model.seen import Batch


def start_processes(device: str) -> str:
    """Connects the processes that torchrun started, if it did; returns the name of the device. Each
    gets a CUDA device of its own where the config's `device` is "cuda", or "auto" and there are
    any. Then only the first one prints. Raises ValueError: a device that cannot be shared.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "LOCAL_RANK" not in os.environ:
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"run.device is {device}; for several processes give cuda, cpu or auto")
    if dist.is_initialized():
        return device
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"{local + 1} processes or more, {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # all on this machine
        loopback = next((name for _, name in socket.if_nameindex() if name[:2] == "lo"), "")
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            os.environ.setdefault(variable, loopback)  # else they listen on every address
    # gloo as well, for tensors on the CPU: to exchange those, no process waits for its GPU. The
    # timeout is long because the others wait while the first process evaluates and saves.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=4))
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return device


def finish_processes() -> None:
    """Ends this process once all have come here; does nothing where it is alone."""
    if world_size() > 1:
        any_process(False)  # returns once all have called it
        exit_now(0)


def exit_now(code: int) -> NoReturn:
    """Ends this process at once, without waiting for the others."""
    # An orderly end can hang where another process has failed, and gloo's threads may abort in it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints, logs, evaluates and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place; each process must call it."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_process(value: bool) -> bool:
    """Whether `value` is true in at least one process; each process must call it."""
    return bool(sum_over_processes(torch.tensor(float(value))))


def place(model: GPT, device: torch.device, shard: bool) -> GPT:
    """The model on its device; with `shard`, of each weight only this process's share, which is
    brought together for as long as a block computes (FSDP2). Each process has once held all of them
    in the machine's memory. ValueError: there is one process.
    """
    if shard:
        if world_size() == 1:
            raise ValueError("run.shard is for several processes; start them with torchrun")
        from torch.distributed import device_mesh, fsdp  # take a while to import

        mesh = device_mesh.init_device_mesh(device.type, (world_size(),))
        for module in (*model.blocks, model):  # each is moved and cut before the next
            cut = fsdp.fully_shard(module, mesh=mesh)
            cut.unshard()  # or its buffers would be made by sampling, in which nothing is trained
            cut.reshard()
        fsdp.register_fsdp_forward_method(model, "hidden")
        model.is_sharded = True
    return model.to(device)


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a share; each must call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a parameter of its shape is held here: as it is, or a share of it."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def distribute(network: nn.Module, seed: int, step: int) -> nn.Module:
    """The network to train: this one or, for several processes, one that averages its gradients;
    each then draws a dropout of its own, by seed, rank and the step that it starts from.
    """
    if world_size() == 1:
        return network
    mine = np.random.SeedSequence([seed, step, dist.get_rank()])
    torch.manual_seed(int(mine.generate_state(1)[0]))
    if getattr(network, "is_sharded", False):
        return network
    network = DistributedDataParallel(network)
    network.broadcast_buffers = False  # all have the same; as an argument torch 2.13 warns of it
    return network


def my_share(micro_batches: list[Batch]) -> list[Batch]:
    """The part of a step's micro-batches (without `kept` and `bounds`) that is this process's:
    whole ones where there are enough for all, else every n-th row of each. Where one has fewer, a
    row of weight 0 takes its place, since all must take part in every forward and backward pass.
    """
    if (n := world_size()) == 1:
        return micro_batches
    rank, row = dist.get_rank(), micro_batches[0].map(lambda t: t[:1])
    nothing = row._replace(weights=torch.zeros_like(row.targets, dtype=torch.float32))
    if len(micro_batches) >= n:
        return (micro_batches + [nothing] * (-len(micro_batches) % n))[rank::n]
    parts = [b.map(lambda t: t[rank::n].contiguous()) for b in micro_batches]
    return [part if len(part.idx) else nothing for part in parts]
