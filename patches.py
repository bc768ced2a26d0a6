"""Spacetime patches, and patch n' pack: clips of any duration and shape in one sequence.

The problem. A transformer reads a sequence, and videos are not sequences. Worse, no two are alike:
an image is one frame, a clip is long or short, wide or tall. Cropping all to one size throws away
what falls outside; padding all to the longest spends most of the work on nothing.

The idea, in two steps.

1. Patches (the report's "spacetime latent patches"; Dosovitskiy et al. 2020, ViT; Arnab et al.
   2021, ViViT). Cut each latent frame into squares of p x p and write the numbers of each square in
   a row: one token. A patch spans one latent frame, which the VAE has already made of several pixel
   frames. So every latent frame can have a noise level of its own, and an image is a clip of one
   frame. Size is now only a number of tokens; (time, row, column) says where each one belongs.

       latent [Z, t, h, w]  --patchify-->  tokens [n, p*p*Z],   n = t * h/p * w/p

2. Pack (Dehghani et al. 2023, "Patch n' Pack: NaViT"). Lay whole clips side by side in rows of
   fixed length L, and note for each token which clip it is of. Attention stays inside a clip:

       mask = sample_id[:, :, None] == sample_id[:, None, :]         [B, L, L]

   One comparison of ids is the whole mask. The padded rest has the id -1: a segment of its own that
   sees only itself, so no softmax is over nothing and no clip sees padding. Attention that skips
   what is masked costs the sum of the clips' n^2, not L^2; `where` says where each clip lies.

Three clips, with p = 2 and rows of L = 24. In front of a clip's patches stand its caption's tokens:

    clip   latent grid (t, h, w)   patches            text   tokens   rows of the frame table
    0      (1, 4, 4), an image     1 * 2 * 2 =  4     + 3    =  7     0: text   1: its frame
    1      (3, 4, 6), wide         3 * 2 * 3 = 18     + 4    = 22     2: text   3, 4, 5: its frames
    2      (2, 6, 4), tall         2 * 3 * 2 = 12     + 3    = 15     6: text   7, 8: its frames

    the longest first, each into the first row with room: 22 -> row 0, 15 -> row 1, 7 -> row 1

    row 0   1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 - -       sample_id (- is -1, padding)
    row 1   2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 0 0 0 0 0 0 0 - -

    44 of 48 places hold a real token: 92 %. A row for each clip, padded to 22, would be 67 % full.

The frame table. A noise level is known per latent frame, a caption's summary per clip. What is made
of them is made once for each row of a table [F, ...] and looked up by `frame_id`, not once for each
token. Each clip in turn owns a row for its text and one for each latent frame; here F = 9.

Alphabet: Z channels and t frames of h x w in the latent grid; p the side of a patch; B rows of L
tokens of D = p*p*Z numbers; F rows in the frame table.

Run `python patches.py` for a picture of a packed batch.
"""

import colorsys
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from PIL import Image, ImageDraw

Grid = tuple[int, int, int]  # (t, h, w) of a latent

# ------------------------------------------------------------------------------------------ patches


