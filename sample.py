"""Sample: every way of prompting, with one model and one sampler.

    python sample.py --prompt "a 7 moving left" --frames 17 --height 32 --width 48 --out seven.gif
    python sample.py --prompt "a 3 moving up" --frames 17 --height 32 --width 48 --out three.gif
    python sample.py --prompt "a 3 moving up and a 1 moving left" --count 8 --scale 4 --out both.gif
    python sample.py --prompt "an 8 moving down" --frames 1 --out eight.png
    python sample.py --prompt "an 8 moving down" --image eight.png --out falling.gif
    python sample.py --prompt "a 7 moving left" --extend seven.gif --frames 33 --out longer.gif
    python sample.py --prompt "a 7 moving left" --extend seven.gif --backward --out earlier.gif
    python sample.py --prompt "a 7 moving left" --loop seven.gif --out loop.webp
    python sample.py --prompt "a 7 moving left" --then "a 3 moving up" --connect seven.gif three.gif
    python sample.py --prompt "a 3 moving left" --edit seven.gif --strength 0.6 --out edited.gif
    python sample.py --prompt "a 7 moving left" --seconds 60 --out minute.mp4
    python sample.py --caption seven.gif

A clip has the size of the grid of noise patches that sampling starts from: lay out more frames,
rows or columns of noise, and a longer, taller or wider clip comes out (the report's "choosing the
output size"). Your files are read as training reads them: upright, at the model's frame rate, of
about its size; from there on, their pixels come out untouched. If the model was trained on
full captions, a short prompt is first expanded into one, differently for each seed, and printed.
A clip is a function of its prompt, size, seed and files: on one machine to the last bit, today or
tomorrow. In a batch, sums may round in another order, which changes a few pixels by a gray value.
"""

import argparse
import os
import re
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import prompting
from data import sheet
from dit import MOST_WORDS
from prompting import AT_ONCE, Run, Task
from worlds import media
from worlds.media import MOST_NUMBERS, SUFFIXES, VIDEO, Writer, fitted, naming, probe, read_clip

MOST_FRAMES = 10**6


class Parser(argparse.ArgumentParser):  # a mistake is one line
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def frame_rate(text: str) -> float:
    """29.97, or an int where it is whole."""
    return int(value) if (value := float(text)).is_integer() else value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser("sample.py", description=__doc__, formatter_class=how)
    say, task = parser.add_argument, parser.add_mutually_exclusive_group()
    length = parser.add_mutually_exclusive_group()
    say("--run", help="a folder of train.py (default: the newest below out/, or what ships)")
    say("--prompt", help='what to show; "" for anything')
    say("--no-expand", action="store_true", help="take the prompt as it is")
    task.add_argument("--image", metavar="FILE", help="animate this image")
    task.add_argument("--extend", metavar="CLIP", help="continue this clip")
    task.add_argument("--loop", metavar="CLIP", help="lead from this clip's end back to its start")
    task.add_argument("--connect", nargs=2, metavar="CLIP", help="lead from one clip to another")
    task.add_argument("--edit", metavar="CLIP", help="make this clip what the prompt says (SDEdit)")
    task.add_argument("--caption", metavar="CLIP", help="print a caption of this clip")
    say("--backward", action="store_true", help="with --extend: what came before")
    say("--then", metavar="PROMPT", help="with --connect: the prompt that it ends with")
    say("--strength", type=float, help="with --edit: 0 keeps the clip, 1 ignores it (default 0.6)")
    say("--actions", help='such as "left*8 right*8", a file with one a line, or random')
    length.add_argument("--frames", type=int, help="how many, or how many to add; 1 is an image")
    length.add_argument("--seconds", type=float, help="the same, in seconds")
    say("--height", type=int, help="H in pixels (default: as in training, with your clip's shape)")
    say("--width", type=int, help="W in pixels; your clip is resized to both")
    say("--fit", choices=["crop", "pad"], default="crop", help="a clip of another shape")
    say("--count", type=int, default=1, help="how many clips, with seeds from --seed on")
    say("--seed", type=int, default=0)
    say("--steps", type=int, help="sampling steps (default: 30; extend, loop and connect 50)")
    say("--guidance", type=float, help="1: none (default: 6; own clips 1.5; extend 2; loop 1)")
    say("--fps", type=frame_rate, help="frames a second, of your files, too (default: as trained)")
    say("--scale", type=int, default=1, help="pixels of the file for each of the clip (default: 1)")
    say("--out", default="sample.gif", help="a name ending in " + " ".join(SUFFIXES))
    args = parser.parse_args(argv)
    args.seeds = range(args.seed, args.seed + args.count)
    one = (args.image, args.extend, args.loop, args.edit, args.caption)
    args.files = args.connect or [path for path in one if path]
    if problem := mistake(args):
        parser.error(problem)
    return args


