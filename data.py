"""Worlds: numbered clips with captions, each a pure function of (seed, number); the moving digits.

The problem. A video model needs clips, and captions that say what happens in them. Real clips come
in every duration and shape, and nobody knows all that is true of them. A training wants to know
sizes before it needs pixels, to resume without saving a position, and to run on many machines.

The idea. A *world* is where clips come from, and everything above this file knows worlds only by
the contract `World`. Clip number i of seed s is a pure function of (s, i): its random numbers are a
hash of the two, not the state of a generator. So any worker makes any clip in any order:

    seed, i  --hash-->  u [n, draws] in [0, 1)  -->  facts (digit, direction, ...)  -->  pixels

The world in this file is moving MNIST: digits that move at constant speed and bounce off the walls
(Srivastava et al. 2015, "Unsupervised learning of video representations using LSTMs", section 4).
We write it ourselves, so all that is true of a clip is known, and every claim of a model can be
checked. Pixels and captions are both made from the facts, so they cannot disagree. Other worlds
have a file each in worlds/; people's own clips are worlds/folder.py.

Native sizes (the report's "variable durations, resolutions, aspect ratios"): each clip draws a
duration T and a shape H x W. Nothing is cropped or padded. An image is a clip of T = 1.

Alphabet: T frames of H x W pixels; a clip is uint8 [C, T, H, W]; n numbers are asked for at once.

Run `python data.py` for a contact sheet of clips with their captions.
"""

import importlib
import json
import re
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
UNSEEN = 10**6  # added to a run's seed: clips of other numbers

# ------------------------------------------------------------------------------------ the contract


@dataclass
class Clip:
    name: str  # what stands for it in captions.jsonl
    caption: str = ""  # the full one; "" where nobody wrote one
    brief: str = ""  # what a person would type; "" where nobody did
    pixels: np.ndarray | None = None  # uint8 [C, T, H, W]
    actions: np.ndarray | None = None  # int [T], done just before each frame; 0: nothing known
    facts: dict | None = None  # all that is true of it; None: nobody knows


@dataclass
class WorldConfig:
    """What decides which clips a world has; each world reads what it needs."""

    kind: str = "digits"  # or a file of worlds/, or a folder of people's clips
    seed: int = 0
    durations: tuple[int, ...] = (9, 17)  # frames of videos
    shapes: tuple[tuple[int, int], ...] = ((32, 32), (24, 40), (40, 24), (32, 48), (48, 32))
    image_shapes: tuple[tuple[int, int], ...] = ((16, 16), (24, 24))  # more, of images only
    fps: float = 10
    digit: int = 14  # pixels; a digit's box. 14 of 32 is the classic 28 of 64, halved
    two_digits: float = 0.5  # the share of clips with two, where two have room side by side
    speeds: tuple[int, ...] = (1, 2)  # pixels a frame
    labelled: float = 0.1  # the share of clips for which somebody wrote the full caption
    held_out: bool = False  # the digits that are kept for evaluation
    beyond: bool = False  # in simulated worlds: what training never shows
    crop: str = "none"  # or "square": the middle of each frame, in all worlds
    pixels: int = 1024  # a folder's clips are scaled down to about so many a frame,
    multiple: int = 8  # to sides that this divides,
    unit: int = 4  # and cut to 1 + unit k frames


