"""Train everything: the VAE, then the diffusion transformer, from a CPU toy to many GPUs.

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs

A preset is a set of defaults, and every one of them is a flag of the same name (--depth 8).
Progress is one integer, the step: data, noise and learning rate are functions of (seed, step). So
the same command continues a run that was stopped, bit for bit as if it had not been, on however
many processes, and there is no random state to save.

In reading order: the configuration; what one step of each stage learns from, `loss(step)`; what is
shown; the command line. The loop that trains either is loop.py. A run's folder, out/<preset>, then
holds

    vae.pt  dit.pt    weights, their moving average (EMA), optimizer, step, and all configuration
    log.jsonl         a line of figures every few steps; loss.png is its picture
    samples/          clips of fixed prompts and seeds, as training goes on; at its end gallery.gif
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn

import cost
import data
import diffusion
import patches
import sample
from dit import DiT, DiTConfig
from loop import STOP, Stage, bare, deal, fit, rank, ranks, read_log, seeded
from text import NOTHING, Tokenizer
from vae import VAE, VAEConfig

HERE = Path(__file__).parent
AHEAD = 8  # steps whose batches are made at once

# ------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """Every field is a flag. The defaults are those of the preset `tiny`."""

    preset: str = "tiny"
    stage: str = "all"  # vae, dit or all
    out: str = ""  # the run's folder; out/<preset> if left out
    mnist: str = ""  # a folder with the IDX files of the full MNIST, to use instead of digits.png
    seed: int = 0
    # the world (data.py)
    digit: int = 14  # pixels; a digit's box
    durations: tuple[int, ...] = (9, 17)  # frames of videos
    shapes: tuple[str, ...] = ("32x32", "24x40", "40x24", "32x48", "48x32")  # height x width
    image_shapes: tuple[str, ...] = ("16x16", "24x24")  # more shapes, of images only
    two_digits: float = 0.4  # share of the clips
    images: float = 0.3  # share of the clips that are single frames
    # the VAE (vae.py)
    channels: int = 3
    time_factor: int = 4
    space_factor: int = 4
    vae_width: int = 64
    encoder_depth: int = 2
    decoder_depth: int = 3
    kl: float = 1e-3
    vae_steps: int = 1000
    vae_batch: int = 8  # clips a step, on all processes, of the largest size; more of smaller ones
    vae_lr: float = 6e-3
    # the diffusion transformer (dit.py)
    patch: int = 2  # latents; the side of a patch
    width: int = 128
    depth: int = 6
    heads: int = 4
    prediction: str = "x"  # x, v or eps: what the network says (diffusion.py)
    steps: int = 2000
    rows: int = 8  # of a step, on all processes together
    tokens: int = 256  # in a row
    lr: float = 1e-2
    image_phase: float = 0.3  # share of the steps, at the start, that see images only
    dropout: float = 0.1  # share of the captions that are dropped, for classifier-free guidance
    given: float = 0.2  # share of the clips in which some frames are given
    later: float = 0.1  # share of the clips that are windows from later on, their past given
    shift: float = 3.0  # above 1: more training, more sampling steps, at high noise; below: at low
    rope_base: float = 10.0  # larger for larger grids (dit.py)
    # either training
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    ema: float = 0.99
    clip: float = 1.0  # the most that the gradient's norm may be
    accumulate: int = 1  # parts, one after the other, in which a process does its share of a step
    shard: bool = False  # FSDP2: the transformer's weights are spread over all processes
    compile: bool = False  # the transformer's blocks: faster on a GPU, after a minute or so
    recompute: bool = False  # the backward pass makes activations again: slower, far less memory
    save_every: int = 200  # steps
    sample_every: int = 500  # steps
    # what it would cost (cost.py)
    dry_run: bool = False  # say it, and train nothing
    gpu: str = "h100"
    gpus: int = 1
    mfu: float = 0.4  # the share of the GPU's peak that is reached
    clips: int = 0  # how many to see; as many as in `steps` if left out

    def world(self) -> data.WorldConfig:
        shapes, more = (
            tuple(tuple(int(side) for side in shape.split("x")) for shape in group)
            for group in (self.shapes, self.image_shapes)
        )
        durations, images, two = self.durations, self.images, self.two_digits
        return data.WorldConfig(self.digit, durations, images, shapes, more, two)


# --------------------------------------------------------------------------------- stage 1: the VAE


def to_float(clips: list[np.ndarray]) -> Tensor:
    """uint8 [C, T, H, W] each -> [B, C, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).float() / 127.5 - 1


