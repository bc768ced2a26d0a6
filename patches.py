"""Spacetime patches, and patch n' pack: clips of any duration and shape in one sequence.

The problem. A transformer reads a sequence, and videos are not sequences. Worse, no two are alike:
an image is one frame, a clip is long or short, wide or tall. Cropping all to one size throws away
what falls outside; padding all to the longest spends most of the work on nothing.

The idea, in two steps.

1. Patches (the report's "spacetime latent patches"; Dosovitskiy et al. 2020, ViT; Arnab et al.
   2021, ViViT). Cut each latent frame into squares of p x p and write the numbers of each square in
   a row: one token. A patch spans one latent frame, so every latent frame can have a noise level of
   its own, and an image is a clip of one frame. (time, row, column) says where a token belongs.

       latent [Z, t, h, w]  --patchify-->  tokens [n, p*p*Z],   n = t * h/p * w/p

2. Pack (Dehghani et al. 2023, "Patch n' Pack: NaViT"). Lay whole clips side by side in rows of
   fixed length L, and record for each token which clip it belongs to. Attention stays inside a
   clip, and one comparison of ids is the whole mask:

       mask = sample_id[:, :, None] == sample_id[:, None, :]         [B, L, L]

Three clips, with p = 2 and rows of L = 24. A clip's caption stands in front of its patches:

    clip   latent grid (t, h, w)   patches            text   tokens   rows of the frame table
    0      (1, 4, 4), an image     1 * 2 * 2 =  4     + 3    =  7     0: text   1: its frame
    1      (3, 4, 6), wide         3 * 2 * 3 = 18     + 4    = 22     2: text   3, 4, 5: its frames
    2      (2, 6, 4), tall         2 * 3 * 2 = 12     + 3    = 15     6: text   7, 8: its frames

    the longest first, each into the first row with room: 92% of the places hold a real token

    row 0   1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 - -       sample_id (- is -1: padding,
    row 1   2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 0 0 0 0 0 0 0 - -       which sees only itself)

The frame table. Noise levels and actions belong to latent frames, a caption's summary to a clip.
What the network makes of them is computed for each row of a table [F, ...] and looked up for each
token by `frame_id`. A clip has a row for its text and one for each latent frame; here F = 9.

Alphabet: Z channels and t frames of h x w in the latent grid; p the side of a patch; B rows of L
tokens of D = p*p*Z numbers; T pixel frames, ft to a latent frame.

Run `python patches.py` for a picture of a packed batch.
"""

import colorsys
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

Grid = tuple[int, int, int]  # (t, h, w) of a latent

# ------------------------------------------------------------------------------------------ patches


