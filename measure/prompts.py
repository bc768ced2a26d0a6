"""Do clips show what their prompts say? Three sets of clips of the same prompts are read from
pixels alone (reader.py):

    real         held-out digits, straight from the world: the reader's own mistakes
    VAE          those clips, encoded and decoded: the ceiling of any model in this latent space
    generated    the model's own clips

Every digit and direction is asked for equally often, at each shape of the world's videos in their
longest duration, and at the first shape in the shorter ones, too.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import prompting
from measure import reader
from vae import VAE, to_float, to_uint8

SCORES = ("digit", "direction", "digits", "directions", "both")  # the last three: of two digits

# -------------------------------------------------------------------------------------- real clips


def held_out(about: dict, **changes) -> data.Digits:
    """The world of a run, with digits that it never saw."""
    if (kind := about["config"]["kind"]) != "digits":
        raise ValueError(f"this run learned from {kind}: only moving digits can be measured")
    return data.unseen(about, seed=0, **changes)


def equal_runs(run, against, flag: str, values: tuple[str, str], free=()) -> list[prompting.Run]:
    """Two runs that differ in this flag, which has these values, and in none that is not free."""
    if not against:
        raise ValueError(f"--against: an equal run of train.py --{flag} {values[1]}")
    runs = [prompting.load_run(folder) for folder in (run, against)]
    one, other = (run.config for run in runs)
    if (one.get(flag, "none"), other.get(flag)) != values:
        needs = "--run needs --{0} {1}, and --against --{0} {2}"
        raise ValueError(needs.format(flag, *values))
    free = {"out", "stage", flag, *free}
    if differ := [name for name in one if one[name] != other.get(name) and name not in free]:
        raise ValueError(f"the two runs also differ in {', '.join(differ)}")
    return runs


class Chosen:
    """n real clips of one size (T, H, W), and all that is true of them."""

    def __init__(self, world: data.Digits, raw: dict, size: tuple[int, int, int]):
        sizes = np.tile(size, (len(raw["sprite"]), 1))
        self.raw, self.facts = raw, world.describe(raw, sizes)  # see data.Digits.draw
        self.path = world.path(raw, sizes, size[0])[:, :, 0]  # [n, T, 2], the first digit's corner
        self.digits = np.array([fact["digits"][0]["digit"] for fact in self.facts])  # [n]
        self.prompts = list(map(data.short_caption, self.facts))
        self.clips = list(world.render(raw, size))
        self.pairs = list(zip(self.clips, self.prompts, strict=True))


def choose(world: data.Digits, size: tuple, turns: list | range, fits=None, i=None) -> Chosen:
    """A clip of `size` for each of the turns: all 40 digits and directions (of the first digit)
    take turns. fits: of paths [m, T, 2], which will do [m]; i: the numbers to choose from."""
    i, stock = np.arange(200 * max(len(turns), 40)) if i is None else i, defaultdict(list)
    sizes = np.tile(size, (len(i), 1))
    raw = world.draw(i, sizes)
    path = world.path(raw, sizes, size[0])[:, :, 0]
    for k in np.flatnonzero(fits(path)) if fits else range(len(i)):
        way = tuple(np.sign(raw["velocity"][k, 0]).tolist())
        stock[int(world.classes[raw["sprite"][k, 0]]), way].append(k)
    kinds = [(digit, way) for digit in range(10) for way in data.DIRECTIONS.values()]
    order = np.random.default_rng(world.config.seed).permutation(40)  # any 12 are a fair choice
    kinds = [kinds[k] for k in order if kinds[k] in stock]  # a long canvas may lack directions
    if not kinds:
        raise ValueError(f"no clip of {' x '.join(map(str, size))} is fit for one of the tasks")
    chosen = []
    for numbers in (stock[kinds[j % len(kinds)]] for j in turns):
        chosen.append(numbers[0])
        numbers.append(numbers.pop(0))
    return Chosen(world, {name: value[chosen] for name, value in raw.items()}, size)


def real_clips(about: dict, ones: int, twos: int) -> list[Chosen]:
    """`ones` clips of one held-out digit and `twos` of two, in sizes that take turns."""
    some = []
    for count, two in ((ones, 0.0), (twos, 1.0)):
        world = held_out(about, two_digits=two)
        durations = sorted({T for T in world.durations if T > 1}, reverse=True)
        if not durations:
            raise ValueError("the world of this run has no videos, and an image does not move")
        shapes = list(dict.fromkeys(map(tuple, world.shapes)))
        sizes = [(durations[0], *shape) for shape in shapes]
        sizes += [(T, *shapes[0]) for T in durations[1:]]
        room = world.config.digit * (2 if two else 1)  # elsewhere there is no second digit
        sizes = [size for size in sizes if max(size[1:]) >= room]
        if count and not sizes:
            raise ValueError("no video of this world has room for two digits: take --twos 0")
        for s, size in enumerate(sizes):
            mine = [j for j in range(count) if (j + j // 40) % len(sizes) == s]
            i = 1_000_000 * s + np.arange(2000 + 80 * len(mine))[::-1]  # many times too many
            some += [choose(world, size, mine, i=i)] if mine else []
    return some


# ----------------------------------------------------------------------------- what is made of them


@torch.no_grad()
def reconstruct(vae: VAE, clips: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Clips after the VAE, and how good they are."""
    made, squares, pixels, numbers = [None] * len(clips), 0.0, 0, 0
    for some in prompting.alike(clips):
        video = to_float([clips[k] for k in some]).to(vae.mean.device)  # [B, C, T, H, W]
        latent = vae.encode(video)  # [B, Z, t, h, w]
        again = vae.decode(latent)  # [B, C, T, H, W]
        squares += (again - video).square().sum().item()
        pixels, numbers = pixels + video.numel(), numbers + latent.numel()
        for k, clip in zip(some, to_uint8(again), strict=True):
            made[k] = clip
    psnr = 10 * np.log10(4 * pixels / max(squares, 1e-9))
    return made, f"{pixels / numbers:.1f}x compression, {psnr:.1f} dB (peak-to-peak 2)"


