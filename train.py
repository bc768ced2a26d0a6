"""Train everything: VAE, language model, diffusion transformer; from a CPU toy to many GPUs.

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs
    python train.py --preset tiny --data FOLDER            # your own videos and images

A preset is a set of defaults, and every one of them is a flag of the same name (--depth 8).
Progress is one integer, the step: data, noise and learning rate are functions of (seed, step). So
the same command continues a run that was stopped, bit for bit as if it had not been, on however
many processes, and there is no random state to save.

In reading order: the configuration; the loss of each stage; what is shown; the command line. The
loop that trains them is loop.py; what the transformer learns from in a step, batches.py. A run's
folder, out/<preset>, then holds

    vae.pt dit.pt    weights, their moving average (EMA), optimizer, step, and all configuration
    text.pt          the same of the language model, if it was trained
    captions.jsonl   what it wrote of clips that had no caption: to read, edit and learn from
    dit.best-*.pt    the EMA weights of the few checkpoints that did best on clips held back
    *.safetensors    EMA weights alone, as `--stage export` makes them of each .pt (weights.py)
    latents/         own clips as `--stage encode` made them, if it did (latents.py)
    log.jsonl        a line of figures every few steps; loss.png is its picture
    samples/         clips of fixed prompts and seeds, as training goes on; at its end gallery.gif
"""

import argparse
import json
import os
import signal
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn

import cost
import data
import diffusion
import latents
import patches
import recaption
import sample
import weights
from batches import (
    FARTHEST,
    HELD_BACK,
    Part,
    Source,
    captions_of,
    dit_parts,
    draw_steps,
    encode_clips,
    own_clips,
    own_rows,
)
from dit import DiT, DiTConfig
from folder import Folder, FolderConfig, read_lines
from language import LONGEST, LanguageConfig, LanguageModel
from loop import STOP, Stage, fit, rank, ranks, read_log, seeded
from prompting import load_language, to_float
from text import Tokenizer
from vae import VAE, VAEConfig

HERE = Path(__file__).parent
AHEAD = 8  # steps whose batches are made at once
Clips = data.World | Folder  # an endless, numbered sequence of them

# ------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """Every field is a flag. The defaults are those of the preset `tiny`."""

    preset: str = "tiny"
    stage: str = "all"  # vae, text, dit; all needed; encode (own clips, before dit); or export
    out: str = ""  # the run's folder; out/<preset> if left out
    init_from: str = ""  # another run's folder, or a file of weights: what training starts from
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
    two_digits: float = 0.5  # share of the clips
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
    # captions, and the language model that writes them (recaption.py, language.py)
    captions: str = "recaptioned"  # what the transformer learns from: prompts, noisy or recaptioned
    labelled: float = 0.1  # share of the clips that have a descriptive caption
    short: float = 0.1  # share of the clips that keep their short caption where recaptioned
    train_clips: int = 20_000  # of the world, to learn from again and again; of prompts: endless
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
    steps: int = 5000
    rows: int = 8  # of a step, on all processes together
    tokens: int = 256  # in a row
    lr: float = 1e-2
    image_phase: float = 0.2  # share of the steps, at the start, that see images only
    dropout: float = 0.1  # share of the captions that are dropped, for classifier-free guidance
    given: float = 0.3  # share of the clips in which some frames are given
    later: float = 0.15  # share of the clips that are windows from later on, their past given
    shift: float = 3.0  # above 1: more training, more sampling steps, at high noise; below: at low
    rope_base: float = 10.0  # larger for larger grids (dit.py)
    # either training
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    ema: float = 0.99
    clip: float = 1.0  # the most that the gradient's norm may be
    # Parts in which a process does its share of a step, one after the other, to take less memory. A
    # process alone on a CPU does them side by side, which is faster. 0: two there, one elsewhere
    accumulate: int = 0
    shard: bool = False  # FSDP2: the transformer's weights are spread over all processes
    compile: bool = False  # the transformer's blocks: faster on a GPU, after a minute or so
    recompute: bool = False  # the backward pass makes activations again: slower, far less memory
    save_every: int = 200  # steps
    keep: int = 2  # of the transformer's checkpoints, as dit.best-<step>.pt; 0: only the last
    sample_every: int = 500  # steps
    # what it would cost (cost.py)
    dry_run: bool = False  # say it, and train nothing
    gpu: str = "h100"
    gpus: int = 1
    mfu: float = 0.4  # the share of the GPU's peak that is reached
    clips: int = 0  # how many to see; as many as in `steps` if left out

    def world(self) -> "data.WorldConfig":  # quoted: here `data` is the field above
        shapes, more = (
            tuple(tuple(int(side) for side in shape.split("x")) for shape in group)
            for group in (self.shapes, self.image_shapes)
        )
        durations, images, two = self.durations, self.images, self.two_digits
        return data.WorldConfig(self.digit, durations, images, shapes, more, two)


