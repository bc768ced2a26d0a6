"""Text as tokens, and one language model that captions clips and expands short prompts.

The problem. Captions that people write are short and leave out what matters. A video model trained
on them learns to ignore them. And people who use it write short prompts, too.

The idea (the report's "language understanding"; Betker et al. 2023, DALL-E 3). Train a *captioner*
on the few clips with full captions and let it caption the rest; the video model learns from those.
Since it now expects full captions, train an *expander*, which turns a short prompt into one. Both
write the same kind of text after something else: one *prefix language model* (Raffel et al. 2019,
T5, section 3.2.1) does both.

    prefix                                        written, a token at a time
    a clip's latent patches [n, p p Z]            END a 7 at top left moving left ...   END
    "17 x 32 x 32: a 7 moving left"               END a 7 at top left moving left ...   END
    patches, "17 x 32 x 32: a 7 moving left"      END a 7 at top left moving left ...   END
    patches, "17 x 32 x 32, later: a 7 ... left"  END a 7 at middle left moving right   END

The third is for clips that came with a few words. Those are true as far as they go, while a
captioner can mistake a 4 for a 9: together they beat either one (as in CapsFusion, Yu et al. 2023).
With only a clip's first patches, it expands a prompt that comes with an image. The fourth is for a
window from the middle of a clip, whose prompt describes the clip's start.

A token of the prefix sees the whole prefix; a written token sees the prefix and the text before it.
As a mask, for a prefix of 3 and a text of 4:

    prefix   x x x . . . .
             x x x . . . .          training: all at once; every place predicts the next token
             x x x . . . .          ("teacher forcing"), and the loss is over the text alone
    text     x x x x . . .
             x x x x x . .          writing: a token at a time. Keys and values of earlier tokens
             x x x x x x .          no longer change and stay in a cache, so each token costs one
             x x x x x x x          row of this picture

Rotary positions and patches are those of the diffusion transformer. A patch is at its (time, row,
column); text follows the last frame, one token a time step.

Tokens. Words make short texts, but a list of words cannot write a word that it lacks; bytes can
write anything. We use both: text is cut into words, each with the space in front of it (as in
GPT-2, Radford et al. 2019). A frequent word is one token; any other is its UTF-8 bytes. Captions
say the same things over and over, and each token costs as much as a patch, so a phrase that one
text in twenty contains is one token, too.

    "a 7 moving left"   ->   " a 7"  " moving left"                             2 tokens
    "a 7 moving löft"   ->   " a 7"  " moving"  20 6c c3 b6 66 74               8 tokens

Alphabet: B texts; n tokens of the prefix, k of the text; d the width; V ids; latents [Z, t, h, w].

Run `python language.py` to watch one learn to describe squares, and to see the mask.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

import patches
from attention import attend, rotary_angles, rotate

# ------------------------------------------------------------------------------------------- tokens

NOTHING = 256  # no caption: the model may draw anything, and guidance compares with it
END = 257  # stands before and after a text that is written
SPECIALS = 258  # ids that are no known piece
LONGEST = 128  # tokens of a text that is written
PHRASE = 0.05  # a phrase that at least this share of the texts contains is one token
PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s")


def pieces(text: str) -> list[str]:
    """Cut a text into words and signs, each with at most one space in front, and single blanks. A
    space is put in front of it: the first word is the same piece as anywhere else."""
    return PIECE.findall(" " + text)


def phrases(texts: list[list[str]]) -> list[str]:
    """What is often said, from the pieces of texts. The most frequent pair of neighbours becomes
    one piece in all texts, again and again: byte pair encoding (Sennrich et al. 2016), of words.
    No phrase goes on after a sign, so a sentence is the same tokens whatever was said before it."""
    found, least = [], max(10, PHRASE * len(texts))
    while True:
        pairs = (x for text in texts for x in set(pairwise(text)) if x[0][-1].isalnum())
        count = Counter(pairs)  # in how many texts
        pair = max(count, key=lambda x: (count[x], x), default=None)  # ties by alphabet
        if not pair or count[pair] < least:
            return found
        found.append("".join(pair))
        for text in texts:
            for k in range(len(text) - 2, -1, -1):
                if (text[k], text[k + 1]) == pair:
                    text[k : k + 2] = found[-1:]


def spell(piece: str) -> bytes:
    """UTF-8. Half a surrogate pair (from a broken file name) is no character and becomes "?"."""
    return piece.encode("utf-8", "replace")


class Tokenizer:
    """`words`, the known pieces in the order of their ids, is all there is to save."""

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.size = SPECIALS + len(self.words)  # how many different ids there are
        self.id_of = {word: SPECIALS + k for k, word in enumerate(self.words)}
        self.longest = max((len(PIECE.findall(word)) for word in self.words), default=1)  # pieces
        self.spelling = [bytes([i]) for i in range(256)] + [b"", b""] + list(map(spell, self.words))

    @classmethod
    def from_captions(cls, captions: list[str], size: int) -> "Tokenizer":
        """Know the phrases and the most frequent pieces of these captions, at most `size` ids."""
        different = sorted(set(captions))
        some = different[:: 1 + len(different) // 2000]  # about 2,000 say what is frequent
        often = phrases([pieces(caption) for caption in some])
        counts = Counter(piece for caption in captions for piece in pieces(caption))
        words = [word for word in counts if len(spell(word)) > 1]  # a single byte has an id
        words.sort(key=lambda word: (-counts[word], word))  # ties by alphabet: the same every time
        return cls((often + words)[: size - SPECIALS])

    def encode(self, text: str) -> list[int]:
        """Text -> ids, of the longest known phrase at each place. No text is [NOTHING]."""
        ids, rest = [], pieces(text) if text else []
        while rest:
            lengths = range(self.longest, 1, -1)
            n = next((n for n in lengths if "".join(rest[:n]) in self.id_of), 1)
            known = self.id_of.get("".join(rest[:n]))
            ids.extend(spell(rest[0]) if known is None else [known])
            rest = rest[n:]
        return ids or [NOTHING]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. NOTHING and END are skipped; a character cut short becomes U+FFFD."""
        spelled = b"".join(self.spelling[int(i)] for i in ids)
        return spelled.decode("utf-8", "replace").removeprefix(" ")  # the space that `pieces` put