class World:
    """Numbered clips. Arrays of numbers `i` are [n]; `image`: each clip as a single frame."""

    colors, actions = 1, ()  # C; the names of the actions 1, 2, ...
    briefs = True  # whether what a person would type is known, too: then prompts can be expanded
    slow = False  # whether clips take long to make: then worker processes make them ahead
    flags = {}  # what differs from train.py's defaults where this world is learned
    sampling = {}  # what differs from prompting.py's settings
    past = 0.5  # the share of a window that is taken over from the one before it
    noise = 0.6  # how noisy that is in training, at most; see `prompting.Settings`

    def __init__(self, config: WorldConfig):
        self.config, self.fps = config, config.fps
        self.durations, self.shapes = config.durations, config.shapes  # that its clips have
        self.image_shapes = config.image_shapes

    def __len__(self) -> int:
        return 2**18

    def sizes(self, i, image: bool = False) -> np.ndarray:
        """(T, H, W) of clips, without making them: [n, 3]."""
        u, shapes = hashed_uniform(self.config.seed, i, 2), self.shapes + self.image_shapes * image
        T, shapes = np.array((1,) if image else self.durations), np.array(shapes)
        T, shapes = (x[(k * len(x)).astype(int)] for x, k in zip((T, shapes), u.T, strict=True))
        return np.column_stack([T, shapes])  # [n, 3]

    def clips(self, i, image=False, later=0, frames=None, pixels=True) -> list[Clip | None]:
        """later (int or [n]): from that frame on; frames: how many. What cannot be read is None."""
        raise NotImplementedError

    def told(self, *args, **more) -> list[Clip]:
        """The same clips without their pixels."""
        return self.clips(*args, **more, pixels=False)

    def frames(self, i) -> np.ndarray:
        """How many frames there are from the start of each clip on: [n]."""
        return np.full(len(i), 2**31)

    def labelled(self, i) -> np.ndarray:
        """For which clips somebody wrote the full caption: bool [n]."""
        return np.ones(len(i), bool)

    def held_back(self, i) -> np.ndarray:
        """Which clips are never learned from, to measure on: bool [n]."""
        return hashed_uniform(self.config.seed + 2**35, i, 1)[:, 0] < 0.01

    def prompts(self, n: int) -> list[tuple[str, tuple[int, int, int]]]:
        """For a gallery: a prompt and a size (T, H, W) each."""
        i = np.arange(n)
        said = [clip.caption or clip.brief for clip in self.told(i)]
        return list(zip(said, map(tuple, self.sizes(i).tolist()), strict=True))

    @staticmethod
    def lasting(caption: str) -> str:
        """What a caption says that stays true, however long its clip goes on."""
        return caption

    @staticmethod
    def otherwise(clip: Clip, u: float) -> Clip | None:
        """The words for this clip with something else in it than is seen, as an edit asks for."""
        return None

    def close(self) -> None:
        """Say again what could not be read, if anything."""

    def about(self) -> dict:
        """What a trained network has to know of its world, as plain values."""
        names = "colors fps actions briefs durations shapes image_shapes sampling past".split()
        return {"config": asdict(self.config)} | {name: getattr(self, name) for name in names}

    def stamp(self) -> str:
        """Another one where any clip may be another."""
        return f"{zlib.crc32(json.dumps(self.about()).encode()):08x}"


def world_class(kind: str) -> type[World]:
    """To add a world, put a file into worlds/ whose WORLD is its class."""
    if kind == "digits":
        return Digits
    none = {"media", "simulated", "__init__"}
    known = {path.stem for path in (HERE / "worlds").glob("*.py")} - none
    return importlib.import_module(f"worlds.{kind if kind in known else 'folder'}").WORLD


class Square:
    """A world through a square in the middle of its frames, as most data sets are cut."""

    about = World.about  # of its own shapes

    def __init__(self, world: World):
        self.world = world
        self.shapes, self.image_shapes = (
            tuple(dict.fromkeys((min(shape),) * 2 for shape in shapes))
            for shapes in (world.shapes, world.image_shapes)
        )

    def __getattr__(self, name: str):
        if name[:2] == "__":  # what Python asks for before there is a world
            raise AttributeError(name)
        return getattr(self.world, name)

    def __len__(self) -> int:
        return len(self.world)

    def sizes(self, i, image: bool = False) -> np.ndarray:
        sizes = self.world.sizes(i, image)
        sizes[:, 1:] = sizes[:, 1:].min(1, keepdims=True)
        return sizes

    def clips(self, *args, **more) -> list[Clip | None]:
        clips = self.world.clips(*args, **more)
        for clip in (x for x in clips if x and x.pixels is not None):
            H, W = clip.pixels.shape[2:]
            top, left, side = max(0, H - W) // 2, max(0, W - H) // 2, min(H, W)
            clip.pixels = clip.pixels[:, :, top : top + side, left : left + side]
        return clips

    def prompts(self, n: int) -> list[tuple[str, tuple[int, int, int]]]:
        some = self.world.prompts(n)
        return [(said, (T, min(shape), min(shape))) for said, (T, *shape) in some]


def open_world(config: WorldConfig) -> World:
    world = world_class(config.kind)(config)
    return Square(world) if config.crop == "square" else world


