"""Are captions and expanded prompts true? Read from the facts in their sentences.

The problem. A caption is right or wrong in each of its facts, and looking at a few says nothing of
their share. An expanded prompt cannot be right or wrong, as there is no clip yet. But it has to say
what the prompt said, and what it adds must be possible: a digit that starts at the right wall can't
move right, and a slow one does not bounce twice in nine frames.

The idea. The captions of data.py are a small language. Read it back into facts; compare them with
those of the clip; and for the expander, look whether the world has any place where a digit could
start and do all that.

    "a 7 at top left moving left fast, 0 bounces. 9 frames."
    -> frames 9; digit 7, region "top left", direction "left", speed "fast", bounces 0
"""

import argparse
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

import data
import prompting
from language import Language, asked
from measure import prompts
from vae import VAE, to_float

FACTS = ("digit", "region", "direction", "speed", "bounces")  # of one digit
IMAGES = 3  # of ten clips
DIGIT = re.compile(
    r"an? (?P<digit>\d) at (?P<region>[a-z]+ [a-z]+)"
    r"(?: moving (?P<direction>\w+) (?P<speed>slowly|fast), (?P<bounces>\d+) bounces?)?"
)

# ------------------------------------------------------------------------------ from words to facts


def read_caption(said: str) -> dict | None:
    """The facts of a descriptive caption, or None where it isn't one. Of an image, a digit has no
    direction, speed and bounces: None."""
    *sentences, length = said.removesuffix(".").split(". ")
    frames = re.fullmatch(r"(\d+) frames|an image", length)
    found = [DIGIT.fullmatch(sentence) for sentence in sentences]
    if not frames or not found or not all(found):
        return None
    digits = []
    for facts in (match.groupdict() for match in found):
        bounces = facts["bounces"] and int(facts["bounces"])
        digits.append(facts | {"digit": int(facts["digit"]), "bounces": bounces})
    return {"frames": int(frames[1] or 1), "digits": digits}


def read_prompt(said: str) -> list[dict]:
    """What a short prompt says of each digit: "digit" and "direction", None where it doesn't."""
    named = {word: k for k, word in enumerate(data.NUMBERS)} | {str(k): k for k in range(10)}
    digits = []
    for words in (part.split() for part in said.split(" and ")):
        digit = next((named[word] for word in words if word in named), None)
        way = next((word for word in words if word in data.DIRECTIONS), None)
        digits.append({"digit": digit, "direction": way})
    return digits


