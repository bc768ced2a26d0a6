"""Attention over packed clips: each token sees all of its own clip and nothing of any other.

The problem. Clips of many sizes share rows of fixed length. Attention over a whole row would mix
them. And attention alone has no notion of place: to it, a clip is a bag of patches.

The idea. A token learns about others in three ways, all of them inside its own clip:

  where       3D rotary positions (Su et al. 2021, RoPE). The angle between a query and a key is
              their distance in time, rows and columns. There is no table of positions, so a grid
              never seen in training works like any other.
  attention   Comparing clip numbers gives the mask of a row. On a CPU, where rows are short, one
              masked product serves all clips of a row. On a GPU, one kernel walks from clip to
              clip; it costs the sum of n_i^2 instead of L^2.
  neighbours  Strokes continue in the next patch, and things move into it. Attention has to learn to
              look there, so each MLP also sees the six adjacent patches, weighted by channel: a
              depthwise convolution, as in Mix-FFN (Xie et al. 2021, "SegFormer").

Alphabet: B rows of L tokens, N = B L in all, d numbers each; `heads` heads of `head` numbers; a
clip has n tokens.

Run `python attention.py` for a picture of a packed row: who attends to whom, and the positions.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

# -------------------------------------------------------------------------------------------- where


def rotary_angles(position: Tensor, head: int, base: float, more=0.0) -> tuple[Tensor, Tensor]:
    """position [B, L, 3] -> cos and sin [B, 1, L, head/2], the same for all heads. more: angles
    [B, L, head/2] that are added.

    A quarter of the channel pairs turns with time, three eighths each with rows and columns (as in
    CogVideoX).
    """
    pairs = head // 2
    share = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]  # time, row, column
    angles = []
    for axis, count in enumerate(share):
        # From 1.5 radians a patch, which separates adjacent patches, down to 1.5 / base.
        frequency = 1.5 * base ** (-torch.arange(count, device=position.device) / count)
        angles.append(position[..., axis, None].float() * frequency)
    angle = (torch.cat(angles, dim=-1) + more)[:, None]  # [B, 1, L, head/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its angle: x [..., head] (RoPE, equation 34)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# ---------------------------------------------------------------------------------------- attention


def who_sees_whom(sample_id: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What `packed_attention` needs to know about the clips of a batch: sample_id [B, L] ->

    a mask to add to the scores, 0 where a query (row) sees a key (column) and -inf elsewhere,
    [B, 1, L, L]. Padding (-1) sees padding, so that no softmax is over nothing. Rows of a single
    clip, which may be long, need no L x L mask: all queries share one of [B, 1, 1, L], or None if
    there is no padding either. On a GPU in half precision: where each clip begins, then N.
    """
    B, L = sample_id.shape
    if sample_id.is_cuda and dtype in (torch.bfloat16, torch.float16):
        begins = torch.ones_like(sample_id, dtype=torch.bool)  # also where a row begins
        begins[:, 1:] = sample_id[:, 1:] != sample_id[:, :-1]
        return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=B * L).int()
    apart = (sample_id != sample_id[:, :1])[:, None]  # [B, 1, L]: not of the row's first clip
    if not apart.any():
        return None
    if (sample_id[:, None][apart] >= 0).any():  # but of another
        apart = sample_id[:, :, None] != sample_id[:, None]  # [B, L, L]
    mask = torch.zeros(apart.shape, device=apart.device)
    return mask.masked_fill_(apart, -torch.inf)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head) + mask) v: [B, heads, L, head] each, never all L x L scores. In
    float32 on CPUs: the backward pass of PyTorch's kernel is three times as slow in bfloat16."""
    if v.device.type != "cpu":
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, mask)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).type_as(v)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, who: Tensor | None) -> Tensor:
    """Attention inside each clip: q, k, v [B, L, heads, head] -> [B, L, heads, head]."""
    if who is None or who.is_floating_point():
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), who).transpose(1, 2)
    from torch.nn.attention.varlen import varlen_attn  # only CUDA can run it

    q, k, L = q.type_as(v), k.type_as(v), q.shape[1]  # no clip is longer
    out = varlen_attn(*(x.flatten(0, 1) for x in (q, k, v)), who, who, L, L)  # [N, heads, head]
    return out.view_as(q)


# --------------------------------------------------------------------------------------- neighbours

BESIDE = torch.tensor([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])


def neighbours(position: Tensor, sample_id: Tensor, is_text: Tensor) -> Tensor:
    """Which tokens are adjacent to each, before and after it in time, rows and columns: [N, 6], in
    the order of BESIDE; N where there is none. position [N, 3], sample_id and is_text [N].

    Words have neighbours too, in their caption. Beyond a clip's edge there is none, and padding,
    which all lies in one place, has none at all.
    """
    owner, N = 2 * sample_id + is_text, len(sample_id)  # words are not adjacent to patches
    low = position.amin(0) - 1  # one place stays free on every side
    span = position.amax(0) + 2 - low  # [3]

    def number(owner: Tensor, position: Tensor) -> Tensor:
        """A different number for each place of each clip."""
        t, row, column = (position - low).unbind(-1)
        return ((owner * span[0] + t) * span[1] + row) * span[2] + column

    here, order = number(owner, position).sort()  # [N]
    wanted = number(owner[:, None], position[:, None] + BESIDE.to(position.device))  # [N, 6]
    k = torch.searchsorted(here, wanted).clamp(max=N - 1)
    return torch.where(here[k] == wanted, order[k], N)


