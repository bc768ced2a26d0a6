"""Clips with captions, at their native size: the moving-MNIST worlds.

The problem. A video model needs clips, and captions that say what happens in them. Real clips come
in every duration and shape, and nobody has the ground truth of what they show. So we start from a
world that we write ourselves: digits that move at constant speed and bounce off the walls
(Srivastava et al. 2015, "Unsupervised learning of video representations using LSTMs", section 4).
Everything that is true of a clip is known, so everything that a model claims about it can be
checked.

The idea. Clip number i of seed s is a *pure function* of (s, i): its random numbers are a hash of
the two, not the state of a generator. So any worker makes any clip in any order, nothing has to be
saved to resume, and a whole batch is a few NumPy operations:

    seed, i  --hash-->  u [n, draws] in [0, 1)  -->  facts (digit, direction, ...)  -->  pixels

Native sizes (the report's "variable durations, resolutions, aspect ratios"): each clip draws a
duration T and a shape H x W from a list; an image is a clip of T = 1. Nothing is cropped or padded.

Alphabet: T frames of H x W pixels; a clip is [C, T, H, W], uint8 here, with C = 1 (gray).

Run `python data.py` for a contact sheet of clips with their captions.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
TRIES = 32  # places tried for two digits that must not overlap at the start
HELD_OUT = 50  # the last 50 digits of each class are for evaluation only


# ---------------------------------------------------------------------------------------- digits


def load_digits(path="digits.png"):
    """Read the sprite sheet: 5,000 MNIST digits, 500 of each class in class order, 100 to a row.

    Returns images [5000, 28, 28] uint8 and labels [5000].
    """
    sheet = np.asarray(Image.open(path).convert("L"))  # [1400, 2800]
    images = sheet.reshape(50, 28, 100, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    return images, np.repeat(np.arange(10), 500)


def load_mnist(folder):
    """Read the full MNIST from its IDX files (LeCun et al.), plain or gzipped.

    The format: two zero bytes, a type byte, the number of dimensions, each dimension as a
    big-endian int32, then the bytes. Returns images [60000, 28, 28] uint8 and labels [60000].
    """
    import gzip

    def read(stem):
        for name in (stem, stem.replace("-idx", ".idx")):
            for path in (Path(folder, name), Path(folder, name + ".gz")):
                if path.exists():
                    raw = path.read_bytes()
                    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                    shape = np.frombuffer(raw, ">i4", raw[3], 4)
                    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
        raise FileNotFoundError(
            f"no {stem} or {stem}.gz in {folder}: --mnist takes the IDX files of MNIST"
        )

    images, labels = read("train-images-idx3-ubyte"), read("train-labels-idx1-ubyte")
    return images, labels.astype(np.int64)


def split(images, labels, held_out):
    """The training digits, or the held-out ones: the last `HELD_OUT` of each class."""
    last = np.zeros(len(labels), bool)
    for k in range(10):
        last[np.flatnonzero(labels == k)[-HELD_OUT:]] = True
    return images[last == held_out], labels[last == held_out]


def make_sprites(images, size):
    """Crop each digit to its ink, centre it in 20 x 20 (which every MNIST digit fits), scale.

    images [N, 28, 28] uint8 -> sprites [N, size, size] uint8.
    """
    sprites = np.zeros((len(images), size, size), np.uint8)
    for image, sprite in zip(images, sprites, strict=True):
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        top, left = (20 - ink.shape[0]) // 2, (20 - ink.shape[1]) // 2
        box = np.zeros((20, 20), np.uint8)
        box[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        if size != 20:
            box = np.asarray(Image.fromarray(box).resize((size, size), Image.BILINEAR))
        sprite[:] = box
    return sprites


# ----------------------------------------------------------------------- randomness without a state


def hashed_uniform(seed, index, draws):
    """Random numbers that depend on nothing but their own address: u [n, draws] in [0, 1).

    index [n]: clip numbers. The hash is the output function of SplitMix64 (Steele, Lea and Flood
    2014, "Fast splittable pseudorandom number generators"), applied to (seed, clip), then to the
    draw.
    """

    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        clip = mix(
            mix(np.full(1, seed, np.uint64) * golden) + np.asarray(index, np.uint64) * golden
        )
        bits = mix(clip[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * golden)  # [n, draws]
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


# ---------------------------------------------------------------------------------------- the world


@dataclass
class WorldConfig:
    """What the world looks like. Lengths are pixels, speeds pixels a frame."""

    digit: int = 14  # a digit's box; 14 of 32 is the classic 28 of 64, halved
    durations: tuple[int, ...] = (9, 17)  # of videos
    images: float = 0.4  # the share of clips that are single frames
    shapes: tuple[tuple[int, int], ...] = ((32, 32), (24, 40), (40, 24), (32, 48), (48, 32))
    image_shapes: tuple[tuple[int, int], ...] = ((16, 16), (24, 24))  # more shapes, of images only
    two_digits: float = 0.3  # the share of clips with two digits, where two have room side by side
    speeds: tuple[int, ...] = (1, 2)


class World:
    """An endless, numbered sequence of clips. `facts` says all that is true of a clip; pixels and
    captions are both made from the facts, so they cannot disagree."""

    lost = frozenset()  # clips that cannot be read; a folder of files has some

    def __init__(self, config, images, labels, seed=0):
        self.config, self.seed = config, seed
        self.sprites, self.labels = make_sprites(images, config.digit), labels

    def size(self, index, images=None):
        """(T, H, W) of each clip: index [n] -> [n, 3]. Cheap, so that packing can look ahead.

        `images` overrides the share of single frames.
        """
        u = hashed_uniform(self.seed, index, 2)
        c = self.config
        durations, shapes = np.array(c.durations), np.array(c.shapes + c.image_shapes)
        images = self.config.images if images is None else images
        video = (u[:, 0] - images) / max(1 - images, 1e-9)  # in [0, 1) for what is not an image
        T = np.where(video < 0, 1, durations[(video.clip(0) * len(durations)).astype(int)])
        choice = np.where(T == 1, len(shapes), len(c.shapes))  # the image shapes come last
        return np.column_stack([T, shapes[(u[:, 1] * choice).astype(int)]])

    def facts(self, index, size):
        """What happens in clips `index` [n] of `size` [n, 3]; arrays are [n, 2], a column a digit:

        sprite; start (row, column) of its box [n, 2, 2]; velocity [n, 2, 2]; present (bool).
        """
        n, digit = len(index), self.config.digit
        # The first two made the size.
        u = hashed_uniform(self.seed, index, 2 + 1 + 2 * 3 + 4 * TRIES)[:, 2:]
        room = np.asarray(size)[:, None, 1:] - digit  # [n, 1, 2]: how far a box can travel
        if (room < 0).any():
            least = np.min(size[:, 1:])
            raise ValueError(f"a digit of {digit} pixels does not fit into a canvas of {least}")
        second = (u[:, 0] < self.config.two_digits) & (room.max((1, 2)) >= digit)
        present = np.stack([np.ones(n, bool), second], axis=1)
        pick = u[:, 1:7].reshape(n, 2, 3)  # sprite, direction, speed of either digit
        sprite = (pick[..., 0] * len(self.labels)).astype(int)
        direction = np.array(list(DIRECTIONS.values()))[(pick[..., 1] * 4).astype(int)]  # [n, 2, 2]
        speed = np.array(self.config.speeds)[(pick[..., 2] * len(self.config.speeds)).astype(int)]
        velocity = direction * speed[..., None]

        # Starts. A wall ahead is at least 4 frames away where there is room, or "moving left" could
        # mean a clip that moves right from its second frame on.
        runway = np.clip(4 * velocity, -room, room)
        low, high = np.maximum(0, -runway), room - np.maximum(0, runway)  # [n, 2, 2]
        place = u[:, 7:].reshape(n, TRIES, 2, 2)
        tries = (low[:, None] + place * (high - low + 1)[:, None]).astype(int)  # [n, TRIES, 2, 2]
        # Two digits start apart: the first try in which their boxes don't overlap.
        apart = (np.abs(tries[:, :, 1] - tries[:, :, 0]) >= digit).any(-1)  # [n, TRIES]
        start = tries[np.arange(n), apart.argmax(1)]  # [n, 2, 2]
        return {"sprite": sprite, "start": start, "velocity": velocity, "present": present}

    def path(self, facts, size, frames):
        """Where the boxes are: [n, frames, 2, 2] (row, column). Bouncing folds a straight line."""
        room = np.asarray(size)[:, None, None, 1:] - self.config.digit
        time = np.arange(frames)[None, :, None, None]
        straight = facts["start"][:, None] + facts["velocity"][:, None] * time
        folded = straight % np.maximum(2 * room, 1)  # one period there and back
        return np.minimum(folded, 2 * room - folded)

    def later(self, facts, size, frames):
        """The facts of the same clips, from `frames` [n] later on."""
        room = np.asarray(size)[:, None, 1:] - self.config.digit  # [n, 1, 2]
        start, velocity = facts["start"], facts["velocity"]  # [n, 2, 2]
        there = start + velocity * np.asarray(frames)[:, None, None]
        there = there % np.maximum(2 * room, 1)  # where it would be without walls, see `path`
        back = (there > room) | (there == room) & (velocity > 0) | (there == 0) & (velocity < 0)
        place = np.minimum(there, 2 * room - there)
        return facts | {"start": place, "velocity": np.where(back & (room > 0), -1, 1) * velocity}

    def clips(self, index, size=None):
        """Render clips: a list of [1, T, H, W] uint8 arrays, and a list of their facts.

        index [n] clip numbers; size [n, 3] overrides their native sizes.
        """
        index = np.asarray(index)
        size = (
            self.size(index) if size is None else np.broadcast_to(np.asarray(size), (len(index), 3))
        )
        clips, known = [None] * len(index), self.facts(index, size)
        for one in np.unique(size, axis=0):  # a group of equal size is rendered at once
            group = np.flatnonzero((size == one).all(1))
            pixels = self.render({name: value[group] for name, value in known.items()}, one)
            for k, g in enumerate(group):
                clips[g] = pixels[k]
        return clips, self.describe_all(known, size)

    # What training asks of any sequence of clips, this one or a folder of files (folder.py).

    def captions(self, index, size):
        """The prompts that people would write for clips `index`."""
        return [short_caption(facts) for facts in self.all_facts(index, size)]

    def numbers(self, step, most):
        """The `most` clips that a step may take from."""
        return step * most + np.arange(most)

    def known_steps(self, step):
        """Where to begin, to know which clips a step begins with: at the step itself."""
        return step

    def took(self, step, count):
        """How many of them a step took decides nothing."""

    def frames(self, index):
        """How many frames there are of each clip: it never ends."""
        return np.full(len(index), 2**31)

    def batch(self, step, part, parts, count):
        """One of `parts` of a batch for the VAE, and its share of it. Clips of one size, another
        one each step: in all as many pixels as `count` of the largest size have. In every eighth
        step images: a video's first frame is an image to a causal VAE.
        """
        T, H, W = self.size([step], images=float(step % 8 == 0))[0].tolist()
        n = self.as_many(count, (T, H, W))
        mine = np.arange(part, n, parts)
        return self.clips(step * 4 * count + mine, (T, H, W))[0], len(mine) / n

    def as_many(self, count, size):
        """How many clips of a size have the pixels of `count` of the largest: at most 4 count."""
        largest = max(self.config.durations) * max(h * w for h, w in self.config.shapes)
        return min(max(1, count * largest // int(np.prod(size))), 4 * count)

    def examples(self, count):
        """Long clips of every shape, to measure the VAE's latents on."""
        longest = max(self.config.durations)
        return (self.clips(np.arange(32), (longest, *s))[0] for s in self.config.shapes)

    def close(self):
        """There is nothing to end."""

    def all_facts(self, index, size, later=0):
        """The facts of clips, or of what is seen `later` frames [n] on in longer ones, in words,
        without rendering them: a list of what `describe` makes."""
        facts = self.facts(index, size)
        return self.describe_all(self.later(facts, size, np.broadcast_to(later, len(size))), size)

    def labelled(self, index, share):
        """For which clips, a share of all, somebody wrote the descriptive caption: bool [n]."""
        return hashed_uniform(self.seed + 2**32, index, 1)[:, 0] < share

    def short_captions(self, index, facts):
        """What was written for each of the clips."""
        u = hashed_uniform(self.seed + 2**32, index, 6)[:, 1:]
        return [noisy_caption(fact, k) for fact, k in zip(facts, u, strict=True)]

    def describe_all(self, known, size):
        one = [{name: value[k] for name, value in known.items()} for k in range(len(size))]
        return [self.describe(facts, s) for facts, s in zip(one, size, strict=True)]

    def render(self, facts, size):
        """facts of n clips of one size (T, H, W) -> pixels [n, 1, T, H, W] uint8."""
        (T, H, W), d = size, self.config.digit
        n = len(facts["sprite"])
        path = self.path(facts, np.broadcast_to(size, (n, 3)), T)  # [n, T, 2, 2]
        canvas = np.zeros((n, T, H, W), np.uint8)
        clip, frame = np.arange(n)[:, None, None, None], np.arange(T)[:, None, None]
        for k in range(2):
            on = np.flatnonzero(facts["present"][:, k])
            rows = path[on, :, k, 0, None, None] + np.arange(d)[:, None]  # [n, T, d, 1]
            columns = path[on, :, k, 1, None, None] + np.arange(d)  # [n, T, 1, d]
            where = (clip[on], frame, rows, columns)
            sprites = self.sprites[facts["sprite"][on, k]][:, None]  # [n, 1, d, d]
            canvas[where] = np.maximum(canvas[where], sprites)  # crossing: the brighter wins
        return canvas[:, None]

    def describe(self, facts, size):
        """The facts of one clip, in words that a caption or a measurement can use."""
        names = {v: k for k, v in DIRECTIONS.items()}
        T = int(size[0])
        digits = []
        for k in np.flatnonzero(facts["present"]):
            velocity, start = facts["velocity"][k], facts["start"][k]
            room = np.asarray(size[1:]) - self.config.digit
            axis = int(np.flatnonzero(velocity)[0])
            ahead = room[axis] - start[axis] if velocity[axis] > 0 else start[axis]
            travelled = abs(int(velocity[axis])) * (T - 1)
            bounces = 0
            if travelled > ahead and room[axis] > 0:
                bounces = 1 + (travelled - ahead - 1) // room[axis]
            digits.append({
                "digit": int(self.labels[facts["sprite"][k]]),
                "direction": names[tuple(int(v) for v in np.sign(velocity))],
                "speed": abs(int(velocity[axis])),
                "start": (int(start[0]), int(start[1])),
                "region": region(start, room),
                "bounces": int(bounces),
            })  # fmt: skip
        return {"frames": T, "height": int(size[1]), "width": int(size[2]), "digits": digits}


