"""Train everything: the VAE, then the diffusion transformer, from a CPU toy to many GPUs.

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs

A preset is a set of defaults, and every one of them is a flag of the same name (--depth 8). The same
command continues a run that was stopped. Progress is one integer, the step: data, noise and learning
rate are functions of (seed, step, rank), so a continued run is bit for bit the run that was not
interrupted, and no random state has to be saved.

The order of this file: configuration, the two stages (each gives `loss(step)`), the loop that trains
either, files on disk, the command line.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
import patches
import sample
from dit import DiT, DiTConfig
from text import NOTHING, Tokenizer
from vae import VAE, VAEConfig

# ------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """The defaults are those of `tiny`."""

    preset: str = "tiny"
    stage: str = "all"  # vae, dit or all
    out: str = ""  # the run's folder: out/<preset> if left out
    mnist: str = ""  # a folder with MNIST's IDX files, instead of digits.png
    seed: int = 0
    # the world
    digit: int = 14  # a digit's box, in pixels
    durations: tuple[int, ...] = (9, 17)  # frames of videos
    shapes: tuple[str, ...] = ("32x32", "24x40", "40x24", "32x48", "48x32")  # HxW
    image_shapes: tuple[str, ...] = ("16x16", "24x24")  # more shapes, of images only
    two_digits: float = 0.3  # the share of clips with two digits
    images: float = 0.4  # the share of clips that are single frames
    # the VAE
    time_factor: int = 4
    space_factor: int = 4
    channels: int = 4
    vae_width: int = 64
    encoder_depth: int = 2
    decoder_depth: int = 3
    kl: float = 1e-3
    vae_steps: int = 1000
    vae_batch: int = 8  # clips of the longest duration, or as many shorter ones as have as many pixels
    vae_lr: float = 6e-3
    # the DiT
    patch: int = 2  # the side of a patch, in latents
    width: int = 256
    depth: int = 8
    heads: int = 4
    prediction: str = "x"
    steps: int = 1500
    rows: int = 8  # of a batch, on each process
    tokens: int = 256  # in a row
    lr: float = 3e-3
    image_phase: float = 0.3  # this share of the steps is on images only
    dropout: float = 0.1  # of captions, for classifier-free guidance
    given: float = 0.2  # the share of clips in which some frames are given
    # both
    ema: float = 0.99
    warmup: float = 0.03  # the share of the steps in which the learning rate rises
    clip: float = 1.0  # the gradient's norm is clipped to this
    save_every: int = 200
    sample_every: int = 500

    def world(self) -> data.WorldConfig:
        shapes, more = (
            tuple(tuple(map(int, s.split("x"))) for s in group)
            for group in (self.shapes, self.image_shapes)
        )
        return data.WorldConfig(
            self.digit, self.durations, self.images, shapes, more, self.two_digits
        )


# ------------------------------------------------------------------------------------------ machines


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def seeded(*numbers: int) -> torch.Generator:
    """A generator for one purpose at one step on one rank."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def to_float(clips: list[np.ndarray]) -> Tensor:
    """uint8 [C, T, H, W] each -> [B, C, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).float() / 127.5 - 1


# ------------------------------------------------------------------------------------ stage 1: the VAE


def vae_loss(model, world: data.World, config: Config, step: int, device):
    """A step's loss of the VAE: clips of one size, drawn anew each step."""
    T, H, W = world.size([step])[0]
    if T == 1:  # images stay rare: videos contain them, as their first frames
        T = 1 if step % 4 == 0 else max(config.durations)
    area = np.mean([h * w for h, w in world.config.shapes])
    count = max(1, round(config.vae_batch * max(config.durations) * area / (T * H * W)))
    count = min(count, 4 * config.vae_batch)
    index = (step * ranks() + rank()) * 4 * config.vae_batch + np.arange(count)
    clips, _ = world.clips(index, (T, H, W))
    video = to_float(clips)
    grid = model_of(model).grid(T, H, W)
    noise = torch.randn(count, config.channels, *grid, generator=seeded(config.seed, 1, step, rank()))
    return model(video.to(device), noise.to(device))


