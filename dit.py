"""The diffusion transformer: adaLN-Zero blocks over packed spacetime patches.

The problem. A denoiser looks at a noisy clip, is told how noisy it is and what the caption says,
and says what the clean clip is. It has to do that for clips of every duration and shape.

The idea (Peebles and Xie 2023, "Scalable diffusion models with transformers"). A plain transformer
over the clip's patches. It knows three things that a language model doesn't:

  how noisy   *adaLN-Zero*: the noise level makes a scale, a shift and a gate for each half of each
              block. Gates start at zero, so the network starts as the identity and deepens itself.
              Here every latent frame has a noise level of its own, and a patch reads its frame's.
  what        the caption's tokens stand in front of the clip's patches, in the same sequence, and
              attention carries them over. A summary of them also joins the noise level in adaLN,
              so that what to draw reaches every block from the first training step on.
  where       3D rotary positions (Su et al. 2021, RoPE): the angle between a query and a key is
              their distance in time, rows and columns. There is no table of positions, so that a
              grid never seen in training is still a grid.

Several clips share a row (patch n' pack). Attention stays inside a clip, everything else is done to
each token alone, so a clip's output is the same alone and packed with others.

Alphabet: B rows of L tokens; D numbers a patch; d the width; F latent frames of all clips together.
What adaLN needs is made once for each of the F frames and looked up for each of the B x L tokens.

Run `python dit.py` to see a small DiT read a packed batch, and where its parameters are.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_WORDS = 256  # tokens of a caption; more would share the last place, and be a mistake


@dataclass
class DiTConfig:
    inputs: int = (
        44  # numbers a patch that go in: the noisy latent, what is given of it, and the mask
    )
    outputs: int = 20  # D: numbers a patch that come out: the clean latent
    vocabulary: int = 512  # how many ids a caption token can have
    width: int = 256  # d
    depth: int = 8
    heads: int = 4
    rope_base: float = 10.0  # the longest wavelength is about 4 times this many patches


# ------------------------------------------------------------------------------ how noisy, and what


def fourier_features(level: Tensor, width: int) -> Tensor:
    """level [F] in [0, 1] -> [F, width]: cosines and sines of wavelengths from 2 pi down to 0.006.

    As the sinusoidal embedding of Vaswani et al. 2017 (section 3.5), with 1000 steps from 0 to 1.
    """
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=level.device))
    angle = level[:, None].float() * frequency  # [F, width/2]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # [F, width]


def places_of(owner: Tensor) -> Tensor:
    """Which token of its caption each one is, from 0, where those of a clip lie side by side: clip
    `owner` [M] -> [M]."""
    count = owner.unique_consecutive(return_counts=True)[1]  # of each clip
    first = count.cumsum(0) - count
    return torch.arange(len(owner), device=owner.device) - first.repeat_interleave(count)


def mean_of_each(words: Tensor, owner: Tensor, clips: int) -> Tensor:
    """The mean of each clip's caption tokens: words [M, d], clip `owner` [M] -> [clips, d]."""
    total = words.new_zeros(clips, words.shape[-1]).index_add_(0, owner, words)
    return total / torch.bincount(owner, minlength=clips).clamp(min=1)[:, None]


# -------------------------------------------------------------------------------------------- where


def rotary_angles(position: Tensor, head: int, base: float) -> tuple[Tensor, Tensor]:
    """position [N, 3] -> cos and sin [N, 1, head/2].

    A quarter of the pairs turns with time, three eighths each with rows and columns (as CogVideoX).
    """
    pairs = head // 2
    share = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]  # time, row, column
    angles = []
    for axis, count in enumerate(share):
        # From 1.5 radians a patch, so that one patch is told from the next, down to 1.5 / base.
        frequency = 1.5 * base ** (-torch.arange(count, device=position.device) / count)
        angles.append(position[..., axis, None].float() * frequency)
    angle = torch.cat(angles, dim=-1)[:, None]  # [N, 1, head/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its angle: x [N, heads, head] (RoPE, equation 34)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# ---------------------------------------------------------------------------------------- attention


Groups = tuple[tuple[int, int], ...]  # (how many clips, their length), of tokens in this order