def unseen(about: dict, **changes) -> World:
    """The world of `World.about`, of which nobody learned: other numbers, held-out digits."""
    config = WorldConfig(**about["config"])
    changes = {"seed": config.seed + UNSEEN, "held_out": True} | changes
    return open_world(replace(config, **changes))


def hashed_uniform(seed: int, i, draws: int) -> np.ndarray:
    """Random numbers that depend on nothing but their own address: u [n, draws] in [0, 1).

    The hash is the output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators"), applied to (seed, clip), then to the draw.
    """

    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        clip = mix(mix(np.full(1, seed, np.uint64) * golden) + np.asarray(i, np.uint64) * golden)
        bits = mix(clip[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * golden)  # [n, draws]
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


# ------------------------------------------------------------------------------- digits as sprites

HELD_OUT = 50  # of each class: the last ones are for evaluation only


def load_digits(held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The training digits of the sprite sheet, or the held-out ones: images [N, 28, 28] uint8 and
    labels [N]. The sheet has 5,000 MNIST digits, 500 of each class in class order, 100 to a row."""
    pixels = np.asarray(Image.open(HERE / "assets" / "digits.png").convert("L"))  # [1400, 2800]
    images = pixels.reshape(50, 28, 100, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    which = (np.arange(5000) % 500 >= 500 - HELD_OUT) == held_out
    return images[which], np.repeat(np.arange(10), 500)[which]


def make_sprites(images: np.ndarray, side: int) -> np.ndarray:
    """Crop each digit to its ink, centre it in 20 x 20 (which every MNIST digit fits), scale:
    images [N, 28, 28] uint8 -> sprites [N, side, side] uint8."""
    sprites = np.zeros((len(images), side, side), np.uint8)
    for image, sprite in zip(images, sprites, strict=True):
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        top, left = (20 - ink.shape[0]) // 2, (20 - ink.shape[1]) // 2
        box = np.zeros((20, 20), np.uint8)
        box[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        sprite[:] = np.asarray(Image.fromarray(box).resize((side, side), Image.BILINEAR))
    return sprites


# ------------------------------------------------------------------------------ the moving digits

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
TRIES = 32  # places tried for two digits that must not overlap at the start


class Digits(World):
    def __init__(self, config: WorldConfig):
        super().__init__(config)
        images, self.classes = load_digits(config.held_out)
        self.sprites = make_sprites(images, config.digit)

    def labelled(self, i) -> np.ndarray:
        return hashed_uniform(self.config.seed + 2**32, i, 1)[:, 0] < self.config.labelled

    def clips(self, i, image=False, later=0, frames=None, pixels=True) -> list[Clip]:
        i, sizes = np.asarray(i), self.sizes(i, image)
        sizes[:, 0] = frames or sizes[:, 0]
        later = np.broadcast_to(later, len(i))
        raw = self.draw(i, sizes)
        raw |= self.after(raw, sizes, later)
        u = hashed_uniform(self.config.seed + 2**32, i, 6)[:, 1:]
        clips = []
        for k, fact in enumerate(self.describe(raw, sizes)):
            name = f"{'image' if image else 'clip'} {i[k]} of seed {self.config.seed}"
            name += f", from frame {later[k]}" * bool(later[k])
            clips.append(Clip(name, "", noisy_caption(fact, u[k]), facts=fact))
        for k in np.flatnonzero(self.labelled(i)):
            clips[k].caption = descriptive_caption(clips[k].facts)
        for size in np.unique(sizes, axis=0) if pixels else ():  # equal sizes at once
            group = np.flatnonzero((sizes == size).all(1))
            made = self.render({name: value[group] for name, value in raw.items()}, size)
            for k, one in zip(group, made, strict=True):
                clips[k].pixels = one
        return clips

    def draw(self, i, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """What happens in clips i [n] of sizes [n, 3]; arrays are [n, 2], a column a digit: sprite;
        start (row, column) of its box [n, 2, 2]; velocity [n, 2, 2]; present (bool)."""
        n, c = len(i), self.config
        u = hashed_uniform(c.seed, i, 2 + 1 + 2 * 3 + 4 * TRIES)[:, 2:]  # two made the size
        room = np.asarray(sizes)[:, None, 1:] - c.digit  # [n, 1, 2]: how far a box can travel
        if (room < 0).any():
            least = np.min(sizes[:, 1:])
            raise ValueError(f"a digit of {c.digit} pixels does not fit into {least}")
        second = (u[:, 0] < c.two_digits) & (room.max((1, 2)) >= c.digit)
        present = np.stack([np.ones(n, bool), second], axis=1)
        pick = u[:, 1:7].reshape(n, 2, 3)  # sprite, direction, speed of either digit
        sprite = (pick[..., 0] * len(self.classes)).astype(int)
        direction = np.array(list(DIRECTIONS.values()))[(pick[..., 1] * 4).astype(int)]  # [n, 2, 2]
        speed = np.array(c.speeds)[(pick[..., 2] * len(c.speeds)).astype(int)]
        velocity = direction * speed[..., None]
        # A wall ahead is at least 4 frames away where there is room, or "moving left" could mean a
        # clip that moves right from its second frame on.
        runway = np.clip(4 * velocity, -room, room)
        low, high = np.maximum(0, -runway), room - np.maximum(0, runway)  # [n, 2, 2]
        place = u[:, 7:].reshape(n, TRIES, 2, 2)
        tries = (low[:, None] + place * (high - low + 1)[:, None]).astype(int)  # [n, TRIES, 2, 2]
        # Two digits start apart: the first try in which their boxes do not overlap.
        apart = (np.abs(tries[:, :, 1] - tries[:, :, 0]) >= c.digit).any(-1)  # [n, TRIES]
        start = tries[np.arange(n), apart.argmax(1)]  # [n, 2, 2]
        return {"sprite": sprite, "start": start, "velocity": velocity, "present": present}

    def after(self, raw: dict, sizes: np.ndarray, frames) -> dict[str, np.ndarray]:
        """Where the boxes are and how they move after so many frames (int or [n]): start and
        velocity [n, 2, 2] (row, column). Bouncing folds a straight line."""
        room, velocity = np.asarray(sizes)[:, None, 1:] - self.config.digit, raw["velocity"]
        straight = raw["start"] + velocity * np.reshape(frames, (-1, 1, 1))
        there = straight % np.maximum(2 * room, 1)  # as if there were no walls
        back = (there > room) | (there == room) & (velocity > 0) | (there == 0) & (velocity < 0)
        velocity = np.where(back & (room > 0), -1, 1) * velocity
        return {"start": np.minimum(there, 2 * room - there), "velocity": velocity}

    def path(self, raw: dict, sizes: np.ndarray, frames: int) -> np.ndarray:
        """Where the boxes are: [n, frames, 2, 2] (row, column)."""
        return np.stack([self.after(raw, sizes, t)["start"] for t in range(frames)], axis=1)

    def render(self, raw: dict, size) -> np.ndarray:
        """n clips of one size (T, H, W) -> pixels [n, 1, T, H, W] uint8."""
        (T, H, W), d, n = size, self.config.digit, len(raw["sprite"])
        path = self.path(raw, np.broadcast_to(size, (n, 3)), T)  # [n, T, 2, 2]
        canvas = np.zeros((n, T, H, W), np.uint8)
        clip, frame = np.arange(n)[:, None, None, None], np.arange(T)[:, None, None]
        for k in range(2):
            rows = path[:, :, k, 0, None, None] + np.arange(d)[:, None]  # [n, T, d, 1]
            columns = path[:, :, k, 1, None, None] + np.arange(d)  # [n, T, 1, d]
            sprites = self.sprites[raw["sprite"][:, k]] * raw["present"][:, k, None, None]
            where = (clip, frame, rows, columns)  # crossing: the brighter wins
            canvas[where] = np.maximum(canvas[where], sprites[:, None])  # [n, T, d, d]
        return canvas[:, None]

    def describe(self, raw: dict, sizes: np.ndarray) -> list[dict]:
        """The facts of each clip, in words that a caption or a measurement can use."""
        ways, facts = {v: k for k, v in DIRECTIONS.items()}, []
        room = np.asarray(sizes)[:, 1:] - self.config.digit
        for k, (T, H, W) in enumerate(np.asarray(sizes).tolist()):
            digits = []
            for j in np.flatnonzero(raw["present"][k]):
                velocity, start = raw["velocity"][k, j].tolist(), raw["start"][k, j].tolist()
                axis = 0 if velocity[0] else 1
                speed, far = abs(velocity[axis]), int(room[k, axis])
                ahead = far - start[axis] if velocity[axis] > 0 else start[axis]
                beyond = speed * (T - 1) - ahead  # past the first wall
                digits.append({
                    "digit": int(self.classes[raw["sprite"][k, j]]),
                    "direction": ways[tuple(int(np.sign(v)) for v in velocity)],
                    "speed": speed,
                    "start": tuple(start),
                    "region": region(start, room[k]),
                    "bounces": 1 + (beyond - 1) // far if beyond > 0 and far else 0,
                })  # fmt: skip
            facts.append({"frames": T, "height": H, "width": W, "digits": digits})
        return facts

    def prompts(self, n: int) -> list[tuple[str, tuple[int, int, int]]]:
        """Every digit and way; sizes take turns, and two digits get the widest shapes."""
        ways = "left right up down right left down up left right".split()
        said = [f"{article(k)} {k} moving {way}" for k, way in enumerate(ways)]
        said += ["a 3 moving up and an 8 moving right", "a 7 moving left and a 1 moving right"]
        longest, shapes = self.durations[::-1], self.shapes
        shape = [shapes[(-1 - k % 2 if k > 9 else k) % len(shapes)] for k in range(12)]
        return [(x, (longest[k % len(longest)], *shape[k])) for k, x in enumerate(said[:n])]

    @staticmethod
    def lasting(caption: str) -> str:
        """The digit, whether it moves across or upright, its speed; other texts stay as they are.

        "a 7 at top left moving right fast, 1 bounce. 17 frames."  ->  "a 7 moving across fast."
        """
        axis = {way: "upright" if rows else "across" for way, (rows, _) in DIRECTIONS.items()}
        moves = r" at \w+ \w+ moving (left|right|up|down) (\w+), \d+ bounces?\."
        lasts, found = re.subn(moves, lambda x: f" moving {axis[x[1]]} {x[2]}.", caption)
        return re.sub(r" \d+ frames\.$", "", lasts) if found else caption

    @staticmethod
    def otherwise(clip: Clip, u: float) -> Clip:
        """Every digit is another one, as far on from it."""
        on = 1 + int(9 * u)
        digits = [d | {"digit": (d["digit"] + on) % 10} for d in clip.facts["digits"]]
        facts = clip.facts | {"digits": digits}
        return Clip(clip.name, descriptive_caption(facts), short_caption(facts), facts=facts)


# --------------------------------------------------------------------------------------- captions

REGIONS = ("top", "middle", "bottom"), ("left", "centre", "right")  # by row, by column
NUMBERS = "zero one two three four five six seven eight nine".split()


def region(start, room) -> str:
    """Where a box starts, in thirds of the way it could go."""
    places = zip(REGIONS, start, room, strict=True)
    return " ".join(names[int(3 * at / (far + 1))] for names, at, far in places)


def article(digit: int) -> str:
    return "an" if digit == 8 else "a"


def reading_order(digits: list[dict]) -> list[dict]:
    """Two digits from left to right, or from top to bottom where they start one above the other: a
    caption that keeps to one order says which words are about which digit."""
    if len(digits) < 2:
        return digits
    (row0, column0), (row1, column1) = (d["start"] for d in digits)
    aside = abs(column0 - column1) >= abs(row0 - row1)
    return digits if (column0 < column1 if aside else row0 < row1) else digits[::-1]


def short_caption(facts: dict) -> str:
    """A complete short prompt: "a 3 moving up and an 8 moving right"."""
    return " and ".join(
        f"{article(d['digit'])} {d['digit']} moving {d['direction']}"
        for d in reading_order(facts["digits"])
    )


def noisy_caption(facts: dict, u: np.ndarray) -> str:
    """What people really write. u [5] in [0, 1): half of the time it is the short caption, else
    each digit may lack its name or its direction: "a 3 and digit moving right"."""
    if u[0] < 0.5:
        return short_caption(facts)
    said = []
    digits = reading_order(facts["digits"])
    for d, (name, way) in zip(digits, u[1:].reshape(2, 2), strict=False):
        k = d["digit"]
        names = (f"{article(k)} {k}", f"{k}", NUMBERS[k], f"{article(k)} {NUMBERS[k]}", "digit")
        ways = (f" moving {d['direction']}", f" going {d['direction']}", f" {d['direction']}",
                " moving", "")  # fmt: skip
        said.append(names[int(name * len(names))] + ways[int(way * len(ways))])
    return " and ".join(said)


def descriptive_caption(facts: dict) -> str:
    """All that can be seen: "a 7 at top left moving right fast, 1 bounce. a 3 at ... . 17 frames."

    An image shows where a digit is, but not where it goes: "a 7 at top left. an image." Every digit
    takes the same number of words, so a word's place says what it means (left as a start or as a
    direction, of the first digit or of the second), and a small network learns that sooner.
    """
    still, said = facts["frames"] == 1, []
    for d in reading_order(facts["digits"]):
        text = f"{article(d['digit'])} {d['digit']} at {d['region']}"
        if not still:
            pace, n = "fast" if d["speed"] > 1 else "slowly", d["bounces"]
            text += f" moving {d['direction']} {pace}, {n} bounce{'s' * (n != 1)}"
        said.append(text + ".")
    return " ".join([*said, "an image." if still else f"{facts['frames']} frames."])


# -------------------------------------------------------------------------------- a sheet of clips


def enlarge(clip: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [C, T, H, W] -> frames for people [T, scale H, scale W, 3]."""
    frames = clip.transpose(1, 2, 3, 0)  # [T, H, W, C]
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3))  # gray in three colours, too
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "arial.ttf")