# ----------------------------------------------------------------------------------------- captions

REGIONS = ("top left", "top centre", "top right", "middle left", "middle centre", "middle right",
           "bottom left", "bottom centre", "bottom right")  # fmt: skip
NUMBERS = "zero one two three four five six seven eight nine".split()


def region(start, room):
    """Where a box starts, in thirds of the way it could go."""
    row, column = (int(3 * s / (r + 1)) for s, r in zip(start, room, strict=True))
    return REGIONS[3 * row + column]


def article(digit):
    return "an" if digit == 8 else "a"


def reading_order(digits):
    """Two digits from left to right; from top to bottom where they start one above the other.

    People name things in some order, and a caption that keeps to one says more: which of the two is
    meant by which words. Boxes do not overlap at the start, so that one of the two is always true.
    """
    if len(digits) < 2:
        return digits
    (row0, column0), (row1, column1) = (d["start"] for d in digits)
    aside = abs(column0 - column1) >= abs(row0 - row1)
    return digits if (column0 < column1 if aside else row0 < row1) else digits[::-1]


def short_caption(facts):
    """The prompt that people write: "a 3 moving up and an 8 moving right"."""
    told = (
        f"{article(d['digit'])} {d['digit']} moving {d['direction']}"
        for d in reading_order(facts["digits"])
    )
    return " and ".join(told)


