"""Scaling: the same prompts, as the training compute grows (the report's base, 4x and more).

The problem. "It gets better with more compute" is easily said. How much better, and at what?

The idea. Train one network three times, for 1, 4 and 16 times as many steps, each with its own
learning rate schedule down to zero (a run that was stopped early would be worse than one that was
planned to be short: Hoffmann et al. 2022). All see the same VAE and the same kind of data. Then

    compute      FLOPs of a step (cost.py) x steps
    loss         of held-back batches with fixed noise, the same for all three
    fidelity     whether clips show the digit and the direction of their prompts (reader.py)
    a picture    the same prompts from the same noise, a column for each compute

Run `python evaluate.py scaling`; flags of train.py go behind `--`. Stopped, it continues.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import batches
import cost
import evaluate
import sample
import train

TIMES = (1, 4, 16)
PROMPTS = ("a 7 moving left", "a 3 moving right", "a 0 moving down", "a 4 moving up", "a 9 moving "
           "left", "a 2 moving right")  # fmt: skip


@torch.no_grad()
def held_back_loss(run: sample.Run, c: train.Config, count: int = 8) -> tuple[float, float]:
    """The EMA model's loss on batches it has not seen, and the FLOPs of a training step on them."""
    source = batches.Source(run.vae, run.tokenizer, train.make_world(c), run.language)
    made = batches.dit_parts(source, c, train.HELD_BACK, count)
    total, flops = 0.0, 0.0
    for step, parts in enumerate(made, train.HELD_BACK):
        for part in parts:
            total += train.dit_loss(run.dit, part, c, step)[0].item() / count
            lengths, frames = part.packed.lengths, len(part.packed.frame_clip)
            flops += sum(cost.step_flops(run.dit, lengths, frames)) / count
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
        clips = sample.generate(run, list(PROMPTS), size, seeds=list(range(len(PROMPTS))))
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
    for k, (title, curves) in enumerate(panels.items()):
        left, top = 60 + k * (width + 80), 40
        values = [f[name] for name in curves for f in figures]
        low, high = (min(values), max(values)) if k == 0 else (0.0, 1.0)
        high = max(high, low + 1e-6)
        pen.text((left, 12), title, fill=(255, 255, 255))
        pen.rectangle((left, top, left + width, top + height), outline=(90, 90, 100))
        for share in (0.0, 0.5, 1.0):
            said = f"{low + share * (high - low):.2f}"
            pen.text((left - 40, top + height * (1 - share) - 6), said, fill=(160, 160, 160))
        for n, (name, color) in enumerate(curves.items()):
            pen.text((left + 8 + 80 * n, top + 4), name, fill=color)
            points = []
            for f, at in zip(figures, x, strict=True):
                across = (at - x[0]) / max(x[-1] - x[0], 1e-9)
                up = (f[name] - low) / (high - low)
                points.append(
                    (left + 20 + across * (width - 40), top + 20 + (1 - up) * (height - 40))
                )
                pen.text(
                    (points[-1][0] - 20, top + height + 6), f"{f['flops']:.1e}", fill=(160,) * 3
                )
            pen.line(points, fill=color, width=2)
            for a, b in points:
                pen.ellipse((a - 4, b - 4, a + 4, b + 4), fill=color)
        pen.text((left, top + height + 24), "FLOPs of the training", fill=(160, 160, 160))
    return sheet


def scaling(args: argparse.Namespace) -> None:
    out, flags = Path(args.out), args.train
    c = train.parse([*flags, "--steps", str(args.steps)])
    train.main(train.parse([*flags, "--stage", "vae", "--out", str(out / "vae")]))
    runs, figures = {}, []
    for times in TIMES:
        steps = max(1, args.steps * times // TIMES[-1])
        folder = out / f"{times}x"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "vae" / "vae.pt", folder / "vae.pt")
        this = ["--stage", "dit", "--steps", str(steps), "--out", str(folder)]
        train.main(train.parse([*flags, *this, "--sample-every", str(10**9)]))
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
