"""Scaling: the same prompts, as the training compute grows (the report's base, 4x and more).

The idea. Train one network three times, for 1, 4 and 16 times as many steps, each with its own
learning rate schedule down to zero (a run that was stopped early would be worse than one that was
planned to be short: Hoffmann et al. 2022). All learn from the same items. Then compare, by FLOPs of
the training, the loss on held-back batches, with the same noise; whether clips show the digit and
the direction of their prompts (prompts.py); and a picture of the same prompts and noise.

    python evaluate.py scaling                   # flags of train.py go behind `--`
    python evaluate.py scaling --run out/tiny    # a finished run is the longest of the three

The second trains the two short ones alone: 5/16 of that run's time. Stopped, both continue.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import data
import prompting
import train
from measure import prompts
from training import batches, cost, items, words
from training.plot import plot

TIMES = (1, 4, 16)
PROMPTS = ("a 7 moving left", "a 3 moving right", "a 0 moving down", "a 4 moving up",
           "a 9 moving left", "a 2 moving right")  # fmt: skip
CLIPS = [("tiny", (17, 32, 32)), ("small", (17, 64, 64)), ("base", (17, 128, 128)),
         ("large", (17, 128, 128)), ("xl", (17, 128, 192)), ("3b", (65, 256, 448)),  # Sora's kind:
         ("3b", (121, 480, 848)), ("3b", (601, 720, 1280)), ("3b", (1801, 1088, 1920))]  # fmt: skip


@torch.no_grad()
def held_back_loss(run: prompting.Run, c: train.Config, count: int = 8) -> tuple[float, float]:
    """The EMA model's loss on batches it has not seen, and the FLOPs of a training step on them."""
    world = train.make_world(c)
    made = items.make_items(world, run.vae, c, c.folder / "items")
    source = train.source_of(c, world, made, words.words_of(world, made), run.tokenizer)
    total, flops = 0.0, 0.0
    for step in range(batches.HELD_BACK, batches.HELD_BACK + count):
        for part in batches.parts(source, step):
            total += train.dit_loss(run.dit, part.to(run.device), c, step)[0].item() / count
            counts = part.packed.lengths, part.packed.words, len(part.packed.frame_clip)
            flops += sum(cost.step_flops(run.dit, *counts)) / count
    return total, flops


def first_run(out: Path, args: argparse.Namespace) -> train.Config:
    """A finished run, or one whose VAE, items and captions are made here: all three share them."""
    if not args.run:
        c = train.parse([*args.train, "--steps", str(args.steps or 2000), "--out", f"{out}/shared"])
        prompts.held_out({"config": {"kind": c.kind}})  # or it cannot be measured
        for stage in ("vae", "text" if c.captions == "recaptioned" else "items"):
            train.main(replace(c, stage=stage))
        return c
    if args.steps or args.train:
        raise ValueError("--run is trained already: leave --steps and flags of train.py out")
    saved = prompting.read_weights(prompting.find_weights(args.run, "dit"), "cpu")
    c = replace(train.Config(**saved["config"]), out=args.run)
    prompts.held_out(saved["world"])
    if saved["step"] < c.steps:
        raise ValueError(f"{args.run} has done {saved['step']} of {c.steps} steps: finish it first")
    return c


def trained(out: Path, first: train.Config, finished: bool) -> Iterator[train.Config]:
    """Train what is not there yet."""
    for times in TIMES:
        c = replace(first, stage="dit", steps=max(1, first.steps * times // TIMES[-1]), keep=0,
                    out=str(out / f"{times}x"), sample_every=10**9)  # fmt: skip
        if finished and times == TIMES[-1]:
            c = first
        else:
            shutil.copytree(first.folder / "items", c.folder / "items", dirs_exist_ok=True)
            for path in first.folder.iterdir():
                if path.stem in ("vae", "text", "captions"):
                    shutil.copy(path, c.folder)
            train.main(c)
        yield c


def main(args: argparse.Namespace) -> tuple[Path, dict, Image.Image]:
    out, figures, clips, titles = Path(args.out), [], [], []
    for c in trained(out, first_run(out, args), bool(args.run)):
        run = prompting.load_run(c.folder)
        loss, flops = held_back_loss(run, c)
        scores = prompts.measure(run, args.ones, 0, 0, {})[0]["generated"]
        row = {"steps": c.steps, "flops": flops * c.steps, "loss": loss}
        figures.append(row | {name: scores[name] for name in ("digit", "direction")})
        print(json.dumps(figures[-1]), flush=True)
        size = max(run.world["durations"]), *run.world["shapes"][0]
        clips.append(prompts.make(run, [prompting.new(run, size, x) for x in PROMPTS], 0, {}))
        titles.append([f"{prompt}, {c.steps} steps" for prompt in PROMPTS])
    clips, titles = (sum(zip(*rows, strict=True), ()) for rows in (clips, titles))
    data.sheet(clips, titles, columns=len(TIMES), most=3).save(out / "scaling_clips.png")
    x, curves = [row["flops"] for row in figures], {}
    for name in ("loss", "digit", "direction"):
        curves[name] = (x, [row[name] for row in figures])
    panels = {"loss on held-back clips, by FLOPs of the training": {"loss": curves.pop("loss")},
              "share of clips that show what the prompt says, by FLOPs": curves}  # fmt: skip
    return out, figures, plot(panels, log_x=True)


def costs(args: argparse.Namespace) -> None:
    """What the presets cost: weights, gradients, optimizer and EMA; one training step on one clip,
    and the share of attention in it; H200 hours for a million clips at 40% of the peak."""
    world = data.Digits(data.WorldConfig())
    print("| preset | parameters | state | a clip | tokens | step | attention | a million clips |")
    print("|" + " --- |" * 8)
    for preset, size in CLIPS:
        c = train.parse(["--preset", preset])
        with torch.device("meta"):
            dit, vae = train.make_dit(c, 512, world), train.make_vae(c, world)
        print("|", " | ".join([preset, *cost.row(dit, size, vae.grid(*size), c.patch)]), "|")