def noisy_caption(facts, u):
    """What people really write. u [5] in [0, 1): half of the time it is the short caption, else
    each digit may lack its name or its direction: "a 3 and digit moving right"."""
    if u[0] < 0.5:
        return short_caption(facts)
    told = []
    digits = reading_order(facts["digits"])
    for d, (name, way) in zip(digits, u[1:].reshape(2, 2), strict=False):
        k = d["digit"]
        names = (f"{article(k)} {k}", f"{k}", NUMBERS[k], f"{article(k)} {NUMBERS[k]}", "digit")
        ways = (f" moving {d['direction']}", f" going {d['direction']}", f" {d['direction']}",
                " moving", "")  # fmt: skip
        told.append(names[int(name * len(names))] + ways[int(way * len(ways))])
    return " and ".join(told)


def descriptive_caption(facts):
    """All that can be seen: digit, start, direction, speed, what it does at the walls, length.

        "a 7 at top left moving right fast, 1 bounce. a 3 at ... . 17 frames."

    An image shows where a digit is, but not where it goes: "a 7 at top left. an image." Every digit
    takes as many words as any other. So a word's place says what it means (the left of a start or
    of a direction, of the first digit or of the second), and a small network learns that sooner.
    """
    still = facts["frames"] == 1
    sentences = []
    for d in reading_order(facts["digits"]):
        text = f"{article(d['digit'])} {d['digit']} at {d['region']}"
        if not still:
            pace = "fast" if d["speed"] > 1 else "slowly"
            times = f"{d['bounces']} bounce{'s' * (d['bounces'] != 1)}"
            text += f" moving {d['direction']} {pace}, {times}"
        sentences.append(text + ".")
    length = "an image." if still else f"{facts['frames']} frames."
    return " ".join(sentences + [length])


