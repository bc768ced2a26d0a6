"""Prompting: given frames and windows, the one mechanism behind every task of sample.py.

The problem. To animate an image, to go on from a clip, to close a loop: each could be a network of
its own. And a minute of video has more patches than any network attends to at once.

The idea. In every task some frames of a clip are known, and the others are made to fit:

    text     . . . . .        animate    I . . . .        extend    A A . . .
    connect  A A . B B        backward   . . . A A        loop      A A . A A

The network is shown two things beside the noisy latents: the latents of what is known, encoded with
all else blanked, and a mask that says which of the frames of each latent are known:

    x      [N, Z, t, h, w]       noisy; latent frames that are known whole are at level 0 and stay
    given  [N, Z + ft, t, h, w]  what is known, and the mask: a latent can be known in part

`fill` makes what is missing in one window. `roll` makes a clip of any length from many, the last
latents of one being the known first ones of the next; `stream` decodes them as they come.

Alphabet: N clips of one size; T, H, W in pixels; Z, t, h, w in latents; ft frames to a latent.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import diffusion
import patches
from dit import DiT, DiTConfig
from language import Language, LanguageConfig, LanguageModel
from text import NOTHING, Tokenizer
from vae import VAE, VAEConfig
from weights import find, load_ema

CONTEXT = 0.4  # how noisy the latents are that a window takes over from the one before it
LATER = 2.0  # guidance of such a window, at most: more of it, and digits wear out
MOST_TOKENS = 2**16  # patches at once; more would take hours, or all the memory


# ------------------------------------------------------------------------------------ a trained run


@dataclass
class Run:
    """All that sampling needs: two networks and a tokenizer; the world that they were trained on
    and the flags of the training, as plain dicts; and what writes captions, if that was trained."""

    vae: VAE
    dit: DiT
    tokenizer: Tokenizer
    world: dict
    config: dict
    language: Language | None = None

    @property
    def device(self) -> torch.device:
        return self.dit.read.weight.device


def load_vae(folder: str | Path, device: str | torch.device) -> VAE:
    return load_ema(find(folder, "vae"), VAE, VAEConfig, device)[0]


def load_language(folder: str | Path, device: str | torch.device) -> Language:
    model, saved = load_ema(find(folder, "text"), LanguageModel, LanguageConfig, device)
    return Language(model, Tokenizer(saved["words"]), saved["world"])


@torch.no_grad()
def expand(
    run: Run,
    prompts: list[str],
    size: tuple[int, int, int],
    seeds: list[int],
    clips: list[np.ndarray] | None = None,
) -> list[str]:
    """Short prompts as the descriptive captions that the DiT was trained on, if it was. clips
    uint8 [C, L, H, W], of one size: what a clip of each prompt begins with, if that is given; its
    caption then says what is seen there."""
    if not run.language:
        return list(prompts)
    part = None if clips is None else read_part(run, clips)
    return run.language.expand(prompts, size, seeds, part)


def expand_lasting(
    run: Run,
    prompts: list[str],
    seeds: list[int],
    clips: list[np.ndarray],
    backward: bool = False,
) -> list[str]:
    """Short prompts as what stays true of a clip (`data.lasting_caption`), of which clips uint8
    [C, L, H, W] show the last frames or, backward, the first: for windows beside these, whose own
    beginning nobody knows."""
    part = read_part(run, clips, last=not backward)
    if part is not None:
        shown = 1 + (part[0].shape[1] - 1) * run.vae.config.time_factor  # frames
        size = max(2, shown), *clips[0].shape[2:]  # also an image is of a clip that moves
        prompts = run.language.expand(prompts, size, seeds, part, later=True)
    return list(map(data.lasting_caption, prompts))


def read_part(run: Run, clips: list[np.ndarray], last: bool = False) -> list[Tensor] | None:
    """What its language model sees of clips: latents [Z, n, h, w], of as many of the first or last
    frames as fill them. None where it has none, or they are larger than what that has learned to
    read."""
    if not run.language or max(clips[0].shape[2:]) > max(map(max, run.world["shapes"])):
        return None
    ft, most = run.vae.config.time_factor, max(run.world["durations"])
    whole = 1 + (min(clips[0].shape[1], most) - 1) // ft * ft
    part = slice(-whole, None) if last else slice(whole)
    return list(run.vae.encode(to_float([clip[:, part] for clip in clips]).to(run.device)))


def load_run(folder: str | Path, device: str | None = None) -> Run:
    """The EMA weights of a VAE, a DiT and, if that learned from descriptive captions, a language
    model. folder: or the file of one DiT in it, such as dit.best-800.pt."""
    device, path = device or ("cuda" if torch.cuda.is_available() else "cpu"), Path(folder)
    path, folder = (path, path.parent) if path.is_file() else (find(path, "dit"), path)
    dit, saved = load_ema(path, DiT, DiTConfig, device)
    words = Tokenizer(saved["words"])
    c = saved["config"]  # of own clips there is no expander; and else it knows short prompts alone
    wanted = c.get("captions") == "recaptioned" and not c.get("data")
    language = load_language(folder, device) if wanted else None
    return Run(load_vae(folder, device), dit, words, saved["world"], saved["config"], language)


# ------------------------------------------------------------------------------------ noise to clip


@dataclass(frozen=True)
class Settings:
    """How to sample."""

    steps: int = 30
    guidance: float = 4.0  # 1: none
    eta: float = 0.0  # 0: DDIM, 1: DDPM's ancestral steps


DEFAULT = Settings()
# Given frames show it already: the less of a push, the smoother the seams and the nearer to the
# truth. With fresh noise in each step, what was placed wrong can still be moved.
GIVEN = Settings(steps=50, guidance=1.0, eta=1.0)
SETTINGS = {  # of each task of sample.py, by the name of its flag
    "new": DEFAULT,
    "image": DEFAULT,
    "extend": replace(GIVEN, guidance=2.0),  # without, more digits changed
    "loop": GIVEN,
    "connect": GIVEN,
    "edit": DEFAULT,
}


def bf16(device: torch.device, cache: bool = True):
    """Autocast to bfloat16 where the device computes with it; weights, EMA and loss stay
    float32. cache: keep the bfloat16 copies of weights for when they are used again."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported()
    else:
        able = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not able:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache)