def clips_by_length(sample_id: Tensor) -> tuple[Tensor, Groups]:
    """Sort the tokens so that clips of equal length lie side by side: sample_id [B, L] ->

    order [N]: the N = B x L places, whole clips, the shortest first, and padding (-1) last;
    groups: (how many clips, their length n) from the shortest on. Padding is in no group. It is
    carried along all the same: N then never changes, nor do the kernels that are made for it.
    """
    flat = sample_id.flatten()
    length = torch.bincount(flat[flat >= 0])  # [clips]
    key = length[flat] * len(length) + flat  # by length, then by clip
    order = torch.argsort(torch.where(flat < 0, key.max() + 1, key), stable=True)  # [N]
    n, clips = length[length > 0].unique(return_counts=True)
    return order, tuple(zip(clips.tolist(), n.tolist(), strict=True))


@torch.compiler.disable  # every batch has other groups: compiled, each would be compiled anew
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, path: str | None = None
) -> Tensor:
    """Full attention inside each clip: q, k, v [N, heads, head] -> [N, heads, head].

    Attention over n tokens costs n^2. Done clip by clip it costs the sum of the n_i^2. There are
    three paths to the same result (zeros where there is padding), of which `best_path` chooses:

        grouped   clips of equal length together, as one batch. Runs everywhere, and is exact
        varlen    PyTorch's flash attention over clips laid end to end: one kernel for all of them.
                  CUDA, bfloat16 or float16
        flex      PyTorch's FlexAttention, compiled, with "same clip" as its mask. CUDA, any type

    `python evaluate.py bench` times those that the device has.
    """
    real = sum(clips * n for clips, n in groups)
    padding, q, k = torch.zeros_like(v[real:]), q.type_as(v), k.type_as(v)
    parts = (q[:real], k[:real], v[:real])
    return torch.cat([PATHS[path or best_path(v)](*parts, groups), padding])


def best_path(v: Tensor) -> str:
    """The fastest: on an H200, the batch of `evaluate.py bench` took 1.6 ms in bfloat16 by varlen,
    4.9 by flex and 6.4 by grouped, forward and backward."""
    half = v.dtype in (torch.bfloat16, torch.float16)
    return "varlen" if v.is_cuda and half else "grouped"


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    outputs, sizes = [], [clips * n for clips, n in groups]
    for (clips, n), *part in zip(groups, *(x.split(sizes) for x in (q, k, v)), strict=True):
        a = [x.unflatten(0, (clips, n)).transpose(1, 2) for x in part]  # [clips, heads, n, head]
        outputs.append(attend(*a).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    from torch.nn.attention.varlen import (
        varlen_attn,
    )  # newer than the oldest PyTorch that we run on

    ends, longest = clip_ends(groups, q.device), groups[-1][1]
    return varlen_attn(q, k, v, ends, ends, longest, longest)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    attention = torch.nn.attention.flex_attention.flex_attention
    if q.is_cuda:  # uncompiled, it holds the whole N x N matrix
        attention = torch.compile(attention, dynamic=True)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, N, head]
    out = attention(q, k, v, block_mask=clip_mask(groups, q.device))
    return out[0].transpose(0, 1)


PATHS = {"grouped": grouped_attention, "varlen": varlen_attention, "flex": flex_attention}


@lru_cache(maxsize=8)  # made once for a batch, and not in each block
def clip_ends(groups: Groups, device: torch.device) -> Tensor:
    """Where each clip ends, after a 0: [clips + 1]."""
    lengths = [n for clips, n in groups for _ in range(clips)]
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


