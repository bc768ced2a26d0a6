"""Train everything: VAE, language model, diffusion transformer; from a CPU toy to many GPUs.

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs
    python train.py --preset clips --data FOLDER           # your own videos and images

A preset is a set of defaults, and each of them is a flag of the same name (--depth 8). Progress is
one integer, the step: data, noise and learning rate are functions of (seed, step). So the same
command continues a run that was stopped, bit for bit as if it had not been, on any number of
processes, and there is no random state to save.

Four stages, each of which needs the ones before it:

    vae     clips of one size a step       ->  vae.pt
    items   every clip through the VAE     ->  items/, all that the transformer learns from
    text    clips that have a caption      ->  text.pt, captions.jsonl for those that have none
    dit     items and captions             ->  dit.pt, dit.best-*.pt, gallery.gif

A run's folder, out/<preset> or out/<world>, also holds config.json; log.jsonl, a line of figures
every few steps, and loss.png, its picture; samples/, clips of fixed prompts and seeds as training
goes on; cache/, a folder's clips as pixels. `--stage export` writes what sampling needs into
<out>/weights/.

In reading order: the configuration; the loss of each stage; what is shown; the command line. The
loop is training/loop.py; a step's batch, training/batches.py.
"""

import inspect
import json
import os
import re
import signal
import sys
from argparse import SUPPRESS, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import diffusion
import patches
import prompting
from data import Clip, World, WorldConfig, open_world, sheet, world_class
from dit import MOST_WORDS, DiT, DiTConfig
from language import LanguageConfig, LanguageModel, Tokenizer
from sample import Parser, frame_rate
from training import batches, cache, checkpoints, cost, items, words
from training.loop import STOP, Stage, fit
from training.plot import plot
from training.processes import alone_in, barrier, keep_memory, own_parts, rank, seeded
from vae import VAE, VAEConfig, to_float
from worlds.media import write_gif

# ----------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """Every field is a flag. The defaults are those of the preset `tiny`."""

    preset: str = "tiny"
    stage: str = "all"  # vae, items, text, dit; all of them; or export
    out: str = ""  # the run's folder; by default out/<preset>, or out/<world>
    init_from: str = ""  # another run's folder, or a file of weights: what training starts from
    seed: int = 0
    # where clips come from (data.py, worlds/)
    world: str = "digits"  # or another file of worlds/, or a folder of videos and images
    data: str = ""  # the same: a folder of videos and images
    fps: float = 10  # frames a second, in training and of what is sampled
    durations: tuple[int, ...] = (9, 17)  # frames of videos; of a folder, the longest counts
    pixels: int = 1024  # of a folder's frames, about: larger ones are scaled down
    shapes: tuple[str, ...] = ("32x32", "24x40", "40x24", "32x48", "48x32")  # of digits
    digit: int = 14  # pixels; a digit's box
    crop: str = "none"  # or square: learn from the middle of each frame
    workers: int = 2  # processes that decode a folder's clips
    # the VAE (vae.py)
    channels: int = 3
    time_factor: int = 4
    space_factor: int = 4
    vae_width: int = 64
    vae_steps: int = 1000
    vae_batch: int = 8  # clips a step, on all processes, of the largest size; more of smaller ones
    vae_lr: float = 6e-3
    vae_pca: bool = False  # begin with principal components: textures are there at once
    # captions, and the language model that writes them (training/words.py, language.py)
    captions: str = "auto"  # recaptioned, where that pays; or written: what came with the clips
    items: int = 20_000  # clips that the transformer learns from, at most; 0: all
    text_width: int = 128
    text_steps: int = 700  # at most: 100 times through the clips that have captions
    text_batch: int = 16  # clips a step, of the largest size; more of smaller ones
    text_lr: float = 1e-2
    # the diffusion transformer (dit.py)
    patch: int = 2  # latents; the side of a patch
    width: int = 128
    depth: int = 6
    heads: int = 4
    prediction: str = "v"  # or x, eps: how the network says what is clean (diffusion.py)
    steps: int = 4000
    rows: int = 12  # of a step, on all processes together
    tokens: int = 168  # in a row
    lr: float = 1e-2
    images: float = 0.3  # share of the clips that are single frames
    image_phase: float = 0.3  # share of the steps, at the start, that see images only
    given: float = 0.4  # share of the clips in which some frames are known
    later: float = 0.15  # share of the clips that are windows from later on and see their past
    shift: float = 3.0  # above 1: more training, more sampling steps, at high noise; below: at low
    rope_base: float = 10.0  # larger for larger grids (attention.py)
    # every training
    ema: float = 0.99
    accumulate: int = 1  # parts in which a process does its share of a step, to take less memory
    shard: bool = False  # FSDP2: the transformer's weights are spread over all processes
    compile: str = "auto"  # the transformer's blocks, where PyTorch finds a compiler; yes or no
    recompute: bool = False  # make activations again in the backward pass: slower, far less memory
    save_every: int = 200  # steps
    keep: int = 2  # of the transformer's checkpoints, as dit.best-<step>.pt; 0: only the last
    sample_every: int = 500  # steps
    # what it would cost (training/cost.py)
    dry_run: bool = False  # say it, and train nothing
    gpu: str = "h100"
    gpus: int = 1

    @property
    def kind(self) -> str:
        return self.data or self.world

    @property
    def folder(self) -> Path:
        name = self.preset if self.kind == "digits" else Path(self.kind).stem
        return Path(self.out or f"out/{name}")


