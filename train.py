"""Train everything: the VAE, then the diffusion transformer, from a CPU toy to many GPUs.

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs
    python train.py --preset tiny --data FOLDER            # your own videos and images

A preset is a set of defaults, and every one of them is a flag of the same name (--depth 8).
Progress is one integer, the step: data, noise and learning rate are functions of (seed, step,
rank). So the same command continues a run that was stopped, bit for bit as if it had not been, and
there is no random state to save.

In reading order: the configuration; what one step of each stage learns from, `loss(step)`; what is
shown; the command line. The loop that trains either is loop.py. A run's folder, out/<preset>, then
holds

    vae.pt  dit.pt    weights, their moving average (EMA), optimizer, step, and all configuration
    latents/          own clips as `--stage encode` made them, if it did (latents.py)
    log.jsonl         a line of figures every few steps; loss.png is its picture
    samples/          clips of fixed prompts and seeds, as training goes on; at its end gallery.gif
"""

import argparse
import json
import os
import signal
import sys
import zlib
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
import diffusion
import latents
import patches
import sample
from dit import DiT, DiTConfig
from folder import Folder, FolderConfig
from loop import STOP, Stage, bare, draw_loss, fit, rank, ranks, seeded
from text import NOTHING, Tokenizer
from vae import VAE, VAEConfig

HERE = Path(__file__).parent
AHEAD = 8  # batches that are made at once
Clips = data.World | Folder  # an endless, numbered sequence of them

# ------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """Every field is a flag. The defaults are those of the preset `tiny`."""

    preset: str = "tiny"
    stage: str = "all"  # vae, dit, all, or encode (own clips, once, before dit)
    out: str = ""  # the run's folder; out/<preset> if left out
    mnist: str = ""  # a folder with the IDX files of the full MNIST, to use instead of digits.png
    seed: int = 0
    # own clips (folder.py)
    data: str = ""  # a folder of videos and images to learn from, instead of the world below
    fps: int = 10  # frames a second, in training and of what is sampled
    pixels: int = 1024  # of a frame, about: larger ones are scaled down, and keep their shape
    workers: int = 2  # processes that decode
    encodings: int = 1  # times that each clip is encoded: with other given frames each time
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

    def world(self) -> "data.WorldConfig":  # quoted: here `data` is the field above
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


def vae_loss(model: nn.Module, world: Clips, c: Config, step: int) -> tuple[Tensor, dict]:
    """A batch of clips of one size, another one each step."""
    video = to_float(world.batch(step, rank(), ranks(), c.vae_batch))  # [B, C, T, H, W]
    grid = bare(model).grid(*video.shape[2:])
    noise = torch.randn(len(video), c.channels, *grid, generator=seeded(c.seed, 1, step, rank()))
    device = bare(model).mean.device
    return model(video.to(device), noise.to(device))


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


def draw_clips(vae: VAE, tokenizer: Tokenizer, world: Clips, c: Config, step: int) -> tuple:
    """The longest run of numbered clips that fits into a batch: their numbers [n], sizes [n, 3],
    captions as ids, and which is in which row."""
    most = c.rows * c.tokens // 10
    if c.data:  # a step begins where the one before ended: each clip once in an epoch
        for earlier in range(len(world.starts) - 1, step):
            draw_clips(vae, tokenizer, world, c, earlier)
    index = world.numbers(step, rank(), ranks(), most)
    size = world.size(index, images=1.0 if step < c.image_phase * c.steps else c.images)
    captions = world.captions(index, size)
    dropped = torch.rand(most, generator=seeded(c.seed, 2, step, rank())) < c.dropout
    texts = [
        [NOTHING] if drop else tokenizer.encode(caption)
        for caption, drop in zip(captions, dropped, strict=True)
    ]
    counts = [patches.token_count(vae.grid(*s), c.patch) for s in size.tolist()]
    texts = [text[: c.tokens - count] for text, count in zip(texts, counts, strict=True)]
    lengths = [len(text) + count for text, count in zip(texts, counts, strict=True)]
    plan = patches.longest_prefix(lengths, c.tokens, c.rows)
    n = sum(map(len, plan))
    if c.data:
        world.took(step, n)
    return index[:n], size[:n], texts[:n], plan + [[]] * (c.rows - len(plan))


