"""How fast: tokens a second in training, frames a second through the VAE. Needs no run.

"Fast" means nothing without what is possible. So the first thing timed is a plain matrix product,
and a training step is given as a share of its rate: what remains is the price of attention, of
small matrices and of everything that is no product at all.

Two layouts of the same clips are timed: packed, several clips to a row (patches.py), and padded, a
clip to a row as long as the largest needs, which is what most programs do. If packing were free, it
would be as many times faster as its rows are fuller.

Alphabet: B rows of L tokens; T frames of H x W pixels.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import data
import patches
from dit import DiT, DiTConfig
from train import Config
from training.cost import step_flops
from vae import VAE, VAEConfig

ROWS, BUDGET, PATCH = Config.rows, Config.tokens, Config.patch  # those of the preset `tiny`
# Videos of up to 17 frames, from 1:2 to 2:1, and images: more sizes than `tiny` learns from.
SHAPES = ((32, 32), (24, 40), (40, 24), (24, 48), (48, 24))


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
    world = data.Digits(data.WorldConfig(durations=(5, 9, 13, 17), shapes=SHAPES))
    i = np.arange(ROWS * BUDGET // 4)  # more than will fit
    sizes = np.where(i[:, None] % 5 < 2, world.sizes(i, True), world.sizes(i))  # 40% images
    grids, text = [vae.grid(*size) for size in sizes.tolist()], [0, 1, 2, 3]  # any words
    lengths = [len(text) + patches.token_count(grid, PATCH) for grid in grids]
    plan = patches.longest_prefix(lengths, BUDGET, ROWS)
    n = sum(map(len, plan))
    latents = [torch.randn(config.inputs // PATCH**2, *grid) for grid in grids[:n]]
    layouts = {"packed": (BUDGET, plan), "padded": (max(lengths[:n]), [[k] for k in range(n)])}
    return {name: patches.pack(latents, [text] * n, PATCH, *layout)
            for name, layout in layouts.items()}  # fmt: skip


def training_steps(vae: VAE, rate: float, autocast: torch.autocast, repeats: int) -> None:
    """Of a small DiT with fresh weights; rate: FLOP/s of a plain matrix product."""
    device, dit = vae.mean.device, DiT(DiTConfig()).to(vae.mean.device)
    for weight in dit.parameters():  # adaLN's zeros, too: some devices multiply zeros faster
        nn.init.normal_(weight, std=0.02)

    def step(packed: patches.Packed) -> None:
        level = torch.full(packed.frame_clip.shape, 0.5, device=device)
        with autocast:
            output = dit(packed.tokens, level, packed)  # [B, L, D]
        output.float().square().mean().backward()
        dit.zero_grad(set_to_none=True)

    layouts, speed = {name: x.to(device) for name, x in mixed_batch(vae, dit.config).items()}, {}
    calls = {name: lambda packed=packed: step(packed) for name, packed in layouts.items()}
    for name, seconds in median_seconds(device, repeats, **calls).items():
        packed, (B, L) = layouts[name], layouts[name].text.shape
        work = sum(step_flops(dit, packed.lengths, packed.words, len(packed.frame_clip)))
        speed[name] = sum(packed.lengths) / seconds
        print(f"training step, {name}: {B} rows of {L} tokens, {packed.fill:.0%} full, "
              f"{speed[name]:,.0f} real tokens/s, {work / seconds / rate:.0%} of that rate")
    fuller = layouts["packed"].fill / layouts["padded"].fill
    faster = speed["packed"] / speed["padded"]
    print(f"packed is {faster:.2f} times as fast as padded, and {fuller:.2f} times as full")


def main(args: argparse.Namespace) -> None:
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
    vae = VAE(VAEConfig()).to(device)
    training_steps(vae, rate, autocast, args.repeats)
    B, T, H, W = 16, 17, 32, 32
    video = torch.rand(B, vae.config.colors, T, H, W, device=device) * 2 - 1
    with torch.no_grad(), autocast:
        latent = vae.encode(video)
        halves = {"encode": lambda: vae.encode(video), "decode": lambda: vae.decode(latent)}
        for half, seconds in median_seconds(device, args.repeats, **halves).items():
            print(f"VAE, {B} clips of {T} x {H} x {W}: {half} {B * T / seconds:,.0f} frames/s")
