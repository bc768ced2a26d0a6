"""Train everything: VAE, language model, diffusion transformer; from a CPU toy to many GPUs.

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs

A preset is a set of defaults, and every one of them is a flag of the same name (--depth 8).
Progress is one integer, the step: data, noise and learning rate are functions of (seed, step,
rank). So the same command continues a run that was stopped, bit for bit as if it had not been, and
there is no random state to save.

In reading order: the configuration; what one step of each stage learns from, `loss(step)`; what is
shown; the command line. The loop that trains either is loop.py. A run's folder, out/<preset>, then
holds

    vae.pt  text.pt  dit.pt  weights, their moving average (EMA), optimizer, step, configuration
    log.jsonl                a line of figures every few steps; loss.png is its picture
    samples/  gallery.gif    clips of fixed prompts and seeds, as training goes on and at its end
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
from torch import Tensor, nn

import data
import diffusion
import patches
import recaption
import sample
from dit import DiT, DiTConfig
from language import Language, LanguageConfig, LanguageModel
from loop import STOP, Stage, bare, draw_loss, fit, rank, ranks, seeded
from prompting import expand, load_language
from text import Tokenizer
from vae import VAE, VAEConfig

HERE = Path(__file__).parent
AHEAD = 8  # batches that are made at once

# ------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """Every field is a flag. The defaults are those of the preset `tiny`."""

    preset: str = "tiny"
    stage: str = "all"  # vae, text, dit or all
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
    vae_batch: int = 8  # clips a step, of the largest size; more of smaller ones
    vae_lr: float = 6e-3
    # the language model (language.py, recaption.py)
    captions: str = "recaptioned"  # or short: what the diffusion transformer learns from
    labelled: float = 0.1  # share of the clips that have a descriptive caption
    short: float = 0.3  # share of the clips whose short caption is learned from all the same
    text_width: int = 128
    text_depth: int = 3
    text_heads: int = 4
    text_steps: int = 1000
    text_batch: int = 16  # clips a step, of the largest size; more of smaller ones
    text_lr: float = 1e-2
    # the diffusion transformer (dit.py)
    patch: int = 2  # latents; the side of a patch
    width: int = 128
    depth: int = 6
    heads: int = 4
    prediction: str = "x"  # x, v or eps: what the network says (diffusion.py)
    steps: int = 2000
    rows: int = 8  # of a batch, on each process
    tokens: int = 256  # in a row
    lr: float = 1e-2
    image_phase: float = 0.3  # share of the steps, at the start, that see images only
    dropout: float = 0.1  # share of the captions that are dropped, for classifier-free guidance
    given: float = 0.2  # share of the clips in which some frames are given
    later: float = 0.1  # share of the clips that are windows from later on, their past given
    shift: float = 3.0  # above 1: more training, and more sampling steps, at high noise levels
    rope_base: float = 10.0  # larger for larger grids (dit.py)
    # either training
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    ema: float = 0.99
    clip: float = 1.0  # the most that the gradient's norm may be
    save_every: int = 200  # steps
    sample_every: int = 500  # steps

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


def vae_loss(model: nn.Module, world: data.World, c: Config, step: int) -> tuple[Tensor, dict]:
    """A batch of clips of one size, another one each step, in all as many pixels as there fit."""
    every = 8  # videos have images in them: their first frames are images to a causal VAE
    T, H, W = world.size([step], images=float(step % every == 0))[0].tolist()
    largest = max(c.durations) * max(h * w for h, w in world.config.shapes)
    count = min(max(1, c.vae_batch * largest // (T * H * W)), 4 * c.vae_batch)
    first = (step * ranks() + rank()) * 4 * c.vae_batch
    video = to_float(world.clips(first + np.arange(count), (T, H, W))[0])  # [B, C, T, H, W]
    grid = bare(model).grid(T, H, W)
    noise = torch.randn(count, c.channels, *grid, generator=seeded(c.seed, 1, step, rank()))
    device = bare(model).mean.device
    return model(video.to(device), noise.to(device))


# ---------------------------------------------------------------------- stage 2: the language model


def text_loss(
    model: nn.Module, vae: VAE, tokenizer: Tokenizer, world: data.World, c: Config, step: int
) -> tuple[Tensor, dict]:
    """Labelled clips of one size, another one each step, and prompts of others, of any sizes."""
    images = step < 0.4 * c.text_steps or step % 4 == 0  # on small images digits are learned sooner
    size = world.size([step], images=float(images))[0]
    largest = max(c.durations) * max(h * w for h, w in world.config.shapes)
    count = min(max(1, c.text_batch * largest // int(size.prod())), 4 * c.text_batch)
    batch = step * ranks() + rank()
    index = recaption.labelled_clips(world, batch, 4 * c.text_batch, c.labelled)[:count]
    clips, facts = world.clips(index, size)
    latents = list(vae.encode(to_float(clips).to(vae.mean.device)))  # [Z, t, h, w] each
    captions = [tokenizer.encode(data.descriptive_caption(fact)) for fact in facts]
    pairs = recaption.expander_pairs(world, tokenizer, batch, 2 * c.text_batch, c.labelled)
    total, tokens = model(latents, captions, *pairs)
    everywhere = tokens.float()
    if dist.is_initialized():  # as in dit_loss
        dist.all_reduce(everywhere)
    return total / everywhere * ranks(), {"clips": len(clips)}


# --------------------------------------------------------------------------------- stage 3: the DiT


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


def draw_clips(vae: VAE, tokenizer: Tokenizer, world: data.World, c: Config, step: int) -> tuple:
    """A run of numbered clips that is long enough to fill a batch: their numbers [n], sizes [n, 3]
    and captions, None where the captioner is to write one."""
    most = c.rows * c.tokens // 10
    index = (step * ranks() + rank()) * most + np.arange(most)
    size = world.size(index, images=1.0 if step < c.image_phase * c.steps else c.images)
    facts = world.all_facts(index, size)
    u = torch.rand(2, most, generator=seeded(c.seed, 2, step, rank()))
    short = 1.0 if c.captions == "short" else c.short
    captions = recaption.captions_to_learn(world, index, facts, c.labelled, short, u[1])
    captions = ["" if drop else x for x, drop in zip(captions, u[0] < c.dropout, strict=True)]
    # How many fit is known once all captions are. With short ones for those, no fewer would.
    least = ["a 7 moving left" if caption is None else caption for caption in captions]
    n = sum(map(len, plan_rows(vae, tokenizer, c, least, size)[1]))
    return index[:n], size[:n], captions[:n]


def plan_rows(
    vae: VAE, tokenizer: Tokenizer, c: Config, captions: list[str], size: np.ndarray
) -> tuple[list[list[int]], list[list[int]]]:
    """The captions as ids, cut to what fits beside the patches; which clips go into which row, as
    many of a run as there is room for."""
    counts = [patches.token_count(vae.grid(*s), c.patch) for s in size.tolist()]
    pairs = zip(captions, counts, strict=True)
    texts = [tokenizer.encode(x)[: max(1, c.tokens - count)] for x, count in pairs]
    lengths = [len(text) + count for text, count in zip(texts, counts, strict=True)]
    return texts, patches.longest_prefix(lengths, c.tokens, c.rows)


@torch.no_grad()
def encode_group(vae: VAE, world: data.World, c: Config, index, size, random) -> list[tuple]:
    """Clips of one size (T, H, W), ready to pack. Of each: the clean latent and what the network is
    shown of given frames [Z + Z + ft, t, h, w]; the level of each frame that is given, NaN where it
    is to be learned [t]; the time of its first frame; and the latent [Z, t, h, w] to be captioned.

    The first of the group are windows from later on in longer clips, and see their own past, a
    little noisy (see `prompting.roll`); of the next some frames are given; the rest is just clips.
    """
    T, H, W = size
    ft, cuts = c.time_factor, [0, 0]
    if T > 1:  # all of an image would be given
        cuts = np.floor(len(index) * np.cumsum([c.later, c.given]) + random.random()).astype(int)
    later, cut = min(cuts[0], len(index)), min(cuts[1], len(index))
    parts, starts, seen = [], [1] * later + [0] * (len(index) - later), []
    if later:
        ahead = int(random.integers(1, 7))  # latent frames
        clips = world.clips(index[:later], (T + ft * ahead, H, W))[0]
        latent = vae.encode(to_float(clips).to(vae.mean.device))  # [b, Z, ahead + t, h, w]
        seen += latent[:, :, : latent.shape[2] - ahead]  # a caption tells how the clip begins
        for one in latent[:, :, ahead:].split(1):
            past, level = int(random.integers(1, one.shape[2])), 0.2 * random.random()
            eps = torch.randn(one.shape, generator=seeded(*random.integers(2**31, size=4).tolist()))
            given = sample.noisy_context(one, past, level, eps.to(one), ft)
            held = torch.full((one.shape[2],), torch.nan)
            held[:past] = level
            parts.append((torch.cat([one, given], dim=1)[0], held))
    if later < len(index):
        video = to_float(world.clips(index[later:], size)[0]).to(vae.mean.device)  # [b, C, T, H, W]
        latent = vae.encode(video)  # [b, Z, t, h, w]
        seen += latent
        given = latent.new_zeros(len(video), c.channels + ft, *latent.shape[2:])
        whole = torch.zeros(len(video), latent.shape[2], dtype=torch.bool, device=video.device)
        some = cut - later
        if some:
            known = np.stack([draw_known(T, random.random(3 + T)) for _ in range(some)])
            known = torch.from_numpy(known).to(video.device)
            given[:some], whole[:some] = sample.encode_given(vae, video[:some], known)
        latent = torch.where(whole[:, None, :, None, None], given[:, : c.channels], latent)
        held = torch.where(whole, 0.0, torch.nan).cpu()
        parts += zip(torch.cat([latent, given], dim=1), held, strict=True)
    return [(*part, *more) for part, *more in zip(parts, starts, seen, strict=True)]


def dit_batches(
    vae: VAE,
    tokenizer: Tokenizer,
    language: Language | None,
    world: data.World,
    c: Config,
    first: int,
    count: int,
) -> list[tuple[patches.Packed, Tensor, Tensor]]:
    """The batches of `count` steps from `first` on: packed clips, whose tokens are
    [B, L, p p (Z + Z + ft)]; the level of each frame [F]; and whether it is to be learned [F].

    Many steps at once, since encoding many clips of one size at once is several times faster, and
    so is captioning.
    """
    drawn = [draw_clips(vae, tokenizer, world, c, first + k) for k in range(count)]
    index, size = (np.concatenate(x) for x in list(zip(*drawn, strict=True))[:2])
    random = np.random.default_rng([c.seed, 3, first, rank()])
    encoded = [None] * len(index)
    for one in np.unique(size, axis=0).tolist():
        group = random.permutation(np.flatnonzero((size == one).all(1)))
        made = encode_group(vae, world, c, index[group], one, random)
        for g, clip in zip(group, made, strict=True):
            encoded[g] = clip
    captions = [caption for *_, some in drawn for caption in some]
    captions = recaption.fill_in(language, captions, [clip[-1] for clip in encoded])
    batches = []
    for step, (_, size, _) in enumerate(drawn, first):
        texts, plan = plan_rows(vae, tokenizer, c, captions[: len(size)], size)
        n = sum(map(len, plan))
        latents, held, starts, _ = zip(*encoded[:n], strict=True)
        captions, encoded = captions[len(size) :], encoded[len(size) :]
        level = diffusion.training_levels(n, seeded(c.seed, 4, step, rank()))
        level = diffusion.shift_level(level, c.shift)
        levels = [torch.where(h.isnan(), x, h) for x, h in zip(level, held, strict=True)]
        plan += [[]] * (c.rows - len(plan))
        packed = patches.pack(latents, texts[:n], c.patch, c.tokens, plan, starts)
        free = patches.frame_levels(packed, [h.isnan().float() for h in held]) > 0
        batches.append((packed, patches.frame_levels(packed, levels), free))
    return batches


def dit_loss(
    model: nn.Module, packed: patches.Packed, levels: Tensor, free: Tensor, c: Config, step: int
) -> tuple[Tensor, dict]:
    """The mean error over the patches of all ranks, of frames that are not given."""
    tokens = packed.tokens.unflatten(-1, (c.patch**2, -1))  # [B, L, p p, Z + Z + ft]
    clean, given = tokens[..., : c.channels].flatten(2), tokens[..., c.channels :]
    eps = torch.randn(clean.shape, generator=seeded(c.seed, 5, step, rank())).to(clean)
    level = levels[packed.frame_id]  # [B, L]

    def denoise(x: Tensor, _: Tensor) -> Tensor:
        shown = torch.cat([x.unflatten(-1, (c.patch**2, -1)), given], dim=-1).flatten(2)
        return model(shown, levels, packed)

    error = diffusion.denoising_error(denoise, clean, eps, level[..., None], c.prediction)
    learn = packed.is_patch & free[packed.frame_id]  # [B, L]
    error, level = error.mean(-1)[learn], level[learn]  # [patches]
    count = torch.tensor(float(len(error)), device=error.device)
    if dist.is_initialized():  # DDP takes the mean over ranks: this makes it the mean over patches
        dist.all_reduce(count)
    fourth = (4 * level).long().clamp(max=3)
    bins = [round(error[fourth == k].mean().nan_to_num().item(), 4) for k in range(4)]
    logs = {"clips": len(packed.grids), "fill": packed.fill, "loss_by_level": bins}
    return error.sum() / count * ranks(), logs


# ------------------------------------------------------------------------------------ what is shown

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
    seeds = list(range(len(prompts)))
    told = expand(run, prompts, (T, H, W), seeds)
    clips = sample.generate(run, told, (T, H, W), seeds, steps=steps)
    sample.write_gallery(path, sample.gallery(clips, prompts))


def gallery(run: sample.Run, world: data.WorldConfig, path: Path) -> None:
    """Every prompt of `GALLERY`, each in another size and duration."""
    clips = []
    for k, prompt in enumerate(GALLERY):
        T, shape = world.durations[::-1][k % len(world.durations)], world.shapes
        H, W = shape[k % len(shape)] if " and " not in prompt else shape[-1 - k % 2]
        clips += sample.generate(run, expand(run, [prompt], (T, H, W), [k]), (T, H, W), seeds=[k])
    sample.write_gallery(path, sample.gallery(clips, GALLERY))


# ------------------------------------------------------------------------------------- command line


# The columns in which they differ. "small" is for one GPU or a patient CPU; the larger ones are
# DiT's B, L and XL, for many GPUs.
COLUMNS = (
    "width depth heads patch channels space_factor vae_width digit rows tokens lr rope_base "
    "vae_lr vae_steps steps"
)
PRESETS = {  # the comments: parameters of the diffusion transformer, and the world's first shape
    "tiny":  (),  # the defaults of Config: 1.9 M, 32 x 32
    "small": (384, 12, 6, 1, 8, 8, 96, 28, 16, 1024, 3e-3, 10.0, 3e-3, 5_000, 20_000),
    "base":  (768, 12, 12, 2, 16, 8, 128, 56, 16, 4096, 1e-3, 100.0, 2e-3, 50_000, 200_000),
    "large": (1024, 24, 16, 2, 16, 8, 192, 56, 16, 4096, 1e-3, 100.0, 1e-3, 100_000, 300_000),
    "xl":    (1152, 28, 16, 2, 16, 8, 256, 56, 16, 8192, 1e-3, 100.0, 1e-3, 100_000, 400_000),
}  # fmt: skip


def parse() -> Config:
    """The preset's values, and the flags that say otherwise."""

    def many(kind):
        return lambda text: tuple(kind(part) for part in text.split(","))

    def shape(text: str) -> str:
        height, width = map(int, text.split("x"))
        return f"{height}x{width}"

    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="tiny")
    preset = first.parse_known_args()[0].preset
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
        parser.add_argument(flag, type=kind, default=value, help=f"default: {shown}")
    return Config(**vars(parser.parse_args()))


