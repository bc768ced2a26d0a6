"""The language model: it writes captions, of what it sees or of what it is told in short.

The problem. Captions that people write are short and often leave out what matters. A video model
trained on them learns to ignore them. And who uses it writes short prompts, too.

The idea (the report's "language understanding", after Betker et al. 2023, DALL-E 3). First train a
*captioner* on the few clips with good captions, let it caption all the others, and train the video
model on those. Then, since it now wants long captions, train an *expander* that turns a short
prompt into one. Both write the same sort of text from something else: one *prefix language model*
(Raffel et al. 2019, T5, section 3.2.1), used for all of it.

    prefix                                        written, a token at a time
    a clip's latent patches [n, p p Z]            END a 7 at top left moving left ...   END
    "17 x 32 x 32: a 7 moving left"               END a 7 at top left moving left ...   END
    patches, "17 x 32 x 32: a 7 moving left"      END a 7 at top left moving left ...   END
    patches, "17 x 32 x 32, later: a 7 ... left"  END a 7 at middle left moving right   END

The third is for a clip that came with a few words. They lack most of what is seen, but what they do
say is true, where a captioner can mistake a 4 for a 9: the two together are better than either (as
in CapsFusion, Yu et al. 2023). Where the patches are but the beginning of a clip, it is
also the expander of a prompt that comes with an image or a clip to go on from. The fourth is for
a window from the middle of a clip, whose prompt says how that clip set out.

Everything in the prefix sees everything in it; a token that is written sees the prefix and what was
written before it. As a mask, for a prefix of 3 and a text of 4:

    prefix   x x x . . . .
             x x x . . . .          training: all at once, each place says which token comes next
             x x x . . . .          ("teacher forcing"), and the loss is over the text alone
    text     x x x x . . .
             x x x x x . .          writing: a token at a time. Keys and values of what came before
             x x x x x x .          don't change any more and are kept in a cache, so that each
             x x x x x x x          token costs one row of this picture

Attention's rotary positions and the patches are those of the diffusion transformer. A patch is at
its (time, row, column); text comes after the last frame, a token a time step.

Alphabet: B texts; n tokens of the prefix, k of the text; d the width; V ids.

Run `python language.py` to see one learn to describe squares, and what its tokens look at.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patches
from attention import attend, rotary_angles, rotate
from text import END, Tokenizer

LONGEST = 128  # tokens of a text


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
    after: Tensor  # [B]: the time at which the text begins


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
        """x [B, m, d], the tokens from place `at` on; mask [B, 1, m, at + m] -> [B, m, d].

        cache [2, B, heads, room, head]: keys and values of all places, read up to `at` and written
        from there on.
        """
        h = F.layer_norm(x, x.shape[-1:], self.scale[0])
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pairs = zip((q, k), self.gain, strict=True)
        q, k = (rotate(F.rms_norm(y, y.shape[-1:]) * g.type_as(y), *turn) for y, g in pairs)
        if cache is not None:
            cache[..., at : at + x.shape[1], :] = torch.stack([k, v])
            k, v = cache[..., : at + x.shape[1], :]
        h = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # [B, m, d]
        x = x + self.merge(h)
        h = F.layer_norm(x, x.shape[-1:], self.scale[1])
        return x + self.down(F.gelu(self.up(h)))


class LanguageModel(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config, d = config, config.width
        # The first sees motion, too: a fast digit is 2 latents further in the next latent frame.
        # Filters of 3 x 3 did not reach that far, and speed was the last thing to be learned.
        sizes = ((config.channels, (3, 5, 5)), (config.stem, (1, 3, 3)))
        self.stem = nn.ModuleList(
            nn.Conv3d(inputs, config.stem, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
            for inputs, kernel in sizes
        )
        self.read = nn.Linear(config.patch**2 * config.stem, d)
        self.words = nn.Embedding(config.vocabulary, d)
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.say = nn.Linear(d, config.vocabulary)

    # --------------------------------------------------------------------------- the three prefixes

    def see(self, latents: list[Tensor]) -> Prefix:
        """Clips of any sizes, [Z, t, h, w] each.

        Two convolutions go first: a digit lies anywhere across the patches' borders, and they are
        much quicker to learn what a stroke is (Xiao et al. 2021, "Early convolutions").
        """
        p = self.config.patch
        tokens = [None] * len(latents)
        for grid in {z.shape for z in latents}:  # those of one size at once
            group = [k for k, z in enumerate(latents) if z.shape == grid]
            x = torch.stack([latents[k] for k in group])  # [b, Z, t, h, w]
            for layer in self.stem:
                # Zeros before and after the clip are our own: left to the convolution, an image
                # (t = 1) comes out as NaN in bfloat16 on CPUs that have AMX (PyTorch 2.13).
                around = layer.kernel_size[0] // 2
                x = F.gelu(layer(F.pad(x, (0, 0, 0, 0, around, around))))  # [b, S, t, h, w]
            for k, one in zip(group, self.read(patches.patchify(x, p)), strict=True):
                tokens[k] = one  # [n, d]
        position = [patches.grid_positions(*z.shape[1:], p).to(z.device) for z in latents]
        after = torch.tensor([z.shape[1] for z in latents], device=latents[0].device)
        real = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in tokens]
        tokens, position, real = (padded(x) for x in (tokens, position, real))
        return Prefix(tokens, position, real, after)

    def hear(self, prompts: list[list[int]]) -> Prefix:
        """Texts, the ids of each."""
        device = self.words.weight.device
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        real = padded([torch.ones_like(x, dtype=torch.bool) for x in ids])
        position = real.new_zeros(*real.shape, 3, dtype=torch.int64)
        position[..., 0] = torch.arange(real.shape[1])
        after = real.sum(1)
        return Prefix(self.words(padded(ids)), position, real, after)

    def prefix(self, latents: list[Tensor], prompts: list[list[int]]) -> Prefix:
        """Clips, prompts, or of each clip a prompt after it; what there is none of is []."""
        if not latents or not prompts:
            return self.see(latents) if latents else self.hear(prompts)
        seen, heard = self.see(latents), self.hear(prompts)
        later = heard.position.clone()
        later[..., 0] += seen.after[:, None]
        pairs = ((seen.x, heard.x), (seen.position, later), (seen.real, heard.real))
        return Prefix(*(torch.cat(pair, dim=1) for pair in pairs), seen.after + heard.after)

    # ------------------------------------------------------------------------ all at once: training

    def forward(self, lessons: list[tuple[list, list, list]]) -> tuple[Tensor, Tensor]:
        """Lessons of all three kinds, each (latents, prompts, texts to write), prompts and texts as
        ids: the sum of the loss, the number of tokens."""
        losses = [self.loss(self.prefix(*told), texts) for *told, texts in lessons if texts]
        return sum(total for total, _ in losses), sum(count for _, count in losses)

    def logits(self, prefix: Prefix, text: Tensor) -> Tensor:
        """text [B, k], of which the first is END -> logits [B, k, V]: which token comes next."""
        n, k = prefix.x.shape[1], text.shape[1]
        x = torch.cat([prefix.x, self.words(text)], dim=1)  # [B, n + k, d]
        position = torch.cat([prefix.position, text_positions(prefix.after, 0, k)], dim=1)
        mask = prefix_mask(prefix.real, k)  # [B, n + k, n + k]
        return self.say(self.run(x, position, mask)[:, n:])  # [B, k, V]

    def loss(self, prefix: Prefix, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The sum over all tokens of the texts (and the END of each) of -log p(token | what came
        before), and the number of tokens."""
        device = prefix.x.device
        ids = padded([torch.tensor([END, *text, END], device=device) for text in texts], -1)
        target = ids[:, 1:]  # [B, k]
        logits = self.logits(prefix, ids[:, :-1].clamp(min=0))  # [B, k, V]
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), target.flatten(), ignore_index=-1, reduction="sum"
        )
        return total, (target >= 0).sum()

    def run(
        self, x: Tensor, position: Tensor, mask: Tensor, cache: list | None = None, at: int = 0
    ) -> Tensor:
        """x [B, m, d] -> [B, m, d], normalised. cache: one of each block."""
        head = self.config.width // self.config.heads
        turn = rotary_angles(position, head, self.config.rope_base)  # [B, 1, m, head/2]
        for block, kept in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, turn, mask[:, None], kept, at)
        return F.layer_norm(x, x.shape[-1:])

    # ---------------------------------------------------------------------- token by token: writing

    @torch.no_grad()
    def write(self, prefix: Prefix, pick: Callable, most: int = LONGEST) -> list[list[int]]:
        """Write a text after each prefix, of at most so many tokens: the ids, without END.

        pick: logits [B, V] -> ids [B], such as `greedy`.
        """
        B, n = prefix.real.shape
        c = self.config
        device, dtype = prefix.x.device, prefix.x.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        room = (2, B, c.heads, n + most, c.width // c.heads)
        cache = [torch.empty(room, dtype=dtype, device=device) for _ in self.blocks]
        mask = prefix.real[:, None].expand(-1, n, -1)  # [B, n, n]
        self.run(prefix.x, prefix.position, mask, cache)
        token = torch.full((B,), END, device=device)
        written, done = [], torch.zeros_like(token, dtype=torch.bool)
        for k in range(most):
            x, position = self.words(token)[:, None], text_positions(prefix.after, k, 1)
            mask = F.pad(prefix.real, (0, k + 1), value=True)[:, None]  # [B, 1, n + k + 1]
            h = self.run(x, position, mask, cache, n + k)  # [B, 1, d]
            token = pick(self.say(h[:, 0]).float())
            done |= token == END
            if done.all():
                break
            written.append(torch.where(done, END, token))
        ids = torch.stack(written, dim=1).tolist() if written else [[]] * B
        return [text[: text.index(END)] if END in text else text for text in ids]


def padded(parts: list[Tensor], value: float = 0) -> Tensor:
    """[n_i, ...] each -> [B, n, ...], n the largest n_i."""
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def text_positions(after: Tensor, first: int, count: int) -> Tensor:
    """`count` tokens from `first` on, of texts that begin at times `after` [B]: [B, count, 3]."""
    position = after.new_zeros(len(after), count, 3)
    position[..., 0] = after[:, None] + torch.arange(first, first + count, device=after.device)
    return position


def prefix_mask(real: Tensor, k: int) -> Tensor:
    """Who sees whom (a row sees a column): real [B, n] -> [B, n + k, n + k] bool."""
    B, n = real.shape
    causal = torch.ones(n + k, n + k, dtype=torch.bool, device=real.device).tril()
    seen = torch.cat([real, real.new_zeros(B, k)], dim=1)  # [B, n + k]
    mask = causal | seen[:, None]
    mask[:, :, :n] &= real[:, None]  # padding is seen by nobody
    return mask


# ------------------------------------------------------------------------- which token comes next


def greedy(logits: Tensor) -> Tensor:
    """The most probable: logits [B, V] -> ids [B]."""
    return logits.argmax(-1)


def likely(logits: Tensor, least: float, u: Tensor) -> Tensor:
    """Draw from the tokens that are at least `least` times as probable as the most probable one
    (min-p, Nguyen et al. 2024): logits [B, V], u [B] uniform in [0, 1) -> ids [B].

    Where many are about as good (a digit that the prompt does not name), any of them may come;
    where one is nearly certain (a digit that it does), nothing else.
    """
    p = logits.softmax(-1)  # [B, V]
    p = torch.where(p >= least * p.amax(-1, keepdim=True), p, 0.0)
    edge = p.cumsum(-1)  # [B, V]
    return (edge <= u[:, None] * edge[:, -1:]).sum(-1)  # [B]


# ----------------------------------------------------------------------------- in plain strings


@dataclass
class Language:
    """A trained model with its tokenizer: what the rest of the project talks to."""

    model: LanguageModel
    tokenizer: Tokenizer
    world: dict  # with the sizes that it was trained on

    @torch.no_grad()
    def caption(
        self, latents: list[Tensor], told: list[str] | None = None, at_once: int = 64
    ) -> list[str]:
        """What clips [Z, t, h, w] of any sizes show; told: what somebody wrote of each, as `asked`
        puts it. Those of like size are done together, so that little is padded; a caption does not
        depend on which."""
        captions = [""] * len(latents)
        heard = [self.tokenizer.encode(x) for x in told or []]
        order = sorted(range(len(latents)), key=lambda k: latents[k][0].numel())
        for some in (order[k : k + at_once] for k in range(0, len(order), at_once)):
            prompts = [heard[k] for k in some] if heard else []
            prefix = self.model.prefix([latents[k] for k in some], prompts)
            for k, ids in zip(some, self.model.write(prefix, greedy), strict=True):
                captions[k] = self.tokenizer.decode(ids)
        return captions

    @torch.no_grad()
    def expand(
        self,
        prompts: list[str],
        size: tuple[int, int, int],
        seeds: list[int],
        part: list[Tensor] | None = None,
        later: bool = False,
    ) -> list[str]:
        """Short prompts as descriptive captions of a clip of `size` (T, H, W), what is not said
        drawn by chance, a chance of its own for each seed; part: the first latents of each clip
        [Z, n, h, w], of a trained size, if they are given: where these show motion, too, nothing is
        left to chance; later: see `asked`. What is descriptive stays, and so does the empty prompt.
        """
        which = [k for k, prompt in enumerate(prompts) if is_short(prompt)]
        if not which:
            return list(prompts)
        size = self.nearest_size(*size)
        random = [torch.Generator().manual_seed(seeds[k] + (1 << 40)) for k in which]

        def drawn(logits: Tensor) -> Tensor:
            u = torch.stack([torch.rand((), generator=g) for g in random])
            return likely(logits, 0.25, u.to(logits.device))

        pick = greedy if part and part[0].shape[1] > 1 else drawn
        heard = [self.tokenizer.encode(asked(prompts[k], size, later)) for k in which]
        seen = [part[k] for k in which] if part else []
        expanded = list(prompts)
        for k, ids in zip(
            which, self.model.write(self.model.prefix(seen, heard), pick), strict=True
        ):
            expanded[k] = self.tokenizer.decode(ids)
        return expanded

    def nearest_size(self, T: int, H: int, W: int) -> tuple[int, int, int]:
        """The trained one: longer clips are made in windows of that, and other numbers would be
        words that the model never read."""
        shapes = [*self.world["shapes"], *(self.world["image_shapes"] if T == 1 else [])]
        durations = self.world["durations"] if T > 1 else [1]
        shape = min(shapes, key=lambda shape: abs(shape[0] - H) + abs(shape[1] - W))
        return min(durations, key=lambda other: abs(other - T)), *shape


def is_short(prompt: str) -> bool:
    """Descriptive captions are several sentences; no prompt at all asks for anything."""
    return bool(prompt.strip()) and "." not in prompt.strip().rstrip(".")


def asked(prompt: str, size: tuple[int, int, int], later: bool = False) -> str:
    """What the expander is told. The size goes along: it decides which walls are reached. later:
    the prompt says how a clip sets out, and what is shown is a window from later on, of which it is
    to write how *that* sets out: "left" may have become "right"."""
    return f"{' x '.join(map(str, size))}{', later' * later}: {prompt.strip().rstrip('.')}"


# ------------------------------------------------------------------------------------------- demo


def squares(count: int, seed: int) -> tuple[list[Tensor], list[str]]:
    """Latents [1, 1, 6, 6] with one bright square of 2 x 2 each, and where it is."""
    latents, captions = [], []
    for r, c in torch.randint(0, 3, (count, 2), generator=torch.Generator().manual_seed(seed)):
        latent = torch.zeros(1, 1, 6, 6)
        latent[..., 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = 1.0
        latents.append(latent)
        row, column = ("top", "middle", "bottom")[r], ("left", "centre", "right")[c]
        captions.append(f"a square at the {row} {column}")
    return latents, captions


def main() -> None:
    from PIL import Image, ImageDraw

    torch.manual_seed(0)
    torch.set_num_threads(1)
    latents, captions = squares(32, seed=0)
    words = Tokenizer.from_captions(captions, 300)
    config = LanguageConfig(1, 2, words.size, stem=8, width=32, depth=2, heads=2)
    language = Language(LanguageModel(config), words, {})
    texts = [words.encode(caption) for caption in captions]
    prefix = language.model.see(latents[:1])
    print(f"latent {list(latents[0].shape)} -> prefix {list(prefix.x.shape)}, text {texts[0]}")
    optimizer = torch.optim.AdamW(language.model.parameters(), lr=1e-2)
    for step in range(100):
        total, count = language.model.loss(language.model.see(latents), texts)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {total.item() / count:.3f}")
    latents, captions = squares(6, seed=1)
    written = language.caption(latents)
    sheet = Image.new("L", (620, 260), 40)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 8), "who sees whom: 9 patches, 7 tokens", fill=255)
    mask = prefix_mask(torch.ones(1, 9, dtype=torch.bool), 7)[0]
    picture = Image.fromarray((90 + 150 * mask).byte().numpy())
    sheet.paste(picture.resize((192, 192), Image.NEAREST), (10, 30))
    for k, (latent, said, true) in enumerate(zip(latents, written, captions, strict=True)):
        print(f"written: {said!r}, true: {true!r}")
        picture = Image.fromarray((255 * latent[0, 0]).byte().numpy())
        sheet.paste(picture.resize((36, 36), Image.NEAREST), (250, 10 + 40 * k))
        pen.text((300, 20 + 40 * k), said, fill=255)
    sheet.save("language_demo.png")
    print("wrote language_demo.png")


if __name__ == "__main__":
    main()
