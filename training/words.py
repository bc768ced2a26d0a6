"""Words: what came with clips, what a language model writes from it, and what is learned.

The problem. Full captions make a video model follow its prompts better, and nobody has them: what
comes with clips is short, and often lacks what matters.

The idea (Betker et al. 2023, DALL-E 3, sections 2 and 3: re-captioning). From the few clips with a
full caption, a language model learns to caption what it sees, to expand a brief ("a 7"), and to do
both together. It then captions the other clips, with their briefs in mind, once, in a file that a
person can read and edit. Where clips have no briefs, as in a folder of videos, it learns only to
caption.

In reading order: whom it learns from; its lessons; what it writes; the words of each item.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Clip, World, hashed_uniform
from language import LONGEST, Language, Tokenizer, asked
from training.batches import Kinds, kinds, same_size
from training.items import FARTHEST, Items
from training.loop import STOP
from training.processes import barrier, gathered, own_parts, rank, ranks
from vae import VAE, to_float
from worlds.folder import parse_lines

SHORT = 0.1  # share of the clips that keep their brief, so that short prompts work, too
VOCABULARY = 4096  # ids, at most

# ------------------------------------------------------------------------------ whom it learns from


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
def make_tokenizer(world: World) -> Tokenizer:
    """From what came with a few thousand clips, and the sizes that the expander reads."""
    texts, random = [], np.random.default_rng(0)
    for numbers in (np.arange(len(world)), labelled(world)[0]):
        some = random.permutation(numbers)[:2500]
        for image in (False, True) if len(some) else ():
            clips, sizes = world.told(some, image), np.unique(world.sizes(some, image), axis=0)
            texts += [x for y in clips for x in (y.brief, y.caption, world.lasting(y.caption))]
            if any(clip.brief for clip in clips):
                texts += [asked("", x, later) for x in sizes for later in (False, True)] * 10
    return Tokenizer.from_captions(texts, VOCABULARY)


# -------------------------------------------------------------------------------------- its lessons


def draw_lessons(world: World, c, step: int) -> tuple[list[tuple], bool]:
    """The lessons of a step, on all processes: (text to write, prompt or "", what is seen, share of
    it), and whether clips are seen as images. What is seen is (number, from which frame) or None.

    Clips of one size; a third of them again, beside their briefs; briefs of other clips, of any
    size. Beside a brief, half of the time all of the clip is seen, as when captions are written,
    else only its start, as users give it. Half of these are windows from later on; of the others, a
    quarter of the briefs ask for something else than is seen, as an edit does."""
    (numbers, of), random = labelled(world), np.random.default_rng([c.seed, 10, step])
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


# ----------------------------------------------------------------------------------- what it writes


def words_of(world: World, items: Items) -> list[Clip]:
    """What came with each item's clip."""
    words = [None] * len(items)
    for image in (False, True):
        every = np.flatnonzero((items["image"] > 0) == image)
        for pick in (every[k : k + 1000] for k in range(0, len(every), 1000)):
            said = world.told(items["number"][pick], image, items["later"][pick])
            for k, clip in zip(pick, said, strict=True):
                words[k] = replace(clip, facts=None)
    return words


def keeps_brief(c, items: Items, words: list[Clip]) -> np.ndarray:
    """Which items are learned with their brief: bool [n]."""
    short = hashed_uniform(c.seed + 2**34, items["number"], 1)[:, 0] < SHORT
    return (short | (c.captions == "written")) & np.array([bool(clip.brief) for clip in words])


def missing(c, items: Items, words: list[Clip]) -> list[int]:
    """The items whose caption is for the captioner to write."""
    if c.captions == "written":
        return []
    brief = keeps_brief(c, items, words)
    return [k for k, clip in enumerate(words) if not clip.caption and not brief[k]]


def read_lines(path: Path) -> dict[str, str]:
    """{name: caption} of a run's captions.jsonl; null is none, and is written again."""
    return {name: said for name, said in parse_lines(path) if said is not None}


def end_line(path: Path) -> None:
    """A full disk leaves half a line at the end, which is to be written again. An editor may leave
    a whole one without a newline."""
    *_, last = path.read_bytes().rpartition(b"\n")
    try:
        json.loads(last or b"0")
    except ValueError:
        os.truncate(path, path.stat().st_size - len(last))
    else:
        with open(path, "ab") as file:
            file.write(b"\n" if last else b"")


def write_captions(language: Language, c, items: Items, words: list[Clip]) -> None:
    """What the captioner says of all that lacks a caption: a line of captions.jsonl for every name
    that has none. Items with one name, a file's, share the caption of the first of its clips, or of
    its image."""
    path = c.folder / "captions.jsonl"
    if rank() == 0 and path.exists():
        end_line(path)
    barrier()
    listed, places, written, at_once = read_lines(path), {}, 0, 256 * ranks()
    for k in sorted(missing(c, items, words), key=lambda k: (words[k].name, items["image"][k])):
        places.setdefault(words[k].name, k)
    todo = [k for name, k in places.items() if name not in listed]
    grids = np.column_stack([items[name] for name in "thw"]).tolist()
    todo.sort(key=lambda k: grids[k])  # similar ones together
    for first in tqdm(range(0, len(todo), at_once), desc="captions", disable=rank() > 0):
        mine, latents, told = todo[first + rank() : first + at_once : ranks()], [], []
        for k in mine:
            item, (t, h, w) = items.read(k), grids[k]
            latents.append(item["whole"][:, :t])  # from the clip's own start, also of later windows
            size = (1 + (t - 1) * c.time_factor, h * c.space_factor, w * c.space_factor)
            told.append(words[k].brief and asked(words[k].brief, size))
        said = zip(mine, language.caption(latents, told), strict=True)
        lines = [json.dumps({"file": words[k].name, "caption": text}, ensure_ascii=False) + "\n"
                 for k, text in said]  # fmt: skip
        lines = sum(gathered(lines), [])
        written += len(lines)
        if rank() == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        if any(gathered(bool(STOP))):  # all wait here: what is written can be read
            raise SystemExit(f"stopped after {written} captions; the same command continues")
    if written and rank() == 0:
        print(f"wrote {written} captions to {path}: read and edit them as you like", flush=True)


# --------------------------------------------------------------------------- the words of each item


def captions_of(world: World, c, items: Items, words: list[Clip]) -> list[str]:
    """What each item is learned with. A caption says how a clip starts and what it then does. Of a
    window from later on, or one that leads to a known ending, nobody knows that when sampling: it
    comes with what lasts of its caption."""
    path, brief = c.folder / "captions.jsonl", keeps_brief(c, items, words)
    written, captions, lost = read_lines(path), [], 0
    for k, (clip, lasts) in enumerate(zip(words, items["lasts"], strict=True)):
        said = clip.brief if brief[k] else clip.caption or written.get(clip.name)
        lost += said is None
        captions.append(world.lasting(said or "") if lasts else said or "")
    if lost and (c.folder / "text.pt").exists() and c.captions != "written":
        raise ValueError(f"{path} lacks {lost} captions to learn from: --stage text writes them")
    return captions
