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
data.py.

Of own clips (folder.py), those that have a caption teach, and the captioner writes one for each of
the others: lines that a person can read and edit, and that training reads again.

Run `python recaption.py` for clips, what was written of them, and the pairs to learn from.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from folder import Folder, read_lines
from language import Language, asked
from loop import STOP, added, gathered, rank, ranks
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
    told = [asked("", size) for size in np.unique(sizes, axis=0).tolist()]
    return Tokenizer.from_captions(captions + short + told * 10, size)


def labelled_clips(world: data.World, batch: int, count: int, share: float) -> np.ndarray:
    """The numbers of `count` labelled clips, others for each batch."""
    span = int(2 * count / share) + 100  # more than enough
    index = batch * span + np.arange(span)
    return index[world.labelled(index, share)][:count]


def told_and_written(
    world: data.World, tokenizer: Tokenizer, index: np.ndarray, sizes: np.ndarray
) -> tuple[list[list[int]], list[list[int]]]:
    """What the language model is told of clips [n] of sizes [n, 3], and what it should write."""
    facts = world.all_facts(index, sizes)
    told = map(asked, world.short_captions(index, facts), sizes.tolist())
    answers = map(data.descriptive_caption, facts)
    return [tokenizer.encode(x) for x in told], [tokenizer.encode(x) for x in answers]


def captions_to_learn(
    short: list[str], facts: list[dict], labelled: np.ndarray, keep: np.ndarray
) -> list[str | None]:
    """The captions that the diffusion transformer learns from, of n clips; None where there is but
    a short one, and the captioner is to write. labelled, keep [n] bool: of which a descriptive one
    is known, and which keep the short one."""
    return [
        brief if stays else data.descriptive_caption(fact) if label else None
        for brief, fact, label, stays in zip(short, facts, labelled, keep, strict=True)
    ]


# ---------------------------------------------------------------------------------------- own clips


@torch.no_grad()
def write_missing(language: Language, vae: VAE, world: Folder, path: Path, at_once=64) -> int:
    """A line for each file that has a caption neither of its own nor in `path`, as captions.jsonl
    has them. Lines that are there stay as they are: edited ones, and those of a run that was
    stopped. Returns how many were added, by all processes together."""
    listed, written = read_lines(path), 0
    todo = [k for k in world.missing() if world.entries[k]["file"] not in listed]
    for first in tqdm(range(0, len(todo), at_once * ranks()), desc="captions", disable=rank() > 0):
        mine = todo[first : first + at_once * ranks()][rank() :: ranks()]
        clips = [(k, x) for k, x in zip(mine, world.middle(mine), strict=True)
                 if not isinstance(x, str)]  # fmt: skip
        latents = [vae.encode(to_float(x[None]).to(vae.mean.device))[0] for _, x in clips]
        lines = [
            json.dumps({"file": world.entries[k]["file"], "caption": said}, ensure_ascii=False)
            for (k, _), said in zip(clips, language.caption(latents), strict=True)
        ]
        lines = sum(gathered(lines), [])
        written += len(lines)
        if rank() == 0:
            torn = path.exists() and not path.read_bytes().endswith(b"\n")  # an editor's last line
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * torn + "".join(line + "\n" for line in lines))
        if added(len(STOP), device=vae.mean.device)[0]:
            raise SystemExit(f"stopped after {written} captions; the same command continues")
    return written


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
