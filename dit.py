"""The diffusion transformer: adaLN-Zero blocks over packed spacetime patches.

The problem. A denoiser sees a noisy clip, how noisy it is and a caption, and predicts the clean
clip. It has to do so for clips of every duration and shape.

The idea (Peebles and Xie 2023, "Scalable diffusion models with transformers"). A plain transformer
over the clip's patches that is conditioned in three ways:

  how noisy   *adaLN-Zero*: the noise level makes a scale, a shift and a gate for each half of each
              block. Gates start at zero, so the network starts as the identity and deepens itself.
              Here every latent frame has a noise level of its own, and a patch reads its frame's.
  what        The caption's tokens stand in front of the clip's patches, in the same sequence, and
              attention carries them over. A summary of them also joins the noise level in adaLN, so
              the caption reaches every block from the first training step on. In worlds that have
              actions, those of each frame join it too.
  where       attention.py: rotary positions in time, rows and columns, and the neighbours of each
              patch for its MLP. A grid never seen in training works like any other. Actions turn
              queries and keys, too, by angles that are learned: who has turned left and right again
              sees the same as before, and so what was seen then is as near as if it were now.

Attention stays inside a clip and everything else works on each token alone, so a clip's output is
the same alone and packed with others.

Alphabet: B rows of L tokens, N = B L; D numbers a patch; d the width; F rows of the frame table:
for each clip one for its text and one for each latent frame. adaLN is computed for each of these
and looked up for each token.

Run `python dit.py` to see a small DiT read a packed batch, and where its parameters are.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attention

TURN = 5.0  # angles of actions are learned so many times faster than other parameters
MOST_WORDS = 256  # tokens of a caption; longer ones are an error, since they would share a place


@dataclass
class DiTConfig:
    inputs: int = 44  # numbers a patch that go in: noisy latent, what is known of it, and the mask
    outputs: int = 20  # D: numbers a patch that come out: of the latent, see diffusion.to_clean
    vocabulary: int = 512  # how many ids a caption token can have
    width: int = 256  # d
    depth: int = 8
    heads: int = 4
    rope_base: float = 10.0  # the longest wavelength is about 4 times this many patches
    actions: int = 0  # how many the world has; 0: no table of actions
    time_factor: int = 1  # ft: pixel frames a latent frame, each with an action; divides the width


# ------------------------------------------------------------------------------ how noisy, and what


def fourier_features(level: Tensor, width: int) -> Tensor:
    """level [F] in [0, 1] -> [F, width]: cosines and sines of wavelengths from 2 pi down to 0.006,
    the sinusoidal embedding of Vaswani et al. 2017 (section 3.5) with 1000 steps from 0 to 1."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=level.device))
    angle = level[:, None].float() * frequency  # [F, width/2]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # [F, width]


def places_of(owner: Tensor) -> Tensor:
    """Each token's place in its caption, from 0: clip `owner` [M], clip after clip -> [M]."""
    count = owner.unique_consecutive(return_counts=True)[1]  # of each clip
    first = count.cumsum(0) - count
    return torch.arange(len(owner), device=owner.device) - first.repeat_interleave(count)


def sum_of_each(words: Tensor, owner: Tensor, clips: int) -> Tensor:
    """Each clip's caption in one vector, the sum of its n tokens / (2 sqrt(n)): words [M, d], clip
    `owner` [M] -> [clips, d]. For four tokens it is their mean. A mean of eleven would drown out
    the 7, and a plain sum grows with the caption."""
    total = words.new_zeros(clips, words.shape[-1]).index_add_(0, owner, words)
    return total / (2 * torch.bincount(owner, minlength=clips).clamp(min=1).sqrt()[:, None])


