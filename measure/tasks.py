"""Does prompting with images and videos work? Figures for each task.

The problem. An extended clip that looks good may still be wrong: the digit slows down, turns where
no wall is, or becomes another one. Of people's clips, nobody knows what should have come next.

The idea. Of ours we do. Digits move at constant speed and bounce, so a part of a clip determines
all that follows and all that came before. Parts of clips of held-out digits are known; what the
model makes of the rest is read from its pixels (reader.py), beside real clips (the reader's own
mistakes) and a baseline: the nearest known frame, frozen, or one end blended into the other.

    image to video  The first frame is known. It shows no motion: the prompt says the direction.
    extend          9 frames are known, 16 come next, or came before. The prompt says how the whole
                    clip of 25 starts.
    loop            Asked for where the world has one: a fast digit is back after twice its way.
    connect         From one digit to another, which goes on where the first would be by then. Real:
                    the one is replaced by the other half way.
    edit            Another digit is asked for, in the same direction. Real: that digit on the path
                    of the input. Baseline: the input, unchanged.
    a minute        600 frames from a prompt, read in tenths. Baseline: the first window, frozen.

    digit           named in the first, middle and last new frame; in a minute, in every tenth
    pixels off      from the digit's centre of mass to the true one, the median over clips
    seam            smooth where the step of the centre across it differs by at most 1 pixel from
                    the steps before and after. No wall is near any seam of the chosen clips.
    path kept       the share of the frames in which the digit is within 2 pixels of the input's,
                    but for a distance that stays: a 7 is heavier at the top than a 6 (at most 5)

Alphabet: clips uint8 [C, T, H, W]; n clips of one task; track [n, T, 2] is (row, column) in pixels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

import data
import prompting
from measure import reader
from measure.prompts import Chosen, as_table, choose, held_out, turned

KNOWN, NEW, OFF = 9, 16, (4, 8, 16)  # frames, in what is to be extended; after which it is measured
MINUTE = 600  # frames
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
FAR = 2  # steps on both sides of a seam in which no wall is met

# --------------------------------------------------------------------- real clips, and what is seen


def other_digits(world: data.Digits, chosen: Chosen) -> Chosen:
    """The same motion, with another digit in each."""
    random = np.random.default_rng(world.config.seed)
    digits = (chosen.digits + random.integers(1, 10, len(chosen.digits))) % 10
    sprite = [random.choice(np.flatnonzero(world.classes == digit)) for digit in digits]
    raw = chosen.raw | {"sprite": np.stack([sprite, sprite], axis=1)}
    return Chosen(world, raw, chosen.clips[0].shape[1:])


def steady(path: np.ndarray, *seams: int) -> np.ndarray:
    """Paths [n, T, 2] that meet no wall near the seams; a seam t lies between frames t - 1, t."""
    steps = np.diff(path, axis=1)  # [n, T - 1, 2]; the step across the seam t is t - 1
    near = (steps[:, max(0, t - 1 - FAR) : t + FAR] for t in seams)
    return np.all([(few == few[:, :1]).all((1, 2)) for few in near], axis=0)


class Seen:
    """Clips of one digit, as the reader sees them."""

    def __init__(self, clips: list[np.ndarray], box: int):
        self.clips, self.box = clips, box  # pixels, of a digit's box
        again = [np.concatenate([clip, clip[:, :2]], axis=1) for clip in clips]  # for loops
        self.tracks = reader.tracks_of(again)  # [n, T + 2, 2]

    def named(self, looks: list[int]) -> np.ndarray:
        """Which digit is seen in each of the frames: [n, looks]."""
        network = reader.load_classifier(self.box)
        return np.array([reader.name_one(clip, looks, network, self.box) for clip in self.clips])

    def digit(self, right: np.ndarray, looks: list[int]) -> float:
        """How often it is the right one [n]."""
        return float((self.named(looks) == right[:, None]).mean())

    def smooth(self, seam: int) -> float:
        """The share of the clips without a jump between frames seam - 1 and seam."""
        steps = np.diff(self.tracks[:, seam - 2 : seam + 2], axis=1)  # [n, 3, 2]
        jump = np.abs(steps[:, 1:2] - steps[:, ::2]).max((1, 2))  # from before, and to after: [n]
        return float((jump < 1.001).mean())

    def off(self, truth: np.ndarray, frame: int) -> float:
        """The median distance from the true track [n, T, 2], in pixels, in one frame."""
        return float(np.median(np.linalg.norm(self.tracks[:, frame] - truth[:, frame], axis=1)))


def true_track(real: Chosen, known: slice) -> np.ndarray:
    """The centre in all frames [n, T, 2]: its distance from the corner of the digit's box stays,
    and is read in the frames that are known."""
    offset = (reader.tracks_of(real.clips) - real.path)[:, known].mean(1, keepdims=True)
    return real.path + offset


# -------------------------------------------------------------------------------------------- tasks


class Row(NamedTuple):
    """A task, n times, and figures of what is seen in the clips that were made, or in real ones."""

    name: str
    tasks: list[prompting.Task]
    real: list[np.ndarray]
    score: Callable[[Seen], dict[str, float | np.ndarray]]


def image_to_video(run: prompting.Run, world: data.Digits, n: int) -> Row:
    T = max(world.durations)
    real = choose(world, (T, *world.shapes[0]), range(n))
    ways = np.array([prompt.split()[-1] for prompt in real.prompts])
    tasks = [prompting.animate(clip[:, :1], T, prompt) for clip, prompt in real.pairs]

    def score(seen):
        return {"digit": seen.digit(real.digits, [1, T // 2, T - 1]),
                "direction": np.mean(ways == list(map(reader.heading, seen.tracks)))}  # fmt: skip

    return Row("image to video", tasks, real.clips, score)


def extend(run: prompting.Run, world: data.Digits, n: int, backward: bool = False) -> Row:
    T, seam, known = KNOWN + NEW, KNOWN, slice(KNOWN)
    new = list(range(KNOWN, T))  # the nearest first
    if backward:
        seam, known, new = NEW, slice(NEW, T), list(range(NEW))[::-1]
    real = choose(world, (T, *world.shapes[0]), range(n), lambda path: steady(path, seam))
    tasks = [prompting.extend(clip[:, known], NEW, prompt, backward) for clip, prompt in real.pairs]
    truth = true_track(real, known)

    def score(seen):
        figures = {"digit": seen.digit(real.digits, [new[0], new[NEW // 2], new[-1]]),
                   "seam": seen.smooth(seam)}  # fmt: skip
        return figures | {f"pixels off after {k} frames": seen.off(truth, new[k - 1]) for k in OFF}

    return Row(f"extend {'backward' if backward else 'forward'}", tasks, real.clips, score)


def loop(run: prompting.Run, world: data.Digits, n: int) -> Row:
    way = world.shapes[0][0] - world.config.digit  # from wall to wall
    period = 2 * way // max(world.config.speeds)
    new = min(prompting.room(run, KNOWN, "loop"), period // 2)
    L = period - new

    def fits(path):  # back where it was, and no wall near the seams
        again = (path[:, period:] == path[:, : 2 + FAR]).all((1, 2))
        return steady(path, L, period) & again

    real = choose(world, (period + 2 + FAR, *world.shapes[0]), range(n), fits)
    tasks = [prompting.loop(clip[:, :L], new, prompt) for clip, prompt in real.pairs]
    truth = true_track(real, slice(L))

    def score(seen):
        return {"seam to the new": seen.smooth(L), "seam to the start": seen.smooth(period),
                "digit": seen.digit(real.digits, [L, (L + period) // 2, period - 1]),
                "pixels off half way": seen.off(truth, L + new // 2)}  # fmt: skip

    return Row("loop", tasks, [clip[:, :period] for clip in real.clips], score)


def connect(run: prompting.Run, world: data.Digits, n: int) -> Row:
    new = prompting.room(run, KNOWN, "connect")
    T, end, half = 2 * KNOWN + new, KNOWN + new, KNOWN + new // 2
    one = choose(world, (T, *world.shapes[0]), range(n), lambda path: steady(path, KNOWN, end))
    two, names = other_digits(world, one), {x: way for way, x in data.DIRECTIONS.items()}
    steps = np.sign(one.path[:, end + 1] - one.path[:, end]).tolist()  # how the second clip starts
    tasks, real = [], []
    for (a, prompt), b, digit, step in zip(one.pairs, two.clips, two.digits, steps, strict=True):
        then = f"{data.article(digit)} {digit} moving {names[tuple(step)]}"
        tasks.append(prompting.connect(a[:, :KNOWN], b[:, end:], new, prompt, then))
        real.append(np.concatenate([a[:, :half], b[:, half:]], axis=1))

    def score(seen):
        right = seen.named([KNOWN, end - 1]) == np.stack([one.digits, two.digits], axis=1)  # [n, 2]
        before, after = right.mean(0)
        return {"seam to the new": seen.smooth(KNOWN), "seam from the new": seen.smooth(end),
                "digit before": before, "digit after": after, "changes": right.all(1).mean(),
                "pixels off half way": seen.off(reader.tracks_of(real), half)}  # fmt: skip

    return Row("connect", tasks, real, score)


def edit(run: prompting.Run, world: data.Digits, n: int, strength: float) -> Row:
    T = max(world.durations)
    old = choose(world, (T, *world.shapes[0]), range(n))
    real, truth = other_digits(world, old), reader.tracks_of(old.clips)
    pairs = zip(old.clips, real.prompts, strict=True)
    tasks = [prompting.edit(clip, strength, prompt) for clip, prompt in pairs]

    def score(seen):
        away = seen.tracks[:, :T] - truth  # [n, T, 2]
        stays = np.median(away, axis=1, keepdims=True).clip(-5, 5)
        return {"digit": seen.digit(real.digits, [0, T // 2, T - 1]),
                "path kept": (np.linalg.norm(away - stays, axis=2) <= 2).mean()}  # fmt: skip

    return Row(f"edit at {strength}", tasks, real.clips, score)


def minute(run: prompting.Run, world: data.Digits, n: int) -> Row:
    """Each figure ten times, one for each tenth."""
    size, tenth = (MINUTE, *world.shapes[0]), MINUTE // 10
    real, starts = choose(world, size, range(n)), range(0, MINUTE, tenth)
    tasks = [prompting.new(run, size, prompt) for prompt in real.prompts]

    def score(seen):
        right = seen.named(list(range(5, MINUTE, 10))) == real.digits[:, None]  # [n, MINUTE / 10]
        steps = np.linalg.norm(np.diff(seen.tracks[:, :MINUTE], axis=1), axis=2)  # [n, T - 1]
        sharp = [reader.sharpness([clip[:, k : k + tenth] for clip in seen.clips]) for k in starts]
        speed = [steps[:, k : k + tenth - 1].mean() for k in starts]
        tenths = {"digit": right.mean(0).reshape(10, -1).mean(1), "sharpness": sharp}
        return {f"{name} in tenths": np.array(x) for name, x in (tenths | {"speed": speed}).items()}

    return Row("a minute", tasks, real.clips, score)


# ---------------------------------------------------------------------------------- measuring them


def still(task: prompting.Task, made: np.ndarray, window: int) -> np.ndarray:
    """The baseline: the nearest known frames, frozen, or blended where some are on both sides; a
    clip that is to be edited, unchanged; where nothing is known, the first window that was made."""
    if task.strength < 1:
        return task.clip
    some, t = task.known.any(), np.arange(made.shape[1])
    clip, at = (task.clip, np.flatnonzero(task.known)) if some else (made, t[:window])
    after = at[np.searchsorted(at, t).clip(max=len(at) - 1)]
    before = at[(np.searchsorted(at, t, "right") - 1).clip(min=0)]
    share = ((t - before) / np.maximum(after - before, 1))[:, None, None]  # [T, 1, 1]
    return ((1 - share) * clip[:, before] + share * clip[:, after]).round().astype(np.uint8)


def measure(run: prompting.Run, n: int, minutes: int, how: dict) -> tuple[dict, Image]:
    """All figures, by task, kind of clip and measure; and a picture of two clips of each task."""
    world, figures, shown = held_out(run.world, two_digits=0.0), {}, []
    rows = [image_to_video(run, world, n), extend(run, world, n), extend(run, world, n, True),
            loop(run, world, n), connect(run, world, n)]  # fmt: skip
    rows += [edit(run, world, n, strength) for strength in STRENGTHS]
    for row in [*rows, minute(run, world, minutes)]:
        made = prompting.finished(run, row.tasks, range(len(row.tasks)), how, expanded=True)
        base = [still(*pair, max(world.durations)) for pair in zip(row.tasks, made, strict=True)]
        figures[row.name] = kinds = {}
        for kind, clips in (("real", row.real), ("baseline", base), ("made", made)):
            kinds[kind] = {}
            for name, x in row.score(Seen(clips, world.config.digit)).items():
                kinds[kind][name] = np.asarray(x).tolist()
                if np.ndim(x):
                    end = name.replace(" in tenths", ", last tenth / first")
                    kinds[kind][end] = float(x[-1] / max(x[0], 1e-6))
            known = row.tasks[0].known[: clips[0].shape[1]]
            shown += [(clip, f"{row.name}: {kind}", known) for clip in clips[:2]]
    clips, titles, marks = zip(*shown, strict=True)
    return figures, data.sheet(clips, titles, scale=2, most=26, marks=marks)


def table(figures: dict) -> str:
    """A line for each measure of each task: real clips, the baseline, and what the model made."""
    lines, tenths = {}, []
    for task, kinds in figures.items():
        for name, row in turned(kinds).items():
            if name.endswith("in tenths"):
                tenths.append(f"{task}, {name}: " + " ".join(f"{x:.2f}" for x in row["made"]))
            else:
                form = ".1f" if "pixels" in name else ".0%"
                lines[f"{task}: {name}"] = {kind: format(x, form) for kind, x in row.items()}
    return "\n".join([as_table("", lines), *tenths])


def main(args: argparse.Namespace) -> tuple[Path, dict, Image]:
    folder = Path(args.run or prompting.newest_run())
    how = {"steps": args.steps} if args.steps else {}
    figures, page = measure(prompting.load_run(folder), args.clips, args.minutes, how)
    print(table(figures))
    return folder, figures, page