def token_count(grid: Grid, p: int) -> int:
    """How many patches a latent of this grid has."""
    t, h, w = grid
    if h % p or w % p:
        raise ValueError(f"a latent of {h} x {w} cannot be cut into patches of {p} x {p}")
    return t * (h // p) * (w // p)


def patchify(latent: torch.Tensor, p: int) -> torch.Tensor:
    """latent [..., Z, t, h, w] -> tokens [..., n, p*p*Z], in reading order: time, row, column."""
    *batch, Z, t, h, w = latent.shape
    n = token_count((t, h, w), p)
    x = latent.reshape(-1, Z, t, h // p, p, w // p, p)
    x = x.permute(0, 2, 3, 5, 4, 6, 1)  # [-1, t, h/p, w/p, p, p, Z]
    return x.reshape(*batch, n, p * p * Z)


def unpatchify(tokens: torch.Tensor, grid: Grid, p: int) -> torch.Tensor:
    """tokens [..., n, p*p*Z] -> latent [..., Z, t, h, w]: patchify, read backwards."""
    *batch, _, D = tokens.shape
    (t, h, w), Z = grid, D // (p * p)
    x = tokens.reshape(-1, t, h // p, w // p, p, p, Z)
    x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [-1, Z, t, h/p, p, w/p, p]
    return x.reshape(*batch, Z, t, h, w)


def grid_positions(t: int, h: int, w: int, p: int, start: int = 0) -> torch.Tensor:
    """(time, row, column) of each patch, counted in patches from 0: [n, 3], in patchify's order.

    start: the time of the first frame. A clip's first latent frame holds less than the later ones
    (it is one frame of pixels): a window from the middle of a clip has none, and starts at time 1.
    """
    axes = [torch.arange(start, start + t), torch.arange(h // p), torch.arange(w // p)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def text_positions(count: int) -> torch.Tensor:
    """The caption comes before the first frame: times -count ... -1, row and column 0: [count, 3].

    So its words have an order, and no word ever shares a position with a patch.
    """
    position = torch.zeros(count, 3, dtype=torch.int64)
    position[:, 0] = torch.arange(-count, 0)
    return position


# -------------------------------------------------------------------------- which clip in which row


def first_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows of clip numbers, at most `budget` tokens each: first fit decreasing.

    The longest clip first, each into the first row that has room, a new row where none has. That is
    within 11/9 of the fewest possible rows, plus one (Johnson 1973; Dosa 2007).
    """
    rows, room = [], []
    for clip in sorted(range(len(lengths)), key=lambda c: -lengths[c]):  # ties in stream order
        if lengths[clip] > budget:
            raise ValueError(
                f"clip {clip} has {lengths[clip]} tokens, but a row has room for {budget}: "
                "raise the token budget or take a smaller clip"
            )
        row = next((r for r, free in enumerate(room) if free >= lengths[clip]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(clip)
        room[row] -= lengths[clip]
    return rows


def longest_prefix(lengths: list[int], budget: int, rows: int) -> list[list[int]]:
    """The longest prefix of a stream of clips that `first_fit` lays into at most `rows` rows.

    A prefix, and not whichever clips would fill the rows best: what is trained on must not be
    selected by its size, or a size that packs badly would be seen too rarely. The first clip that
    does not fit begins the next batch; the plan tells how many clips it takes: sum(map(len, plan)).

    By bisection. First fit has rare anomalies, in which a longer prefix needs fewer rows; one that
    is missed costs a little room, and never a clip.
    """
    plan = first_fit(lengths[:1], budget)  # one clip fits, or says here that it is too long
    at_most = sum(total <= rows * budget for total in accumulate(lengths))  # by tokens alone
    fits, fails = 1, at_most + 1
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

    tokens: torch.Tensor  # [B, L, D] float, zeros where there is text or padding
    text: torch.Tensor  # [B, L] the id of a caption's token, -1 elsewhere
    position: torch.Tensor  # [B, L, 3] (time, row, column)
    sample_id: torch.Tensor  # [B, L] the clip that the token is of, -1 where padded
    frame_id: torch.Tensor  # [B, L] the token's row in the frame table, 0 where padded
    frame_clip: torch.Tensor  # [F] the clip that a row of the frame table is of
    frame_is_text: torch.Tensor  # [F] bool: the row of a clip's text; its frames' rows follow
    actions: torch.Tensor  # [F, ft] before each frame of a latent, 0: nothing known
    grids: list[Grid]  # (t, h, w) of each clip
    where: list[tuple[int, int, int, int]]  # of each clip: (row, text from, patches from, end)
    p: int  # the side of a patch

    @property
    def is_patch(self) -> torch.Tensor:
        """[B, L] bool: neither text nor padding. The tokens that the loss is about."""
        return (self.sample_id >= 0) & (self.text < 0)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each clip has, text included."""
        return [end - start for _, start, _, end in self.where]

    @property
    def words(self) -> int:
        """How many tokens are text."""
        return sum(start - text for _, text, start, _ in self.where)

    @property
    def fill(self) -> float:
        """The share of places that hold a real token, text included."""
        return sum(self.lengths) / self.sample_id.numel()

    def to(self, device) -> "Packed":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


def pack(
    latents: list[torch.Tensor],
    texts: list[list[int]],
    p: int,
    budget: int,
    rows: list[list[int]] | None = None,
    starts: list[int] | None = None,
    actions: list[torch.Tensor] | None = None,
) -> Packed:
    """Lay clips into rows of `budget` tokens. Gradients flow through the tokens.

    latents: a [Z, t, h, w] each; texts: the ids of each one's caption; rows: a plan of `first_fit`
    or `longest_prefix`, made here if left out. A plan may hold empty rows, to keep B fixed.
    starts: the time of each clip's first frame, 0 if left out (see `grid_positions`).
    """
    starts = [0] * len(latents) if starts is None else starts
    grids = [tuple(latent.shape[1:]) for latent in latents]
    words = [len(text) for text in texts]
    lengths = [k + token_count(grid, p) for k, grid in zip(words, grids, strict=True)]
    rows = first_fit(lengths, budget) if rows is None else rows
    if sorted(clip for row in rows for clip in row) != list(range(len(latents))):
        raise ValueError(f"the plan of rows must name each of the {len(latents)} clips once")
    where = [(0, 0, 0, 0)] * len(latents)
    for r, row in enumerate(rows):
        start = 0
        for clip in row:
            end = start + lengths[clip]
            where[clip] = (r, start, start + words[clip], end)
            start = end
        if start > budget:
            raise ValueError(f"row {r} of the plan has {start} tokens, but room for {budget}")

    # Everything is first made for all clips in a line, N = sum(lengths) tokens, and then put in its
    # place with one indexed write. `place` counts through the rows as if they were laid end to end.
    length = torch.tensor(lengths)
    clip = torch.repeat_interleave(length)  # [N], like 0 0 0 1 1 2 2 2 2
    inside = torch.arange(len(clip)) - (length.cumsum(0) - length)[clip]  # 0 1 2 0 1 0 1 2 3
    place = torch.tensor([r * budget + start for r, start, _, _ in where])[clip] + inside
    is_text = inside < torch.tensor(words)[clip]  # [N]

    places = list(zip(grids, starts, strict=True))
    known = {(grid, s): grid_positions(*grid, p, s) for grid, s in set(places)}  # sizes repeat
    spell = {k: text_positions(k) for k in set(words)}
    pairs = zip(words, places, strict=True)
    position = torch.cat([x for k, grid in pairs for x in (spell[k], known[grid])])  # [N, 3]

    table = torch.tensor([1 + t for t, _, _ in grids])  # each clip's rows in the frame table
    first = table.cumsum(0) - table
    frame = position[:, 0] - torch.tensor(starts)[clip]  # [N] of its clip, from 0
    frame_id = first[clip] + torch.where(is_text, 0, 1 + frame)  # [N]
    frame_clip = torch.repeat_interleave(table)  # [F]
    frame_is_text = torch.zeros(len(frame_clip), dtype=torch.bool)
    frame_is_text[first] = True
    ids = torch.tensor([i for text in texts for i in text], dtype=torch.int64)

    def lay(values, place, rest):  # values [N, ...], and `rest` where there is none: [B, L, ...]
        flat = values.new_full((len(rows) * budget, *values.shape[1:]), rest)
        return flat.index_copy(0, place, values).unflatten(0, (len(rows), budget))

    patches = torch.cat([patchify(latent, p) for latent in latents])  # [patches of all clips, D]
    device = patches.device
    packed = Packed(
        tokens=lay(patches, place[~is_text].to(device), 0.0),
        text=lay(ids, place[is_text], -1).to(device),
        position=lay(position, place, 0).to(device),
        sample_id=lay(clip, place, -1).to(device),
        frame_id=lay(frame_id, place, 0).to(device),
        frame_clip=frame_clip.to(device),
        frame_is_text=frame_is_text.to(device),
        actions=torch.zeros(len(frame_clip), 1, dtype=torch.int64, device=device),
        grids=grids,
        where=where,
        p=p,
    )
    return packed if actions is None else replace(packed, actions=per_frame(packed, actions))


def unpack(tokens: torch.Tensor, packed: Packed) -> list[torch.Tensor]:
    """tokens [B, L, D], such as a network's output -> the clips' latents, a [Z, t, h, w] each."""
    return [
        unpatchify(tokens[row, patches:end], grid, packed.p)
        for (row, _, patches, end), grid in zip(packed.where, packed.grids, strict=True)
    ]


def per_frame(packed: Packed, values: list[torch.Tensor]) -> torch.Tensor:
    """Values of each clip's latent frames, a [t, ...] each -> the frame table's [F, ...]; text: 0.

    `per_frame(packed, levels)[packed.frame_id]` is each token's level [B, L].
    """
    value = torch.cat(values).to(packed.frame_clip.device)
    table = value.new_zeros(len(packed.frame_clip), *value.shape[1:])
    table[~packed.frame_is_text] = value
    return table


def latent_actions(actions, ft: int) -> torch.Tensor:
    """actions [T] of pixel frames -> [t, ft] of latent frames.

    Zeros go in front, since latent 0 holds one frame alone.
    """
    actions = torch.as_tensor(actions, dtype=torch.int64)
    return torch.nn.functional.pad(actions, (-len(actions) % ft, 0)).view(-1, ft)


# --------------------------------------------------------------------------------------------- demo


def draw(packed: Packed, width: int = 4, height: int = 12) -> Image.Image:
    """A colour for each clip; its text dark, every other frame a little darker, padding black."""
    clips = [colorsys.hsv_to_rgb(0.618 * c % 1, 0.65, 1) for c in range(len(packed.grids))]
    colour = torch.tensor(clips + [(0, 0, 0)])[packed.sample_id]  # [B, L, 3]; -1 is the last, black
    light = 1 - 0.15 * (packed.position[..., 0] % 2)  # [B, L]
    light = torch.where(packed.is_patch, light, 0.45)
    pixels = (255 * colour * light[..., None]).byte()
    B, L = packed.sample_id.shape
    return Image.fromarray(pixels.numpy()).resize((L * width, B * height), Image.NEAREST)


def main():
    torch.manual_seed(0)
    p, Z = 2, 16
    print("three clips, each with its caption's tokens:")
    latents = [torch.randn(Z, *grid) for grid in ((1, 4, 4), (3, 4, 6), (2, 6, 4))]
    texts = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for c, (latent, text) in enumerate(zip(latents, texts, strict=True)):
        shapes = f"latent {list(latent.shape)} -> patches {list(patchify(latent, p).shape)}"
        print(f"  clip {c}  {shapes}, and {len(text)} of text")
    packed = pack(latents, texts, p, budget=24)
    for name in ("tokens", "text", "position", "sample_id", "frame_id", "frame_clip"):
        print(f"  packed.{name:10s} {list(getattr(packed, name).shape)}")
    for row in packed.sample_id.tolist():
        print("  sample_id  " + " ".join("-" if i < 0 else str(i) for i in row))
    print(f"  frame_clip    {packed.frame_clip.tolist()}")
    print(f"  frame_is_text {packed.frame_is_text.int().tolist()}")
    same = all(map(torch.equal, unpack(packed.tokens, packed), latents))
    print(f"  {packed.fill:.0%} of the places are real tokens; unpack(pack(x)) == x: {same}")

    print("a mixed stream, images and videos of three lengths and five shapes:")
    shapes = [(8, 8), (6, 10), (10, 6), (8, 12), (12, 8)]
    pick = torch.stack([torch.randint(k, (60,)) for k in (3, len(shapes), 8)], 1).tolist()
    latents = [torch.randn(Z, (1, 3, 5)[t], *shapes[s]) for t, s, _ in pick]
    texts = [[0] * (2 + k) for _, _, k in pick]
    lengths = [len(x) + token_count(y.shape[1:], p) for x, y in zip(texts, latents, strict=True)]
    plan = longest_prefix(lengths, budget=256, rows=12)
    n = sum(map(len, plan))
    packed = pack(latents[:n], texts[:n], p, 256, plan)
    padded = pack(latents[:n], texts[:n], p, max(lengths[:n]), [[c] for c in range(n)])
    for name, way in (("packed", packed), ("padded", padded)):
        B, L = way.sample_id.shape
        print(f"  {name}: {n} clips in {B:2d} rows of {L} = {B * L} places, {way.fill:.0%} full")
    pictures = [draw(packed), draw(padded)]
    sheet = Image.new("RGB", (256 * 4 + 20, sum(x.height for x in pictures) + 60), (40, 40, 40))
    pen, y = ImageDraw.Draw(sheet), 5
    for name, way, picture in zip(("packed", "padded"), (packed, padded), pictures, strict=True):
        pen.text((10, y), f"{n} clips {name}, {way.fill:.0%} full (text dark, padding black)")
        sheet.paste(picture, (10, y + 16))
        y += picture.height + 30
    sheet.save("patches_demo.png")
    print("wrote patches_demo.png")


if __name__ == "__main__":
    main()