@cache
def fonts() -> dict[ImageFont.FreeTypeFont, bytes]:
    """Pillow's own, and those of this machine that have more letters than it; with the empty box
    that each shows for a letter that it lacks."""
    found = [ImageFont.load_default()]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, 11))
    return {font: bytes(font.getmask("\U0010ffff")) for font in found}


@cache
def lettering(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """A title and the font that has most of its letters; for others there is a plain note."""
    letters = set("".join(text.split()))
    lacks = {font: {x for x in letters if bytes(font.getmask(x)) == box}
             for font, box in fonts().items()}  # fmt: skip
    font = min(lacks, key=lambda font: len(lacks[font]))
    left = "".join(x for x in text if x not in lacks[font]).strip()
    return left + " (and letters that no font here has)" * bool(lacks[font]), font


def sheet(clips, titles, columns=1, scale=3, most=9, marks=None) -> Image.Image:
    """Each clip as a strip of up to `most` frames below its title; an orange bar below those that
    are marked (a bool [T] for each clip)."""
    strips = []
    for k, clip in enumerate(clips):
        (T, H, W), many = clip.shape[1:], min(most, clip.shape[1])
        times = np.unique(np.linspace(0, T - 1, many).round().astype(int))
        strip = np.zeros((scale * H + 3, len(times), scale * W + 2, 3), np.uint8)
        strip[:-3, :, :-2] = enlarge(clip[:, times], scale).swapaxes(0, 1)
        if marks is not None:
            strip[-2:, np.asarray(marks[k])[times], :-2] = 255, 190, 80
        strips.append(Image.fromarray(strip.reshape(len(strip), -1, 3)))
    lines = [strips[k : k + columns] for k in range(0, len(strips), columns)]
    lettered = [lettering(title) for title in titles]
    wide = 8 + max([strip.width for strip in strips]
                   + [int(font.getlength(title)) for title, font in lettered])  # fmt: skip
    high = [max(strip.height for strip in line) + 22 for line in lines]
    size = wide * min(columns, len(strips)) + 8, sum(high) + 6
    page = Image.new("RGB", size, (32, 32, 32))
    pen, y = ImageDraw.Draw(page), 4
    for k, line in enumerate(lines):
        for x, strip in enumerate(line):
            title, font = lettered[k * columns + x]
            pen.text((8 + wide * x, y), title, fill=(255, 255, 255), font=font)
            page.paste(strip, (8 + wide * x, y + 16))
        y += high[k]
    return page


# ------------------------------------------------------------------------------------------- demo


def main() -> None:
    world = Digits(WorldConfig())
    clips, full = world.clips(np.arange(12)), []
    for k, clip in enumerate(clips):
        full.append(descriptive_caption(clip.facts))
        print(f"clip {k:2d}  [C, T, H, W] = {list(clip.pixels.shape)!s:17s} {clip.brief}")
        print(f"         {full[-1]}")
    sheet([clip.pixels for clip in clips], full).save("data_demo.png")
    print("wrote data_demo.png")


if __name__ == "__main__":
    main()
