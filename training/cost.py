"""What a training costs, before it starts: parameters, work, memory, and time on a named GPU.

All of it is counting, on networks without numbers (PyTorch's meta device). A clip of n tokens
costs, in a transformer of width d and depth D (Kaplan et al. 2020, section 2.1):

    linear maps     6 for each weight and each thing it is applied to: 2 forward, 4 backward
    attention       12 n^2 d D, which is more than all else once n > 6 d

Left out: work that is done twice (--recompute), what GPUs send each other, and making clips.
"""

import math
import re
from collections import Counter
from datetime import timedelta

from torch import nn

from dit import DiT

# Peak TFLOP/s of dense bfloat16 matrix products, and memory in GB, as the makers say.
GPUS = {"4090": (165, 24), "l40s": (362, 48), "a100": (312, 80), "h100": (989, 80),
        "h200": (989, 141), "b200": (2250, 180), "mi300x": (1307, 192)}  # fmt: skip
REACHED = 0.4  # the share of the peak that is left for what is counted; good trainings report this

# Bytes that a block keeps for its backward pass, for each token and unit of width, in bfloat16. No
# attention scores are among them: the kernels make those again.
KEPT = 28 * 2 + 6 * 4 + 6


def parameters(model: nn.Module) -> dict[str, int]:
    """How many there are in each part; what all blocks have is one part."""
    count = Counter()
    for name, weight in model.named_parameters():
        part = re.sub(r"blocks\.\d+", "blocks", name).split(".")
        count[".".join(part[: 1 + (part[0] == "blocks")])] += weight.numel()
    return count


def step_flops(dit: DiT, lengths: list[int], words: int, frames: int) -> tuple[float, float]:
    """What a training step has to compute on clips of so many tokens, `words` of all of them being
    captions': in linear maps, and in attention. frames: rows of the frame table, for adaLN."""
    times = dict.fromkeys(("words", "place", "action"), 0) | {"summary": words}  # 0: looked up
    times |= dict.fromkeys(("modulation", "level"), frames)
    linear = 0
    for name, weight in dit.named_parameters():
        part = next((part for part in times if part in name), None)
        linear += weight.numel() * times.get(part, sum(lengths)) * (weight.ndim == 2)
    squares = sum(n * n for n in lengths)
    return 6.0 * linear, 12.0 * squares * dit.config.width * dit.config.depth


def memory(dit: DiT, tokens: int, recompute: bool = False, shards: int = 1) -> dict[str, float]:
    """Bytes on each GPU. tokens: of one part of a step, padding too. Weights, gradients, EMA and
    optimizers are float32: Muon has one number for each weight, AdamW two."""
    depth = dit.config.depth
    count, block = (sum(w.numel() for w in x.parameters()) for x in (dit, dit.blocks[0]))
    muon = sum(w.numel() for name, w in dit.blocks.named_parameters()
               if w.ndim == 2 and "modulation" not in name)  # fmt: skip
    each = 4 * depth + KEPT if recompute else KEPT * depth  # each block's input, and one block
    bytes_of = dict.fromkeys(("weights", "gradients", "EMA"), 4 * count / shards)
    bytes_of["optimizer"] = 4 * (2 * count - muon) / shards
    bytes_of["activations"] = tokens * dit.config.width * each
    bytes_of["bf16 copies"] = 2 * (count if shards == 1 else 2 * block)  # of autocast
    return bytes_of | ({"whole block": 2 * 4 * block} if shards > 1 else {})


def short(number: float) -> str:
    """1234567 -> "1.23 M"."""
    k = min(7, int(math.log(max(1.0, number), 1000)))
    return f"{number / 1000**k:.3g} {' kMGTPEZ'[k].strip()}"


def report(networks: dict, steps: list[tuple[list[int], int, int]], c) -> str:
    """All figures of a training of the DiT, from some of its steps, each as `step_flops` counts.
    c: train.Config."""
    dit, (peak, room), lines = networks["dit"], GPUS[c.gpu], []
    for name, model in networks.items():
        parts = parameters(model)
        lines.append(f"{name}: {sum(parts.values()) / 1e6:,.1f} M parameters")
        lines += [f"  {part:28}{count:14,d}" for part, count in parts.items()]
    work = [(len(x), sum(x), *step_flops(dit, x, *more)) for x, *more in steps]
    clips, tokens, linear, attention = (sum(x) / len(work) for x in zip(*work, strict=True))
    part = -(-c.rows // (c.gpus * c.accumulate)) * c.tokens
    bytes_of = memory(dit, part, c.recompute, c.gpus if c.shard else 1)
    total = sum(bytes_of.values())
    fits = "fits" if total < 0.9e9 * room else "does not fit"  # the rest: what is only passing by
    hours = (linear + attention) * c.steps / (peak * 1e12 * REACHED * c.gpus) / 3600
    return "\n".join([
        *lines,
        f"a step: {clips:.0f} clips, {tokens:,.0f} tokens in {c.rows} rows of {c.tokens}; "
        f"{short(linear + attention)}FLOP, {attention / (linear + attention):.0%} in attention",
        f"memory of each of {c.gpus} GPUs, for {part:,} tokens at once:",
        *(f"  {name:28}{size / 1e9:11.2f} GB" for name, size in bytes_of.items()),
        f"  {'in all':28}{total / 1e9:11.2f} GB, {fits} into {c.gpu}'s {room}",
        f"{c.steps:,} steps, at {REACHED:.0%} of {peak} TFLOP/s on {c.gpus} {c.gpu}: "
        f"{str(timedelta(hours=hours)).split('.')[0]}, {hours * c.gpus:,.2g} GPU-hours",
    ])  # fmt: skip


def row(dit: DiT, size: tuple, grid: tuple[int, int, int], patch: int) -> list[str]:
    """Of a clip of `size` with latents [Z, *grid] and a caption of 8 tokens: parameters, state, (T,
    H, W), tokens, a training step, attention's share, H200 hours for a million clips."""
    t, h, w = grid
    n = t * (h // patch) * (w // patch) + 8
    linear, attention = step_flops(dit, [n], 8, 1 + t)
    count, total = sum(parameters(dit).values()), linear + attention
    hours = 1e6 * total / (GPUS["h200"][0] * 1e12 * REACHED) / 3600
    return [f"{count / 1e6:,.1f} M", f"{sum(memory(dit, 0).values()) / 1e9:.2g} GB",
            " x ".join(map(str, size)), f"{n:,}", f"{short(total)}FLOP",
            f"{attention / total:.0%}", f"{hours:,.2g}" if hours < 10 else f"{hours:,.0f}"]