@torch.no_grad()
def encode_group(vae: VAE, world: Clips, c: Config, index, size, random) -> list[tuple]:
    """Clips of one size (T, H, W), ready to pack. Of each: the clean latent and what the network is
    shown of given frames [Z + Z + ft, t, h, w]; the level of each frame that is given, NaN where it
    is to be learned [t]; and the time of its first frame.

    The first of the group are windows from later on in longer clips, and see their own past, a
    little noisy (see `prompting.roll`); of the next some frames are given; the rest is just clips.
    """
    T, H, W = size
    ft, cuts = c.time_factor, [0, 0]
    if T > 1:  # all of an image would be given
        cuts = np.floor(len(index) * np.cumsum([c.later, c.given]) + random.random()).astype(int)
    later, cut = min(cuts[0], len(index)), min(cuts[1], len(index))
    late, parts = np.zeros(len(index), bool), []
    if later:
        ahead = int(random.integers(1, 7))  # latent frames
        late[:later] = world.frames(index[:later]) >= T + ft * ahead  # else it has not that much
    if late.any():
        clips = world.clips(index[late], (T + ft * ahead, H, W))[0]
        latent = vae.encode(to_float(clips).to(vae.mean.device))[:, :, ahead:]  # [b, Z, t, h, w]
        for one in latent.split(1):
            past, level = int(random.integers(1, one.shape[2])), 0.2 * random.random()
            eps = torch.randn(one.shape, generator=seeded(*random.integers(2**31, size=4).tolist()))
            given = sample.noisy_context(one, past, level, eps.to(one), ft)
            held = torch.full((one.shape[2],), torch.nan)
            held[:past] = level
            parts.append((torch.cat([one, given], dim=1)[0], held))
    if not late.all():
        video = to_float(world.clips(index[~late], size)[0]).to(vae.mean.device)  # [b, C, T, H, W]
        latent = vae.encode(video)  # [b, Z, t, h, w]
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
    order = np.argsort(~late, kind="stable")  # where each part belongs
    return [(*parts[k], int(late[g])) for g, k in enumerate(np.argsort(order))]


def without_lost(clips: list, texts: list, plan: list[list[int]]) -> tuple[list, list, list]:
    """Without the clips that could not be read, None: their room in the rows stays empty."""
    kept = [k for k, clip in enumerate(clips) if clip is not None]
    if not kept:
        raise ValueError("not one clip of a whole batch could be read")
    new = {k: j for j, k in enumerate(kept)}
    plan = [[new[k] for k in row if k in new] for row in plan]
    return [clips[k] for k in kept], [texts[k] for k in kept], plan


def dit_batches(
    vae: VAE,
    tokenizer: Tokenizer,
    world: Clips,
    c: Config,
    first: int,
    count: int,
    stored: latents.Latents | None = None,
) -> list[tuple[patches.Packed, Tensor, Tensor]]:
    """The batches of `count` steps from `first` on: packed clips, whose tokens are
    [B, L, p p (Z + Z + ft)]; the level of each frame [F]; and whether it is to be learned [F].

    Many steps at once, since encoding many clips of one size at once is several times faster; and
    not at all what is `stored`.
    """
    drawn = [draw_clips(vae, tokenizer, world, c, first + k) for k in range(count)]
    index, size = (np.concatenate(x) for x in list(zip(*drawn, strict=True))[:2])
    random = np.random.default_rng([c.seed, 3, first, rank()])
    encoded = [None] * len(index)
    for one in np.unique(size, axis=0).tolist():
        group = random.permutation(np.flatnonzero((size == one).all(1)))
        if stored:
            which = world.encodings(index[group], stored.turns).tolist()
            made = [stored.read(k, one[0] == 1) if k in stored else None for k in which]
        else:
            made = encode_group(vae, world, c, index[group], one, random)
        for g, clip in zip(group, made, strict=True):
            encoded[g] = None if int(index[g]) in world.lost else clip
    batches = []
    for step, (index, _, texts, plan) in enumerate(drawn, first):
        clips, encoded = encoded[: len(index)], encoded[len(index) :]
        clips, texts, plan = without_lost(clips, texts, plan)
        n = len(clips)
        encodings, held, starts = zip(*clips, strict=True)
        level = diffusion.training_levels(n, seeded(c.seed, 4, step, rank()))
        level = diffusion.shift_level(level, c.shift)
        levels = [torch.where(h.isnan(), x, h) for x, h in zip(level, held, strict=True)]
        packed = patches.pack(encodings, texts, c.patch, c.tokens, plan, starts)
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


