"""What a training costs, before it starts: parameters, work, memory, and time on a named GPU.

The problem. A run that turns out too large after a week is a week lost; and nobody can tell from a
width and a depth whether a model fits into a GPU, or what a longer clip does to the bill.

The idea. All of it is counting, and networks are made on PyTorch's meta device, which has shapes
but no numbers: 3 billion parameters take no memory. A clip of n tokens costs, in a transformer of
width d and depth D:

    linear maps     6 for each weight and each thing it is applied to: 2 forward, 4 backward
    attention       12 n^2 d D                                 (Kaplan et al. 2020, section 2.1)

A block has 12 d^2 weights for each token, so a token costs 72 d^2 D + 12 n d D: attention costs
more than all else once n > 6 d. That is what a long clip is about: see the table's last rows.

    python train.py --preset xl --dry-run --gpu h200 --gpus 64     # of one training
    python cost.py                                                 # the table in the README

What the figures leave out: work that is done twice (--recompute), talk between GPUs, making and
encoding clips. --mfu is the share of the GPU's peak that is left for what is counted here; 0.3 to
0.5 is what good trainings report.
"""

import re

import torch
from torch import nn

from dit import DiT

# Peak TFLOP/s of dense bfloat16 matrix products, and memory in GB, as the makers say.
GPUS = {
    "4090": (165, 24),
    "l40s": (362, 48),
    "a100": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "mi300x": (1307, 192),
}

# -------------------------------------------------------------------------------------- parameters


def parameters(model: nn.Module) -> dict[str, int]:
    """How many there are in each part; what all blocks have is one part."""
    count = {}
    for name, weight in model.named_parameters():
        part = re.sub(r"blocks\.\d+\.", "blocks.", name)
        part = ".".join(part.split(".")[: 2 if "blocks." in part else 1])
        count[part] = count.get(part, 0) + weight.numel()
    return count


# -------------------------------------------------------------------------------------------- work


def step_flops(dit: DiT, lengths: list[int], words: int, frames: int) -> tuple[float, float]:
    """What a training step has to compute on clips of so many tokens, `words` of all of them being
    captions': in its linear maps, and in attention. frames: rows of the frame table. Padding does
    not count: nobody asked for it."""
    # adaLN is computed for each frame, not for each token; looking up words is no product.
    times = {"modulation": frames, "level": frames, "summary": words, "words": 0, "place": 0}
    linear = 0
    for name, weight in dit.named_parameters():
        if weight.ndim == 2:
            part = next((part for part in times if part in name), None)
            linear += weight.numel() * times.get(part, sum(lengths))
    squares = sum(n * n for n in lengths)
    return 6.0 * linear, 12.0 * squares * dit.config.width * dit.config.depth


# ------------------------------------------------------------------------------------------ memory

# What a block keeps for its backward pass, in numbers for each token and unit of width: adaLN's
# table 6, after `up` 4, after gelu 4, qkv 3; the input, the norm's output, 1 + scale and what is
# modulated, all twice, 8; with what is beside it 1; normed queries and keys 2; turned ones 2, what
# attention says 1 and again in the tokens' order 1; after `merge` 1, after `down` 1: 34. In
# bfloat16 the input and all norms' outputs, 6 of them, still have 4 bytes.
KEPT = {torch.float32: 34 * 4, torch.bfloat16: 28 * 2 + 6 * 4 + 6}


def activations(dit: DiT, tokens: int, kind: torch.dtype, recompute: bool) -> float:
    """Bytes kept for the backward pass. Recomputed: each block's input, and one block at a time."""
    d, depth = dit.config.width, dit.config.depth
    return tokens * d * (4 * depth + KEPT[kind] if recompute else KEPT[kind] * depth)


def memory(
    dit: DiT, tokens: int, kind: torch.dtype, recompute: bool = False, shards: int = 1
) -> dict[str, float]:
    """Bytes on each GPU. tokens: of one part of a step, padding too. Weights, gradients, EMA and
    optimizers are float32: Muon has one number for each weight, AdamW two."""
    block = sum(w.numel() for w in dit.blocks[0].parameters())
    matrices = sum(
        w.numel() for name, w in dit.blocks.named_parameters()
        if w.ndim == 2 and "modulation" not in name
    )  # fmt: skip
    count = sum(w.numel() for w in dit.parameters())
    bytes_of = {
        "weights": 4 * count / shards,
        "gradients": 4 * count / shards,
        "optimizer": 4 * (matrices + 2 * (count - matrices)) / shards,
        "EMA": 4 * count / shards,
        "activations": activations(dit, tokens, kind, recompute),
    }
    if kind == torch.bfloat16:  # autocast keeps copies of the weights; sharded, of a block or two
        bytes_of["bf16 copies"] = 2 * (count if shards == 1 else 2 * block)
    if shards > 1:
        bytes_of["whole block"] = 2 * 4 * block
    return bytes_of


