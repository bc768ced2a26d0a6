"""Numbers for what the report only shows.

    python evaluate.py prompts --run out/tiny     # do clips show what their prompts say?
    python evaluate.py prompting --run out/tiny   # animate, extend, loop ...: see tasks.py
    python evaluate.py language --run out/tiny    # are captions and expanded prompts true?
    python evaluate.py bench                      # how fast is it? needs no run: see bench.py
    python evaluate.py scaling                    # what does more training bring? see scaling.py

`prompts` reads three sets of clips of the same prompts, from pixels alone (see reader.py):

    real         held-out digits, straight from the world: what the reader itself gets wrong
    VAE          those clips, encoded and decoded: the ceiling of any model in this latent space
    generated    the model's own clips

Every digit and direction is asked for equally often, at every shape of the world's videos in their
longest duration, and at the first shape in the shorter ones, too.

Alphabet: a clip is [C, T, H, W] uint8.
"""

import argparse
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import bench
import caption_reader
import data
import reader
import sample
import tasks
from prompting import load_language
from vae import VAE
from weights import newest_run

HERE = Path(__file__).parent
SCORES = ("digit", "direction", "digits", "directions", "both")  # the last three: of two digits


def digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    return data.split(*data.load_digits(HERE / "digits.png"), held_out=held_out)


# ----------------------------------------------------------------------------- the clips to compare


def video_sizes(world: data.World) -> list[tuple[int, int, int]]:
    """(T, H, W): each shape's longest videos, then the shorter ones of the first shape."""
    drawn = np.unique(world.size(np.arange(5000), images=0.0), axis=0)  # nothing but videos
    videos = [tuple(size) for size in drawn.tolist() if size[0] > 1]
    if not videos:
        raise ValueError("the world of this run has no videos, and an image does not move")
    shapes = [s for s in map(tuple, world.config.shapes) if s in {size[1:] for size in videos}]
    longest = [max(size for size in videos if size[1:] == shape) for shape in shapes]
    return longest + [s for s in videos[::-1] if s[1:] == shapes[0] and s != longest[0]]


