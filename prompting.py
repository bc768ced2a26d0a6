"""Prompting: a task is a clip and a mask of the frames that are known; `complete` makes the rest.

The problem. Animating an image, extending a clip or closing a loop could each be a network of its
own. And a minute of video has more patches than any network attends to at once.

The idea. In every task some frames are known, and the others are made to fit:

    new      . . . . .        animate   I . . . .        extend    A A . . .
    connect  A A . B B        loop      A A . A A        backward  . . . A A

The network is shown the latents of the known frames, encoded with all others black, and a mask:

    x      [N, Z, t, h, w]       noisy; latent frames that are known whole are at level 0 and stay
    given  [N, Z + ft, t, h, w]  what is known, and which of the ft frames of each latent are

A clip longer than those in training is made window by window. A window that continues another
starts with its last latents, made a little noisy: the model made them, and if it took them for
clean, their mistakes would add up. Editing is SDEdit (Meng et al. 2021): start from the noised clip
instead of noise.

Alphabet: N clips of one size; T, H, W in pixels; Z, t, h, w in latents; ft frames to a latent.

Run `python prompting.py` to see each task's windows, and which frames are known.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import diffusion
import patches
from dit import DiT, DiTConfig
from language import NOTHING, Language, LanguageConfig, LanguageModel, Tokenizer
from vae import VAE, VAEConfig, to_float, to_uint8

LATER = 2.0  # guidance of such a window, at most: with more, digits wear out
MOST_TOKENS = 2**16  # patches at once; more would take hours, or all the memory
AT_ONCE = 16  # clips
SHIPPED = data.HERE / "assets" / "weights"  # trained runs

# ------------------------------------------------------------------------------------ a trained run


@dataclass
class Run:
    """All that sampling needs."""

    vae: VAE
    dit: DiT
    tokenizer: Tokenizer
    world: dict  # about what it was trained on: `data.World.about`
    config: dict  # the flags of the training
    language: Language | None = None  # expands prompts, if the DiT learned from full captions

    def __post_init__(self):
        self.ft, self.device = self.vae.config.time_factor, self.vae.mean.device
        # Latents of the longest clip in training, and how many of them a window takes over.
        self.window = max(2, 1 + (max(self.world["durations"]) - 1) // self.ft)
        self.past = int(self.window * self.world["past"])
        self.lasting = data.world_class(self.world["config"]["kind"]).lasting


def newest_run(shipped: str = "") -> Path:
    """The folder below out/ whose DiT was saved last; if there is none, what ships by that name."""
    if found := list(Path("out").glob("*/dit.pt")):
        return max(found, key=lambda path: path.stat().st_mtime).parent
    if not shipped:
        raise FileNotFoundError("no trained run below out/: train.py --preset tiny makes one")
    return SHIPPED / shipped


def read_weights(path: str | Path, device: str | torch.device) -> dict:
    """All that a file holds: {"ema": {name: tensor}}, and the rest by name. Only tensors and plain
    values are unpickled."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: train there first, or name another folder")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        return saved | {"ema": saved["ema"]}
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of ours ({type(error).__name__})") from None


def load_network(path: str | Path, network: type, config: type, device) -> tuple[nn.Module, dict]:
    """A network with the EMA weights of a file, and all that the file holds."""
    saved = read_weights(path, device)
    try:
        made = network(config(**saved["model"])).to(device).eval().requires_grad_(False)
        made.load_state_dict(saved["ema"])
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{path} was made by another version of the code: train anew") from None
    return made, saved


def load_vae(folder: str | Path, device: str | torch.device) -> VAE:
    return load_network(Path(folder, "vae.pt"), VAE, VAEConfig, device)[0]


def load_language(folder: str | Path, device: str | torch.device) -> Language:
    path = Path(folder, "text.pt")
    model, saved = load_network(path, LanguageModel, LanguageConfig, device)
    return Language(model, Tokenizer(saved["words"]), saved["world"])