def main(c: Config) -> None:
    check(c)
    if "RANK" in os.environ:  # torchrun started several of us
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    place = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: STOP.append(number))
    sheet = data.load_mnist(c.mnist) if c.mnist else data.load_digits(HERE / "digits.png")
    world = data.World(c.world(), *data.split(*sheet, held_out=False), c.seed)
    out = Path(c.out or f"out/{c.preset}")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        part = out / "config.part"
        part.write_text(json.dumps(asdict(c), indent=2) + "\n")
        os.replace(part, out / "config.json")
    facts = {"world": asdict(world.config), "config": asdict(c)}
    if c.stage in ("vae", "all"):
        train_vae(c, world, facts, out, device)
    if c.stage in ("text", "all"):
        train_text(c, world, facts, out, device)
    if c.stage in ("dit", "all"):
        train_dit(c, world, facts, out, device)
    if rank() == 0:
        draw_loss(out)


def make_vae(c: Config) -> VAE:
    kinds = ("channels", "time_factor", "space_factor", "encoder_depth", "decoder_depth", "kl")
    return VAE(VAEConfig(width=c.vae_width, **{kind: getattr(c, kind) for kind in kinds}))


def make_dit(c: Config, vocabulary: int) -> DiT:
    inputs, outputs = (c.patch**2 * n for n in (2 * c.channels + c.time_factor, c.channels))
    return DiT(DiTConfig(inputs, outputs, vocabulary, c.width, c.depth, c.heads, c.rope_base))


