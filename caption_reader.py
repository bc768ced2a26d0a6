"""Reading captions: the facts in a sentence, whether they are right, and whether they are possible.

The problem. A caption is right or wrong in each of its facts, and looking at a few says nothing of
their share. An expanded prompt can't be right or wrong, as there is no clip yet. But it has to say
what the prompt said, and what it adds must be possible: a digit that starts at the right wall can't
move right, and one that is slow does not bounce twice in nine frames.

The idea. The captions of data.py are a small language. Read it back into facts; compare them with
those of the clip; and for the expander, look whether the world has any place where a digit could
start and do all that.

    "a 7 at top left moving left fast, 0 bounces. 9 frames."
    -> frames 9; digit 7, region "top left", direction "left", speed "fast", bounces 0

Run `python caption_reader.py` for sentences, what is read in them and whether they are possible.
"""

import re
from itertools import permutations

import numpy as np
import torch

import data
from language import Language, asked
from recaption import encoded
from vae import VAE

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
    digits = []
    for match in found:
        facts = match.groupdict()
        if facts["direction"]:
            facts["bounces"] = int(facts["bounces"])
        digits.append(facts | {"digit": int(facts["digit"])})
    return {"frames": int(frames[1] or 1), "digits": digits}


def read_prompt(said: str) -> list[dict]:
    """What a short prompt says of each digit: "digit" and "direction", None where it doesn't."""
    digits = []
    for part in said.split(" and "):
        words = part.split()
        names = [int(w) if w.isdigit() else data.NUMBERS.index(w) for w in words
                 if w.isdigit() or w in data.NUMBERS]  # fmt: skip
        ways = [word for word in words if word in data.DIRECTIONS]
        digits.append({"digit": (names or [None])[0], "direction": (ways or [None])[0]})
    return digits


