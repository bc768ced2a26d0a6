"""Items: everything the diffusion transformer learns from, encoded once, in memory-mapped files.

The problem. In every epoch the same clips would be decoded and sent through the same VAE, which no
longer learns. That costs more than the transformer's own step.

The idea. Do it once, before. Each clip makes up to three items: the clip as it is, an image of it,
and a *conditioned* one: a few of its frames are known (to animate, extend, loop or connect), or it
is a window from later on, which continues its own past. Which is a function of (seed, number):

    plan   number -> from which frame, how many frames, which of them are known
    encode world.clips -> VAE -> latent [Z, a + t, h, w]      a latent frames before the window
                               given [Z + ft, t, h, w]        what is shown of known frames, if any

Each process appends to a shard of its own: `.bin` holds float16 numbers, item after item, and
`.idx` one row of int64 an item, written after its numbers. So what has a row is whole, whatever
interrupts, and to resume is to encode what has no row yet. Latents have variance 1, and float16 is
exact to 1 in 2,000. Items of another VAE or of changed clips are encoded anew.

Alphabet: Z channels and t frames of h x w in the latent grid; ft frames to a latent.
"""

import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Clip, World
from patches import latent_actions
from prompting import bf16
from training.checkpoints import write
from training.loop import STOP
from training.processes import barrier, made_ahead, rank, ranks
from vae import VAE, to_float

FARTHEST = 6  # latent frames; how much later than its clip a window may start
COLUMNS = "number image at t h w ahead later given lasts actions".split()

# ------------------------------------------------------------------------------ deciding: a plan


def draw_known(T: int, u: np.ndarray) -> np.ndarray:
    """Which frames of a clip are known: [T] bool. u [3 + T] is uniform in [0, 1)."""
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
class Plan:
    """What is to be encoded of one clip."""

    number: int
    image: bool
    size: tuple[int, int, int]  # (T, H, W) of the window
    known: np.ndarray  # [T] bool
    ahead: int = 0  # latent frames that are encoded before the window: its past, at least
    later: int = 0  # the frame of the clip at which it starts

    @property
    def conditioned(self) -> bool:
        return bool(self.ahead or self.known.any())

    @property
    def alike(self) -> tuple:  # plans of which this is the same are encoded together
        return self.size, self.image, self.ahead

    def row(self, grid: tuple[int, int, int], at=0, given=False, actions=False) -> list[int]:
        """Its row in the index: COLUMNS."""
        return [self.number, self.image, at, *grid, self.ahead, self.later, given, self.lasts,
                actions]  # fmt: skip

    @property
    def lasts(self) -> bool:
        """Whether only what lasts of its caption is true of it, or can be known when sampling: a
        window from later on, or one that leads to a known ending."""
        return bool(self.ahead or self.later or self.known[-1])


def condition(plan: Plan, c, frames: int) -> Plan:
    """The same clip as a window that sees its own past, or with known frames, as often as `c.later`
    to `c.given` (what lies between two ends, and half of what leads to an end, starts later on).
    frames: how many there are from its start on."""
    random, T = np.random.default_rng([c.seed, 3, plan.number]), plan.size[0]
    longer = frames >= T + FARTHEST * c.time_factor  # else it has no later on
    kind, ahead = random.random(), int(random.integers(1, FARTHEST + 1))
    if kind * (c.later + c.given) < c.later:
        return replace(plan, ahead=ahead * longer)
    known = draw_known(T, random.random(3 + T))
    apart = longer and known[-1] and (known[0] or random.random() < 0.5)
    return replace(plan, known=known, later=ahead * c.time_factor * int(apart))


def draw_plans(world: World, c) -> list[Plan]:
    """Of the first `c.items` clips: every clip, every clip as an image, and conditioned."""
    i = np.arange(min(len(world), c.items or len(world)))
    clips, images = (
        [Plan(k, image, tuple(size), np.zeros(size[0], bool))
         for k, size in zip(i.tolist(), world.sizes(i, image).tolist(), strict=True)]
        for image in (False, True)
    )  # fmt: skip
    each = zip(clips, world.frames(i).tolist(), strict=True)
    others = [condition(x, c, frames) for x, frames in each if x.size[0] > 1 and c.later + c.given]
    videos = [x for x in clips if x.size[0] > 1]
    images = images if c.images or c.image_phase or not videos else []  # or else nobody asks
    return videos + images + [x for x in others if x.conditioned]