def check(c: Config) -> None:
    """What would fail only later, or not at all, and never with a good sentence."""
    if c.stage not in ("all", "vae", "text", "dit"):
        raise ValueError(f"--stage {c.stage}: vae, text, dit or all")
    if c.captions not in ("recaptioned", "short"):
        raise ValueError(f"--captions {c.captions}: recaptioned or short")
    if not 0 < c.labelled <= 1:
        raise ValueError(f"--labelled {c.labelled}: more than 0, and at most 1")
    if c.prediction not in diffusion.PREDICTIONS:
        raise ValueError(f"--prediction {c.prediction}: {', '.join(diffusion.PREDICTIONS)}")
    if c.width % (2 * c.heads):
        raise ValueError(f"--width {c.width} --heads {c.heads}: a multiple of {2 * c.heads}")
    if c.text_width % (2 * c.text_heads):
        multiple = 2 * c.text_heads
        raise ValueError(f"--text-width {c.text_width}: a multiple of {multiple}")
    counts = "steps vae_steps text_steps rows tokens save_every sample_every vae_batch text_batch"
    for name in counts.split():
        if getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: at least 1")
    vae, world = make_vae(c), c.world()
    for T in (1, *c.durations):
        for H, W in (*world.shapes, *world.image_shapes):
            if min(H, W) < c.digit:
                raise ValueError(f"a digit of {c.digit} pixels does not fit into {H} x {W}")
            patches.token_count(vae.grid(T, H, W), c.patch)