@lru_cache(maxsize=8)
def clip_mask(groups: Groups, device: torch.device):
    """FlexAttention's mask: which blocks of 128 x 128 hold a pair of tokens of the same clip."""
    lengths = torch.tensor([n for clips, n in groups for _ in range(clips)], device=device)
    clip = torch.repeat_interleave(lengths)  # [N]
    return torch.nn.attention.flex_attention.create_block_mask(
        lambda b, h, i, j: clip[i] == clip[j], None, None, len(clip), len(clip), device=str(device)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head)) v: [..., n, head]. PyTorch's fused kernel never holds the n x n
    matrix, which is what long clips need. For short ones on a CPU, holding it is faster: forward
    and backward of a mixed batch took a third to a half of the time. But not for a single query, as
    when text is written: the kernel reads cached keys in place. mask: who sees whom."""
    if q.is_cuda or q.shape[-2] > 512 or q.shape[-2] == 1:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


# -------------------------------------------------------------------------------------- the network


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attention, then MLP, each between adaLN's scale and shift and its gate (DiT, figure 3)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        # Queries and keys have unit length, so their products are small, and attention is blunt:
        # it cannot pick the one patch that a digit moved from. A learned gain makes it sharper.
        self.gain = nn.Parameter(torch.full((2, heads, width // heads), 1.5))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)  # the Zero of adaLN-Zero
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, c: Tensor, frame_id: Tensor, turn: tuple[Tensor, Tensor], groups: Groups
    ) -> Tensor:
        """x [N, d], c [F, d], frame_id [N] -> [N, d]."""
        d = x.shape[-1]
        table = F.embedding(frame_id, self.modulation(c))  # [N, 6 d]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=-1)  # [N, d] each
        h = modulate(F.layer_norm(x, (d,)), shift1, scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [N, heads, head]
        pairs = zip((q, k), self.gain, strict=True)
        q, k = (rotate(F.rms_norm(y, y.shape[-1:]) * g.type_as(y), *turn) for y, g in pairs)
        h = packed_attention(q, k, v, groups).flatten(1)  # [N, d]
        x = x + gate1 * self.merge(h)
        h = modulate(F.layer_norm(x, (d,)), shift2, scale2)
        return x + gate2 * self.down(F.gelu(self.up(h)))


class DiT(nn.Module):
    """A denoiser for packed clips. `layout` is anything with the fields of `patches.Packed`:

    text [B, L] (-1 where not text), position [B, L, 3], sample_id [B, L] (-1 where padded),
    frame_id [B, L] into the F latent frames, frame_clip [F].
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, d = config, config.width
        self.recompute = False  # make activations again in the backward pass, to keep fewer
        self.read = nn.Linear(config.inputs, d)
        self.words = nn.Embedding(config.vocabulary, d)
        self.level = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.place = nn.Embedding(MOST_WORDS, d)  # of a token in its caption
        self.summary = nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.modulation = nn.Linear(d, 2 * d)
        self.write = nn.Linear(d, config.outputs)
        for layer in (self.modulation, self.write):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, level: Tensor, layout) -> Tensor:
        """tokens [B, L, inputs], level [F] -> the prediction [B, L, outputs], of patches only."""
        order, groups = clips_by_length(layout.sample_id)  # [N]
        text, sample_id, frame_id, position, tokens = (
            x.flatten(0, 1)[order]
            for x in (layout.text, layout.sample_id, layout.frame_id, layout.position, tokens)
        )
        is_text, clips = text >= 0, int(layout.frame_clip[-1]) + 1
        owner = sample_id[is_text]  # [M], the clip of each of the M caption tokens
        # "3 up, 8 right" and "8 up, 3 right" have the same words: without their places, patches
        # would be told what there is, but not which of it moves where.
        place = places_of(owner).clamp(max=MOST_WORDS - 1)
        words = self.words(text[is_text]) + self.place(place)  # [M, d]
        x = self.read(tokens).type_as(words).masked_scatter(is_text[:, None], words)  # [N, d]

        caption = mean_of_each(self.summary(words).type_as(words), owner, clips)  # [clips, d]
        c = self.level(fourier_features(level, 256)) + caption[layout.frame_clip]  # [F, d]
        c = F.silu(c)

        turn = rotary_angles(
            position, self.config.width // self.config.heads, self.config.rope_base
        )
        for block in self.blocks:
            given = (x, c, frame_id, turn, groups)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False)  # [N, d]
            else:
                x = block(*given)  # [N, d]

        shift, scale = F.embedding(frame_id, self.modulation(c)).chunk(2, dim=-1)  # [N, d]
        x = self.write(modulate(F.layer_norm(x, x.shape[-1:]), shift, scale))  # [N, outputs]
        full = x.new_zeros(layout.text.numel(), x.shape[-1]).index_copy(0, order, x)
        return full.unflatten(0, layout.text.shape)  # [B, L, outputs]


# --------------------------------------------------------------------------------------------- demo