def model_of(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


# ------------------------------------------------------------------------------------ stage 2: the DiT


def draw_known(T: int, kind: float, u: np.ndarray) -> np.ndarray:
    """Which frames of a clip are given: [T] bool. `kind` and u [2 + T] are uniform in [0, 1)."""
    known = np.zeros(T, bool)
    if kind < 0.3:
        known[0] = True  # animate an image
    if 0.3 <= kind < 0.5 or 0.7 <= kind < 0.9:
        known[: 1 + int(u[0] * (T - 1) / 1.5)] = True  # go on
    if 0.5 <= kind < 0.9:
        known[T - 1 - int(u[1] * (T - 1) / 1.5) :] = True  # what came before; with the above: connect
    if kind >= 0.9:
        known = u[2:] < u[0]  # any frames
    return known & (not known.all())


@dataclass
class Batch:
    packed: patches.Packed
    levels: Tensor  # [F]
    learn: Tensor  # [B, L] bool: patches that are not given
    clips: int


@torch.no_grad()
def dit_batch(vae, tokenizer, world, config: Config, step: int, device) -> Batch:
    """Draw clips, encode, choose what is given, pack."""
    progress = step / config.steps
    images = 1.0 if progress < config.image_phase else config.images
    most = config.rows * config.tokens // 10
    index = (step * ranks() + rank()) * most + np.arange(most)
    size = world.size(index, images)
    facts = world.all_facts(index, size)
    generator = np.random.default_rng([config.seed, 2, step, rank()])
    captions = [data.short_caption(f) for f in facts]
    drop = generator.random(most) < config.dropout
    texts = [[NOTHING] if d else tokenizer.encode(c) for c, d in zip(captions, drop, strict=True)]
    grids = [vae.grid(*s) for s in size.tolist()]
    lengths = [len(x) + patches.token_count(g, config.patch) for x, g in zip(texts, grids, strict=True)]
    plan = patches.longest_prefix(lengths, config.tokens, config.rows)
    plan += [[]] * (config.rows - len(plan))
    n = sum(map(len, plan))
    size = size[:n]
    clips, _ = world.clips(index[:n], size)
    extended, whole = [None] * n, [None] * n
    for one in np.unique(size, axis=0):
        group = np.flatnonzero((size == one).all(1))
        video = to_float([clips[g] for g in group]).to(device)
        latent = vae.encode(video)
        known = np.zeros((len(group), one[0]), bool)
        if one[0] > 1:
            for k in np.flatnonzero(generator.random(len(group)) < config.given):
                u = generator.random(3 + one[0])
                known[k] = draw_known(one[0], u[0], u[1:])
        if known.any():
            given, full = sample.encode_given(vae, video, torch.from_numpy(known).to(device))
            latent = torch.where(full[:, None, :, None, None], given[:, : config.channels], latent)
        else:
            given = latent.new_zeros(len(group), config.channels + config.time_factor, *latent.shape[2:])
            full = torch.zeros(len(group), latent.shape[2], dtype=torch.bool, device=device)
        for k, g in enumerate(group):
            extended[g], whole[g] = torch.cat([latent[k], given[k]]), full[k]
    packed = patches.pack(extended, texts[:n], config.patch, config.tokens, plan)
    level = diffusion.training_levels(n, seeded(config.seed, 3, step, rank()))
    levels = [torch.where(f, 0.0, x) for f, x in zip(whole, level.to(device), strict=True)]
    table = patches.frame_levels(packed, levels)
    learn = packed.is_patch & (table[packed.frame_id] > 0)
    return Batch(packed, table, learn, n)


def dit_loss(model, batch: Batch, config: Config, step: int) -> tuple[Tensor, dict]:
    packed, p2 = batch.packed, config.patch**2
    tokens = packed.tokens.unflatten(-1, (p2, -1))  # [B, L, p p, Z + Z + ft]
    clean, given = tokens[..., : config.channels].flatten(2), tokens[..., config.channels :]
    eps = torch.randn(clean.shape, generator=seeded(config.seed, 4, step, rank())).to(clean)
    level = batch.levels[packed.frame_id][..., None]  # [B, L, 1]

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        shown = torch.cat([x.unflatten(-1, (p2, -1)), given], dim=-1).flatten(2)
        return model(shown, batch.levels, packed)

    error = diffusion.denoising_error(denoise, clean, eps, level, config.prediction)  # [B, L, D]
    error = error.mean(-1)[batch.learn]
    count = torch.tensor(float(len(error)), device=error.device)
    if dist.is_initialized():
        dist.all_reduce(count)
    loss = error.sum() / count * ranks()  # DDP takes the mean over ranks: this makes it that over tokens
    bins = (level[batch.learn][:, 0] * 4).long().clamp(max=3)
    by_level = {f"level_{b / 4}": error[bins == b].mean().item() for b in range(4) if (bins == b).any()}
    return loss, {"clips": batch.clips, "fill": packed.fill, **by_level}


# ------------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, config: Config, steps: int) -> float:
    """Rises linearly, then falls linearly to zero: the share of its peak."""
    warm = max(1, config.warmup * steps)
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def optimizers_for(model: nn.Module, lr: float) -> list:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n and "modulation" not in n]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    made = [torch.optim.AdamW(others, lr=lr if lr<4e-3 else 3e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for o in made:
        for group in o.param_groups:
            group["peak"] = group["lr"]
    return made


def fit(name, model, ema_model, loss_of, steps, lr, config, out, device, extra, on_sample=None):
    """Train `model` with `loss_of(step) -> (loss, logs)` for `steps` steps, from where out/name.pt stopped."""
    path = out / f"{name}.pt"
    made = optimizers_for(model_of(model), lr)
    step = 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        step = saved["step"]
        model_of(model).load_state_dict(saved["weights"])
        ema_model.load_state_dict(saved["ema"])
        for o, state in zip(made, saved["optimizers"], strict=True):
            o.load_state_dict(state)
    weights, averaged = list(model_of(model).parameters()), list(ema_model.parameters())
    bar = tqdm(total=steps, initial=step, desc=name, unit="step", disable=rank() > 0, mininterval=1)
    start = time.time()
    while step < steps:
        for o in made:
            for group in o.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, config, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=config_bf16(device)):
            loss, logs = loss_of(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, config.clip)
        for o in made:
            o.step()
            o.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, weights, 1 - decay)
        step += 1
        bar.update()
        if step % 20 == 0 or step == steps:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            line = {"stage": name, "step": step, "loss": loss.item(), "norm": norm.item(), "seconds": time.time() - start, **logs}
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        if step % config.save_every == 0 or step == steps:
            save(path, {"weights": model_of(model).state_dict(), "ema": ema_model.state_dict(),
                "optimizers": [o.state_dict() for o in made], "step": step, **extra})
        if on_sample and (step % config.sample_every == 0 or step == steps):
            on_sample(step)
    bar.close()