# What differs from `tiny`. In the comments: parameters of the transformer, the first shape. "small"
# is for one GPU or a patient CPU; the larger ones are DiT's B, L and XL, for many GPUs.
SMALL = dict(patch=1, channels=8, space_factor=8, digit=28, pixels=4096, vae_batch=16, lr=3e-3,
             shapes=("64x64", "48x80", "80x48", "64x96", "96x64"), vae_lr=3e-3,
             text_steps=1000)  # fmt: skip
BASE = dict(channels=16, space_factor=8, digit=56, pixels=16384, lr=1e-3, rope_base=100.0, items=0,
            shapes=("128x128", "96x160", "160x96", "128x192", "192x128"), vae_lr=1e-3,
            tokens=4096, vae_steps=100_000, text_steps=1000)  # fmt: skip
PRESETS = {
    "tiny": {},  # 2.0 M, 32 x 32
    "clips": dict(channels=14, pixels=3072, vae_batch=4, vae_steps=500, vae_pca=True, rows=4,
                  tokens=512, given=0.5, steps=2500, text_steps=1000,
                  image_phase=0.2, prediction="x"),  # 2.0 M, 48 x 64; for a small --data FOLDER
    "small": SMALL | dict(width=384, depth=12, heads=6, vae_width=96, rows=16, tokens=1024,
                          vae_steps=5_000, steps=20_000, items=100_000),  # 33 M, 64 x 64
    "base": BASE | dict(width=768, depth=12, heads=12, vae_width=128, vae_batch=32, rows=16,
                        vae_lr=2e-3, vae_steps=50_000, steps=200_000),  # 133 M, 128 x 128
    "large": BASE | dict(width=1024, depth=24, heads=16, vae_width=192, vae_batch=64, rows=32,
                         steps=300_000),  # 462 M
    "xl": BASE | dict(width=1152, depth=28, heads=16, vae_width=256, vae_batch=64, rows=32,
                      tokens=8192, steps=400_000),  # 680 M
    "3b": BASE | dict(width=2304, depth=32, heads=18, vae_width=384, vae_batch=128, rows=64,
                      tokens=8192, lr=5e-4, steps=400_000),  # 3,099 M
}  # fmt: skip


def parse(argv: list[str] | None = None) -> Config:
    """The preset's values, and the flags that say otherwise."""

    def many(kind):
        def values(text: str) -> tuple:
            return tuple(kind(part) for part in text.split(","))

        return values

    about = dict(re.findall(r"^    (\w+): .+?  # (.+)", inspect.getsource(Config), re.MULTILINE))
    parser = Parser("train.py", None, __doc__, formatter_class=RawDescriptionHelpFormatter,
                    argument_default=SUPPRESS)  # fmt: skip
    for field in fields(Config):
        value = field.default
        how = {"type": many(type(value[0])) if isinstance(value, tuple) else type(value)}
        if field.name == "fps":  # 29.97, or 10
            how = {"type": frame_rate}
        if isinstance(value, bool):
            how = {"action": BooleanOptionalAction}
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        text = "; ".join(filter(None, (f"tiny: {text}", about.get(field.name))))
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **how)
    said = vars(parser.parse_args(argv))  # what is not said is as in the preset
    preset = said.get("preset", "tiny")
    if preset not in PRESETS:
        parser.error(f"no preset {preset}: there are {', '.join(PRESETS)}")
    kind = said.get("data") or said.get("world") or Config.world
    return replace(Config(), **(world_class(kind).flags | PRESETS[preset] | said))


