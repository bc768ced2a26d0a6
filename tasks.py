"""Does prompting with images and videos work? A row for each task, with numbers.

    python evaluate.py prompting --run out/tiny

The problem. An extended clip that looks good may still be wrong: the digit slows down, turns where
no wall is, or becomes another one. What should have come next is not known of people's clips.

The idea. It is known of ours. Digits move at constant speed and bounce (data.World.path), so the
frames that follow a clip, and those before it, are determined by what is seen in it, however far
one goes. Parts of clips of held-out digits are given, and what the model makes of the rest is read
from its pixels (reader.py) and compared with the truth:

    given       . . A A A A . .       A A: frames of a real clip; the model never saw this digit
    model       . . A A A A m m
    real        . . A A A A a a       a a: what the world does: the ceiling is the reader's own
    baseline    . . A A A A A A       the last given frame, frozen; or one end blended into another

What is asked, and what is right:

    image to video    The first frame is given. It shows no motion: the prompt says the direction.
    extend            9 frames are given, 16 are to come, or to have been. Motion is the same in
                      both directions of time. A prompt says how its clip sets out; so here it says
                      how the whole clip does, of all 25 frames, which agrees with what is given.
    loop              Asked for where the world has one: a fast digit is back where it was after
                      twice its way from wall to wall. What leads from the end back to the start is
                      what the world does next, and nothing else is as smooth.
    connect           From one digit to another, which goes on where the first would be by then: so
                      that there is a way. Real: the one is replaced by the other half way.
    edit              Another digit is asked for, in the same direction. Real: that digit on the
                      path of the input. Baseline: the input, unchanged.
    a minute          600 frames from a prompt, read in tenths. Baseline: the first window, frozen.

    digit             named by the classifier in the first, middle and last new frame; in a
                      minute, in every tenth frame
    pixels off        from the digit's centre of mass to the true one, the median over clips
    seam              smooth where the step of the centre across it differs by at most 1 pixel from
                      the step before and the step after. At a wall, steps differ in real clips,
                      too: so no wall is near any seam of the clips that are chosen.
    path kept         the share of the frames in which the digit is within 2 pixels of the input's,
                      but for a distance that stays: a 7 is heavier at the top than a 6 (at most 5)

Alphabet: clips uint8 [C, T, H, W]; n clips of one task; track [n, T, 2] is (row, column) in pixels.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import data
import reader
import sample
from clips import filmstrip

GIVEN, NEW = 9, 16  # frames, in what is to be extended
MINUTE, SHORT = 600, 60  # frames
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
AT_ONCE = 40  # clips in a batch
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
    "a minute": {"digit, last tenth / first": 0.9,
                 "sharpness, last tenth / first": 0.9, "speed, last tenth / first": 0.9},
}  # fmt: skip


# ----------------------------------------------------------------------------------- choosing clips


@dataclass
class Chosen:
    """n clips of one digit and one size, and all that is true of them."""

    known: dict  # of which they are made: see data.World.facts
    path: np.ndarray  # [n, T, 2], the corner of the digit's box
    digits: np.ndarray  # [n]
    prompts: list[str]
    clips: list[np.ndarray]


def rendered(world: data.World, known: dict, size: tuple[int, int, int]) -> Chosen:
    sizes = np.tile(size, (len(known["sprite"]), 1))
    facts, path = world.describe_all(known, sizes), world.path(known, sizes, size[0])[:, :, 0]
    digits = np.array([fact["digits"][0]["digit"] for fact in facts])
    prompts, clips = [data.short_caption(fact) for fact in facts], world.render(known, size)
    return Chosen(known, path, digits, prompts, list(clips))


def choose(world: data.World, n: int, size: tuple[int, int, int], fits: Callable) -> Chosen:
    """Clips of `size` whose path [m, T, 2] `fits` -> [m] bool; digits and directions take turns."""
    index = np.arange(200 * max(n, 40))  # many times as many as needed
    sizes = np.tile(size, (len(index), 1))
    known, stock = world.facts(index, sizes), defaultdict(list)
    for i in np.flatnonzero(fits(world.path(known, sizes, size[0])[:, :, 0])):
        sprite, velocity = known["sprite"][i, 0], np.sign(known["velocity"][i, 0])
        stock[int(world.labels[sprite]), tuple(velocity.tolist())].append(i)
    kinds = [(digit, way) for digit in range(10) for way in data.DIRECTIONS.values()]
    order = np.random.default_rng(world.seed).permutation(40)  # so that any 12 are a fair choice
    kinds = [kinds[k] for k in order if stock[kinds[k]]]  # a long canvas may lack directions
    if not kinds:
        raise ValueError(f"no clip of {' x '.join(map(str, size))} is fit for one of the tasks")
    few = [stock[kinds[j % len(kinds)]] for j in range(n)]
    chosen = [numbers[j // len(kinds) % len(numbers)] for j, numbers in enumerate(few)]
    return rendered(world, {name: value[chosen] for name, value in known.items()}, size)


def other_digits(world: data.World, chosen: Chosen) -> Chosen:
    """The same motion, with another digit in each."""
    random = np.random.default_rng(world.seed)
    digits = (chosen.digits + random.integers(1, 10, len(chosen.digits))) % 10
    sprite = [random.choice(np.flatnonzero(world.labels == digit)) for digit in digits]
    known = chosen.known | {"sprite": np.stack([sprite, sprite], axis=1)}
    return rendered(world, known, chosen.clips[0].shape[1:])


def steady(path: np.ndarray, *seams: int) -> np.ndarray:
    """Paths [n, T, 2] that meet no wall near the seams; a seam t lies between frames t - 1, t."""
    steps = np.diff(path, axis=1)  # [n, T - 1, 2]; the step across the seam t is t - 1
    near = (steps[:, max(0, t - 1 - FAR) : t + FAR] for t in seams)
    return np.all([(few == few[:, :1]).all((1, 2)) for few in near], axis=0)


# ----------------------------------------------------------------------------------------- measures


def tracks_of(clips: list[np.ndarray]) -> np.ndarray:
    return np.stack([reader.track_one(reader.to_ink(clip)) for clip in clips])  # [n, T, 2]


def true_track(real: Chosen, known: np.ndarray) -> np.ndarray:
    """The centre in all frames [n, T, 2]: what keeps its distance, read in those that are known
    [T], from the corner of the digit's box."""
    offset = (tracks_of(real.clips) - real.path)[:, known].mean(1, keepdims=True)
    return real.path + offset