def mistake(args: argparse.Namespace) -> str | None:
    """What is wrong with the flags, if anything, before any work is done."""
    if args.prompt is None and not args.caption:
        return '--prompt says what to show; "" for anything'
    if Path(args.out).suffix not in SUFFIXES:
        return f"--out {args.out}: write to a name that ends in one of {' '.join(SUFFIXES)}"
    for flag, needs in (("backward", "extend"), ("then", "connect"), ("strength", "edit")):
        if getattr(args, flag) not in (None, False) and not getattr(args, needs):
            return f"--{flag} is for --{needs}"
    if args.edit and (args.frames is not None or args.seconds is not None):
        return "--edit keeps the length of the clip: leave --frames and --seconds out"
    if args.actions and (args.backward or args.files and not args.extend):
        return "--actions is for --prompt alone, or for --extend"
    limits = {"frames": (1, MOST_FRAMES), "height": (1, 10**5), "width": (1, 10**5)}
    limits |= {"count": (1, 10_000), "steps": (1, 10_000), "fps": (1, 1000), "scale": (1, 64)}
    limits |= {"seconds": (1e-3, MOST_FRAMES), "strength": (0, 1), "guidance": (-1e6, 1e6)}
    for name, (least, most) in (limits | {"seed": (0, 2**32 - 10_001)}).items():
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            return f"--{name} {value}: from {least:,} to {most:,}"
    if args.files and (args.height is None) != (args.width is None):
        return "--height and --width: both, to resize your clip, or neither"
    return None


def read_files(run: Run, args: argparse.Namespace) -> list[np.ndarray]:
    """The files as clips [C, T, H, W] of one size: as training shows them, unless --height and
    --width say otherwise. Says what was done to them."""
    vae, clips, fps = run.vae.config, [], 0 if args.image else args.fps
    learned = {*map(tuple, (*run.world["shapes"], *run.world["image_shapes"]))}
    size, fit = (args.height, args.width) if args.height else None, args.fit
    for path in args.files:
        found = probe(path)
        if not size and (size := (found["height"], found["width"])) not in learned:
            pixels, multiple = run.world["config"]["pixels"], vae.space_factor * run.config["patch"]
            with naming(path):
                size, fit = fitted(*size, pixels, multiple), ""
        clip, done = read_clip(path, vae.colors, size, fit, fps, found)
        clips.append(clip)
        print(done + ", as in training; --height and --width choose otherwise" * (not fit))
        fit = args.fit  # of the one that it is to be connected with, which gets the same size
    return clips


def actions_of(run: Run, text: str, seed: int, count: int | None) -> np.ndarray:
    """The numbers of the actions that a text says, or the file with that name; random: `count`."""
    if not (names := list(run.world["actions"])):
        raise ValueError("--actions: the clips that this run learned from have none")
    if text == "random":
        return np.random.default_rng(seed).integers(1, len(names) + 1, count)
    text = Path(text).read_text() if os.path.isfile(text) else text
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))  # some begin alike
    one = rf"({name})(?:\*(\d{{1,6}}))?"
    if not re.fullmatch(rf"(\s*{one}(?=\s|$))+\s*", text):
        raise ValueError(f"--actions {text.strip()!r}: such as {names[0]}*8, of {', '.join(names)}")
    found = [(names.index(name) + 1, int(times or 1)) for name, times in re.findall(one, text)]
    return np.repeat(*np.array(found).T)


def task_of(run: Run, args: argparse.Namespace, clips: list[np.ndarray]) -> Task:
    """What the flags ask for."""
    kind = next((k for k in ("extend", "loop", "connect") if getattr(args, k)), "new")
    L, prompt = sum(clip.shape[1] for clip in clips), args.prompt
    n = args.frames or (args.seconds and max(1, round(args.seconds * args.fps)))
    if not n and args.actions and args.actions != "random":
        n = len(actions_of(run, args.actions, 0, None)) + (kind == "new")
    n = n or prompting.room(run, L, "backward" if args.backward else kind)
    H, W = run.world["shapes"][0]
    H, W = clips[0].shape[2:] if clips else (args.height or H, args.width or W)
    streamed = Path(args.out).suffix in VIDEO and kind in ("new", "extend") and not args.backward
    numbers = (1 if streamed else n) * H * W * args.scale**2 * run.vae.config.colors
    if n > MOST_FRAMES or numbers > MOST_NUMBERS:
        raise ValueError(f"{n} x {H} x {W}: too large for memory; text and --extend stream to .mp4")
    if args.edit:
        return prompting.edit(*clips, 0.6 if args.strength is None else args.strength, prompt)
    if args.image:
        return prompting.animate(*clips, n, prompt)
    if args.extend:
        return prompting.extend(*clips, n, prompt, args.backward)
    if args.loop:
        return prompting.loop(*clips, n, prompt)
    if args.connect:
        return prompting.connect(*clips, n, prompt, args.then)
    return prompting.new(run, (n, H, W), prompt)


