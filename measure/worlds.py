"""Does a network know how its world works? Figures for simulated worlds, against the exact truth.

The problem. A clip that goes on plausibly may still break the rules: a brick comes back, a room has
another door when the camera returns. Who looks at clips misses that, or calls it a matter of taste.

The idea. Our worlds are programs. From the start of a held-out clip and its actions, the program
says what every frame must show. The model gets the same, and what it makes is read from pixels,
between a *floor*, the same reader on what the VAE makes of real clips, and a *baseline*, the last
known frame, frozen. The last row is of clips of a kind that training never shows (as in PhyWorld:
Kang et al. 2024, "How far is video generation from world model").

    wall    What went behind a wall comes out again, in time, as itself.
    room    Turned away and back, once around: is it the same room? The gain over places at the same
            distance in time that were not seen before: a blurred guess is worth something, too.
    paint   Strokes stay where they are drawn, and what is clean stays clean.
    game    Paddle, ball and bricks frame by frame; one state under each of the actions; 1,000
            frames; and 200 in which nobody does anything.

Alphabet: clips uint8 [C, T, H, W]; n clips; k frames are known.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL.Image import Image

import data
import prompting
from data import Clip, World
from measure.prompts import as_table
from measure.reader import classify, load_classifier, to_ink, window
from vae import to_float, to_uint8
from worlds.wall import hidden_runs

LONG, ENDLESS, STILL = 256, 1000, 200  # frames of the game

Figures = dict[str, dict]

# ----------------------------------------------------------------------------------- what is made


def go_on(run: prompting.Run, clips: list[Clip], k: int, how: dict) -> list[np.ndarray]:
    """The first k frames of clips, and what the model makes of the rest."""
    lasting, tasks = run.lasting if k > 1 else str, []
    for x in clips:
        known = np.arange(x.pixels.shape[1]) < k
        tasks.append(prompting.Task(x.pixels, known, lasting(x.caption), actions=x.actions))
    return prompting.finished(run, tasks, range(len(tasks)), how)


def decoded(run: prompting.Run, clips: list[Clip]) -> list[np.ndarray]:
    """What the VAE makes of them."""
    unit, made = run.ft, []
    for clip in clips:
        T = clip.pixels.shape[1]
        whole = np.pad(clip.pixels, ((0, 0), (0, -(T - 1) % unit), (0, 0), (0, 0)), "edge")
        video = run.vae.decode(run.vae.encode(to_float([whole]).to(run.device)))
        made.append(to_uint8(video)[0][:, :T])
    return made


def frozen(clips: list[Clip], k: int) -> list[np.ndarray]:
    shown = [np.minimum(np.arange(x.pixels.shape[1]), k - 1) for x in clips]
    return [x.pixels[:, frames] for x, frames in zip(clips, shown, strict=True)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def facts_of(clips: list[Clip], name: str) -> np.ndarray:
    return np.stack([clip.facts[name] for clip in clips])  # [n, T, ...]


def read(world: World, made: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays [n, T, ...]."""
    each = [world.read(clip) for clip in made]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


# ------------------------------------------------------------------------------------------- game