# --------------------------------------------------------------------------------- stage 1: the VAE


def vae_batch(
    vae: VAE, world: Clips, c: Config, step: int, part: int
) -> tuple[Tensor, Tensor, float]:
    """Clips of one size, another one each step, in all as many pixels as there fit. Of them this
    part: video [B, C, T, H, W], noise [B, Z, t, h, w], and its share in the mean over all."""
    part, parts = rank() * c.accumulate + part, ranks() * c.accumulate
    clips, share = world.batch(step, part, parts, c.vae_batch)
    video, device = to_float(clips), vae.mean.device
    grid = vae.grid(*video.shape[2:])
    whole = 4 * (c.vae_batch + parts)  # each clip's noise is its own, whoever has it
    noise = torch.randn(whole, c.channels, *grid, generator=seeded(c.seed, 1, step))[part::parts]
    return video.to(device), noise[: len(video)].to(device), share


# ---------------------------------------------------------------------- stage 2: the language model


Lessons = tuple[list, int]  # of each (clips, prompts, captions to write); all their tokens


def text_batch(source: Source, c: Config, step: int, part: int) -> Lessons:
    """Labelled clips of one size, another one each step; a third of them beside their short
    captions, of half of these how they go on, and some asking for another digit; and short captions
    of others, of any sizes. This part of them, and how many tokens there are in all parts.

    Of a clip that comes with a short caption all is shown half of the time, as captions are
    written; else its beginning, which is what users give."""
    world, tokenizer = source.world, source.tokenizer
    images = step < 0.25 * c.text_steps or step % 5 == 0  # small images teach digits sooner
    size = world.size([step], images=float(images))[0]
    count = world.as_many(c.text_batch, size)
    index = recaption.labelled_clips(world, step, 4 * c.text_batch, c.labelled)
    others, index = index[: 2 * c.text_batch], index[:count]
    again, u = index[::3], np.random.default_rng([c.seed, 10, step]).random((len(index[::3]), 6))
    later = c.time_factor * (1 + (u[:, 1] * FARTHEST).astype(int))  # frames
    later *= (u[:, 0] < 0.5) & (size[0] > 1)
    other = ((u[:, 4] < 0.25) & (later == 0)) * (1 + (u[:, 5] * 9).astype(int))
    share = np.where(u[:, 2] < 0.5, u[:, 3], 1.0)  # of a clip's latents that are shown
    sizes = np.tile(size, (count, 1))
    captions = recaption.told_and_written(world, tokenizer, index, sizes)[1]
    beside = again, sizes[::3], later, other
    briefs, texts = recaption.told_and_written(world, tokenizer, *beside)
    told, answers = recaption.told_and_written(world, tokenizer, others, world.size(others))
    tokens = sum(len(text) + 1 for text in captions + texts + answers)  # with each END
    part = slice(rank() * c.accumulate + part, None, ranks() * c.accumulate)
    seen = recaption.encoded(source.vae, world, index[part], sizes[part])
    parts = recaption.encoded(source.vae, world, again[part], sizes[::3][part], later[part])
    parts = [z[:, : 1 + int(x * len(z[0]))] for z, x in zip(parts, share[part], strict=True)]
    lessons = [
        (seen, [], captions[part]),
        (parts, briefs[part], texts[part]),
        ([], told[part], answers[part]),
    ]
    return lessons, tokens


