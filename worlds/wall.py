"""Walls: digits go behind them, and come out again.

The problem. The report says that Sora can often keep people, animals and objects "even when they
are occluded or leave the frame". In a film nobody knows where a hidden thing is, so nobody can say
what should come out, where and when.

The idea. The digits of data.py, and opaque walls painted over them. A hidden digit goes on at its
speed, and bounces at the edge of the picture as it would in view. So we know which digit comes out,
in which frame and where.

    gap  |  wall  | gap      Walls stand across the longer side: upright in a wide picture, lying in
    7 -> |////////|          a tall one. Each is thicker than a digit. One gap at least is so wide
         |////////|          that the first digit, which starts there, is seen whole for 3 frames.

A wall is hatched along diagonals and does not move: neither black nor ink looks like it. Walls and
digits start at multiples of 8 pixels, and digits move by 2 a frame, which is a patch of `tiny` in
the four frames of a latent: to go on is to move patches, whatever is written in them.

Alphabet as in data.py; L is the longer side of a picture, `axis` is 1 where that is its width.
"""

import re

import numpy as np

from data import Clip, Digits, World, descriptive_caption, hashed_uniform, reading_order

LEVELS, PERIOD = (70, 140), 4  # greys of the hatching; pixels in which it repeats
GRID = 8  # pixels; all starts at multiples of it
MOST, BETWEEN = 3, 1  # walls at most; multiples of GRID between two of them at least
ALONG, TOWARDS = 0.85, 0.8  # shares of first digits sent along the axis, and to a wall first
TRIES = 8  # places for a second digit
FAINT, BRIGHT, SPECK = 52, 175, 0.02  # for reading: between are walls; least ink, as in reader.py
PLACES = (("at the top", "in the middle", "at the bottom"),
          ("on the left", "in the middle", "on the right"))  # fmt: skip
COUNT = ("", "a wall", "two walls", "three walls")
WHEN = ("at no time", "for a while", "at the start", "at the end", "at both ends", "all the time")