def save(path, state):
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def config_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") if os.environ.get("BF16", "1") == "1" else False


def main():
    parser = argparse.ArgumentParser()
    for f in fields(Config):
        kind = type(f.default)
        if kind is tuple:
            inner = type(f.default[0])
            parser.add_argument("--" + f.name.replace("_", "-"), type=lambda s, inner=inner: tuple(inner(x) for x in s.split(",")), default=f.default)
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default)
    config = Config(**vars(parser.parse_args()))
    out = Path(config.out or f"out/{config.preset}")
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    if os.environ.get('NT'): torch.set_num_threads(int(os.environ['NT']))
    torch.manual_seed(config.seed)
    images, labels = data.split(*data.load_digits(Path(__file__).parent / "digits.png"), held_out=False)
    world = data.World(config.world(), images, labels, config.seed)

    vae_config = VAEConfig(1, config.channels, config.time_factor, config.space_factor, config.vae_width, config.encoder_depth, config.decoder_depth, config.kl)
    vae, vae_ema = VAE(vae_config), VAE(vae_config).eval().requires_grad_(False)
    vae_ema.load_state_dict(vae.state_dict())
    common = {"world": asdict(world.config), "config": asdict(config)}

    if config.stage in ("all", "vae"):
        fit("vae", vae, vae_ema, lambda step: vae_loss(vae, world, config, step, device), config.vae_steps, config.vae_lr, config, out, device, {"model": asdict(vae_config), **common})
        vae_ema.measure_statistics(to_float(world.clips(np.arange(100_000, 100_064), (17, 32, 32))[0]) for _ in range(1))
        state = torch.load(out / "vae.pt", weights_only=True)
        state["ema"] = vae_ema.state_dict()
        save(out / "vae.pt", state)
    if config.stage == "vae":
        return
    vae_ema.load_state_dict(torch.load(out / "vae.pt", weights_only=True)["ema"])
    captions = [data.short_caption(f) for f in world.all_facts(np.arange(5000), world.size(np.arange(5000)))]
    tokenizer = Tokenizer.from_captions(captions, 512)
    p2 = config.patch**2
    dit_config = DiTConfig(p2 * (2 * config.channels + config.time_factor), p2 * config.channels, tokenizer.size, config.width, config.depth, config.heads)
    torch.manual_seed(config.seed + 1)
    dit, dit_ema = DiT(dit_config), DiT(dit_config).eval().requires_grad_(False)
    dit_ema.load_state_dict(dit.state_dict())

    def loss_of(step):
        return dit_loss(dit, dit_batch(vae_ema, tokenizer, world, config, step, device), config, step)

    fit("dit", dit, dit_ema, loss_of, config.steps, config.lr, config, out, device, {"model": asdict(dit_config), "words": tokenizer.words, **common})


if __name__ == "__main__":
    main()