class Stencil(torch.autograd.Function):
    """The sum of each token's neighbours, weighted by channel: x [N, d], near [N, 6] (as made by
    `neighbours`), weight [6, 1, d] -> [N, d].

    PyTorch would keep six copies of x for the backward pass and scatter the gradients. But a
    token's gradient is the same sum over its neighbours, with the directions swapped: what it gave
    to the token after it comes back from there. Compiled, it takes a seventh of the time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, near: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, near, weight)
        padded, total = F.pad(x, (0, 0, 0, 1)), torch.zeros_like(x)  # token N is zero
        for k, w in enumerate(weight.type_as(x)):
            total.addcmul_(padded.index_select(0, near[:, k]), w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        x, near, weight = ctx.saved_tensors
        padded, total, grads = F.pad(grad, (0, 0, 0, 1)), torch.zeros_like(grad), []
        for k, w in enumerate(weight.type_as(grad)):
            back = padded.index_select(0, near[:, k ^ 1])  # [N, d]: whose k-th neighbour x is
            total.addcmul_(back, w)
            grads.append((back * x).sum(0, keepdim=True))
        return total, None, torch.stack(grads).type_as(weight)


# --------------------------------------------------------------------------------------------- demo


def packed_example() -> SimpleNamespace:
    """Two clips in one row, with the fields that `patches.pack` makes: three words and 2 x 2 x 3
    patches; two words and an image of 2 x 2; and two places of padding."""
    row = []  # for each token: text, (time, row, column), sample_id, frame_id
    for clip, (words, t, h, w, frame) in enumerate(((3, 2, 2, 3, 0), (2, 1, 2, 2, 3))):
        row += [(10 * clip + k, (k - words, 0, 0), clip, frame) for k in range(words)]
        grid = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).tolist()
        row += [(-1, tuple(place), clip, frame + 1 + place[0]) for place in grid]
    row += [(-1, (0, 0, 0), -1, 0)] * 2
    text, position, sample_id, frame_id = (torch.tensor([x]) for x in zip(*row, strict=True))
    return SimpleNamespace(
        text=text, position=position, sample_id=sample_id, frame_id=frame_id,  # [1, L] or [1, L, 3]
        frame_clip=torch.tensor([0, 0, 0, 1, 1]),  # [F]: text, two frames; text, one frame
        actions=torch.tensor([[0], [0], [1], [0], [0]]),  # [F, 1]: one, before the second frame
    )  # fmt: skip


def draw(layout: SimpleNamespace, near: Tensor, cos: Tensor) -> Image.Image:
    """Who attends to whom, and the cosines [L, head/2] of the rotary angles. A row is a token."""
    ids = layout.sample_id[0]
    shade = 70 + 90 * ((ids[:, None] == ids) & (ids >= 0))  # [L, L]
    row, k = (near < len(near)).nonzero().T
    shade[row, near[row, k]] = 240
    sheet = Image.new("L", (1010, 23 * 12 + 30), 40)
    pen = ImageDraw.Draw(sheet)
    pen.text((130, 6), "attends to the token of this column (white: a neighbour)", fill=255)
    pen.text((450, 6), "cosines of the rotary angles: time | rows | columns", fill=255)
    for x, wide, table in ((130, 12, shade), (450, 17, 127.5 * (cos + 1))):
        size = (table.shape[1] * wide, table.shape[0] * 12)
        sheet.paste(Image.fromarray(table.byte().numpy()).resize(size, Image.NEAREST), (x, 24))
    for k, (clip, frame) in enumerate(zip(ids.tolist(), layout.frame_id[0].tolist(), strict=True)):
        first = layout.frame_clip.tolist().index(max(clip, 0))  # the row of the clip's text
        name = f"frame {frame - first - 1}" if frame > first else "text"
        pen.text((6, 25 + 12 * k), "padding" if clip < 0 else f"clip {clip}, {name}", fill=255)
    return sheet


def main():
    torch.manual_seed(0)
    layout = packed_example()
    ids, position = layout.sample_id, layout.position
    print(f"text      {layout.text[0].tolist()}\nsample_id {ids[0].tolist()}")
    q, k, v = torch.randn(3, 1, ids.shape[1], 2, 32)  # [B, L, heads, head] each
    cos, sin = (x.transpose(1, 2) for x in rotary_angles(position, 32, 10.0))  # [B, L, 1, head/2]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    packed = packed_attention(q, k, v, who_sees_whom(ids, v.dtype))
    for clip in (0, 1):
        here = ids[0] == clip
        alone = packed_attention(q[:, here], k[:, here], v[:, here], None)
        miss = (packed[:, here] - alone).abs().max()
        print(f"clip {clip}, {here.sum()} tokens: packed and alone differ by {miss:.0e}")
    near = neighbours(position[0], ids[0], layout.text[0] >= 0)
    print(f"neighbours of the first patch, token 3: {near[3].tolist()}, where {len(near)} is none")
    draw(layout, near, cos[0, :, 0]).save("attention_demo.png")
    print("wrote attention_demo.png")


if __name__ == "__main__":
    main()
