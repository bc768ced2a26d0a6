"""What the diffusion transformer learns from in a step: clips of any size, captions, noise levels.

The problem. A step learns from dozens of clips, each of another size, some with given frames, some
with a caption of their own, some with a written one; and on many processes each must make only its
own part.

The idea. Decide first, make later. What a step consists of is a function of (seed, step): which
clips, their captions, which of their frames are given, their noise levels, and which row of the
batch each of them lies in. That costs next to nothing, so that every process decides on all of it.
Then each makes the pixels and latents of the rows that are its own:

    step -> numbers, sizes, captions -> clips in rows      the same everywhere
         -> rows dealt out, equally heavy -> this process's rows
         -> pixels -> latents [Z, t, h, w] -> packed tokens [B, L, D], a level for each frame

Many steps are made at once, since encoding many clips of one size is several times faster.

Alphabet: T frames of H x W pixels; latents [Z, t, h, w]; ft frames to a latent; B rows of L tokens;
F latent frames of all clips of a part.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import diffusion
import patches
import recaption
from folder import Folder
from latents import Latents, Shard
from loop import deal, rank, ranks, seeded
from prompting import bf16, encode_given, noisy_context, to_float
from text import Tokenizer
from vae import VAE

HELD_BACK = 10**6  # a step whose clips are only measured on
FARTHEST = 6  # latent frames; how much later than its clip a window may begin
MOST_NOISE = 0.6  # the highest level of a window's past; see `prompting.CONTEXT`


@dataclass
class Source:
    """Where batches come from."""

    vae: VAE
    tokenizer: Tokenizer
    world: data.World | Folder  # an endless, numbered sequence of clips
    written: dict[str, str] | None = None  # captions of the world's clips; None: the true ones
    stored: Latents | None = None  # what is not encoded any more


# --------------------------------------------------------------------------------- deciding: a clip


def draw_known(T: int, u: np.ndarray) -> np.ndarray:
    """Which frames of a clip are given: [T] bool. u [3 + T] is uniform in [0, 1)."""
    known, kind = np.zeros(T, bool), u[0]
    some = (u[1:3] * (T - 1) / 1.5).astype(int)  # at most two thirds
    if kind < 0.3:  # animate an image
        known[0] = True
    if 0.3 <= kind < 0.42 or 0.72 <= kind < 0.92:  # extend; with the next: connect
        known[: 1 + some[0]] = True
    if 0.42 <= kind < 0.92:  # extend backward, which is learned more slowly
        known[T - 1 - some[1] :] = True
    if kind >= 0.92:  # any frames
        known = u[3:] < u[1]
    return known & (not known.all())


@dataclass
class Clip:
    """What is decided of a clip before any pixel of it is made."""

    index: int  # its number
    key: int  # what decides: its number, or that of its encoding on disk
    size: tuple[int, int, int]  # (T, H, W)
    text: list[int]
    patches: int  # in each of its t latent frames
    known: np.ndarray  # [T] bool: frames that are given
    past: int  # latent frames that are given as a window's past, a little noisy; mostly none
    start: int  # 1: a window from later on in a longer clip, with a past or given frames; else 0
    level: np.ndarray  # [t] float: of each latent frame; NaN until the batch says
    free: np.ndarray  # [t] bool: whether it is to be learned

    @property
    def tokens(self) -> int:
        return len(self.text) + self.patches * len(self.free)

    @property
    def name(self) -> tuple:  # of a batch's latents: a clip may also be there as an image
        return self.index, self.size

    @property
    def alike(self) -> tuple:  # clips of which this is the same are encoded together
        return self.size, self.past > 0, self.start


def draw_given(
    vae: VAE, c, key: int, size: list[int], frames: int
) -> tuple[np.ndarray, int, int, np.ndarray]:
    """A window from later on in a longer clip, which sees its own past (see `prompting.roll`); or
    some frames are given (see `prompting.fill`), also of what lies between two ends, later on, and
    of what leads to an end, half of it from later on; or just a clip: `known`, `past`, `start` and
    `level` of a Clip. frames: how many there are."""
    random = np.random.default_rng([c.seed, 3, key])
    kind, T, t = random.random(), size[0], vae.grid(*size)[0]
    known, past, start, level = np.zeros(T, bool), 0, 0, np.full(t, np.nan)
    longer = frames >= T + FARTHEST * c.time_factor  # else it has no later on
    if T > 1 and kind < c.later:  # all of an image would be given
        if longer:
            past, start = int(random.integers(1, t)), 1
            level[:past] = MOST_NOISE * random.random()
    elif T > 1 and kind < c.later + c.given:
        known = draw_known(T, random.random(3 + T))
        given = np.append(np.repeat(known[:1], c.time_factor - 1), known)  # as `encode_given`
        level[given.reshape(t, -1).all(1)] = 0
        start = int(longer and known[-1] and (known[0] or random.random() < 0.5))
    return known, past, start, level


def draw_clip(
    vae: VAE, c, index: int, key: int, size: list[int], frames: int, text: list[int]
) -> Clip:
    known, past, start, level = draw_given(vae, c, key, size, frames)
    count = patches.token_count((1, *vae.grid(*size)[1:]), c.patch)
    free = np.isnan(level)
    return Clip(index, key, tuple(size), text, count, known, past, start, level, free)


# -------------------------------------------------------------------------------- deciding: a batch


def numbers(source: Source, c, step: int, most: int) -> np.ndarray:
    """The clips that a step may take from. Captions of the world are written once: so there, they
    are drawn from a set of `train_clips`. A prompt costs nothing, and what is held back is new."""
    index = source.world.numbers(step, most)
    if c.data or c.captions == "prompts" or step >= HELD_BACK:
        return index
    return (data.hashed_uniform(c.seed + 2**33, index, 1)[:, 0] * c.train_clips).astype(int)


def look(source: Source, c, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    """The clips that come next, as many as could fit at all: their numbers [n], sizes [n, 3],
    counts of patches [n], captions."""
    world, index = source.world, numbers(source, c, step, c.rows * c.tokens // 10)
    size = world.size(index, images=1.0 if step < c.image_phase * c.steps else c.images)
    kinds, kind = np.unique(size, axis=0, return_inverse=True)
    count = np.array([patches.token_count(source.vae.grid(*k), c.patch) for k in kinds.tolist()])
    count = count[kind.reshape(-1)]  # [most]
    few = max(1, int((count.cumsum() <= c.rows * c.tokens).sum()))
    index, size, count = index[:few], size[:few], count[:few]
    if c.data or c.captions == "prompts":
        captions = world.captions(index, size)
    else:
        captions = captions_of(source, c, index, size)
        if None in captions:
            missing = "captions.jsonl, beside text.pt, lacks clips that are to be learned from"
            raise ValueError(f"{missing}: --captions recaptioned --stage text writes them")
    dropped = torch.rand(few, generator=seeded(c.seed, 2, step)).numpy() < c.dropout
    return index, size, count, ["" if d else x for x, d in zip(captions, dropped, strict=True)]


def captions_of(source: Source, c, index: np.ndarray, size: np.ndarray) -> list[str | None]:
    """Of clips of the world [n] of sizes [n, 3] the descriptive captions that are known, those that
    the captioner wrote (None: it did not yet), and of a share the short ones.

    A caption says where things start and what they then do. Of a window from later on, or one that
    leads to a given ending, nobody knows that when sampling: it is told what stays true."""
    world, facts = source.world, source.world.all_facts(index, size)
    short, labelled = world.short_captions(index, facts), world.labelled(index, c.labelled)
    stays = data.hashed_uniform(c.seed + 2**34, index, 1)[:, 0] < c.short
    captions, frames = [], world.frames(index).tolist()
    for k, i in enumerate(index.tolist()):
        if stays[k] or c.captions == "noisy":
            captions.append(short[k])
            continue
        if labelled[k] or source.written is None:
            said = data.descriptive_caption(facts[k])
        else:
            said = source.written.get(recaption.name_of(world, i, size[k]))
        known, _, start, _ = draw_given(source.vae, c, i, size[k].tolist(), frames[k])
        lasts = said is not None and (start or known[-1])
        captions.append(data.lasting_caption(said) if lasts else said)
    return captions


def lay_out(
    source: Source, c, step: int, index: np.ndarray, size: np.ndarray, count: np.ndarray, captions
) -> tuple[list[Clip], list[list[int]]]:
    """The batch of a step, on all processes: the longest run of the clips that fits into it, and
    which of them are in which row."""
    texts = [
        source.tokenizer.encode(caption)[: max(1, c.tokens - n)]
        for caption, n in zip(captions, count.tolist(), strict=True)
    ]
    lengths = [len(text) + n for text, n in zip(texts, count.tolist(), strict=True)]
    plan = patches.longest_prefix(lengths, c.tokens, c.rows)
    n = sum(map(len, plan))
    index, stored, world = index[:n], source.stored, source.world
    keys = world.encodings(index, stored.turns) if stored else index
    drawn = zip(
        index.tolist(), keys.tolist(), size[:n].tolist(), world.frames(index).tolist(), texts[:n],
        strict=True,
    )  # fmt: skip
    clips = [draw_clip(source.vae, c, *of) for of in drawn]
    levels = diffusion.training_levels(len(clips), seeded(c.seed, 4, step))
    levels = diffusion.shift_level(levels, c.shift).tolist()
    for clip, level in zip(clips, levels, strict=True):
        clip.level[clip.free] = level
    world.took(step, n)
    return clips, plan


def draw_steps(source: Source, c, first: int, count: int) -> list[tuple]:
    """The batches of `count` steps from `first` on: (clips, plan) each. Own clips come each once in
    an epoch, so that a step begins where the one before it ended."""
    steps = range(source.world.known_steps(first), first + count)
    drawn = [lay_out(source, c, step, *look(source, c, step)) for step in steps]
    return drawn[-count:]


def own_rows(source: Source, c, first: int, count: int) -> list[tuple]:
    """(clips, plan, rows of this process's parts) of each step."""
    parts, drawn = ranks() * c.accumulate, []
    for step, (clips, plan) in enumerate(draw_steps(source, c, first, count), first):
        if len(plan) < parts:
            raise ValueError(f"the clips of step {step} fill {len(plan)} rows, for {parts} parts")
        # What a row costs: the linear maps (6 d n) and attention (n^2) of each clip, see cost.py.
        tokens = [[clips[k].tokens for k in row] for row in plan]
        dealt = deal([sum(6 * c.width * n + n * n for n in row) for row in tokens], parts)
        drawn.append((clips, plan, dealt[rank() * c.accumulate : (rank() + 1) * c.accumulate]))
    return drawn


def own_clips(drawn: list[tuple]) -> list[Clip]:
    return [clips[k] for clips, plan, own in drawn for rows in own for r in rows for k in plan[r]]


# ------------------------------------------------------------------------------------------- making


def by_kind(clips: list[Clip]) -> list[list[Clip]]:
    """Those that are `alike` together."""
    kinds = {}
    for clip in clips:
        kinds.setdefault(clip.alike, []).append(clip)
    return list(kinds.values())


@torch.no_grad()
def encode_alike(
    vae: VAE, world: data.World | Folder, c, clips: list[Clip], ahead: int
) -> list[Tensor]:
    """Clips that are `alike`: of each the clean latent and what the network is shown of given
    frames, [Z + Z + ft, t, h, w]. Windows begin `ahead` latent frames later."""
    (T, H, W), passed, start = clips[0].alike
    ft, index = c.time_factor, [clip.index for clip in clips]
    size = (T + ft * ahead * start, H, W)
    video = to_float(world.clips(index, size)[0]).to(vae.mean.device)  # [b, C, T, H, W]
    if passed:  # in latents, as they are handed on from window to window
        latent, given = vae.encode(video)[:, :, ahead:], []  # [b, Z, t, h, w]
        for clip, one in zip(clips, latent.split(1), strict=True):
            eps = torch.randn(one.shape, generator=seeded(c.seed, 6, clip.key)).to(one)
            given.append(noisy_context(one, clip.past, clip.level[0], eps, ft))
        return list(torch.cat([latent, torch.cat(given)], dim=1))
    video = video[:, :, ft * ahead * start :]
    latent = vae.encode(video)  # [b, Z, t, h, w]
    given = latent.new_zeros(len(clips), c.channels + ft, *latent.shape[2:])
    if some := [k for k, clip in enumerate(clips) if clip.known.any()]:
        known = torch.from_numpy(np.stack([clips[k].known for k in some])).to(video.device)
        given[some], held = encode_given(vae, video[some], known)
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


def dit_parts(source: Source, c, first: int, count: int) -> list[list[Part]]:
    """This process's parts of `count` steps from `first` on."""
    drawn = own_rows(source, c, first, count)
    clips, stored, latents = own_clips(drawn), source.stored, {}  # latents by name
    if stored is None:
        ahead = int(np.random.default_rng([c.seed, 7, first]).integers(1, FARTHEST + 1))
        for some in by_kind(clips):
            made = encode_alike(source.vae, source.world, c, some, ahead)
            latents |= zip((clip.name for clip in some), made, strict=True)
    else:
        for clip in (clip for clip in clips if clip.key in stored):
            latents[clip.name] = stored.read(clip.key, clip.size[0] == 1)
    latents = {name: z for name, z in latents.items() if name[0] not in source.world.lost}
    most = -(-c.rows // (ranks() * c.accumulate))  # rows of a part: always as many, some empty
    return [
        [make_part(c, clips, plan, rows, latents, most) for rows in own]
        for clips, plan, own in drawn
    ]


def make_part(
    c, clips: list[Clip], plan: list[list[int]], rows: list[int], latents: dict, most: int
) -> Part:
    """Some rows of a batch, packed. The place of a clip that could not be read stays empty."""
    here = [k for row in rows for k in plan[row] if clips[k].name in latents]
    if not here:
        raise ValueError("of a whole part of a batch, not one clip could be read")
    place = {k: j for j, k in enumerate(here)}
    layout = [[place[k] for k in plan[row] if k in place] for row in rows]
    layout += [[]] * (most - len(rows))
    mine = [clips[k] for k in here]
    texts, starts = [clip.text for clip in mine], [clip.start for clip in mine]
    encoded = [latents[clip.name] for clip in mine]
    packed = patches.pack(encoded, texts, c.patch, c.tokens, layout, starts)
    level = patches.frame_levels(packed, [torch.from_numpy(clip.level).float() for clip in mine])
    free = patches.frame_levels(packed, [torch.from_numpy(clip.free).float() for clip in mine])
    learned = sum(int(clip.free.sum()) * clip.patches for clip in clips)
    return Part(packed, level, free > 0, rows, learned)


# -------------------------------------------------------------------------- making it once, on disk


@torch.no_grad()
def encode_clips(source: Source, c, shard: Shard, done: Latents) -> None:
    """Own clips, each as training would make it and its first frame alone, into this process's
    shard: what is not `done` yet."""
    vae, world = source.vae, source.world
    groups = [group for turn in range(c.encodings) for group in world.groups(turn, c.vae_batch)]
    keys = [world.encodings(group, c.encodings).tolist() for group in groups]
    mine = range(rank(), len(keys), ranks())
    todo = [k for k in mine if not any(key in done for key in keys[k])]
    for j, k in enumerate(tqdm(todo, desc="encode", unit="group", disable=rank() > 0)):
        index, random = groups[k], np.random.default_rng([c.seed, 9, k])
        size = world.size(index[:1], images=0.0)[0].tolist()
        soon = np.concatenate([groups[n] for n in todo[j : j + 3]])
        world.prefetch(soon, world.size(soon, images=0.0))
        frames, made = world.frames(index).tolist(), {}
        for shape in ([1, *size[1:]], size):  # the first frames, then all
            drawn = zip(index.tolist(), keys[k], frames, strict=True)
            clips = [draw_clip(vae, c, i, key, shape, there, []) for i, key, there in drawn]
            ahead = int(random.integers(1, FARTHEST + 1))
            for some in by_kind(clips):
                with bf16(vae.mean.device):  # as in training
                    latents = encode_alike(vae, world, c, some, ahead)
                for clip, latent in zip(some, latents, strict=True):
                    made.setdefault(clip.index, [clip.key]).append(latent)
        shard.append([one for i, one in made.items() if i not in world.lost])
