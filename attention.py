"""Attention over packed clips: each patch sees all of its own clip, and none of any other.

The problem. Clips of many sizes share one sequence. Attention over all of it would mix them, and a
mask that keeps them apart still pays for every pair, of which nearly all are masked.

The idea. Three ways in which a token learns of the others, all of them inside its own clip:

  where       3D rotary positions (Su et al. 2021, RoPE): the angle between a query and a key is
              their distance in time, rows and columns. There is no table of positions, so that a
              grid never seen in training is still a grid.
  attention   Clips of equal length lie side by side and are attended as one batch; on a GPU, one
              kernel goes from clip to clip. It costs the sum of n_i^2, not (sum of n_i)^2.
  what is     Strokes go on in the next patch, and things move on to it. Attention has to learn to
  beside it   look there; so each MLP is also shown the six patches beside its own, weighted by
              channel: a depthwise convolution, as in Mix-FFN (Xie et al. 2021, "SegFormer").

Alphabet: N tokens of a whole batch, d numbers each; `heads` heads of `head` numbers; a clip of n.

Run `python attention.py` to see who attends to whom in a packed row, and how far apart they are.
"""

from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

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


# ------------------------------------------------------------------------------- what is beside it

BESIDE = torch.tensor([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])


def neighbours(position: Tensor, sample_id: Tensor, is_text: Tensor) -> Tensor:
    """Which tokens lie beside each, before and after it in time, rows and columns: [N, 6], in the
    order of BESIDE; N where there is none. position [N, 3], sample_id and is_text [N].

    Words have neighbours, too, in their caption. A clip's edge has none, nor has padding, which all
    lies in one place.
    """
    owner, N = 2 * sample_id + is_text, len(sample_id)  # words are not beside patches
    low = position.amin(0) - 1  # a place is left free on all sides
    span = position.amax(0) + 2 - low  # [3], on its device: nobody waits for it

    def number(owner: Tensor, position: Tensor) -> Tensor:
        """Another one for each place of each clip."""
        t, row, column = (position - low).unbind(-1)
        return ((owner * span[0] + t) * span[1] + row) * span[2] + column

    here, order = number(owner, position).sort()  # [N]
    wanted = number(owner[:, None], position[:, None] + BESIDE.to(position.device))  # [N, 6]
    k = torch.searchsorted(here, wanted).clamp(max=N - 1)
    return torch.where(here[k] == wanted, order[k], N)


class Stencil(torch.autograd.Function):
    """The sum of each token's neighbours, weighted by channel: x [N, d], near [N, 6] (as made by
    `neighbours`), weight [6, 1, d] -> [N, d].

    PyTorch would keep six copies of x for the backward pass, and scatter gradients. But what x gave
    to the token before it comes back from there: the same sum, with the directions exchanged.
    """

    @staticmethod
    def forward(ctx, x: Tensor, near: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, near, weight)
        padded, weight = F.pad(x, (0, 0, 0, 1)), weight.type_as(x)  # zeros, where there is none
        total = torch.zeros_like(x)
        for k, w in enumerate(weight):
            total.addcmul_(padded[near[:, k]], w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        x, near, weight = ctx.saved_tensors
        padded, total, grads = F.pad(grad, (0, 0, 0, 1)), torch.zeros_like(grad), []
        for k, w in enumerate(weight.type_as(grad)):
            back = padded[near[:, k ^ 1]]  # [N, d]: of the token that x is the k-th neighbour of
            total.addcmul_(back, w)
            grads.append((back * x).sum(0, keepdim=True))
        return total, None, torch.stack(grads).type_as(weight)


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
    """Who attends to whom, by sample_id, and who lies beside whom; and the cosines of the rotary
    angles. A row is a token."""
    ids = layout.sample_id[0]
    shade = 70 + 90 * ((ids[:, None] == ids) & (ids >= 0))  # [L, L]
    near = neighbours(layout.position[0], ids, layout.text[0] >= 0)
    row, k = (near < len(near)).nonzero().T
    shade[row, near[row, k]] = 240
    cos = rotary_angles(layout.position[0], head, base)[0][:, 0]  # [L, head/2]
    sheet = Image.new("L", (1010, 23 * 12 + 30), 40)
    pen = ImageDraw.Draw(sheet)
    pen.text((130, 6), "attends to this column's token; white: lies beside it", fill=255)
    pen.text((450, 6), "cosines of the rotary angles: time | rows | columns", fill=255)
    for x, wide, table in ((130, 12, shade), (450, 17, 127.5 * (cos + 1))):
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
    layout = packed_example()
    for name in ("text", "sample_id"):
        print(f"{name:9s} {getattr(layout, name)[0].tolist()}")
    sample_id, position = layout.sample_id[0], layout.position[0]
    order, groups = clips_by_length(layout.sample_id)
    print(f"clips of equal length, attended together, as (clips, length): {groups}")
    q, k, v = torch.randn(3, len(order), 2, 32)  # [N, heads, head] each
    turn = rotary_angles(position, 32, 10.0)
    q, k = rotate(q, *turn), rotate(k, *turn)
    packed = torch.empty_like(v)
    packed[order] = packed_attention(q[order], k[order], v[order], groups)
    mask = (sample_id[:, None] == sample_id) & (sample_id >= 0)  # [N, N]
    masked = attend(*(x.transpose(0, 1) for x in (q, k, v)), mask).transpose(0, 1)
    miss = (packed - masked)[sample_id >= 0].abs().max()
    pairs, real = int(mask.sum()), int((sample_id >= 0).sum())
    print(f"the same as under a mask, to {miss:.0e}, with {pairs} pairs instead of {real**2}")
    near = neighbours(position, sample_id, layout.text[0] >= 0)
    first = int((layout.text[0] < 0).nonzero()[0])
    names = ("before", "after", "above", "below", "left", "right")
    beside = {name: n for name, n in zip(names, near[first].tolist(), strict=True) if n < len(near)}
    print(f"beside the first patch, token {first}: {beside}")
    draw(layout, 32, 10.0).save("attention_demo.png")
    print("wrote attention_demo.png")


if __name__ == "__main__":
    main()