def load_run(folder: str | Path, device: str | torch.device | None = None) -> Run:
    """folder: or the file of one DiT in it, such as dit.best-800.pt."""
    device, path = device or ("cuda" if torch.cuda.is_available() else "cpu"), Path(folder)
    path, folder = (path, path.parent) if path.is_file() else (path / "dit.pt", path)
    dit, saved = load_network(path, DiT, DiTConfig, device)
    words, vae, language = Tokenizer(saved["words"]), load_vae(folder, device), None
    if saved["config"]["captions"] == "recaptioned" and Path(folder, "text.pt").is_file():
        language = load_language(folder, device)
    return Run(vae, dit, words, saved["world"], saved["config"], language)


def bf16(device: torch.device):
    """Autocast to bfloat16 where the device computes in it; weights, EMA and loss stay float32."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported()
    else:  # AVX512 alone emulates it, three times slower than float32
        asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        able = any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return torch.autocast(device.type, torch.bfloat16) if able else nullcontext()


# -------------------------------------------------------------------------------------------- tasks


@dataclass
class Task:
    """A clip of which some frames are known."""

    clip: np.ndarray  # uint8 [C, T, H, W]; blank where it is to be made
    known: np.ndarray  # bool [T]
    prompt: str
    prompt_end: str | None = None  # what the prompt turns into along the frames that are made
    strength: float = 1.0  # below 1, the rest is made from the clip: 0 keeps it, 1 ignores it
    actions: np.ndarray | None = None  # int [T], done just before each frame; 0: nothing known
    frames: int | None = None  # the result is the first so many

    @property
    def prompts(self) -> tuple[str, str]:
        return self.prompt, self.prompt if self.prompt_end is None else self.prompt_end


def new(run: Run, size: tuple[int, int, int], prompt: str) -> Task:
    """A video of size (T, H, W) from text, or an image (T = 1)."""
    clip = np.broadcast_to(np.uint8(0), (run.vae.config.colors, *size))  # takes no memory
    return Task(clip, np.zeros(size[0], bool), prompt)


def animate(image: np.ndarray, T: int, prompt: str) -> Task:
    """An image [C, 1, H, W] that moves: T frames in all."""
    return extend(image, T - 1, prompt)


def extend(clip: np.ndarray, n: int, prompt: str, backward: bool = False) -> Task:
    """n frames after a clip or, backward, before it."""
    none = clip[:, :0]
    return connect(none, clip, n, prompt) if backward else connect(clip, none, n, prompt)


def loop(clip: np.ndarray, n: int, prompt: str) -> Task:
    """A clip and n frames that lead from its end back to its start."""
    return replace(connect(clip, clip, n, prompt), frames=clip.shape[1] + n)


def connect(a: np.ndarray, b: np.ndarray, n: int, prompt: str, prompt_end=None) -> Task:
    """n frames from one clip to another; with prompt_end, from one prompt to another."""
    C, L, H, W = a.shape
    clip = np.zeros((C, L + n + b.shape[1], H, W), np.uint8)  # no memory until it is written
    known = np.ones(clip.shape[1], bool)
    clip[:, :L], clip[:, L + n :], known[L : L + n] = a, b, False
    return Task(clip, known, prompt, prompt_end)


def edit(clip: np.ndarray, strength: float, prompt: str) -> Task:
    """SDEdit. strength: the share of the sampler's steps from noise to clean that it takes."""
    return Task(clip, np.zeros(clip.shape[1], bool), prompt, strength=strength)


@dataclass
class Settings:
    """How to sample. What changes while clips are made holds from the next window on."""

    steps: int = 30
    guidance: float = 6.0  # 1: none
    eta: float = 0.0  # 0: DDIM, 1: DDPM's ancestral steps
    noise: float = 0.4  # the level of the latents that a window takes over from the one before it
    past: int | None = None  # how many those are; None: the world's share of a window
    alone: float = 1 / 3  # the last share of the steps, which go without guidance


def settings(run: Run, task: Task) -> Settings:
    """The settings that worked best: the world's own, or else those for moving digits, of which a
    world that names no guidance of its own may replace some. Known frames already show what the
    prompt says: less guidance makes seams smoother, and new frames truer. Fresh noise in each step
    sharpens, and lets a digit that was placed wrong still move; from no more than an image, three
    quarters of it are best, or digits suffer. What follows from known frames and actions alone
    takes few steps; to begin with nothing takes many."""
    known, own = np.flatnonzero(task.known), run.world["sampling"]
    if "guidance" in own:
        return Settings(**own | ({} if len(known) else {"steps": Settings.steps}))
    if len(known) <= 1 or task.strength < 1:
        return Settings(eta=0.75, **own)
    two_ends = known[-1] - known[0] >= len(known)
    guidance = 1.0 if two_ends else 2.0  # extended without any, more digits changed
    return Settings(50, guidance, 1.0, **own)


