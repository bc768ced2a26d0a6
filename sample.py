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

Size. What is made has the size of the grid of noise patches that sampling starts from: lay out more
frames, rows or columns of noise, and a longer, taller or wider clip comes out (the report's
"choosing the output size"). Beyond the trained size, see `level_table` and `roll` in prompting.py.

Given frames come out as the person's own pixels, untouched. What is longer than the longest trained
clip is made in windows, and .mp4 and .webm are on disk as they are made. prompting.py tells how.

If the model was trained on descriptive captions, a short prompt is first expanded into one, which
says also where things start and how fast they move: one for each seed, and printed. --no-expand
leaves it as it is. Where nobody knows how a window sets out, only what lasts is said: in later
windows of a long clip, before a given ending, and between two clips.

A clip is a function of its prompt, size, seed and what was given, alone, in a batch or tomorrow.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clips import MOST_NUMBERS, SUFFIXES, VIDEO, Writer, contact_sheet, read_clip
from clips import filmstrip as filmstrip  # a name as itself: for those who import sample alone
from clips import gallery as gallery
from clips import write_clip as write_clip
from clips import write_gallery as write_gallery
from dit import MOST_WORDS
from prompting import (
    DEFAULT,
    GIVEN,
    SETTINGS,
    Run,
    Settings,
    backward_context,
    fill,
    forward_context,
    latent_grid,
    load_run,
    room,
    seeded,
    stream,
    trained_window,
)
from prompting import bf16 as bf16
from prompting import encode_given as encode_given
from prompting import expand as expand
from prompting import expand_lasting as expand_lasting
from prompting import generate as generate
from prompting import load_vae as load_vae
from prompting import noisy_context as noisy_context
from prompting import to_uint8 as to_uint8
from weights import load_checkpoint as load_checkpoint
from weights import newest_run

# ------------------------------------------------------------------------------------- the tasks
#
# All take lists: N prompts, N seeds, and N clips uint8 [C, T, H, W] of one size; and give N clips.
# Prompts are taken as they are: `told`, further down, is what makes them longer before that.


def animate(
    run: Run,
    prompts: list[str],
    images: list[np.ndarray],
    frames: int,
    seeds: list[int],
    how: Settings = SETTINGS["image"],
) -> list[np.ndarray]:
    """Images [C, 1, H, W] that move: `frames` in all, of which the image is the first."""
    return extend(run, prompts, images, frames - 1, seeds, how=how)


def extend(
    run: Run,
    prompts: list[str],
    clips: list[np.ndarray],
    frames: int,
    seeds: list[int],
    backward: bool = False,
    how: Settings = SETTINGS["extend"],
) -> list[np.ndarray]:
    """Clips that go on for `frames` more, or begin as many earlier. Any lengths."""
    video, part = np.stack(clips), 0
    if not backward:
        size = (video.shape[2] + frames, *video.shape[3:])
        parts = stream(run, prompts, size, seeds, how, video)
        return list(np.concatenate(list(parts), axis=2))
    while frames > 0:  # window by window into the past. Latents can't: theirs would come first
        seen = backward_context(run, video.shape[2])
        new = min(frames, room(run, video.shape[2], "backward"))
        more = -(seen + new - 1) % run.vae.config.time_factor  # the given frames end a latent
        known = np.arange(more + new + seen) >= more + new
        blank = np.zeros_like(video[:, :, :1]).repeat(more + new, axis=2)
        window = np.concatenate([blank, video[:, :, :seen]], axis=2)
        start = int(frames > new)  # more will come before it
        made = fill(run, prompts, window, known, seeded(seeds, part), how, start=start)
        made = made[:, :, more : more + new]
        video, frames, part = np.concatenate([made, video], axis=2), frames - new, part + 1
    return list(video)


def told_beside(
    run: Run,
    prompts: list[str],
    clips: list[np.ndarray],
    frames: int,
    seeds: list[int],
    backward: bool = False,
) -> list[str]:
    """Prompts of clips that are to be extended, expanded beside them. A caption says how a clip
    sets out: where the first window does not begin with the clip, only what stays true is said."""
    L, (H, W) = clips[0].shape[1], clips[0].shape[2:]
    if backward or forward_context(run, L) < L:
        return expand_lasting(run, prompts, seeds, clips, backward)
    return expand(run, prompts, (L + frames, H, W), seeds, clips)