def token_count(grid: Grid, p: int) -> int:
    """How many patches a latent of this grid has."""
    t, h, w = grid
    if h % p or w % p:
        raise ValueError(f"a latent of {h} x {w} cannot be cut into patches of {p} x {p}")
    return t * (h // p) * (w // p)


def patchify(latent: Tensor, p: int) -> Tensor:
    """latent [..., Z, t, h, w] -> tokens [..., n, p*p*Z], in reading order: time, row, column."""
    *batch, Z, t, h, w = latent.shape
    n = token_count((t, h, w), p)
    x = latent.reshape(-1, Z, t, h // p, p, w // p, p)
    x = x.permute(0, 2, 3, 5, 4, 6, 1)  # [-1, t, h/p, w/p, p, p, Z]
    return x.reshape(*batch, n, p * p * Z)


def unpatchify(tokens: Tensor, grid: Grid, p: int) -> Tensor:
    """tokens [..., n, p*p*Z] -> latent [..., Z, t, h, w]: patchify, read backwards."""
    *batch, _, D = tokens.shape
    (t, h, w), Z = grid, D // (p * p)
    x = tokens.reshape(-1, t, h // p, w // p, p, p, Z)
    x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [-1, Z, t, h/p, p, w/p, p]
    return x.reshape(*batch, Z, t, h, w)


def grid_positions(t: int, h: int, w: int, p: int, start: int = 0) -> Tensor:
    """(time, row, column) of each patch, counted in patches from 0: [n, 3], in patchify's order.
    start: the time of the first frame. A clip's first latent frame is special, since it holds one
    pixel frame. A window from the middle of a clip has no such frame and starts at time 1."""
    axes = [torch.arange(start, start + t), torch.arange(h // p), torch.arange(w // p)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def text_positions(count: int) -> Tensor:
    """The caption comes before the first frame: times -count ... -1, row and column 0: [count, 3].
    So its words have an order, and no word shares a position with a patch."""
    return F.pad(torch.arange(-count, 0)[:, None], (0, 2))


# -------------------------------------------------------------------------- which clip in which row


def first_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows of clip numbers, at most `budget` tokens each. First fit decreasing: the longest clip
    first, each into the first row that has room, a new row where none has. That is within 11/9 of
    the fewest possible rows, plus one (Johnson 1973; Dosa 2007)."""
    rows, room = [], []
    for clip in sorted(range(len(lengths)), key=lambda c: -lengths[c]):  # ties in stream order
        if lengths[clip] > budget:
            said = f"clip {clip} has {lengths[clip]} tokens, but a row has room for {budget}"
            raise ValueError(f"{said}: raise the token budget or take a smaller clip")
        row = next((r for r, free in enumerate(room) if free >= lengths[clip]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(clip)
        room[row] -= lengths[clip]
    return rows


def longest_prefix(lengths: list[int], budget: int, rows: int) -> list[list[int]]:
    """The longest prefix of a stream of clips that `first_fit` lays into at most `rows` rows. It
    takes sum(map(len, plan)) clips. A prefix, and not whichever clips fill the rows best: then
    sizes that pack badly would be seen too rarely. Bisection may miss a longer prefix that happens
    to need fewer rows, which costs a little room."""
    plan = first_fit(lengths[:1], budget)  # raises an error here if one clip alone is too long
    fits, fails = 1, 1 + sum(total <= rows * budget for total in accumulate(lengths))
    while fails - fits > 1:
        middle = (fits + fails) // 2
        candidate = first_fit(lengths[:middle], budget)
        if len(candidate) <= rows:
            fits, plan = middle, candidate
        else:
            fails = middle
    return plan


# ------------------------------------------------------------------------------------------ packing


@dataclass
class Packed:
    """A batch of clips in rows. Clips are numbered 0, 1, ... in the order that `pack` got them."""

    tokens: Tensor  # [B, L, D] float, zeros where there is text or padding
    text: Tensor  # [B, L] the id of a caption's token, -1 elsewhere
    position: Tensor  # [B, L, 3] (time, row, column)
    sample_id: Tensor  # [B, L] the token's clip, -1 where padded
    frame_id: Tensor  # [B, L] the token's row in the frame table, 0 where padded
    frame_clip: Tensor  # [F] the clip of each row of the frame table
    frame_is_text: Tensor  # [F] bool: the row of a clip's text; its frames' rows follow
    actions: Tensor  # [F, ft] of each pixel frame, done just before it; 0: nothing known
    grids: list[Grid]  # (t, h, w) of each clip
    where: list[tuple[int, int, int, int]]  # of each clip: (row, text from, patches from, end)
    p: int  # the side of a patch

    @property
    def is_patch(self) -> Tensor:  # [B, L] bool, neither text nor padding: the loss is here
        return (self.sample_id >= 0) & (self.text < 0)

    @property
    def lengths(self) -> list[int]:  # how many tokens each clip has, text included
        return [end - start for _, start, _, end in self.where]

    @property
    def words(self) -> int:  # how many tokens are text
        return sum(start - text for _, text, start, _ in self.where)

    @property
    def fill(self) -> float:  # the share of places that hold a real token, text included
        return sum(self.lengths) / self.sample_id.numel()

    def to(self, device) -> "Packed":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if torch.is_tensor(v)})


def lay_out(words: list[int], lengths: list[int], rows: list[list[int]], budget: int) -> list:
    """Where each clip of `lengths` tokens lies, of which the first `words` are text: `where`."""
    if sorted(clip for row in rows for clip in row) != list(range(len(lengths))):
        raise ValueError(f"the plan of rows must name each of the {len(lengths)} clips once")
    where = [(0, 0, 0, 0)] * len(lengths)
    for r, row in enumerate(rows):
        start = 0
        for clip in row:
            where[clip] = (r, start, start + words[clip], start + lengths[clip])
            start += lengths[clip]
        if start > budget:
            raise ValueError(f"row {r} of the plan has {start} tokens, but room for {budget}")
    return where


def pack(
    latents: list[Tensor],
    texts: list[list[int]],
    p: int,
    budget: int,
    rows: list[list[int]] | None = None,
    starts: list[int] | None = None,
    actions: list[Tensor] | None = None,
) -> Packed:
    """Lay clips into rows of `budget` tokens. Gradients flow through the tokens.

    latents: a [Z, t, h, w] each; texts: the ids of each caption; rows: a plan of `first_fit` or
    `longest_prefix`, made here if left out. A plan may hold empty rows, to keep B fixed.
    starts: the time of each clip's first frame, 0 if left out (see `grid_positions`).
    actions: a [t, ft] each (see `latent_actions`); unknown if left out, [F, 1] zeros.
    """
    grids, words = [tuple(z.shape[1:]) for z in latents], [len(text) for text in texts]
    lengths = [k + token_count(grid, p) for k, grid in zip(words, grids, strict=True)]
    rows = first_fit(lengths, budget) if rows is None else rows
    where = lay_out(words, lengths, rows, budget)

    nothing = torch.full((len(rows), budget), -1)  # [B, L]
    text, sample_id, frame_id, frame_clip = nothing.clone(), nothing, torch.zeros_like(nothing), []
    position = frame_id[..., None].repeat(1, 1, 3)  # [B, L, 3]
    for clip, (row, start, middle, end) in enumerate(where):
        (t, h, w), first = grids[clip], len(frame_clip)  # its first row in the frame table
        text[row, start:middle] = torch.tensor(texts[clip], dtype=torch.int64)
        position[row, start:middle] = text_positions(middle - start)
        position[row, middle:end] = grid_positions(t, h, w, p, starts[clip] if starts else 0)
        sample_id[row, start:end] = clip
        frame_id[row, start:middle] = first
        frame_id[row, middle:end].view(t, -1)[:] = torch.arange(first + 1, first + t + 1)[:, None]
        frame_clip += [clip] * (1 + t)

    tokens = torch.cat([patchify(latents[clip], p) for row in rows for clip in row])
    places = ((sample_id >= 0) & (text < 0)).flatten().nonzero().flatten().to(tokens.device)
    tokens = tokens.new_zeros(nothing.numel(), tokens.shape[1]).index_copy(0, places, tokens)
    frame_clip = torch.tensor(frame_clip)  # [F]
    is_text = frame_clip.diff(prepend=torch.tensor([-1])) > 0  # [F]: a clip's first row
    table = (frame_clip, is_text, torch.zeros_like(frame_clip)[:, None])
    rows = (tokens.unflatten(0, nothing.shape), text, position, sample_id, frame_id)
    packed = Packed(*rows, *table, grids, where, p).to(tokens.device)
    return replace(packed, actions=per_frame(packed, actions)) if actions else packed


def unpack(tokens: Tensor, packed: Packed) -> list[Tensor]:
    """tokens [B, L, D], such as a network's output -> the clips' latents, a [Z, t, h, w] each."""
    return [
        unpatchify(tokens[row, patches:end], grid, packed.p)
        for (row, _, patches, end), grid in zip(packed.where, packed.grids, strict=True)
    ]


def per_frame(packed: Packed, values: list[Tensor]) -> Tensor:
    """Each clip's values, a [t, ...] each -> the frame table's [F, ...]; 0 for text. For example
    `per_frame(packed, levels)[packed.frame_id]`: each token's noise level [B, L]."""
    value = torch.cat(values).to(packed.frame_clip.device)
    table = value.new_zeros(len(packed.frame_clip), *value.shape[1:])
    table[~packed.frame_is_text] = value
    return table


def latent_actions(actions, ft: int) -> Tensor:
    """actions [T] of pixel frames -> [t, ft] of latent frames. Zeros go in front, since a clip's
    first latent frame holds one pixel frame."""
    actions = torch.as_tensor(actions, dtype=torch.int64)
    return F.pad(actions, (-len(actions) % ft, 0)).view(-1, ft)


# --------------------------------------------------------------------------------------------- demo


def draw(packed: Packed) -> Image.Image:
    """A colour for each clip; its text dark, every other frame a little darker, padding black."""
    clips = [colorsys.hsv_to_rgb(0.618 * c % 1, 0.65, 1) for c in range(len(packed.grids))]
    colour = torch.tensor(clips + [(0, 0, 0)])[packed.sample_id]  # [B, L, 3]; -1 is the last, black
    light = torch.where(packed.is_patch, 1 - 0.15 * (packed.position[..., 0] % 2), 0.45)  # [B, L]
    picture = Image.fromarray((255 * colour * light[..., None]).byte().numpy())
    return picture.resize((4 * picture.width, 12 * picture.height), Image.NEAREST)


def main():
    torch.manual_seed(0)
    p, Z = 2, 16
    latents = [torch.randn(Z, *grid) for grid in ((1, 4, 4), (3, 4, 6), (2, 6, 4))]
    texts = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for c, (latent, text) in enumerate(zip(latents, texts, strict=True)):
        shapes = f"latent {list(latent.shape)} -> patches {list(patchify(latent, p).shape)}"
        print(f"clip {c}  {shapes}, and {len(text)} of text")
    packed = pack(latents, texts, p, budget=24)
    for name in ("tokens", "text", "position", "sample_id", "frame_id", "frame_clip"):
        print(f"packed.{name:10s} {list(getattr(packed, name).shape)}")
    for row in packed.sample_id.tolist():
        print("sample_id  " + " ".join("-" if i < 0 else str(i) for i in row))
    print(f"unpack(pack(x)) == x: {all(map(torch.equal, unpack(packed.tokens, packed), latents))}")

    shapes, pick = [(8, 8), (6, 10), (10, 6), (8, 12), (12, 8)], torch.randperm(60).tolist()
    latents = [torch.randn(Z, (1, 3, 5)[k % 3], *shapes[k % 5]) for k in pick]  # images and videos
    texts = [[0] * (2 + k // 15) for k in pick]
    lengths = [len(x) + token_count(y.shape[1:], p) for x, y in zip(texts, latents, strict=True)]
    plan = longest_prefix(lengths, budget=256, rows=12)
    n = sum(map(len, plan))
    packed = pack(latents[:n], texts[:n], p, 256, plan)
    padded = pack(latents[:n], texts[:n], p, max(lengths[:n]), [[c] for c in range(n)])
    sheet = Image.new("RGB", (256 * 4 + 20, (n + 12) * 12 + 60), (40, 40, 40))
    pen, y = ImageDraw.Draw(sheet), 5
    for name, way in (("packed", packed), ("padded", padded)):
        B, L = way.sample_id.shape
        said = f"{n} clips, {name}: {B} rows of {L} = {B * L} places, {way.fill:.0%} full"
        print(said)
        pen.text((10, y), f"{said} (text dark, padding black)")
        sheet.paste(draw(way), (10, y + 16))
        y += 12 * B + 30
    sheet.save("patches_demo.png")
    print("wrote patches_demo.png")


if __name__ == "__main__":
    main()