# ------------------------------------------------------------------------------- encoding: a shard


@torch.no_grad()
def encode(vae: VAE, clips: list[Clip], plans: list[Plan]) -> list[tuple[Tensor | None, ...]]:
    """Clips of plans that are `alike`: of each its latent [Z, a + t, h, w]; what the network is
    shown of known frames [Z + ft, t, h, w], and its actions [a + t, ft], if there are any."""
    video = to_float([clip.pixels for clip in clips]).to(vae.mean.device)  # [b, C, T, H, W]
    latent, given = vae.encode(video), [None] * len(plans)
    some = [k for k, plan in enumerate(plans) if plan.known.any()]
    if some:
        known = torch.from_numpy(np.stack([plans[k].known for k in some])).to(video.device)
        for k, shown in zip(some, vae.encode_known(video[some], known)[0], strict=True):
            given[k] = shown
    actions = [None if x.actions is None else latent_actions(x.actions, vae.config.time_factor)
               for x in clips]  # fmt: skip
    return list(zip(latent, given, actions, strict=True))


def grouped(plans: list[Plan], pixels: int = 2**21) -> list[list[Plan]]:
    """Plans that are alike together, a few megabytes each, in random order."""
    kinds, groups = {}, []
    for plan in plans:
        kinds.setdefault(plan.alike, []).append(plan)
    for (size, _, ahead), some in kinds.items():
        most = max(1, pixels // (int(np.prod(size)) + 4 * ahead * size[1] * size[2]))
        groups += [some[k : k + most] for k in range(0, len(some), most)]
    return [groups[k] for k in np.random.default_rng(0).permutation(len(groups))]


def append(folder: Path, plans: list[Plan], encoded: list[tuple[Tensor | None, ...]]) -> None:
    """Add items to the shard of this process."""
    rows, path = [], folder / f"{rank():05d}.idx"
    with open(path.with_suffix(".bin"), "ab") as file:
        for plan, (latent, given, actions) in zip(plans, encoded, strict=True):
            t, h, w = latent.shape[1:]
            also = file.tell() // 2, given is not None, actions is not None
            rows.append(plan.row((t - plan.ahead, h, w), *also))
            some = [x for x in (latent, given, actions) if x is not None]
            numbers = torch.cat([x.flatten().cpu().half() for x in some])
            file.write(numbers.numpy().tobytes())
    with open(path, "ab") as file:
        file.write(np.array(rows, np.int64).tobytes())


def cut_torn(folder: Path) -> None:
    """Cut off the number and the row that were being written when something interrupted."""
    for end, size in ((".bin", 2), (".idx", 8 * len(COLUMNS))):  # bytes
        for path in folder.glob("*" + end):
            os.truncate(path, path.stat().st_size // size * size)


def about(world: World, vae: VAE, c) -> dict:
    """What makes items other items."""
    weights = b"".join(x.cpu().numpy().tobytes() for x in vae.state_dict().values())
    flags = {name: getattr(c, name) for name in ("seed", "items", "later", "given")}
    flags["images"] = bool(c.images or c.image_phase)
    return flags | {"vae": zlib.crc32(weights), "world": world.stamp()}


def make_items(world: World, vae: VAE, c, folder: Path) -> "Items":
    """Encode what is not there yet, and open it. Every process has its share."""
    what, path, shape = about(world, vae, c), folder / "about.json", (c.channels, c.time_factor)
    was = json.loads(path.read_text()) if path.exists() else {}
    if was == what | {"complete": True}:
        return Items(folder, *shape)
    barrier()  # until all have looked
    if rank() == 0:
        if was and was != what:
            print(f"{folder}: the VAE or the clips have changed: encoding them again", flush=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(what).encode())
        cut_torn(folder)
    barrier()
    done = Items(folder, *shape)
    have = set(zip(done["number"].tolist(), done["image"] > 0, done.conditioned, strict=True))
    plans = draw_plans(world, c)
    groups = grouped([x for x in plans if (x.number, x.image, x.conditioned) not in have])
    groups = groups[rank() :: ranks()]

    def decode(k: int) -> list:
        (T, _, _), image, ahead = groups[k][0].alike
        i, later = (np.array([getattr(x, name) for x in groups[k]]) for name in ("number", "later"))
        return world.clips(i, image, later, T + ahead * c.time_factor)

    loader = made_ahead(decode, range(len(groups)), c.workers * world.slow)
    bar = tqdm(total=sum(map(len, groups)), desc="items", unit="clip", disable=rank() > 0)
    for group, clips in zip(groups, loader, strict=True):
        here = [(plan, clip) for plan, clip in zip(group, clips, strict=True) if clip is not None]
        if here:
            plans, clips = zip(*here, strict=True)
            with bf16(vae.mean.device):
                encoded = encode(vae, clips, plans)
            append(folder, plans, encoded)  # in float16, which a CPU's autocast cannot join
        bar.update(len(group))
        if STOP:
            raise SystemExit("stopped while encoding; the same command continues")
    bar.close()
    barrier()
    if rank() == 0:
        write(path, json.dumps(what | {"complete": True}).encode())
    return Items(folder, *shape)


# --------------------------------------------------------------------------------- reading: items


class Items:
    """What all processes encoded, in the order of the clips' numbers: columns by name [n]."""

    def __init__(self, folder: Path, channels: int, time_factor: int):
        self.channels, self.time_factor = channels, time_factor
        self.shards, rows = [], [np.zeros((0, len(COLUMNS) + 1), np.int64)]
        for path in sorted(x for x in folder.glob("*.idx") if x.stat().st_size):
            found = np.fromfile(path, np.int64).reshape(-1, len(COLUMNS))
            rows.append(np.column_stack([found, np.full(len(found), len(self.shards))]))
            self.shards.append(np.memmap(path.with_suffix(".bin"), np.float16, "r"))
        self.rows = np.concatenate(rows)
        order = self.conditioned, self["image"], self["number"]  # whoever encoded them
        self.rows = self.rows[np.lexsort(order)]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def planned(cls, world: World, vae: VAE, c) -> "Items":
        """What would be encoded: sizes alone, to count with."""
        made = cls(Path("nowhere"), c.channels, c.time_factor)
        made.rows = np.array([plan.row(vae.grid(*plan.size)) for plan in draw_plans(world, c)])
        return made

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows[:, COLUMNS.index(name)]

    @property
    def conditioned(self) -> np.ndarray:
        """Which have known frames or a past: bool [n]."""
        return (self["ahead"] > 0) | (self["given"] > 0)

    def on_disk(self, k: int) -> dict[str, np.ndarray]:
        """The numbers of item k by name, in their shapes. None of them is read yet."""
        row = dict(zip([*COLUMNS, "shard"], self.rows[k].tolist(), strict=True))
        at, Z, ft, long = row["at"], self.channels, self.time_factor, row["ahead"] + row["t"]
        t, h, w = row["t"], row["h"], row["w"]
        shapes = {"whole": (Z, long, h, w), "given": (Z + ft, t, h, w), "actions": (long, ft)}
        found = {}
        for name, shape in shapes.items():
            if row.get(name, True):
                at, start = at + math.prod(shape), at
                found[name] = self.shards[row["shard"]][start:at].reshape(shape)
        return found

    def held(self, k: int) -> np.ndarray:
        """Which latent frames of an item with known frames are known whole: [t] bool."""
        mask = self.on_disk(k)["given"][self.channels :, :, 0, 0]  # [ft, t]
        return np.array(mask.all(0))

    def read(self, k: int) -> dict[str, Tensor | None]:
        """Item k: "whole" [Z, a + t, h, w], of which "latent" [Z, t, h, w] is the window; "given"
        [Z + ft, t, h, w] or None; "actions" [t, ft], zeros where it has none."""
        found = {x: torch.from_numpy(y.astype(np.float32)) for x, y in self.on_disk(k).items()}
        whole, ahead = found["whole"], int(self["ahead"][k])
        actions = found.get("actions", torch.zeros(whole.shape[1], self.time_factor))[ahead:]
        return {"whole": whole, "latent": whole[:, ahead:], "given": found.get("given"),
                "actions": actions.long()}  # fmt: skip