def bridge(
    run: Run,
    prompts: list[str],
    before: list[np.ndarray],
    after: list[np.ndarray],
    frames: int,
    seeds: list[int],
    prompts_end: list[str],
    how: Settings,
) -> np.ndarray:
    """The `frames` between two clips: uint8 [N, C, frames, H, W]. What one window cannot hold is
    first added to both ends, half to each."""
    ft, spare = run.vae.config.time_factor, max(0, frames - room(run, 0, "connect"))
    there, back = spare - spare // 2, spare // 2
    other = [seed + (1 << 48) for seed in seeds]  # not the same noise at both ends
    a = np.stack(extend(run, prompts, before, there, seeds, how=how))
    b = np.stack(extend(run, prompts_end, after, back, other, backward=True, how=how))
    half = -(-trained_window(run) // 2)  # of a window is for the new and for what follows
    gap, seen = frames - spare, forward_context(run, a.shape[2], half)
    # As many frames of what follows as end a latent, and at least a latent of them, if there are.
    rest = (1 - seen - gap) % ft
    last = next((k for k in (ft + rest, rest) if 0 < k <= b.shape[2]), min(ft, b.shape[2]))
    blank = np.zeros_like(a[:, :, :1]).repeat(gap, axis=2)
    window = np.concatenate([a[:, :, a.shape[2] - seen :], blank, b[:, :, :last]], axis=2)
    known = np.ones(window.shape[2], bool)
    known[seen : seen + gap] = False
    if gap:
        ends = None if prompts_end == prompts else prompts_end
        # In training, too, what lies between two ends is a window from later on.
        made = fill(run, prompts, window, known, seeded(seeds, 1), how, ends, start=1)
        blank = made[:, :, ~known]
    new = [a[:, :, a.shape[2] - there :], blank, b[:, :, :back]]
    return np.concatenate(new, axis=2)


def loop(
    run: Run,
    prompts: list[str],
    clips: list[np.ndarray],
    frames: int,
    seeds: list[int],
    how: Settings = SETTINGS["loop"],
) -> list[np.ndarray]:
    """Clips and `frames` more that lead from their end back to their start, to be played in a
    circle."""
    new = bridge(run, prompts, clips, clips, frames, seeds, prompts, how)
    return list(np.concatenate([np.stack(clips), new], axis=2))


def connect(
    run: Run,
    prompts: list[str],
    before: list[np.ndarray],
    after: list[np.ndarray],
    frames: int,
    seeds: list[int],
    prompts_end: list[str] | None = None,
    how: Settings = SETTINGS["connect"],
) -> list[np.ndarray]:
    """From one clip to another, `frames` between; with prompts_end, from one prompt to another."""
    new = bridge(run, prompts, before, after, frames, seeds, prompts_end or prompts, how)
    return list(np.concatenate([np.stack(before), new, np.stack(after)], axis=2))


def edit(
    run: Run,
    prompts: list[str],
    clips: list[np.ndarray],
    strength: float,
    seeds: list[int],
    how: Settings = SETTINGS["edit"],
) -> list[np.ndarray]:
    """SDEdit (Meng et al. 2021): noise a clip, and make it clean again with another prompt. What
    the noise leaves stays. strength: the share of a sampler's way from noise to clean that is gone
    again, as in diffusers: 0 gives the clip back, bit for bit; 1 ignores it."""
    video = np.stack(clips)
    if strength == 0:
        return list(video)
    size = video.shape[2:]
    parts = stream(run, prompts, size, seeds, how, None, video, strength)
    return list(np.concatenate(list(parts), axis=2))


# ------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    say = parser.add_argument
    say("--run", help="a folder that train.py wrote (default: the newest below out/)")
    say("--prompt", required=True, help='what to show; "" for anything')
    say("--no-expand", action="store_true", help="take the prompt as it is, and add nothing")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--image", metavar="FILE", help="animate this image")
    task.add_argument("--extend", metavar="CLIP", help="go on where this clip ends")
    task.add_argument("--loop", metavar="CLIP", help="lead from this clip's end back to its start")
    task.add_argument("--connect", nargs=2, metavar="CLIP", help="lead from one clip to another")
    task.add_argument("--edit", metavar="CLIP", help="make this clip what the prompt says (SDEdit)")
    say("--backward", action="store_true", help="with --extend: what came before")
    say("--then", metavar="PROMPT", help="with --connect: the prompt that it ends with")
    say("--strength", type=float, help="with --edit: 0 keeps the clip, 1 ignores it (default 0.6)")
    say("--frames", type=int, help="how long; with --extend, --loop and --connect how many to add; "
        "1 makes an image (default: what the run was trained on)")  # fmt: skip
    say("--seconds", type=float, help="the same, in seconds")
    say("--height", type=int, help="H in pixels (default: the given clip's, or as trained)")
    say("--width", type=int, help="W in pixels; a given clip is resized to both")
    say(
        "--fit",
        choices=["crop", "pad"],
        default="crop",
        help="how given clips get a size that is possible",
    )
    say("--count", type=int, default=1, help="how many clips, with seeds from --seed on")
    say("--seed", type=int, default=0)
    given, new = GIVEN.steps, DEFAULT.steps
    ways = f"default: ddpm, {given} steps, for extend, loop and connect; else ddim, {new}"
    say("--steps", type=int, help=f"sampling steps ({ways})")
    strong = ", ".join(f"{how.guidance:g} for {task}" for task, how in SETTINGS.items())
    say("--guidance", type=float, help=f"1: none (default: {strong})")
    say("--sampler", choices=["ddim", "ddpm"], help="ddpm draws fresh noise in each step")
    say("--fps", type=int, help="frames a second (default: as trained, 10 for moving digits)")
    say(
        "--scale",
        type=int,
        default=1,
        help="pixels of the file for each pixel of the clip (default: 1)",
    )
    say("--out", default="sample.gif", help="a name ending in " + " ".join(SUFFIXES))
    args = parser.parse_args(argv)
    problem = mistake(args)
    if problem:
        parser.error(problem)
    return args


def mistake(args: argparse.Namespace) -> str | None:
    """What is wrong with the flags, if anything, before any work is done."""
    if Path(args.out).suffix not in SUFFIXES:
        return f"--out {args.out}: write to a name that ends in one of {' '.join(SUFFIXES)}"
    for flag, needs in (("backward", "extend"), ("then", "connect"), ("strength", "edit")):
        if getattr(args, flag) not in (None, False) and not getattr(args, needs):
            return f"--{flag.replace('_', '-')} is for --{needs}"
    if args.edit and (args.frames or args.seconds):
        return "--edit keeps the length of the clip: leave --frames and --seconds out"
    if args.frames is not None and args.seconds is not None:
        return "--frames or --seconds, not both"
    most = {"frames": 10**9, "height": 10**5, "width": 10**5}
    most |= {"count": 10_000, "steps": 10_000, "fps": 1000, "scale": 64}
    for name, limit in most.items():
        if (value := getattr(args, name)) is not None and not 1 <= value <= limit:
            return f"--{name} {value}: from 1 to {limit}"
    if args.seconds is not None and not 0 < args.seconds < 1e7:
        return f"--seconds {args.seconds}: more than 0"
    if args.strength is not None and not 0 <= args.strength <= 1:
        return f"--strength {args.strength}: from 0 to 1"
    if args.guidance is not None and not abs(args.guidance) < 1e6:
        return f"--guidance {args.guidance}: a number such as 2"
    if not 0 <= args.seed < 2**32 - args.count:
        return f"--seed {args.seed}: 0 or more, and less than 2^32"
    if given_files(args) and (args.height is None) != (args.width is None):
        return "--height and --width: both, to resize what is given, or neither"
    return None


def given_files(args: argparse.Namespace) -> list[str]:
    one = [path for path in (args.image, args.extend, args.loop, args.edit) if path]
    return one or args.connect or []


def read_given(run: Run, args: argparse.Namespace) -> list[np.ndarray]:
    """The files that were given, as clips [C, T, H, W] of one size; says what was done to them."""
    sides = run.vae.config.space_factor * run.config["patch"]
    files, clips = given_files(args), []
    size = (args.height, args.width) if files and args.height else None
    if size:
        latent_grid(run, 1, *size)
    for path in files:
        most = 1 if args.image else None
        clip, done = read_clip(path, run.vae.config.colors, sides, size, args.fit, most)
        size = clip.shape[2:]  # of both that are to be connected
        clips.append(clip)
        print(done)
    return clips


def task_of(
    run: Run, args: argparse.Namespace, clips: list[np.ndarray]
) -> tuple[tuple[int, int, int], Callable[[list, list, list], Iterator[np.ndarray]]]:
    """The size (T, H, W) of what is asked for, and what makes it: prompts, those that it ends with,
    seeds -> uint8 [N, C, n, H, W] ..."""
    task = next((name for name in SETTINGS if getattr(args, name, None)), "new")
    how = SETTINGS[task]
    eta = how.eta if args.sampler is None else float(args.sampler == "ddpm")
    guidance = how.guidance if args.guidance is None else args.guidance
    how = Settings(how.steps if args.steps is None else args.steps, guidance, eta)
    kinds = ("extend", "loop", "connect")
    kind = next((k for k in kinds if getattr(args, k)), "new")
    kind = "backward" if args.backward else kind
    L = sum(clip.shape[1] for clip in clips)
    frames = args.frames or (args.seconds and max(1, round(args.seconds * args.fps)))
    frames = frames or room(run, L, kind)
    shape = clips[0].shape[2:] if clips else run.world["shapes"][0]
    H, W = args.height or shape[0], args.width or shape[1]
    latent_grid(run, 1, H, W)
    T = L if args.edit else frames if kind == "new" else L + frames
    streamed = Path(args.out).suffix in VIDEO and kind in ("new", "extend")
    numbers = (1 if streamed else T) * H * W * args.scale**2 * run.vae.config.colors
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"{T} x {H} x {W}: too large to be made in memory; text and --extend stream to .mp4"
        )

    def make(prompts: list[str], ends: list[str], seeds: list[int]) -> Iterator[np.ndarray]:
        given = [[clip] * len(seeds) for clip in clips]
        if kind == "backward":
            yield np.stack(extend(run, prompts, *given, frames, seeds, True, how))
        elif kind == "loop":
            yield np.stack(loop(run, prompts, *given, frames, seeds, how))
        elif kind == "connect":
            yield np.stack(connect(run, prompts, *given, frames, seeds, ends, how))
        elif args.edit and args.strength == 0:
            yield np.stack(given[0])
        else:
            video = np.stack(given[0]) if given else None
            source, begin = (video, None) if args.edit else (None, video)
            strength = 0.6 if args.strength is None else args.strength
            strength = strength if args.edit else 1.0
            yield from stream(run, prompts, (T, H, W), seeds, how, begin, source, strength)

    return (T, H, W), make