def shown(world: Clips) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Prompts, and a size (T, H, W) for each. Of own clips, captions and sizes of eight."""
    if isinstance(world, Folder):
        index = np.arange(8)
        return world.captions(index), list(map(tuple, world.size(index, images=0.0).tolist()))
    sizes, durations, shapes = [], world.config.durations[::-1], world.config.shapes
    for k, prompt in enumerate(GALLERY):
        shape = shapes[k % len(shapes)] if " and " not in prompt else shapes[-1 - k % 2]
        sizes.append((durations[k % len(durations)], *shape))
    return GALLERY, sizes


def write_page(run: sample.Run, path: Path, clips: list[np.ndarray], prompts: list[str]) -> None:
    """All clips beside each other; small ones are enlarged, long prompts cut short."""
    scale = min(4, max(1, 192 // max(max(clip.shape[2:]) for clip in clips)))
    prompts = [prompt if len(prompt) <= 60 else prompt[:57] + "..." for prompt in prompts]
    fps = run.config["fps"] if run.config["data"] else 6  # slow enough to see what digits do
    sample.write_gallery(path, sample.gallery(clips, prompts, scale=scale), fps)


def preview(run: sample.Run, world: Clips, path: Path, steps: int = 12) -> None:
    """A few clips of fixed prompts and seeds, to watch them get better."""
    T, (H, W) = max(world.config.durations), world.config.shapes[0]
    prompts = shown(world)[0][::2] + shown(world)[0][-1:]
    clips = sample.generate(run, prompts, (T, H, W), seeds=list(range(len(prompts))), steps=steps)
    write_page(run, path, clips, prompts)


def gallery(run: sample.Run, world: Clips, path: Path) -> None:
    """Every prompt of `shown`, each in another size and duration."""
    prompts, sizes = shown(world)
    clips = [sample.generate(run, [prompts[k]], sizes[k], seeds=[k])[0] for k in range(len(sizes))]
    write_page(run, path, clips, prompts)


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
    defaults["pixels"] *= scale**2
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
    world = open_folder(c) if c.data else moving_digits(c)
    out = Path(c.out or f"out/{c.preset}")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        part = out / "config.part"
        part.write_text(json.dumps(asdict(c), indent=2) + "\n")
        os.replace(part, out / "config.json")
    facts = {"world": asdict(world.config), "config": asdict(c)}
    with closing(world):
        if c.stage in ("vae", "all"):
            train_vae(c, world, facts, out, device)
        if c.stage == "encode":
            encode_clips(c, world, out, device)
        if c.stage in ("dit", "all"):
            train_dit(c, world, facts, out, device)
    if rank() == 0:
        draw_loss(out)


def moving_digits(c: Config) -> data.World:
    sheet = data.load_mnist(c.mnist) if c.mnist else data.load_digits(HERE / "digits.png")
    return data.World(c.world(), *data.split(*sheet, held_out=False), c.seed)


def open_folder(c: Config) -> Folder:
    """The first process looks at new files; the others wait, and then find them in the index."""
    config = FolderConfig(
        c.fps, max(c.durations), c.time_factor, c.pixels, c.space_factor * c.patch, c.images
    )
    if rank():
        dist.barrier()
    world = Folder(c.data, config, c.seed, c.workers)
    if rank() == 0 and ranks() > 1:
        dist.barrier()
    if rank() == 0:
        print(world.summary(), flush=True)
    vae = make_vae(c)
    for size in np.unique(world.sizes, axis=0).tolist():
        if (count := patches.token_count(vae.grid(*size), c.patch)) >= c.tokens:
            raise ValueError(
                f"a clip of {'{} x {} x {}'.format(*size)} has {count} tokens, and --tokens is "
                f"{c.tokens}: raise that, or lower --pixels or --durations"
            )
    return world


def make_vae(c: Config) -> VAE:
    kinds = ("channels", "time_factor", "space_factor", "encoder_depth", "decoder_depth", "kl")
    colors = 3 if c.data else 1
    return VAE(VAEConfig(colors, width=c.vae_width, **{kind: getattr(c, kind) for kind in kinds}))


def make_dit(c: Config, vocabulary: int) -> DiT:
    inputs, outputs = (c.patch**2 * n for n in (2 * c.channels + c.time_factor, c.channels))
    return DiT(DiTConfig(inputs, outputs, vocabulary, c.width, c.depth, c.heads, c.rope_base))


def check(c: Config) -> None:
    """What would fail only later, or not at all, and never with a good sentence."""
    if c.stage not in ("all", "vae", "dit", "encode"):
        raise ValueError(f"--stage {c.stage}: vae, dit, all or encode")
    if c.stage == "encode" and not c.data:
        raise ValueError("--stage encode is for --data: moving digits are made faster than read")
    if c.prediction not in diffusion.PREDICTIONS:
        raise ValueError(f"--prediction {c.prediction}: {', '.join(diffusion.PREDICTIONS)}")
    if c.width % (2 * c.heads):
        raise ValueError(f"--width {c.width} --heads {c.heads}: a multiple of {2 * c.heads}")
    counted = "steps vae_steps rows tokens save_every sample_every vae_batch fps pixels encodings"
    for name in counted.split():
        if getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: at least 1")
    vae, world = make_vae(c), c.world()
    if c.data:
        vae.grid(max(c.durations), c.space_factor, c.space_factor)
        return
    for T in (1, *c.durations):
        for H, W in (*world.shapes, *world.image_shapes):
            if min(H, W) < c.digit:
                raise ValueError(f"a digit of {c.digit} pixels does not fit into {H} x {W}")
            patches.token_count(vae.grid(T, H, W), c.patch)


def train_vae(c: Config, world: Clips, facts: dict, out: Path, device: torch.device) -> None:
    torch.manual_seed(c.seed)  # initial weights
    vae = make_vae(c)

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict]:
        return vae_loss(model, world, c, step)

    def measure(averaged: VAE) -> None:
        clips = map(to_float, world.examples(c.vae_batch))
        averaged.measure_statistics(clip.to(device) for clip in clips)

    facts = facts | {"model": asdict(vae.config)}
    fit(Stage("vae", vae, c.vae_steps, c.vae_lr, loss, facts, finish=measure), c, out, device)


def about_latents(c: Config, world: Folder, vae: VAE) -> dict:
    """What makes latents other latents: the VAE, the files, and how these are looked at."""
    weights = b"".join(x.cpu().numpy().tobytes() for x in vae.state_dict().values())
    flags = ("fps", "pixels", "seed", "later", "given")
    about = {"vae": zlib.crc32(weights), "files": world.config.files}
    return about | {"longest": max(c.durations)} | {flag: getattr(c, flag) for flag in flags}


@torch.no_grad()
def encode_clips(c: Config, world: Folder, out: Path, device: torch.device) -> None:
    """Write out/latents: each clip as `encode_group` makes it, and its first frame alone."""
    vae, folder = sample.load_vae(out, device), out / "latents"
    latents.begin(folder, about_latents(c, world, vae))
    done = latents.Latents(folder, c.channels, c.time_factor)
    shard = latents.Shard(folder, rank(), c.channels)
    groups = [group for turn in range(c.encodings) for group in world.groups(turn, c.vae_batch)]
    keys = [world.encodings(group, c.encodings).tolist() for group in groups]
    todo = [k for k in range(rank(), len(keys), ranks()) if not any(key in done for key in keys[k])]
    for j, k in enumerate(tqdm(todo, desc="encode", unit="group", disable=rank() > 0)):
        index, random = groups[k], np.random.default_rng([c.seed, 6, k])
        size = world.size(index[:1], images=0.0)[0].tolist()
        soon = np.concatenate([groups[n] for n in todo[j : j + 3]])
        world.prefetch(soon, world.size(soon, images=0.0))
        with sample.bf16(device):
            whole = encode_group(vae, world, c, index, size, random)
            first = encode_group(vae, world, c, index, [1, *size[1:]], random)
        made = zip(keys[k], first, whole, strict=True)
        there = [number not in world.lost for number in index.tolist()]
        shard.append([clip for clip, read in zip(made, there, strict=True) if read])
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        latents.end(folder, c.encodings)


def train_dit(c: Config, world: Clips, facts: dict, out: Path, device: torch.device) -> None:
    vae = sample.load_vae(out, device)
    known = world.captions(np.arange(5000), world.size(np.arange(5000)))
    tokenizer = Tokenizer.from_captions(known, 4096)
    stored, folder = None, out / "latents"
    if c.data and folder.exists():
        latents.complete(folder, about_latents(c, world, vae))
        stored = latents.Latents(folder, c.channels, c.time_factor)
    torch.manual_seed(c.seed + 1)  # initial weights
    dit = make_dit(c, tokenizer.size)
    ahead = {}  # batches by step: made a few at a time, from steps that are multiples of that

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict]:
        if step not in ahead:
            ahead.clear()
            first = step - step % AHEAD
            made = dit_batches(vae, tokenizer, world, c, first, AHEAD, stored)
            ahead.update(enumerate(made, first))
            if c.data and not stored:  # its pixels are decoded while we train
                steps = range(first + AHEAD, first + 2 * AHEAD)
                coming = [draw_clips(vae, tokenizer, world, c, step)[:2] for step in steps]
                world.prefetch(*map(np.concatenate, zip(*coming, strict=True)))
        return dit_loss(model, *ahead[step], c, step)

    def show(averaged: DiT, step: int) -> None:
        run = sample.Run(vae, averaged, tokenizer, facts["world"], facts["config"])
        preview(run, world, out / "samples" / f"{step:06d}.gif")

    facts = facts | {"model": asdict(dit.config), "words": tokenizer.words}
    averaged = fit(Stage("dit", dit, c.steps, c.lr, loss, facts, show), c, out, device)
    if rank() == 0:
        run = sample.Run(vae, averaged, tokenizer, facts["world"], facts["config"])
        gallery(run, world, out / "gallery.gif")
        measure = "" if c.data else f"; python evaluate.py prompts --run {out} measures it"
        print(f"wrote {out / 'gallery.gif'}{measure}")


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