def score_game(world: World, clips: list[Clip], made: list[np.ndarray], k: int) -> dict:
    seen, T = read(world, made), made[0].shape[1]
    true = {name: facts_of(clips, name) for name in seen}
    off = 2 * np.abs(seen["ball"] - true["ball"]).max(2)  # [n, T], in pixels of 2 a cell
    paddle = seen["paddle"] == true["paddle"]
    bricks = seen["bricks"] == true["bricks"]
    speed = np.diff(seen["ball"], axis=1) - np.diff(true["ball"], axis=1)  # [n, T - 1, 2]
    error = 2 * np.linalg.norm(speed[:, k - 1 : k + 15], axis=2)
    wrong = np.stack([off > 2, ~paddle, ~bricks.all((2, 3))], axis=2)[:, k:]  # [n, new, 3]
    wrong = np.concatenate([wrong, np.ones_like(wrong[:, :1])], axis=1)
    first = wrong.argmax(1)  # [n, 3]: when each is wrong for the first time
    back = (np.diff(seen["bricks"].astype(int), axis=1) > 0) & ~true["bricks"][:, 1:]
    kept = np.diff(true["bricks"].sum((2, 3)), axis=1) <= 0  # until there is a new wall
    shares = {"paddle": float(paddle[:, k:].mean())}
    for later in (16, 64, 256):
        if k + later <= T:
            shares |= {f"ball {later}": float((off[:, k + later - 1] <= 2).mean()),
                       f"bricks {later}": float(bricks[:, k + later - 1].mean())}  # fmt: skip
    came = (back[:, k - 1 :].any((2, 3)) & kept[:, k - 1 :]).any(1)
    return shares | {
        "brick back": float(came.mean()),
        "speed error": f"{error.mean():.3f} px",
        "diverges": f"frame {int(np.median(first.min(1)))}",
        "by the ball": float((first[:, 0] == first.min(1)).mean()),
    }


