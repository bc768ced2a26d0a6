"""The training loop: the same for every network, on one process or many.

The problem. Training takes minutes here and weeks elsewhere. Whoever or whatever stops it must lose
nothing; and what is learned must not depend on the machines that happen to do it.

The idea. Progress is one integer, the step. The *global* batch of a step, its noise and its
learning rate are functions of (seed, step), and of nothing else. So a checkpoint is the weights,
their moving average (EMA), the optimizers' state and that one number. Each process makes and learns
from its own parts of the batch:

    step -> the batch, dealt out: a part for each of N processes x A accumulations
    part -> loss: its share of the mean over the whole batch; their sum is the loss of the step
         -> gradients, summed over all parts -> clipped -> optimizers -> EMA -> step + 1

So one process and N take the same step, but for the order in which floating point adds. What that
guarantees: continued on as many processes of the same kind, a run is bit for bit what it would have
been uninterrupted; continued on another number, it goes on with the same clips and the same noise.

`Stage` is all that the loop knows of a training. Files of a stage in the run's folder: <name>.pt;
while it trains, <name>.before.pt, the checkpoint before that; <name>.best-<step>.pt, the EMA
weights of the few best checkpoints, if the stage can say how good it is; and its lines in
log.jsonl. All processes must see the same folder.

Training waits while a checkpoint is written: 0.04 s for `tiny`, 4.5 s for 100 M parameters, 1.3 GB
(on one CPU core and a disk, where 200 steps take one minute and many hours). Writing it beside the
training would gain less than that, for a copy of everything in memory.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
from muon import Muon

STOP = []  # signals that came in, asking to stop
MOST_SKIPPED = 3  # steps in a row that may fail

# ----------------------------------------------------------------------------------- many processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def seeded(*numbers: int) -> torch.Generator:
    """Random numbers for one purpose and step."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def deal(costs: list[float], parts: int) -> list[list[int]]:
    """Deal items out to parts that cost about the same: the dearest first, each to the part that
    costs least so far and has room. No part has more than its share in number, rounded up."""
    most, dealt = -(-len(costs) // parts), [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda k: -costs[k]):
        free = [part for part in dealt if len(part) < most]
        min(free, key=lambda part: sum(costs[k] for k in part)).append(item)
    return dealt


def added(*numbers: float, device: torch.device) -> list[float]:
    """Each number, added up over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(x) -> list:
    """What each process has, of all of them."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * ranks()
    dist.all_gather_object(parts, x)
    return parts


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: each process holds 1/N of every weight, gradient and optimizer state. The weights of a
    block are made whole just before they are needed, and dropped again."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def whole(x):
    """Shards put together, on the first process's CPU, wherever x (a state dict) has any. All
    processes must call this."""
    if isinstance(x, DTensor):
        full = x.full_tensor()
        return full.cpu() if rank() == 0 else None
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return [whole(value) for value in x] if isinstance(x, list) else x


def sharded_as(full: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a tensor, if `like` is sharded and of its shape."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


# ----------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The share of the peak: rises linearly, then falls linearly to zero at the last step."""
    warm = max(1.0, warmup * steps)
    return min((step + 1) / warm, (steps - step) / max(1.0, steps - warm))


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else. At equal time this was far ahead
    of AdamW alone here."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = "blocks." in name and "modulation" not in name  # modulation starts at zero
        (matrices if inside and p.ndim == 2 else others).append(p)
    return [
        torch.optim.AdamW(others, lr=lr / 3, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        Muon(matrices, lr=lr),
    ]


@dataclass
class Stage:
    """What the loop needs to know of a training."""

    name: str
    model: nn.Module
    steps: int
    lr: float
    batch: Callable[[int, int], object]  # (step, k): what the k-th of this process's parts learns
    # (model, such a batch, step): its share in the step's loss, and logs. Threads call it
    loss: Callable[[nn.Module, object, int], tuple[Tensor, dict]]
    facts: dict  # for the checkpoint: the model's configuration, and all that sampling needs
    preview: Callable[[nn.Module, int], None] | None = None  # (EMA model, step): draw a sample
    finish: Callable[[nn.Module], None] | None = None  # (EMA model), after the last step
    # (EMA model): this process's share of a loss on what is not learned from, always the same
    measure: Callable[[nn.Module], float] | None = None
    large: bool = False  # whether --shard is for it


def gradients(stage: Stage, model: nn.Module, step: int, parts: int, device) -> tuple[float, dict]:
    """Add up the gradients of all parts, one after the other; processes talk to each other in the
    last part only. Returns this process's share of the loss, and what its first part has to log."""
    loss, logs = 0.0, {}
    for part in range(parts):
        last, quiet = part == parts - 1, nullcontext()
        if isinstance(model, DistributedDataParallel) and not last:
            quiet = model.no_sync()
        elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2
            model.set_requires_gradient_sync(last)
        with quiet:
            with sample.bf16(device):
                share, more = stage.loss(model, stage.batch(step, part), step)
            (share * ranks()).backward()  # DDP and FSDP take the mean over processes
        loss, logs = loss + share.item(), logs or more
    return loss, logs


def gradients_in_threads(
    stage: Stage, model: nn.Module, step: int, parts: int, device, threads: ThreadPoolExecutor
) -> tuple[float, dict]:
    """The same, the parts side by side. On a CPU this is faster than all cores at one part: they
    would wait for each other after each of thousands of small operations."""
    weights, loss, logs = list(model.parameters()), 0.0, {}

    def learn(batch) -> tuple:
        # Threads do not inherit it. The cache is one for all threads, and each empties it when it
        # is done: how gradients are rounded would depend on which of them is faster.
        with sample.bf16(device, cache=False):
            share, more = stage.loss(model, batch, step)
        return share.item(), more, torch.autograd.grad(share, weights, allow_unused=True)

    with sample.bf16(device):
        batches = [stage.batch(step, part) for part in range(parts)]
    for share, more, found in threads.map(learn, batches):  # in this order: always the same sum
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        loss, logs = loss + share, logs or more
    return loss, logs


def fit(stage: Stage, c, out: Path, device: torch.device) -> nn.Module:
    """Train to the end, from wherever out/<name>.pt stopped. Returns the EMA model.

    c: the figures of train.Config under "either training". FloatingPointError: it diverged.
    """
    model, averaged = stage.model.to(device), deepcopy(stage.model).to(device)
    averaged.eval().requires_grad_(False)
    if sharded := c.shard and stage.large and dist.is_initialized():
        blank = deepcopy(averaged).to("meta")
        model, averaged = shard(model), shard(averaged)

    def ema() -> nn.Module:  # whole, to be used on the first process
        if not sharded:
            return averaged
        state = whole(averaged.state_dict())
        if rank():
            return blank
        made = deepcopy(blank).to_empty(device=device)
        made.load_state_dict(state)
        return made

    optimizers = make_optimizers(model, stage.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, skipped, best = resume(stage, out, model, averaged, optimizers, device)
    wrap = dist.is_initialized() and not sharded
    wrapped = DistributedDataParallel(model) if wrap else model
    weights, means = list(model.parameters()), list(averaged.parameters())
    cores = torch.get_num_threads()
    workers = min(cores, c.accumulate)
    threads = ThreadPoolExecutor(workers, "part", torch.set_num_threads, (cores // workers,))
    bar = tqdm(total=stage.steps, initial=step, desc=stage.name, unit="step", disable=rank() > 0)
    begun, in_a_row = time.perf_counter(), 0
    while step < stage.steps:
        share = learning_rate(step, stage.steps, c.warmup)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = share * peak
        if workers > 1 and device.type == "cpu" and not dist.is_initialized():
            loss, logs = gradients_in_threads(stage, model, step, c.accumulate, device, threads)
        else:
            loss, logs = gradients(stage, wrapped, step, c.accumulate, device)
        norm = nn.utils.clip_grad_norm_(weights, c.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        loss, stopping = added(loss, len(STOP), device=device)  # the same on all processes
        step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            in_a_row = 0
            for optimizer in optimizers:
                optimizer.step()
            # An average over the last 1 / (1 - decay) steps, and over fewer while there are few.
            with torch.no_grad():
                torch._foreach_lerp_(means, weights, 1 - min(c.ema, step / (10 + step)))
        else:  # as if the step had not been; the next one has other clips
            skipped, in_a_row = skipped + 1, in_a_row + 1
        for optimizer in optimizers:
            optimizer.zero_grad()
        if in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"{stage.name} diverged: in {in_a_row} steps in a row, up to step {step}, the loss "
                f"or its gradient was not a number. What was saved is still good: try a lower "
                f"learning rate than {stage.lr:g}, or another --seed"
            )

        bar.update()
        last = step == stage.steps
        if step % 10 == 0 or last:
            bar.set_postfix(loss=f"{loss:.4f}")
            speed = 10 / max(time.perf_counter() - begun, 1e-9)
            begun = time.perf_counter()
            figures = {"stage": stage.name, "step": step, "loss": loss, "norm": norm}
            more = {"skipped": skipped} if skipped else {}
            log(out, figures | {"steps_a_second": round(speed, 3)} | more | logs)
        if last and stage.finish:
            stage.finish(averaged)
        # Shown before it is saved: killed in between, it is shown again, and not left out.
        if stage.preview and (step % c.sample_every == 0 or last):
            shown = ema()
            if rank() == 0:
                stage.preview(shown, step)
        if step % c.save_every == 0 or last or stopping:
            path = out / f"{stage.name}.pt"
            if c.keep and stage.measure and not (stopping and step % c.save_every):
                best = keep_best(stage, c.keep, best, path, step, averaged, device)
            progress = {"step": step, "skipped": skipped, "best": best}
            save(path, progress, model, averaged, optimizers, stage.facts, last)
        if stopping:
            raise SystemExit(f"stopped at step {step} of {stage.name}; the same command continues")
    bar.close()
    torch.set_num_threads(cores)  # what a thread says of its own is in part said for all of them
    return ema()


# -------------------------------------------------------------------------------------------- files


def write(path: Path, state: dict, before: Path | None = None) -> None:
    """Written under another name first: the file is whole, or what it was, which is kept as
    `before`."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            f"{path} could not be written at step {state['step']}, with {free:.1f} GB free "
            f"on its disk: make room, and the same command continues from what was saved before"
        ) from error
    if before and path.exists():
        os.replace(path, before)
    os.replace(part, path)


def keep_best(
    stage: Stage, count: int, best: list, path: Path, step: int, averaged: nn.Module, device
) -> list:
    """The (loss, step) of the `count` best checkpoints, of which this may be one. Its EMA weights
    are then written; `save` deletes those that are no longer among them, once it has saved that."""
    with torch.no_grad(), sample.bf16(device):
        loss = added(stage.measure(averaged), device=device)[0]
    best = sorted(best + [(loss, step)])[:count] if math.isfinite(loss) else best
    if (loss, step) in best:
        state = whole({"ema": averaged.state_dict()}) | {"step": step, "held_back": loss}
        if rank() == 0:
            write(path.with_suffix(f".best-{step}.pt"), state | stage.facts)
    return best


def save(
    path: Path,
    progress: dict,
    model: nn.Module,
    averaged: nn.Module,
    optimizers: list,
    facts: dict,
    last: bool,
) -> None:
    """A checkpoint; the one before stays beside it until the training ends. Returns, on all
    processes, when it is done."""
    state = {"weights": model.state_dict(), "ema": averaged.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    state = whole(progress | state | facts)
    before, best = path.with_suffix(".before.pt"), {step for _, step in progress["best"]}
    if rank() == 0:
        write(path, state, before)
        if last:
            before.unlink(missing_ok=True)
        for old in path.parent.glob(f"{path.stem}.best-*.pt"):
            if int(old.stem.split("-")[-1]) not in best:
                old.unlink()
    if dist.is_initialized():
        dist.barrier()


def resume(stage: Stage, out: Path, model, averaged, optimizers, device) -> tuple:
    """The step that out/<name>.pt was saved at, how many were skipped and which were best, and
    everything loaded; 0, 0, [] where there is none. One of another configuration is an error."""
    path, step, skipped, best = out / f"{stage.name}.pt", 0, 0, []
    before = path.with_suffix(".before.pt")
    if before.exists() and not path.exists():  # killed between two renames
        path = before
    if path.exists():
        state = sample.load_checkpoint(path, "cpu")
        for kind in ("model", "world"):
            for name, value in stage.facts[kind].items():
                if (was := state[kind].get(name)) != value:
                    raise ValueError(
                        f"{path} was trained with {kind} {name} = {was}, and not {value}: "
                        "name another folder with --out, or delete the file to begin anew"
                    )
        step, skipped, best = state["step"], state.get("skipped", 0), state.get("best", [])
        for network, saved in ((model, state["weights"]), (averaged, state["ema"])):
            own = network.state_dict()
            network.load_state_dict({k: sharded_as(v, own.get(k)) for k, v in saved.items()})
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            places = [p for group in optimizer.param_groups for p in group["params"]]
            for k, numbers in saved["state"].items():
                saved["state"][k] = {n: sharded_as(v, places[k]) for n, v in numbers.items()}
            optimizer.load_state_dict(saved)
    if rank() == 0:  # what was logged after that step will be logged again
        lines = [x for x in read_log(out) if x["stage"] != stage.name or x["step"] <= step]
        part = out / "log.part"
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(part, out / "log.jsonl")
    return step, skipped, best


def log(out: Path, figures: dict) -> None:
    if rank() == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(figures) + "\n")


def read_log(out: Path) -> list[dict]:
    path, lines = out / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # killed while it was written: it will be logged again
            continue
    return lines