def train_vae(c: Config, world: data.World, facts: dict, out: Path, device: torch.device) -> None:
    torch.manual_seed(c.seed)  # initial weights
    vae = make_vae(c)

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict]:
        return vae_loss(model, world, c, step)

    def measure(averaged: VAE) -> None:
        sizes = [(max(c.durations), *shape) for shape in world.config.shapes]
        clips = (to_float(world.clips(np.arange(32), size)[0]) for size in sizes)
        averaged.measure_statistics(clip.to(device) for clip in clips)

    facts = facts | {"model": asdict(vae.config)}
    fit(Stage("vae", vae, c.vae_steps, c.vae_lr, loss, facts, finish=measure), c, out, device)


def train_text(c: Config, world: data.World, facts: dict, out: Path, device: torch.device) -> None:
    vae, tokenizer = sample.load_vae(out, device), recaption.make_tokenizer(world, c.labelled)
    torch.manual_seed(c.seed + 2)  # initial weights
    sizes = c.channels, c.patch, tokenizer.size
    shape = {"width": c.text_width, "depth": c.text_depth, "heads": c.text_heads}
    model = LanguageModel(LanguageConfig(*sizes, **shape))

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict]:
        return text_loss(model, vae, tokenizer, world, c, step)

    facts = facts | {"model": asdict(model.config), "words": tokenizer.words}
    fit(Stage("text", model, c.text_steps, c.text_lr, loss, facts), c, out, device)


