"""Does prompting with images and videos work? Figures for each task.

The problem. An extended clip that looks good may still be wrong: the digit slows down, turns where
no wall is, or becomes another one. Of people's clips, nobody knows what should have come next.

The idea. Of ours we do. Digits move at constant speed and bounce, so a part of a clip determines
all that follows and all that came before. Parts of clips of held-out digits are known; what the
model makes of the rest is read from its pixels (reader.py), beside real clips (the reader's own
mistakes) and a baseline: the nearest known frame, frozen, or one end blended into the other.

    image to video    The first frame is known. It shows no motion: the prompt says the direction.
    extend            9 frames are known, and 16 are to come, or came before. The prompt says how
                      the whole clip of 25 starts.
    loop              Asked for where the world has one: a fast digit is back where it was after
                      twice its way from wall to wall.
    connect           From one digit to another, which goes on where the first would be by then.
                      Real: the one is replaced by the other half way.
    edit              Another digit is asked for, in the same direction. Real: that digit on the
                      path of the input. Baseline: the input, unchanged.
    a minute          600 frames from a prompt, read in tenths. Baseline: the first window, frozen.

    digit             named in the first, middle and last new frame; in a minute, in every tenth
    pixels off        from the digit's centre of mass to the true one, the median over clips
    seam              smooth where the step of the centre across it differs by at most 1 pixel from
                      the steps before and after. No wall is near any seam of the chosen clips.
    path kept         the share of the frames in which the digit is within 2 pixels of the input's,
                      but for a distance that stays: a 7 is heavier at the top than a 6 (at most 5)

Alphabet: clips uint8 [C, T, H, W]; n clips of one task; track [n, T, 2] is (row, column) in pixels.
"""

import argparse
import io
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import data
import prompting
import sample
from measure import reader
from measure.prompts import Chosen, as_table, choose, held_out, make

KNOWN, NEW = 9, 16  # frames, in what is to be extended
MINUTE, SHORT = 600, 60  # frames
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
FAR = 2  # steps on both sides of a seam in which no wall is met

# What is to be reached, at 32 x 32 pixels. Pixels off: at most. All else: a share, at least.
OFF = {4: 1.0, 8: 1.5, 16: 2.5}
EXTENDED = {f"pixels off after {k} frames": off for k, off in OFF.items()}
EXTENDED |= {"digit": 0.9, "seam": 0.9}
BARS = {
    "image to video": {"digit": 0.9, "direction": 0.9},
    "extend forward": EXTENDED,
    "extend backward": EXTENDED,
    "loop": {"seam to the new": 0.9, "seam to the start": 0.9, "digit": 0.9,
             "pixels off half way": 1.5},
    "connect": {"seam to the new": 0.9, "seam from the new": 0.9, "digit before": 0.9,
                "digit after": 0.9, "changes": 0.9, "pixels off half way": 1.5},
    **{f"edit at {strength}": {"digit": 0.8, "path kept": 0.8} for strength in STRENGTHS},
    "a minute": {f"{name}, last tenth / first": 0.9 for name in ("digit", "sharpness", "speed")},
}  # fmt: skip

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

    def right(self, digits: np.ndarray, looks: list[int]) -> np.ndarray:
        """Whether the digit is the right one, [n] or [n, looks], in the frames looks: [n, looks]"""
        network = reader.load_classifier(self.box)
        named = [reader.name_one(clip, looks, network, self.box) for clip in self.clips]
        return np.array(named) == digits.reshape(len(named), -1)

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
    """A task, n times, and what is right."""

    name: str
    tasks: list[prompting.Task]
    real: list[np.ndarray]
    measures: dict[str, Callable[[Seen], float | list]]