def told(
    run: Run,
    args: argparse.Namespace,
    size: tuple[int, int, int],
    seeds: list[int],
    clips: list[np.ndarray],
) -> tuple[list[str], list[str]]:
    """The prompt, and the one that the clip ends with, as each seed expands them, beside the clips
    that they go with, if there are any; says what they became."""
    prompts, given = [args.prompt] * len(seeds), [[clip] * len(seeds) for clip in clips]
    ends = prompts if args.then is None else [args.then] * len(seeds)
    if args.no_expand:
        return prompts, ends
    if args.connect:
        first = expand_lasting(run, prompts, seeds, given[0])
        last = expand_lasting(run, ends, seeds, given[1], backward=True)
    elif args.loop:
        first = last = expand_lasting(run, prompts, seeds, given[0])
    elif args.extend:
        frames = size[0] - clips[0].shape[1]
        first = last = told_beside(run, prompts, given[0], frames, seeds, args.backward)
    else:
        first = last = expand(run, prompts, size, seeds, given[0] if clips else None)
    for seed, *said in zip(seeds, first, last, strict=True):
        said = [x for x in dict.fromkeys(said) if x not in (args.prompt, args.then)]
        if said:
            print(f"seed {seed}: {', then '.join(map(repr, said))}")
    return first, last