def starts(fact: dict, size: tuple[int, int, int], config: data.WorldConfig) -> np.ndarray:
    """The places [n, 2] where one digit can start in a clip of `size` and do what the fact says."""
    T, *sides = size
    room = np.array(sides) - config.digit
    place = np.stack(np.meshgrid(*map(np.arange, room + 1), indexing="ij"), -1).reshape(-1, 2)
    good = np.array([data.region(p, room) == fact["region"] for p in place])
    if fact["direction"] is None:
        return place[good]
    paces = [speed for speed in config.speeds if (speed > 1) == (fact["speed"] == "fast")]
    way = np.array(data.DIRECTIONS[fact["direction"]])
    axis = int(np.flatnonzero(way)[0])
    ahead = room[axis] - place[:, axis] if way[axis] > 0 else place[:, axis]
    possible = np.zeros(len(place), bool)
    for speed in paces:
        beyond = speed * (T - 1) - ahead  # past the first wall; one bounce more each room[axis]
        bounces = np.where(beyond > 0, 1 + (beyond - 1) // max(1, room[axis]), 0)
        possible |= (ahead >= min(4 * speed, room[axis])) & (bounces == fact["bounces"])
    return place[good & possible]


def is_possible(caption: dict, size: tuple[int, int, int], config: data.WorldConfig) -> bool:
    """Whether the world has a clip of `size` of which this is true: digits start apart."""
    places = [starts(fact, size, config) for fact in caption["digits"]]
    if caption["frames"] != size[0] or len(places) > 2 or not all(map(len, places)):
        return False
    if len(places) == 2:
        apart = np.abs(places[0][:, None] - places[1]).max(-1)  # [n, m]
        return bool((apart >= config.digit).any())
    return True


def is_kept(asked: list[dict], caption: dict) -> bool:
    """Whether a caption says all of the prompt, each digit with its own direction, and no more
    digits. Which is told first is free. An image shows no direction."""
    still = caption["frames"] == 1

    def same(want: dict, fact: dict) -> bool:
        names = ("digit",) if still else ("digit", "direction")
        return all(want[name] in (None, fact[name]) for name in names)

    return len(asked) == len(caption["digits"]) and any(
        all(map(same, asked, order)) for order in permutations(caption["digits"])
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
        [
            [a[name] == b[name] for name in facts]
            for a, b in zip(want["digits"], order, strict=False)
        ]
        for order in permutations(told)
    ]
    best = max(right, key=np.sum)
    return scores | dict(zip(facts, np.mean(best, 0).tolist(), strict=True))


@torch.no_grad()
def measure_captioner(
    vae: VAE, language: Language, world: data.World, clips: int, told: bool = False
) -> dict:
    """The share of right facts in captions of the world's clips of native sizes, by the number of
    digits that there are; told: where the captioner also reads the short and noisy caption."""
    index = np.arange(clips)
    size = world.size(index)
    facts, parts = world.all_facts(index, size), np.array_split(index, 1 + clips // 500)
    latents = sum((encoded(vae, world, some, size[some]) for some in parts), [])
    scores, short = {}, None
    if told:
        short = map(asked, world.short_captions(index, facts), size.tolist())
    for said, fact in zip(language.caption(latents, short and list(short)), facts, strict=True):
        want = read_caption(data.descriptive_caption(fact))
        kind = f"{'one' if len(want['digits']) == 1 else 'two'} in "
        kind += "a clip" if fact["frames"] > 1 else "an image"
        got = score(read_caption(said), want)
        for name, value in got.items():
            for row in (kind, "all"):
                scores.setdefault(row, {}).setdefault(name, []).append(value)
    rows = sorted(scores.items())
    return {k: {n: float(np.mean(v)) for n, v in row.items()} for k, row in rows}


def measure_expander(language: Language, world: data.World, prompts: int) -> dict:
    """Of the world's short and noisy prompts: how many expansions are descriptive captions, say
    what the prompt said, and are possible."""
    index = np.arange(prompts)
    size, figures = world.size(index), {}
    facts = world.all_facts(index, size)
    kinds = {"short": list(map(data.short_caption, facts))}
    kinds["noisy"] = world.short_captions(index, facts)
    for kind, said in kinds.items():
        rows = []
        for one in np.unique(size, axis=0).tolist():
            group = np.flatnonzero((size == one).all(1)).tolist()
            written = language.expand([said[k] for k in group], one, group)
            for k, long in zip(group, written, strict=True):
                caption = read_caption(long)
                kept = caption is not None and is_kept(read_prompt(said[k]), caption)
                possible = caption is not None and is_possible(caption, tuple(one), world.config)
                rows.append((caption is not None, kept, possible))
        shares = np.mean(rows, 0).tolist()
        figures[kind] = dict(zip(("descriptive", "kept", "possible"), shares, strict=True))
    return figures


def table(figures: dict) -> str:
    lines = []
    for title, rows in figures.items():
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines.append(f"{title:20}" + "".join(f"{name:>12}" for name in columns))
        for kind, row in rows.items():
            there = [row.get(name) for name in columns]
            cells = ("-" if share is None else f"{100 * share:.1f} %" for share in there)
            lines.append(f"{kind:20}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- demo


def main() -> None:
    size, config = (9, 32, 32), data.WorldConfig()
    for said in (
        "a 7 at middle centre moving left fast, 1 bounce. 9 frames.",
        "a 7 at middle right moving right fast, 1 bounce. 9 frames.",  # the wall is too near
        "a 7 at middle right moving left fast, 9 bounces. 9 frames.",  # it can't get that far
        "a 7 at top left moving left slowly, 1 bounce. an 8 at bottom left moving up fast, "
        "1 bounce. 9 frames.",
        "what a nice digit",
    ):
        caption = read_caption(said)
        print(f"{said}\n  read as {caption}")
        if caption:
            print(f"  in {size}: {'' if is_possible(caption, size, config) else 'im'}possible")


if __name__ == "__main__":
    main()