def check(c: Config) -> None:
    """What would fail only later, or not at all, and never with a good sentence."""

    def must(names: str, fine: Callable[..., bool], be: str) -> None:
        for name in names.split():
            if not fine(value := getattr(c, name)):
                raise ValueError(f"--{name.replace('_', '-')} {value}: {be}")

    one_of = {"stage": ("all", "vae", "items", "text", "dit", "export"),
              "captions": ("auto", "recaptioned", "written"), "prediction": diffusion.PREDICTIONS,
              "compile": ("auto", "yes", "no"), "gpu": tuple(cost.GPUS),
              "crop": ("none", "square")}  # fmt: skip
    for name, choices in one_of.items():
        must(name, choices.__contains__, ", ".join(choices))
    counts = """steps vae_steps text_steps text_batch tokens save_every sample_every accumulate gpus
        fps pixels digit channels time_factor space_factor patch vae_width text_width width depth
        heads"""
    must(counts, lambda x: x >= 1, "at least 1")
    must("keep items workers seed", lambda x: x >= 0, "at least 0")
    many = (c.gpus if c.dry_run else int(os.environ.get("WORLD_SIZE", 1))) * c.accumulate
    why = f": one for each of {many} parts" if many > 1 else ""
    must("rows vae_batch", lambda x: x >= many, f"at least {many}{why}")
    must("images image_phase given later ema", lambda x: 0 <= x <= 1, "a share, from 0 to 1")
    must("lr vae_lr text_lr shift rope_base", lambda x: 0 < x < np.inf, "above 0")
    must("seed", lambda x: x < 2**32, f"below {2**32}")
    must("text_width", lambda x: x % 64 == 0, "a multiple of 64")
    if Path(c.kind).resolve() == c.folder.resolve():  # both have a captions.jsonl
        raise ValueError(f"--out {c.folder}: another folder than that of the clips")
    if c.width % (2 * c.heads):
        raise ValueError(f"--width {c.width} --heads {c.heads}: a multiple of {2 * c.heads}")
    if Path(c.init_from).is_file() and c.stage not in ("vae", "text", "dit"):
        raise ValueError(f"--init-from {c.init_from}: of one network: --stage vae, text or dit")
    if c.shard and "RANK" not in os.environ and not c.dry_run:
        raise ValueError("--shard spreads weights over processes: start them with torchrun")