# ------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Window:
    """Frames of a task that are denoised together."""

    first: int  # its first frame in the task; frames before 0 only fill a latent
    end: int  # its last frame + 1; frames after the clip only fill a latent, too
    made: tuple[int, int]  # the frames of the task that it makes: from, to
    past: int = 0  # how many latents it takes over from the window before it
    start: int = 0  # the time of its first latent: 0 only for the start of a clip, as in training
    part: int = 0  # added to the seed; a window with a past continues the random numbers before it
    known: np.ndarray | None = None  # bool [end - first]: which of its frames are known by then
    turn: tuple[int, int] = (0, 1)  # the frames between which prompt turns into prompt_end


def context(run: Run, L: int, most: int) -> int:
    """How many of L known frames to show: the first fills a latent, and the others at most `most`.
    More frames carry motion on better. Up to `ft` frames are all shown, though the others fill no
    latent: one frame alone says nothing about motion."""
    return L if L <= run.ft else 1 + run.ft * max(0, min((L - 1) // run.ft, most))


def prefix(run: Run, L: int, past: int) -> int:
    """How many of L known frames are shown, where later windows take over `past` latents."""
    return context(run, L, max(run.window - 3, past - 1))


def room(run: Run, L: int, kind: str) -> int:
    """How many new frames fit into one window. kind: "new", or what is done with L known frames:
    "extend", "backward", "loop" or "connect"."""
    most = run.window
    if kind in ("loop", "connect"):  # one less than fills latents, see `toward`
        return max(1, run.ft * max(1, most - most // 2 - 1) - 1)
    shown = {"new": 0, "extend": prefix(run, L, run.past), "backward": context(run, L, most // 2)}
    return max(run.ft, 1 + run.ft * (most - 1) - shown[kind])


def onward(run: Run, lo: int, hi: int, over: int) -> Iterator[Window]:
    """Frames lo to hi, after known ones: each window continues the one before it, and takes `over`
    latents from it."""
    first, done = lo - prefix(run, lo, over), 0
    begins = [first, *range(first + 1, hi + run.ft, run.ft)]  # each latent; the last one's end
    while done < len(begins) - 1:
        past = over if done else 0
        to, at = min(len(begins) - 1, done - past + run.window), begins[done - past]
        made = max(lo, begins[done]), min(hi, begins[to])
        yield Window(at, begins[to], made, past, int(at > 0))
        done = to


def toward(run: Run, lo: int, hi: int, L: int) -> Iterator[Window]:
    """Frames lo to hi, before L known ones, window by window into the past.

    Each window encodes the pixels of known frames again: their latents would depend on what comes
    before. One known frame lies in a latent that is made, since the VAE decodes a latent's frames
    from the past alone. If frames before `lo` are known, too, and one window is too short, both
    ends are extended first, by half of the rest each, and one more window connects them."""
    ft, part = run.ft, (lo > 0) * 2**48
    spare = max(0, hi - lo - room(run, L, "connect"))
    a, b = (lo + spare - spare // 2, hi - spare // 2) if lo else (0, 0)
    yield from onward(run, lo, a, run.past) if a > lo else ()
    while hi > b:
        shown, at = context(run, L, run.window // 2), max(b, hi - room(run, L, "backward"))
        first = at - -(hi - at + shown - 1) % ft  # so that the known frames end a latent
        yield Window(first, hi + shown, (at, hi), 0, int(at > 0), part)
        L, hi, part = L + hi - at, at, part + 2**32
    if b > a:
        first = a - context(run, a, run.window // 2 - 1)
        # The known frames end a latent, and fill at least one, if there are enough.
        odd = (1 + first - b) % ft
        end = b + next((n for n in (ft + odd, odd) if 0 < n <= L), L)
        yield Window(first, end + (1 + first - end) % ft, (a, b), 0, 1, 2**32)


def windows(task: Task, run: Run, past: int | None = None) -> list[Window]:
    """The windows of a task in order: gap by gap, or a single one if several gaps fit into it.
    past: see Settings. ValueError says which sizes are possible."""
    T, H, W = task.clip.shape[1:]
    sides, ft, plan = run.vae.config.space_factor * run.config["patch"], run.ft, []
    if H % sides or W % sides or not H * W:
        near = " x ".join(str(max(1, round(side / sides)) * sides) for side in (H, W))
        raise ValueError(f"{H} x {W} pixels: sides must be multiples of {sides}, such as {near}")
    there = np.pad(task.known, ft)  # by then; frame k is at ft + k
    edges = np.flatnonzero(np.diff(np.pad(~task.known, 1).astype(int))).tolist()
    one = len(edges) > 2 and T <= 1 + ft * (run.window - 1)
    edges = [edges[0], edges[-1]] if one else edges
    for k in range(0, len(edges), 2):
        lo, hi, to = [*edges, T][k : k + 3]  # then frames are known up to `to`
        if one:
            end, start = T + (1 - T) % ft, int(task.known[0] and task.known[-1])
            some = [Window(0, end, (lo, hi), start=start)]
        elif to > hi:
            some = toward(run, lo, hi, to - hi)
        else:
            some = onward(run, lo, hi, run.past if past is None else past)
        for x in some:
            known = there[ft + x.first : ft + x.end].copy()
            plan.append(replace(x, known=known, turn=(lo, hi), part=x.part + k * 2**50))
            there[ft + x.made[0] : ft + x.made[1]] = True
    count = max((-(-len(x.known) // ft) for x in plan), default=0) * H * W // sides**2
    if count > MOST_TOKENS:
        raise ValueError(f"too large: {count} patches at once, of at most {MOST_TOKENS}")
    return plan


# --------------------------------------------------------------------------------------- one window


def video_of(run: Run, clips, first: int, n: int) -> Tensor:
    """n frames of clips [C, T, H, W]: [N, C, n, H, W]. A clip stands still beyond its ends."""
    frames = np.arange(first, first + n)
    clips = [clip[:, frames.clip(0, clip.shape[1] - 1)] for clip in clips]
    return to_float(clips).to(run.device)


def noisy_past(latent: Tensor, count: int, level: float | Tensor, eps: Tensor, ft: int) -> Tensor:
    """The `given` of a window's past, the first `count` frames of latent [N, Z, t, h, w]: as from
    `VAE.encode_known`, [N, Z + ft, t, h, w], but noised to `level`. In the noisy clip, the past is
    at this level, too, but with other noise; training does the same."""
    past = torch.arange(latent.shape[2], device=latent.device) < count  # [t]
    mask = past.to(latent)[:, None, None].expand(len(latent), ft, -1, *latent.shape[3:])
    level = torch.as_tensor(level, dtype=latent.dtype, device=latent.device)
    return torch.cat([diffusion.add_noise(latent, eps, level) * mask[:, :1], mask], dim=1)


def level_table(steps: int, level: Tensor, fixed: Tensor, ratio: float) -> Tensor:
    """Levels that fall from `level` [t] to 0, except where `fixed` [t]: [steps + 1, 1, t, 1, 1].

    ratio: how many times as many patches as in training. With more patches, the same noise hides
    less, so a clip's content is decided at higher levels: see `diffusion.shift_level`."""
    falling = diffusion.straight_levels(steps, diffusion.shift_level(level, 1 / ratio))  # [.., t]
    falling = diffusion.shift_level(falling, ratio)
    falling[0], falling[-1] = level, 0.0  # to the last bit
    return torch.where(fixed, level, falling).view(-1, 1, len(level), 1, 1)


@dataclass
class Batch:
    """Tasks that are done together, and their frames so far."""

    run: Run
    tasks: list[Task]
    how: Settings
    video: np.ndarray  # uint8 [N, C, K, H, W], up to the last known frame

    def actions(self, window: Window) -> list[Tensor]:
        """Those of a window, [t, ft] for each clip."""
        ft = self.run.ft
        done = [np.zeros(len(x.known), int) if x.actions is None else x.actions for x in self.tasks]
        done = [np.pad(x, ft)[ft + window.first : ft + window.end] for x in done]
        return [patches.latent_actions(x, ft) for x in done]

    def packed(self, texts: list[list[int]], actions, given: Tensor, start: int) -> Callable:
        """The DiT as a callable for `diffusion.sample`, with one clip in each row: x
        [N, Z, t, h, w], level [N or 1, 1, t or 1, 1, 1]. given: what is known."""
        run, p, N, Z = self.run, self.run.config["patch"], len(given), given.shape[1] - self.run.ft
        L = max(map(len, texts)) + patches.token_count(given.shape[2:], p)
        rows, starts = [[k] for k in range(N)], [start] * N
        layout = patches.pack(list(given[:, :Z]), texts, p, L, rows, starts, actions)

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            shown = patches.patchify(torch.cat([x, given], dim=1), p).flatten(0, 1)  # [N n, inputs]
            tokens = shown.new_zeros(N, L, shown.shape[-1])  # [N, L, inputs]
            tokens[layout.is_patch] = shown  # rows are in the order of clips
            levels = level.expand(N, 1, x.shape[2], 1, 1).flatten(1)  # [N, t]
            table = patches.per_frame(layout, list(levels))  # [F]
            with bf16(run.device):
                output = run.dit(tokens, table, layout)  # [N, L, D]
            return torch.stack(patches.unpack(output.float(), layout))  # [N, Z, t, h, w]

        return denoise

    def denoiser(self, window: Window, given: Tensor, ratio: float) -> Callable:
        """With guidance, and a mixture of both prompts where one turns into the other. A prompt
        says how a clip starts; later windows are conditioned only on what lasts."""
        run, later, actions = self.run, window.past > 0, self.actions(window)
        said = [map(run.lasting, x.prompts) if later else x.prompts for x in self.tasks]
        first, last = zip(*(map(run.tokenizer.encode, both) for both in said), strict=True)
        denoise = begin = self.packed(first, actions, given, window.start)
        if first != last:
            end = self.packed(last, actions, given, window.start)
            frame = window.first + (len(window.known) - 1) % run.ft  # the last of latent 0
            middle = frame - (run.ft - 1) / 2 + run.ft * torch.arange(given.shape[2])  # [t]
            share = (middle - window.turn[0]) / max(1, window.turn[1] - 1 - window.turn[0])
            share = share.clamp(0, 1).view(-1, 1, 1).to(given)  # [t, 1, 1]

            def denoise(x: Tensor, level: Tensor) -> Tensor:
                return torch.lerp(begin(x, level), end(x, level), share.expand_as(x))

        idle = [torch.zeros_like(done) for done in actions]
        nothing = self.packed([[NOTHING]] * len(first), idle, given, window.start)
        guidance = min(self.how.guidance, LATER) if later else self.how.guidance
        least = diffusion.shift_level(torch.tensor(self.how.alone), ratio).item()
        return diffusion.guided(denoise, nothing, guidance, least)

    def denoise(self, window: Window, generators: list, past: Tensor | None, source) -> Tensor:
        """From noise to the clean latents of a window [N, Z, t, h, w]. past: the latents that it
        takes over; source: those of the clip that is edited. Known latents stay bit for bit."""
        run, vae, n, k = self.run, self.run.vae.config, len(window.known), window.past
        t, h, w = -(-n // run.ft), *(side // vae.space_factor for side in self.video.shape[3:])

        def noise() -> Tensor:  # each clip's from a generator of its own
            eps = [torch.randn(vae.channels, t, h, w, generator=g) for g in generators]
            return torch.stack(eps).to(run.device)  # [N, Z, t, h, w]

        eps = noise()
        clean = torch.zeros_like(eps) if source is None else source
        given = eps.new_zeros(len(eps), vae.channels + run.ft, t, h, w)
        area = max(H * W for H, W in run.world["shapes"]) // vae.space_factor**2
        ratio = max(1.0, t * h * w / (run.window * area)) * run.config["shift"]
        # The level from which the last `strength` of all steps fall; what is known has its own.
        level = diffusion.shift_level(eps.new_full((t,), self.tasks[0].strength), ratio)
        fixed, own = torch.arange(t).to(eps) < k, 0.0
        if k:
            clean, own = torch.cat([past, clean[:, :, k:]], dim=2), self.how.noise
            given = noisy_past(clean, k, own, noise(), run.ft)
        elif window.known.any():
            known = torch.from_numpy(window.known).to(run.device).expand(len(eps), -1)
            video = video_of(run, self.video, window.first, n)
            given, (fixed, *_) = run.vae.encode_known(video, known)  # [t], the same for each clip
            clean = torch.where(fixed[:, None, None], given[:, : vae.channels], clean)
        level = torch.where(fixed, own, level)
        x = diffusion.add_noise(clean, eps, level[:, None, None])
        levels = level_table(self.how.steps, level, fixed, ratio)
        how = self.how.eta, run.config["prediction"], generators
        return diffusion.sample(self.denoiser(window, given, ratio), x, levels, *how)


# -------------------------------------------------------------------------------------- all windows


@torch.no_grad()
def complete(run: Run, tasks: list[Task], seeds: list[int], how: Settings) -> Iterator[np.ndarray]:
    """Tasks of one size, mask and strength, a seed each -> uint8 [N, C, n, H, W] ..., in order: all
    frames of the clips, the known ones bit for bit. Frames after the last known one come as they
    are made, in memory that does not grow. A clip depends only on its own task and seed."""
    kinds = {(x.clip.shape, x.known.tobytes(), x.strength, x.frames) for x in tasks}
    if len(kinds) != 1 or len(tasks) != len(seeds):
        raise ValueError("a batch has tasks of one size, mask and strength, and a seed for each")
    task, vae = tasks[0], run.vae
    plan = windows(task, run, how.past)
    T, K = len(task.known), 1 + max(np.flatnonzero(task.known), default=-1)
    end, source = task.frames or T, None
    if task.strength == 0:
        plan, K = [], T
    batch = Batch(run, tasks, how, np.stack([x.clip[:, :K] for x in tasks]))
    for window in plan:
        if not window.past:  # else the decoder and the random numbers go on
            at, cache, latent = window.first, None, None
            generators = [torch.Generator().manual_seed(seed + window.part) for seed in seeds]
            if task.strength < 1:
                n = 1 + -(-(T - at - 1) // run.ft) * run.ft
                source = vae.encode(video_of(run, [x.clip for x in tasks], at, n))
        k = -(-(window.first - at) // run.ft)  # its first latent
        part = None if source is None else source[:, :, k : k + -(-len(window.known) // run.ft)]
        past = latent[:, :, -window.past :] if window.past else None
        latent = batch.denoise(window, generators, past, part)
        video, cache = vae.reconstruct(latent[:, :, window.past :] * vae.std + vae.mean, cache)
        lo, hi = window.made
        k = lo - window.first - run.ft * window.past
        made = to_uint8(video[:, :, k : k + hi - lo])
        given = np.stack([x.clip[:, lo:hi] for x in tasks])
        made = np.where(task.known[lo:hi, None, None], given, made)
        batch.video[:, :, lo:hi] = made[:, :, : max(0, K - lo)]
        if lo <= K < hi and K:
            yield batch.video[:, :, :end]
        if hi > K:
            yield made[:, :, max(0, K - lo) : max(0, end - lo)]
    if K == T:
        yield batch.video[:, :, :end]


def alike(clips: list[np.ndarray]) -> list[list[int]]:
    """The numbers of clips of one size, some at a time."""
    kinds = defaultdict(list)
    for k, clip in enumerate(clips):
        kinds[clip.shape].append(k)
    return [x[k : k + AT_ONCE] for x in kinds.values() for k in range(0, len(x), AT_ONCE)]


def finished(
    run: Run, tasks: list[Task], seeds, how: dict | None = None, expanded: bool = False
) -> list[np.ndarray]:
    """A whole clip uint8 [C, T, H, W] for each of the tasks, which are of one kind but of any
    sizes. how: what differs from `settings`; expanded: with prompts expanded first."""
    made, groups = [None] * len(tasks), alike([task.clip for task in tasks])
    for some in tqdm(groups, desc="making", leave=False, disable=len(groups) == 1):
        few, numbers = [tasks[k] for k in some], [seeds[k] for k in some]
        few = expand(run, few, numbers) if expanded else few
        chunks = complete(run, few, numbers, replace(settings(run, few[0]), **(how or {})))
        for k, clip in zip(some, np.concatenate(list(chunks), axis=2), strict=True):
            made[k] = clip
    return made


# --------------------------------------------------------------------------------- expanded prompts


def read_part(run: Run, clips: list[np.ndarray], last: bool) -> list[Tensor] | None:
    """The part of known clips that the language model sees: latents [Z, n, h, w] of the first or
    last frames, as many as in training. None if there are none, or if frames are larger."""
    L, H, W = clips[0].shape[1:]
    if not L or max(H, W) > max(map(max, run.world["shapes"])):
        return None
    n = 1 + (min(L, max(run.world["durations"])) - 1) // run.ft * run.ft
    return list(run.vae.encode(video_of(run, clips, L - n if last else 0, n)))


@torch.no_grad()
def expand(run: Run, tasks: list[Task], seeds: list[int]) -> list[Task]:
    """Tasks with full captions for short prompts, if the DiT learned from those. A full caption
    says how a clip starts, and agrees with the known frames. If the first window does not start
    with the clip, the caption says only what lasts, as seen in the known frames beside the gap."""
    task, plan = tasks[0], windows(tasks[0], run)
    if not run.language or not plan:
        return list(tasks)
    (T, H, W), (lo, hi) = task.clip.shape[1:], plan[0].turn
    follow = hi + int(np.pad(task.known[hi:], (0, 1)).argmin())  # where known frames end again
    begins = not (plan[0].start or plan[0].first or follow > hi)
    sees = slice(lo if task.strength == 1 else T) if lo or begins else slice(hi, follow)

    def told(prompts: list[str], sees: slice, last: bool) -> list[str]:
        part = read_part(run, [x.clip[:, sees] for x in tasks], last)
        if begins:
            return run.language.expand(prompts, (T, H, W), seeds, part)
        if part is not None:  # also an image is of a clip that moves
            size = max(2, 1 + (part[0].shape[1] - 1) * run.ft), H, W
            prompts = run.language.expand(prompts, size, seeds, part, later=True)
        return list(map(run.lasting, prompts))

    first = told([x.prompt for x in tasks], sees, lo > 0 and not begins)
    made = [replace(x, prompt=said) for x, said in zip(tasks, first, strict=True)]
    if any(x.prompt_end is not None for x in tasks):
        sees = slice(hi, follow) if follow > hi else sees
        last = told([x.prompts[1] for x in tasks], sees, follow == hi and lo > 0)
        made = [replace(x, prompt_end=said) for x, said in zip(made, last, strict=True)]
    return made


# --------------------------------------------------------------------------------------------- demo


def main() -> None:
    torch.manual_seed(0)
    world = data.Digits(data.WorldConfig(shapes=((32, 32),), durations=(17,)))
    a, b = (clip.pixels for clip in world.clips(np.arange(2), frames=9))
    words, vae = Tokenizer([]), VAE(VAEConfig(channels=3, width=16))
    dit = DiT(DiTConfig(4 * (2 * 3 + 4), 4 * 3, words.size, width=32, depth=1, heads=2))
    run = Run(vae, dit, words, world.about(), {"patch": 2, "prediction": "x", "shift": 1.0})
    tasks = {"new": new(run, (25, 32, 32), ""), "animate": animate(a[:, :1], 17, "")}
    tasks |= {"extend": extend(a, 16, ""), "backward": extend(a, 16, "", backward=True)}
    tasks |= {"loop": loop(a, 7, ""), "connect": connect(a, b, 7, ""), "edit": edit(a, 0.6, "")}
    clips, marks = [], []
    for name, task in tasks.items():
        clips += finished(run, [task], [0], {"steps": 4})
        marks.append(task.known[: clips[-1].shape[1]])
        plan = ", then ".join("{} to {}".format(*window.made) for window in windows(task, run))
        print(f"{name:8s} {sum(marks[-1]):2d} frames known, makes {plan} -> {clips[-1].shape}")
    page = data.sheet(clips, list(tasks), scale=1, most=25, marks=marks)
    page.save("prompting_demo.png")
    print("wrote prompting_demo.png: marked frames are known, the others by an untrained model")


if __name__ == "__main__":
    main()