def train_dit(c: Config, world: data.World, facts: dict, out: Path, device: torch.device) -> None:
    vae, language = sample.load_vae(out, device), None
    if c.captions == "recaptioned":
        language = load_language(out, device)
    tokenizer = language.tokenizer if language else recaption.make_tokenizer(world, c.labelled)
    torch.manual_seed(c.seed + 1)  # initial weights
    dit = make_dit(c, tokenizer.size)
    ahead = {}  # batches by step: made a few at a time, from steps that are multiples of that

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict]:
        if step not in ahead:
            ahead.clear()
            first = step - step % AHEAD
            made = dit_batches(vae, tokenizer, language, world, c, first, AHEAD)
            ahead.update(enumerate(made, first))
        return dit_loss(model, *ahead[step], c, step)

    def show(averaged: DiT, step: int) -> None:
        run = sample.Run(vae, averaged, tokenizer, facts["world"], facts["config"], language)
        preview(run, world.config, out / "samples" / f"{step:06d}.gif")

    facts = facts | {"model": asdict(dit.config), "words": tokenizer.words}
    averaged = fit(Stage("dit", dit, c.steps, c.lr, loss, facts, show), c, out, device)
    if rank() == 0:
        run = sample.Run(vae, averaged, tokenizer, facts["world"], facts["config"], language)
        gallery(run, world.config, out / "gallery.gif")
        print(f"wrote {out / 'gallery.gif'}; python evaluate.py prompts --run {out} measures it")


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