# ------------------------------------------------------------------------------------- the figures


def score(seen: dict, asked: list[dict]) -> dict[str, float]:
    """One reading against the facts that were asked for. Of two digits, either track may be either
    of the two, and `both` is right only where every digit moves in its own direction."""
    if len(asked) == 1:
        named = np.mean([k == asked[0]["digit"] for k in seen["digits"]])
        return {"digit": named, "direction": seen["directions"] == [asked[0]["direction"]]}
    read = sorted(zip(seen["digits"], seen["directions"], strict=True))
    want = sorted((d["digit"], d["direction"]) for d in asked)
    (a, b), (c, d) = zip(*read, strict=True), zip(*want, strict=True)
    return {"digits": a == c, "directions": sorted(b) == sorted(d), "both": read == want}


def average(scores: list[dict]) -> dict[str, float | None]:
    """The mean of each score over the clips that have it; None where no clip does."""
    values = {name: [s[name] for s in scores if name in s] for name in SCORES}
    return {name: float(np.mean(v)) if v else None for name, v in values.items()}


def measure(
    run: prompting.Run, ones: int, twos: int, how: dict, expanded: bool = True
) -> tuple[dict, Image.Image]:
    """The share of right digits and directions, and sharpness compared with real clips, of each set
    of clips; and a picture of some: asked for, read, a bar where that is wrong."""
    chosen = real_clips(run.world, ones, twos)
    facts, pairs = (sum((getattr(x, name) for x in chosen), []) for name in ("facts", "pairs"))
    config, figures = data.WorldConfig(**run.world["config"]), {}
    network, asked = reader.load_classifier(config.digit), [fact["digits"] for fact in facts]
    sets = {"real": [clip for clip, _ in pairs]}
    sets["VAE"], quality = reconstruct(run.vae, sets["real"])
    tasks = [prompting.new(run, clip.shape[1:], prompt) for clip, prompt in pairs]
    sets["generated"] = prompting.finished(run, tasks, range(len(tasks)), how, expanded)
    real = reader.sharpness(sets["real"])
    for name, clips in sets.items():
        seen = [reader.read(clip, len(digits), network, config.digit, max(config.speeds))
                for clip, digits in zip(clips, asked, strict=True)]  # fmt: skip
        scores = list(map(score, seen, asked))
        figures[name] = average(scores) | {"sharpness": reader.sharpness(clips) / real}
    for size in dict.fromkeys(clip.shape for clip in clips):
        some = [x for x, clip in zip(scores, clips, strict=True) if clip.shape == size]
        figures[" x ".join(map(str, size[1:]))] = average(some)
    print(as_table(f"{ones} of one digit, {twos} of two", figures), f"VAE: {quality}", sep="\n")
    some = np.unique(np.linspace(0, len(clips) - 1, 60).astype(int))
    titles = [f"{pairs[k][1]}: {seen[k]['digits']} {' '.join(seen[k]['directions'])}" for k in some]
    wrong = [np.full(clips[k].shape[1], min(scores[k].values()) < 1) for k in some]
    page = data.sheet([clips[k] for k in some], titles, columns=4, scale=2, most=3, marks=wrong)
    return figures | {"quality": quality}, page


def as_table(title: str, rows: dict[str, dict]) -> str:
    """Rows of figures by column: shares as percent, text as it is, and what has a unit as a
    number; the row's name ends in it."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    wide = 2 + max(map(len, [title, *rows]))
    lines = [f"{title:{wide}}" + "".join(f"{name:>12}" for name in columns)]
    for name, row in rows.items():
        cells = ("-" if (x := row.get(column)) is None else x for column in columns)
        form = ".2f" if ", " in name else ".1%"
        cells = (x if isinstance(x, str) else format(x, form) for x in cells)
        lines.append(f"{name:{wide}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def turned(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows of columns from columns of rows."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {name: {kind: row[name] for kind, row in rows.items() if name in row} for name in names}


def main(args: argparse.Namespace) -> tuple[Path, dict, Image.Image]:
    folder = Path(args.run or prompting.newest_run())
    how = {"steps": args.steps} if args.steps else {}
    return folder, *measure(prompting.load_run(folder), args.ones, args.twos, how)