def vae_loss(
    model: nn.Module, world: data.World, c: Config, part: int, step: int
) -> tuple[Tensor, dict]:
    """A batch of clips of one size, another one each step, in all as many pixels as there fit.
    Of them this part: as its share of the mean over all."""
    every = 8  # videos have images in them: their first frames are images to a causal VAE
    T, H, W = world.size([step], images=float(step % every == 0))[0].tolist()
    largest = max(c.durations) * max(h * w for h, w in world.config.shapes)
    count = min(max(1, c.vae_batch * largest // (T * H * W)), 4 * c.vae_batch)
    mine = np.arange(rank() * c.accumulate + part, count, ranks() * c.accumulate)
    video = to_float(world.clips(step * 4 * c.vae_batch + mine, (T, H, W))[0])  # [B, C, T, H, W]
    grid = bare(model).grid(T, H, W)
    noise = torch.randn(count, c.channels, *grid, generator=seeded(c.seed, 1, step))[mine]
    device = bare(model).mean.device
    loss, logs = model(video.to(device), noise.to(device))
    return loss * (len(mine) / count), logs


# --------------------------------------------------------------------------------- stage 2: the DiT


def draw_known(T: int, u: np.ndarray) -> np.ndarray:
    """Which frames of a clip are given: [T] bool. u [3 + T] is uniform in [0, 1)."""
    known, kind = np.zeros(T, bool), u[0]
    some = (u[1:3] * (T - 1) / 1.5).astype(int)  # at most two thirds
    if kind < 0.3:  # animate an image
        known[0] = True
    if 0.3 <= kind < 0.5 or 0.7 <= kind < 0.9:  # extend; with the next: connect
        known[: 1 + some[0]] = True
    if 0.5 <= kind < 0.9:  # extend backward
        known[T - 1 - some[1] :] = True
    if kind >= 0.9:  # any frames
        known = u[3:] < u[1]
    return known & (not known.all())


@dataclass
class Clip:
    """What is decided of a clip before any pixel of it is made. It costs nothing, and depends on
    (seed, index, step) alone: every process decides on the whole batch, then makes its own part."""

    index: int
    size: tuple[int, int, int]  # (T, H, W)
    text: list[int]
    patches: int  # in each of its t latent frames
    known: np.ndarray  # [T] bool: frames that are given
    past: int  # latent frames that are given as a window's past, a little noisy; mostly none
    level: np.ndarray  # [t] float: of each latent frame; NaN until the batch says
    free: np.ndarray  # [t] bool: whether it is to be learned

    @property
    def tokens(self) -> int:
        return len(self.text) + self.patches * len(self.free)

    @property
    def alike(self) -> tuple:  # clips of which this is the same are encoded together
        return self.size, self.past > 0


def draw_clip(vae: VAE, c: Config, index: int, size: list[int], text: list[int]) -> Clip:
    """A window from later on in a longer clip, which sees its own past (see `prompting.roll`); or
    some frames are given; or just a clip."""
    random = np.random.default_rng([c.seed, 3, index])
    kind, T, (t, h, w) = random.random(), size[0], vae.grid(*size)
    known, past, level = np.zeros(T, bool), 0, np.full(t, np.nan)
    if T > 1 and kind < c.later:  # all of an image would be given
        past = int(random.integers(1, t))
        level[:past] = 0.2 * random.random()
    elif T > 1 and kind < c.later + c.given:
        known = draw_known(T, random.random(3 + T))
        frames = np.append(np.repeat(known[:1], c.time_factor - 1), known)  # as `encode_given`
        level[frames.reshape(t, -1).all(1)] = 0
    count = patches.token_count((1, h, w), c.patch)
    return Clip(index, tuple(size), text, count, known, past, level, np.isnan(level))


def draw_clips(
    vae: VAE, tokenizer: Tokenizer, world: data.World, c: Config, step: int
) -> tuple[list[Clip], list[list[int]]]:
    """The batch of a step, on all processes: the longest run of numbered clips that fits into it,
    and which of them are in which row."""
    most = c.rows * c.tokens // 10
    index = step * most + np.arange(most)
    size = world.size(index, images=1.0 if step < c.image_phase * c.steps else c.images)
    kinds, kind = np.unique(size, axis=0, return_inverse=True)
    count = np.array([patches.token_count(vae.grid(*one), c.patch) for one in kinds.tolist()])
    count = count[kind.reshape(-1)]  # [most] patches
    few = max(1, int((count.cumsum() <= c.rows * c.tokens).sum()))  # no more can fit
    captions = [data.short_caption(facts) for facts in world.all_facts(index[:few], size[:few])]
    dropped = torch.rand(few, generator=seeded(c.seed, 2, step)) < c.dropout
    texts = [
        [NOTHING] if drop else tokenizer.encode(caption)
        for caption, drop in zip(captions, dropped, strict=True)
    ]
    lengths = [len(text) + n for text, n in zip(texts, count[:few].tolist(), strict=True)]
    plan = patches.longest_prefix(lengths, c.tokens, c.rows)
    n = sum(map(len, plan))
    drawn = zip(index[:n].tolist(), size[:n].tolist(), texts[:n], strict=True)
    clips = [draw_clip(vae, c, *of) for of in drawn]
    levels = diffusion.training_levels(len(clips), seeded(c.seed, 4, step))
    levels = diffusion.shift_level(levels, c.shift).tolist()
    for clip, level in zip(clips, levels, strict=True):
        clip.level[clip.free] = level
    return clips, plan


@torch.no_grad()
def encode_alike(
    vae: VAE, world: data.World, c: Config, clips: list[Clip], ahead: int
) -> list[Tensor]:
    """Clips of one size, all of them windows or none: of each the clean latent and what the network
    is shown of given frames, [Z + Z + ft, t, h, w]. Windows begin `ahead` latent frames later."""
    (T, H, W), windows = clips[0].alike
    ft, index = c.time_factor, [clip.index for clip in clips]
    size = (T + ft * ahead, H, W) if windows else (T, H, W)
    video = to_float(world.clips(index, size)[0]).to(vae.mean.device)  # [b, C, T, H, W]
    latent = vae.encode(video)  # [b, Z, t, h, w]
    if windows:
        latent, given = latent[:, :, ahead:], []
        for clip, one in zip(clips, latent.split(1), strict=True):
            eps = torch.randn(one.shape, generator=seeded(c.seed, 6, clip.index)).to(one)
            given.append(sample.noisy_context(one, clip.past, clip.level[0], eps, ft))
        return list(torch.cat([latent, torch.cat(given)], dim=1))
    given = latent.new_zeros(len(clips), c.channels + ft, *latent.shape[2:])
    if some := [k for k, clip in enumerate(clips) if clip.known.any()]:
        known = torch.from_numpy(np.stack([clips[k].known for k in some])).to(video.device)
        given[some], held = sample.encode_given(vae, video[some], known)
        held = held[:, None, :, None, None]  # [some, 1, t, 1, 1]
        latent[some] = torch.where(held, given[some, : c.channels], latent[some])
    return list(torch.cat([latent, given], dim=1))


@dataclass
class Part:
    """What one process learns from at once: some rows of the batch of a step."""

    packed: patches.Packed  # tokens [B, L, p p (Z + Z + ft)]
    levels: Tensor  # [F] the level of each frame
    free: Tensor  # [F] bool: whether it is to be learned
    rows: list[int]  # which of the step's rows these are, as many as hold anything
    patches: int  # how many patches are to be learned in the step, on all processes


def dit_parts(
    vae: VAE, tokenizer: Tokenizer, world: data.World, c: Config, first: int, count: int
) -> list[list[Part]]:
    """This process's parts of `count` steps from `first` on.

    Many steps at once, since encoding many clips of one size at once is several times faster.
    """
    parts, drawn, alike = ranks() * c.accumulate, [], {}
    for step in range(first, first + count):
        clips, plan = draw_clips(vae, tokenizer, world, c, step)
        if len(plan) < parts:
            raise ValueError(f"the clips of step {step} fill {len(plan)} rows, for {parts} parts")
        # What a row costs: the linear maps (6 d n) and attention (n^2) of each clip, see cost.py.
        tokens = [[clips[k].tokens for k in row] for row in plan]
        dealt = deal([sum(6 * c.width * n + n * n for n in row) for row in tokens], parts)
        own = dealt[rank() * c.accumulate : (rank() + 1) * c.accumulate]
        drawn.append((clips, plan, own))
        for clip in (clips[k] for rows in own for row in rows for k in plan[row]):
            alike.setdefault(clip.alike, []).append(clip)
    ahead = int(np.random.default_rng([c.seed, 7, first]).integers(1, 7))  # latent frames
    latents = {}  # by a clip's number
    for some in alike.values():
        made = encode_alike(vae, world, c, some, ahead)
        latents |= zip((clip.index for clip in some), made, strict=True)
    most = -(-c.rows // parts)  # rows of a part: always the same number, some may be empty
    return [
        [make_part(c, clips, plan, rows, latents, most) for rows in own]
        for clips, plan, own in drawn
    ]


def make_part(
    c: Config, clips: list[Clip], plan: list[list[int]], rows: list[int], latents: dict, most: int
) -> Part:
    """Some rows of a batch, packed."""
    here = [k for row in rows for k in plan[row]]  # clips of the batch -> of this part
    place = {k: j for j, k in enumerate(here)}
    layout = [[place[k] for k in plan[row]] for row in rows] + [[]] * (most - len(rows))
    mine = [clips[k] for k in here]
    texts, starts = [clip.text for clip in mine], [int(clip.past > 0) for clip in mine]
    latents = [latents[clip.index] for clip in mine]
    packed = patches.pack(latents, texts, c.patch, c.tokens, layout, starts)
    level = patches.frame_levels(packed, [torch.from_numpy(clip.level).float() for clip in mine])
    free = patches.frame_levels(packed, [torch.from_numpy(clip.free).float() for clip in mine])
    learned = sum(int(clip.free.sum()) * clip.patches for clip in clips)
    return Part(packed, level, free > 0, rows, learned)


def dit_loss(model: nn.Module, part: Part, c: Config, step: int) -> tuple[Tensor, dict]:
    """The error over the patches of this part, of frames that are not given, divided by how many
    such patches there are on all processes: shares that add up to the mean over patches."""
    packed, levels = part.packed, part.levels
    tokens = packed.tokens.unflatten(-1, (c.patch**2, -1))  # [B, L, p p, Z + Z + ft]
    clean, given = tokens[..., : c.channels].flatten(2), tokens[..., c.channels :]
    eps = torch.zeros_like(clean)
    for k, row in enumerate(part.rows):  # each row's noise is its own, whoever has it
        eps[k] = torch.randn(clean.shape[1:], generator=seeded(c.seed, 5, step, row)).to(clean)
    level = levels[packed.frame_id]  # [B, L]

    def denoise(x: Tensor, _: Tensor) -> Tensor:
        shown = torch.cat([x.unflatten(-1, (c.patch**2, -1)), given], dim=-1).flatten(2)
        return model(shown, levels, packed)

    error = diffusion.denoising_error(denoise, clean, eps, level[..., None], c.prediction)
    learn = packed.is_patch & part.free[packed.frame_id]  # [B, L]
    error, level = error.mean(-1)[learn], level[learn]  # [patches]
    fourth = (4 * level).long().clamp(max=3)
    bins = [round(error[fourth == k].mean().nan_to_num().item(), 4) for k in range(4)]
    logs = {"clips": len(packed.grids), "fill": packed.fill, "loss_by_level": bins}
    return error.sum() / part.patches, logs


# ------------------------------------------------------------------------------------ what is shown


def draw_loss(out: Path, width: int = 900, height: int = 300) -> None:
    """loss.png: both losses on a logarithmic scale, smoothed a little."""
    names = list(dict.fromkeys(line["stage"] for line in read_log(out)))
    picture = Image.new("RGB", (width, (height + 40) * len(names) + 10), (24, 24, 32))
    pen = ImageDraw.Draw(picture)
    for k, name in enumerate(names):
        lines = [line for line in read_log(out) if line["stage"] == name]
        lines = [line for line in lines if np.isfinite(line["loss"])]
        if not lines:
            continue
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
    part = out / ".loss.part.png"
    picture.save(part)
    os.replace(part, out / "loss.png")


GALLERY = [  # prompts of the last page of training; the sizes take turns
    "a 0 moving left", "a 1 moving right", "a 2 moving up", "a 3 moving down",
    "a 4 moving right", "a 5 moving left", "a 6 moving down", "a 7 moving up",
    "an 8 moving left", "a 9 moving right", "a 3 moving up and an 8 moving right",
    "a 7 moving left and a 1 moving right",
]  # fmt: skip


def preview(run: sample.Run, world: data.WorldConfig, path: Path, steps: int = 12) -> None:
    """Eight clips of fixed prompts and seeds, to watch them get better."""
    T, (H, W) = max(world.durations), world.shapes[0]
    prompts = GALLERY[::2] + GALLERY[-1:]
    clips = sample.generate(run, prompts, (T, H, W), seeds=list(range(len(prompts))), steps=steps)
    sample.write_gallery(path, sample.gallery(clips, prompts))


def gallery(run: sample.Run, world: data.WorldConfig, path: Path) -> None:
    """Every prompt of `GALLERY`, each in another size and duration."""
    clips = []
    for k, prompt in enumerate(GALLERY):
        T, shape = world.durations[::-1][k % len(world.durations)], world.shapes
        H, W = shape[k % len(shape)] if " and " not in prompt else shape[-1 - k % 2]
        clips += sample.generate(run, [prompt], (T, H, W), seeds=[k])
    sample.write_gallery(path, sample.gallery(clips, GALLERY))


# ------------------------------------------------------------------------------------- command line


# The columns in which they differ. "small" is for one GPU or a patient CPU; the larger ones are
# DiT's B, L and XL, for many GPUs.
COLUMNS = (
    "width depth heads patch channels space_factor vae_width vae_batch digit rows tokens lr "
    "rope_base vae_lr vae_steps steps"
)
PRESETS = {  # the comments: parameters of the diffusion transformer, and the world's first shape
    "tiny":  (),  # the defaults of Config: 1.9 M, 32 x 32
    "small": (384, 12, 6, 1, 8, 8, 96, 16, 28, 16, 1024, 3e-3, 10.0, 3e-3, 5_000, 20_000),
    "base":  (768, 12, 12, 2, 16, 8, 128, 32, 56, 16, 4096, 1e-3, 100.0, 2e-3, 50_000, 200_000),
    "large": (1024, 24, 16, 2, 16, 8, 192, 64, 56, 32, 4096, 1e-3, 100.0, 1e-3, 100_000, 300_000),
    "xl":    (1152, 28, 16, 2, 16, 8, 256, 64, 56, 32, 8192, 1e-3, 100.0, 1e-3, 100_000, 400_000),
    "3b":    (2304, 32, 18, 2, 16, 8, 384, 128, 56, 64, 8192, 5e-4, 100.0, 1e-3, 100_000, 400_000),
}  # fmt: skip


def parse(argv: list[str] | None = None) -> Config:
    """The preset's values, and the flags that say otherwise."""

    def many(kind):
        return lambda text: tuple(kind(part) for part in text.split(","))

    def shape(text: str) -> str:
        height, width = map(int, text.split("x"))
        return f"{height}x{width}"

    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="tiny")
    preset = first.parse_known_args(argv)[0].preset
    parser = sample.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if preset not in PRESETS:
        parser.error(f"no preset {preset}: there are {', '.join(PRESETS)}")
    scale = 1 if preset == "tiny" else 2 if preset == "small" else 4
    defaults = asdict(Config()) | dict(zip(COLUMNS.split(), PRESETS[preset], strict=False))
    for name in ("shapes", "image_shapes"):  # bigger digits in a bigger world
        sides = [[int(x) * scale for x in shape.split("x")] for shape in defaults[name]]
        defaults[name] = tuple(f"{h}x{w}" for h, w in sides)
    for field in fields(Config):
        flag, value = "--" + field.name.replace("_", "-"), defaults[field.name]
        kind = many(type(value[0])) if isinstance(value, tuple) else type(value)
        kind = many(shape) if "shapes" in field.name else kind
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        how = {"type": kind}
        if isinstance(value, bool):
            how, shown = {"action": argparse.BooleanOptionalAction}, "no"
        parser.add_argument(flag, default=value, help=f"default: {shown}", **how)
    return Config(**vars(parser.parse_args(argv)))


def main(c: Config) -> None:
    check(c)
    if c.dry_run:
        return print(dry_run(c))
    place = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # torchrun started several of us
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: STOP.append(number))
    world = make_world(c)
    out = Path(c.out or f"out/{c.preset}")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        part = out / "config.part"
        part.write_text(json.dumps(asdict(c), indent=2) + "\n")
        os.replace(part, out / "config.json")
    facts = {"world": asdict(world.config), "config": asdict(c)}
    if c.stage in ("vae", "all"):
        train_vae(c, world, facts, out, device)
    if c.stage in ("dit", "all"):
        train_dit(c, world, facts, out, device)
    if rank() == 0:
        draw_loss(out)
    if dist.is_initialized():
        dist.destroy_process_group()


def dry_run(c: Config, steps: int = 4) -> str:
    """What the DiT's training would cost, from the clips of some steps at its end."""
    world = make_world(c)
    tokenizer = make_tokenizer(world)
    with torch.device("meta"):  # shapes without numbers
        networks = {"vae": make_vae(c), "dit": make_dit(c, tokenizer.size)}
    first = max(0, c.steps - steps)
    drawn = [draw_clips(networks["vae"], tokenizer, world, c, k)[0] for k in range(first, c.steps)]
    lengths = [[clip.tokens for clip in clips] for clips in drawn]
    frames = [sum(1 + len(clip.free) for clip in clips) for clips in drawn]
    return cost.report(networks, lengths, frames, c)


def make_world(c: Config) -> data.World:
    sheet = data.load_mnist(c.mnist) if c.mnist else data.load_digits(HERE / "digits.png")
    return data.World(c.world(), *data.split(*sheet, held_out=False), c.seed)


def make_tokenizer(world: data.World) -> Tokenizer:
    known = world.all_facts(np.arange(5000), world.size(np.arange(5000)))
    return Tokenizer.from_captions([data.short_caption(facts) for facts in known], 512)


def make_vae(c: Config) -> VAE:
    kinds = ("channels", "time_factor", "space_factor", "encoder_depth", "decoder_depth", "kl")
    return VAE(VAEConfig(width=c.vae_width, **{kind: getattr(c, kind) for kind in kinds}))


def make_dit(c: Config, vocabulary: int) -> DiT:
    inputs, outputs = (c.patch**2 * n for n in (2 * c.channels + c.time_factor, c.channels))
    return DiT(DiTConfig(inputs, outputs, vocabulary, c.width, c.depth, c.heads, c.rope_base))


def check(c: Config) -> None:
    """What would fail only later, or not at all, and never with a good sentence."""
    if c.stage not in ("all", "vae", "dit"):
        raise ValueError(f"--stage {c.stage}: vae, dit or all")
    if c.prediction not in diffusion.PREDICTIONS:
        raise ValueError(f"--prediction {c.prediction}: {', '.join(diffusion.PREDICTIONS)}")
    if c.shift <= 0:
        raise ValueError(f"--shift {c.shift}: above 0; 1 does not shift")
    if c.width % (2 * c.heads):
        raise ValueError(f"--width {c.width} --heads {c.heads}: a multiple of {2 * c.heads}")
    least = "steps vae_steps rows tokens save_every sample_every vae_batch accumulate gpus"
    for name in least.split():
        if getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: at least 1")
    if c.gpu not in cost.GPUS:
        raise ValueError(f"--gpu {c.gpu}: {', '.join(cost.GPUS)}")
    if not 0 < c.mfu <= 1:
        raise ValueError(f"--mfu {c.mfu}: a share, more than 0 and at most 1")
    processes = c.gpus if c.dry_run else int(os.environ.get("WORLD_SIZE", 1))
    for name in ("rows", "vae_batch"):
        if getattr(c, name) < processes * c.accumulate:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(c, name)} cannot be dealt out to {processes} "
                f"processes in --accumulate {c.accumulate} parts: at least "
                f"{processes * c.accumulate}"
            )
    if c.shard and "RANK" not in os.environ and not c.dry_run:
        raise ValueError("--shard spreads weights over processes: start them with torchrun")
    vae, world = make_vae(c), c.world()
    for T in (1, *c.durations):
        for H, W in (*world.shapes, *world.image_shapes):
            if min(H, W) < c.digit:
                raise ValueError(f"a digit of {c.digit} pixels does not fit into {H} x {W}")
            patches.token_count(vae.grid(T, H, W), c.patch)