class Wall(Digits):
    flags = dict(durations=(33,), shapes=("16x64", "64x16", "24x48", "48x24"), digit=8,
                 channels=8, vae_steps=1500, tokens=352, rows=6, steps=5000, items=12_000,
                 images=0.1, image_phase=0.05, given=0.25, later=0.6, prediction="x")  # fmt: skip
    noise, sampling = 0.3, dict(noise=0.2)  # little, since what is small must be seen
    labelled, prompts, otherwise = World.labelled, World.prompts, staticmethod(World.otherwise)

    def clips(self, i, image=False, later=0, frames=None, pixels: bool = True) -> list[Clip]:
        clips = super().clips(i, image, later, frames, pixels)
        for clip in clips:
            clip.caption, walls = full_caption(clip.facts), len(clip.facts["walls"])
            behind = any(d["covered"].any() for d in clip.facts["digits"])
            clip.brief += f" {'behind' if behind else 'beside'} {COUNT[walls]}" * (walls > 0)
        return clips

    def draw(self, i, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """As in data.py, and walls [n, MOST, 2]: first pixel and thickness along the axis. Those
        that a clip does not have are 0 thick."""
        raw, d, n = super().draw(i, sizes), self.config.digit, np.arange(len(i))
        u, sides = hashed_uniform(self.config.seed + 2**37, i, 12 + 2 * TRIES), sizes[:, 1:]
        axis, L = (sides[:, 1] >= sides[:, 0]).astype(int), sides.max(1)  # [n]
        walls, low, high = (GRID * x for x in self.build(u[:, :8], L // GRID))
        raw["velocity"] = np.sign(raw["velocity"]) * max(self.config.speeds)  # the same for all
        start, velocity = raw["start"], raw["velocity"]  # [n, 2, 2]
        # The first digit: which way, then how far ahead a wall or an edge is, where there is room.
        v, along = velocity[:, 0].sum(1), u[:, 8] < ALONG
        v = np.select([u[:, 9] >= TOWARDS, low == 0, high == L], [v, abs(v), -abs(v)], v)
        velocity[along, 0] = 0
        velocity[n[along], 0, axis[along]] = v[along]
        v, room = velocity[n, 0, axis], high - low - d
        least = np.where(np.where(v > 0, high == L, low == 0), 4, 2)  # frames; 4 as in data.py
        ahead = np.minimum(room, abs(v) * (least + (6 * u[:, 10] ** 2).astype(int)))  # mostly near
        anywhere = (u[:, 11] * (room + 1)).astype(int)
        start[n, 0, axis] = low + np.choose(np.sign(v) + 1, [ahead, anywhere, room - ahead])
        start[:, 0] = start[:, 0] // GRID * GRID
        # The second: the first place in view and apart, 4 frames from an edge; or it is left out.
        room = (sides - d)[:, None]  # [n, 1, 2]
        runway = np.clip(4 * velocity[:, 1:], -room, room)
        tries = (u[:, 12:].reshape(-1, TRIES, 2) * (room + 1)).astype(int)  # [n, TRIES, 2]
        tries = np.clip(tries, np.maximum(0, -runway), room - np.maximum(0, runway)) // GRID * GRID
        fits = (abs(tries - start[:, :1]) >= d).any(2)
        fits &= covered(tries[n, :, axis, None], walls[:, None], d) == 0
        start[:, 1] = tries[n, fits.argmax(1)]
        raw["present"][:, 1] &= fits.any(1)
        return raw | {"walls": walls}

    def build(self, u: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Walls [n, MOST, 2], and from where to where the gap is in which the first digit starts.
        What training never shows: three walls, or one that is thicker. Where a wall and a digit
        have no room side by side, as in small images, there is none. All in multiples of GRID."""
        d, beyond, j = -(-self.config.digit // GRID), self.config.beyond, np.arange(MOST + 1)
        whole = np.where(L > 2 * d + 1, d + 1, L)
        many = np.where(u[:, 0] < (0.5 if beyond else 0.2), 3 if beyond else 2, 1)
        many = np.where((L - whole - BETWEEN * (many - 1)) // many > d, many, L > 2 * d + 1)
        room = (L - whole - BETWEEN * np.maximum(many - 1, 0)) // np.maximum(many, 1)
        thicker = beyond & (many == 1)
        least = np.minimum(np.where(thicker, 2 * d + 2, d + 1), room)
        most = np.minimum(np.where(thicker, 3 * d, 2 * d + 1), room)
        there = j[:-1] < many[:, None]  # [n, MOST]
        thick = least[:, None] + np.sqrt(u[:, 1:4]) * (most - least + 1)[:, None]  # mostly thick
        thick = there * thick.astype(int)
        own, inner = (u[:, 4] * (many + 1)).astype(int), (j > 0) & (j < many[:, None])
        gaps = np.where(j == own[:, None], whole[:, None], BETWEEN * inner)  # [n, MOST + 1]: least
        rest = (L - gaps.sum(1) - thick.sum(1))[:, None]  # what chance spreads over the gaps
        cuts = np.sort(np.where(there, (u[:, 5:8] * (rest + 1)).astype(int), rest), axis=1)
        first = cuts + (gaps[:, :-1] + thick).cumsum(1) - thick
        low, high = np.column_stack([0 * L, first + thick]), np.column_stack([first, L])
        n = np.arange(len(L))
        return np.stack([first, thick], axis=2), low[n, own], high[n, own]

    def render(self, raw: dict, size) -> np.ndarray:
        (_, H, W), at = size, np.arange(max(size[1:]))[:, None]
        first, thick = np.moveaxis(raw["walls"][:, None], 3, 0)  # [n, 1, MOST]
        wall = ((at >= first) & (at < first + thick)).any(2)[:, None, None, None]  # [n, 1, 1, 1, L]
        wall = wall if W >= H else wall.swapaxes(3, 4)
        return np.where(wall, hatching(H, W), super().render(raw, size))

    def describe(self, raw: dict, sizes: np.ndarray) -> list[dict]:
        """More of each digit: the `path` [T, 2] of its box, which share of it is `covered` [T], and
        whether it is `hidden` [T]. `walls`: (upright or not, first pixel, thickness) each."""
        facts, d = super().describe(raw, sizes), self.config.digit
        path = self.path(raw, sizes, int(sizes[:, 0].max(initial=1)))  # [n, T, 2, 2]
        for k, fact in enumerate(facts):
            axis, walls = int(fact["width"] >= fact["height"]), raw["walls"][k]
            fact["walls"] = [(axis == 1, *wall) for wall in walls.tolist() if wall[1]]
            for digit, j in zip(fact["digits"], np.flatnonzero(raw["present"][k]), strict=True):
                way = path[k, : fact["frames"], j]
                share = covered(way[:, axis, None], walls, d)
                digit.update(path=way, covered=share, hidden=share == 1)
        return facts

    @staticmethod
    def lasting(caption: str) -> str:
        """As in data.py, and where walls are. When a digit is hidden does not last."""
        return re.sub(r" it is hidden \w+ \w+ \w+\.", "", Digits.lasting(caption))

    def read(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """From pixels [C, T, H, W] alone: where walls are (`wall`, bool [H, W]), and the centre of
        the ink beside them (`box` [T, 2], NaN where there is none). In the median over time, most
        of a line in a wall has the greys of hatching, blurred or not; a digit is too short."""
        gray, d = pixels.astype(float).mean(0), self.config.digit  # [T, H, W]
        (H, W), still = gray.shape[1:], np.median(gray, axis=0)
        line = ((still > FAINT) & (still < BRIGHT)).mean(0 if W >= H else 1, keepdims=True) > 0.6
        wall = np.broadcast_to(line, (H, W))
        ink = np.where(wall, 0, (gray - FAINT).clip(0))
        total = ink.sum((1, 2))[:, None]
        centre = np.stack([ink.sum(2) @ np.arange(H), ink.sum(1) @ np.arange(W)], axis=1)
        seen = total > SPECK * 255 * d**2
        return {"wall": wall, "box": np.where(seen, centre / np.maximum(total, 1), np.nan)}


def hatching(H: int, W: int) -> np.ndarray:
    diagonal = np.arange(H)[:, None] + np.arange(W)
    return np.array(LEVELS, np.uint8)[diagonal % PERIOD * 2 // PERIOD]


def covered(at: np.ndarray, walls: np.ndarray, digit: int) -> np.ndarray:
    """The share of boxes from `at` [..., 1] on along the axis that walls [..., MOST, 2] cover."""
    first, last = walls[..., 0], walls.sum(-1)
    return (np.minimum(at + digit, last) - np.maximum(at, first)).clip(0).sum(-1) / digit


def hidden_runs(hidden: np.ndarray) -> list[tuple[int, int]]:
    """From which frame to which (the last + 1) a digit is hidden: bool [T] -> pairs."""
    turns = np.flatnonzero(np.diff(hidden.astype(int), prepend=0, append=0)).tolist()
    return list(zip(turns[::2], turns[1::2], strict=True))


def full_caption(facts: dict) -> str:
    """Like "a 7 at middle left moving right fast, 0 bounces. it is hidden for a while. a wall
    upright on the right. 33 frames.": as many words for each digit as for any other."""
    *said, last = descriptive_caption(facts).split(". ")
    for k, d in enumerate(reading_order(facts["digits"]) if facts["frames"] > 1 else ()):
        h = d["hidden"]
        when = 5 if h.all() else h.any() * (1 + h[0] + 2 * h[-1])
        said[k] += f". it is hidden {WHEN[when]}"
    for upright, first, thick in facts["walls"]:
        third = int(3 * (first + thick / 2) / max(facts["height"], facts["width"]))
        said.append(f"a wall {'upright' if upright else 'lying'} {PLACES[upright][third]}")
    return ". ".join([*said, last])


WORLD = Wall
