"""What each step learns from: clips of one size for the VAE, packed items for the transformer.

The problem. A step learns from dozens of clips of different sizes, some with known frames, each
with a caption and a noise level; and on many processes each must make only its own part.

The idea. Decide first, make later. What a step consists of is a function of (seed, step): which
items, which captions are dropped, the noise levels, each clip's row. Deciding costs next to
nothing, so every process decides on all of it, and then reads only the rows that are its own:

    step -> items, captions, levels -> clips in rows      the same everywhere
         -> rows dealt out, equally heavy -> this process's rows
         -> latents [Z, t, h, w] -> packed tokens [B, L, D], a level for each frame

Alphabet: latents [Z, t, h, w]; ft frames to a latent; B rows of L tokens; F latent frames of all
clips of a part.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import diffusion
import patches
from data import World
from language import NOTHING
from prompting import noisy_past
from training.items import Items
from training.processes import deal, own_parts, seeded

# Share of the clips with actions of which each frame has a level of its own, rising along the clip
# (Chen et al. 2024, "Diffusion forcing"). With one level, only the first frame after a known past
# follows from what can be seen; of a clip that gets noisier, each one does from the one before it.
RISING = 0.5
DROPOUT = 0.1  # share of the captions, and of the actions, that are dropped: guidance needs that
HELD_BACK = 10**6  # a step whose clips are only measured on


# --------------------------------------------------------------------------------- for any network


Kinds = tuple[np.ndarray, np.ndarray]  # the different sizes [K, 3], and which each clip has [N]


def kinds(sizes: np.ndarray) -> Kinds:
    """sizes [N, 3]. As one number each, they are sorted 30 times as fast as in rows."""
    code = sizes @ [2**40, 2**20, 1]
    _, first, kind = np.unique(code, return_index=True, return_inverse=True)
    return sizes[first], kind


def same_size(of: Kinds, step: int, seed: int, count: int, largest: int) -> tuple[list, np.ndarray]:
    """A size (T, H, W), drawn as often as it occurs, and the places of clips that have it: together
    as many pixels as `count` clips of `largest` pixels, at most 4 count."""
    (sizes, kind), random = of, np.random.default_rng([seed, 8, step])
    one = kind[random.integers(len(kind))]
    alike, size = np.flatnonzero(kind == one), sizes[one].tolist()
    n = min(max(1, count * largest // int(np.prod(size))), 4 * count)
    return size, alike[random.integers(len(alike), size=n)]


# ----------------------------------------------------------------------------- for the transformer


@dataclass
class Source:
    """What a transformer learns from."""

    items: Items
    texts: list[list[int]]  # the caption of each item, as token ids
    c: object  # train.Config
    world: World

    def __post_init__(self):
        image, grid = self.items["image"] > 0, [self.items[name] for name in "thw"]
        self.frame = grid[1] * grid[2] // self.c.patch**2  # patches in each latent frame
        self.count = grid[0] * self.frame
        held = self.world.held_back(self.items["number"])  # bool [n]
        learn = ~held if (~held).any() else np.ones(len(held), bool)
        aside = held if held.any() else learn  # only measured on
        other = self.items.conditioned
        kinds = image, ~image & ~other, other
        self.pools = [[np.flatnonzero(of & kind) for kind in kinds] for of in (learn, aside)]
        if not len(self.items):
            raise ValueError("not one clip could be encoded")


@dataclass
class Drawn:
    """What is decided of one clip of a step."""

    item: int
    text: list[int]
    level: np.ndarray  # [t] float: of each latent frame
    free: np.ndarray  # [t] bool: whether it is to be learned
    past: int  # latent frames that are known as a window's past, a little noisy; mostly none
    acts: bool  # whether its actions are told
    start: int  # the time of its first frame: 1 in windows from later on
    patches: int  # in each latent frame

    @property
    def tokens(self) -> int:
        return len(self.text) + self.patches * len(self.free)


def draw_step(source: Source, step: int) -> tuple[list[Drawn], list[list[int]]]:
    """The batch of a step, on all processes, and which clips lie in which row."""
    c, items = source.c, source.items
    random = np.random.default_rng([c.seed, 2, step])
    u = random.random((c.rows * c.tokens // 10, 6))
    pools = source.pools[step >= HELD_BACK]  # images, clips, conditioned ones
    images = 1.0 if step < c.image_phase * c.steps or not len(pools[1]) else c.images
    images *= len(pools[0]) > 0
    other = (1 - images) * min(1.0, c.given + c.later)
    share = np.array([images, 1 - images - other, other]) * [len(pool) > 0 for pool in pools]
    share = share.cumsum() / share.sum()
    kind = np.searchsorted(share, u[:, 0], "right")
    pick = [pools[k][int(x * len(pools[k]))] for k, x in zip(kind, u[:, 1], strict=True)]
    pick = np.array(pick)
    room = (c.tokens - source.count[pick]).clip(min=1).tolist()
    texts = [source.texts[k][:n] for k, n in zip(pick.tolist(), room, strict=True)]
    texts = [x if keep else [NOTHING] for x, keep in zip(texts, u[:, 2] >= DROPOUT, strict=True)]
    lengths = [len(x) + int(n) for x, n in zip(texts, source.count[pick], strict=True)]
    plan = patches.longest_prefix(lengths, c.tokens, c.rows)
    n, drawn = sum(map(len, plan)), []
    levels = diffusion.training_levels(n, seeded(c.seed, 4, step))
    levels = diffusion.shift_level(levels, c.shift).numpy()
    for k, item in enumerate(pick[:n].tolist()):
        t, ahead, later = (int(items[name][item]) for name in ("t", "ahead", "later"))
        level, free, past = np.full(t, levels[k]), np.ones(t, bool), 0
        if items["actions"][item] and random.random() < RISING:
            rising = torch.from_numpy(np.sort(random.random(t)))
            level = diffusion.shift_level(rising, c.shift).numpy()
        if items["given"][item]:
            free = ~items.held(item)
        if ahead:
            past = 1 + int(u[k, 3] ** (1 / source.world.past - 1) * (t - 1))
            free[:past] = False
        level = np.where(free, level, source.world.noise * u[k, 4] * bool(ahead))
        acts, frame = bool(u[k, 5] >= DROPOUT), int(source.frame[item])
        start = int(ahead > 0 or later > 0)
        drawn.append(Drawn(item, texts[k], level, free, past, acts, start, frame))
    return drawn, plan


@dataclass
class Part:
    """What one process learns from at once: some rows of the batch of a step."""

    packed: patches.Packed  # tokens [B, L, p p (Z + Z + ft)]
    levels: Tensor  # [F] the level of each frame
    free: Tensor  # [F] bool: whether it is to be learned
    rows: list[int]  # which of the step's rows these are, as many as hold anything
    patches: int  # how many patches are to be learned in the step, on all processes

    def to(self, device: torch.device) -> "Part":
        on = {"packed": self.packed.to(device), "levels": self.levels.to(device)}
        return replace(self, **on, free=self.free.to(device))


def parts(source: Source, step: int) -> list[Part]:
    """This process's parts of the batch of a step."""
    c, made, (drawn, plan) = source.c, [], draw_step(source, step)
    own, many = own_parts(c.accumulate)
    if len(plan) < many:
        raise ValueError(f"the clips of step {step} fill {len(plan)} rows, for {many} parts")
    # What a row costs: its linear maps, and attention within each clip (see cost.py).
    lengths = [[drawn[k].tokens for k in row] for row in plan]
    dealt = deal([sum(6 * c.width * n + n * n for n in row) for row in lengths], many)
    learned = sum(int(clip.free.sum()) * clip.patches for clip in drawn)
    most = -(-c.rows // many)  # rows of a part: always as many, some of them empty
    for rows in (dealt[part] for part in own):
        here = [k for row in rows for k in plan[row]]
        place, mine = {k: j for j, k in enumerate(here)}, [drawn[k] for k in here]
        layout = [[place[k] for k in plan[row]] for row in rows] + [[]] * (most - len(rows))
        each = [show(source, drawn[k], seeded(c.seed, 6, step, k)) for k in here]
        shown, actions = zip(*each, strict=True)
        packed = patches.pack(shown, [clip.text for clip in mine], c.patch, c.tokens, layout,
                              [clip.start for clip in mine], actions)  # fmt: skip
        level = patches.per_frame(packed, [torch.from_numpy(x.level).float() for x in mine])
        free = patches.per_frame(packed, [torch.from_numpy(x.free) for x in mine])
        made.append(Part(packed, level, free, rows, learned))
    return made


def show(source: Source, clip: Drawn, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """The clean latent, and what the network is shown of known frames: [Z + Z + ft, t, h, w]; its
    actions, or zeros, "nothing known": [t, ft]."""
    item, ft = source.items.read(clip.item), source.c.time_factor
    latent, given = item["latent"], item["given"]
    Z = len(latent)
    if clip.past:
        eps = torch.randn(latent.shape, generator=noise)
        given = noisy_past(latent[None], clip.past, float(clip.level[0]), eps[None], ft)[0]
    elif given is None:
        given = latent.new_zeros(Z + ft, *latent.shape[1:])
    else:  # known frames are the target that they are in use: encoded without the others
        held = torch.from_numpy(~clip.free)[None, :, None, None]
        latent = torch.where(held, given[:Z], latent)
    return torch.cat([latent, given]), item["actions"] * clip.acts
