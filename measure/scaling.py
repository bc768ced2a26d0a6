"""Scaling: the same prompts, as the training compute grows (the report's base, 4x and more).

The idea. A finished run is compared with two that are trained here, for 1/16 and 1/4 of its steps,
each with its own learning rate schedule down to zero (a run that was stopped early would be worse
than one that was planned to be short: Hoffmann et al. 2022). All learn from the same items. By
FLOPs of the training: the loss on held-back batches, with the same noise; whether clips show the
digit and the direction of their prompts (prompts.py), or how well a simulated world goes on
(worlds.py); and a picture of the same clips, made with the same noise.

    python evaluate.py scaling --run out/tiny
    python evaluate.py scaling --run out/game --out out/game_scaling

It takes 5/16 of that run's time; stopped, the same command continues.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import data
import prompting
import train
from measure import prompts, worlds
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


def finished(folder: Path) -> train.Config:
    """The flags of a training that is done, and can be measured."""
    saved = prompting.read_weights(folder / "dit.pt", "cpu")
    c = replace(train.Config(**saved["config"]), out=str(folder))
    if (kind := saved["world"]["config"]["kind"]) not in (kinds := ("digits", *worlds.WORLDS)):
        raise ValueError(f"this run learned from {kind}: only {', '.join(kinds)} can be measured")
    if saved["step"] < c.steps:
        raise ValueError(f"{folder} has done {saved['step']} of {c.steps} steps: finish it first")
    return c


def shorter(whole: train.Config, times: int, out: Path) -> train.Config:
    """An equal training of `times` / 16 of the steps, from the same items and captions: trained
    here, if it is not there yet."""
    c = replace(whole, stage="dit", steps=max(1, whole.steps * times // TIMES[-1]), keep=0,
                out=str(out / f"{times}x"), sample_every=10**9)  # fmt: skip
    shutil.copytree(whole.folder / "items", c.folder / "items", dirs_exist_ok=True)
    for path in whole.folder.iterdir():
        if path.stem in ("vae", "text", "captions"):
            shutil.copy(path, c.folder)
    train.main(c)
    return c


def measured(run: prompting.Run, n: int) -> tuple[dict, list, list[str]]:
    """Figures of n clips; and of some a column of what the model made, and titles. For simulated
    worlds, a column of the truth comes first."""
    if run.world["config"]["kind"] == "digits":
        scores = prompts.measure(run, n, 0, {})[0]["generated"]
        size = max(run.world["durations"]), *run.world["shapes"][0]
        tasks = [prompting.new(run, size, x) for x in PROMPTS]
        made = prompting.finished(run, tasks, range(len(tasks)), expanded=True)
        return {name: scores[name] for name in ("digit", "direction")}, [made], PROMPTS
    figures, pairs = worlds.within(run, n, {"guidance": 1.0})
    truth, made = zip(*pairs[:6], strict=True)
    return figures, [[x.pixels for x in truth], made], [x.caption for x in truth]


def main(args: argparse.Namespace) -> tuple[Path, dict, Image.Image]:
    out, figures, columns, heads = Path(args.out), [], [], []
    whole = finished(Path(args.run or prompting.newest_run()))
    for times in TIMES:
        c = whole if times == TIMES[-1] else shorter(whole, times, out)
        run = prompting.load_run(c.folder)
        loss, flops = held_back_loss(run, c)
        scores, clips, titles = measured(run, args.clips)
        figures.append({"steps": c.steps, "flops": flops * c.steps, "loss": loss} | scores)
        print(json.dumps(figures[-1]), flush=True)
        heads += ["the truth"] * (len(clips) > 1 and not columns) + [f"{c.steps} steps"]
        columns += clips[:-1] * (not columns) + clips[-1:]
    rows, named = zip(*columns, strict=True), [f"{x}, {head}" for x in titles for head in heads]
    page = data.sheet(sum(rows, ()), named, columns=len(heads), most=3 if len(heads) == 3 else 6)
    page.save(out / "scaling_clips.png")
    x, panels = [row["flops"] for row in figures], {}
    for k, name in enumerate(list(figures[0])[2:]):
        short, _, unit = name.rpartition(", ")
        short, unit = (short, unit) if short else (name, "loss" if k == 0 else "share")
        many = sum(len(x) for title, x in panels.items() if title.startswith(unit))
        title = f"{unit}, by FLOPs of the training" + " " * (many // 4)  # another panel
        panels.setdefault(title, {})[short] = (x, [row[name] for row in figures])
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