def own_text_batch(source: Source, c: Config, step: int, part: int) -> Lessons:
    """The same of own clips, all of which have a caption. Nobody wrote a short and a long one of
    the same clip, so that there is no expander."""
    part, parts = rank() * c.accumulate + part, ranks() * c.accumulate
    world, tokenizer = source.world, source.tokenizer
    groups = world.taught(step, parts, c.text_batch)

    def told(index: np.ndarray) -> list[list[int]]:
        return [tokenizer.encode(said)[: LONGEST - 1] for said in world.captions(index)]

    tokens = sum(len(text) + 1 for index, _ in groups for text in told(index))
    coming = [world.taught(step + k, parts, c.text_batch)[part] for k in range(8)]
    for index, size in coming:
        clips = world.clips(index, size)[0]
        here = [j for j, number in enumerate(index.tolist()) if number not in world.lost]
        if here:  # else the whole group is broken: the next one instead
            break
    else:
        raise ValueError(f"{world.root}: not one of many clips can be read any more")
    world.prefetch(*coming[1])  # decoded while we learn
    video = to_float([clips[j] for j in here]).to(source.vae.mean.device)
    with torch.no_grad():
        seen = list(source.vae.encode(video))  # [Z, t, h, w] each
    return [(seen, [], told(index[here]))], tokens


# --------------------------------------------------------------------------------- stage 3: the DiT


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


def held_back(source: Source, c: Config) -> tuple[int, list[Part]]:
    """A step that no training gets to, and this process's parts of it: a loss on these, with their
    fixed noise, tells which checkpoint is better. Of own clips none is held back: they are the
    first of the first epoch, of any size."""
    if not c.data:
        return HELD_BACK, dit_parts(replace(source, written=None), c, HELD_BACK, 1)[0]
    world = copy(source.world)
    world.starts = [0]  # it counts for itself
    return 0, dit_parts(replace(source, world=world), replace(c, image_phase=0.0), 0, 1)[0]


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
    seeds = list(range(len(prompts)))
    told = sample.expand(run, prompts, (T, H, W), seeds)
    clips = sample.generate(run, told, (T, H, W), seeds, steps=steps)
    write_page(run, path, clips, prompts)


def gallery(run: sample.Run, world: Clips, path: Path) -> None:
    """Every prompt of `shown`, each in another size and duration."""
    prompts, sizes = shown(world)
    told = [sample.expand(run, [prompts[k]], sizes[k], [k]) for k in range(len(sizes))]
    clips = [sample.generate(run, told[k], sizes[k], seeds=[k])[0] for k in range(len(sizes))]
    write_page(run, path, clips, prompts)


# ------------------------------------------------------------------------------------- command line


# The columns in which they differ. "small" is for one GPU or a patient CPU; the larger ones are
# DiT's B, L and XL, for many GPUs.
COLUMNS = (
    "width depth heads patch channels space_factor vae_width vae_batch digit rows tokens lr "
    "rope_base vae_lr vae_steps steps"
)
PRESETS = {  # the comments: parameters of the diffusion transformer, and the world's first shape
    "tiny":  (),  # the defaults of Config: 2.0 M, 32 x 32
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
    defaults["pixels"] *= scale**2
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
    c = Config(**vars(parser.parse_args(argv)))
    elsewhere = c.dry_run or "RANK" in os.environ or torch.cuda.is_available()
    most = min(torch.get_num_threads(), c.rows, c.vae_batch, c.text_batch)
    best = 1 if elsewhere else max(1, min(2, most))
    return replace(c, accumulate=c.accumulate or best)


def main(c: Config) -> None:
    check(c)
    out = Path(c.out or f"out/{c.preset}")
    if c.dry_run:
        return print(dry_run(c))
    if c.stage == "export":
        return print("wrote", ", ".join(map(str, weights.export(out))))
    place = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # torchrun started several of us
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: STOP.append(number))
    world = make_world(c)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        part = out / "config.part"
        part.write_text(json.dumps(asdict(c), indent=2) + "\n")
        os.replace(part, out / "config.json")
    facts = {"world": asdict(world.config), "config": asdict(c)}
    with closing(world):
        if c.stage in ("vae", "all"):
            train_vae(c, world, facts, out, device)
        if c.stage == "text" or (c.stage, c.captions) == ("all", "recaptioned"):
            if c.data:
                caption_folder(c, world, facts, out, device)
            else:
                train_text(c, world, facts, out, device)
                if c.captions == "recaptioned":
                    caption_world(c, world, out, device)
        if c.stage == "encode":
            encode(c, world, out, device)
        if c.stage in ("dit", "all"):
            train_dit(c, world, facts, out, device)
    if rank() == 0:
        draw_loss(out)
    if dist.is_initialized():
        dist.destroy_process_group()