def real_clips(config: data.WorldConfig, ones: int, twos: int, seed: int) -> tuple[list, list]:
    """Clips of held-out digits and their facts, whose captions are the prompts: `ones` with one
    digit, `twos` with two. Sizes, digits and directions (of the first digit) take turns."""
    kinds = [(digit, way) for digit in range(10) for way in data.DIRECTIONS]
    order = np.random.default_rng(seed).permutation(40)  # so that any 12 are a fair choice
    clips, facts = [], []
    for amount, share in ((ones, 0.0), (twos, 1.0)):
        world = data.World(replace(config, two_digits=share), *digits(held_out=True), seed=seed)
        room = config.digit * (2 if share else 1)  # elsewhere the world shows no second digit
        sizes = [size for size in video_sizes(world) if max(size[1:]) >= room]
        if amount and not sizes:
            raise ValueError("no video of this world has room for two digits: take --twos 0")
        for s, size in enumerate(sizes):
            mine = [j for j in range(amount) if (j + j // 40) % len(sizes) == s]
            index = 1_000_000 * s + np.arange(2000 + 80 * len(mine))  # many times as many as needed
            stock = defaultdict(list)
            described = world.all_facts(index, np.tile(size, (len(index), 1)))
            for i, fact in zip(index, described, strict=True):
                stock[fact["digits"][0]["digit"], fact["digits"][0]["direction"]].append(i)
            if mine:
                chosen = world.clips([stock[kinds[order[j % 40]]].pop() for j in mine], size)
                clips, facts = clips + chosen[0], facts + chosen[1]
    return clips, facts


def by_size(facts: list[dict], most: int) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Batches of equal size: ((T, H, W), clip numbers)."""
    sizes = [(f["frames"], f["height"], f["width"]) for f in facts]
    for size in dict.fromkeys(sizes):
        group = [i for i, s in enumerate(sizes) if s == size]
        for start in range(0, len(group), most):
            yield size, group[start : start + most]


@torch.no_grad()
def reconstruct(vae: VAE, clips: list, facts: list[dict]) -> tuple[list, dict[str, float]]:
    """Clips after the VAE; its PSNR (peak-to-peak 2) and compression (pixels per latent number)."""
    made, squares, pixels, numbers = [None] * len(clips), 0.0, 0, 0
    for _, group in by_size(facts, 16):
        video = torch.from_numpy(np.stack([clips[i] for i in group])).to(vae.mean.device)
        video = video.float() / 127.5 - 1  # [B, C, T, H, W]
        latent = vae.encode(video)  # [B, Z, t, h, w]
        again = vae.decode(latent)  # [B, C, T, H, W]
        squares += (again - video).square().sum().item()
        pixels, numbers = pixels + video.numel(), numbers + latent.numel()
        for i, clip in zip(group, sample.to_uint8(again), strict=True):
            made[i] = clip
    psnr = 10 * float(np.log10(4 * pixels / max(squares, 1e-9)))
    return made, {"psnr": psnr, "compression": pixels / numbers}


def generate(run: sample.Run, facts: list[dict], seed: int, how: dict, expanded: bool) -> list:
    """One clip for each caption, at its size; `how`: what sample.generate should not choose.
    expanded: the prompts are, as by sample.py."""
    made = [None] * len(facts)
    with tqdm(total=len(facts), desc="generating", unit="clip", leave=False) as bar:
        for size, group in by_size(facts, 32):
            captions = [data.short_caption(facts[i]) for i in group]
            seeds = [1_000_000 * seed + i for i in group]
            captions = sample.expand(run, captions, size, seeds) if expanded else captions
            clips = sample.generate(run, captions, size, seeds, **how)
            for i, clip in zip(group, clips, strict=True):
                made[i] = clip
            bar.update(len(group))
    return made


# ----------------------------------------------------------------------------------- reading them


@cache
def load_classifier(digit: int) -> tuple[nn.Module, float]:
    """The digit classifier, and its accuracy on held-out digits. It depends on no run but only on
    reader.py, so that all runs share the one that the first call trains."""
    version = hashlib.sha256(Path(reader.__file__).read_bytes()).hexdigest()[:8]
    path = HERE / "out" / f"classifier_{digit}_{version}.pt"
    if path.exists():
        network = reader.make_network().eval()
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        images, labels = digits(held_out=False)
        network = reader.train_classifier(data.make_sprites(images, digit), labels)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        torch.save(network.state_dict(), part)
        part.replace(path)
    images, labels = digits(held_out=True)
    return network, reader.accuracy(network, data.make_sprites(images, digit), labels)


def read(clips: list, facts: list[dict], world: data.WorldConfig) -> tuple[list, list]:
    """What is seen in each clip, and how that scores against the facts that were asked for."""
    network, _ = load_classifier(world.digit)
    seen, scores = [], []
    for clip, fact in zip(clips, facts, strict=True):
        if len(fact["digits"]) == 1:
            seen.append(reader.read_one(clip, network, world.digit))
            scores.append(reader.score_one(seen[-1], fact["digits"]))
        else:
            seen.append(reader.read_two(clip, network, world.digit, max(world.speeds)))
            scores.append(reader.score_two(seen[-1], fact["digits"]))
    return seen, scores


def average(scores: list[dict]) -> dict[str, float | None]:
    """The mean of each score over the clips that have it; None where no clip does."""
    values = {name: [s[name] for s in scores if name in s] for name in SCORES}
    return {name: float(np.mean(v)) if v else None for name, v in values.items()}


def measure_prompts(
    run: sample.Run,
    ones: int = 480,
    twos: int = 120,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sheet: Path | None = None,
    expanded: bool = True,
) -> dict:
    """All figures of a run, by name, ready for JSON; `sheet` is a picture to write."""
    how = {"steps": steps, "guidance": guidance}
    expanded &= run.language is not None
    figures = {"ones": ones, "twos": twos, "seed": seed, **how, "expanded": expanded}
    world = data.WorldConfig(**run.world)
    figures["classifier"] = load_classifier(world.digit)[1]
    clips, facts = real_clips(world, ones, twos, seed)
    again, compression = reconstruct(run.vae, clips, facts)
    start = time.perf_counter()
    made = generate(run, facts, seed, {k: v for k, v in how.items() if v is not None}, expanded)
    figures["seconds_a_clip"] = (time.perf_counter() - start) / len(facts)
    for name, those in (("real", clips), ("VAE", again), ("generated", made)):
        seen, scores = read(those, facts, world)
        figures[name] = average(scores) | {"sharpness": reader.sharpness(those)}
    figures["VAE"] |= compression
    for size, group in by_size(facts, len(facts)):
        name = " x ".join(map(str, size))
        figures.setdefault("sizes", {})[name] = average([scores[i] for i in group])
    if sheet:
        contact_sheet(made, facts, seen, scores).save(sheet)
    return figures


# ----------------------------------------------------------------------------------- showing them


def contact_sheet(
    clips: list, facts: list[dict], seen: list, scores: list, most: int = 60
) -> Image.Image:
    """First, middle and last frame of some clips; above the prompt, below what was read, red if
    any of it is wrong."""
    some = np.unique(np.linspace(0, len(clips) - 1, most).astype(int))
    wide, high = (2 * max(facts[i][side] for i in some) for side in ("width", "height"))
    cell = (max(3 * wide + 8, 216) + 12, high + 42)
    sheet = Image.new("RGB", (5 * cell[0], -(-len(some) // 5) * cell[1]), (24, 24, 32))
    pen = ImageDraw.Draw(sheet)
    for place, i in enumerate(some):
        left, top = place % 5 * cell[0] + 6, place // 5 * cell[1] + 4
        T, H, W = (facts[i][side] for side in ("frames", "height", "width"))
        pen.text((left, top), data.short_caption(facts[i]), fill=(220, 220, 220))
        for k, t in enumerate((0, T // 2, T - 1)):
            frame = sample.filmstrip(clips[i][:, [t]], 2)
            sheet.paste(frame, (left + k * (2 * W + 4), top + 14))
        words = ["-" if k < 0 else str(k) for k in seen[i]["digits"]] + seen[i]["directions"]
        color = (120, 200, 120) if min(scores[i].values()) == 1 else (255, 90, 90)
        pen.text((left, top + 2 * H + 16), "read: " + " ".join(words), fill=color)
    return sheet


def table(figures: dict) -> str:
    """The three sets of clips, one a line; then the generated ones of each size."""

    def line(name: str, cells: list) -> str:
        return f"{name:16}" + "".join(f"{cell:>12}" for cell in cells)

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f} %"

    real, vae = figures["real"], figures["VAE"]
    lines = [f"{figures['ones']} clips of one digit, {figures['twos']} clips of two digits"]
    lines += [line("", [*SCORES, "sharpness"])]
    rows = {name: figures[name] for name in ("real", "VAE", "generated")} | figures["sizes"]
    for name, row in rows.items():
        sharp = f"{row['sharpness'] / real['sharpness']:.2f}" if "sharpness" in row else ""
        lines += [line(name, [*(percent(row[score]) for score in SCORES), sharp])]
    lines += [f"digit classifier: {percent(figures['classifier'])} of the held-out digits"]
    recognised = percent(vae["digit"] / max(real["digit"], 1e-6))
    lines += [f"VAE: {vae['compression']:.1f}x compression, {vae['psnr']:.1f} dB (peak-to-peak 2), "
              f"digits recognised {recognised} as often as the originals"]  # fmt: skip
    return "\n".join(lines)


def prompts(args: argparse.Namespace) -> None:
    folder = Path(args.run) if args.run else newest_run()
    run, sheet = sample.load_run(folder), folder / "prompts.png"
    how = (args.seed, args.steps, args.guidance)
    figures = measure_prompts(run, args.ones, args.twos, *how, sheet, not args.no_expand)
    print(table(figures))
    (folder / "prompts.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"wrote {folder / 'prompts.json'} and {sheet}")


def language(args: argparse.Namespace) -> None:
    folder = Path(args.run) if args.run else newest_run(name="text")
    vae, writer = (load(folder, "cpu") for load in (sample.load_vae, load_language))
    if "digit" not in writer.world:
        raise ValueError(f"{folder} learned from own clips, of which nobody knows what is true")
    config = data.WorldConfig(**writer.world)
    world = data.World(config, *digits(held_out=True), seed=args.seed)
    compared = compare(folder, Path(args.against), args) if args.against else None
    seen = (vae, writer, world, args.clips)
    figures = {"captioner": caption_reader.measure_captioner(*seen)}
    figures["captioner, told"] = caption_reader.measure_captioner(*seen, told=True)
    figures["expander"] = caption_reader.measure_expander(writer, world, args.clips)
    if compared:
        figures["clips of prompts"] = compared
    print(caption_reader.table(figures))
    (folder / "language.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"wrote {folder / 'language.json'}")


def compare(recaptioned: Path, short: Path, args: argparse.Namespace) -> dict:
    """The report's claim: how well clips follow the same short prompts, after equal trainings."""
    runs = {folder: sample.load_run(folder) for folder in (short, recaptioned)}
    kinds = {folder: run.config["captions"] for folder, run in runs.items()}
    if list(kinds.values()) != ["noisy", "recaptioned"]:
        raise ValueError(f"--run and --against: recaptioned and noisy runs, and not {kinds}")
    one, other = (run.config for run in runs.values())
    # What only the captioner uses may differ, too: a noisy run has none.
    free = {"out", "captions", "stage", "short", "labelled"}
    free |= {name for name in one if name.startswith("text_")}
    differ = [name for name in one if name not in free and one[name] != other.get(name)]
    if differ:
        raise ValueError(f"the two runs also differ in {', '.join(differ)}")
    kinds = {"noisy captions": (short, False), "re-captioned": (recaptioned, False)}
    kinds |= {"and prompts expanded": (recaptioned, True)}
    rows = {
        name: measure_prompts(runs[which], args.ones, args.twos, args.seed, expanded=expanded)
        for name, (which, expanded) in kinds.items()
    }
    return {name: {x: row["generated"][x] for x in SCORES} for name, row in rows.items()}


def prompting(args: argparse.Namespace) -> None:
    folder = Path(args.run) if args.run else newest_run()
    run = sample.load_run(folder)
    config = replace(data.WorldConfig(**run.world), two_digits=0.0)
    world = data.World(config, *digits(held_out=True), args.seed)
    network, _ = load_classifier(world.config.digit)
    how = {} if args.steps is None else {"steps": args.steps}
    figures, page = tasks.measure(run, world, network, args.clips, args.minutes, args.seed, how)
    figures["a minute"]["cost"] = tasks.cost(str(folder), args.steps or sample.DEFAULT.steps)
    print(tasks.table(figures))
    (folder / "prompting.json").write_text(json.dumps(figures, indent=2) + "\n")
    page.save(folder / "prompting.png")
    print(f"wrote {folder / 'prompting.json'} and {folder / 'prompting.png'}")


def scaling(args: argparse.Namespace) -> None:
    import scaling  # which imports us

    scaling.scaling(args)


# ------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = sample.Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="prompts|prompting|language|bench|scaling"
    )
    command = commands.add_parser("prompts", help="do clips show what their prompts say?")
    command.add_argument("--run", help="a folder that train.py wrote (default: the newest)")
    command.add_argument("--ones", type=int, default=480, help="how many clips of one digit")
    command.add_argument("--twos", type=int, default=120, help="how many clips of two digits")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="sampling steps (default: as sample.py)")
    command.add_argument("--guidance", type=float, help="1: none (default: as sample.py)")
    command.add_argument("--no-expand", action="store_true", help="take the short prompts as is")
    command = commands.add_parser("language", help="are captions and expanded prompts true?")
    command.add_argument("--run", help="a folder that train.py wrote (default: the newest)")
    command.add_argument("--clips", type=int, default=1000, help="how many are captioned")
    command.add_argument("--against", metavar="RUN", help="an equal run with --captions noisy: "
                         "do clips of --run follow prompts better?")  # fmt: skip
    command.add_argument("--ones", type=int, default=240, help="--against: clips of one digit")
    command.add_argument("--twos", type=int, default=120, help="--against: clips of two digits")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("prompting", help="is what is given kept, and carried on?")
    command.add_argument("--run", help="a folder that train.py wrote (default: the newest)")
    command.add_argument("--clips", type=int, default=40, help="how many for each task")
    command.add_argument("--minutes", type=int, default=10, help="how many clips of a minute")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="sampling steps (default: as sample.py)")
    command = commands.add_parser("bench", help="how fast are training and the VAE?")
    command.add_argument("--repeats", type=int, default=7, help="the median of so many is printed")
    command = commands.add_parser("scaling", help="what does more training bring? (scaling.py)")
    command.add_argument("--run", help="a finished run: the longest of the three trainings")
    command.add_argument("--steps", type=int, help="of the longest training (default: 2000)")
    command.add_argument("--ones", type=int, default=160, help="how many clips to read")
    command.add_argument("--out", default="out/scaling", help="a folder for runs and pictures")
    command.add_argument("train", nargs="*", help="flags of train.py, behind --")
    args = parser.parse_args()
    limits = dict.fromkeys(("ones", "clips", "minutes", "steps", "repeats"), 1)
    for name, least in (limits | {"twos": 0, "seed": 0}).items():
        given = getattr(args, name, None)
        if given is not None and given < least:
            parser.error(f"--{name} {given}: at least {least}")
    try:
        kinds = {"prompts": prompts, "prompting": prompting, "language": language}
        (kinds | {"bench": bench.bench, "scaling": scaling})[args.command](args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
