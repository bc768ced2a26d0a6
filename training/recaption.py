"""Re-captioning: a language model learns from the few full captions, and writes all the others.

The problem. Full captions make a video model follow its prompts better, and nobody has them: what
comes with clips is short, and often lacks what matters.

The idea (Betker et al. 2023, DALL-E 3, sections 2 and 3). From the few clips with a full caption, a
language model learns to caption what it sees, to expand a brief ("a 7"), and to do both together.
It then captions the other clips, with their briefs in mind, once, in a file that a person can read
and edit. Where clips have no briefs, as in a folder of videos, it learns only to caption.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import World
from language import LONGEST, Language, Tokenizer, asked
from training.batches import Kinds, kinds, same_size
from training.items import FARTHEST
from training.processes import barrier, gathered, own_parts, rank, ranks
from vae import VAE, to_float
from worlds.folder import parse_lines


@cache
def labelled(world: World) -> tuple[np.ndarray, dict[bool, Kinds]]:
    """The numbers [n] of clips to learn from; their sizes as they are, and as images."""
    i = np.arange(len(world))
    i = i[world.labelled(i) & ~world.held_back(i)]
    return i, {image: kinds(world.sizes(i, image)) for image in (False, True)}


def pays(world: World) -> bool:
    """Whether a captioner learns from enough clips, for enough others: at least 20 files with a
    caption and 20 without, and a tenth of all; or, where clips have briefs, to expand prompts."""
    if world.briefs:
        return True
    said = {clip.name: bool(clip.caption) for clip in world.told(np.arange(len(world)))}
    have, enough = sum(said.values()), max(20, len(said) // 10)
    pays = min(have, len(said) - have) >= enough
    if 0 < have < len(said) and not pays and rank() == 0:
        print(f"{have} of {len(said)} files have captions: {enough} with and {enough} without are "
              "worth a captioner; --captions recaptioned trains one all the same")  # fmt: skip
    return pays


@cache
def make_tokenizer(world: World, size: int = 4096) -> Tokenizer:
    """From what came with a few thousand clips, and the sizes that the expander reads."""
    texts, random = [], np.random.default_rng(0)
    for numbers in (np.arange(len(world)), labelled(world)[0]):
        some = random.permutation(numbers)[:2500]
        for image in (False, True) if len(some) else ():
            clips, sizes = world.told(some, image), np.unique(world.sizes(some, image), axis=0)
            texts += [x for y in clips for x in (y.brief, y.caption, world.lasting(y.caption))]
            if any(clip.brief for clip in clips):
                texts += [asked("", x, later) for x in sizes for later in (False, True)] * 10
    return Tokenizer.from_captions(texts, size)


def draw_lessons(world: World, c, step: int) -> tuple[list[tuple], bool]:
    """The lessons of a step, on all processes: (text to write, prompt or "", what is seen, share of
    it), and whether clips are seen as images. What is seen is (number, from which frame) or None.

    Clips of one size; a third of them again, beside their briefs; briefs of other clips, of any
    size. Beside a brief, half of the time all of the clip is seen, as when captions are written,
    else only its start, as users give it. Half of these are windows from later on; of the others, a
    quarter of the briefs ask for something else than is seen, as an edit does."""
    (numbers, of), random = labelled(world), np.random.default_rng([c.seed, 10, step])
    if not len(numbers):
        raise ValueError("not one clip has a caption to learn from")
    image = step < 0.25 * c.text_steps or step % 5 == 0  # small images teach digits sooner
    largest = int(of[False][0].prod(1).max())
    size, pick = same_size(of[image], step, c.seed, c.text_batch, largest)
    i = numbers[pick]
    clips, again = world.told(i, image), i[::3]
    lessons = [(x.caption, "", (k, 0), 1.0) for k, x in zip(i.tolist(), clips, strict=True)]
    u = random.random((len(again), 6))
    share = np.where(u[:, 2] < 0.5, u[:, 3], 1.0)
    later = c.time_factor * (1 + (u[:, 1] * FARTHEST).astype(int))  # frames
    later *= (u[:, 0] < 0.5) & (size[0] > 1) & (later + size[0] <= world.frames(again))
    windows = world.told(again, image, later)
    for k, (seen, clip, window) in enumerate(zip(again.tolist(), clips[::3], windows, strict=True)):
        if clip.brief and not later[k] and u[k, 4] < 0.25:
            clip = window = world.otherwise(clip, u[k, 5]) or clip
        prompt = clip.brief and asked(clip.brief, size, bool(later[k]))
        lessons += [(window.caption, prompt, (seen, int(later[k])), share[k])] if prompt else []
    others = random.choice(numbers, 2 * c.text_batch)
    still = random.random(len(others)) < c.images
    for kind, some in ((False, others[~still]), (True, others[still])):
        each = zip(world.told(some, kind), world.sizes(some, kind).tolist(), strict=True)
        lessons += [(x.caption, asked(x.brief, of), None, 1.0) for x, of in each if x.brief]
    return lessons, image


@dataclass
class Part:
    lessons: list[tuple]  # as `draw_lessons` says, texts and prompts as ids
    pixels: dict[tuple, np.ndarray]  # of what is seen, uint8 [C, T, H, W] each
    tokens: int  # to be written in the step, on all processes


def read_lessons(world: World, tokenizer: Tokenizer, c, step: int) -> list[Part]:
    """This process's parts of a step. A worker may make them ahead."""
    drawn, image = draw_lessons(world, c, step)
    lessons = [(tokenizer.encode(text)[: LONGEST - 1], tokenizer.encode(prompt) if prompt else [],
                *seen) for text, prompt, *seen in drawn]  # fmt: skip
    tokens, parts = sum(len(text) + 1 for text, *_ in lessons), []  # with each END
    own, many = own_parts(c.accumulate)
    for part in own:
        mine = lessons[part::many]
        seen = sorted({lesson[2] for lesson in mine if lesson[2]})
        i, later = np.array(seen, int).reshape(-1, 2).T
        clips = world.clips(i, image, later) if seen else []
        pixels = {k: x.pixels for k, x in zip(seen, clips, strict=True) if x}
        parts.append(Part(mine, pixels, tokens))
    return parts