def packed_example() -> SimpleNamespace:
    """Two clips in one row, with the fields that `patches.pack` makes: three words and 2 x 2 x 3
    patches; two words and an image of 2 x 2; and two places of padding."""
    row = []  # of each token: text, (time, row, column), sample_id, frame_id
    for clip, (words, t, h, w, frame) in enumerate(((3, 2, 2, 3, 0), (2, 1, 2, 2, 3))):
        row += [(10 * clip + k, (k - words, 0, 0), clip, frame) for k in range(words)]
        grid = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).tolist()
        row += [(-1, tuple(place), clip, frame + 1 + place[0]) for place in grid]
    row += [(-1, (0, 0, 0), -1, 0)] * 2
    text, position, sample_id, frame_id = (torch.tensor([x]) for x in zip(*row, strict=True))
    return SimpleNamespace(
        text=text,  # [1, L]
        position=position,  # [1, L, 3]
        sample_id=sample_id,  # [1, L]
        frame_id=frame_id,  # [1, L]
        frame_clip=torch.tensor([0, 0, 0, 1, 1]),  # [F]: text, two frames; text, one frame
    )


def draw(layout: SimpleNamespace, head: int, base: float) -> Image.Image:
    """Who attends to whom, by sample_id; and the cosines of the rotary angles. A row is a token."""
    ids = layout.sample_id[0]
    mask = (ids[:, None] == ids) & (ids >= 0)  # [L, L]
    cos = rotary_angles(layout.position[0], head, base)[0][:, 0]  # [L, head/2]
    sheet = Image.new("L", (1010, 23 * 12 + 30), 40)
    pen = ImageDraw.Draw(sheet)
    pen.text((130, 6), "white: this row's token attends to this column's", fill=255)
    pen.text((450, 6), "cosines of the rotary angles: time | rows | columns", fill=255)
    for x, wide, table in ((130, 12, 90 + 150 * mask), (450, 17, 127.5 * (cos + 1))):
        picture = Image.fromarray(table.byte().numpy())
        size = (table.shape[1] * wide, table.shape[0] * 12)
        sheet.paste(picture.resize(size, Image.NEAREST), (x, 24))
    for k, (clip, frame) in enumerate(zip(ids.tolist(), layout.frame_id[0].tolist(), strict=True)):
        first = layout.frame_clip.tolist().index(max(clip, 0))  # the row of the clip's text
        name = f"frame {frame - first - 1}" if frame > first else "text"
        pen.text((6, 25 + 12 * k), "padding" if clip < 0 else f"clip {clip}, {name}", fill=255)
    return sheet


def main():
    torch.manual_seed(0)
    config = DiTConfig(inputs=20, outputs=20, vocabulary=32, width=128, depth=4, heads=2)
    model, layout = DiT(config), packed_example()
    level = torch.tensor([0, 0.0, 0.8, 0, 1.0])  # the first clip's first frame is given: level 0
    tokens = torch.randn(1, layout.text.shape[1], config.inputs)
    for name in ("text", "sample_id", "frame_id"):
        print(f"{name:9s} {getattr(layout, name)[0].tolist()}")
    print(f"clips of equal length, attended together: {clips_by_length(layout.sample_id)[1]}")
    print(f"tokens {list(tokens.shape)}, level {list(level.shape)}", end=" -> ")
    print(f"prediction {list(model(tokens, level, layout).shape)}")
    print(
        f"adaLN-Zero: at the start it is {model(tokens, level, layout).abs().max():.0f} everywhere"
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    first = model(tokens, level, layout)
    tokens[layout.sample_id == 1] += 1
    change = (model(tokens, level, layout) - first).abs().amax(-1)[0]  # [L]
    for clip in (0, 1):
        change_here = change[layout.sample_id[0] == clip].max()
        print(f"other pixels in clip 1 change clip {clip} by {change_here:.2g}")
    total = sum(x.numel() for x in model.parameters())
    for name, module in model.named_children():
        n = sum(x.numel() for x in module.parameters())
        print(f"{name:10s} {n:9,d} parameters, {n / total:4.0%}")
    draw(layout, config.width // config.heads, config.rope_base).save("dit_demo.png")
    print("wrote dit_demo.png")


if __name__ == "__main__":
    main()
