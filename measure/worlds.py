"""Does a network know how its world works? Figures for simulated worlds, against the exact truth.

The problem. A clip that goes on plausibly may still break the rules: a brick comes back, a room has
another door when the camera returns. Who looks at clips misses that, or calls it a matter of taste.

The idea. Our worlds are programs. From the start of a held-out clip and its actions, the program
says what every frame must show. The model gets the same, and what it makes is read from pixels:

    real     the truth itself: the reader's own mistakes
    VAE      the truth after the VAE: the *floor* of any model in this latent space
    model    the start of a clip, and what the model makes of the rest
    frozen   the *baseline*: the last known frame, repeated
    beyond   the model, on clips of a kind that training never shows (as in PhyWorld: Kang et al.
             2024, "How far is video generation from world model")

    wall    What went behind a wall comes out again, in time, as itself.
    room    Turned away and back, once around: is it the same room? The gain over places at the same
            distance in time that were not seen before: a blurred guess is worth something, too.
    paint   Strokes stay where they are drawn, and what is clean stays clean.
    game    Paddle, ball and bricks frame by frame; one state under each of the actions; 1,000
            frames; and 200 in which nobody does anything.

Figures whose names end in a unit after a comma are in it; all others are shares.

Alphabet: clips uint8 [C, T, H, W]; n clips; k frames are known.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from PIL.Image import Image

import data
import prompting
from data import Clip, World
from measure.prompts import as_table, reconstruct, turned
from measure.reader import classify, load_classifier, to_ink, window
from worlds.game import BALL, CELL, FLOOR, PADDLE, PALETTE, PLAYER, cells_of
from worlds.wall import hidden_runs

LONG, ENDLESS, STILL = 256, 1000, 200  # frames of the game
HIDDEN = {4: range(3, 6), 8: range(7, 10), 16: range(13, 19)}  # frames that a digit is behind walls

Figures = dict[str, float]

# ----------------------------------------------------------------------------------- what is made


def go_on(run: prompting.Run, clips: list[Clip], how: dict) -> list[np.ndarray]:
    """The start of clips, and what the model makes of the rest."""
    tasks = []
    for x in clips:
        known = np.arange(x.pixels.shape[1]) < x.facts["known"]
        said = run.lasting(x.caption) if known.sum() > 1 else x.caption
        tasks.append(prompting.Task(x.pixels, known, said, actions=x.actions))
    return prompting.finished(run, tasks, range(len(tasks)), how)


def start_known(clips: list[Clip], k: int, **facts) -> list[Clip]:
    for clip in clips:
        clip.facts |= {"known": k, **facts}
    return clips


def frozen(clips: list[Clip]) -> list[np.ndarray]:
    shown = [np.minimum(np.arange(x.pixels.shape[1]), x.facts["known"] - 1) for x in clips]
    return [x.pixels[:, frames] for x, frames in zip(clips, shown, strict=True)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def states(world: World, clips: list[Clip], made: list[np.ndarray]) -> tuple[dict, dict]:
    """What is true, and what is read in the pixels: arrays [n, T, ...] by name."""
    read, facts = [world.read(clip) for clip in made], [clip.facts for clip in clips]
    return tuple({name: np.stack([one[name] for one in each]) for name in read[0]}
                 for each in (facts, read))  # fmt: skip


# ------------------------------------------------------------------------------------------- game


def games(world: World, n: int, frames: int = 64) -> list[Clip]:
    """Those first in which the ball is reflected most often."""
    clips = start_known(world.clips(np.arange(n), frames=8 + frames), 8)
    return sorted(clips, key=lambda x: -np.abs(np.diff(x.facts["sign"], axis=0)).sum())


def score_game(world: World, clips: list[Clip], made: list[np.ndarray]) -> Figures:
    (true, seen), k, T = states(world, clips, made), clips[0].facts["known"], made[0].shape[1]
    ball = (seen["ball"] == true["ball"]).all(2)  # [n, T]: in the right cell
    ball &= seen["lost"] == true["lost"]
    paddle = seen["paddle"] == true["paddle"]  # [n, T]
    bricks = seen["bricks"] == true["bricks"]  # [n, T, rows, columns]
    speed = np.diff(seen["ball"], axis=1) - np.diff(true["ball"], axis=1)  # [n, T - 1, 2]
    error = CELL * np.linalg.norm(speed[:, k - 1 : k + 15], axis=2)
    wrong = np.stack([~ball, ~paddle, ~bricks.all((2, 3))], axis=2)[:, k:]  # [n, new, 3]
    wrong = np.concatenate([wrong, np.ones_like(wrong[:, :1])], axis=1)
    first = wrong.argmax(1)  # [n, 3]: when each is wrong for the first time
    back = (np.diff(seen["bricks"].astype(int), axis=1) > 0) & ~true["bricks"][:, 1:]
    kept = np.diff(true["bricks"].sum((2, 3)), axis=1) <= 0  # until there is a new wall
    came = (back[:, k - 1 :].any((2, 3)) & kept[:, k - 1 :]).any(1)
    figures = {"paddle": paddle[:, k:].mean(), "ball's speed, px off": error.mean()}
    for later in (x for x in (16, 64, 256) if k + x <= T):
        figures[f"ball after {later}"] = ball[:, k + later - 1].mean()
        figures[f"bricks after {later}"] = bricks[:, k + later - 1].mean()
    figures |= {"some brick comes back": came.mean(),
                "first wrong, frames": np.median(first.min(1)),
                "first wrong is the ball": (first[:, 0] == first.min(1)).mean()}  # fmt: skip
    return {name: float(x) for name, x in figures.items()}


def endless(run: prompting.Run, world: World, frames: int, still: bool, how: dict) -> Figures:
    """Is it a game after so many frames? Of the first and last tenth: the share of sharp pixels,
    and of frames with one ball and one paddle."""
    acts, figures = np.ones(8 + frames, int) if still else None, {}
    clips = start_known(world.clips(np.arange(4), frames=8 + frames, actions=acts, after=8), 8)
    made = np.stack(go_on(run, clips, how))[:, :, 8:].swapaxes(0, 1)  # [C, n, T, H, W]
    for name, of in (("first", slice(frames // 10)), ("last", slice(-frames // 10, None))):
        x = made[:, :, of].reshape(3, -1, *made.shape[3:]).astype(float)  # [C, n T, H, W]
        away = np.stack([np.abs(x - c[:, None, None, None]).max(0) for c in PALETTE.astype(float)])
        cells = cells_of(x)  # [n T, rows, columns, C]
        balls = (np.abs(cells - PALETTE[BALL]).max(3) < 100).sum((1, 2)).reshape(len(clips), -1)
        one = balls == 1  # [n, T]
        one[:, 1:] |= (balls[:, 1:] == 0) & one[:, :-1]  # for a frame, a lost ball is not there
        paddle = (np.abs(cells[:, FLOOR] - PALETTE[PLAYER]).max(2) < 64).sum(1)
        figures |= {f"sharp in the {name} tenth": float((away.min(0) < 48).mean()),
                    f"one ball in the {name} tenth": float(one.mean()),
                    f"a paddle in the {name} tenth": float((paddle == PADDLE).mean())}  # fmt: skip
    return figures


def choices(run: prompting.Run, world: World, n: int, how: dict) -> Figures:
    """The same past, and each of the actions three times: are the frames those of this action, and
    by how much nearer to them than to those of the others, in dB?"""
    many, k, new = len(world.actions), 8, 3
    ways = [world.clips(np.arange(n), frames=k + new, actions=np.full(k + new, way + 1), after=k)
            for way in range(many)]  # fmt: skip
    made = [go_on(run, start_known(clips, k), how) for clips in ways]
    # Made under one action, compared with the truth of another.
    near = np.array([[[psnr(a[:, -1], b.pixels[:, -1]) for a, b in zip(*pair, strict=True)]
                      for pair in product([one], ways)] for one in made])  # [many, many, n]
    last = np.array([[x.pixels[:, -1] for x in clips] for clips in ways])  # [many, n, C, H, W]
    same = (last[:, None] == last).all((3, 4, 5))  # [many, many, n]
    differ = (same.sum(1) < many).T  # [n, many]: from what some other action does
    own = np.einsum("aan->na", near)
    others = np.where(same, -np.inf, near).max(1).T
    right, margin = (own >= others)[differ], (own - others)[differ]
    return {"right action": float(right.mean()), "margin, dB": float(margin.mean())}


def more_of_games(run: prompting.Run, world: World, n: int, how: dict) -> Iterator:
    long = games(world, max(4, n // 4), LONG)
    yield f"game, {LONG} frames", {"model": score_game(world, long, go_on(run, long, how))}
    ends = ((f"{ENDLESS} frames", ENDLESS, False), (f"{STILL}, still", STILL, True))
    yield "game, for ever", {name: endless(run, world, *way, how) for name, *way in ends}


# ------------------------------------------------------------------------------------------- room


def around(world: World, n: int, moves: list[tuple[str, int]]) -> list[Clip]:
    """Walks that are the same in n rooms: the first frame, and then so many of each action."""
    numbers = {name: number for number, name in enumerate(world.actions, 1)}
    acts = np.concatenate([[0], *([numbers[name]] * many for name, many in moves)])
    return world.clips(np.arange(n), frames=len(acts), actions=acts)


def walks(world: World, n: int) -> list[Clip]:
    """In each of n rooms: away and back, once around, as far away as that, and a free walk."""
    turn, back = "turn right", "turn left"
    kinds = (start_known(around(world, n, [(turn, 8), (back, 8)]), 9, new={"revisit": 8}),
             start_known(around(world, n, [(turn, 16), (turn, 15)]), 17, new={"around": 15}),
             start_known(around(world, n, [(turn, 8), (turn, 8)]), 9, new={"not seen": 8}),
             start_known(world.clips(np.arange(n), frames=16 + 48), 16,
                         new={"walk 16": 16, "walk 48": 48}))  # fmt: skip
    return [clip for room in zip(*kinds, strict=True) for clip in room]


def score_room(world: World, clips: list[Clip], made: list[np.ndarray]) -> Figures:
    """PSNR to the truth of the frames that were not known."""
    each = {}
    for x, clip in zip(clips, made, strict=True):
        k = x.facts["known"]
        for name, new in x.facts["new"].items():
            a, b = x.pixels[:, k : k + new], clip[:, k : k + new]
            each.setdefault(f"{name}, dB", []).append(psnr(a, b))
    return {name: float(np.mean(x)) for name, x in each.items()}


def more_of_rooms(run: prompting.Run, world: World, n: int, how: dict) -> Iterator:
    circle = start_known(around(world, n, [("turn right", 16)]), 0)
    made = go_on(run, circle, how)
    ends = {"last frame to the first, dB": float(np.mean([psnr(x[:, 0], x[:, 16]) for x in made]))}
    yield "room, once around without a past", {"model": ends}


# ------------------------------------------------------------------------------------------ paint


def paintings(world: World, n: int) -> list[Clip]:
    """Those first in which most is painted."""
    clips = start_known(world.clips(np.arange(n), frames=8 + 100), 8)
    return sorted(clips, key=lambda x: -(np.diff(x.facts["paper"], axis=0) != 0).sum())


def score_paint(world: World, clips: list[Clip], made: list[np.ndarray]) -> Figures:
    (true, seen), k, T = states(world, clips, made), clips[0].facts["known"], made[0].shape[1]
    brush = np.abs(seen["brush"] - true["brush"]).max(2) == 0  # [n, T]
    figures = {"brush": float(brush[:, k:].mean())}
    for later in (x for x in (32, 64, 100) if k + x <= T):
        t = k + later - 1
        a, b = seen["paper"][:, t], true["paper"][:, t]  # [n, rows, columns]
        resting = (true["paper"][:, max(0, t - 30) : t + 1] == b[:, None]).all(1)
        figures[f"strokes after {later}"] = overlap(a, b)
        figures[f"untouched for 30 after {later}"] = overlap(a, b, resting)
    clean = (true["paper"][:, : t + 1] == 0).all(1)
    bitten = (true["paper"][:, :t].max(1) > 0) & (b == 0)
    return figures | {"stays clean": float((a == 0)[clean].mean()),
                      "bites stay": float((a == 0)[bitten].mean())}  # fmt: skip


def overlap(a: np.ndarray, b: np.ndarray, where=True) -> float:
    """Intersection over union of what is painted, in the right colour."""
    return float(((a == b) & (b > 0) & where).sum() / max(1, (((a > 0) | (b > 0)) & where).sum()))


# ------------------------------------------------------------------------------------------- wall


def hidings(world: World, n: int) -> list[Clip]:
    """For each of the times in HIDDEN, n clips with one digit, if there are so many."""
    kinds = [hiding(world, n, name, hidden) for name, hidden in reversed(HIDDEN.items())]
    return [kind[k] for k in range(n) for kind in kinds if k < len(kind)]


def hiding(world: World, n: int, name: int, hidden: range, T: int = 33, k: int = 9) -> list[Clip]:
    """Clips of T frames in which the digit is whole in at least three of the first k, and from no
    earlier than k on is hidden for so long, then comes out and is whole again. facts: "hides",
    "shows" and "whole", the frames in which it is for the first time. Without a caption: that would
    say which digit it is."""
    clips, first = [], 0
    while len(clips) < n and first < 400 * n:
        for i, clip in enumerate(world.told(np.arange(first, first + 500), frames=100), first):
            cover = clip.facts["digits"][0]["covered"]
            clear = np.flatnonzero(cover == 0)
            for a, b in hidden_runs(cover == 1):
                if b - a not in hidden or not (clear < a).any() or not (clear >= b).any():
                    continue
                last, whole = int(clear[clear < a][-1]), int(clear[clear >= b][0])
                later = max(0, min(last - 2, whole - T + 1), last - k + 1)
                in_view = later <= last - 2 and not cover[later : last + 1].any()
                if not in_view or a - later < k or whole - later >= T:
                    continue
                (one,) = world.clips([i], later=later, frames=T)
                one.facts |= {"hides": a - later, "shows": b - later, "whole": whole - later}
                one.facts["hidden"], one.caption = name, ""
                clips.append(one)
                break
        first += 500
    return start_known(clips[:n], k)


def score_wall(world: World, clips: list[Clip], made: list[np.ndarray]) -> Figures:
    """By how long it was hidden: is it the same digit when it should be out again, how many frames
    early or late does it come out, how far is it from its place, and does it come at all?"""
    network, figures = load_classifier(world.config.digit), {}
    for name in HIDDEN:
        pairs = [(x, y) for x, y in zip(clips, made, strict=True) if x.facts["hidden"] == name]
        if pairs:
            came = [come_out(world, x, y, network) for x, y in pairs]
            out = np.array([x for x in came if x] or [(0, np.nan, np.nan)])  # [n, 3]
            figures |= {f"same digit after {name} hidden": float(out[:, 0].sum() / len(came)),
                        f"time after {name} hidden, frames off": float(np.median(out[:, 1])),
                        f"place after {name} hidden, px off": float(np.median(out[:, 2])),
                        f"never out after {name} hidden": came.count(None) / len(came)}  # fmt: skip
    return figures


def come_out(world: World, clip: Clip, made: np.ndarray, network) -> tuple | None:
    """(the right digit or not, frames off, pixels off); None if it does not come out in time."""
    facts, box, (seen, true) = clip.facts, world.config.digit, map(world.read, (made, clip.pixels))
    exits, t = [], facts["whole"]
    for x in (seen["box"], true["box"]):
        there = ~np.isnan(x[facts["hides"] :, 0])
        gone = np.flatnonzero(~there)[:1].sum()  # 0 if it never is
        exits.append(int(gone + np.flatnonzero(there[gone:])[0]) if there[gone:].any() else None)
    if exits[0] is None or np.isnan(seen["box"][t, 0]):
        return None
    ink = np.where(true["wall"], 0, to_ink(made[:, [t]])[0])
    digit = classify(network, [window(ink, seen["box"][t], box)]).argmax()
    off = float(np.linalg.norm(seen["box"][t] - true["box"][t]))
    return digit == facts["digits"][0]["digit"], abs(exits[0] - exits[1]), off


# ------------------------------------------------------------------------------------ all of them

# Which clips, the hardest first; their figures; more tables; what training never shows.
WORLDS = {
    "wall": (hidings, score_wall, None, "thicker walls, or three"),
    "room": (walks, score_room, more_of_rooms, "more pillars"),
    "paint": (paintings, score_paint, None, "fuller papers"),
    "game": (games, score_game, more_of_games, "other layouts"),
}


def open_worlds(run: prompting.Run) -> tuple[World, World]:
    """Within what a run learned from, and beyond it: clips that it never saw."""
    if (kind := run.world["config"]["kind"]) not in WORLDS:
        raise ValueError(f"this run learned from {kind}: worlds are for {', '.join(WORLDS)}")
    more = {"two_digits": 0.0} if kind == "wall" else {}
    return data.unseen(run.world, **more), data.unseen(run.world, beyond=True, **more)


def within(run: prompting.Run, n: int, how: dict) -> tuple[Figures, list]:
    """The model's figures, and pairs of clips: (the truth, the model's)."""
    choose, score, *_ = WORLDS[run.world["config"]["kind"]]
    clips = choose(world := open_worlds(run)[0], n)
    made = go_on(run, clips, how)
    return score(world, clips, made), list(zip(clips, made, strict=True))


def tables(run: prompting.Run, n: int, how: dict, pairs: list) -> Iterator[tuple[str, dict]]:
    """(title, {column: figures}); into `pairs` some of the clips: (the truth, the model's)."""
    world, beyond = open_worlds(run)
    choose, score, more, other = WORLDS[kind := run.world["config"]["kind"]]
    model, each = within(run, n, how)
    pairs += each[:4]
    clips, odd = [clip for clip, _ in each], choose(beyond, n)
    real = [clip.pixels for clip in clips]
    sets = {"real": score(world, clips, real),
            "VAE": score(world, clips, reconstruct(run.vae, real)[0]), "model": model,
            "frozen": score(world, clips, frozen(clips))}  # fmt: skip
    sets["beyond"] = score(beyond, odd, go_on(run, odd, how))
    yield f"{kind} (beyond: {other})", sets
    yield from more(run, world, n, how) if more else ()
    if world.actions:
        yield "one state under each action", {"model": choices(run, world, n, how)}


def picture(pairs: list[tuple[Clip, np.ndarray]]) -> Image:
    strips, titles = [], []
    for clip, made in pairs:
        strips += [clip.pixels, made]
        titles += [f"what really happens: {clip.caption}", "model"]
    return data.sheet(strips, titles, scale=3, most=16)


def main(args: argparse.Namespace) -> tuple[Path, dict, Image]:
    folder, pairs, figures = Path(args.run or prompting.newest_run()), [], {}
    how = {"guidance": 1.0} | ({"steps": args.steps} if args.steps else {})
    for title, sets in tables(prompting.load_run(folder), args.clips, how, pairs):
        print(as_table(title, turned(sets)) + "\n", flush=True)
        figures[title] = sets
    return folder, figures, picture(pairs)