def tasks_of(run: Run, args: argparse.Namespace, task: Task) -> list[Task]:
    """The task of each seed: with its actions, and its prompt expanded; says what to."""
    first, tasks = max(1, int(task.known.sum())), [task] * args.count  # the first frame made
    room = len(task.known) - first  # nothing is known of what was done before the others
    for k, seed in enumerate(args.seeds if args.actions else []):
        done = actions_of(run, args.actions, seed, room)
        if len(done) > room:
            raise ValueError(f"--actions: {len(done)} of them, for {room} new frames")
        tasks[k] = replace(task, actions=np.pad(done, (first, room - len(done))))
    tasks = tasks if args.no_expand else prompting.expand(run, tasks, args.seeds)
    for seed, one in zip(args.seeds, tasks, strict=True):
        if said := [x for x in dict.fromkeys(one.prompts) if x not in task.prompts]:
            print(f"seed {seed}: {', then '.join(map(repr, said))}")
    return tasks


def write(run: Run, args: argparse.Namespace, tasks: list[Task]) -> None:
    """Make clips and write them as they come; more than one with a sheet of all."""
    said = {name: getattr(args, name) for name in ("steps", "guidance")}
    said = {name: value for name, value in said.items() if value is not None}
    how, out, seeds = replace(prompting.settings(run, tasks[0]), **said), Path(args.out), args.seeds
    T, H, W = tasks[0].frames or len(tasks[0].known), *tasks[0].clip.shape[2:]
    names = [out.with_stem(f"{out.stem}_{seed}") for seed in seeds] if args.count > 1 else [out]
    times, strips = np.linspace(0, T - 1, min(9, T)).round().astype(int), [[] for _ in seeds]
    short = T <= prompting.room(run, 0, "new")
    with tqdm(total=T * args.count, unit="frame", disable=short or None) as bar:
        for few in (slice(k, k + AT_ONCE) for k in range(0, args.count, AT_ONCE)):
            with ExitStack() as files:
                writers = [files.enter_context(Writer(x, args.fps, args.scale)) for x in names[few]]
                done = 0
                for chunk in prompting.complete(run, tasks[few], seeds[few], how):
                    here = times[(times >= done) & (times < done + chunk.shape[2])] - done
                    for writer, strip, clip in zip(writers, strips[few], chunk, strict=True):
                        writer.write(clip)
                        strip.append(clip[:, here])
                    done += chunk.shape[2]
                    bar.update(chunk.shape[2] * len(chunk))
    if args.count > 1:
        names.append(out.with_name(f"{out.stem}_sheet.png"))
        titles = [f"{args.prompt}, seed {seed}" for seed in seeds]
        media.write_gif(names[-1], [sheet([np.concatenate(x, axis=1) for x in strips], titles)])
    print(f"wrote {', '.join(map(str, names))}: {T} x {H} x {W}")


def main(args: argparse.Namespace) -> None:
    run = prompting.load_run(args.run or prompting.newest_run("tiny"))
    args.fps = args.fps or run.world["fps"]
    for prompt in filter(None, (args.prompt, args.then)):
        if (words := len(run.tokenizer.encode(prompt))) > MOST_WORDS:
            raise ValueError(f"the prompt is {words} tokens long: at most {MOST_WORDS}")
    clips = read_files(run, args)
    if args.caption:
        if not run.language:
            raise ValueError("--caption: this run has no captioner, text.pt")
        if (part := prompting.read_part(run, clips, last=False)) is None:
            raise ValueError("larger than all clips in training: give --height and --width")
        return print(*run.language.caption(part))
    task = task_of(run, args, clips)
    prompting.windows(task, run)  # says here which sizes are possible
    write(run, args, tasks_of(run, args, task))


def command(argv: list[str] | None = None) -> int:
    """Do what the command line says. Returns the exit status; a mistake is one line."""
    args = arguments(argv)
    try:
        main(args)
    except KeyboardInterrupt:
        print(f"sample.py: interrupted; {args.out} has what was made, if anything", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(command())
