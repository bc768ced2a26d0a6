"""Framing: what it costs to train on square crops.

The problem. Most data sets are cut to squares. The report shows that a model trained on those cuts
its subject off, and one trained on whole frames does not ("Improved framing and composition").

The idea. Two equal trainings, the second on the middle of each frame (--crop square). Both make the
same prompts at the sizes that clips really have, from the same noise. Real digits turn back at the
edges and are always in view, so what is smaller at an edge than elsewhere was cut off.

    in view      the share of clips in which no digit is cut off in any frame
    cut off      how many pixels of the digit are beyond an edge at most: the mean over clips
    start off    how far the places where digits start, along the longer side, are from where real
                 ones do: the mean distance of the sorted places, in pixels
    digit, direction   as in prompts.py

    python train.py --preset tiny
    python train.py --preset tiny --crop square --out out/square
    python evaluate.py framing --run out/tiny --against out/square
"""

import argparse
from pathlib import Path

import numpy as np
from PIL.Image import Image

import data
import prompting
from measure import prompts, reader

FAINT, BLUR = 0.3, 2  # less ink is the VAE's haze; pixels by which blur changes a digit's size


def cut_off(clip: np.ndarray, digit: int) -> int:
    """How many pixels of its digit are beyond an edge, at most. Where its ink touches one, so many
    as it is smaller by than where most of it is in view; and its longer side fills its box."""
    bright = reader.to_ink(clip) > FAINT  # [T, H, W]
    spans = np.stack([bright.any(2).sum(1), bright.any(1).sum(1)], axis=1)  # [T, 2]: rows, columns
    touch = np.stack([bright[:, [0, -1]].any((1, 2)), bright[:, :, [0, -1]].any((1, 2))], axis=1)
    whole = np.maximum(spans.max(0), np.where(spans.max() == spans.max(0), digit, 0))
    lost = np.where(touch, whole - spans, 0).max()
    return int(lost) if lost > BLUR else 0


def starts(clips: list[np.ndarray]) -> np.ndarray:
    """Where digits are in the first frame, along the longer side of the canvas."""
    each = [(reader.centre_of(reader.to_ink(x[:, :1])[0]), x.shape[2:]) for x in clips]
    return np.array([place[int(W > H)] for place, (H, W) in each])


def score(clips: list[np.ndarray], real: list[np.ndarray], asked: list[dict], digit: int) -> dict:
    network, sizes = reader.load_classifier(digit), [x.shape for x in clips]
    seen = [reader.read(clip, 1, network, digit) for clip in clips]
    right = prompts.average([prompts.score(*x) for x in zip(seen, asked, strict=True)])
    cut, off = np.array([cut_off(clip, digit) for clip in clips]), []
    for size in dict.fromkeys(sizes):
        some = [k for k, x in enumerate(sizes) if x == size]
        places = [np.sort(starts([x[k] for k in some])) for x in (clips, real)]
        off.append(np.abs(places[0] - places[1]).mean())
    return {"in view": float((cut == 0).mean()), "cut off, px": float(cut.mean()),
            "start off, px": float(np.mean(off)),
            "digit": right["digit"], "direction": right["direction"]}  # fmt: skip


def main(args: argparse.Namespace) -> tuple[Path, dict, Image]:
    folder = Path(args.run or prompting.newest_run())
    both = prompts.equal_runs(folder, args.against, "crop", ("none", "square"), ("compile",))
    runs = dict(zip(("whole frames", "square crops"), both, strict=True))
    about, digit = both[0].world, both[0].config["digit"]
    chosen = prompts.real_clips(about, args.clips, 0)
    chosen = [x for x in chosen if len(set(x.clips[0].shape[2:])) == 2]  # no squares
    if not chosen:
        raise ValueError(f"{folder} learned from squares only: nothing can be cut off")
    pairs = [pair for x in chosen for pair in x.pairs]
    asked = [fact["digits"] for x in chosen for fact in x.facts]
    real = [clip for clip, _ in pairs]
    sets = {"real": real, "VAE": prompts.reconstruct(both[0].vae, real)[0]}
    for name, run in runs.items():
        tasks = [prompting.new(run, clip.shape[1:], said) for clip, said in pairs]
        sets[name] = prompting.finished(run, tasks, range(len(tasks)), expanded=True)
    figures = {name: score(clips, real, asked, digit) for name, clips in sets.items()}
    print(prompts.as_table(f"{len(real)} clips", prompts.turned(figures)))
    shown = np.linspace(0, len(real) - 1, 8).round().astype(int)
    columns = [(sets[name][k], f"{name}: {pairs[k][1]}") for k in shown for name in list(sets)[2:]]
    clips, titles = zip(*columns, strict=True)
    return folder, figures, data.sheet(clips, titles, columns=2, scale=2, most=5)
