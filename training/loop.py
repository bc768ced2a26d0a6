"""The training loop: the same for every network, on one process or many.

The problem. Training takes minutes or weeks. Whatever stops it, nothing may be lost, and what is
learned must not depend on the machines that happen to do it.

The idea. Progress is one integer, the step. The *global* batch of a step, its noise and its
learning rate are functions of (seed, step) alone. A checkpoint is the weights, their moving average
(EMA), the optimizers' state and that one number. Each process learns from its parts of the batch:

    step -> the batch, dealt out: a part for each of N processes x A accumulations
    part -> loss: its share of the mean over the whole batch; the shares add up to the step's loss
         -> gradients, summed over all parts -> clipped -> optimizers -> EMA -> step + 1

Resumed on as many processes, a run is bit for bit what it would have been uninterrupted; on another
number it goes on with the same clips and noise, and only floating point adds in another order.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from prompting import bf16
from training.checkpoints import State, keep_best, log, resume, save
from training.muon import Muon
from training.processes import added, made_ahead, rank, ranks, shard, whole

STOP = []  # signals that came in, asking to stop
WARMUP = 0.03  # share of the steps in which the learning rate rises
CLIP = 1.0  # the most that the gradient's norm may be
MOST_SKIPPED = 3  # steps in a row that may fail


@dataclass
class Stage:
    """A training. `parts` gives each process equally many; `loss`, a part's share of the step's
    loss, and logs."""

    name: str
    model: nn.Module
    steps: int
    lr: float
    parts: Callable[[int], list]  # (step): our parts of its batch
    loss: Callable[[nn.Module, object, int], tuple[Tensor, dict]]  # (model, part, step)
    facts: dict  # for the checkpoint: "world", and "words" if it reads any
    workers: int = 0  # processes that make parts ahead
    preview: Callable[[nn.Module, int], None] | None = None  # (EMA model, step): draw a sample
    finish: Callable[[nn.Module], None] | None = None  # (EMA model), after the last step
    measure: Callable[[nn.Module], float] | None = None  # (EMA model): our share of a held-out loss
    large: bool = False  # whether --shard is for it


def learning_rate(step: int, steps: int, warmup: float = WARMUP) -> float:
    """The share of the peak: rises linearly, then falls linearly to zero at the last step."""
    warm = max(1.0, warmup * steps)
    return min((step + 1) / warm, (steps - step) / max(1.0, steps - warm))


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest: far better than AdamW alone."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = "blocks." in name and "modulation" not in name  # modulation starts at zero
        (matrices if inside and p.ndim == 2 else others).append(p)
    adam = torch.optim.AdamW(others, lr / 3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [adam, Muon(matrices, lr)] if matrices else [adam]


def gradients(stage: Stage, model: nn.Module, parts: list, step: int, device) -> tuple[float, dict]:
    """Add up the gradients of all parts, one after the other; processes talk to each other in the
    last one only. Returns this process's share of the loss, and what its first part has to log."""
    loss, logs = torch.zeros((), device=device), {}
    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        quiet = isinstance(model, DistributedDataParallel) and not last
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
            model.set_requires_gradient_sync(last)
        with model.no_sync() if quiet else nullcontext():
            with bf16(device):
                share, more = stage.loss(model, part, step)
            (share * ranks()).backward()  # DDP and FSDP take the mean over processes
        loss, logs = loss + share.detach(), logs or more
    return loss.item(), logs


def prepare(stage: Stage, c, device) -> tuple[State, Callable[[], nn.Module]]:
    """Networks and optimizers on their device, sharded or not; and what makes the EMA model whole
    on the first process. Other processes get one without numbers."""
    model, averaged = stage.model.to(device), deepcopy(stage.model).to(device)
    averaged.eval().requires_grad_(False)
    if not (c.shard and stage.large and ranks() > 1):
        return State(model, averaged, make_optimizers(model, stage.lr)), lambda: averaged
    blank = deepcopy(averaged).to("meta" if rank() else "cpu")
    model, averaged = shard(model), shard(averaged)

    def ema() -> nn.Module:
        weights = whole(averaged.state_dict())
        if rank() == 0:
            blank.load_state_dict(weights)
        return blank if rank() else deepcopy(blank).to(device)

    return State(model, averaged, make_optimizers(model, stage.lr)), ema


def fit(stage: Stage, c, device: torch.device) -> nn.Module:
    """Train to the end, from wherever <name>.pt stopped: the EMA model. c: a train.Config."""
    (state, ema), path = prepare(stage, c, device), c.folder / f"{stage.name}.pt"
    facts = stage.facts | {"model": asdict(stage.model.config), "config": asdict(c)}
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in state.optimizers]
    resume(state, path, facts)
    weights, means = list(state.model.parameters()), list(state.averaged.parameters())
    alone, sharded = ranks() == 1, isinstance(weights[0], DTensor)
    learner = state.model if alone or sharded else DistributedDataParallel(state.model)
    in_a_row, logged, begun = 0, state.step, time.perf_counter()
    bar = tqdm(total=stage.steps, initial=state.step, desc=stage.name, unit="step", disable=rank())
    with bar:
        for parts in made_ahead(stage.parts, range(state.step, stage.steps), stage.workers):
            share = learning_rate(state.step, stage.steps)
            for optimizer, peak in zip(state.optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = share * peak
            loss, logs = gradients(stage, learner, parts, state.step, device)
            norm = nn.utils.clip_grad_norm_(weights, CLIP)
            norm = (norm.full_tensor() if sharded else norm).item()
            loss, stopping = added(loss, len(STOP), device=device)  # the same on all processes
            state.step += 1
            step, last = state.step, state.step == stage.steps
            in_a_row = 0 if math.isfinite(loss + norm) else in_a_row + 1
            state.skipped += in_a_row > 0  # as if it had not been; the next step has other clips
            if not in_a_row:
                for optimizer in state.optimizers:
                    optimizer.step()
                decay = min(c.ema, step / (10 + step))  # shorter while there are few
                with torch.no_grad():
                    torch._foreach_lerp_(means, weights, 1 - decay)
            state.model.zero_grad()
            if in_a_row == MOST_SKIPPED:
                raise FloatingPointError(
                    f"{stage.name} diverged: in {in_a_row} steps in a row, up to step {step}, the"
                    " loss or gradient was not a number. What was saved is still good: try a lower "
                    f"learning rate than {stage.lr:g}, or another --seed"
                )
            bar.update()
            if step % 10 == 0 or last:
                bar.set_postfix(loss=f"{loss:.4f}")
                speed = (step - logged) / max(time.perf_counter() - begun, 1e-9)
                logged, begun = step, time.perf_counter()
                line = {"stage": stage.name, "step": step, "loss": loss, "norm": norm}
                line |= {"skipped": state.skipped, "steps_a_second": round(speed, 3)}
                log(c.folder, line | logs)
            if last and stage.finish:
                stage.finish(state.averaged)
            # Shown before it is saved: killed in between, it is shown again, and not left out.
            if stage.preview and (last or step % c.sample_every == 0):
                shown = ema()
                if rank() == 0:
                    stage.preview(shown, step)
            due = last or step % c.save_every == 0
            if due and c.keep and stage.measure:
                with torch.no_grad(), bf16(device):
                    held_back = added(stage.measure(state.averaged), device=device)[0]
                keep_best(state, path, facts, held_back, c.keep)
            if due or stopping:
                save(state, path, facts)
            if stopping:
                at = f"step {step} of {stage.name}"
                raise SystemExit(f"stopped at {at}; the same command continues")
    return ema()