def latent_grid(run: Run, T: int, H: int, W: int) -> tuple[int, int, int]:
    """The latent grid (t, h, w) that holds T frames of H x W pixels: any T, as what is too much is
    cut off after decoding. ValueError says what sizes would do."""
    ft, sides = run.vae.config.time_factor, run.vae.config.space_factor * run.config["patch"]
    if H % sides or W % sides or min(H, W) < sides:
        near = [max(sides, round(side / sides) * sides) for side in (H, W)]
        raise ValueError(
            f"{H} x {W} pixels: sides must be multiples of {sides}, such as {near[0]} x {near[1]}"
        )
    return run.vae.grid(1 + -(-(T - 1) // ft) * ft, H, W)


def trained_window(run: Run) -> int:
    """How many latent frames the longest clip had that the run was trained on."""
    return max(2, 1 + (max(run.world["durations"]) - 1) // run.vae.config.time_factor)


def token_ratio(run: Run, grid: tuple[int, int, int]) -> float:
    """How many times as many patches a grid has as the largest clip in training; at least 1."""
    area = max(H * W for H, W in run.world["shapes"]) // run.vae.config.space_factor**2
    return max(1.0, math.prod(grid) / (trained_window(run) * area))


def noise_for(run: Run, generators: list[torch.Generator], grid: tuple[int, int, int]) -> Tensor:
    """[N, Z, t, h, w], each clip's from a generator of its own."""
    if (count := patches.token_count(grid, run.config["patch"])) > MOST_TOKENS:
        raise ValueError(
            f"too large: {count} patches at once, and at most {MOST_TOKENS} are possible"
        )
    Z = run.vae.config.channels
    return torch.stack([torch.randn(Z, *grid, generator=g) for g in generators]).to(run.device)


def seeded(seeds: list[int], part: int = 0) -> list[torch.Generator]:
    """A generator for each clip; tasks done in several parts take other numbers for each."""
    return [torch.Generator().manual_seed(seed + (part << 32)) for seed in seeds]


def packed_denoiser(
    run: Run,
    captions: list[list[int]],
    grid: tuple[int, int, int],
    given: Tensor | None = None,
    start: int = 0,
) -> Callable:
    """A callable for `diffusion.sample` over latents x [N, Z, t, h, w] of one size, a clip a row.

    level broadcasts as [N or 1, 1, t or 1, 1, 1]; given: what `encode_given` made, if anything;
    start: 1 for a window from the middle of a clip (see `patches.grid_positions`).
    """
    p, Z, N = run.config["patch"], run.vae.config.channels, len(captions)
    length = max(map(len, captions)) + patches.token_count(grid, p)
    blank = [torch.zeros(Z, *grid, device=run.device)] * N
    layout = patches.pack(blank, captions, p, length, [[k] for k in range(N)], [start] * N)
    if given is None:
        given = torch.zeros(N, Z + run.vae.config.time_factor, *grid, device=run.device)

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        shown = patches.patchify(torch.cat([x, given], dim=1), p).flatten(0, 1)  # [N n, inputs]
        tokens = shown.new_zeros(*layout.text.shape, shown.shape[-1])
        tokens[layout.is_patch] = shown  # rows are in clip order
        levels = level.expand(len(x), 1, grid[0], 1, 1).flatten(1)  # [N, t]
        table = patches.frame_levels(layout, list(levels))  # [F]
        with bf16(run.device):
            output = run.dit(tokens, table, layout)  # [N, L, D]
        return torch.stack(patches.unpack(output.float(), layout))  # [N, Z, t, h, w]

    return denoise


def level_table(steps: int, level: Tensor, held: Tensor, ratio: float) -> Tensor:
    """Levels that fall from `level` [t] to 0, but where `held` [t]: [steps + 1, 1, t, 1, 1].

    Larger than trained. The more patches, the less the same noise hides, so that what a clip is
    gets decided at higher levels: they fall more slowly there, by the number of patches ("Simple
    diffusion", see `diffusion.shift_level`; Open-Sora's timestep transform is the same with another
    schedule). Positions simply go on: rotary ones need no table, and what is near looks as in
    training. Stretching the trained range over the larger grid ("position interpolation", Chen et
    al. 2023) would make things larger, where a larger canvas should show more of the world.
    """
    falling = diffusion.straight_levels(steps, torch.ones_like(level))  # [steps + 1, t]
    if ratio != 1:
        falling = diffusion.shift_level(falling * diffusion.shift_level(level, 1 / ratio), ratio)
        falling[0], falling[-1] = level, 0.0  # to the last bit
    else:
        falling = falling * level
    return torch.where(held, level, falling).view(-1, 1, len(level), 1, 1)


def denoise_window(
    run: Run,
    prompts: list[str],
    x: Tensor,
    level: Tensor,
    held: Tensor,
    how: Settings,
    generators: list[torch.Generator],
    given: Tensor | None = None,
    start: int = 0,
    prompts_end: list[str] | None = None,
    blend: Tensor | None = None,
) -> Tensor:
    """From noise to clean latents: x [N, Z, t, h, w], each latent frame already at its `level` [t].

    Frames that are `held` [t] stay bit for bit what they are. With prompts_end, the caption changes
    along the clip: each frame is what both predict, mixed by `blend` [t] (0: prompts, 1:
    prompts_end).
    """
    grid = tuple(x.shape[2:])
    captions = [run.tokenizer.encode(prompt) for prompt in prompts]
    denoise = packed_denoiser(run, captions, grid, given, start)
    if prompts_end is not None:
        ends, first = [run.tokenizer.encode(prompt) for prompt in prompts_end], denoise
        last = packed_denoiser(run, ends, grid, given, start)
        weight = blend.view(-1, 1, 1)  # [t, 1, 1]

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            return torch.lerp(first(x, level), last(x, level), weight.expand_as(x))

    nothing = packed_denoiser(run, [[NOTHING]] * len(x), grid, given, start)
    denoise = diffusion.guided(denoise, nothing, how.guidance)
    levels = level_table(how.steps, level, held, token_ratio(run, grid) * run.config["shift"])
    return diffusion.sample(denoise, x, levels, how.eta, run.config["prediction"], generators)


# ------------------------------------------------------------------------------------- given frames


def encode_given(vae: VAE, video: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """What the network is shown of given frames: video [B, C, T, H, W], known [B, T] bool ->

    given [B, Z + ft, t, h, w]: latents of the video with all that is not given blanked, and a mask
    that says which of the ft frames of each latent are given (latent 0 has but one, which fills
    all); whole [B, t] bool: latent frames all of whose frames are given.

    Blanked, since a latent looks into the past: the latents of a given *ending*, cut from the whole
    clip, would tell what came before it, and training would teach the network to read it there.
    """
    ft = vae.config.time_factor
    blanked = torch.where(known[:, None, :, None, None], video, -1.0)  # black
    latent = vae.encode(blanked)  # [B, Z, t, h, w]
    frames = torch.cat([known[:, :1].expand(-1, ft - 1), known], dim=1)  # [B, ft t]
    frames = frames.unflatten(1, (-1, ft)).transpose(1, 2)  # [B, ft, t]
    mask = frames[..., None, None].expand(-1, -1, -1, *latent.shape[3:]).to(latent)
    return torch.cat([latent * mask.amax(1, keepdim=True), mask], dim=1), frames.all(1)


def noisy_context(
    latent: Tensor, count: int, level: float | Tensor, eps: Tensor, ft: int
) -> Tensor:
    """What the network is shown of a clip's past, in a window from the middle of a long clip.

    latent [N, Z, t, h, w], the first `count` frames of which are the past -> [N, Z + ft, t, h, w],
    which is what `encode_given` makes of whole frames, but noised to `level` (with eps, like
    latent).

    A window's past was made by the model, and is not quite right. Taken for clean, its mistakes
    would add up from window to window. Noise hides them, and the network is told how much there is.
    Training does the same: the past's frames are at `level` in the noisy clip, too (with noise of
    its own), count toward no loss, and positions start at time 1.
    """
    past = torch.arange(latent.shape[2], device=latent.device) < count  # [t]
    mask = past.to(latent)[:, None, None].expand(len(latent), ft, -1, *latent.shape[3:])
    level = torch.as_tensor(level, dtype=latent.dtype, device=latent.device)
    return torch.cat([diffusion.add_noise(latent, eps, level) * mask[:, :1], mask], dim=1)


def to_float(clips: np.ndarray | list[np.ndarray]) -> Tensor:
    """uint8 0 ... 255 -> [-1, 1]; a list of clips of one size is stacked."""
    return torch.from_numpy(np.ascontiguousarray(clips)).float() / 127.5 - 1


def to_uint8(video: Tensor) -> np.ndarray:
    """[-1, 1] float -> 0 ... 255."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def show_given(run: Run, clips: np.ndarray, known: np.ndarray, x: Tensor) -> tuple[Tensor, ...]:
    """Given frames, for `denoise_window`: clips uint8 [N, C, T, H, W], known [T] bool; noise x ->

    x with the latents that are given whole, what the network is shown, level [t], held [t].
    """
    missing = 1 + (x.shape[2] - 1) * run.vae.config.time_factor - clips.shape[2]
    video = np.pad(clips, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    known = torch.from_numpy(np.pad(known, (0, missing))).expand(len(clips), -1)
    given, whole = encode_given(run.vae, to_float(video).to(run.device), known.to(run.device))
    whole = whole[0]  # [t], the same for each clip
    x = torch.where(whole[:, None, None], given[:, : x.shape[1]], x)
    return x, given, (~whole).float(), whole


# --------------------------------------------------------------------------------- one window, many


def forward_context(run: Run, L: int, beside: int = 2) -> int:
    """How many of L given frames to show to what follows: as many as fill latents and leave
    `beside` latents of a window to others. The more there are, the better motion is carried on. Of
    2 to `ft` frames all, though they fill none: one frame alone says nothing of motion."""
    ft = run.vae.config.time_factor
    return L if L <= ft else 1 + ft * min((L - 1) // ft, max(0, trained_window(run) - 1 - beside))


def backward_context(run: Run, L: int) -> int:
    """The same for what comes before them: the last latents of a window have ft frames each. One
    frame more lies in a latent that is made: the VAE decodes from the past, so that what is given
    after a latent does nothing for its frames, and what is given of it does."""
    ft = run.vae.config.time_factor
    return L if L <= ft else 1 + ft * min((L - 1) // ft, trained_window(run) // 2)


def room(run: Run, L: int, task: str) -> int:
    """How many new frames fit into one window; `task`: new, or extend, backward, loop or connect L
    given ones."""
    ft, window = run.vae.config.time_factor, trained_window(run)
    if task in ("loop", "connect"):  # between two ends; one less, see `backward_context`
        return max(1, ft * max(1, window - window // 2 - 1) - 1)
    seen = {"new": lambda *_: 0, "extend": forward_context, "backward": backward_context}[task](
        run, L
    )
    return max(ft, 1 + ft * (window - 1) - seen)


@torch.no_grad()
def generate(
    run: Run,
    prompts: list[str],
    size: tuple[int, int, int],
    seeds: list[int],
    steps: int = DEFAULT.steps,
    guidance: float = DEFAULT.guidance,
    eta: float = DEFAULT.eta,
) -> list[np.ndarray]:
    """Text to video: clips of `size` (T, H, W) in pixels, all of it at once, however long it is."""
    grid, generators = latent_grid(run, *size), seeded(seeds)
    x = noise_for(run, generators, grid)
    level = torch.ones(grid[0], device=run.device)
    how = Settings(steps, guidance, eta)
    latent = denoise_window(run, prompts, x, level, level < 1, how, generators)
    return list(to_uint8(run.vae.decode(latent))[:, :, : size[0]])


@torch.no_grad()
def fill(
    run: Run,
    prompts: list[str],
    clips: np.ndarray,
    known: np.ndarray,
    generators: list[torch.Generator],
    how: Settings = DEFAULT,
    prompts_end: list[str] | None = None,
    start: int = 0,
) -> np.ndarray:
    """Make the frames that are not known, all at once: clips uint8 [N, C, T, H, W], known [T] bool.

    start: 1 where these frames are not the first of the whole clip. A caption says how a clip sets
    out: "moving left" may no longer be true of later frames, and the network was trained to know it
    by the position of the first (see `noisy_context`). Told 0, it believes the caption and not the
    frames. With prompts_end, the caption changes from the first to the last frame that is made.
    """
    grid, ft = latent_grid(run, *clips.shape[2:]), run.vae.config.time_factor
    x = noise_for(run, generators, grid)
    x, given, level, held = show_given(run, clips, known, x)
    first, last = np.flatnonzero(~known)[[0, -1]].tolist()
    middle = (
        torch.arange(grid[0], device=run.device) * ft - (ft - 1) / 2
    )  # of each latent, in frames
    blend = ((middle - first) / max(1, last - first)).clamp(0, 1)
    x = denoise_window(
        run, prompts, x, level, held, how, generators, given, start, prompts_end, blend
    )
    made = to_uint8(run.vae.decode(x))[:, :, : len(known)]
    return np.where(known[:, None, None], clips, made)  # a person's own frames, untouched


@torch.no_grad()
def roll(
    run: Run,
    prompts: list[str],
    grid: tuple[int, int, int],
    generators: list[torch.Generator],
    how: Settings = DEFAULT,
    begin: np.ndarray | None = None,
    source: Tensor | None = None,
    strength: float = 1.0,
    start: int = 0,
) -> Iterator[Tensor]:
    """Latents of any duration, a window at a time: yields [N, Z, n, h, w], t in all.

    The first window may begin with given frames, begin [N, C, K, H, W] uint8, and start: see
    `fill`. Each later one begins with the last latents of the one before, a little noisy
    (`noisy_context`), and counts time from its own start, so that no position is ever new. All
    stays in latents: decoding and encoding again at each seam would add up. source [N, Z, t, h, w]:
    start from this, noised to where the last `strength` of all steps begin (SDEdit). A descriptive
    prompt says how the first window sets out, and of it the others are told what stays true.
    """
    window = trained_window(run)
    keep, made, context = window // 2, 0, None
    while made < grid[0]:
        old = keep if made else 0
        t = min(window, grid[0] - made + old)
        eps = noise_for(run, generators, (t, *grid[1:]))
        level = torch.full((t,), strength, device=run.device)
        if strength < 1:  # of the schedule, so that it hides as much at every size
            ratio = token_ratio(run, (t, *grid[1:])) * run.config["shift"]
            level = diffusion.shift_level(level, ratio)
        held, given, x = torch.zeros_like(level, dtype=torch.bool), None, eps
        if source is not None:
            part = source[:, :, made - old : made - old + t]
            x = diffusion.add_noise(part, eps, level[:, None, None])
        if old:
            past = torch.cat([context, torch.zeros_like(eps[:, :, old:])], dim=2)
            other = noise_for(run, generators, (t, *grid[1:]))
            given = noisy_context(past, old, CONTEXT, other, run.vae.config.time_factor)
            held = torch.arange(t, device=run.device) < old
            level = torch.where(held, CONTEXT, level)
            noisy = diffusion.add_noise(past, eps, level[:, None, None])
            x = torch.where(held[:, None, None], noisy, x)
        elif begin is not None:
            x, given, level, held = show_given(run, begin, np.ones(begin.shape[2], bool), x)
        x = denoise_window(run, prompts, x, level, held, how, generators, given, start)
        start, prompts = 1, list(map(data.lasting_caption, prompts))
        how = replace(how, guidance=min(how.guidance, LATER))
        context, made = x[:, :, -keep:], made + t - old
        yield x[:, :, old:]


def stream(
    run: Run,
    prompts: list[str],
    size: tuple[int, int, int],
    seeds: list[int],
    how: Settings = DEFAULT,
    begin: np.ndarray | None = None,
    source: np.ndarray | None = None,
    strength: float = 1.0,
) -> Iterator[np.ndarray]:
    """Clips of any duration, as they are made: yields uint8 [N, C, n, H, W], T frames in all, in
    memory that does not grow. begin, uint8 [N, C, L, H, W]: the first L of them; source: what to
    edit.
    """
    T, H, W = size
    L = 0 if begin is None else begin.shape[2]
    seen = forward_context(run, L)  # of the given frames, the last that the model is shown
    left = T - L
    if L:
        yield begin
    if left <= 0:
        return
    grid = latent_grid(run, seen + left, H, W)
    latent = None
    if source is not None:
        missing = 1 + (grid[0] - 1) * run.vae.config.time_factor - T
        video = np.pad(source, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)), "edge")
        latent = run.vae.encode(to_float(video).to(run.device))
    begin, start = begin[:, :, L - seen :] if L else None, int(L > seen)
    parts = roll(run, prompts, grid, seeded(seeds), how, begin, latent, strength, start)
    for video in run.vae.decode_stream(parts):
        made = to_uint8(video)[:, :, seen:][:, :, :left]
        seen, left = max(0, seen - video.shape[2]), left - made.shape[2]
        if made.shape[2]:
            yield made