def dry_run(c: Config, steps: int = 4) -> str:
    """What the DiT's training would cost, from the clips of some steps at its end."""
    world = make_world(c)
    tokenizer = make_tokenizer(world, c)
    with torch.device("meta"):  # shapes without numbers
        networks = {"vae": make_vae(c), "dit": make_dit(c, tokenizer.size)}
    first, source = max(0, c.steps - steps), Source(networks["vae"], tokenizer, world)
    drawn = [clips for clips, _ in draw_steps(source, c, first, c.steps - first)]
    lengths = [[clip.tokens for clip in clips] for clips in drawn]
    words = [sum(len(clip.text) for clip in clips) for clips in drawn]
    frames = [sum(1 + len(clip.free) for clip in clips) for clips in drawn]
    return cost.report(networks, lengths, words, frames, c)


def make_world(c: Config) -> Clips:
    if c.data:
        return open_folder(c)
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


def make_tokenizer(world: Clips, c: Config) -> Tokenizer:
    if c.captions != "prompts" and not c.data:
        return recaption.make_tokenizer(world, c.labelled)
    index = np.arange(5000)
    return Tokenizer.from_captions(world.captions(index, world.size(index)), 4096)


def make_vae(c: Config) -> VAE:
    kinds = ("channels", "time_factor", "space_factor", "encoder_depth", "decoder_depth", "kl")
    colors = 3 if c.data else 1
    return VAE(VAEConfig(colors, width=c.vae_width, **{kind: getattr(c, kind) for kind in kinds}))


def make_dit(c: Config, vocabulary: int) -> DiT:
    inputs, outputs = (c.patch**2 * n for n in (2 * c.channels + c.time_factor, c.channels))
    return DiT(DiTConfig(inputs, outputs, vocabulary, c.width, c.depth, c.heads, c.rope_base))


def check(c: Config) -> None:
    """What would fail only later, or not at all, and never with a good sentence."""
    if c.stage not in ("all", "vae", "text", "dit", "encode", "export"):
        raise ValueError(f"--stage {c.stage}: vae, text, dit, all, encode or export")
    if Path(c.init_from).is_file() and c.stage not in weights.STAGES:
        raise ValueError(
            f"--init-from {c.init_from} is of one network: say --stage vae, text or dit"
        )
    if c.stage == "encode" and not c.data:
        raise ValueError("--stage encode is for --data: moving digits are made faster than read")
    if c.captions not in ("prompts", "noisy", "recaptioned"):
        raise ValueError(f"--captions {c.captions}: prompts, noisy or recaptioned")
    if c.data and c.captions == "noisy":
        raise ValueError("--captions noisy is for moving digits: --data comes with its own")
    if not 0 < c.labelled <= 1:
        raise ValueError(f"--labelled {c.labelled}: a share, more than 0 and at most 1")
    if c.prediction not in diffusion.PREDICTIONS:
        raise ValueError(f"--prediction {c.prediction}: {', '.join(diffusion.PREDICTIONS)}")
    if c.shift <= 0:
        raise ValueError(f"--shift {c.shift}: above 0; 1 does not shift")
    if c.width % (2 * c.heads):
        raise ValueError(f"--width {c.width} --heads {c.heads}: a multiple of {2 * c.heads}")
    if c.text_width % (2 * c.text_heads):
        multiple = f"a multiple of {2 * c.text_heads}"
        raise ValueError(f"--text-width {c.text_width} --text-heads {c.text_heads}: {multiple}")
    least = "steps vae_steps rows tokens save_every sample_every vae_batch accumulate gpus fps "
    least += "pixels encodings text_steps text_batch train_clips"
    for name in least.split():
        if getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: at least 1")
    if c.keep < 0:
        raise ValueError(f"--keep {c.keep}: 0 or more")
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
    if c.data:
        vae.grid(max(c.durations), c.space_factor, c.space_factor)
        return
    for T in (1, *c.durations):
        for H, W in (*world.shapes, *world.image_shapes):
            if min(H, W) < c.digit:
                raise ValueError(f"a digit of {c.digit} pixels does not fit into {H} x {W}")
            patches.token_count(vae.grid(T, H, W), c.patch)


def starting_from(c: Config, out: Path, name: str) -> dict:
    """The weights that --init-from has for a network, and what else is in their file; {} where it
    has none. What was trained here already comes first: it goes on. A network keeps the words that
    its embeddings are of; other words can still be spelled."""
    if not c.init_from:
        return {}
    saved = [path for path in (out / f"{name}.pt", out / f"{name}.before.pt") if path.exists()]
    path = saved[0] if saved else Path(c.init_from)
    if path.is_dir():
        found = [weights.find(path, other) for other in weights.STAGES]
        if not any(other.exists() for other in found):
            raise FileNotFoundError(f"--init-from {path}: no vae, text or dit is in that folder")
        path = weights.find(path, name)
        if not path.exists():  # it did not train this one
            return {}
    return weights.read(path, "cpu") | {"path": path}


