"""Scaling: the same prompts, as the training compute grows (the report's base, 4x and more).

The problem. "It gets better with more compute" is easily said. How much better, and at what?

The idea. Train one network three times, for 1, 4 and 16 times as many steps, each with its own
learning rate schedule down to zero (a run that was stopped early would be worse than one that was
planned to be short: Hoffmann et al. 2022). All see the same VAE and the same kind of data. Then

    compute      FLOPs of a step (cost.py) x steps
    loss         of held-back batches with fixed noise, the same for all three
    fidelity     whether clips show the digit and the direction of their prompts (reader.py)
    a picture    the same prompts from the same noise, a column for each compute

    python evaluate.py scaling                   # flags of train.py go behind `--`
    python evaluate.py scaling --run out/tiny    # a finished run is the longest of the three

The second trains the two short ones alone, with the VAE, the seed and the flags of that run: 5/16
of its time. Stopped, both continue.
"""

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import batches
import cost
import evaluate
import sample
import train
from weights import find

TIMES = (1, 4, 16)
PROMPTS = ("a 7 moving left", "a 3 moving right", "a 0 moving down", "a 4 moving up", "a 9 moving "
           "left", "a 2 moving right")  # fmt: skip


@torch.no_grad()
def held_back_loss(run: sample.Run, c: train.Config, count: int = 8) -> tuple[float, float]:
    """The EMA model's loss on batches it has not seen, and the FLOPs of a training step on them."""
    source = batches.Source(run.vae, run.tokenizer, train.make_world(c))
    made = batches.dit_parts(source, c, batches.HELD_BACK, count)
    total, flops = 0.0, 0.0
    for step, parts in enumerate(made, batches.HELD_BACK):
        for part in parts:
            total += train.dit_loss(run.dit, part, c, step)[0].item() / count
            counts = part.packed.lengths, part.packed.words, len(part.packed.frame_clip)
            flops += sum(cost.step_flops(run.dit, *counts)) / count
    return total, flops


def columns(runs: dict[str, sample.Run]) -> Image.Image:
    """A row for each prompt, a column for each compute: first, middle and last frames."""
    world = next(iter(runs.values())).world
    size = (max(world["durations"]), *world["shapes"][0])
    frames = [0, size[0] // 2, size[0] - 1]
    cell = (3 * (3 * size[2]) + 20, 3 * size[1] + 24)
    sheet = Image.new("RGB", (len(runs) * cell[0] + 8, len(PROMPTS) * cell[1] + 24), (24, 24, 32))
    pen = ImageDraw.Draw(sheet)
    for column, (name, run) in enumerate(runs.items()):
        pen.text((8 + column * cell[0], 6), name, fill=(255, 190, 80))
        seeds = list(range(len(PROMPTS)))
        told = sample.expand(run, list(PROMPTS), size, seeds)
        clips = sample.generate(run, told, size, seeds)
        for row, (prompt, clip) in enumerate(zip(PROMPTS, clips, strict=True)):
            left, top = 8 + column * cell[0], 24 + row * cell[1]
            pen.text((left, top), prompt, fill=(220, 220, 220))
            sheet.paste(sample.filmstrip(clip[:, frames], 3), (left, top + 14))
    return sheet


def plot(figures: list[dict], width: int = 420, height: int = 300) -> Image.Image:
    """Loss, and prompt fidelity, against FLOPs on a logarithmic scale."""
    panels = {
        "loss on held-back clips": {"loss": (255, 190, 80)},
        "share of clips that show what the prompt says": {
            "digit": (120, 200, 120),
            "direction": (110, 170, 255),
        },
    }
    sheet = Image.new("RGB", (len(panels) * (width + 80) + 20, height + 100), (24, 24, 32))
    pen = ImageDraw.Draw(sheet)
    x = [math.log10(f["flops"]) for f in figures]

    def height_of(up: float, top: int) -> float:  # up: 0 to 1, a little inside the frame
        return top + 20 + (1 - up) * (height - 40)

    for k, (title, curves) in enumerate(panels.items()):
        left, top = 60 + k * (width + 80), 40
        values = [f[name] for name in curves for f in figures]
        low, high = (min(values), max(values)) if k == 0 else (0.0, 1.0)
        high = max(high, low + 1e-6)
        pen.text((left, 12), title, fill=(255, 255, 255))
        pen.rectangle((left, top, left + width, top + height), outline=(90, 90, 100))
        for share in (0.0, 0.5, 1.0):
            said = f"{low + share * (high - low):.2f}"
            pen.text((left - 40, height_of(share, top) - 6), said, fill=(160, 160, 160))
        for n, (name, color) in enumerate(curves.items()):
            pen.text((left + 8 + 80 * n, top + 4), name, fill=color)
            points = []
            for f, at in zip(figures, x, strict=True):
                across = (at - x[0]) / max(x[-1] - x[0], 1e-9)
                up = (f[name] - low) / (high - low)
                points.append((left + 20 + across * (width - 40), height_of(up, top)))
                pen.text(
                    (points[-1][0] - 20, top + height + 6), f"{f['flops']:.1e}", fill=(160,) * 3
                )
            pen.line(points, fill=color, width=2)
            for a, b in points:
                pen.ellipse((a - 4, b - 4, a + 4, b + 4), fill=color)
        pen.text((left, top + height + 24), "FLOPs of the training", fill=(160, 160, 160))
    return sheet


def finished(folder: Path) -> train.Config:
    """What a run's transformer was trained with. ValueError if that has not ended."""
    saved = sample.load_checkpoint(find(folder, "dit"), "cpu")
    c = train.Config(**saved["config"])
    if saved["step"] < c.steps:
        raise ValueError(f"{folder} has done {saved['step']} of {c.steps} steps: finish it first")
    return c


def scaling(args: argparse.Namespace) -> None:
    out, given = Path(args.out), Path(args.run) if args.run else None
    if given and (args.steps or args.train):
        raise ValueError("--run is trained already: leave --steps and flags of train.py out")
    if given:
        c = finished(given)
    else:
        c = train.parse([*args.train, "--steps", str(args.steps or 2000)])
    shared = ("vae", "text") if c.captions == "recaptioned" else ("vae",)
    for stage in () if given else shared:
        train.main(replace(c, stage=stage, out=str(out / "vae")))
    source = given or out / "vae"
    files = [find(source, name) for name in shared]
    if "text" in shared:  # what it wrote of the clips that the transformers learn from
        files.append(source / "captions.jsonl")
    runs, figures = {}, []
    for times in TIMES:
        steps = max(1, c.steps * times // TIMES[-1])
        folder = given if given and times == TIMES[-1] else out / f"{times}x"
        if folder != given:
            folder.mkdir(parents=True, exist_ok=True)
            for path in files:
                shutil.copy(path, folder)
            this = {"stage": "dit", "steps": steps, "out": str(folder), "keep": 0}
            train.main(replace(c, **this, sample_every=10**9))
        run = sample.load_run(folder)
        loss, flops = held_back_loss(run, c)
        scores = evaluate.measure_prompts(run, args.ones, 0)["generated"]
        row = {"times": times, "steps": steps, "flops": flops * steps, "loss": loss}
        figures.append(row | {name: scores[name] for name in ("digit", "direction")})
        runs[f"{times}x: {steps} steps, {flops * steps:.1e} FLOP"] = run
        print(json.dumps(figures[-1]))
    columns(runs).save(out / "scaling_clips.png")
    plot(figures).save(out / "scaling.png")
    (out / "scaling.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"wrote {out / 'scaling_clips.png'}, {out / 'scaling.png'} and {out / 'scaling.json'}")
