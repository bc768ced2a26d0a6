"""Re-captioning: few clips have good captions; a captioner learns from those and writes the rest.

The problem. Descriptive captions make a video model follow its prompts better, and nobody has them:
what comes with clips is short, and often lacks what matters.

The idea (Betker et al. 2023, DALL-E 3, sections 2 and 3; the report's "language understanding").

    clips         what somebody wrote                  what the diffusion transformer learns from
    a tenth       a descriptive caption, and a short   the descriptive caption
    all others    a short one: "a 7", "digit moving"   what the captioner sees in the latents
    a share                                            the short one, so that it works, too

The language model (language.py) learns from the labelled tenth only: as captioner from latents to
the descriptive caption, as expander from the short to the descriptive one. Which clips are labelled
and what is wrong with a short caption are functions of the clip's number, as all else in data.py.

Run `python recaption.py` for clips, what was written of them, and the pairs to learn from.
"""

import numpy as np
from torch import Tensor

import data
from language import Language, asked
from text import Tokenizer


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


def expander_pairs(
    world: data.World, tokenizer: Tokenizer, batch: int, count: int, share: float
) -> tuple[list[list[int]], list[list[int]]]:
    """What the expander is told of labelled clips, and what it should write."""
    index = labelled_clips(world, batch, count, share)
    sizes = world.size(index)
    facts = world.all_facts(index, sizes)
    told = map(asked, world.short_captions(index, facts), sizes.tolist())
    answers = map(data.descriptive_caption, facts)
    return [tokenizer.encode(x) for x in told], [tokenizer.encode(x) for x in answers]


def captions_to_learn(
    world: data.World, index: np.ndarray, facts: list[dict], share: float, short: float, u: Tensor
) -> list[str | None]:
    """The captions that the diffusion transformer learns from; None where there is but a short one,
    and the captioner is to write. short: the share of short ones; u [n] in [0, 1)."""
    known = world.labelled(index, share)
    written = zip(world.short_captions(index, facts), facts, known, u.tolist(), strict=True)
    return [
        brief if x < short else data.descriptive_caption(fact) if label else None
        for brief, fact, label, x in written
    ]


def fill_in(
    language: Language | None, captions: list[str | None], latents: list[Tensor]
) -> list[str]:
    """The captioner writes what is missing."""
    missing = [latent for x, latent in zip(captions, latents, strict=True) if x is None]
    written = iter(language.caption(missing) if missing else [])
    return [next(written) if x is None else x for x in captions]