def endless(run: prompting.Run, world: World, frames: int, still: bool, how: dict) -> dict:
    """Is it a game after so many frames? Of each tenth: sharp pixels, a ball, a paddle."""
    acts = np.ones(frames, int) if still else None
    clips = world.clips(np.arange(4), frames=frames, actions=acts)
    made, shares = go_on(run, clips, 8, how), {}
    for part in (0, 9):
        of = slice(frames * part // 10, frames * (part + 1) // 10)
        near = white = bars = 0.0
        for clip, real in zip(made, clips, strict=True):
            x = clip[:, of].astype(float)  # [3, T, H, W]
            colors = np.unique(real.pixels.reshape(3, -1), axis=1).T.astype(float)
            away = np.stack([np.abs(x - c[:, None, None, None]).max(0) for c in colors]).min(0)
            near += (away < 48).mean() / len(made)
            white += np.isin((x.min(0) > 150).sum((1, 2)), (3, 4, 5)).mean() / len(made)
            bar = np.abs(x - np.array([50, 190, 200.0])[:, None, None, None]).max(0) < 64
            bars += np.isin(bar[:, 28:30].sum((1, 2)), range(14, 19)).mean() / len(made)
        name = ("first", "last")[part > 0]
        shares |= {f"sharp, {name}": near, f"one ball, {name}": white, f"one paddle, {name}": bars}
    return shares


def choices(run: prompting.Run, world: World, clips: list[Clip], k: int, how: dict) -> dict:
    """The same past, and each of the actions three times: are the frames those of this action, and
    by how much nearer to them than to those of the others, in dB?"""
    many, n, new = len(world.actions), len(clips), 3
    ways = [world.clips(np.arange(n), frames=k + new, actions=np.full(k + new, way + 1), after=k)
            for way in range(many)]  # fmt: skip
    near = np.zeros((n, many, many))  # made under one action, compared with the truth of another
    for way in range(many):
        made = go_on(run, ways[way], k, how)
        for other in range(many):
            near[:, way, other] = [psnr(a[:, -1], b.pixels[:, -1])
                                   for a, b in zip(made, ways[other], strict=True)]  # fmt: skip
    differ = np.array([[any((ways[a][j].pixels[:, -1] != ways[b][j].pixels[:, -1]).any()
                            for b in range(many) if b != a) for a in range(many)]
                       for j in range(n)])  # fmt: skip
    own = np.einsum("naa->na", near)
    others = np.where(np.eye(many, dtype=bool), -np.inf, near).max(2)
    return {"right action": float((own >= others)[differ].mean()),
            "margin": f"{(own - others)[differ].mean():.1f} dB"}  # fmt: skip


def game(run: prompting.Run, n: int, how: dict) -> tuple[dict[str, Figures], list]:
    world, beyond, k = data.unseen(run.world), data.unseen(run.world, beyond=True), 8
    clips, other = (w.clips(np.arange(n), frames=k + 64) for w in (world, beyond))
    made = go_on(run, clips, k, how)
    long = world.clips(np.arange(max(4, n // 4)), frames=k + LONG)
    rows = {
        "real": score_game(world, clips, [x.pixels for x in clips], k),
        "VAE": score_game(world, clips, decoded(run, clips), k),
        "model": score_game(world, clips, made, k),
        "frozen": score_game(world, clips, frozen(clips, k), k),
        f"model, {LONG} frames": score_game(world, long, go_on(run, long, k, how), k),
        "model, other layouts, faster": score_game(beyond, other, go_on(run, other, k, how), k),
    }
    ends = {
        f"{ENDLESS} frames": endless(run, world, ENDLESS, False, how),
        f"{STILL} of standing still": endless(run, world, STILL, True, how),
    }
    acts = {"model": choices(run, world, clips, k, how)}
    hard = [int(np.abs(np.diff(x.facts["sign"], axis=0)).sum()) for x in clips]
    hard = np.argsort(hard)[::-1][:4]  # where the ball is reflected most often
    tables = {
        "game, 64 frames": rows,
        "game, for ever": ends,
        "game, one state under each action": acts,
    }
    return tables, [(clips[j], made[j]) for j in hard]


# ------------------------------------------------------------------------------------------- room


def around(world: World, n: int, moves: list[tuple[str, int]]) -> list[Clip]:
    """Walks that are the same in n rooms: the first frame, and then so many of each action."""
    numbers = {name: number for number, name in enumerate(world.actions, 1)}
    acts = np.concatenate([[0], *([numbers[name]] * many for name, many in moves)])
    return world.clips(np.arange(n), frames=len(acts), actions=acts)


def score_walk(clips: list[Clip], made: list[np.ndarray], frames: slice) -> str:
    """PSNR to the truth in some frames, in dB: the mean over clips."""
    each = [psnr(x.pixels[:, frames], y[:, frames]) for x, y in zip(clips, made, strict=True)]
    return f"{np.mean(each):.1f} dB"


def room(run: prompting.Run, n: int, how: dict) -> tuple[dict[str, Figures], list]:
    world, beyond, rows, pairs = data.unseen(run.world), data.unseen(run.world, beyond=True), {}, []
    half, turn = 8, "turn right"
    for name, place in (("", world), (", more pillars", beyond)):
        walks = place.clips(np.arange(n), frames=16 + 48)
        back = around(place, n, [(turn, half), ("turn left", half)])
        new = around(place, n, [(turn, half), (turn, half)])
        again = around(place, n, [(turn, 16), (turn, 15)])
        ways = {"model": lambda x, k: go_on(run, x, k, how)}
        ways |= {"VAE": lambda x, k: decoded(run, x), "frozen": frozen} if not name else {}
        for way, make in ways.items():
            made = {"walk": make(walks, 16), "back": make(back, 1 + half)}
            made |= {"new": make(new, 1 + half), "again": make(again, 17)}
            rows[way + name] = {
                "walk 16": score_walk(walks, made["walk"], slice(16, 32)),
                "walk 48": score_walk(walks, made["walk"], slice(16, 64)),
                "revisit": score_walk(back, made["back"], slice(1 + half, None)),
                "not seen": score_walk(new, made["new"], slice(1 + half, None)),
                "around": score_walk(again, made["again"], slice(17, None)),
            }
            pairs = pairs or [*zip(back, made["back"], strict=True)][:2]
            pairs += [*zip(again, made["again"], strict=True)][: 4 - len(pairs)]
    circle = around(world, n, [(turn, 16)])
    made = go_on(run, circle, 0, how)
    ends = [psnr(x[:, 0], x[:, 16]) for x in made]
    rows["model"]["closes"] = f"{np.mean(ends):.1f} dB"
    return {"room: PSNR to the truth": rows}, pairs


# ------------------------------------------------------------------------------------------ paint


def score_paint(world: World, clips: list[Clip], made: list[np.ndarray], k: int) -> dict:
    seen, T = read(world, made), made[0].shape[1]
    true = {name: facts_of(clips, name) for name in seen}
    brush = np.abs(seen["brush"] - true["brush"]).max(2) == 0  # [n, T]
    shares = {"brush": float(brush[:, k:].mean())}
    for t in (x for x in (k + 31, k + 63, k + 99) if x < T):
        a, b = seen["paper"][:, t], true["paper"][:, t]  # [n, rows, columns]
        resting = (true["paper"][:, max(0, t - 30) : t + 1] == b[:, None]).all(1)
        clean = (true["paper"][:, : t + 1] == 0).all(1)
        bitten = (true["paper"][:, :t].max(1) > 0) & (b == 0)
        after = t + 1 - k
        shares |= {f"strokes {after}": overlap(a, b), f"resting {after}": overlap(a, b, resting)}
    return shares | {"stays clean": float((a == 0)[clean].mean()),
                     "bites stay": float((a == 0)[bitten].mean())}  # fmt: skip


def overlap(a: np.ndarray, b: np.ndarray, where=True) -> float:
    """Intersection over union of what is painted, in the right colour."""
    return float(((a == b) & (b > 0) & where).sum() / max(1, (((a > 0) | (b > 0)) & where).sum()))


def paint(run: prompting.Run, n: int, how: dict) -> tuple[dict[str, Figures], list]:
    world, beyond, k = data.unseen(run.world), data.unseen(run.world, beyond=True), 8
    clips, other = (w.clips(np.arange(n), frames=k + 100) for w in (world, beyond))
    made = go_on(run, clips, k, how)
    rows = {
        "real": score_paint(world, clips, [x.pixels for x in clips], k),
        "VAE": score_paint(world, clips, decoded(run, clips), k),
        "model": score_paint(world, clips, made, k),
        "frozen": score_paint(world, clips, frozen(clips, k), k),
        "model, fuller papers": score_paint(beyond, other, go_on(run, other, k, how), k),
    }
    acts = {"model": choices(run, world, clips, k, how)}
    changes = [(np.diff(x.facts["paper"], axis=0) != 0).sum() for x in clips]
    hard = np.argsort(changes)[::-1][:4]
    return {"paint": rows, "paint, one state under each action": acts}, [
        (clips[j], made[j]) for j in hard
    ]


# ------------------------------------------------------------------------------------------- wall


def hidings(world: World, n: int, hidden: range, T: int = 33, k: int = 9) -> list[Clip]:
    """n clips of T frames with one digit, which is whole in at least three of the first k, and from
    no earlier than k on is hidden for so long, then comes out and is whole again. facts: "hides",
    "shows" and "whole", the frames in which it is for the first time."""
    clips, first = [], 0
    while len(clips) < n and first < 400 * n:
        for i, clip in enumerate(world.told(np.arange(first, first + 500), frames=100), first):
            cover = clip.facts["digits"][0]["covered"]
            for a, b in hidden_runs(cover == 1):
                clear = np.flatnonzero(cover[:a] == 0)
                after = np.flatnonzero(cover[b:] == 0)
                if b - a not in hidden or not len(clear) or not len(after):
                    continue
                last, whole = int(clear[-1]), b + int(after[0])
                later = max(0, min(last - 2, whole - T + 1), last - k + 1)
                if later > last - 2 or (cover[later : last + 1] > 0).any():
                    continue
                if a - later < k or whole - later >= T or (cover[a:b] < 1).any():
                    continue
                (one,) = world.clips([i], later=later, frames=T)
                one.facts |= {"hides": a - later, "shows": b - later, "whole": whole - later}
                clips.append(one)
                break
        first += 500
    return clips[:n]


def score_wall(world: World, clips: list[Clip], made: list[np.ndarray]) -> dict:
    box, network = world.config.digit, load_classifier(world.config.digit)
    right, off, late, never = [], [], [], 0
    for clip, one in zip(clips, made, strict=True):
        seen, true = world.read(one), world.read(clip.pixels)
        wall, facts = true["wall"], clip.facts
        exits = []
        for x in (seen["box"], true["box"]):
            there = ~np.isnan(x[facts["hides"] :, 0])
            gone = np.flatnonzero(~there)
            again = np.flatnonzero(there[gone[0] :]) + gone[0] if len(gone) else [0]
            exits.append(facts["hides"] + again[0] if len(again) else None)
        t = facts["whole"]
        if exits[0] is None or np.isnan(seen["box"][t, 0]):
            never += 1
            right.append(False)
            continue
        late.append(abs(exits[0] - exits[1]))
        off.append(np.linalg.norm(seen["box"][t] - true["box"][t]))
        ink = np.where(wall, 0, to_ink(one[:, [t]])[0])
        read = classify(network, [window(ink, seen["box"][t], box)]).argmax()
        right.append(read == facts["digits"][0]["digit"])
    return {
        "clips": f"{len(clips)}",
        "same digit": float(np.mean(right)),
        "frames off": f"{np.median(late):.0f} ({np.mean(late):.1f})" if late else None,
        "within 1": float(np.mean(np.array(late) <= 1)) if late else None,
        "pixels off": f"{np.median(off):.1f}" if off else None,
        "never out": never / len(clips),
    }


def wall(run: prompting.Run, n: int, how: dict) -> tuple[dict[str, Figures], list]:
    """Without a prompt: a caption would say which digit it is."""
    world, beyond = (data.unseen(run.world, two_digits=0.0, beyond=x) for x in (False, True))
    tables, pairs, how, k = {}, [], {"guidance": 1.0} | how, 9
    for length in (range(3, 6), range(7, 10), range(13, 19)):
        rows = {}
        clips, other = (
            [replace(x, caption="") for x in hidings(w, n, length)] for w in (world, beyond)
        )
        made = go_on(run, clips, k, how)
        rows["real"] = score_wall(world, clips, [x.pixels for x in clips])
        rows["VAE"] = score_wall(world, clips, decoded(run, clips))
        rows["model"] = score_wall(world, clips, made)
        rows["frozen"] = score_wall(world, clips, frozen(clips, k))
        if other:
            ways = go_on(run, other, k, how)
            rows["model, thicker walls, or three"] = score_wall(beyond, other, ways)
        tables[f"wall: hidden for {length[0]} to {length[-1]} frames"] = rows
        pairs += list(zip(clips, made, strict=True))[: 1 + (length[0] > 3)]
    return tables, pairs[:4]


# ------------------------------------------------------------------------------------ all of them

WORLDS = {"wall": wall, "room": room, "paint": paint, "game": game}


def picture(pairs: list[tuple[Clip, np.ndarray]]) -> Image:
    strips, titles = [], []
    for clip, made in pairs:
        strips += [clip.pixels, made]
        titles += [f"what really happens: {clip.caption}", "model"]
    return data.sheet(strips, titles, scale=3, most=16)


def main(args: argparse.Namespace) -> tuple[Path, dict, Image]:
    folder = Path(args.run or prompting.newest_run())
    run = prompting.load_run(folder)
    kind = run.world["config"]["kind"]
    if kind not in WORLDS:
        raise ValueError(f"{folder} learned from {kind}: worlds are for {', '.join(WORLDS)}")
    how = {"steps": args.steps} if args.steps else {}
    tables, pairs = WORLDS[kind](run, args.clips, how)
    for title, rows in tables.items():
        print(as_table(title, rows) + "\n")
    return folder, tables, picture(pairs)
