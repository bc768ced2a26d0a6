"""How fast: tokens a second in training, frames a second through the VAE.

    python evaluate.py bench                      # needs no run

The problem. "Fast" means nothing without what is possible. So the first thing timed is a plain
matrix product, and a training step is given as a share of its rate: what remains is the price of
attention, of small matrices and of everything that is no product at all.

Two layouts of the same clips are timed: packed, several clips to a row (patches.py), and padded, a
clip to a row as long as the largest needs, which is what most programs do. There padding is work
like any other: each row is attended whole, in one batch. (A real one would also mask what is
padding; that it need not here is in its favour.) If packing were free, it would be as many times
faster as its rows are fuller; bench says how much of that there is.

Alphabet: B rows of L tokens; d the width; n tokens in a clip.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import cost
import data
import patches
from attention import PATHS, clips_by_length, packed_attention
from dit import DiT, DiTConfig
from text import Tokenizer
from vae import VAE, VAEConfig

HERE = Path(__file__).parent
ROWS, BUDGET, PATCH = 8, 256, 2  # of the batches: those of the preset `tiny`
# Videos of up to 17 frames, from 1:2 to 2:1, and images: more sizes than `tiny` learns from.
SIZES = data.WorldConfig(
    durations=(5, 9, 13, 17), shapes=((32, 32), (24, 40), (40, 24), (24, 48), (48, 24))
)


def median_seconds(device: torch.device, repeats: int, **calls: Callable) -> dict[str, float]:
    """The time of each call. They take turns: what else the machine does hurts all alike."""
    taken = {name: [] for name in calls}
    for _ in range(2 + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in taken.items()}  # two to warm up


def mixed_batch(vae: VAE, config: DiTConfig) -> dict[str, patches.Packed]:
    """The start of a mixed stream of clips: packed, and a clip a row, padded to the longest."""
    sheet = data.load_digits(HERE / "digits.png")
    world = data.World(SIZES, *data.split(*sheet, held_out=False))
    index = np.arange(ROWS * BUDGET // 4)  # more than will fit
    size = world.size(index)
    captions = [data.short_caption(fact) for fact in world.all_facts(index, size)]
    tokenizer = Tokenizer.from_captions(captions, config.vocabulary)
    texts = [tokenizer.encode(caption) for caption in captions]
    grids = [vae.grid(*s) for s in size.tolist()]
    lengths = [len(x) + patches.token_count(g, PATCH) for x, g in zip(texts, grids, strict=True)]
    plan = patches.longest_prefix(lengths, BUDGET, ROWS)
    n = sum(map(len, plan))
    latents = [torch.randn(config.inputs // PATCH**2, *g) for g in grids[:n]]  # noise is as fast
    alone = [[clip] for clip in range(n)]
    padded = patches.pack(latents, texts[:n], PATCH, max(lengths[:n]), alone)
    # The DiT leaves out what is of no clip. So here the padding of a row is of its clip.
    clip = torch.arange(n)[:, None].expand_as(padded.sample_id)
    return {
        "packed": patches.pack(latents, texts[:n], PATCH, BUDGET, plan),
        "padded": replace(padded, sample_id=clip),
    }


def attention_paths(
    packed: patches.Packed, config: DiTConfig, kind: str, repeats: int
) -> dict[str, float]:
    """Seconds of a block's attention over a batch; paths that a device lacks are left out."""
    device, groups = packed.text.device, clips_by_length(packed.sample_id)[1]
    shape = (3, packed.text.numel(), config.heads, config.width // config.heads)
    calls, dtype = {}, getattr(torch, kind)
    for path in PATHS:
        qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

        def call(qkv: torch.Tensor = qkv, path: str = path) -> None:
            packed_attention(*qkv, groups, path).sum().backward()

        try:
            call()
        except (RuntimeError, NotImplementedError, ImportError):
            continue
        calls[path] = call
    return median_seconds(device, repeats, **calls)


def bench(args: argparse.Namespace) -> None:
    """The speed of the smallest sizes, with fresh weights, in the quicker number format."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device)
    b = a.bfloat16()
    taken = median_seconds(device, args.repeats, float32=lambda: a @ a, bfloat16=lambda: b @ b)
    kind = min(taken, key=taken.get)
    rate = 2 * side**3 / taken[kind]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=kind == "bfloat16")
    print(f"{device.type}, {kind}: a plain matrix product runs at {rate / 1e12:.3f} TFLOP/s")

    vae, dit = VAE(VAEConfig()).to(device), DiT(DiTConfig()).to(device)
    for weight in dit.parameters():  # adaLN's zeros, too: some devices multiply zeros faster
        nn.init.normal_(weight, std=0.02)
    batches = mixed_batch(vae, dit.config)
    batches = {name: packed.to(device) for name, packed in batches.items()}

    def step(packed: patches.Packed) -> None:
        level = torch.full(packed.frame_clip.shape, 0.5, device=device)
        with autocast:
            output = dit(packed.tokens, level, packed)  # [B, L, D]
        output.float().square().mean().backward()
        dit.zero_grad(set_to_none=True)

    calls = {name: lambda packed=packed: step(packed) for name, packed in batches.items()}
    taken = median_seconds(device, args.repeats, **calls)
    print(f"DiT, {sum(w.numel() for w in dit.parameters()) / 1e6:.1f} M weights, training step:")
    speed, fill = {}, {}
    for name, packed in batches.items():
        B, L = packed.text.shape
        tokens = sum(packed.lengths) / taken[name]
        work = cost.step_flops(dit, packed.lengths, packed.words, len(packed.frame_clip))
        share = sum(work) / taken[name] / rate
        speed[name], fill[name] = tokens, packed.fill
        print(f"  {name}: {B:3} rows of {L} tokens, {packed.fill:.0%} full, {tokens:9,.0f} real "
              f"tokens/s, {share:.0%} of the matrix product's rate")  # fmt: skip
    faster, fuller = (x["packed"] / x["padded"] for x in (speed, fill))
    print(f"packed is {faster:.2f} times as fast as padded, {faster / fuller:.0%} of {fuller:.2f}, "
          "the ratio of how full they are")  # fmt: skip

    print("packed attention, forward and backward, by each path that this device has:")
    for path, seconds in attention_paths(batches["packed"], dit.config, kind, args.repeats).items():
        print(f"  {path}: {1000 * seconds:.2f} ms")

    B, T, H, W = 16, 17, 32, 32
    video = torch.rand(B, vae.config.colors, T, H, W, device=device) * 2 - 1
    with torch.no_grad(), autocast:
        latent = vae.encode(video)
        halves = {"encode": lambda: vae.encode(video), "decode": lambda: vae.decode(latent)}
        taken = median_seconds(device, args.repeats, **halves)
    speeds = ", ".join(f"{half} {B * T / time:,.0f} frames/s" for half, time in taken.items())
    print(f"VAE, {B} clips of {T} x {H} x {W}: {speeds}")
