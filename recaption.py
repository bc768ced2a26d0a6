"""Re-captioning: few clips have good captions; a captioner learns from those and writes the rest.

The problem. Descriptive captions make a video model follow its prompts better, and nobody has them:
what comes with clips is short, and often lacks what matters.

The idea (Betker et al. 2023, DALL-E 3, sections 2 and 3; the report's "language understanding").

    clips         what somebody wrote                  what the diffusion transformer learns from
    a tenth       a descriptive caption, and a short   the descriptive caption
    all others    a short one: "a 7", "digit moving"   what the captioner sees, with that in mind
    a share                                            the short one, so that it works, too

The language model (language.py) learns from the labelled tenth only, to write the descriptive
caption: from latents as captioner, from the short one as expander, and from both. Which clips are
labelled and what is missing in a short caption are functions of the clip's number, as all else in
data.py. Then it captions the training set, once, before the transformer sees any of it: lines of a
file that a person can read and edit (batches.py says which clips need one).

Of own clips (folder.py), those that have a caption teach, and it writes one for each of the others.

Run `python recaption.py` for clips, what was written of them, and the pairs to learn from.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import data
from folder import Folder, read_lines
from language import Language, asked
from loop import STOP, gathered, rank, ranks
from prompting import to_float
from text import Tokenizer
from vae import VAE


def make_tokenizer(world: data.World, share: float, size: int = 512) -> Tokenizer:
    """From the captions that are known, and the sizes that the expander is told."""
    index = labelled_clips(world, 0, 5000, share)
    sizes = world.size(index)
    facts = world.all_facts(index, sizes)
    captions = [data.descriptive_caption(fact) for fact in facts]
    short = world.short_captions(index, facts) + [data.short_caption(fact) for fact in facts]
    kinds = np.unique(sizes, axis=0).tolist()
    told = [asked("", size, later) for size in kinds for later in (False, True)]
    lasting = list(map(data.lasting_caption, captions))
    return Tokenizer.from_captions(captions + short + lasting + told * 10, size)


def labelled_clips(world: data.World, batch: int, count: int, share: float) -> np.ndarray:
    """The numbers of `count` labelled clips, others for each batch."""
    span = int(2 * count / share) + 100  # more than enough
    index = batch * span + np.arange(span)
    return index[world.labelled(index, share)][:count]


def told_and_written(
    world: data.World,
    tokenizer: Tokenizer,
    index: np.ndarray,
    sizes: np.ndarray,
    later: np.ndarray | int = 0,
    other: np.ndarray | tuple = (),
) -> tuple[list[list[int]], list[list[int]]]:
    """What the language model is told of clips [n] of sizes [n, 3], and what it should write where
    it sees them `later` frames [n] on. other [n]: where it is not 0, another digit is asked for
    than is seen, as in an edit, and what is asked for is to be written."""
    facts, written = world.all_facts(index, sizes), world.all_facts(index, sizes, later)
    short = world.short_captions(index, facts)
    for k in np.flatnonzero(other):
        for digit in facts[k]["digits"] + written[k]["digits"]:
            digit["digit"] = (digit["digit"] + int(other[k])) % 10
        short[k] = data.short_caption(facts[k])
    told = map(asked, short, sizes.tolist(), (np.broadcast_to(later, len(index)) > 0).tolist())
    answers = map(data.descriptive_caption, written)
    return [tokenizer.encode(x) for x in told], [tokenizer.encode(x) for x in answers]


def name_of(world: data.World, index: int, size: np.ndarray) -> str:
    """What stands for "file" in captions.jsonl. A clip is learned from as an image, too."""
    return f"{'clip' if size[0] > 1 else 'image'} {index} of seed {world.seed}"


def encoded(
    vae: VAE,
    world: data.World,
    index: np.ndarray,
    size: np.ndarray,
    later: np.ndarray | int = 0,
) -> list[Tensor]:
    """Latents [Z, t, h, w] of clips [n] of sizes [n, 3], from `later` frames [n] on, those of one
    size at once."""
    latents, later = [None] * len(index), np.broadcast_to(later, len(index))
    for one in np.unique(size, axis=0):
        group = np.flatnonzero((size == one).all(1))
        first = later[group]
        clips = world.clips(index[group], one + [first.max(), 0, 0])[0]
        clips = [clip[:, k : k + one[0]] for clip, k in zip(clips, first, strict=True)]
        video = to_float(clips).to(vae.mean.device)  # [b, C, T, H, W]
        for k, latent in zip(group, vae.encode(video), strict=True):
            latents[k] = latent
    return latents


# --------------------------------------------------------------------------- what is to be written


@torch.no_grad()
def write_lines(path: Path, todo: list[int], say: Callable, at_once: int) -> int:
    """A line of captions.jsonl for each clip of `todo`, many at once: say(numbers) -> (name,
    caption) of each that can be read. Lines that are there stay as they are: edited ones, and those
    of a run that was stopped. Returns how many were added, by all processes together."""
    written, steps = 0, range(0, len(todo), at_once * ranks())
    for first in tqdm(steps, desc="captions", disable=rank() > 0):
        mine = todo[first : first + at_once * ranks()][rank() :: ranks()]
        lines = [
            json.dumps({"file": name, "caption": said}, ensure_ascii=False)
            for name, said in say(mine)
        ]
        lines = sum(gathered(lines), [])
        written += len(lines)
        if rank() == 0:
            torn = path.exists() and not path.read_bytes().endswith(b"\n")  # an editor's last line
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * torn + "".join(line + "\n" for line in lines))
        if any(gathered(len(STOP))):  # all wait here: what is written can be read
            raise SystemExit(f"stopped after {written} captions; the same command continues")
    return written


def write_missing(language: Language, vae: VAE, world: Folder, path: Path) -> int:
    """Captions of own files that have none, neither of their own nor in `path`."""
    listed = read_lines(path)
    todo = [k for k in world.missing() if world.entries[k]["file"] not in listed]

    def say(mine: list[int]) -> Iterator[tuple[str, str]]:
        clips = [(k, x) for k, x in zip(mine, world.middle(mine), strict=True)
                 if not isinstance(x, str)]  # fmt: skip
        latents = [vae.encode(to_float(x[None]).to(vae.mean.device))[0] for _, x in clips]
        names = [world.entries[k]["file"] for k, _ in clips]
        return zip(names, language.caption(latents), strict=True)

    return write_lines(path, todo, say, 64)


def write_world(
    language: Language, vae: VAE, world: data.World, path: Path, index: np.ndarray, size: np.ndarray
) -> int:
    """Captions of clips [n] of sizes [n, 3] of the world, of what is seen and what somebody
    wrote."""
    listed, order = read_lines(path), np.lexsort(size.T)  # of like size together: little is padded
    names = {name_of(world, index[k], size[k]): k for k in order.tolist()}  # each once
    todo = [k for name, k in names.items() if name not in listed]

    def say(mine: list[int]) -> Iterator[tuple[str, str]]:
        some, sizes = index[mine], size[mine]
        short = world.short_captions(some, world.all_facts(some, sizes))
        told = list(map(asked, short, sizes.tolist()))
        said = language.caption(encoded(vae, world, some, sizes), told)
        named = [name_of(world, *of) for of in zip(some.tolist(), sizes, strict=True)]
        return zip(named, said, strict=True)

    return write_lines(path, todo, say, 256)


# --------------------------------------------------------------------------------------------- demo


def main() -> None:
    sheet = data.load_digits(Path(__file__).parent / "digits.png")
    world = data.World(data.WorldConfig(), *data.split(*sheet, held_out=False))
    index = np.arange(10)
    clips, facts = world.clips(index)
    short, known = world.short_captions(index, facts), world.labelled(index, 0.3)
    page = Image.new("L", (900, 10 * 56), 24)
    pen = ImageDraw.Draw(page)
    for k, (clip, fact) in enumerate(zip(clips, facts, strict=True)):
        said = data.descriptive_caption(fact) if known[k] else "(for the captioner to write)"
        print(f"clip {k}: {short[k]!r} | {said}")
        T, H, W = clip.shape[1:]
        for j, t in enumerate(sorted({0, T // 2, T - 1})):
            page.paste(Image.fromarray(clip[0, t]), (6 + j * (W + 4), 4 + 56 * k))
        pen.text((170, 8 + 56 * k), f"written: {short[k]}", fill=150)
        pen.text((170, 26 + 56 * k), said, fill=255 if known[k] else 100)
    tokenizer = make_tokenizer(world, share=0.3)
    index = labelled_clips(world, batch=0, count=3, share=0.3)
    told, answers = told_and_written(world, tokenizer, index, world.size(index))
    for a, b in zip(told, answers, strict=True):
        print(f"the expander learns: {tokenizer.decode(a)!r} -> {tokenizer.decode(b)!r}")
    page.save("recaption_demo.png")
    print("wrote recaption_demo.png")


if __name__ == "__main__":
    main()