def main(args: argparse.Namespace) -> None:
    run = load_run(args.run or newest_run())
    args.fps = args.fps or run.config.get("fps", 10)
    for prompt in filter(None, (args.prompt, args.then)):
        if (words := len(run.tokenizer.encode(prompt))) > MOST_WORDS:
            raise ValueError(f"the prompt is {words} tokens long: at most {MOST_WORDS}")
    clips = read_given(run, args)
    (T, H, W), make = task_of(run, args, clips)
    seeds = list(range(args.seed, args.seed + args.count))
    prompts, ends = told(run, args, (T, H, W), seeds, clips)
    out, at_once = Path(args.out), 16
    names = [out] if args.count == 1 else [out.with_stem(f"{out.stem}_{seed}") for seed in seeds]
    shown = np.linspace(0, T - 1, min(9, T)).round().astype(int)  # on the contact sheet
    picked = [[] for _ in seeds]
    bar = tqdm(total=T * len(seeds), unit="frame", disable=T <= room(run, 0, "new") or None)
    with bar:
        for k in range(0, len(seeds), at_once):
            done = 0
            with ExitStack() as files:
                few = names[k : k + at_once]
                writers = [files.enter_context(Writer(n, args.fps, args.scale)) for n in few]
                for chunk in make(*(x[k : k + at_once] for x in (prompts, ends, seeds))):
                    here = shown[(shown >= done) & (shown < done + chunk.shape[2])] - done
                    for j, clip in enumerate(chunk):
                        writers[j].write(clip)
                        picked[k + j].append(clip[:, here])
                    done += chunk.shape[2]
                    bar.update(chunk.shape[2] * len(chunk))
    if args.count > 1:
        sheet = out.with_name(f"{out.stem}_sheet.png")
        strips = [np.concatenate(parts, axis=1) for parts in picked]
        contact_sheet(strips, [f"{args.prompt}, seed {seed}" for seed in seeds]).save(sheet)
        names.append(sheet)
    print(f"wrote {', '.join(map(str, names))}: {T} x {H} x {W}")


def command(argv: list[str] | None = None) -> int:
    """Do what the command line says. Returns the exit status; a mistake is one line."""
    args = arguments(argv)
    try:
        main(args)
    except KeyboardInterrupt:
        print(
            f"sample.py: interrupted; {args.out} holds what was made so far, if anything",
            file=sys.stderr,
        )
        return 130
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(command())