def starts(fact: dict, size: tuple[int, int, int], config: data.WorldConfig) -> np.ndarray:
    """The places [n, 2] where one digit can start in a clip of `size` and do what the fact says."""
    T, *sides = size
    room = np.array(sides) - config.digit
    place = np.stack(np.meshgrid(*map(np.arange, room + 1), indexing="ij"), -1).reshape(-1, 2)
    good = np.array([data.region(p, room) == fact["region"] for p in place])
    if fact["direction"] is None:
        return place[good]
    way = np.array(data.DIRECTIONS[fact["direction"]])
    axis = int(np.flatnonzero(way)[0])
    ahead = room[axis] - place[:, axis] if way[axis] > 0 else place[:, axis]
    possible = np.zeros(len(place), bool)
    for speed in config.speeds:
        beyond = speed * (T - 1) - ahead  # past the first wall; one bounce more each room[axis]
        bounces = np.where(beyond > 0, 1 + (beyond - 1) // max(1, room[axis]), 0)
        fits = (ahead >= min(4 * speed, room[axis])) & (bounces == fact["bounces"])
        possible |= fits & ((speed > 1) == (fact["speed"] == "fast"))
    return place[good & possible]


def is_possible(caption: dict, size: tuple[int, int, int], config: data.WorldConfig) -> bool:
    """Whether the world has a clip of `size` of which this is true: digits start apart."""
    places = [starts(fact, size, config) for fact in caption["digits"]]
    if caption["frames"] != size[0] or len(places) > 2 or not all(map(len, places)):
        return False
    apart = np.abs(places[0][:, None] - places[-1]).max(-1)  # [n, m]
    return len(places) == 1 or bool((apart >= config.digit).any())


def is_kept(wanted: list[dict], caption: dict) -> bool:
    """Whether a caption says all of the prompt, each digit with its own direction, and no more
    digits. Which comes first is free. An image shows no direction."""
    names = ("digit",) if caption["frames"] == 1 else ("digit", "direction")

    def same(want: dict, fact: dict) -> bool:
        return all(want[name] in (None, fact[name]) for name in names)

    return len(wanted) == len(caption["digits"]) and any(
        all(map(same, wanted, order)) for order in permutations(caption["digits"])
    )


# ------------------------------------------------------------------------------------ two measures


def score(said: dict | None, want: dict) -> dict[str, float]:
    """The share of the digits of a clip of which each fact was said right; the number of digits and
    of frames. The digits that were said are compared in the order that fits best."""
    told = said["digits"] if said else []
    scores = {"number": float(len(told) == len(want["digits"]))}
    scores["length"] = float(said is not None and said["frames"] == want["frames"])
    facts = [name for name in FACTS if want["digits"][0][name] is not None]
    nobody = dict.fromkeys(facts)
    told = [*told[:2], nobody, nobody][: max(len(want["digits"]), min(2, len(told)))]
    right = [
        [[a[x] == b[x] for x in facts] for a, b in zip(want["digits"], order, strict=False)]
        for order in permutations(told)
    ]
    return scores | dict(zip(facts, np.mean(max(right, key=np.sum), 0).tolist(), strict=True))


def mixed(world: data.Digits, n: int, pixels: bool) -> list[data.Clip]:
    """The world's first n clips, three of ten as images, as in training."""
    i = np.arange(n)
    image, make = i % 10 < IMAGES, world.clips if pixels else world.told
    return make(i[image], True) + make(i[~image])


def size_of(clip: data.Clip) -> tuple[int, int, int]:
    return tuple(clip.facts[side] for side in ("frames", "height", "width"))


@torch.no_grad()
def measure_captioner(
    vae: VAE, language: Language, world: data.Digits, clips: int, told: bool = False
) -> dict:
    """The share of right facts in captions, by the number of digits; told: where the captioner also
    reads what somebody wrote of each clip."""
    some = mixed(world, clips, True)
    latents = [vae.encode(to_float(clip.pixels[None]).to(vae.mean.device))[0] for clip in some]
    heard = [asked(clip.brief, size_of(clip)) for clip in some] if told else None
    scores = {}
    for said, clip in zip(language.caption(latents, heard), some, strict=True):
        want = read_caption(data.descriptive_caption(clip.facts))
        kind = f"{('one', 'two')[len(want['digits']) - 1]} in "
        kind += "a clip" if want["frames"] > 1 else "an image"
        for name, value in score(read_caption(said), want).items():
            for row in (kind, "all"):
                scores.setdefault(row, {}).setdefault(name, []).append(value)
    rows = sorted(scores.items())
    return {k: {n: float(np.mean(v)) for n, v in row.items()} for k, row in rows}


def measure_expander(language: Language, world: data.Digits, prompts: int) -> dict:
    """Of short and noisy prompts: how many expansions are descriptive captions, say what the prompt
    said, and are possible."""
    some, figures = mixed(world, prompts, False), {}
    kinds = {"short": [data.short_caption(clip.facts) for clip in some]}
    kinds["noisy"] = [clip.brief for clip in some]
    for kind, said in kinds.items():
        rows = []
        for size in dict.fromkeys(map(size_of, some)):
            group = [k for k, clip in enumerate(some) if size_of(clip) == size]
            written = language.expand([said[k] for k in group], size, group)
            for k, caption in zip(group, map(read_caption, written), strict=True):
                there = caption is not None
                kept = there and is_kept(read_prompt(said[k]), caption)
                rows.append((there, kept, there and is_possible(caption, size, world.config)))
        shares = np.mean(rows, 0).tolist()
        figures[kind] = dict(zip(("descriptive", "kept", "possible"), shares, strict=True))
    return figures


def compare(recaptioned: Path, written: Path, ones: int, twos: int, seed: int) -> dict:
    """The report's claim: how well clips follow the same short prompts, after equal trainings."""
    runs = [prompting.load_run(folder) for folder in (written, recaptioned)]
    if [run.config["captions"] for run in runs] != ["written", "recaptioned"]:
        raise ValueError("--run needs --captions recaptioned, and --against --captions written")
    one, other = (run.config for run in runs)
    differ = [name for name in one if one[name] != other.get(name)
              and name not in ("out", "captions", "stage") and name[:5] != "text_"]  # fmt: skip
    if differ:
        raise ValueError(f"the two runs also differ in {', '.join(differ)}")
    kinds = {"written": (runs[0], False), "re-captioned": (runs[1], False)}
    kinds |= {"and prompts expanded": (runs[1], True)}
    figures = {}
    for name, (run, expanded) in kinds.items():
        made = prompts.measure(run, ones, twos, seed, {}, expanded)[0]["generated"]
        figures[name] = {score: made[score] for score in prompts.SCORES}
    return figures


def main(args: argparse.Namespace) -> tuple[Path, dict, None]:
    folder = Path(args.run or prompting.newest_run(name="text"))
    vae, writer = (load(folder, "cpu") for load in (prompting.load_vae, prompting.load_language))
    world, figures = prompts.held_out(writer.world, seed=args.seed), {}
    if args.against:
        compared = compare(folder, Path(args.against), args.ones, args.twos, args.seed)
        figures["clips of prompts"] = compared
    for name, told in (("captioner", False), ("captioner, told", True)):
        figures[name] = measure_captioner(vae, writer, world, args.clips, told)
    figures["expander"] = measure_expander(writer, world, args.clips)
    print("\n".join(prompts.as_table(title, rows) for title, rows in figures.items()))
    return folder, figures, None
