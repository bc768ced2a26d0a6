"""The training loop: the same for every network, for one process or many.

The problem. Training takes minutes here and weeks elsewhere. Whoever stops it, for whatever reason,
must lose nothing; and what is trained must not depend on the machine that happens to do it.

The idea. Progress is one integer, the step. Data, noise and learning rate are functions of it, so
that a checkpoint is the weights, their moving average, the optimizer's state and that one number.

    step -> learning rate, loss(step) -> gradients, clipped -> optimizers -> EMA -> step + 1
                                            every so often: log, save, show a sample

`Stage` is all that the loop knows of a training: a network and its loss as a function of the step.
Files of a stage in the run's folder: <name>.pt, and its lines in log.jsonl.
"""

import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample

# ----------------------------------------------------------------------------------- many processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def seeded(*numbers: int) -> torch.Generator:
    """Random numbers for one purpose, step and rank."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


# ----------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The share of the peak: rises linearly, then falls linearly to zero at the last step."""
    warm = max(1.0, warmup * steps)
    return min((step + 1) / warm, (steps - step) / max(1.0, steps - warm))


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all else.

    Muon's update has all its singular values equal, so that no direction of a matrix waits for
    another. At equal time it was far ahead of AdamW here.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = "blocks." in name and "modulation" not in name  # modulation starts at zero
        (matrices if inside and p.ndim == 2 else others).append(p)
    return [
        torch.optim.AdamW(others, lr=lr / 3, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    ]


@dataclass
class Stage:
    """What the loop needs to know of a training."""

    name: str
    model: nn.Module
    steps: int
    lr: float
    loss: Callable[[nn.Module, int], tuple[Tensor, dict]]  # (model, step) -> (loss, logs)
    facts: dict  # for the checkpoint: the model's configuration, and all that sampling needs
    preview: Callable[[nn.Module, int], None] | None = None  # (EMA model, step): draw a sample
    finish: Callable[[nn.Module], None] | None = None  # (EMA model), after the last step


def fit(stage: Stage, c, out: Path, device: torch.device) -> nn.Module:
    """Train to the end, from wherever out/<name>.pt stopped. Returns the EMA model.

    c: the figures of train.Config under "either training".
    """
    model, averaged = stage.model.to(device), deepcopy(stage.model).to(device)
    averaged.eval().requires_grad_(False)
    optimizers = make_optimizers(model, stage.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step = resume(stage, out, model, averaged, optimizers, device)
    if step is None:
        return averaged
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    weights, means = list(model.parameters()), list(averaged.parameters())
    bar = tqdm(total=stage.steps, initial=step, desc=stage.name, unit="step", disable=rank() > 0)
    begun = time.perf_counter()
    while step < stage.steps:
        share = learning_rate(step, stage.steps, c.warmup)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = share * peak
        with sample.bf16(device):
            loss, logs = stage.loss(wrapped, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, c.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        # An average over the last 1 / (1 - decay) steps, and over fewer while there are few.
        torch._foreach_lerp_(means, weights, 1 - min(c.ema, step / (10 + step)))

        bar.update()
        last, stopping = step == stage.steps, told_to_stop()
        if step % 10 == 0 or last:
            value = loss.item()
            bar.set_postfix(loss=f"{value:.4f}")
            speed = 10 / max(time.perf_counter() - begun, 1e-9)
            begun = time.perf_counter()
            figures = {"stage": stage.name, "step": step, "loss": value, "norm": norm.item()}
            log(out, figures | {"steps_a_second": round(speed, 3)} | logs)
        if last and stage.finish:
            stage.finish(averaged)
        if step % c.save_every == 0 or last or stopping:
            save(out / f"{stage.name}.pt", step, model, averaged, optimizers, stage.facts)
        if stopping:
            raise SystemExit(f"stopped at step {step} of {stage.name}; the same command continues")
        if stage.preview and (step % c.sample_every == 0 or last) and rank() == 0:
            stage.preview(averaged, step)
    bar.close()
    return averaged


STOP = []  # signals that came in


def told_to_stop() -> bool:
    """Whether this process or any other was told to; all of them stop after the same step."""
    if not dist.is_initialized():
        return bool(STOP)
    told = torch.tensor(float(len(STOP)), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(told)
    return bool(told)


# -------------------------------------------------------------------------------------------- files


def save(path: Path, step: int, model: nn.Module, averaged: nn.Module, optimizers, facts: dict):
    """Written under another name first: a checkpoint is whole, or it is the one before."""
    if rank():
        return
    state = {"step": step, "weights": model.state_dict(), "ema": averaged.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    part = path.with_suffix(".part")
    torch.save(state | facts, part)
    os.replace(part, path)


def resume(stage: Stage, out: Path, model, averaged, optimizers, device) -> int | None:
    """The step that out/<name>.pt was saved at, everything loaded; 0 where there is none; None
    where its training has ended. A checkpoint of another configuration is an error."""
    path, step = out / f"{stage.name}.pt", 0
    if path.exists():
        state = sample.load_checkpoint(path, device)
        for kind in ("model", "world"):
            for name, value in stage.facts[kind].items():
                if (was := state[kind].get(name)) != value:
                    raise ValueError(
                        f"{path} was trained with {kind} {name} = {was}, and not {value}: "
                        "name another folder with --out, or delete the file to begin anew"
                    )
        step = state["step"]
        model.load_state_dict(state["weights"])
        averaged.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if rank() == 0:  # what was logged after that step will be logged again
        lines = [x for x in read_log(out) if x["stage"] != stage.name or x["step"] <= step]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return None if step >= stage.steps else step


def log(out: Path, figures: dict) -> None:
    if rank() == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(figures) + "\n")


def read_log(out: Path) -> list[dict]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_loss(out: Path, width: int = 900, height: int = 300) -> None:
    """loss.png: both losses on a logarithmic scale, smoothed a little."""
    names = list(dict.fromkeys(line["stage"] for line in read_log(out)))
    picture = Image.new("RGB", (width, (height + 40) * len(names) + 10), (24, 24, 32))
    pen = ImageDraw.Draw(picture)
    for k, name in enumerate(names):
        lines = [line for line in read_log(out) if line["stage"] == name]
        value = np.log10(np.maximum([line["loss"] for line in lines], 1e-9))
        window = max(1, len(value) // 50)
        smooth = np.convolve(
            np.pad(value, (window - 1, 0), "edge"), np.ones(window) / window, "valid"
        )
        x = 10 + (width - 20) * np.array([line["step"] for line in lines]) / lines[-1]["step"]
        low, high = value.min(), max(value.max(), value.min() + 1e-3)
        top = 30 + k * (height + 40)
        for curve, color in ((value, (70, 90, 120)), (smooth, (255, 190, 80))):
            y = top + height * (high - curve) / (high - low)
            pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=color, width=2)
        title = f"{name}: loss from {10**high:.3g} down to {10**low:.3g}, {lines[-1]['step']} steps"
        pen.text((10, top - 20), title, fill=(255, 255, 255))
    picture.save(out / "loss.png")