def make_world(c: Config) -> World:
    """The first process looks at new files; the others wait, and then find what it found."""
    try:
        shapes = tuple((int(H), int(W)) for H, W in (shape.split("x") for shape in c.shapes))
    except ValueError:
        raise ValueError(f"--shapes {','.join(c.shapes)}: like 32x32,24x40") from None
    multiple = c.space_factor * c.patch
    small = [max(c.digit, k * shapes[0][0] // 4) for k in (2, 3)]  # of images only, to learn sooner
    images = tuple((multiple * -(-side // multiple),) * 2 for side in small)
    config = WorldConfig(c.kind, c.seed, c.durations, shapes, images, c.fps, c.digit,
                         crop=c.crop, pixels=c.pixels, multiple=multiple,
                         unit=c.time_factor)  # fmt: skip
    if rank():
        barrier()
    world = open_world(config)
    if rank() == 0:
        barrier()
    numbers, vae = np.arange(len(world)), make_vae(c, world)
    sizes = np.concatenate([world.sizes(numbers, image) for image in (False, True)])
    for size in batches.kinds(sizes)[0].tolist():
        if (count := patches.token_count(vae.grid(*size), c.patch)) >= c.tokens:
            raise ValueError(
                f"a clip of {' x '.join(map(str, size))} has {count} tokens, and --tokens is "
                f"{c.tokens}: raise that, or lower --pixels or --durations"
            )
    return world


def make_vae(c: Config, world: World) -> VAE:
    return VAE(VAEConfig(world.colors, c.channels, c.time_factor, c.space_factor, c.vae_width))


def make_text(c: Config, vocabulary: int) -> LanguageModel:
    shape = {"width": c.text_width, "heads": c.text_width // 32}
    return LanguageModel(LanguageConfig(c.channels, c.patch, vocabulary, **shape))


def make_dit(c: Config, vocabulary: int, world: World) -> DiT:
    inputs, outputs = (c.patch**2 * n for n in (2 * c.channels + c.time_factor, c.channels))
    size = (vocabulary, c.width, c.depth, c.heads, c.rope_base)
    return DiT(DiTConfig(inputs, outputs, *size, len(world.actions), c.time_factor))


# ------------------------------------------------------------------------------------- the stages


def train_vae(c: Config, world: World, device: torch.device) -> None:
    torch.manual_seed(c.seed)  # initial weights
    vae = make_vae(c, world)
    every = np.flatnonzero(~world.held_back(np.arange(len(world))))
    kinds = {image: batches.kinds(world.sizes(every, image)) for image in (False, True)}
    largest = int(kinds[False][0].prod(1).max())
    own, many = own_parts(c.accumulate)

    def make(step: int, part: int, of: int) -> tuple:
        """A part of a step: video, noise, its share in the mean. The step's clips are of one
        size, another one each step; in every eighth step images: a video's first frame is an image
        to a causal VAE."""
        image, mine = step % 8 == 0, slice(part, None, of)
        (T, H, W), pick = batches.same_size(kinds[image], step, c.seed, c.vae_batch, largest)
        noise = torch.randn(len(pick), c.channels, *vae.grid(T, H, W),
                            generator=seeded(c.seed, 1, step))  # fmt: skip
        clips = world.clips(every[pick[mine]], image)
        here = [k for k, clip in enumerate(clips) if clip is not None]
        blank = np.zeros((world.colors, T, H, W), np.uint8)  # its share is 0
        video = torch.from_numpy(np.stack([clips[k].pixels for k in here] or [blank]))
        return video, noise[mine][here or [0]], len(here) / len(pick)

    def parts(step: int) -> list[tuple[Tensor, Tensor, float]]:
        return [make(step, part, many) for part in own]

    def loss(model: nn.Module, part: tuple, step: int) -> tuple[Tensor, dict]:
        video, noise, share = part
        mean, logs = model(to_float(video.to(device)), noise.to(device))
        return mean * share, logs

    def some() -> Iterator[Tensor]:
        """All clips of some steps, whole, so that every process finds the same in them."""
        for step in range(10**6 + 1, 10**6 + 8):
            yield to_float(make(step, 0, 1)[0])

    def measure(averaged: VAE) -> None:
        averaged.measure_statistics(video.to(device) for video in some())

    start = checkpoints.starting_from(c, "vae")
    if c.vae_pca and not start:
        vae.begin(some())
    checkpoints.begin_with(vae, start)
    fit(Stage("vae", vae, c.vae_steps, c.vae_lr, parts, loss, {"world": world.about()},
              c.workers * world.slow, finish=measure), c, device)  # fmt: skip


def tokenizer_of(start: dict, world: World) -> Tokenizer:
    """Of the network that training starts from, or else of this world."""
    return Tokenizer(start.get("words") or words.make_tokenizer(world).words)


def train_text(c: Config, world: World, vae: VAE, device: torch.device) -> None:
    start = checkpoints.starting_from(c, "text")
    tokenizer = tokenizer_of(start, world)
    torch.manual_seed(c.seed + 2)  # initial weights
    model = make_text(c, tokenizer.size)
    checkpoints.begin_with(model, start)
    most = min(c.text_steps, 100 * len(words.labelled(world)[0]) // c.text_batch + 1)

    def loss(model: nn.Module, part: words.Part, step: int) -> tuple[Tensor, dict]:
        """The sum over this part's tokens, divided by how many there are in all parts."""
        lessons, tokens = words.encoded(vae, part)
        return model(lessons)[0] / tokens, {"tokens": tokens}

    parts = partial(words.read_lessons, world, tokenizer, c)
    facts = {"world": world.about(), "words": tokenizer.words}
    fit(Stage("text", model, most, c.text_lr, parts, loss, facts, c.workers * world.slow),
        c, device)  # fmt: skip


def dit_loss(model: nn.Module, part: batches.Part, c: Config, step: int) -> tuple[Tensor, dict]:
    """The error over the patches of this part, of frames that are not known, divided by how many
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


def train_dit(
    c: Config, world: World, source: batches.Source, run: prompting.Run, start: dict
) -> None:
    device = run.device
    torch.manual_seed(c.seed + 1)  # initial weights
    dit = make_dit(c, run.tokenizer.size, world)
    checkpoints.begin_with(dit, start)
    dit.recompute = c.recompute
    if c.compile == "yes" or c.compile == "auto" and can_compile(device):
        for block in dit.blocks:
            block.compile()
    tasks = examples(run, world)
    few = tasks[:4] if world.actions else tasks[::2]

    def loss(model: nn.Module, part: batches.Part, step: int) -> tuple[Tensor, dict]:
        return dit_loss(model, part.to(device), c, step)

    def measure(averaged: nn.Module) -> float:
        """The loss on clips held back, with fixed noise."""
        aside = batches.parts(source, batches.HELD_BACK)
        return sum(loss(averaged, part, batches.HELD_BACK)[0].item() for part in aside)

    def show(averaged: DiT, step: int) -> None:
        path = c.folder / f"samples/{step:06d}.gif"
        gallery(replace(run, dit=averaged), few, path, {"steps": 12})

    facts = {"world": world.about(), "words": run.tokenizer.words}
    workers = c.workers if device.type == "cuda" else 0
    stage = Stage("dit", dit, c.steps, c.lr, partial(batches.parts, source), loss, facts, workers,
                  preview=show, measure=measure, large=True)  # fmt: skip
    averaged = fit(stage, c, device)
    if rank() == 0:
        gallery(replace(run, dit=averaged), tasks, c.folder / "gallery.gif")
        print(f"wrote {c.folder / 'gallery.gif'}")


def can_compile(device: torch.device) -> bool:
    """Whether PyTorch finds what it compiles with; says so."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        found = device.type == "cuda" or get_cpp_compiler()
    except Exception:
        found = ""
    if rank() == 0:
        print("compiling" if found else "no C++ compiler: nothing is compiled", flush=True)
    return bool(found)


# ---------------------------------------------------------------------------------- what is shown


def examples(run: prompting.Run, world: World) -> list[prompting.Task]:
    """Prompts; in worlds with actions, clips that nobody learned from, of which the start and all
    actions are known."""
    if not world.actions:
        return [prompting.new(run, size, prompt) for prompt, size in world.prompts(12)]
    i = np.flatnonzero(world.held_back(np.arange(len(world))))[:8]
    T = max(world.durations)
    clips, known = world.clips(i, frames=T + 24), np.arange(T + 24) < (T + 1) // 2
    return [prompting.Task(x.pixels, known, x.caption, actions=x.actions) for x in clips]


def gallery(run: prompting.Run, tasks: list[prompting.Task], path: Path, how: dict | None = None):
    """Clips that play side by side; short ones start again. Those with actions are below what
    really happens."""
    clips = prompting.finished(run, tasks, range(len(tasks)), how, expanded=True)
    titles = [x.prompt if len(x.prompt) <= 44 else x.prompt[:41] + "..." for x in tasks]
    for k in range(len(clips) - len(clips) % 4, -1, -4) if run.world["actions"] else ():
        clips[k:k] = [task.clip for task in tasks[k : k + 4]]
        titles[k:k] = ["what really happens"] * len(tasks[k : k + 4])
    scale = min(4, max(1, 192 // max(max(clip.shape[2:]) for clip in clips)))
    pages = [
        sheet([clip[:, [t % clip.shape[1]]] for clip in clips], titles, columns=4, scale=scale)
        for t in range(max(clip.shape[1] for clip in clips))
    ]
    write_gif(path, pages, run.world["fps"])


def draw_loss(out: Path) -> None:
    """loss.png: the loss of every stage, on a logarithmic scale."""
    panels = {}
    for line in checkpoints.read_log(out):
        if 0 < line["loss"] < np.inf:
            curves = panels.setdefault(f"{line['stage']}: loss by step", {"loss": ([], [])})
            curves["loss"][0].append(line["step"])
            curves["loss"][1].append(line["loss"])
    if panels:
        write_gif(out / "loss.png", [plot(panels, log_y=True)])


# ----------------------------------------------------------------------------------- command line


def main(c: Config) -> None:
    check(c)
    if c.dry_run:
        return print(dry_run(c))
    if c.stage == "export":
        return print("wrote", ", ".join(map(str, checkpoints.export(c.folder))))
    device = start_processes()
    world = make_world(c)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: STOP.append(number))
    if c.captions == "auto":
        some = c.stage == "text" or words.pays(world)
        c = replace(c, captions="recaptioned" if some else "written")
    (c.folder / "samples").mkdir(parents=True, exist_ok=True)
    with alone_in(c.folder):
        if rank() == 0:
            checkpoints.write(c.folder / "config.json", json.dumps(asdict(c), indent=2).encode())
        try:
            if world.slow:
                cache.decode_once(world, c.folder / "cache", c.workers)
            stages(c, world, device)
        finally:
            world.close()
    if rank() == 0:
        draw_loss(c.folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def stages(c: Config, world: World, device: torch.device) -> None:
    if c.stage in ("all", "vae"):
        train_vae(c, world, device)
    if c.stage == "vae":
        return
    vae = prompting.load_vae(c.folder, device)
    made = items.make_items(world, vae, c, c.folder / "items")
    if c.stage == "items":
        return
    said, language = words.words_of(world, made), None
    lacking, some = words.missing(c, made, said), len(words.labelled(world)[0])
    if c.stage == "text" and not some:
        raise ValueError("no clip has a caption to learn from")
    if c.stage in ("all", "text") and lacking and some:
        train_text(c, world, vae, device)
    if c.captions == "recaptioned" and (c.folder / "text.pt").exists():
        language = prompting.load_language(c.folder, device)
    if c.stage in ("all", "text") and language:
        with prompting.bf16(device):
            words.write_captions(language, c, made, said)
    if c.stage == "text":
        return
    start = checkpoints.starting_from(c, "dit")
    tokenizer = tokenizer_of(start, world)
    source = source_of(c, world, made, said, tokenizer)
    run = prompting.Run(vae, None, tokenizer, world.about(), asdict(c), language)
    train_dit(c, world, source, run, start)


def source_of(c: Config, world: World, made: items.Items, said: list[Clip], tokenizer: Tokenizer):
    """What the transformer learns from: items, and the caption of each as tokens."""
    texts = [tokenizer.encode(x) for x in words.captions_of(world, c, made, said)]
    source = batches.Source(made, [x[:MOST_WORDS] for x in texts], c, world)
    most = np.minimum(c.tokens - source.count, MOST_WORDS).tolist()  # batches.py cuts what is left
    long = {x.name for x, y, n in zip(said, texts, most, strict=True) if len(y) > n}
    if long and rank() == 0:
        print(f"{len(long)} captions are too long, as that of {min(long)}: at most {MOST_WORDS} "
              f"tokens, and --tokens {c.tokens} with the clip; their ends are left out")
    return source


def dry_run(c: Config, steps: int = 4) -> str:
    """What the DiT's training would cost, from the clips of some steps at its end."""
    world, some = make_world(c), replace(c, items=min(c.items or 5000, 5000))
    made = items.Items.planned(world, make_vae(c, world), some)
    tokenizer = words.make_tokenizer(world)
    texts = [tokenizer.encode(x.caption or x.brief) for x in words.words_of(world, made)]
    source, counts = batches.Source(made, texts, c, world), []
    with torch.device("meta"):  # shapes without numbers
        networks = {"vae": make_vae(c, world), "dit": make_dit(c, tokenizer.size, world)}
    for step in range(max(0, c.steps - steps), c.steps):
        clips, _ = batches.draw_step(source, step)
        rest = sum(len(x.text) for x in clips), sum(1 + len(x.free) for x in clips)
        counts.append(([x.tokens for x in clips], *rest))
    return cost.report(networks, counts, c)


def start_processes() -> torch.device:
    """This process's device; with torchrun, it joins the others."""
    place = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # torchrun started several of us
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def command(c: Config) -> None:
    try:
        main(c)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(print(f"train.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:  # while files were looked at
        sys.exit("train.py: stopped; the same command continues")


if __name__ == "__main__":
    command(parse())
