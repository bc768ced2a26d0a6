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
import io
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

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
    """A task, n times, and what is right: figures, from what is seen."""

    name: str
    tasks: list[prompting.Task]
    real: list[np.ndarray]
    measures: dict[str, Callable[[Seen], float | np.ndarray]]


def image_to_video(run: prompting.Run, world: data.Digits, n: int) -> Row:
    T = max(world.durations)
    real = choose(world, (T, *world.shapes[0]), range(n))

    def direction(seen):
        ways = [prompt.split()[-1] for prompt in real.prompts]
        return np.mean([reader.heading(x) == way for x, way in zip(seen.tracks, ways, strict=True)])

    tasks = [prompting.animate(clip[:, :1], T, prompt) for clip, prompt in real.pairs]
    digit = partial(Seen.digit, right=real.digits, looks=[1, T // 2, T - 1])
    return Row("image to video", tasks, real.clips, {"digit": digit, "direction": direction})


def extend(run: prompting.Run, world: data.Digits, n: int, backward: bool = False) -> Row:
    T, seam, known = KNOWN + NEW, KNOWN, slice(KNOWN)
    new = list(range(KNOWN, T))  # the nearest first
    if backward:
        seam, known, new = NEW, slice(NEW, T), list(range(NEW))[::-1]
    real = choose(world, (T, *world.shapes[0]), range(n), lambda path: steady(path, seam))
    tasks = [prompting.extend(clip[:, known], NEW, prompt, backward) for clip, prompt in real.pairs]
    truth, looks = true_track(real, known), [new[0], new[NEW // 2], new[-1]]
    measures = {"digit": partial(Seen.digit, right=real.digits, looks=looks)}
    measures["seam"] = partial(Seen.smooth, seam=seam)
    for k in OFF:
        off = partial(Seen.off, truth=truth, frame=new[k - 1])
        measures[f"pixels off after {k} frames"] = off
    return Row(f"extend {'backward' if backward else 'forward'}", tasks, real.clips, measures)


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
    truth, looks = true_track(real, slice(L)), [L, (L + period) // 2, period - 1]
    return Row("loop", tasks, [clip[:, :period] for clip in real.clips], {
        "seam to the new": partial(Seen.smooth, seam=L),
        "seam to the start": partial(Seen.smooth, seam=period),
        "digit": partial(Seen.digit, right=real.digits, looks=looks),
        "pixels off half way": partial(Seen.off, truth=truth, frame=L + new // 2),
    })  # fmt: skip


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

    def changes(seen):
        before, after = seen.named([KNOWN, end - 1]).T  # [n] each
        return ((before == one.digits) & (after == two.digits)).mean()

    return Row("connect", tasks, real, {
        "seam to the new": partial(Seen.smooth, seam=KNOWN),
        "seam from the new": partial(Seen.smooth, seam=end),
        "digit before": partial(Seen.digit, right=one.digits, looks=[KNOWN]),
        "digit after": partial(Seen.digit, right=two.digits, looks=[end - 1]),
        "changes": changes,
        "pixels off half way": partial(Seen.off, truth=reader.tracks_of(real), frame=half),
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
    digit = partial(Seen.digit, right=real.digits, looks=[0, T // 2, T - 1])
    return Row(f"edit at {strength}", tasks, real.clips, {"digit": digit, "path kept": path_kept})


def minute(run: prompting.Run, world: data.Digits, n: int) -> Row:
    size, tenth = (MINUTE, *world.shapes[0]), MINUTE // 10
    real, starts = choose(world, size, range(n)), range(0, MINUTE, tenth)

    def digit(seen):
        right = seen.named(list(range(5, MINUTE, 10))) == real.digits[:, None]  # [n, MINUTE / 10]
        return right.mean(0).reshape(10, -1).mean(1)

    def sharpness(seen):
        tenths = [[clip[:, k : k + tenth] for clip in seen.clips] for k in starts]
        return np.array(list(map(reader.sharpness, tenths)))

    def speed(seen):
        steps = np.linalg.norm(np.diff(seen.tracks[:, :MINUTE], axis=1), axis=2)  # [n, T - 1]
        return np.array([steps[:, k : k + tenth - 1].mean() for k in starts])

    tasks = [prompting.new(run, size, prompt) for prompt in real.prompts]
    measures = {f"{f.__name__} in tenths": f for f in (digit, sharpness, speed)}
    return Row("a minute", tasks, real.clips, measures)


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


def measure(run: prompting.Run, n: int, minutes: int, seed: int, how: dict) -> tuple[dict, Image]:
    """All figures, by task, kind of clip and measure; and a picture of two clips of each task."""
    world, figures, shown = held_out(run.world, seed=seed, two_digits=0.0), {}, []
    rows = [image_to_video(run, world, n), extend(run, world, n), extend(run, world, n, True),
            loop(run, world, n), connect(run, world, n)]  # fmt: skip
    rows += [edit(run, world, n, strength) for strength in STRENGTHS]
    for row in [*rows, minute(run, world, minutes)]:
        made, window = make(run, row.tasks, seed, how), max(world.durations)
        base = [still(task, clip, window) for task, clip in zip(row.tasks, made, strict=True)]
        figures[row.name] = kinds = {}
        for kind, clips in (("real", row.real), ("baseline", base), ("made", made)):
            seen, kinds[kind] = Seen(clips, world.config.digit), {}
            for name, f in row.measures.items():
                x = np.asarray(f(seen))
                kinds[kind][name] = x.tolist()
                if x.ndim:
                    end = name.replace(" in tenths", ", last tenth / first")
                    kinds[kind][end] = x[-1] / max(x[0], 1e-6)
            known = row.tasks[0].known[: clips[0].shape[1]]
            shown += [(clip, f"{row.name}: {kind}", known) for clip in clips[:2]]
    clips, titles, marks = zip(*shown, strict=True)
    return figures, data.sheet(clips, titles, scale=2, most=26, marks=marks)


def cost_of(folder: Path, steps: int) -> dict[str, float]:
    """Memory and time of a minute, made as a user would, and compared with those of a tenth of it.
    In a process of its own, since what it ever took is what it took for this."""
    spent = []
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        for frames in (SHORT, MINUTE):
            start = time.perf_counter()
            words = f"--out {scratch}/clip.mp4 --frames {frames} --steps {steps} --prompt".split()
            if sample.command([*words, "a 7 moving left", "--run", str(folder)]):
                raise ValueError(f"a clip of {frames} frames could not be made")
            peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
            spent.append({"MB": int(peak) / 1024, "s": time.perf_counter() - start})
    short, long = spent
    return long | {f"{name}, of a tenth": long[name] / short[name] for name in long}


def table(figures: dict) -> str:
    """A line for each measure of each task: real clips, the baseline, the model, and the bar."""
    lines = {}
    for task, bars in BARS.items():
        for name, bar in bars.items():
            real, base, made = (figures[task][kind][name] for kind in ("real", "baseline", "made"))
            pixels = name.startswith("pixels")
            good = made <= bar if pixels else made >= bar
            cells = {"real": real, "baseline": base, "model": made, "to reach": bar}
            cells = {k: f"{x:.1f}" if pixels else f"{x:.0%}" for k, x in cells.items()}
            lines[f"{task}: {name}"] = cells | {"": "" if good else "not yet"}
    minute, said = figures["a minute"], [as_table("", lines)]
    tenths = {k: x for k, x in minute["made"].items() if k.endswith("in tenths")}
    said += [f"a minute, {k}: " + " ".join(f"{y:.2f}" for y in x) for k, x in tenths.items()]
    said += [f"a minute, {k}: {x:.2f}" for k, x in minute.get("cost", {}).items()]
    return "\n".join(said)


def main(args: argparse.Namespace) -> tuple[Path, dict, Image]:
    folder = Path(args.run or prompting.newest_run())
    how = {"steps": args.steps} if args.steps else {}
    figures, page = measure(prompting.load_run(folder), args.clips, args.minutes, args.seed, how)
    if Path("/proc/self/status").exists():  # Linux
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            steps = args.steps or prompting.Settings().steps
            figures["a minute"]["cost"] = pool.submit(cost_of, folder, steps).result()
    print(table(figures))
    return folder, figures, page