def train_vae(c: Config, world: data.World, facts: dict, out: Path, device: torch.device) -> None:
    torch.manual_seed(c.seed)  # initial weights
    vae, start = make_vae(c), starting_from(c, out, "vae")
    weights.begin_with(vae, start)

    def batch(step: int, part: int) -> tuple[Tensor, Tensor, float]:
        return vae_batch(vae, world, c, step, part)

    def loss(model: nn.Module, batch: tuple, step: int) -> tuple[Tensor, dict]:
        video, noise, share = batch
        mean, logs = model(video, noise)
        return mean * share, logs

    def measure(averaged: VAE) -> None:
        clips = map(to_float, world.examples(c.vae_batch))
        averaged.measure_statistics(clip.to(device) for clip in clips)

    sees = {name: value for name, value in facts["world"].items() if name != "captions"}
    facts = facts | {"world": sees, "model": asdict(vae.config)}  # other captions: the same VAE
    stage = Stage("vae", vae, c.vae_steps, c.vae_lr, batch, loss, facts, finish=measure)
    fit(stage, c, out, device)


def train_text(c: Config, world: Clips, facts: dict, out: Path, device: torch.device) -> None:
    start = starting_from(c, out, "text")
    known = make_tokenizer(world, c) if c.data else recaption.make_tokenizer(world, c.labelled)
    tokenizer = Tokenizer(start.get("words") or known.words)
    source = Source(sample.load_vae(out, device), tokenizer, world)
    torch.manual_seed(c.seed + 2)  # initial weights
    sizes = c.channels, c.patch, tokenizer.size
    shape = {"width": c.text_width, "depth": c.text_depth, "heads": c.text_heads}
    model = LanguageModel(LanguageConfig(*sizes, **shape))
    weights.begin_with(model, start)

    def batch(step: int, part: int) -> Lessons:
        return (own_text_batch if c.data else text_batch)(source, c, step, part)

    def loss(model: nn.Module, lessons: Lessons, step: int) -> tuple[Tensor, dict]:
        """The sum over this part's tokens, divided by how many there are in all parts."""
        lessons, tokens = lessons
        return model(lessons)[0] / tokens, {"tokens": tokens}

    facts = facts | {"model": asdict(model.config), "words": tokenizer.words}
    fit(Stage("text", model, c.text_steps, c.text_lr, batch, loss, facts), c, out, device)


def caption_world(c: Config, world: data.World, out: Path, device: torch.device) -> None:
    """Write out/captions.jsonl: what the captioner says of all that the DiT learns from."""
    language, vae = load_language(out, device), sample.load_vae(out, device)
    source = Source(vae, language.tokenizer, world, written={})
    index = np.arange(c.train_clips)
    size = np.concatenate([world.size(index, images=share) for share in (c.images, 1.0)])
    index = np.tile(index, 2)  # as they are, and as images
    missing = [caption is None for caption in captions_of(source, c, index, size)]
    told = index[missing], size[missing]
    with sample.bf16(device):
        written = recaption.write_world(language, vae, world, out / "captions.jsonl", *told)
    if rank() == 0:
        print(f"wrote {written} captions to {out / 'captions.jsonl'}")


def caption_folder(c: Config, world: Folder, facts: dict, out: Path, device) -> None:
    """Learn from the files that have a caption, and write out/captions.jsonl for the others."""
    if c.stage == "all" and len(world.missing()) in (0, len(world.shown)):
        return  # nothing to write, or to learn from
    some = world.captioned()
    train_text(c, some, facts | {"world": asdict(some.config)}, out, device)
    language, vae = load_language(out, device), sample.load_vae(out, device)
    written = recaption.write_missing(language, vae, world, out / "captions.jsonl")
    if rank() == 0:
        print(f"wrote {written} captions to {out / 'captions.jsonl'}: read and edit them; the "
              "transformer learns from them where a file has no caption of its own")  # fmt: skip