def train_vae(c: Config, world: data.World, facts: dict, out: Path, device: torch.device) -> None:
    torch.manual_seed(c.seed)  # initial weights
    vae = make_vae(c)

    def loss(model: nn.Module, step: int, part: int) -> tuple[Tensor, dict]:
        return vae_loss(model, world, c, part, step)

    def measure(averaged: VAE) -> None:
        sizes = [(max(c.durations), *shape) for shape in world.config.shapes]
        clips = (to_float(world.clips(np.arange(32), size)[0]) for size in sizes)
        averaged.measure_statistics(clip.to(device) for clip in clips)

    facts = facts | {"model": asdict(vae.config)}
    fit(Stage("vae", vae, c.vae_steps, c.vae_lr, loss, facts, finish=measure), c, out, device)


def train_dit(c: Config, world: data.World, facts: dict, out: Path, device: torch.device) -> None:
    vae = sample.load_vae(out, device)
    tokenizer = make_tokenizer(world)
    torch.manual_seed(c.seed + 1)  # initial weights
    dit = make_dit(c, tokenizer.size)
    dit.recompute = c.recompute
    if c.compile:
        for block in dit.blocks:
            block.compile()
    ahead = {}  # parts by step: made a few at a time, from steps that are multiples of that

    def loss(model: nn.Module, step: int, part: int) -> tuple[Tensor, dict]:
        if step not in ahead:
            ahead.clear()
            first = step - step % AHEAD
            made = dit_parts(vae, tokenizer, world, c, first, AHEAD)
            ahead.update(enumerate(made, first))
        return dit_loss(model, ahead[step][part], c, step)

    def show(averaged: DiT, step: int) -> None:
        run = sample.Run(vae, averaged, tokenizer, facts["world"], facts["config"])
        preview(run, world.config, out / "samples" / f"{step:06d}.gif")

    facts = facts | {"model": asdict(dit.config), "words": tokenizer.words}
    averaged = fit(Stage("dit", dit, c.steps, c.lr, loss, facts, show, large=True), c, out, device)
    if rank() == 0:
        run = sample.Run(vae, averaged, tokenizer, facts["world"], facts["config"])
        gallery(run, world.config, out / "gallery.gif")
        print(f"wrote {out / 'gallery.gif'}; python evaluate.py prompts --run {out} measures it")


def command(c: Config) -> None:
    try:
        main(c)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    command(parse())
