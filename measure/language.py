"""Are captions and expanded prompts true? Read from the facts in their sentences.

The problem. A caption is right or wrong in each of its facts, and looking at a few says nothing of
their share. An expanded prompt has no clip yet. But it has to say what the prompt said, and what it
adds must be possible: a slow digit does not bounce twice in nine frames.

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
    digits = [match.groupdict() for match in found]
    for facts in digits:
        facts["digit"] = int(facts["digit"])
        facts["bounces"] = facts["bounces"] and int(facts["bounces"])
    return {"frames": int(frames[1] or 1), "digits": digits}


def read_prompt(said: str) -> list[dict]:
    """What a short prompt says of each digit: "digit" and "direction", None where it doesn't."""
    numbers = {word: k for k, word in enumerate(data.NUMBERS)} | {str(k): k for k in range(10)}
    digits = []
    for words in (part.split() for part in said.split(" and ")):
        named = [numbers[word] for word in words if word in numbers] + [None]
        ways = [word for word in words if word in data.DIRECTIONS] + [None]
        digits.append({"digit": named[0], "direction": ways[0]})
    return digits


def starts(fact: dict, size: tuple[int, int, int], config: data.WorldConfig) -> np.ndarray:
    """The places [n, 2] where one digit can start in a clip of `size` and do what the fact says."""
    T, *sides = size
    room = np.array(sides) - config.digit
    place = np.stack(np.meshgrid(*map(np.arange, room + 1), indexing="ij"), -1).reshape(-1, 2)
    good = np.array([data.region(p, room) == fact["region"] for p in place])
    if fact["direction"] not in data.DIRECTIONS:  # a model may say anything
        return place[good & (fact["direction"] is None)]
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
    return len(wanted) == len(caption["digits"]) and any(
        all(want[x] in (None, fact[x]) for want, fact in zip(wanted, order, strict=True)
            for x in names) for order in permutations(caption["digits"])
    )  # fmt: skip


# ------------------------------------------------------------------------------------ two measures


def score(said: dict | None, want: dict) -> dict[str, float]:
    """The share of a clip's digits of which each fact was said right, compared in the order that
    fits best; the number of digits and of frames."""
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


@torch.no_grad()
def measure_captioner(
    vae: VAE, language: Language, clips: list[data.Clip], told: bool = False
) -> dict[str, dict[str, float]]:
    """The share of right facts in captions, by the number of digits; told: where the captioner also
    reads what somebody wrote of each clip."""
    latents, scores, pixels = [None] * len(clips), {}, [clip.pixels for clip in clips]
    for some in prompting.alike(pixels):
        video = to_float([pixels[k] for k in some]).to(vae.mean.device)  # [B, C, T, H, W]
        for k, latent in zip(some, vae.encode(video), strict=True):
            latents[k] = latent
    heard = [asked(clip.brief, clip.pixels.shape[1:]) for clip in clips] if told else None
    for said, clip in zip(language.caption(latents, heard), clips, strict=True):
        want = read_caption(data.descriptive_caption(clip.facts))
        kind = f"{('one', 'two')[len(want['digits']) - 1]} in "
        kind += "a clip" if want["frames"] > 1 else "an image"
        for name, value in score(read_caption(said), want).items():
            for row in (kind, "all"):
                scores.setdefault(row, {}).setdefault(name, []).append(value)
    rows = sorted(scores.items())
    return {k: {n: float(np.mean(v)) for n, v in row.items()} for k, row in rows}


def measure_expander(language: Language, clips: list[data.Clip], config: data.WorldConfig) -> dict:
    """Of short and noisy prompts: how many expansions are descriptive captions, say what the prompt
    said, and are possible."""
    kinds, figures = {"short": [data.short_caption(clip.facts) for clip in clips]}, {}
    for kind, said in (kinds | {"noisy": [clip.brief for clip in clips]}).items():
        rows = []
        for some in prompting.alike([clip.pixels for clip in clips]):
            size = clips[some[0]].pixels.shape[1:]
            written = language.expand([said[k] for k in some], size, some)
            for k, caption in zip(some, map(read_caption, written), strict=True):
                there = caption is not None
                kept = there and is_kept(read_prompt(said[k]), caption)
                rows.append((there, kept, there and is_possible(caption, size, config)))
        shares = np.mean(rows, 0).tolist()
        figures[kind] = dict(zip(("descriptive", "kept", "possible"), shares, strict=True))
    return figures


def compare(folder: Path, against: str, ones: int, twos: int) -> dict:
    """The report's claim: how well clips follow the same short prompts, after equal trainings."""
    free = "text_width text_steps text_batch text_lr".split()
    new, old = prompts.equal_runs(folder, against, "captions", ("recaptioned", "written"), free)
    kinds = {"written": (old, False), "re-captioned": (new, False), "expanded": (new, True)}
    made = {name: prompts.measure(run, ones, twos, {}, expanded)[0]["generated"]
            for name, (run, expanded) in kinds.items()}  # fmt: skip
    return {name: {score: row[score] for score in prompts.SCORES} for name, row in made.items()}


def main(args: argparse.Namespace) -> tuple[Path, dict, None]:
    folder = Path(args.run or prompting.newest_run())
    vae, writer = (load(folder, "cpu") for load in (prompting.load_vae, prompting.load_language))
    world, i, figures = prompts.held_out(writer.world), np.arange(args.clips), {}
    clips = world.clips(i[i % 10 < 3], image=True) + world.clips(i[i % 10 >= 3])  # as in training
    if args.against:
        figures["clips of prompts"] = compare(folder, args.against, args.ones, args.twos)
    for name, told in (("captioner", False), ("captioner, told", True)):
        figures[name] = measure_captioner(vae, writer, clips, told)
    figures["expander"] = measure_expander(writer, clips, world.config)
    print("\n".join(prompts.as_table(title, rows) for title, rows in figures.items()))
    return folder, figures, None