def about_latents(c: Config, world: Folder, vae: VAE) -> dict:
    """What makes latents other latents: the VAE, the files, and how these are looked at."""
    weights = b"".join(x.cpu().numpy().tobytes() for x in vae.state_dict().values())
    flags = ("fps", "pixels", "seed", "later", "given")
    about = {"vae": zlib.crc32(weights), "files": world.config.files}
    return about | {"longest": max(c.durations)} | {flag: getattr(c, flag) for flag in flags}


def encode(c: Config, world: Folder, out: Path, device: torch.device) -> None:
    """Write out/latents: own clips as the DiT will see them."""
    vae, folder = sample.load_vae(out, device), out / "latents"
    latents.begin(folder, about_latents(c, world, vae))
    done = latents.Latents(folder, c.channels, c.time_factor)
    shard = latents.Shard(folder, rank(), c.channels)
    encode_clips(Source(vae, Tokenizer([]), world), c, shard, done)
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        latents.end(folder, c.encodings)


def train_dit(c: Config, world: Clips, facts: dict, out: Path, device: torch.device) -> None:
    if c.data:
        count = world.add_captions(read_lines(out / "captions.jsonl"))
        facts = facts | {"world": asdict(world.config)}
        if count and rank() == 0:
            print(f"{count} more files have captions, in {out / 'captions.jsonl'}", flush=True)
    start = starting_from(c, out, "dit")
    tokenizer = Tokenizer(start.get("words") or make_tokenizer(world, c).words)
    source = Source(sample.load_vae(out, device), tokenizer, world)
    language = None
    if c.captions == "recaptioned" and not c.data:
        language, source.written = load_language(out, device), read_lines(out / "captions.jsonl")
    if c.data and (folder := out / "latents").exists():
        latents.complete(folder, about_latents(c, world, source.vae))
        source.stored = latents.Latents(folder, c.channels, c.time_factor)
    torch.manual_seed(c.seed + 1)  # initial weights
    dit = make_dit(c, tokenizer.size)
    weights.begin_with(dit, start)
    dit.recompute = c.recompute
    if c.compile:
        for block in dit.blocks:
            block.compile()
    # Makes batches while we train. One thread of its own: more would wait for each other.
    maker = ThreadPoolExecutor(1, "maker", torch.set_num_threads, (1,))
    aside = []  # what is only measured on
    ahead = {}  # by the first of AHEAD steps: what is being made for them

    def make(first: int) -> list[list[Part]]:
        with sample.bf16(device):  # threads do not inherit it
            made = dit_parts(source, c, first, AHEAD)
            if c.data and not source.stored:  # other processes decode what comes after that
                coming = own_clips(own_rows(source, c, first + AHEAD, AHEAD))
                world.prefetch([clip.index for clip in coming], [clip.size for clip in coming])
        return made

    def batch(step: int, part: int) -> Part:
        first = step - step % AHEAD
        if first not in ahead:
            ahead.clear()
            ahead[first] = maker.submit(make, first)
        after = first + AHEAD
        if not c.data and after not in ahead and after < c.steps:  # own clips: see `make`
            ahead.pop(first - AHEAD, None)
            ahead[after] = maker.submit(make, after)
        return ahead[first].result()[step - first][part]

    def loss(model: nn.Module, part: Part, step: int) -> tuple[Tensor, dict]:
        return dit_loss(model, part, c, step)

    def measure(averaged: nn.Module) -> float:
        if not aside:  # made when it is first needed
            aside.extend(held_back(source, c))
        step, parts = aside
        return sum(dit_loss(averaged, part, c, step)[0].item() for part in parts)

    def run_of(averaged: DiT) -> sample.Run:
        networks = source.vae, averaged, source.tokenizer
        return sample.Run(*networks, facts["world"], facts["config"], language)

    def show(averaged: DiT, step: int) -> None:
        preview(run_of(averaged), world, out / "samples" / f"{step:06d}.gif")

    facts = facts | {"model": asdict(dit.config), "words": tokenizer.words}
    stage = Stage("dit", dit, c.steps, c.lr, batch, loss, facts, show, measure=measure, large=True)
    with maker:
        averaged = fit(stage, c, out, device)
    if rank() == 0:
        gallery(run_of(averaged), world, out / "gallery.gif")
        print(f"wrote {out / 'gallery.gif'}", end="")
        print("" if c.data else f"; python evaluate.py prompts --run {out} measures it")


def command(c: Config) -> None:
    try:
        main(c)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    command(parse())
