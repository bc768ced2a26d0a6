"""One process or many: torchrun starts one for each GPU, and all of them run the same program.

Alone, a process takes the same way through these functions, so no other file asks how many there
are. A tensor that FSDP2 has spread out is a DTensor, of which each process holds some rows.
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def keep_memory() -> None:
    """On a CPU, glibc gives each large array back to the system as soon as it is freed, and the
    next one is made of pages that have to be zeroed first. From here on it keeps them."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another system
    for option, value in ((-3, 2**25), (-1, 2**30), (-2, 2**26)):  # mmap and trim thresholds, pad
        mallopt(option, value)


@contextmanager
def alone_in(folder: Path):
    """The only training in a run's folder. ValueError: there is another one."""
    with open(folder / ".lock", "w") as lock:
        try:
            if rank() == 0:
                import fcntl

                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another training writes to {folder}: name another --out") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def seeded(*numbers: int) -> torch.Generator:
    """Random numbers for one purpose and step: the same on every process, and when resumed."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def own_parts(accumulate: int) -> tuple[range, int]:
    """The numbers of the parts of a step that this process learns from; how many there are."""
    return range(rank() * accumulate, (rank() + 1) * accumulate), ranks() * accumulate


def made_ahead(make: Callable, order: range, workers: int) -> torch.utils.data.DataLoader:
    """make(k) of each k in order, made ahead by worker processes, if there are any."""
    workers = 0 if sys.platform == "win32" else workers
    return torch.utils.data.DataLoader(
        order, batch_size=None, collate_fn=make, num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # nothing needs to be pickled
    )  # fmt: skip


def deal(costs: list[float], parts: int) -> list[list[int]]:
    """Deal items out to parts of about equal cost: the dearest item first, each to the cheapest
    part that has room. No part gets more than its share in number, rounded up."""
    most, dealt = -(-len(costs) // parts), [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda k: -costs[k]):
        free = [part for part in dealt if len(part) < most]
        min(free, key=lambda part: sum(costs[k] for k in part)).append(item)
    return dealt


def added(*numbers: float, device: torch.device) -> list[float]:
    """Each number, summed over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(x) -> list:
    """The x of every process, on every process, in order of rank."""
    parts = [x] * ranks()
    if dist.is_initialized():
        dist.all_gather_object(parts, x)
    return parts


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: each process holds 1/N of every weight, gradient and optimizer state. The weights of a
    block are gathered just before they are needed, and dropped again."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def whole(x):
    """A state dict with all shards put together, on the first process's CPU; what was never sharded
    stays as it is. All processes must call this."""
    if isinstance(x, DTensor):
        full = x.full_tensor()
        return full.cpu() if rank() == 0 else None
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return [whole(value) for value in x] if isinstance(x, list) else x


def sharded_as(full: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a tensor, if `like` is sharded and has its shape."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