# ------------------------------------------------------------------------------------ one training


def short(number: float) -> str:
    """1234567 -> "1.23 M"."""
    for size, letter in (
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
    ):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:,.0f} "


def long(hours: float) -> str:
    """A time, in the unit that reads best."""
    for unit, size in (("years", 8766.0), ("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= size:
            return f"{hours / size:.3g} {unit}"
    return f"{hours * 3600:.3g} seconds"


def report(
    networks: dict[str, nn.Module],
    lengths: list[list[int]],
    words: list[int],
    frames: list[int],
    c,
) -> str:
    """All figures of a training of the DiT. lengths: the tokens of each clip, of some steps; words,
    frames: how many of them are captions', and the rows of the frame table, of each of these steps;
    c: train.Config."""
    dit, peak, room = networks["dit"], *GPUS[c.gpu]
    lines = []
    for name, model in networks.items():
        parts = parameters(model)
        lines.append(f"{name}: {sum(parts.values()) / 1e6:,.1f} M parameters")
        lines += [f"  {part:28}{count:14,d}" for part, count in parts.items()]
    work = [step_flops(dit, *step) for step in zip(lengths, words, frames, strict=True)]
    linear, attention = (sum(x) / len(work) for x in zip(*work, strict=True))
    clips = sum(map(len, lengths)) / len(lengths)
    tokens = sum(map(sum, lengths)) / len(lengths)
    every = sorted(n for step in lengths for n in step)
    lines += [
        f"a step: {clips:.0f} clips, {tokens:,.0f} tokens in {c.rows} rows of {c.tokens}, "
        f"{tokens / (c.rows * c.tokens):.0%} full",
        f"a clip: {every[0]:,} to {every[-1]:,} tokens, half of them {every[len(every) // 2]:,} or "
        "fewer",
        f"work of a step: {short(linear + attention)}FLOP forward and backward, "
        f"{attention / (linear + attention):.0%} of it in attention",
    ]
    part = -(-c.rows // (c.gpus * c.accumulate)) * c.tokens
    bytes_of = memory(dit, part, torch.bfloat16, c.recompute, c.gpus if c.shard else 1)
    total = sum(bytes_of.values())
    lines += [f"memory of each of {c.gpus} GPUs, for {part:,} tokens at once:"]
    lines += [f"  {name:28}{size / 1e9:11.2f} GB" for name, size in bytes_of.items()]
    fits = "fits" if total < 0.9e9 * room else "does not fit"  # the rest: what is only passing by
    lines += [f"  {'in all':28}{total / 1e9:11.2f} GB, {fits} into {c.gpu}'s {room}"]
    goal = c.clips or round(clips * c.steps)
    seconds = (linear + attention) * goal / clips / (peak * 1e12 * c.mfu * c.gpus)
    lines += [
        f"{goal:,} clips, {goal / clips:,.0f} steps, at {c.mfu:.0%} of {peak} TFLOP/s on "
        f"{c.gpus} {c.gpu}: {long(seconds / 3600)}, {seconds * c.gpus / 3600:,.1f} GPU-hours"
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- the table

CLIPS = [  # (frames, height, width) of each row's clip; the last are Sora's kind
    ("tiny", (17, 32, 32)),
    ("small", (17, 64, 64)),
    ("base", (17, 128, 128)),
    ("large", (17, 128, 128)),
    ("xl", (17, 128, 192)),
    ("3b", (65, 256, 448)),
    ("3b", (121, 480, 848)),
    ("3b", (601, 720, 1280)),
    ("3b", (1801, 1088, 1920)),
]


def main():
    import train  # for its presets

    print("| preset | parameters | state | a clip | tokens | step | attention | a million clips |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for preset, (T, H, W) in CLIPS:
        c = train.parse(["--preset", preset])
        with torch.device("meta"):
            dit, vae = train.make_dit(c, 512), train.make_vae(c)
        t, h, w = vae.grid(T, H, W)
        n = t * (h // c.patch) * (w // c.patch) + 8  # a caption of 8 tokens
        linear, attention = step_flops(dit, [n], 8, 1 + t)
        total = linear + attention
        state = sum(memory(dit, 0, torch.bfloat16).values())
        hours = 1e6 * total / (GPUS["h200"][0] * 1e12 * 0.4) / 3600
        cells = [preset, f"{sum(parameters(dit).values()) / 1e6:,.1f} M", f"{state / 1e9:.2g} GB"]
        cells += [f"{T} x {H} x {W}", f"{n:,}", f"{short(total)}FLOP", f"{attention / total:.0%}"]
        print(
            "| " + " | ".join([*cells, f"{hours:,.2g}" if hours < 10 else f"{hours:,.0f}"]) + " |"
        )


if __name__ == "__main__":
    main()