@torch.no_grad()
def encoded(vae: VAE, part: Part) -> tuple[list[tuple[list, list, list]], int]:
    """What the language model's `forward` takes, without clips that could not be read; tokens."""
    latents, kinds = {}, {}
    if part.pixels:  # of one size: [b, C, T, H, W] -> [Z, t, h, w] each
        video = to_float(list(part.pixels.values())).to(vae.mean.device)
        latents = dict(zip(part.pixels, vae.encode(video), strict=True))
    for text, prompt, seen, share in part.lessons:
        if seen is None or seen in latents:
            clips, prompts, texts = kinds.setdefault((seen is None, not prompt), ([], [], []))
            clips += [z[:, : 1 + int(share * z.shape[1])] for z in (latents.get(seen),) if seen]
            prompts += [prompt] if prompt else []
            texts.append(text)
    return list(kinds.values()), part.tokens


def read_lines(path: Path) -> dict[str, str]:
    """{name: caption} of a run's captions.jsonl; nothing where there is no such file."""
    captions = dict(parse_lines(path))
    if None in captions.values():
        raise ValueError(f"{path}: a caption is null: without its line, it is written again")
    return captions


def cut_torn_line(path: Path) -> None:
    """A full disk leaves half a line at the end, which is to be written again. An editor may leave
    a whole one without a newline."""
    *_, last = path.read_bytes().rpartition(b"\n")
    try:
        json.loads(last or b"0")
    except ValueError:
        os.truncate(path, path.stat().st_size - len(last))


@dataclass
class Wanted:
    name: str  # what stands for a clip in captions.jsonl
    size: tuple[int, int, int]  # of the clip: similar ones are written together
    told: str = ""  # a prompt, as `asked` makes it


def write_captions(language: Language, wanted: list[Wanted], see: Callable[[list[int]], list],
                   path: Path, stopping: Callable[[], bool]) -> int:  # fmt: skip
    """A line of captions.jsonl for every name that has none, and how many lines that were. Where a
    name is wanted twice, the last one counts. see: places in `wanted` -> latents [Z, t, h, w], or
    None; stopping: whether to stop early."""
    if rank() == 0 and path.exists():
        cut_torn_line(path)
    barrier()
    listed, written, at_once = read_lines(path), 0, 256 * ranks()
    places = {one.name: k for k, one in enumerate(wanted) if one.name not in listed}
    todo = sorted(places.values(), key=lambda k: wanted[k].size)
    for first in tqdm(range(0, len(todo), at_once), desc="captions", disable=rank() > 0):
        mine = todo[first + rank() : first + at_once : ranks()]
        seen = [(wanted[k], z) for k, z in zip(mine, see(mine), strict=True) if z is not None]
        said = language.caption([z for _, z in seen], [one.told for one, _ in seen])
        lines = [json.dumps({"file": one.name, "caption": text}, ensure_ascii=False) + "\n"
                 for (one, _), text in zip(seen, said, strict=True)]  # fmt: skip
        lines = sum(gathered(lines), [])
        written += len(lines)
        if rank() == 0:
            torn = path.exists() and not path.read_bytes().endswith(b"\n")  # an editor's last line
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * torn + "".join(lines))
        if any(gathered(stopping())):  # all wait here: what is written can be read
            raise SystemExit(f"stopped after {written} captions; the same command continues")
    return written