# -------------------------------------------------------------------------------------- the network


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attention, then MLP, each between adaLN's scale and shift and its gate (DiT, figure 3). The
    MLP also sees each token's neighbours."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        # Queries and keys have unit length, so their products are small and attention is blunt: it
        # cannot pick the one patch that a digit moved from. A learned gain makes it sharper.
        self.gain = nn.Parameter(torch.full((2, heads, width // heads), 1.5))
        self.beside = nn.Parameter(torch.zeros(6, 1, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)  # the Zero of adaLN-Zero
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, c: Tensor, frame_id: Tensor, turn: tuple, who: Tensor | None, near: Tensor
    ) -> Tensor:
        """x [B, L, d], c [F, d], frame_id [B, L], turn: cos and sin, near [N, 6] -> [B, L, d]."""
        d = x.shape[-1]
        table = F.embedding(frame_id, self.modulation(c))  # [B, L, 6 d]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=-1)  # [B, L, d] each
        h = modulate(F.layer_norm(x, (d,)), shift1, scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, L, heads, head]
        pairs = zip((q, k), self.gain, strict=True)
        q, k = (F.rms_norm(y, y.shape[-1:]) * gain.type_as(y) for y, gain in pairs)
        q, k = attention.rotate(q, *turn), attention.rotate(k, *turn)
        h = attention.packed_attention(q, k, v, who).flatten(2)  # [B, L, d]
        x = x + gate1 * self.merge(h)
        h = modulate(F.layer_norm(x, (d,)), shift2, scale2).type_as(table)
        h = h + attention.Stencil.apply(h.flatten(0, 1), near, self.beside).view_as(h)
        return x + gate2 * self.down(F.gelu(self.up(h)))


class DiT(nn.Module):
    """A denoiser for packed clips. `layout` is anything with the fields of `patches.Packed`:

    text [B, L] (-1 where not text), position [B, L, 3], sample_id [B, L] (-1 where padded),
    frame_id [B, L] into the frame table, frame_clip [F], actions [F, ft] (or [F, 1]: all the same).
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, d = config, config.width
        self.recompute = False  # compute activations again in the backward pass, to store fewer
        self.read = nn.Linear(config.inputs, d)
        self.words = nn.Embedding(config.vocabulary, d)
        self.level = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.place = nn.Embedding(MOST_WORDS, d)  # of a token in its caption
        self.summary = nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        if config.actions:
            self.action = nn.Embedding(config.actions + 1, d // config.time_factor)  # 0: unknown
            nn.init.normal_(self.action.weight, std=0.2)  # about as large as the level is at first
            self.turn = nn.Parameter(torch.zeros(config.actions, d // config.heads // 2))
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.modulation = nn.Linear(d, 2 * d)
        self.write = nn.Linear(d, config.outputs)
        for layer in (self.modulation, self.write):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, level: Tensor, words: Tensor, owner: Tensor, layout) -> Tensor:
        """What adaLN reads: noise level, caption and actions of each row of the frame table [F, d].
        words [M, d], of the clips `owner` [M]."""
        clips = int(layout.frame_clip[-1]) + 1
        caption = sum_of_each(self.summary(words).type_as(words), owner, clips)  # [clips, d]
        c = self.level(fourier_features(level, 256)) + caption[layout.frame_clip]  # [F, d]
        if self.config.actions:
            actions = layout.actions.expand(-1, self.config.time_factor)  # [F, ft]
            c = c + self.action(actions).flatten(1)
        return F.silu(c)

    def turned(self, layout) -> Tensor:
        """How far the actions up to each token's frame turn its query and key: [B, L, head/2], the
        path so far as a position (Whittington et al. 2022, "Relating transformers to models and
        neural representations of the hippocampal formation")."""
        done = F.one_hot(layout.actions, self.config.actions + 1)[..., 1:].sum(1)  # [F, actions]
        total = done.cumsum(0)
        first = torch.searchsorted(layout.frame_clip, layout.frame_clip)  # of the clip: its text
        count = (total - total[first]).to(self.turn)
        return F.embedding(layout.frame_id, count @ (TURN * self.turn))

    def forward(self, tokens: Tensor, level: Tensor, layout) -> Tensor:
        """tokens [B, L, inputs], level [F] -> the prediction [B, L, outputs], of patches only."""
        is_text, sample_id, position = layout.text >= 0, layout.sample_id, layout.position
        owner = sample_id[is_text]  # [M], the clip of each of the M caption tokens
        # "3 up, 8 right" and "8 up, 3 right" have the same words: without their places, patches
        # would learn what is there but not which of it moves where.
        place = places_of(owner).clamp(max=MOST_WORDS - 1)
        words = self.words(layout.text[is_text]) + self.place(place)  # [M, d]
        c = self.condition(level, words, owner, layout)  # [F, d]
        x = self.read(tokens)  # [B, L, d]
        who = attention.who_sees_whom(sample_id, x.dtype)
        x = x.type_as(words).masked_scatter(is_text[..., None], words)  # [B, L, d]

        head = self.config.width // self.config.heads
        more = self.turned(layout) if self.config.actions else 0.0
        turn = attention.rotary_angles(position, head, self.config.rope_base, more)
        turn = tuple(y.transpose(1, 2) for y in turn)  # [B, L, 1, head/2] each
        near = attention.neighbours(position.flatten(0, 1), sample_id.flatten(), is_text.flatten())
        for block in self.blocks:
            given = (x, c, layout.frame_id, turn, who, near)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False)  # [B, L, d]
            else:
                x = block(*given)  # [B, L, d]

        table = F.embedding(layout.frame_id, self.modulation(c))  # [B, L, 2 d]
        x = modulate(F.layer_norm(x, x.shape[-1:]), *table.chunk(2, dim=-1))  # [B, L, d]
        return self.write(x)  # [B, L, outputs]


# --------------------------------------------------------------------------------------------- demo


def influence(model: DiT, tokens: Tensor, level: Tensor, layout) -> Tensor:
    """How much each token's output changes with each token's input, in one row: [L, L inputs]."""
    first, steps = model(tokens, level, layout), torch.eye(tokens.shape[1])[..., None]  # [L, L, 1]
    changes = [(model(tokens + one, level, layout) - first).abs().amax(-1)[0] for one in steps]
    return torch.stack(changes, dim=1)


@torch.no_grad()
def main():
    torch.manual_seed(0)
    config = DiTConfig(inputs=20, outputs=20, vocabulary=32, width=128, depth=4, heads=2, actions=1)
    model, layout = DiT(config), attention.packed_example()
    level = torch.tensor([0, 0.0, 0.8, 0, 1.0])  # the first clip's first frame is known: level 0
    tokens = torch.randn(1, layout.text.shape[1], config.inputs)
    output, shape = model(tokens, level, layout), list(tokens.shape)
    print(f"tokens {shape}, level {list(level.shape)} -> prediction {list(output.shape)}")
    print(f"adaLN-Zero: at the start it is {output.abs().max():.0f} everywhere")
    for x in model.parameters():
        x += 0.05 * torch.randn_like(x)
    change = influence(model, tokens, level, layout)
    for clip in (0, 1):
        here = layout.sample_id[0] == clip
        inside, across = change[here][:, here].max(), change[here][:, ~here].max()
        print(f"clip {clip} changes by {inside:.2g} with its patches, by {across:.2g} with others'")
    total = sum(x.numel() for x in model.parameters())
    for name, module in model.named_children():
        n = sum(x.numel() for x in module.parameters())
        print(f"{name:10s} {n:9,d} parameters, {n / total:4.0%}")
    picture = Image.fromarray((255 * (change / change.max()).sqrt()).byte().numpy())
    picture.resize((16 * picture.width, 16 * picture.height), Image.NEAREST).save("dit_demo.png")
    print("wrote dit_demo.png: which tokens (columns) change which (rows)")


if __name__ == "__main__":
    main()