def smooth(tracks: np.ndarray, seam: int) -> float:
    """The share of the clips without a jump between frames seam - 1 and seam."""
    before, across, after = np.diff(tracks[:, seam - 2 : seam + 2], axis=1).transpose(1, 0, 2)
    jump = np.maximum(np.abs(across - before), np.abs(across - after)).max(1)  # [n]
    return float((jump < 1.001).mean())


def off(tracks: np.ndarray, truth: np.ndarray, frame: int) -> float:
    """The median distance, in pixels, in one frame."""
    return float(np.median(np.linalg.norm(tracks[:, frame] - truth[:, frame], axis=1)))


def blend(before: list[np.ndarray], after: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` frames from the last frame of each clip to the first of another, mixed."""
    share = (np.arange(count) + 1)[None, :, None, None] / (count + 1)
    pairs = zip(before, after, strict=True)
    return [((1 - share) * a[:, -1:] + share * b[:, :1]).round().astype(np.uint8) for a, b in pairs]


def frozen(clips: list[np.ndarray], count: int, backward: bool = False) -> list[np.ndarray]:
    """Clips that stand still at their end, or before their start."""
    width = (count, 0) if backward else (0, count)
    return [np.pad(clip, ((0, 0), width, (0, 0), (0, 0)), "edge") for clip in clips]


def names_of(clips: list[np.ndarray], looks: list[int], network: nn.Module, box: int) -> np.ndarray:
    """Which digit is seen in the frames `looks` of each clip [n, looks]."""
    named = []
    for clip in clips:
        ink = reader.to_ink(clip[:, looks])
        every = list(range(len(looks)))
        named.append(reader.name_one(ink, reader.track_one(ink), every, network, box))
    return np.array(named)


# -------------------------------------------------------------------------------------------- tasks


@dataclass
class Job:
    """What every task needs, and what it leaves: figures by task and kind, and clips to look at."""

    run: sample.Run
    world: data.World
    network: nn.Module
    n: int
    seed: int
    how: dict  # settings that are not a task's own
    figures: dict = field(default_factory=dict)
    pictures: list = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.world.config.shapes[0]

    @property
    def box(self) -> int:
        return self.world.config.digit

    def make(self, title: str, task: Callable, *lists: list) -> list[np.ndarray]:
        """task(*part of each list, seeds) -> clips, in batches."""
        made, n = [], len(lists[0])
        for k in tqdm(range(0, n, AT_ONCE), desc=title, unit="batch", leave=False):
            part = range(k, min(k + AT_ONCE, n))
            seeds = [1_000_000 * self.seed + i for i in part]
            made += task(*(items[k : k + AT_ONCE] for items in lists), seeds)
        return made

    def report(self, title: str, score: Callable, given: np.ndarray, **kinds: list) -> None:
        """Score real, baseline and made clips; the frames `given` [T] are marked in the picture."""
        self.figures[title] = {kind: score(clips) for kind, clips in kinds.items()}
        self.pictures.append((title, given, {kind: clips[:2] for kind, clips in kinds.items()}))

    def told(self, prompts: list, frames: int, seeds: list, clips: list | None = None) -> list[str]:
        """Prompts as sample.py expands them, where `clips` are what is given."""
        return sample.expand(self.run, prompts, (frames, *self.shape), seeds, clips)

    def settings(self, task: str) -> sample.Settings:
        return replace(sample.SETTINGS[task], **self.how)

    def named(self, clips: list[np.ndarray], looks: list[int]) -> np.ndarray:
        return names_of(clips, looks, self.network, self.box)


def image_to_video(job: Job) -> None:
    T = max(job.world.config.durations)
    real = choose(job.world, job.n, (T, *job.shape), lambda path: np.ones(len(path), bool))
    images = [clip[:, :1] for clip in real.clips]

    def task(prompts, images, seeds):
        prompts = job.told(prompts, T, seeds, images)
        return sample.animate(job.run, prompts, images, T, seeds, job.settings("image"))

    def score(clips):
        ways = [reader.heading(track) for track in tracks_of(clips)]
        asked = [prompt.split()[-1] for prompt in real.prompts]
        named = job.named(clips, [1, T // 2, T - 1])
        return {
            "digit": float((named == real.digits[:, None]).mean()),
            "direction": float(np.mean([a == b for a, b in zip(ways, asked, strict=True)])),
        }

    made = job.make("image to video", task, real.prompts, images)
    given, still = np.arange(T) < 1, frozen(images, T - 1)
    job.report("image to video", score, given, real=real.clips, baseline=still, made=made)


def extend(job: Job, backward: bool) -> None:
    title, T = f"extend {'backward' if backward else 'forward'}", GIVEN + NEW
    seam = NEW if backward else GIVEN
    real = choose(job.world, job.n, (T, *job.shape), lambda path: steady(path, seam))
    known = (np.arange(T) >= NEW) if backward else (np.arange(T) < GIVEN)
    begun = [clip[:, known] for clip in real.clips]
    new = np.flatnonzero(~known)[:: -1 if backward else 1].tolist()  # the nearest first
    truth = true_track(real, known)

    def task(prompts, clips, seeds):
        how = job.settings("extend")
        prompts = sample.told_beside(job.run, prompts, clips, NEW, seeds, backward)
        return sample.extend(job.run, prompts, clips, NEW, seeds, backward, how)

    def score(clips):
        tracks, named = tracks_of(clips), job.named(clips, [new[0], new[NEW // 2], new[-1]])
        far = {f"pixels off after {k} frames": off(tracks, truth, new[k - 1]) for k in OFF}
        digit = float((named == real.digits[:, None]).mean())
        return far | {"digit": digit, "seam": smooth(tracks, seam)}

    made = job.make(title, task, real.prompts, begun)
    still = frozen(begun, NEW, backward)
    job.report(title, score, known, real=real.clips, baseline=still, made=made)


def loop(job: Job) -> None:
    way = job.shape[0] - job.box  # from wall to wall
    period = 2 * way // max(job.world.config.speeds)
    new = min(sample.room(job.run, GIVEN, "loop"), period // 2)
    L = period - new

    def fits(path):  # back where it was, and no wall near the seams
        return steady(path, L, period) & (path[:, period:] == path[:, : 2 + FAR]).all((1, 2))

    real = choose(job.world, job.n, (period + 2 + FAR, *job.shape), fits)
    begun, turns = [clip[:, :L] for clip in real.clips], [clip[:, :period] for clip in real.clips]
    truth = true_track(real, np.arange(len(real.path[0])) < L)

    def task(prompts, clips, seeds):
        prompts = sample.expand_lasting(job.run, prompts, seeds, clips)
        return sample.loop(job.run, prompts, clips, new, seeds, how=job.settings("loop"))

    def score(clips):
        tracks = tracks_of([np.concatenate([clip, clip[:, :2]], axis=1) for clip in clips])
        named = job.named(clips, [L, (L + period) // 2, period - 1])
        return {
            "seam to the new": smooth(tracks, L),
            "seam to the start": smooth(tracks, period),
            "digit": float((named == real.digits[:, None]).mean()),
            "pixels off half way": off(tracks, truth, L + new // 2),
        }

    made = job.make("loop", task, real.prompts, begun)
    mixed = [np.concatenate(x, axis=1) for x in zip(begun, blend(begun, begun, new), strict=True)]
    job.report("loop", score, np.arange(period) < L, real=turns, baseline=mixed, made=made)


def connect(job: Job) -> None:
    new = sample.room(job.run, GIVEN, "connect")
    T, end = 2 * GIVEN + new, GIVEN + new
    one = choose(job.world, job.n, (T, *job.shape), lambda path: steady(path, GIVEN, end))
    two = other_digits(job.world, one)
    before, after = [clip[:, :GIVEN] for clip in one.clips], [clip[:, end:] for clip in two.clips]
    half, halves, ways = GIVEN + new // 2, zip(one.clips, two.clips, strict=True), []
    real = [np.concatenate([a[:, :half], b[:, half:]], axis=1) for a, b in halves]
    truth = tracks_of(real)
    for path, digit in zip(one.path, two.digits, strict=True):  # how the second clip sets out
        step = tuple(np.sign(path[end + 1] - path[end]).tolist())
        way = {v: k for k, v in data.DIRECTIONS.items()}[step]
        ways.append(f"{data.article(digit)} {digit} moving {way}")

    def task(prompts, before, after, ends, seeds):
        prompts = sample.expand_lasting(job.run, prompts, seeds, before)
        ends = sample.expand_lasting(job.run, ends, seeds, after, backward=True)
        return sample.connect(
            job.run, prompts, before, after, new, seeds, ends, how=job.settings("connect")
        )

    def score(clips):
        tracks, named = tracks_of(clips), job.named(clips, [GIVEN, end - 1])
        first, last = named[:, 0] == one.digits, named[:, -1] == two.digits  # [n]
        return {
            "seam to the new": smooth(tracks, GIVEN),
            "seam from the new": smooth(tracks, end),
            "digit before": float(first.mean()),
            "digit after": float(last.mean()),
            "changes": float((first & last).mean()),
            "pixels off half way": off(tracks, truth, half),
        }

    made = job.make("connect", task, one.prompts, before, after, ways)
    mixed = zip(before, blend(before, after, new), after, strict=True)
    mixed = [np.concatenate(parts, axis=1) for parts in mixed]
    known = (np.arange(T) < GIVEN) | (np.arange(T) >= end)
    job.report("connect", score, known, real=real, baseline=mixed, made=made)


def edit(job: Job) -> None:
    T = max(job.world.config.durations)
    old = choose(job.world, job.n, (T, *job.shape), lambda path: np.ones(len(path), bool))
    real, truth = other_digits(job.world, old), tracks_of(old.clips)

    def score(clips):
        away = tracks_of(clips) - truth  # [n, T, 2]
        other = np.median(away, axis=1, keepdims=True).clip(-5, 5)
        named = job.named(clips, [0, T // 2, T - 1])
        return {
            "digit": float((named == real.digits[:, None]).mean()),
            "path kept": float((np.linalg.norm(away - other, axis=2) <= 2).mean()),
        }

    for strength in STRENGTHS:

        def task(prompts, clips, seeds, strength=strength):
            prompts, how = job.told(prompts, T, seeds, clips), job.settings("edit")
            return sample.edit(job.run, prompts, clips, strength, seeds, how)

        title = f"edit at {strength}"
        made = job.make(title, task, real.prompts, old.clips)
        sets = {"real": real.clips, "baseline": old.clips, "made": made}
        job.report(title, score, np.zeros(T, bool), **sets)


def minute(job: Job, n: int) -> None:
    size, tenth = (MINUTE, *job.shape), MINUTE // 10
    real = choose(job.world, n, size, lambda path: np.ones(len(path), bool))

    def task(prompts, seeds):
        prompts = job.told(prompts, MINUTE, seeds)
        parts = sample.stream(job.run, prompts, size, seeds, job.settings("new"))
        chunks = []
        with tqdm(total=MINUTE, desc="a minute", unit="frame", leave=False) as bar:
            for chunk in parts:
                chunks.append(chunk)
                bar.update(chunk.shape[2])
        return list(np.concatenate(chunks, axis=2))

    def score(clips):
        right = job.named(clips, list(range(5, MINUTE, 10))) == real.digits[:, None]
        digit = right.mean(0).reshape(10, -1).mean(1)
        tenths = [[clip[:, k : k + tenth] for clip in clips] for k in range(0, MINUTE, tenth)]
        sharp = np.array([reader.sharpness(few) for few in tenths])
        steps = np.linalg.norm(np.diff(tracks_of(clips), axis=1), axis=2)  # [n, T - 1]
        speed = np.array([steps[:, k : k + tenth - 1].mean() for k in range(0, MINUTE, tenth)])
        seen = {"digit": digit, "sharpness": sharp, "speed": speed}
        ends = {f"{name}, last tenth / first": x[-1] / max(x[0], 1e-6) for name, x in seen.items()}
        return {"digit, first tenth": digit[0], **ends} | {
            f"{name} in tenths": x.round(3).tolist() for name, x in seen.items()
        }

    made = job.make("a minute", task, real.prompts)
    first = max(job.world.config.durations)
    still = frozen([clip[:, :first] for clip in made], MINUTE - first)
    some = np.zeros(MINUTE, bool)
    job.report("a minute", score, some, real=real.clips, baseline=still, made=made)


def measure(
    run: sample.Run,
    world: data.World,
    network: nn.Module,
    n: int,
    minutes: int,
    seed: int = 0,
    how: dict | None = None,
) -> tuple[dict, Image.Image]:
    """All figures, by task, kind of clip and measure; and a picture of some clips of each task."""
    job = Job(run, world, network, n, seed, how or {})
    image_to_video(job)
    extend(job, backward=False)
    extend(job, backward=True)
    loop(job)
    connect(job)
    edit(job)
    minute(job, minutes)
    return job.figures, picture(job.pictures)


# ------------------------------------------------------------------------------ what a minute costs


def cost_of(folder: str, frames: int, steps: int) -> dict[str, float]:
    """Make one clip as a user would: the most memory that it took, and seconds."""
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        words = ["--run", folder, "--prompt", "a 7 moving left", "--out", f"{scratch}/clip.mp4"]
        start = time.perf_counter()
        failed = sample.command([*words, "--frames", str(frames), "--steps", str(steps)])
        taken = time.perf_counter() - start
    if failed:
        raise ValueError(f"a clip of {frames} frames could not be made")
    status = Path("/proc/self/status")
    if status.exists():  # Linux
        most = float(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    else:
        import resource  # macOS counts in bytes

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"megabytes": most, "seconds": taken}


def cost(folder: str, steps: int) -> dict[str, float]:
    """Memory and time of a minute, and against those of a tenth of it; each in a process of its
    own."""
    spent = []
    for frames in (SHORT, MINUTE):
        words = [sys.executable, __file__, folder, str(frames), str(steps)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        spent.append(json.loads(done.stdout))
    short, long = spent
    return long | {f"{name}, of a tenth": long[name] / short[name] for name in long}


# ---------------------------------------------------------------------------------------- the table


def reached(measure: str, value: float, bar: float) -> bool:
    return value <= bar if measure.startswith("pixels") else value >= bar


def table(figures: dict) -> str:
    """A line for each measure of each task: real clips, the baseline, the model, and the bar."""

    def cell(measure: str, value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.1f}" if measure.startswith("pixels") else f"{100 * value:.0f} %"

    lines = [f"{'':18}{'':34}{'real':>8}{'baseline':>10}{'model':>8}   to reach"]
    for task, bars in BARS.items():
        kinds, name = figures[task], task
        for measure, bar in bars.items():
            values = [kinds[kind][measure] for kind in ("real", "baseline", "made")]
            real, base, made = (cell(measure, value) for value in values)
            mark = "" if reached(measure, values[2], bar) else "   not yet"
            goal = f"{cell(measure, bar):>8}"
            lines.append(f"{name:18}{measure:34}{real:>8}{base:>10}{made:>8}   {goal}{mark}")
            name = ""
    made, spent = figures["a minute"]["made"], figures["a minute"].get("cost")
    for name in ("digit", "sharpness", "speed"):
        tenths = " ".join(f"{value:5.2f}" for value in made[f"{name} in tenths"])
        lines.append(f"{'':18}{name + ', in tenths':20}{tenths}")
    if spent:
        lines.append(
            f"{'':18}it takes {spent['megabytes']:.0f} MB at most and {spent['seconds']:.0f} s: "
            f"{spent['megabytes, of a tenth']:.2f} times the memory and "
            f"{spent['seconds, of a tenth']:.1f} times the time of {SHORT} frames"
        )
    return "\n".join(lines)


def picture(shown: list) -> Image.Image:
    """Two clips of each task as strips: real, the baseline, made. A bar marks what was given."""
    scale, most, left = 2, 26, 60
    rows = sum(2 * len(kinds) for _, _, kinds in shown)
    H, W = next(iter(shown[0][2].values()))[0].shape[2:]
    high, wide = scale * H + 8, scale * W + 2
    page = Image.new("RGB", (left + most * wide, rows * high + 20 * len(shown)), (24, 24, 32))
    pen, top = ImageDraw.Draw(page), 0
    for title, given, kinds in shown:
        pen.text((6, top + 4), title, fill=(255, 255, 255))
        top += 20
        frames = np.unique(
            np.linspace(0, len(given) - 1, min(most, len(given))).round().astype(int)
        )
        for k in (0, 1):
            for kind, clips in kinds.items():
                if k < len(clips):
                    pen.text((6, top + high // 2 - 8), kind, fill=(200, 200, 200))
                    for place, t in enumerate(frames):
                        x = left + place * wide
                        page.paste(filmstrip(clips[k][:, [t]], scale), (x, top))
                        if given[t]:
                            line = (x, top + scale * H + 1, x + scale * W, top + scale * H + 3)
                            pen.rectangle(line, fill=(255, 190, 80))
                    top += high
    return page.crop((0, 0, page.width, top))


if __name__ == "__main__":  # what `cost` starts
    print(json.dumps(cost_of(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