def lasting_caption(said):
    """What a descriptive caption says that stays true, however long the clip goes on: the digit,
    whether it moves across or up and down, its speed. Other texts stay what they are.

        "a 7 at top left moving right fast, 1 bounce. 17 frames."  ->  "a 7 moving across fast."
    """
    axis = {way: "upright" if rows else "across" for way, (rows, _) in DIRECTIONS.items()}
    lasting, moving = re.subn(
        r" at \w+ \w+ moving (left|right|up|down) (\w+), \d+ bounces?\.",
        lambda found: f" moving {axis[found[1]]} {found[2]}.",
        said,
    )
    return re.sub(r" \d+ frames\.$", "", lasting) if moving else said


# --------------------------------------------------------------------------------------------- demo


def main():
    images, labels = split(*load_digits(Path(__file__).parent / "digits.png"), held_out=False)
    world = World(WorldConfig(), images, labels)
    clips, facts = world.clips(np.arange(12))
    sheet = Image.new("L", (980, 12 * 66), 24)
    pen = ImageDraw.Draw(sheet)
    for k, (clip, fact) in enumerate(zip(clips, facts, strict=True)):
        T, H, W = clip.shape[1:]
        print(f"clip {k:2d}  [C, T, H, W] = {list(clip.shape)!s:17s} {short_caption(fact)}")
        print(f"         {descriptive_caption(fact)}")
        pen.text((6, 66 * k), f"{T} x {H} x {W}: {short_caption(fact)}", fill=255)
        for j, t in enumerate(range(0, T, 1 if T <= 9 else 2)):
            sheet.paste(Image.fromarray(clip[0, t]), (6 + j * (W + 4), 66 * k + 14))
    sheet.save("data_demo.png")
    print("wrote data_demo.png")


if __name__ == "__main__":
    main()