def image_to_video(run: prompting.Run, world: data.Digits, n: int) -> Row:
    T = max(world.durations)
    real = choose(world, (T, *world.shapes[0]), range(n))
    ways = [prompt.split()[-1] for prompt in real.prompts]
    return Row(
        "image to video",
        [prompting.animate(clip[:, :1], T, prompt) for clip, prompt in real.pairs],
        real.clips,
        {"digit": lambda seen: seen.right(real.digits, [1, T // 2, T - 1]).mean(),
         "direction": lambda seen: np.mean(
             [reader.heading(x) == way for x, way in zip(seen.tracks, ways, strict=True)])},
    )  # fmt: skip


def extend(run: prompting.Run, world: data.Digits, n: int, backward: bool = False) -> Row:
    T, seam = KNOWN + NEW, NEW if backward else KNOWN
    real = choose(world, (T, *world.shapes[0]), range(n), lambda path: steady(path, seam))
    known = slice(NEW, None) if backward else slice(KNOWN)
    new = list(range(T))[:NEW][::-1] if backward else list(range(T))[KNOWN:]  # the nearest first
    truth = true_track(real, known)
    return Row(
        f"extend {'backward' if backward else 'forward'}",
        [prompting.extend(clip[:, known], NEW, prompt, backward) for clip, prompt in real.pairs],
        real.clips,
        {f"pixels off after {k} frames": lambda seen, k=k: seen.off(truth, new[k - 1]) for k in OFF}
        | {"digit": lambda seen: seen.right(real.digits, [new[0], new[NEW // 2], new[-1]]).mean(),
           "seam": lambda seen: seen.smooth(seam)},
    )  # fmt: skip


def loop(run: prompting.Run, world: data.Digits, n: int) -> Row:
    way = world.shapes[0][0] - world.config.digit  # from wall to wall
    period = 2 * way // max(world.config.speeds)
    new = min(prompting.room(run, KNOWN, "loop"), period // 2)
    L = period - new

    def fits(path):  # back where it was, and no wall near the seams
        again = (path[:, period:] == path[:, : 2 + FAR]).all((1, 2))
        return steady(path, L, period) & again

    real = choose(world, (period + 2 + FAR, *world.shapes[0]), range(n), fits)
    truth = true_track(real, slice(L))
    return Row(
        "loop",
        [prompting.loop(clip[:, :L], new, prompt) for clip, prompt in real.pairs],
        [clip[:, :period] for clip in real.clips],
        {"seam to the new": lambda seen: seen.smooth(L),
         "seam to the start": lambda seen: seen.smooth(period),
         "digit": lambda seen: seen.right(
             real.digits, [L, (L + period) // 2, period - 1]).mean(),
         "pixels off half way": lambda seen: seen.off(truth, L + new // 2)},
    )  # fmt: skip


def connect(run: prompting.Run, world: data.Digits, n: int) -> Row:
    new = prompting.room(run, KNOWN, "connect")
    T, end, half = 2 * KNOWN + new, KNOWN + new, KNOWN + new // 2
    one = choose(world, (T, *world.shapes[0]), range(n), lambda path: steady(path, KNOWN, end))
    two = other_digits(world, one)
    digits, names, tasks = np.stack([one.digits, two.digits], axis=1), {}, []
    names = {step: way for way, step in data.DIRECTIONS.items()}
    steps = np.sign(one.path[:, end + 1] - one.path[:, end]).tolist()  # how the second clip starts
    for (a, prompt), b, digit, step in zip(one.pairs, two.clips, two.digits, steps, strict=True):
        then = f"{data.article(digit)} {digit} moving {names[tuple(step)]}"
        tasks.append(prompting.connect(a[:, :KNOWN], b[:, end:], new, prompt, then))
    pairs = zip(one.clips, two.clips, strict=True)
    real = [np.concatenate([a[:, :half], b[:, half:]], axis=1) for a, b in pairs]
    truth = reader.tracks_of(real)
    return Row("connect", tasks, real, {
        "seam to the new": lambda seen: seen.smooth(KNOWN),
        "seam from the new": lambda seen: seen.smooth(end),
        "digit before": lambda seen: seen.right(one.digits, [KNOWN]).mean(),
        "digit after": lambda seen: seen.right(two.digits, [end - 1]).mean(),
        "changes": lambda seen: seen.right(digits, [KNOWN, end - 1]).all(1).mean(),
        "pixels off half way": lambda seen: seen.off(truth, half),
    })  # fmt: skip


def edit(run: prompting.Run, world: data.Digits, n: int, strength: float) -> Row:
    T = max(world.durations)
    old = choose(world, (T, *world.shapes[0]), range(n))
    real, truth = other_digits(world, old), reader.tracks_of(old.clips)

    def path_kept(seen):
        away = seen.tracks[:, :T] - truth  # [n, T, 2]
        stays = np.median(away, axis=1, keepdims=True).clip(-5, 5)
        return (np.linalg.norm(away - stays, axis=2) <= 2).mean()

    pairs = zip(old.clips, real.prompts, strict=True)
    tasks = [prompting.edit(clip, strength, prompt) for clip, prompt in pairs]
    digit = {"digit": lambda seen: seen.right(real.digits, [0, T // 2, T - 1]).mean()}
    return Row(f"edit at {strength}", tasks, real.clips, digit | {"path kept": path_kept})


def minute(run: prompting.Run, world: data.Digits, n: int) -> Row:
    size, tenth = (MINUTE, *world.shapes[0]), MINUTE // 10
    real = choose(world, size, range(n))

    def digit(seen):
        right = seen.right(real.digits, list(range(5, MINUTE, 10)))  # [n, MINUTE / 10]
        return right.mean(0).reshape(10, -1).mean(1)

    def sharpness(seen):
        tenths = [[clip[:, k : k + tenth] for clip in seen.clips] for k in range(0, MINUTE, tenth)]
        return np.array(list(map(reader.sharpness, tenths)))

    def speed(seen):
        steps = np.linalg.norm(np.diff(seen.tracks[:, :MINUTE], axis=1), axis=2)  # [n, T - 1]
        return np.array([steps[:, k : k + tenth - 1].mean() for k in range(0, MINUTE, tenth)])

    measures = {f"{f.__name__} in tenths": f for f in (digit, sharpness, speed)}
    tasks = [prompting.new(run, size, prompt) for prompt in real.prompts]
    return Row("a minute", tasks, real.clips, measures)


def rows(run: prompting.Run, world: data.Digits, n: int, minutes: int) -> Iterator[Row]:
    yield image_to_video(run, world, n)
    yield extend(run, world, n)
    yield extend(run, world, n, backward=True)
    yield loop(run, world, n)
    yield connect(run, world, n)
    yield from (edit(run, world, n, strength) for strength in STRENGTHS)
    yield minute(run, world, minutes)


# -------------------------------------------------------------------------------- measuring them


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


def measure(
    run: prompting.Run, n: int, minutes: int, seed: int, how: dict
) -> tuple[dict, Image.Image]:
    """All figures, by task, kind of clip and measure; and a picture of two clips of each task."""
    world, figures, shown = held_out(run.world, seed=seed, two_digits=0.0), {}, []
    for row in rows(run, world, n, minutes):
        made, window = make(run, row.tasks, seed, how), max(world.durations)
        base = [still(task, clip, window) for task, clip in zip(row.tasks, made, strict=True)]
        figures[row.name] = {}
        for kind, clips in (("real", row.real), ("baseline", base), ("made", made)):
            seen = Seen(clips, world.config.digit)
            found = {name: np.asarray(f(seen)) for name, f in row.measures.items()}
            ends = {name.replace(" in tenths", ", last tenth / first"): x[-1] / max(x[0], 1e-6)
                    for name, x in found.items() if x.ndim}  # fmt: skip
            figures[row.name][kind] = {name: x.tolist() for name, x in found.items()} | ends
            known = row.tasks[0].known[: clips[0].shape[1]]
            shown += [(clip, f"{row.name}: {kind}", known) for clip in clips[:2]]
    clips, titles, marks = zip(*shown, strict=True)
    return figures, data.sheet(clips, titles, scale=2, most=26, marks=marks)


def cost_of(folder: Path, frames: int, steps: int) -> dict[str, float]:
    """Make one clip as a user would: the most memory that the process took, and seconds."""
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        words = f"--frames {frames} --steps {steps} --out {scratch}/clip.mp4 --prompt".split()
        start = time.perf_counter()
        failed = sample.command(["--run", str(folder), *words, "a 7 moving left"])
        seconds = time.perf_counter() - start
    if failed:
        raise ValueError(f"a clip of {frames} frames could not be made")
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return {"megabytes": int(peak[1]) / 1024, "seconds": seconds}


def minute_cost(folder: Path, steps: int) -> dict[str, float]:
    """Memory and time of a minute, and against those of a tenth of it, each in a new process."""
    new = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with new as pool:
        short, long = (pool.apply(cost_of, (folder, k, steps)) for k in (SHORT, MINUTE))
    return long | {f"{name}, of a tenth": long[name] / short[name] for name in long}


def table(figures: dict) -> str:
    """A line for each measure of each task: real clips, the baseline, the model, and the bar."""
    lines = {}
    for task, bars in BARS.items():
        for name, bar in bars.items():
            values = [figures[task][kind][name] for kind in ("real", "baseline", "made")] + [bar]
            most = name.startswith("pixels")
            cells = [f"{x:.1f}" if most else f"{x:.0%}" for x in values]
            cells[-1] += "" if (values[2] <= bar if most else values[2] >= bar) else ", not yet"
            columns = ("real", "baseline", "model", "to reach")
            lines[f"{task}: {name}"] = dict(zip(columns, cells, strict=True))
    made = figures["a minute"]["made"].items()
    tenths = [f"{k}: {np.round(x, 2).tolist()}" for k, x in made if k.endswith("in tenths")]
    spent = [f"{k}: {x:.2f}" for k, x in figures["a minute"].get("cost", {}).items()]
    return "\n".join([as_table("", lines), *tenths, "a minute takes " + ", ".join(spent)])


def main(args: argparse.Namespace) -> tuple[Path, dict, Image.Image]:
    folder = Path(args.run or prompting.newest_run())
    run, how = prompting.load_run(folder), {"steps": args.steps} if args.steps else {}
    figures, page = measure(run, args.clips, args.minutes, args.seed, how)
    if Path("/proc/self/status").exists():  # Linux
        steps = args.steps or prompting.Settings().steps
        figures["a minute"]["cost"] = minute_cost(folder, steps)
    print(table(figures))
    return folder, figures, page
