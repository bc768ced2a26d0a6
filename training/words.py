"""The words of each item: what came with its clip, what the captioner writes, what is learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data import Clip, World, hashed_uniform
from language import Language, asked
from training.items import Items
from training.loop import STOP
from training.processes import rank
from training.recaption import Wanted, read_lines, write_captions

SHORT = 0.1  # share of the clips that keep their brief, so that short prompts work, too


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


def caption_items(language: Language, c, items: Items, words: list[Clip], scale: int) -> None:
    """Write captions.jsonl: what the captioner says of all that lacks a caption. scale: pixels a
    latent, as prompts tell sizes in pixels."""
    todo, wanted = missing(c, items, words), []
    # Of items with one name, a file's, the last one counts: the first of its clips, or its image.
    todo.sort(key=lambda k: (words[k].name, items["image"][k]))
    todo.reverse()
    for k in todo:
        t, h, w = (int(items[name][k]) for name in "thw")
        size = (1 + (t - 1) * items.time_factor, h * scale, w * scale)
        wanted.append(Wanted(words[k].name, size, words[k].brief and asked(words[k].brief, size)))

    def see(places: list[int]) -> list:
        """The clip from its own start, also where its item is a window from later on."""
        read = (items.read(todo[k]) for k in places)
        return [item["whole"][:, : item["latent"].shape[1]] for item in read]

    path = Path(c.folder, "captions.jsonl")
    written = write_captions(language, wanted, see, path, lambda: bool(STOP))
    if written and rank() == 0:
        print(f"wrote {written} captions to {path}: read and edit them as you like", flush=True)


def captions_of(world: World, c, items: Items, words: list[Clip]) -> list[str]:
    """What each item is learned with. A caption says how a clip starts and what it then does. Of a
    window from later on, or one that leads to a known ending, nobody knows that when sampling: it
    comes with what lasts of its caption."""
    brief = keeps_brief(c, items, words)
    written = read_lines(c.folder / "captions.jsonl")
    captions, lost = [], 0
    for k, (clip, lasts) in enumerate(zip(words, items["lasts"], strict=True)):
        said = clip.brief if brief[k] else clip.caption or written.get(clip.name)
        lost += said is None
        captions.append(world.lasting(said or "") if lasts else said or "")
    if lost and (c.folder / "text.pt").exists() and c.captions != "written":
        path = c.folder / "captions.jsonl"
        raise ValueError(f"{path} lacks {lost} captions to learn from: --stage text writes them")
    return captions