# ---------------------------------------------------------------------------------------- the model


@dataclass
class LanguageConfig:
    channels: int = 3  # Z, of the latents
    patch: int = 2  # p
    vocabulary: int = 512  # V
    stem: int = 96  # S, channels of the convolutions in front
    width: int = 128  # d
    depth: int = 3
    heads: int = 4
    rope_base: float = 10.0


@dataclass
class Prefix:
    """What comes before the text: B prefixes, padded to n."""

    x: Tensor  # [B, n, d]
    position: Tensor  # [B, n, 3]
    real: Tensor  # [B, n] bool: not padding
    after: Tensor  # [B]: the time at which the text starts


class Block(nn.Module):
    """Attention, then MLP, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.gain = nn.Parameter(torch.full((2, heads, 1, width // heads), 1.5))  # see dit.py
        self.scale = nn.Parameter(torch.ones(2, width))

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, cache: Tensor | None, at: int
    ) -> Tensor:
        """x [B, m, d], tokens from place `at` on; mask [B, 1, r, at + m]: what the last r of them
        see -> those r [B, r, d]. cache [2, B, heads, room, head]: keys and values of all places,
        read up to `at` and written from there on."""
        m, first = x.shape[1], x.shape[1] - mask.shape[2]
        h = F.layer_norm(x, x.shape[-1:], self.scale[0])
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        qk = F.rms_norm(qkv[:2], qkv.shape[-1:]) * self.gain[:, None].type_as(qkv)
        (q, k), v = rotate(qk, *turn), qkv[2]  # [B, heads, m, head] each
        if cache is not None:
            cache[..., at : at + m, :] = torch.stack([k, v])
            k, v = cache[..., : at + m, :]
        h = attend(q[:, :, first:], k, v, mask)  # [B, heads, r, head]
        x = x[:, first:] + self.merge(h.transpose(1, 2).flatten(2))  # [B, r, d]
        h = F.layer_norm(x, x.shape[-1:], self.scale[1])
        return x + self.down(F.gelu(self.up(h)))


class LanguageModel(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config, d = config, config.width
        # The first sees motion, too: a fast digit is 2 latents further in the next latent frame,
        # out of reach of 3 x 3 filters. With those, speed was the last thing to be learned.
        self.stem = nn.ModuleList([
            nn.Conv3d(config.channels, config.stem, (3, 5, 5), padding=(0, 2, 2)),
            nn.Conv3d(config.stem, config.stem, (1, 3, 3), padding=(0, 1, 1)),
        ])  # fmt: skip
        self.read = nn.Linear(config.patch**2 * config.stem, d)
        self.words = nn.Embedding(config.vocabulary, d)
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.say = nn.Linear(d, config.vocabulary)

    def see(self, latents: list[Tensor]) -> Prefix:
        """Clips of any sizes, [Z, t, h, w] each. Two convolutions go first: things lie across the
        borders of patches, and they learn what a stroke is much sooner (Xiao et al. 2021)."""
        p, tokens = self.config.patch, [None] * len(latents)
        for grid in {z.shape for z in latents}:  # equal sizes at once
            group = [k for k, z in enumerate(latents) if z.shape == grid]
            x = torch.stack([latents[k] for k in group])  # [b, Z, t, h, w]
            for layer in self.stem:
                # Time is padded here: where the convolution does it, an image (t = 1) becomes NaN
                # in bfloat16 on CPUs that have AMX (PyTorch 2.13).
                around = layer.kernel_size[0] // 2
                x = F.gelu(layer(F.pad(x, (0, 0, 0, 0, around, around))))  # [b, S, t, h, w]
            for k, one in zip(group, self.read(patches.patchify(x, p)), strict=True):
                tokens[k] = one  # [n, d]
        device = latents[0].device
        position = [patches.grid_positions(*z.shape[1:], p).to(device) for z in latents]
        real = [torch.ones(len(x), dtype=torch.bool, device=device) for x in tokens]
        after = torch.tensor([z.shape[1] for z in latents], device=device)
        return Prefix(*map(padded, (tokens, position, real)), after)

    def hear(self, prompts: list[list[int]]) -> Prefix:
        """Prompts, the ids of each; of an empty one, nothing."""
        device = self.words.weight.device
        count = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = padded([torch.tensor(x, dtype=torch.int64, device=device) for x in prompts])  # [B, n]
        position = text_positions(torch.zeros_like(count), 0, ids.shape[1])
        return Prefix(self.words(ids), position, position[..., 0] < count[:, None], count)

    def prefix(self, latents: list[Tensor], prompts: list[list[int]]) -> Prefix:
        """Clips, prompts, or each clip and its prompt; [] stands for no clips, or no prompts."""
        if not latents or not any(prompts):
            return self.see(latents) if latents else self.hear(prompts)
        seen, heard = self.see(latents), self.hear(prompts)
        position = heard.position + F.pad(seen.after[:, None, None], (0, 2))  # later in time
        pairs = ((seen.x, heard.x), (seen.position, position), (seen.real, heard.real))
        return Prefix(*(torch.cat(pair, dim=1) for pair in pairs), seen.after + heard.after)

    def forward(self, lessons: list[tuple[list, list, list]]) -> tuple[Tensor, Tensor]:
        """Lessons of several kinds, each (latents, prompts, texts to write), prompts and texts as
        ids, [] for no latents or no prompts: the sum of the loss, the number of tokens."""
        losses = [self.loss(self.prefix(*given), texts) for *given, texts in lessons if texts]
        if not losses:  # not one clip could be read: gradients of zero
            losses = [(0 * sum(x.sum() for x in self.parameters()), self.say.bias.new_zeros(()))]
        return sum(total for total, _ in losses), sum(count for _, count in losses)

    def loss(self, prefix: Prefix, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The sum over all tokens of the texts (and the END of each) of -log p(token | what came
        before), and the number of tokens."""
        ids = padded([torch.tensor([END, *x, END], device=prefix.x.device) for x in texts], -1)
        target = ids[:, 1:]  # [B, k]
        logits = self.logits(prefix, ids[:, :-1].clamp(min=0)).flatten(0, 1)  # [B k, V]
        total = F.cross_entropy(logits.float(), target.flatten(), ignore_index=-1, reduction="sum")
        return total, (target >= 0).sum()

    def logits(self, prefix: Prefix, text: Tensor, cache: list | None = None) -> Tensor:
        """text [B, k], of which the first is END -> logits [B, k, V]: which token comes next."""
        k = text.shape[1]
        x = torch.cat([prefix.x, self.words(text)], dim=1)  # [B, n + k, d]
        position = torch.cat([prefix.position, text_positions(prefix.after, 0, k)], dim=1)
        return self.say(self.run(x, position, prefix_mask(prefix.real, k), k, cache))

    def run(self, x: Tensor, position: Tensor, mask: Tensor, k: int, cache=None) -> Tensor:
        """x [B, m, d], mask [B, m, at + m] -> the last k of them [B, k, d], normalised. cache: one
        for each block, filled up to `at`. The last block computes only keys and values for what is
        not among the last k."""
        head, at = self.config.width // self.config.heads, mask.shape[2] - x.shape[1]
        turn = rotary_angles(position, head, self.config.rope_base)  # [B, 1, m, head/2]
        for j, block in enumerate(self.blocks):
            rows = mask[:, -k:] if block is self.blocks[-1] else mask
            x = block(x, turn, rows[:, None], cache and cache[j], at)
        return F.layer_norm(x, x.shape[-1:])

    @torch.no_grad()
    def write(self, prefix: Prefix, pick: Callable, most: int = LONGEST) -> list[list[int]]:
        """A text after each prefix, of at most so many tokens: ids, without END. pick: logits
        [B, V] -> ids [B], such as `greedy`."""
        (B, n), c, device = prefix.real.shape, self.config, prefix.x.device
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else prefix.x.dtype
        room = (2, B, c.heads, n + most + 1, c.width // c.heads)
        cache = [torch.empty(room, dtype=dtype, device=device) for _ in self.blocks]
        token = torch.full((B,), END, device=device)
        logits = self.logits(prefix, token[:, None], cache)  # [B, 1, V]
        written, done = [], torch.zeros_like(token, dtype=torch.bool)
        for k in range(1, most + 1):
            token = pick(logits[:, 0].float())
            done |= token == END
            if done.all():
                break
            written.append(torch.where(done, END, token))
            x, position = self.words(token)[:, None], text_positions(prefix.after, k, 1)
            mask = F.pad(prefix.real, (0, k + 1), value=True)[:, None]  # [B, 1, n + k + 1]
            logits = self.say(self.run(x, position, mask, 1, cache))
        ids = torch.stack(written, dim=1).tolist() if written else [[]] * B
        return [text[: text.index(END)] if END in text else text for text in ids]


def padded(parts: list[Tensor], value: float = 0) -> Tensor:
    """[n_i, ...] each -> [B, n, ...], n the largest n_i."""
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def text_positions(after: Tensor, first: int, count: int) -> Tensor:
    """`count` tokens from `first` on, of texts that start at times `after` [B]: [B, count, 3]."""
    time = after[:, None] + torch.arange(first, first + count, device=after.device)
    return F.pad(time[..., None], (0, 2))


def prefix_mask(real: Tensor, k: int) -> Tensor:
    """Who sees whom (a row sees a column): real [B, n] -> [B, n + k, n + k] bool."""
    seen, there = F.pad(real, (0, k)), F.pad(real, (0, k), value=True)  # [B, n + k]
    causal = seen.new_ones(seen.shape[1], seen.shape[1]).tril()
    return (causal | seen[:, None]) & there[:, None]  # nobody sees padding


def greedy(logits: Tensor) -> Tensor:
    """The most probable next token: logits [B, V] -> ids [B]."""
    return logits.argmax(-1)


def likely(logits: Tensor, least: float, u: Tensor) -> Tensor:
    """Draw from the tokens that are at least `least` times as probable as the most probable one
    (min-p, Nguyen et al. 2024): logits [B, V], u [B] uniform in [0, 1) -> ids [B]. Where many are
    about as good (a digit that the prompt does not name), any of them may come; where one is nearly
    certain (a digit that it does name), no other."""
    p = logits.softmax(-1)  # [B, V]
    p = torch.where(p >= least * p.amax(-1, keepdim=True), p, 0.0)
    edge = p.cumsum(-1)  # [B, V]
    return (edge <= u[:, None] * edge[:, -1:]).sum(-1)  # [B]


# --------------------------------------------------------------------------------- in plain strings


@dataclass
class Language:
    """A trained model with its tokenizer: what the rest of the project talks to."""

    model: LanguageModel
    tokenizer: Tokenizer
    world: dict  # `World.about()` of the world that it was trained on

    @torch.no_grad()
    def caption(self, latents: list[Tensor], told: list[str] | None = None) -> list[str]:
        """What clips [Z, t, h, w] of any sizes show. told: a prompt for each, as `asked` makes
        them, "" where there is none. Similar sizes go together, so that little is padded; a caption
        does not depend on the others."""
        captions = [""] * len(latents)
        heard = [self.tokenizer.encode(x) if x else [] for x in told or captions]
        order = sorted(range(len(latents)), key=lambda k: latents[k][0].numel())
        for some in (order[k : k + 64] for k in range(0, len(order), 64)):
            prefix = self.model.prefix([latents[k] for k in some], [heard[k] for k in some])
            for k, ids in zip(some, self.model.write(prefix, greedy), strict=True):
                captions[k] = self.tokenizer.decode(ids)
        return captions

    @torch.no_grad()
    def expand(self, prompts: list[str], size: tuple[int, int, int], seeds: list[int],
               part: list[Tensor] | None = None, later: bool = False) -> list[str]:  # fmt: skip
        """Short prompts as full captions of a clip of `size` (T, H, W); each seed fills in what its
        prompt leaves open. Full captions stay as they are, and so does the empty prompt. In a world
        without briefs, the model never learned to expand, and all stay.
        part: the first latents of each clip [Z, n, h, w], of a trained size, if they are known.
        Where these show motion, nothing is left open. later: see `asked`.
        """
        learned = self.world.get("briefs", True)
        which = [k for k, prompt in enumerate(prompts) if learned and is_short(prompt)]
        if not which:
            return list(prompts)
        size = self.nearest_size(*size)
        random = [torch.Generator().manual_seed(seeds[k] + (1 << 40)) for k in which]

        def drawn(logits: Tensor) -> Tensor:
            u = torch.stack([torch.rand((), generator=g) for g in random])
            return likely(logits, 0.25, u.to(logits.device))

        pick = greedy if part and part[0].shape[1] > 1 else drawn
        heard = [self.tokenizer.encode(asked(prompts[k], size, later)) for k in which]
        prefix = self.model.prefix([part[k] for k in which] if part else [], heard)
        expanded = list(prompts)
        for k, ids in zip(which, self.model.write(prefix, pick), strict=True):
            expanded[k] = self.tokenizer.decode(ids)
        return expanded

    def nearest_size(self, T: int, H: int, W: int) -> tuple[int, int, int]:
        """The nearest trained size: other numbers would be words that the model never read."""
        shapes = [*self.world["shapes"], *(self.world["image_shapes"] if T == 1 else [])]
        durations = self.world["durations"] if T > 1 else [1]
        shape = min(shapes, key=lambda shape: abs(shape[0] - H) + abs(shape[1] - W))
        return min(durations, key=lambda other: abs(other - T)), *shape


def is_short(prompt: str) -> bool:
    """Full captions are several sentences; an empty prompt asks for anything."""
    return bool(prompt.strip()) and "." not in prompt.strip().rstrip(".")


def asked(prompt: str, size: tuple[int, int, int], later: bool = False) -> str:
    """The expander's prompt, with the size, which decides which walls are reached. later: the
    prompt describes the start of a clip, the patches are a window from later on, and the caption is
    to describe the window: "left" may have become "right"."""
    return f"{' x '.join(map(str, size))}{', later' * later}: {prompt.strip().rstrip('.')}"


# --------------------------------------------------------------------------------------------- demo


def squares(count: int, seed: int) -> tuple[list[Tensor], list[str]]:
    """Latents [1, 1, 6, 6] with one bright square of 2 x 2 each, and where it is."""
    latents, captions, rows = torch.zeros(count, 1, 1, 6, 6), [], ("top", "middle", "bottom")
    place = torch.randint(0, 3, (count, 2), generator=torch.Generator().manual_seed(seed))
    for latent, (r, c) in zip(latents, place.tolist(), strict=True):
        latent[..., 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = 1.0
        captions.append(f"a square at the {rows[r]} {('left', 'centre', 'right')[c]}")
    return list(latents), captions


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # faster for products this small
    latents, captions = squares(64, seed=0)
    words = Tokenizer.from_captions(captions, 300)
    texts = [words.encode(caption) for caption in captions]
    print(f"{words.size} ids; {captions[0]!r} -> {texts[0]}; 'a löft' -> {words.encode('a löft')}")
    config = LanguageConfig(1, 2, words.size, stem=8, width=32, depth=2, heads=2)
    language = Language(LanguageModel(config), words, {})
    print(f"latent {list(latents[0].shape)} -> {list(language.model.see(latents[:1]).x.shape)}")
    optimizer = torch.optim.AdamW(language.model.parameters(), lr=1e-2)
    for step in range(1, 101):
        total, count = language.model([(latents, [], texts)])
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}: loss {total.item() / count:.3f}")
    sheet = Image.new("L", (620, 260), 40)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 8), "who sees whom: 9 patches, 7 tokens", fill=255)
    mask = prefix_mask(torch.ones(1, 9, dtype=torch.bool), 7)[0]
    picture = Image.fromarray((90 + 150 * mask).byte().numpy())
    sheet.paste(picture.resize((192, 192), Image.NEAREST), (10, 30))
    latents, captions = squares(6, seed=1)
    written = language.caption(latents)
    for k, (latent, said, true) in enumerate(zip(latents, written, captions, strict=True)):
        print(f"written: {said!r}, true: {true!r}")
        picture = Image.fromarray((255 * latent[0, 0]).byte().numpy())
        sheet.paste(picture.resize((36, 36), Image.NEAREST), (250, 10 + 40 * k))
        pen.text((300, 20 + 40 * k), said, fill=255)
    sheet.save("language_demo.png")
    print("wrote language_demo.png")


if __name__ == "__main__":
    main()
