"""The tests. First each concept's promises, as exact as floating point allows; then the commands.

python -m pytest -q                  # everything
python -m pytest -q -k packed        # what has this word in its name
"""

import argparse
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import attention
import batches
import bench
import caption_reader
import clips
import cost
import data
import decode
import diffusion
import dit
import evaluate
import latents
import loop
import muon
import patches
import prompting
import reader
import recaption
import sample
import tasks
import text
import train
import weights as weights_of
from decode import Workers
from dit import DiT, DiTConfig
from folder import INDEX, Folder, FolderConfig, fitted, read_lines
from language import (
    Language,
    LanguageConfig,
    LanguageModel,
    asked,
    greedy,
    likely,
    prefix_mask,
)
from text import Tokenizer
from vae import VAE, VAEConfig, from_blocks, to_blocks

HERE = Path(__file__).parent
torch.set_num_threads(1)  # everything here is small: a second thread costs more than it brings


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to `tolerance` of the largest number (of 1, where all are smaller)."""
    a, b = a.detach(), b.detach()
    scale = max(1.0, float(b.abs().max()))
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * scale


def with_random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """What starts at zero would make a test of anything behind it say nothing."""
    for parameter in model.parameters():
        parameter.data += 0.08 * torch.randn_like(parameter)
    return model


def random_state(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ============================================================================== the concept: vae.py


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    vae = with_random_weights(VAE(VAEConfig(colors=2, width=24)))
    vae.mean += torch.randn_like(vae.mean)
    vae.std += torch.rand_like(vae.std)
    return vae.requires_grad_(False)


def video_of(T: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 2, T, 12, 8, generator=random_state(seed)) * 2 - 1


def test_a_block_holds_its_own_pixels():
    video = torch.arange(2 * 3 * 4 * 6 * 4).reshape(2, 3, 4, 6, 4)
    blocks = to_blocks(video, ft=2, fs=2)
    assert blocks.shape == (2, 3 * 2 * 2 * 2, 2, 3, 2)
    for t, h, w in ((0, 0, 0), (1, 2, 1), (0, 1, 1)):
        pixels = video[:, :, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        assert torch.equal(blocks[:, :, t, h, w], pixels.flatten(1))
    assert torch.equal(from_blocks(blocks, 2, 2), video)


def test_one_frame_is_an_image(vae):
    video = video_of(9)
    latent = vae.encode(video)
    assert latent.shape == (2, 4, *vae.grid(9, 12, 8)) == (2, 4, 3, 3, 2)
    image = vae.encode(video[:, :, :1])
    assert image.shape == (2, 4, 1, 3, 2) and close(image, latent[:, :, :1])
    decoded = vae.decode(image)
    assert decoded.shape == (2, 2, 1, 12, 8) and close(decoded, vae.decode(latent)[:, :, :1])


def test_a_latent_frame_depends_on_its_past_and_never_on_later_pixels(vae):
    video = video_of(13).requires_grad_()
    for j, frame in enumerate(vae.encode(video).unbind(2)):
        (slope,) = torch.autograd.grad(frame.square().sum(), video, retain_graph=True)
        reach = slope.abs().amax((0, 1, 3, 4)) > 0  # [T]
        assert not reach[4 * j + 1 :].any()  # exactly nothing of the future
        assert reach[max(0, 4 * j - 3) : 4 * j + 1].all()  # all of its own block
        assert j == 0 or reach[: 4 * j - 3].any()  # and something of what was before


def test_a_clip_that_stands_still_stays_the_same_latent(vae):
    """Before the first frame there was the first frame, again and again: nothing begins."""
    latent = vae.encode(video_of(1).expand(-1, -1, 13, -1, -1))
    assert close(latent, latent[:, :, :1].expand_as(latent)) and latent[:, :, 0].std() > 0.1
    video = vae.reconstruct(latent)[0]
    assert close(video[:, :, 1:5], video[:, :, 5:9])


def test_a_decoded_frame_never_depends_on_later_latents(vae):
    latent = torch.randn(1, 4, 4, 3, 2, requires_grad=True)
    video = vae.reconstruct(latent)[0]
    for T in range(13):
        (slope,) = torch.autograd.grad(video[:, :, T].sum(), latent, retain_graph=True)
        assert (slope.abs().amax((0, 1, 3, 4)) > 0).tolist()[1 + (T + 3) // 4 :] == [False] * (
            3 - (T + 3) // 4
        )


@pytest.mark.parametrize(
    "chunks", [[21], [1, 4, 4, 4, 4, 4], [5, 16], [13, 4, 4], [1, 20], [9, 8, 4]]
)
def test_a_streamed_encoding_is_the_whole(vae, chunks):
    video = video_of(sum(chunks))
    parts = list(vae.encode_stream(video.split(chunks, dim=2)))
    assert [part.shape[2] for part in parts] == [-(-n // 4) for n in chunks]
    assert close(torch.cat(parts, dim=2), vae.encode(video))


def test_a_chunk_that_fills_no_latent_is_a_sentence(vae):
    with pytest.raises(ValueError, match="3 frames: chunks after the first take 4 k frames"):
        list(vae.encode_stream(video_of(8).split([5, 3], dim=2)))


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 4], [5, 1], [1, 3, 2]])
def test_a_streamed_decoding_is_the_whole(vae, chunks):
    latent = 0.3 * torch.randn(2, 4, 6, 3, 2, generator=random_state(1))
    parts = list(vae.decode_stream(latent.split(chunks, dim=2)))
    assert parts[0].shape[2] == 4 * chunks[0] - 3
    whole = vae.decode(latent)
    assert close(torch.cat(parts, dim=2), whole) and (whole.abs() < 1).float().mean() > 0.3


def test_the_kl_term_is_the_divergence_from_a_standard_normal(vae):
    video = video_of(5)
    mu, log_var, _ = vae.posterior(video)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, (0.5 * log_var).exp()), normal(0, 1)).mean()
    noise = torch.randn(mu.shape, generator=random_state(2))
    loss, logs = vae.loss(video, noise)
    error = (vae.reconstruct(mu + (0.5 * log_var).exp() * noise)[0] - video).square().mean()
    assert logs["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert loss.item() == pytest.approx((error + vae.config.kl * kl).item(), rel=1e-5)
    assert logs["psnr"] == pytest.approx(10 * np.log10(4 / error.item()), rel=1e-5)


def test_measured_latents_have_mean_0_and_variance_1():
    torch.manual_seed(1)
    vae = with_random_weights(VAE(VAEConfig(colors=2, width=16)))
    videos = [video_of(9), video_of(5, seed=1), video_of(1, seed=2)]
    vae.measure_statistics(videos)
    latents = [vae.encode(video).transpose(0, 1).flatten(1) for video in videos]
    latent = torch.cat(latents, dim=1)  # [Z, numbers]
    assert close(latent.mean(1), torch.zeros(4), 1e-4) and close(latent.std(1), torch.ones(4), 1e-4)


@pytest.mark.parametrize("size", [(0, 8, 8), (4, 8, 8), (5, 6, 8), (5, 8, 0)])
def test_a_size_that_the_vae_cannot_divide_is_a_sentence(vae, size):
    with pytest.raises(ValueError, match="the VAE takes"):
        vae.grid(*size)


# ========================================================================== the concept: patches.py


def test_patches_are_in_reading_order():
    latent = torch.arange(2 * 2 * 4 * 6).reshape(2, 2, 4, 6)  # [Z, t, h, w]
    tokens = patches.patchify(latent, 2)
    position = patches.grid_positions(2, 4, 6, 2)
    assert tokens.shape == (2 * 2 * 3, 2 * 2 * 2) and position[4].tolist() == [0, 1, 1]
    for token, (t, r, c) in zip(tokens, position.tolist(), strict=True):
        square = latent[:, t, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]  # [Z, p, p]
        assert torch.equal(token, square.permute(1, 2, 0).flatten())  # row, column, channel


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    "grid, p", [((1, 2, 2), 2), ((3, 4, 6), 2), ((2, 6, 3), 3), ((2, 3, 5), 1)]
)
def test_unpatchify_undoes_patchify(batch, grid, p):
    latent = torch.randn(*batch, 5, *grid)
    tokens = patches.patchify(latent, p)
    assert tokens.shape == (*batch, patches.token_count(grid, p), p * p * 5)
    assert torch.equal(patches.unpatchify(tokens, grid, p), latent)


def test_first_fit_names_each_clip_once_and_fills_well():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 65, rng.integers(1, 80)).tolist()
        rows = patches.first_fit(lengths, 64)
        used = [sum(lengths[c] for c in row) for row in rows]
        assert sorted(c for row in rows for c in row) == list(range(len(lengths)))
        assert max(used) <= 64 and min(used) > 0
        # No clip of a later row would have fitted into an earlier one.
        assert all(
            used[r] + lengths[c] > 64
            for r in range(len(rows))
            for row in rows[r + 1 :]
            for c in row
        )
    assert patches.first_fit([7, 22, 15], 24) == [[1], [2, 0]]  # the docstring's example
    with pytest.raises(ValueError, match="clip 1 has 25 tokens, but a row has room for 24"):
        patches.first_fit([3, 25], 24)


def test_longest_prefix_takes_all_that_fits():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lengths, rows = rng.integers(1, 65, 60).tolist(), int(rng.integers(1, 9))
        plan = patches.longest_prefix(lengths, 64, rows)
        n = sum(map(len, plan))
        assert sorted(c for row in plan for c in row) == list(range(n)) and 1 <= len(plan) <= rows
        assert n == len(lengths) or len(patches.first_fit(lengths[: n + 1], 64)) > rows
    assert sum(map(len, patches.longest_prefix([64] * 9, 64, 4))) == 4


def three_clips(seed: int = 0) -> tuple[list[Tensor], list[list[int]]]:
    """The clips of the docstring of patches.py."""
    g = random_state(seed)
    latents = [torch.randn(5, *grid, generator=g) for grid in ((1, 4, 4), (3, 4, 6), (2, 6, 4))]
    return latents, [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_the_packing_of_the_docstring():
    latents, texts = three_clips()
    packed = patches.pack(latents, texts, 2, 24)
    assert packed.sample_id.tolist() == [[1] * 22 + [-1] * 2, [2] * 15 + [0] * 7 + [-1] * 2]
    assert packed.frame_clip.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert packed.frame_is_text.int().tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert packed.frame_id[1].tolist() == [6] * 3 + [7] * 6 + [8] * 6 + [0] * 3 + [1] * 4 + [0] * 2
    assert packed.text[1].tolist() == [8, 9, 10] + [-1] * 12 + [1, 2, 3] + [-1] * 6
    assert packed.fill == 44 / 48 and int(packed.is_patch.sum()) == 4 + 18 + 12
    assert packed.position[0, :6].tolist() == [
        [-4, 0, 0],
        [-3, 0, 0],
        [-2, 0, 0],
        [-1, 0, 0],
        [0, 0, 0],
        [0, 0, 1],
    ]
    assert all(map(torch.equal, patches.unpack(packed.tokens, packed), latents))
    levels = [torch.tensor([0.1]), torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6])]
    table = patches.frame_levels(packed, levels)
    assert close(table, torch.tensor([0, 0.1, 0, 0.2, 0.3, 0.4, 0, 0.5, 0.6]), 1e-7)


def test_a_plan_that_loses_a_clip_or_overfills_a_row_is_refused():
    latents, texts = three_clips()
    with pytest.raises(ValueError, match="each of the 3 clips once"):
        patches.pack(latents, texts, 2, 24, [[0], [2]])
    with pytest.raises(ValueError, match="row 0 of the plan has 29 tokens"):
        patches.pack(latents, texts, 2, 24, [[0, 1], [2]])


# ======================================================================== the concept: attention.py


def test_rotary_scores_know_only_distances():
    """Shift a clip in time, rows and columns: q . k stays, for each pair of its tokens."""
    position = patches.grid_positions(3, 8, 10, 2)
    q, k = torch.randn(2, len(position), 1, 64, generator=random_state(3))
    scores = []
    for shift in ((0, 0, 0), (5, 0, 0), (0, 9, 0), (0, 0, 13), (7, 2, 11), (-4, 0, 0)):
        turn = attention.rotary_angles(position + torch.tensor(shift), 64, 100.0)
        a, b = (attention.rotate(x, *turn)[:, 0] for x in (q, k))  # [n, head]
        assert close(a.norm(dim=-1), q[:, 0].norm(dim=-1))
        scores.append(a @ b.T)
    assert all(close(score, scores[0]) for score in scores[1:])
    assert not close(scores[0], q[:, 0] @ k[:, 0].T, 0.05)


def test_attention_inside_clips_is_softmax_under_the_mask():
    packed = patches.pack(*three_clips(), 2, 24)
    q, k, v = torch.randn(3, 2, 24, 2, 16, generator=random_state(4))  # [B, L, heads, head]
    order, groups = attention.clips_by_length(packed.sample_id)
    assert groups == ((1, 7), (1, 15), (1, 22))
    out = attention.packed_attention(*(x.flatten(0, 1)[order] for x in (q, k, v)), groups)
    real = packed.sample_id.flatten()[order] >= 0
    mask = packed.sample_id[:, None, :, None] == packed.sample_id[:, None, None, :]
    score = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    weight = score.masked_fill(~mask, -torch.inf).softmax(-1)
    whole = torch.einsum("bhij,bjhd->bihd", weight, v)
    assert real.sum() == 44 and close(out[real], whole.flatten(0, 1)[order][real])


@pytest.mark.parametrize("path", ["grouped", "flex", "varlen"])
def test_every_path_of_attention_is_that_of_each_clip_alone(path):
    """FlexAttention has no backward pass on a CPU, and varlen has nothing there."""
    if path == "varlen" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device, kind = ("cuda", torch.bfloat16) if path == "varlen" else ("cpu", torch.float32)
    groups, lengths = ((2, 7), (3, 20), (1, 530)), [7, 7, 20, 20, 20, 530]
    state = random_state(6)
    q, k, v = torch.randn(3, sum(lengths) + 9, 2, 16, generator=state).to(device, kind)  # padding
    out = attention.packed_attention(q, k, v, groups, path)
    start = 0
    for n in lengths:
        a, b, c = (x[start : start + n].float().transpose(0, 1) for x in (q, k, v))
        alone = (a @ b.mT / 4).softmax(-1) @ c  # [heads, n, head]
        here = out[start : start + n].float().transpose(0, 1)
        assert close(here, alone, 1e-5 if kind == torch.float32 else 2e-2)
        start += n
    assert not out[start:].any()


def test_both_ways_of_attending_agree():
    q, k, v = torch.randn(3, 1, 2, 600, 16, generator=random_state(5))
    fused = attention.attend(q, k, v)
    assert close(fused, (q @ k.mT / 4).softmax(-1) @ v)
    assert close(attention.attend(q[..., :500, :], k[..., :500, :], v[..., :500, :]),
                 torch.nn.functional.scaled_dot_product_attention(
                     *(x[..., :500, :] for x in (q, k, v))))  # fmt: skip


def places(packed: patches.Packed) -> tuple[Tensor, Tensor, Tensor]:
    """What `neighbours` asks for: position [N, 3], sample_id [N], is_text [N]."""
    return tuple(x.flatten(0, 1) for x in (packed.position, packed.sample_id, packed.text >= 0))


@pytest.mark.parametrize("order", [None, 7])
def test_neighbours_are_one_step_away_in_the_same_clip(order):
    """Found by looking at all pairs; windows from later on start at time 1; in any order."""
    packed = patches.pack(*three_clips(), 2, 24, starts=[0, 1, 0])
    position, sample_id, is_text = places(packed)
    if order:
        other = torch.randperm(len(position), generator=random_state(order))
        position, sample_id, is_text = position[other], sample_id[other], is_text[other]
    near, N = attention.neighbours(position, sample_id, is_text), len(position)
    step = position[None] - position[:, None]  # [N, N, 3]
    alike = (sample_id[:, None] == sample_id) & (sample_id >= 0) & (is_text[:, None] == is_text)
    for k, way in enumerate(attention.BESIDE):
        there = alike & (step == way).all(-1)
        assert there.sum(1).max() == 1
        assert torch.equal(near[:, k], torch.where(there.any(1), there.int().argmax(1), N))
    assert (near[sample_id < 0] == N).all() and (near[is_text, 2:] == N).all()
    words = near[is_text, 1]  # the next word of a caption, if there is one
    assert (words < N).sum() == is_text.sum() - 3


def test_a_stencil_is_a_depthwise_convolution():
    """Against conv3d on one clip's grid, and its gradients against numerical ones."""
    state = random_state(24)
    z = torch.randn(4, 3, 6, 8, generator=state, dtype=torch.float64)
    packed = patches.pack([z], [[]], 1, 3 * 6 * 8 + 2)
    near = attention.neighbours(*places(packed))
    weight = torch.randn(6, 1, 4, generator=state, dtype=torch.float64)
    kernel = torch.zeros(4, 1, 3, 3, 3, dtype=torch.float64)
    for k, (t, row, column) in enumerate(attention.BESIDE.tolist()):
        kernel[:, 0, 1 + t, 1 + row, 1 + column] = weight[k, 0]
    expected = torch.nn.functional.conv3d(z, kernel, padding=1, groups=4)  # [4, 3, 6, 8]
    tokens = torch.cat([z.flatten(1).T, torch.randn(2, 4, dtype=torch.float64)])  # and padding
    out = attention.Stencil.apply(tokens, near, weight)
    assert close(out[:-2], expected.flatten(1).T) and not out[-2:].any()
    near = attention.neighbours(*places(patches.pack(*three_clips(), 2, 24)))
    given = (torch.randn(48, 2, generator=state, dtype=torch.float64), weight[..., :2].clone())
    x, weight = (value.requires_grad_() for value in given)
    assert torch.autograd.gradcheck(lambda x, w: attention.Stencil.apply(x, near, w), (x, weight))


# ============================================================================== the concept: dit.py


@pytest.fixture(scope="module")
def network_of_three() -> DiT:
    torch.manual_seed(0)
    return with_random_weights(DiT(DiTConfig(20, 20, 16, width=64, depth=3, heads=2)))


LEVELS = [torch.tensor([0.7]), torch.tensor([0.0, 0.4, 0.9]), torch.tensor([1.0, 0.2])]


def denoise_packed(model: DiT, latents, texts, levels, budget=24, rows=None) -> list[Tensor]:
    packed = patches.pack(latents, texts, 2, budget, rows)
    return patches.unpack(
        model(packed.tokens, patches.frame_levels(packed, levels), packed), packed
    )


PLANS = [(24, None), (44, [[2, 0, 1]]), (64, [[], [1, 2], [0], []]), (22, [[1], [0], [2]])]


@pytest.mark.parametrize("budget, rows", PLANS)
def test_a_packed_clip_gives_what_it_gives_alone(network_of_three, budget, rows):
    latents, texts = three_clips()
    together = denoise_packed(network_of_three, latents, texts, LEVELS, budget, rows)
    for k, out in enumerate(together):
        (alone,) = denoise_packed(network_of_three, [latents[k]], [texts[k]], [LEVELS[k]])
        assert close(out, alone) and alone.std() > 0.1


def test_clips_of_equal_length_are_attended_together_and_stay_apart(network_of_three):
    g = random_state(21)
    grids = ((1, 4, 4), (3, 4, 6), (1, 2, 8), (1, 4, 4))
    latents = [torch.randn(5, *grid, generator=g) for grid in grids]
    texts = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [1, 2, 3]]
    levels = [torch.tensor([0.7]), LEVELS[1], torch.tensor([0.2]), torch.tensor([0.7])]
    plan = [[1], [3, 0], [2]]
    packed = patches.pack(latents, texts, 2, 24, plan)
    assert attention.clips_by_length(packed.sample_id)[1] == ((3, 7), (1, 22))
    together = denoise_packed(network_of_three, latents, texts, levels, 24, plan)
    for k, out in enumerate(together):
        (alone,) = denoise_packed(network_of_three, [latents[k]], [texts[k]], [levels[k]])
        assert close(out, alone)
    assert not close(together[0], together[3], 0.1)  # same caption, grid and level: other pixels


def test_packed_gradients_are_those_of_the_clips_alone(network_of_three):
    latents, texts = three_clips()
    weights = [torch.randn(x.shape, generator=random_state(9)) for x in latents]

    def gradients(which: list[int]) -> list[Tensor]:
        inputs = [latents[k].clone().requires_grad_() for k in which]
        picked = ([x[k] for k in which] for x in (texts, LEVELS))
        outs = denoise_packed(network_of_three, inputs, *picked)
        loss = sum((weights[k] * out.square()).sum() for k, out in zip(which, outs, strict=True))
        return torch.autograd.grad(loss, [*inputs, *network_of_three.parameters()])

    together, alone = gradients([0, 1, 2]), [gradients([k]) for k in range(3)]
    for k in range(3):
        assert close(together[k], alone[k][0]) and alone[k][0].abs().max() > 0.01
    for packed, *parts in zip(together[3:], *(one[1:] for one in alone), strict=True):
        assert close(packed, sum(parts)) and packed.abs().max() > 0


def test_padding_has_no_influence(network_of_three):
    latents, texts = three_clips()
    clean = patches.pack(latents, texts, 2, 30, [[1], [2, 0], []])
    level = patches.frame_levels(clean, LEVELS)
    padded = clean.sample_id < 0
    dirty = replace(
        clean,
        tokens=clean.tokens.masked_fill(padded[..., None], 1000.0),
        position=clean.position.masked_fill(padded[..., None], -77),
        frame_id=clean.frame_id.masked_fill(padded, 3),
    )
    outs = [network_of_three(x.tokens, level, x) for x in (clean, dirty)]
    assert padded.sum() == 90 - 44 and close(*(out[~padded] for out in outs), 1e-6)
    parameters = list(network_of_three.parameters())
    slopes = [torch.autograd.grad(out[~padded].square().sum(), parameters) for out in outs]
    assert all(map(close, *slopes))


def test_caption_order_level_and_position_all_matter(network_of_three):
    """Else the tests of packing would hold for a network that ignores them."""
    (latent,), (words,), level = [[x[1]] for x in three_clips()][0], [[4, 5, 6, 7]], [LEVELS[1]]
    packed = patches.pack([latent], [words], 2, 24)
    other_place = replace(packed, position=packed.position * torch.tensor([1, 1, 2]))
    base = network_of_three(packed.tokens, patches.frame_levels(packed, level), packed)
    turned = network_of_three(packed.tokens, patches.frame_levels(packed, level), other_place)
    assert (base - turned)[packed.is_patch].abs().max() > 1e-3
    (base,) = patches.unpack(base, packed)
    for caption in ([4, 5, 7, 6], [4, 5, 6, 8], [4, 5, 6]):
        (out,) = denoise_packed(network_of_three, [latent], [caption], level)
        assert (out - base).abs().amax((0, 2, 3)).min() > 1e-4  # in every frame
    (out,) = denoise_packed(network_of_three, [latent], [words], [torch.tensor([0.0, 0.5, 0.9])])
    assert (out - base)[:, 1].abs().mean() > 2 * (out - base)[:, 0].abs().mean() > 0


def test_the_places_of_words_are_counted_in_each_caption():
    owner = torch.tensor([2, 2, 2, 0, 3, 3])  # clips in any order, as sorting by length leaves them
    assert dit.places_of(owner).tolist() == [0, 1, 2, 0, 0, 1]


def test_the_summary_of_a_caption_is_of_its_own_words():
    packed = patches.pack(*three_clips(), 2, 24)
    words = torch.randn(48, 8, generator=random_state(20))  # a vector for each place of the rows
    is_text = packed.text.flatten() >= 0
    sums = dit.sum_of_each(words[is_text], packed.sample_id.flatten()[is_text], 4)
    places = [range(24 + 15, 24 + 18), range(4), range(24, 27)]  # see the packing of the docstring
    expected = [words[list(place)].sum(0) / (2 * len(place) ** 0.5) for place in places]
    assert close(sums, torch.stack([*expected, torch.zeros(8)]))  # without a caption: zero
    assert close(sums[1], words[:4].mean(0))


def test_a_shifted_clip_gives_the_same(network_of_three):
    packed = patches.pack(*three_clips(), 2, 24)
    shifted = replace(packed, position=packed.position + torch.tensor([3, 5, 2]))
    level = patches.frame_levels(packed, LEVELS)
    a, b = (network_of_three(packed.tokens, level, x) for x in (packed, shifted))
    assert close(a, b)


def test_recomputed_and_compiled_blocks_give_the_same_gradients(network_of_three):
    """On batches of other layouts, too; compiled only as far as graphs of PyTorch's operations."""
    plain = network_of_three
    other = deepcopy(plain)
    other.recompute = True
    for block in other.blocks:
        block.compile(backend="aot_eager")
    for rows in (None, [[0], [1], [2]]):
        latents, texts = three_clips()
        packed = patches.pack(latents, texts, 2, 24, rows)
        level = torch.linspace(0, 1, len(packed.frame_clip))
        found = []
        for model in (plain, other):
            model.zero_grad()
            model(packed.tokens, level, packed).square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert all(close(found[1][name], value) for name, value in found[0].items())
    plain.zero_grad()


def test_adaln_zero_starts_as_the_identity_and_says_zero():
    torch.manual_seed(0)
    model = DiT(DiTConfig(20, 20, 16, width=64, depth=2, heads=2))
    latents, texts = three_clips()
    assert all((out == 0).all() for out in denoise_packed(model, latents, texts, LEVELS))
    seen = []
    hooks = [b.register_forward_hook(lambda _, i, o: seen.append((i[0], o))) for b in model.blocks]
    denoise_packed(model, latents, texts, LEVELS)
    assert len(hooks) == len(seen) == 2
    assert all(torch.equal(x, y) and x.std() > 0 for x, y in seen)


# ======================================================================== the concept: diffusion.py

EVERY_LEVEL = torch.linspace(0, 1, 101)


def test_signal_and_noise_are_sides_of_a_right_triangle():
    signal, noise = diffusion.signal_noise(EVERY_LEVEL)
    assert close(signal.square() + noise.square(), torch.ones(101), 1e-6)
    assert signal[-1] == 0 and noise[0] == 0 and signal[0] == 1 and noise[-1] == 1  # exactly
    assert (signal.diff() < 0).all() and (noise.diff() > 0).all()
    clean, eps = torch.randn(2, 101)
    assert torch.equal(
        diffusion.add_noise(clean, eps, EVERY_LEVEL)[[0, -1]], torch.stack([clean[0], eps[-1]])
    )


@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0, 9.0])
def test_shifted_levels_hide_more_by_the_square_root(ratio):
    shifted = diffusion.shift_level(EVERY_LEVEL, ratio)
    assert shifted[0] == 0 and shifted[-1] == 1  # exactly
    (s, n), (s2, n2) = (diffusion.signal_noise(x[1:-1].double()) for x in (EVERY_LEVEL, shifted))
    assert torch.allclose(n2 / s2, ratio**0.5 * n / s, rtol=1e-4)
    assert (shifted.diff() > 0).all()
    assert close(diffusion.shift_level(shifted, 1 / ratio), EVERY_LEVEL)


def test_x_v_and_eps_say_the_same():
    clean, eps = torch.randn(2, 101, 8, generator=random_state(6)).double()
    level = EVERY_LEVEL[:, None].double()
    x, (signal, noise) = diffusion.add_noise(clean, eps, level), diffusion.signal_noise(level)
    for prediction, output in (("x", clean), ("v", signal * eps - noise * clean), ("eps", eps)):
        says = diffusion.to_clean(output, x, level, prediction)
        known = slice(None, -1) if prediction == "eps" else slice(None)  # level 1: eps says nothing
        assert close(says[known], clean[known], 1e-6)


def test_the_loss_is_an_error_of_v_until_it_is_clipped():
    clean, eps = torch.randn(2, 101, 8, generator=random_state(7))
    level = EVERY_LEVEL[:, None]
    signal, noise = diffusion.signal_noise(level)
    wrong = clean + torch.randn(101, 8, generator=random_state(8))
    loss = diffusion.denoising_error(lambda x, level: wrong, clean, eps, level)
    x = diffusion.add_noise(clean, eps, level)
    v_error = (signal * x - wrong) / noise.clamp(min=1e-9) - (signal * eps - noise * clean)
    free = (noise.square() > 1 / 5).expand_as(loss)
    assert torch.allclose(loss[free], v_error.square()[free], rtol=1e-3, atol=1e-4)
    assert torch.allclose(loss[~free], 5 * (wrong - clean).square()[~free])
    assert 20 * 8 < int(free.sum()) < 90 * 8


def test_training_levels_are_spread_evenly():
    level = diffusion.training_levels(64, random_state(0))
    share = torch.special.ndtr(torch.logit(level) - diffusion.LOGIT_MEAN)  # under the bell curve
    assert ((share.sort()[0] * 64).floor() == torch.arange(64)).all()
    assert not torch.equal(level, level.sort()[0])


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_ddim_with_the_true_clean_clip_keeps_its_noise_and_recovers_it(prediction):
    clean, eps = torch.randn(2, 3, 4, 5, generator=random_state(10)).double()
    start = torch.full((3, 1, 1), 0.98 if prediction == "eps" else 1.0).double()
    seen = []

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        assert close(x, diffusion.add_noise(clean, eps, level))  # the noise is still the same
        seen.append(float(level[0]))
        signal, noise = diffusion.signal_noise(level)
        return {"x": clean, "eps": eps, "v": signal * eps - noise * clean}[prediction]

    levels = diffusion.straight_levels(7, start)
    out = diffusion.sample(denoise, diffusion.add_noise(clean, eps, start), levels, 0.0, prediction)
    assert close(out, clean) and len(seen) == 7 and levels.shape == (8, 3, 1, 1)


@pytest.mark.parametrize("level, to", [(1.0, 0.9), (0.9, 0.3), (0.5, 0.49), (0.2, 0.0), (1.0, 0.0)])
def test_the_ancestral_step_draws_from_the_posterior(level, to):
    """DDPM, equations 6 and 7, in DDPM's letters, with `to` one step before `level`."""
    level, to = torch.tensor([level, to]).double()
    a_bar, a_bar_before = (diffusion.signal_noise(x)[0] ** 2 for x in (level, to))
    alpha = a_bar / a_bar_before
    beta = 1 - alpha
    x0, xt = torch.randn(2, 50, generator=random_state(11)).double()
    mean = a_bar_before.sqrt() * beta / (1 - a_bar) * x0
    mean = mean + alpha.sqrt() * (1 - a_bar_before) / (1 - a_bar) * xt
    variance = (1 - a_bar_before) / (1 - a_bar) * beta

    def step(fresh: Tensor) -> Tensor:
        return diffusion.step(xt, x0, level, to, 1.0, fresh)

    zero, one = torch.zeros(50).double(), torch.ones(50).double()
    assert close(step(zero), mean)
    assert close((step(one) - step(zero)).square(), variance.expand(50))
    draws = step(torch.randn(40_000, 50, generator=random_state(12)).double())
    assert close(draws.mean(0), mean, 0.03)
    assert draws.var(0).mean().item() == pytest.approx(variance.item(), rel=0.01)


def test_ancestral_sampling_of_a_gaussian_has_its_mean_and_variance():
    """For clean ~ N(m, s^2) the perfect denoiser is known; many small steps must give N(m, s^2)."""
    m, s = 1.5, 0.5

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        signal, noise = diffusion.signal_noise(level)
        return m + s**2 * signal / (s**2 * signal**2 + noise**2) * (x - signal * m)

    levels = diffusion.straight_levels(200, torch.ones(1))
    x = torch.randn(1, 40_000, generator=random_state(13))
    for eta in (0.0, 1.0):
        out = diffusion.sample(denoise, x, levels, eta, generators=[random_state(14)])
        assert out.mean().item() == pytest.approx(m, abs=0.02)
        assert out.std().item() == pytest.approx(s, abs=0.02)


def mix(x: Tensor, level: Tensor) -> Tensor:
    """A stand-in for a network: each clip's output depends on all of its numbers."""
    return torch.tanh(x + x.flatten(1).mean(1).view(-1, 1, 1, 1, 1) * level)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_given_frames_are_bit_equal_whatever_the_network_says(eta):
    x = torch.randn(2, 3, 5, 4, 4, generator=random_state(15))
    given = torch.tensor([1, 0, 0, 1, 0]).bool()
    start = torch.where(given, 0.0, 1.0).view(1, 1, 5, 1, 1)
    levels = diffusion.straight_levels(6, start)
    levels[:, :, :, 3] = 0.07  # a noisy context: given, and known not to be clean

    def wild(x: Tensor, level: Tensor) -> Tensor:
        return torch.where(given.view(1, 1, 5, 1, 1), torch.nan, mix(x, level))

    out = diffusion.sample(wild, x, levels, eta, generators=[random_state(k) for k in (0, 1)])
    assert torch.equal(out[:, :, given], x[:, :, given])
    assert out.isfinite().all() and (out != x)[:, :, ~given].all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_clip_does_not_depend_on_its_batch(eta):
    x = torch.randn(3, 2, 4, 4, 4, generator=random_state(16))
    levels = diffusion.straight_levels(5, torch.ones(1, 1, 1, 1, 1))

    def run_of(which: list[int]) -> Tensor:
        generators = [random_state(100 + k) for k in which]
        return diffusion.sample(mix, x[which], levels, eta, generators=generators)

    together = run_of([0, 1, 2])
    for which in ([0], [2], [1, 0]):
        assert torch.equal(run_of(which), together[which])


def test_guidance_1_is_no_guidance_and_more_goes_beyond():
    x, level = torch.randn(2, 1, 3, 4, 4), torch.tensor(0.5)

    def without(x: Tensor, level: Tensor) -> Tensor:
        return 0.3 * x - 1

    assert diffusion.guided(mix, without, 1) is mix
    a, b = mix(x, level), without(x, level)
    for strength in (0.0, 0.5, 3.0):  # equation 6 of the paper, w = strength - 1
        w = strength - 1
        assert close(diffusion.guided(mix, without, strength)(x, level), (1 + w) * a - w * b)
    near = diffusion.guided(mix, without, 1 + 1e-7)(x, level)
    assert close(near, a)


def test_levels_that_rise_are_refused():
    x, levels = torch.randn(1, 1, 2, 1, 1), torch.ones(3, 1, 1, 2, 1, 1)
    levels[1:, ..., 0, :, :] = 0.5
    levels[2, ..., 0, :, :] = 0.6
    with pytest.raises(ValueError, match="never rise"):
        diffusion.sample(mix, x, levels)


# ============================================================================= the concept: text.py


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.from_captions(["a 7 moving left", "a 3 moving up and an 8 moving right"], 300)


@pytest.mark.parametrize("said", [
    "", " ", "  ", "\n", " a", "a ", "a  b\t\r\n", "a 7 moving left", "A 7 MOVING", "löft",
    "日本語", "\U0001f642\u200d\u2642\ufe0f", "\0", "\ufeff\u2028\x85", "ö" * 99, "a7moving,left!",
    "\ufffd",
])  # fmt: skip
def test_any_text_comes_back(words, said):
    assert words.decode(words.encode(said)) == said


def test_random_unicode_comes_back(words):
    rng = np.random.default_rng(0)
    for top in (128, 0x250, 0x3000, 0x110000):
        for _ in range(200):
            codes = rng.integers(0, top, rng.integers(1, 30))
            said = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
            ids = words.encode(said)
            assert words.decode(ids) == said and 0 <= min(ids) and max(ids) < words.size


def test_known_words_are_one_token_and_others_are_bytes(words):
    assert len(words.encode("a 7 moving left")) == 4 and len(set(words.encode("a a a"))) == 1
    assert words.encode("a löft")[1:] == list(" löft".encode())
    assert words.encode("") == [text.NOTHING] and words.decode([text.NOTHING, text.END]) == ""
    assert words.decode(words.encode("ö")[:-1]) == "\ufffd"
    assert Tokenizer(words.words).encode("a 3 moving up") == words.encode("a 3 moving up")
    small = Tokenizer.from_captions(["b b b a a c"], text.SPECIALS + 2)
    assert small.words == [" b", " a"] and small.size == text.SPECIALS + 2
    with pytest.raises(ValueError, match="too small"):
        Tokenizer.from_captions([], 100)


# ============================================================================= the concept: data.py


@pytest.fixture(scope="module")
def moving() -> data.World:
    return data.World(data.WorldConfig(), *evaluate.digits(held_out=False), seed=5)


def test_a_clip_is_a_function_of_its_seed_and_number(moving):
    index = np.arange(40)
    pixels, facts = moving.clips(index)
    order = np.random.default_rng(0).permutation(40)
    for which in (order, order[:7], order[3:4]):
        some, their = moving.clips(which)
        assert all(np.array_equal(some[j], pixels[k]) for j, k in enumerate(which))
        assert their == [facts[k] for k in which] == moving.all_facts(which, moving.size(which))
    assert len({clip.tobytes() for clip in pixels}) == 40  # all different
    other = data.World(moving.config, *evaluate.digits(held_out=False), seed=6)
    assert [f["digits"] for f in other.all_facts(index, other.size(index))] != [
        f["digits"] for f in facts
    ]
    far = np.array([10**15, 2**62])  # no clip is too far away
    assert np.array_equal(moving.clips(far)[0][1], moving.clips(far[1:])[0][0])


def bounce(start: int, velocity: int, room: int, frames: int) -> tuple[list[int], int]:
    """Pixel by pixel: turn round where the next is behind the wall. Places, and number of turns."""
    place, way, turns, places = start, int(np.sign(velocity)), 0, [start]
    for _ in range(frames - 1):
        for _ in range(abs(velocity)):
            if room and not 0 <= place + way <= room:
                way, turns = -way, turns + 1
            place += way if room else 0
        places.append(place)
    return places, turns


@pytest.mark.parametrize("extra", [(0, 9), (3, 5), (30, 1), (18, 26)])
def test_digits_bounce_as_in_a_simulation_step_by_step(moving, extra):
    n, frames, d = 150, 41, moving.config.digit
    size = np.tile((frames, d + extra[0], d + extra[1]), (n, 1))
    facts = moving.facts(np.arange(n), size)
    path = moving.path(facts, size, frames)
    described = moving.all_facts(np.arange(n), size)
    for k in range(n):
        for j in np.flatnonzero(facts["present"][k]):
            walks = [
                bounce(*facts["start"][k, j, [a]], facts["velocity"][k, j, a], extra[a], frames)
                for a in (0, 1)
            ]
            assert path[k, :, j].T.tolist() == [walk[0] for walk in walks]
            assert described[k]["digits"][j]["bounces"] == sum(walk[1] for walk in walks)
    # From later on, it is a clip that sets out from there.
    frames = np.arange(n) % 20
    later = moving.later(facts, size, frames)
    ways = moving.path(later, size, 21)
    assert all(np.array_equal(ways[k], path[k, t : t + 21]) for k, t in enumerate(frames))
    assert moving.describe_all(later, size) == moving.all_facts(np.arange(n), size, frames)
    assert moving.all_facts(np.arange(n), size, 0) == described
    assert path.min() >= 0 and (path <= size[:, None, None, 1:] - d).all()


def test_pixels_are_the_sprites_at_their_places(moving):
    index = np.arange(30)
    sizes = moving.size(index)
    facts, (pixels, _) = moving.facts(index, sizes), moving.clips(index)
    for k, (T, H, W) in enumerate(sizes):
        path = moving.path({n: v[k : k + 1] for n, v in facts.items()}, sizes[k : k + 1], T)[0]
        expected, d = np.zeros((T, H, W), np.uint8), moving.config.digit
        for t in range(T):
            for j in np.flatnonzero(facts["present"][k]):
                r, c = path[t, j]
                box = expected[t, r : r + d, c : c + d]
                np.maximum(box, moving.sprites[facts["sprite"][k, j]], out=box)
        assert np.array_equal(pixels[k][0], expected) and pixels[k].dtype == np.uint8


def test_short_captions_say_what_happens(moving):
    index = np.arange(600)
    sizes = np.tile((9, 48, 48), (600, 1))
    facts = moving.facts(index, sizes)
    path = moving.path(facts, sizes, 9)
    counts = {1: 0, 2: 0}
    for k, said in enumerate(map(data.short_caption, moving.all_facts(index, sizes))):
        parts = [
            re.fullmatch(r"(an?) (\d) moving (\w+)", part).groups() for part in said.split(" and ")
        ]
        counts[len(parts)] += 1
        assert len(parts) == facts["present"][k].sum()
        order = range(len(parts))
        if len(parts) == 2:  # from left to right, or from top to bottom, whichever is farther
            far = np.abs(path[k, 0, 0] - path[k, 0, 1])
            order = path[k, 0, :, 1 if far[1] >= far[0] else 0].argsort()
        for j, (article, digit, way) in zip(order, parts, strict=True):
            first = np.sign(path[k, 1:5, j] - path[k, :4, j])  # at least four frames as said
            assert {tuple(x) for x in first} == {data.DIRECTIONS[way]}
            assert int(digit) == moving.labels[facts["sprite"][k, j]]
            assert article == ("an" if digit == "8" else "a")
        if len(parts) == 2:
            assert (abs(path[k, 0, 0] - path[k, 0, 1]) >= moving.config.digit).any()  # apart
    assert abs(counts[2] / 600 - moving.config.two_digits) < 0.07


def test_descriptive_captions_agree_with_the_facts(moving):
    for fact in moving.all_facts(np.arange(200), moving.size(np.arange(200))):
        said = data.descriptive_caption(fact)
        still = fact["frames"] == 1
        assert said.endswith("an image." if still else f"{fact['frames']} frames.")
        for d in fact["digits"]:
            way = f"{d['digit']} at {d['region']}"
            way += "" if still else f" moving {d['direction']} "
            way += "" if still else "fast" if d["speed"] > 1 else "slowly"
            way += "" if still else f", {d['bounces']} bounce"
            assert way in said
    facts = moving.all_facts(np.arange(200), moving.size(np.arange(200)))
    kinds = {(f["frames"] > 1, len(f["digits"])): text.pieces(data.descriptive_caption(f))
             for f in facts}  # fmt: skip
    lengths = {kind: len(kinds[kind]) for kind in kinds}
    assert lengths == {(False, 1): 9, (False, 2): 15, (True, 1): 15, (True, 2): 27}
    for fact in facts:  # always as many
        kind = fact["frames"] > 1, len(fact["digits"])
        assert len(text.pieces(data.descriptive_caption(fact))) == lengths[kind]


def test_descriptive_captions_tell_two_digits_as_one_reads(moving):
    """Nobody sees in the pixels which digit was named first."""
    for fact in moving.all_facts(np.arange(200), np.tile((17, 48, 32), (200, 1))):
        said = data.descriptive_caption(fact)
        turned = fact | {"digits": fact["digits"][::-1]}
        assert data.descriptive_caption(turned) == said
        told = [f"{d['digit']} at {d['region']} moving" for d in turned["digits"]]
        assert all(x in said for x in told)
        if len(told) == 2:  # the same order as in the short caption
            named = re.findall(r"\ban? (\d)", said)
            assert named == re.findall(r"\ban? (\d)", data.short_caption(fact))


def test_what_people_write_and_what_is_labelled_are_functions_of_the_clip(moving):
    index = np.arange(3000)
    facts = moving.all_facts(index, moving.size(index))
    short, known = moving.short_captions(index, facts), moving.labelled(index, 0.1)
    some = np.array([2500, 3, 77])
    assert moving.short_captions(some, [facts[k] for k in some]) == [short[k] for k in some]
    assert np.array_equal(moving.labelled(some, 0.1), known[some]) and 0.08 < known.mean() < 0.12
    assert (moving.labelled(index, 0.3) >= known).all() and moving.labelled(index, 1.0).all()
    assert not moving.labelled(index, 0.0).any()
    clean = np.array([said == data.short_caption(f) for said, f in zip(short, facts, strict=True)])
    assert 0.45 < clean.mean() < 0.6
    one = {said for said, fact in zip(short, facts, strict=True) if len(fact["digits"]) == 1}
    assert {"a 7", "digit moving", "7 left", "an eight", "digit", "nine moving"} <= one
    for said, fact in zip(short, facts, strict=True):  # what is told is true
        told = caption_reader.read_prompt(said)
        assert len(told) == len(fact["digits"])
        for a, b in zip(told, data.reading_order(fact["digits"]), strict=True):
            assert all(a[name] in (None, b[name]) for name in a)


def test_sizes_are_those_of_the_config(moving):
    c, sizes = moving.config, moving.size(np.arange(4000))
    still = sizes[:, 0] == 1
    assert abs(still.mean() - c.images) < 0.04
    assert set(map(tuple, sizes[~still, 1:])) == set(c.shapes)
    assert set(map(tuple, sizes[still, 1:])) == set(c.shapes + c.image_shapes)
    assert set(sizes[~still, 0]) == set(c.durations)
    assert (moving.size(np.arange(99), images=1.0)[:, 0] == 1).all()
    assert (moving.size(np.arange(99), images=0.0)[:, 0] > 1).all()
    with pytest.raises(ValueError, match="does not fit"):
        moving.facts(np.arange(1), np.array([(9, 8, 48)]))


def test_held_out_digits_are_never_trained_on():
    images, labels = data.load_digits(HERE / "digits.png")
    assert images.shape == (5000, 28, 28) and np.bincount(labels).tolist() == [500] * 10
    train, test = (data.split(images, labels, held_out=x) for x in (False, True))
    assert (
        np.bincount(train[1]).tolist() == [450] * 10 and np.bincount(test[1]).tolist() == [50] * 10
    )
    assert not {x.tobytes() for x in train[0]} & {x.tobytes() for x in test[0]}
    assert np.array_equal(test[0][:50], images[450:500])  # the last 50 of each class


def test_hashed_numbers_are_uniform_and_independent():
    u = data.hashed_uniform(3, np.arange(40_000), 8)
    assert u.shape == (40_000, 8) and 0 <= u.min() and u.max() < 1
    assert abs(u.mean(0) - 1 / 2).max() < 0.007 and abs(u.var(0) - 1 / 12).max() < 0.002
    counts = np.histogram(u, 64, (0, 1))[0] / (u.size / 64)
    assert abs(counts - 1).max() < 0.06
    neighbours = [
        u[1:],
        u[:-1],
        data.hashed_uniform(4, np.arange(39_999), 8),
    ]  # of clip and of seed
    table = np.corrcoef(np.concatenate(neighbours, axis=1).T) - np.eye(24)
    assert abs(table).max() < 0.025
    assert np.array_equal(data.hashed_uniform(3, [77], 3)[0], u[77, :3])


# ======================================================================================== the demos


@pytest.mark.parametrize(
    "concept",
    ["data", "vae", "patches", "attention", "dit", "diffusion", "text", "language", "recaption"],
)
def test_a_demo_runs_and_draws(concept, tmp_path):
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / f"{concept}.py")]
    done = subprocess.run(words, cwd=tmp_path, env=one, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"wrote {concept}_demo.png" in done.stdout or concept == "data"
    picture = np.asarray(Image.open(tmp_path / f"{concept}_demo.png").convert("L"))
    assert min(picture.shape) >= 100 and picture.std() > 10
    assert os.listdir(tmp_path) == [f"{concept}_demo.png"]


# ============================================================ reading clips: reader.py, evaluate.py

CONFIG = data.WorldConfig(digit=14, durations=(5, 9, 17), shapes=((32, 32), (24, 40), (48, 32)))


def world(share: float, held_out: bool = True, seed: int = 3) -> data.World:
    """A world in which this share of the clips has two digits."""
    config = data.WorldConfig(**{**asdict(CONFIG), "two_digits": share})
    return data.World(config, *evaluate.digits(held_out), seed)


@pytest.fixture(scope="module")
def network():
    """A classifier trained for a fifth of the usual time."""
    images, labels = evaluate.digits(held_out=False)
    return reader.train_classifier(data.make_sprites(images, CONFIG.digit), labels, epochs=2)


def test_classifier_knows_held_out_digits(network):
    images, labels = evaluate.digits(held_out=True)
    assert len(labels) == 500
    assert reader.accuracy(network, data.make_sprites(images, CONFIG.digit), labels) >= 0.95


@pytest.mark.parametrize("size", [(5, 24, 24), (9, 32, 32), (17, 24, 40)])
def test_one_digit_is_read_from_real_clips(network, size):
    clips, facts = world(0.0).clips(np.arange(80), size)
    seen = [reader.read_one(clip, network, CONFIG.digit) for clip in clips]
    scores = [reader.score_one(s, f["digits"]) for s, f in zip(seen, facts, strict=True)]
    assert all(score["direction"] == 1 for score in scores)
    assert np.mean([score["digit"] for score in scores]) >= 0.93


def test_two_digits_are_tracked_through_crossings():
    two, size, n = world(1.0), (17, 32, 32), 60
    sizes = np.tile(size, (n, 1))
    path = two.path(two.facts(np.arange(n), sizes), sizes, size[0])  # [n, T, 2, 2]
    crosses = (np.abs(path[:, :, 0] - path[:, :, 1]) < 10).all(-1).any(-1)
    assert crosses.sum() > 15
    for clip, true in zip(two.clips(np.arange(n), size)[0], path, strict=True):
        tracks = reader.track_two(reader.to_ink(clip), CONFIG.digit, fastest=2)
        offsets = [tracks[:, order] - true for order in ([0, 1], [1, 0])]  # either may be first
        # A box's corner and its digit's centre differ by the same all the time.
        assert min(np.abs(o - np.median(o, axis=0)).max() for o in offsets) <= 1


def test_two_digits_are_read_and_only_what_is_there(network):
    clips, facts = world(1.0).clips(np.arange(60), (9, 32, 48))
    seen = [reader.read_two(clip, network, CONFIG.digit) for clip in clips]

    def share(asked):
        scores = [reader.score_two(s, f["digits"]) for s, f in zip(seen, asked, strict=True)]
        return np.mean([score["both"] for score in scores])

    assert share(facts) >= 0.9
    assert share(facts[1:] + facts[:1]) <= 0.1  # the prompts of other clips


def test_score_two_takes_either_order_but_no_exchange():
    asked = [{"digit": 3, "direction": "up"}, {"digit": 8, "direction": "right"}]
    swapped = {"digits": [8, 3], "directions": ["right", "up"]}
    assert reader.score_two(swapped, asked) == {"digits": 1, "directions": 1, "both": 1}
    exchanged = {"digits": [8, 3], "directions": ["up", "right"]}
    assert reader.score_two(exchanged, asked) == {"digits": 1, "directions": 1, "both": 0}
    twice = {"digits": [3, 3], "directions": ["up", "right"]}
    assert reader.score_two(twice, asked) == {"digits": 0, "directions": 1, "both": 0}


@pytest.mark.parametrize(
    "steps, way",
    [
        ([(0, -1), (0, -2), (0, -3), (0, -4), (0, 9)], "left"),  # not what comes later
        ([(0, 2), (0, 4), (0, 2), (0, 0)], "right"),  # turns back early
        ([(-1, 0.4), (-2, 0.8), (-3, 1.2), (-4, 1.6)], "up"),
        ([(2, 0)], "down"),
        ([(0.2, 0.3)] * 8, "still"),
        ([], "still"),
    ],
)
def test_heading(steps, way):
    assert reader.heading(np.array([(0, 0), *steps], float) + 7) == way


def test_sharpness_falls_under_blur_and_not_under_noise():
    clips = world(0.0).clips(np.arange(20), (9, 32, 32))[0]
    kernel = torch.ones(1, 1, 3, 3) / 9
    frames = [torch.from_numpy(clip).float().transpose(0, 1) for clip in clips]  # [T, 1, H, W]
    blurred = [torch.conv2d(x, kernel, padding=1).byte().transpose(0, 1).numpy() for x in frames]
    noise = np.random.default_rng(0)
    noisy = [(c + noise.normal(0, 10, c.shape)).clip(0, 255).astype(np.uint8) for c in clips]
    sharp = reader.sharpness(clips)
    assert reader.sharpness(blurred) < 0.8 * sharp
    assert 0.95 * sharp < reader.sharpness(noisy) < 1.15 * sharp  # nor does it pass for detail


def test_prompts_are_balanced_and_in_every_size():
    clips, facts = evaluate.real_clips(CONFIG, 120, 30, seed=1)
    sizes = [clip.shape[1:] for clip in clips]
    assert set(sizes) == {(17, 32, 32), (17, 24, 40), (17, 48, 32), (9, 32, 32), (5, 32, 32)}
    ones = [f["digits"][0] for f in facts if len(f["digits"]) == 1]
    kinds = [(d["digit"], d["direction"]) for d in ones]
    assert len(ones) == 120 and len(facts) == 150
    assert {kinds.count(kind) for kind in kinds} == {3} and len(set(kinds)) == 40


def test_figures_tell_a_perfect_model_from_a_deaf_one(network, monkeypatch, tmp_path):
    """Two stand-ins for a model: one renders its prompts, with digits that no prompt was made of;
    the other renders anything."""
    worlds = world(0.0, held_out=False), world(1.0, held_out=False)
    stock = {}  # a clip's world and number, by its caption
    for many, one in zip((1_000, 20_000), worlds, strict=True):
        facts = one.all_facts(np.arange(many), np.tile((17, 32, 32), (many, 1)))
        for i, fact in enumerate(facts):  # in either order: some are rare on this canvas
            told = data.short_caption(fact).split(" and ")
            stock |= {" and ".join(order): (one, i) for order in (told, told[::-1])}

    def perfect(run, prompts, size, seeds, steps):
        assert steps == 7 and len(set(seeds)) == len(prompts)
        return [one.clips([i], size)[0][0] for one, i in map(stock.get, prompts)]

    def deaf(run, prompts, size, seeds, steps):
        return worlds[" and " in prompts[0]].clips(seeds, size)[0]

    monkeypatch.setattr(evaluate, "load_classifier", lambda digit: (network, 1.0))
    run = SimpleNamespace(vae=VAE(VAEConfig(width=8)).eval(), world=asdict(CONFIG), language=None)
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(evaluate.sample, "generate", perfect)
    good = evaluate.measure_prompts(run, 40, 20, steps=7, sheet=sheet)
    assert sheet.exists() and len(good["sizes"]) == 5
    for name in ("real", "generated"):
        assert good[name]["digit"] >= 0.9 and good[name]["direction"] == 1
        assert good[name]["both"] >= 0.75
    assert good["VAE"]["digit"] < 0.5  # not trained
    assert good["VAE"]["compression"] > 10
    monkeypatch.setattr(evaluate.sample, "generate", deaf)
    bad = evaluate.measure_prompts(run, 40, 20, steps=7)["generated"]
    assert bad["digit"] < 0.3 and bad["direction"] < 0.6 and bad["both"] < 0.2
    assert "generated" in evaluate.table(good)


def test_flops_are_those_that_are_counted():
    dit = DiT(DiTConfig(width=64, depth=2, heads=2))
    packed = bench.mixed_batch(VAE(VAEConfig(width=8)), dit.config)["packed"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        level = torch.full(packed.frame_clip.shape, 0.5)
        dit(packed.tokens, level, packed).square().mean().backward()
    real = sum(end - start for _, start, _, end in packed.where)
    assert real == pytest.approx(packed.fill * packed.text.numel())
    counted = cost.step_flops(dit, packed.lengths, packed.words, len(packed.frame_clip))
    assert sum(counted) == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(kind):
    """Of clips that are too long for the plain path, which holds n x n matrices."""
    d, n = 64, 1024
    model = DiT(DiTConfig(width=d, depth=1, heads=2))
    block, kept = model.blocks[0], {}
    given = torch.randn(n, d, requires_grad=True), torch.randn(1, d, requires_grad=True)
    place = torch.zeros(n, dtype=torch.int64)
    near = torch.arange(n)[:, None].expand(-1, 6).contiguous()
    turn = attention.rotary_angles(torch.zeros(n, 3), d // 2, 10.0)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and n in x.shape:  # and no bf16 copy of a weight
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that no place is reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            block(*given, place, turn, ((1, n),), near)
    real = sum(size for size, _ in kept.values())
    assert cost.activations(model, n, kind, False) == pytest.approx(real, rel=0.05)


def test_memory_is_what_training_allocates():
    model = DiT(DiTConfig(width=64, depth=2, heads=2))
    optimizers = loop.make_optimizers(model, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    states = [x for o in optimizers for state in o.state.values() for x in state.values()]
    counted = cost.memory(model, 100, torch.float32)
    assert counted["optimizer"] == sum(4 * x.numel() for x in states if x.ndim)
    assert counted["weights"] == sum(p.nbytes for p in model.parameters())
    assert counted["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    half = cost.memory(model, 100, torch.float32, shards=2)
    assert half["weights"] * 2 == counted["weights"] and half["activations"] > 0


def test_a_dry_run_of_3b_adds_up():
    """In no memory to speak of. The time is the work over the speed, for as many clips as asked."""
    said = {}
    for count in ("1000", "2000"):
        flags = f"--preset 3b --dry-run --gpu h200 --gpus 64 --mfu 0.5 --rows 64 --clips {count}"
        said[count] = train.dry_run(train.parse(flags.split()))
    assert "dit: 3,0" in said["1000"] and "blocks.modulation" in said["1000"]
    work = float(re.search(r"work of a step: ([\d.]+) PFLOP", said["1000"])[1]) * 1e15
    steps = 1000 / float(re.search(r"a step: (\d+) clips", said["1000"])[1])
    hours = [float(re.search(r"([\d.]+) GPU-hours", said[n])[1]) for n in said]
    assert hours[0] == pytest.approx(work * steps / (989e12 * 0.5) / 3600, rel=0.1, abs=0.06)
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.1, abs=0.1)


def test_scaling_draws_what_more_compute_brings(network, tmp_path, monkeypatch):
    """The real command, as small as it gets."""
    monkeypatch.setattr(evaluate, "load_classifier", lambda digit: (network, 1.0))
    words = ["evaluate.py", "scaling", "--steps", "16", "--ones", "6", "--out", str(tmp_path), "--"]
    assert SMALL[-2:] == ["--captions", "prompts"]  # without these, re-captioned
    monkeypatch.setattr(sys, "argv", [*words, *SMALL[:-2]])
    evaluate.main()
    figures = json.loads((tmp_path / "scaling.json").read_text())
    assert [f["steps"] for f in figures] == [1, 4, 16]
    flops = [f["flops"] for f in figures]
    assert flops[1] == pytest.approx(4 * flops[0]) and flops[2] == pytest.approx(16 * flops[0])
    assert figures[2]["loss"] < figures[0]["loss"]
    with Image.open(tmp_path / "scaling_clips.png") as sheet:
        assert np.asarray(sheet).std() > 5
    assert (tmp_path / "scaling.png").exists()


def test_scaling_takes_a_finished_run_as_its_longest(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_classifier", lambda digit: (network, 1.0))
    given, out = tmp_path / "given", tmp_path / "out"
    c = replace(configured("--seed", "5", "--out", str(given)), steps=16)
    train.main(replace(c, stage="vae"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "STOP", [1])  # after one step
        with pytest.raises(SystemExit, match="stopped at step 1 of dit"):
            train.main(replace(c, stage="dit"))
    words = ["evaluate.py", "scaling", "--run", str(given), "--ones", "6", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "has done 1 of 16 steps" in capsys.readouterr().err
    train.main(replace(c, stage="dit"))
    before = {x.name: x.stat().st_mtime_ns for x in given.glob("*.pt")}
    evaluate.main()
    assert before == {x.name: x.stat().st_mtime_ns for x in given.glob("*.pt")}
    assert sorted(x.name for x in out.iterdir() if x.is_dir()) == ["1x", "4x"]
    figures = json.loads((out / "scaling.json").read_text())
    assert [(f["times"], f["steps"]) for f in figures] == [(1, 1), (4, 4), (16, 16)]
    for times in (1, 4):
        config = torch.load(out / f"{times}x" / "dit.pt", weights_only=True)["config"]
        differ = {k for k, v in asdict(c).items() if config[k] != v}
        assert differ == {"stage", "steps", "out", "keep", "sample_every"}
        assert (out / f"{times}x" / "vae.pt").read_bytes() == (given / "vae.pt").read_bytes()


def test_bench_says_how_fast_and_how_full(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS", 2)
    bench.bench(argparse.Namespace(repeats=1))
    said = capsys.readouterr().out
    assert all(word in said for word in ("packed:   2 rows of 256", "padded", "encode", "decode"))
    times, share, fuller = re.search(r"is ([\d.]+) times .*, (\d+)% of ([\d.]+),", said).groups()
    assert float(times) / float(fuller) == pytest.approx(int(share) / 100, abs=0.02)


def test_bench_compares_packing_with_padding_that_costs():
    vae = VAE(VAEConfig())
    packed, padded = bench.mixed_batch(vae, DiTConfig()).values()
    assert packed.lengths == padded.lengths and packed.fill > 0.9
    rows, L = padded.text.shape
    assert attention.clips_by_length(padded.sample_id)[1] == ((rows, L),)
    assert L == max(packed.lengths)
    sizes = {1 + 4 * (t - 1) for t, _, _ in packed.grids}
    assert {1, 17} <= sizes and {h / w for _, h, w in packed.grids} >= {0.5, 1.0, 2.0}


@pytest.mark.parametrize(
    "words",
    [
        ["prompts", "--run", "no/where"],
        ["prompts", "--ones", "0"],
        ["prompting", "--run", "no/where"],
        ["prompting", "--clips", "0"],
        ["prompting", "--minutes", "0"],
        ["dance"],
        [],
    ],
)
def test_a_mistake_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("evaluate.py: ") and not said.out


# ====================================== language: language.py, recaption.py, caption_reader.py


@pytest.fixture(scope="module")
def speaker() -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageConfig(3, 2, 300, stem=8, width=32, depth=2, heads=2)
    return with_random_weights(LanguageModel(config)).requires_grad_(False)


def clips_of_three_sizes(seed: int = 0) -> list[Tensor]:
    g = random_state(seed)
    return [torch.randn(3, *grid, generator=g) for grid in ((3, 4, 6), (1, 4, 4), (2, 6, 4))]


PROMPTS = [[259, 260, 261, 262, 263], [264], [265, 266, 10]]


def prefix_of(model: LanguageModel, kind: str, which: list[int]):
    latents = [clips_of_three_sizes()[k] for k in which] if kind != "hear" else []
    return model.prefix(latents, [PROMPTS[k] for k in which] if kind != "see" else [])


@pytest.mark.parametrize("kind", ["see", "hear", "both"])
def test_cached_decoding_is_uncached(speaker, kind):
    prefix, seen = prefix_of(speaker, kind, [0, 1, 2]), []

    def pick(logits: Tensor) -> Tensor:
        seen.append(logits)
        return (37 * len(seen) + torch.arange(3)) % 300  # anything; no END

    texts = torch.tensor(speaker.write(prefix, pick, most=9))  # [3, 9]
    assert texts.shape == (3, 9)
    given = torch.cat([torch.full((3, 1), text.END), texts[:, :-1]], dim=1)
    assert close(torch.stack(seen, dim=1), speaker.logits(prefix, given))


@pytest.mark.parametrize("kind", ["see", "hear", "both"])
def test_a_text_does_not_depend_on_its_batch(speaker, kind):
    given = torch.randint(0, 300, (3, 7), generator=random_state(1))
    together = speaker.logits(prefix_of(speaker, kind, [0, 1, 2]), given)
    for k in range(3):
        alone = speaker.logits(prefix_of(speaker, kind, [k]), given[[k]])
        assert close(together[[k]], alone) and alone.std() > 0.1


def test_bfloat16_is_float32_but_for_its_rounding():
    """Of images too, and in the widths of tiny: a CPU's kernels for them are others (with AMX, one
    made NaN of them)."""
    torch.manual_seed(0)
    config = train.Config()
    vae, model = train.make_vae(config), LanguageModel(LanguageConfig(config.channels))
    for T in (1, 5, 9):
        video = torch.randn(2, 1, T, 24, 16).clamp(-1, 1)

        def both(video: Tensor = video) -> tuple[Tensor, ...]:
            latent = vae.encode(video)
            return latent, vae.decode(latent), model.see(list(latent)).x

        with torch.no_grad():
            exact = both()
            with torch.autocast("cpu", torch.bfloat16):
                rounded = both()
        for a, b in zip(exact, rounded, strict=True):
            assert (a - b).norm() < 0.05 * a.norm()


def test_the_prefix_sees_all_of_itself_and_nothing_of_the_text(speaker):
    n, k = 6, 4
    x = torch.randn(1, n + k, 32, generator=random_state(2)).requires_grad_()
    mask = prefix_mask(torch.ones(1, n, dtype=torch.bool), k)
    out = speaker.run(x, torch.arange(n + k)[None, :, None].expand(1, -1, 3), mask)
    for place in range(n + k):
        (slope,) = torch.autograd.grad(out[0, place].square().sum(), x, retain_graph=True)
        reach = (slope[0].abs().amax(-1) > 0).tolist()
        last = max(n, place + 1)  # exactly nothing later
        assert reach == [True] * last + [False] * (n + k - last)
    padding = prefix_mask(torch.tensor([[True, False]]), 2)[0].int().tolist()
    assert padding == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


def test_the_loss_is_the_probability_of_each_whole_text(speaker):
    prefix, texts = prefix_of(speaker, "hear", [0, 1]), [[5, 6, 7], [8]]
    total, count = speaker.loss(prefix, texts)
    expected = 0.0
    for k, ids in enumerate(texts):
        logits = speaker.logits(prefix_of(speaker, "hear", [k]), torch.tensor([[text.END, *ids]]))
        expected -= logits[0].log_softmax(-1)[range(len(ids) + 1), [*ids, text.END]].sum()
    assert count == 6 and total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_drawn_is_about_as_likely_as_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(4000, -1)
    u = (torch.arange(4000) + 0.5) / 4000
    for least, shares in ((0.0, [0.1, 0.4, 0.2, 0.3]), (0.6, [0, 4 / 7, 0, 3 / 7])):
        drawn = torch.bincount(likely(logits, least, u), minlength=4) / 4000
        assert close(drawn, torch.tensor(shares), 1e-3)
    assert (likely(logits, 1.0, u) == greedy(logits)).all()
    assert likely(logits[:1], 0.0, torch.tensor([1 - 2**-24])).item() == 3


def test_a_captioner_that_overfits_four_clips_writes_their_captions(moving):
    """And an expander on four prompts theirs: the same weights."""
    torch.manual_seed(0)
    index = np.arange(4)
    size = np.array([[5, 32, 32], [1, 32, 32], [5, 24, 40], [5, 32, 32]])
    videos, facts = moving.clips(index, size)
    vae = with_random_weights(VAE(VAEConfig(channels=3, width=16)))
    latents = [vae.encode(prompting.to_float(video[None]))[0].detach() for video in videos]
    captions = list(map(data.descriptive_caption, facts))
    prompts = ["a 7", "digit moving", "nine left and 3", "up"]
    words = Tokenizer.from_captions(captions, 400)
    model = LanguageModel(LanguageConfig(3, 2, words.size, stem=16, width=64, depth=2, heads=2))
    texts, told = ([words.encode(x) for x in group] for group in (captions, prompts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        total, count = model([(latents, [], texts), ([], told, texts[::-1])])
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert Language(model, words, {}).caption(latents) == captions
    written = model.write(model.hear(told), greedy)
    assert [words.decode(ids) for ids in written] == captions[::-1]


def test_captions_are_read_back_as_the_facts_they_were_made_of(moving):
    index = np.arange(300)
    sizes = np.tile([[17, 32, 48], [9, 32, 32], [1, 24, 40]], (100, 1))
    for fact, size in zip(moving.all_facts(index, sizes), sizes.tolist(), strict=True):
        said = caption_reader.read_caption(data.descriptive_caption(fact))
        assert said["frames"] == fact["frames"] and len(said["digits"]) == len(fact["digits"])
        for d in fact["digits"]:
            still = fact["frames"] == 1
            want = {
                "digit": d["digit"],
                "region": d["region"],
                "direction": None if still else d["direction"],
                "speed": None if still else "fast" if d["speed"] > 1 else "slowly",
                "bounces": None if still else d["bounces"],
            }
            assert want in said["digits"]
        assert caption_reader.is_possible(said, tuple(size), moving.config)
        assert caption_reader.is_kept(caption_reader.read_prompt(data.short_caption(fact)), said)
        assert min(caption_reader.score(said, said).values()) == 1
    for said in ("", "a 7.", "a 7 moving left", "17 frames.", "a 7 at top left. 9 frames. x"):
        assert caption_reader.read_caption(said) is None


@pytest.mark.parametrize("said", [
    "a 7 at middle right moving right slowly, 0 bounces. 9 frames.",  # the wall is too near
    "a 7 at middle right moving left slowly, 1 bounce. 9 frames.",  # too slow to get there
    "a 7 at middle right moving left fast, 1 bounce. 17 frames.",  # a clip of 9 was asked for
    "a 7 at no place moving left slowly, 1 bounce. 9 frames.",
    "a 7 at middle right moving up fast, 0 bounces. 9 frames.",  # it would reach the wall
])  # fmt: skip
def test_what_cannot_be_is_not_possible(moving, said):
    caption = caption_reader.read_caption(said)
    assert not caption_reader.is_possible(caption, (9, 32, 32), moving.config)


def test_wrong_captions_lose_what_is_wrong_and_no_more():
    right = "a 7 at top left moving left slowly, 1 bounce. a 3 at top right moving up fast, "
    right += "2 bounces. "
    want = caption_reader.read_caption(right + "9 frames.")

    def scores(said: str) -> dict[str, float]:
        got = caption_reader.score(caption_reader.read_caption(said), want)
        return {name: value for name, value in got.items() if value < 1}

    assert scores(right + "9 frames.") == {} and scores(right + "17 frames.") == {"length": 0}
    assert scores(right.replace("a 3", "a 5") + "9 frames.") == {"digit": 0.5}
    assert scores(right.replace("g left", "g down").replace("up", "down") + "9 frames.") == {
        "direction": 0
    }
    one = scores("a 3 at top right moving up fast, 2 bounces. 9 frames.")
    assert one == dict.fromkeys(caption_reader.FACTS, 0.5) | {"number": 0}
    assert not any(caption_reader.score(None, want).values())
    asked = caption_reader.read_prompt("3 up and seven")
    assert caption_reader.is_kept(asked, want)
    for other in ("7 up and 3 left", "a 3", "a 3 and a 7 and a 7", "a 3 and a 4"):
        assert not caption_reader.is_kept(caption_reader.read_prompt(other), want)


def test_what_lasts_is_true_of_a_clip_from_any_frame_on(moving):
    said = "a 7 at top left moving left slowly, 1 bounce. an 8 at top right moving up fast, "
    lasting = "a 7 moving across slowly. an 8 moving upright fast."
    assert data.lasting_caption(said + "2 bounces. 17 frames.") == lasting
    for other in (lasting, "a 7 moving left", "", "a 7 at top left. an image.", "a cat. at home."):
        assert data.lasting_caption(other) == other
    index = np.arange(200)
    size = moving.size(index, images=0.0)
    captions = [map(data.descriptive_caption, moving.all_facts(index, size, k)) for k in (0, 9, 30)]
    kinds = [[sorted(data.lasting_caption(x).split(". ")) for x in said] for said in captions]
    one = [k for k, parts in enumerate(kinds[0]) if len(parts) == 1]  # order may change of two
    assert len(one) > 50 and len({str([of[k] for k in one]) for of in kinds}) == 1


def test_short_prompts_are_expanded_and_others_left_alone(speaker):
    words = Tokenizer([f" w{k}" for k in range(300 - text.SPECIALS)])
    world = {"durations": (9, 17), "shapes": ((32, 32), (24, 40)), "image_shapes": ((16, 16),)}
    language = Language(speaker, words, world)
    prompts = ["a 7", "", "a 7. 9 frames.", "a 7."]
    told = language.expand(prompts, (17, 32, 32), [3, 4, 5, 6])
    assert told[1:3] == prompts[1:3] and told[0] != "a 7" and told[3] != "a 7."
    assert language.expand(["a 7"], (17, 32, 32), [3]) == told[:1]  # alone: the same
    assert language.expand(["a 7"], (17, 32, 32), [6]) == told[3:]
    assert language.expand(prompts, (17, 32, 32), [3, 4, 5, 6], later=True)[0] != told[0]
    clip = torch.randn(speaker.config.channels, 3, 4, 6)  # shows motion: nothing is left to chance
    for part, different in ((clip[:, :1], True), (clip, False)):
        said = language.expand(["a 7"] * 6, (17, 32, 32), range(6), [part] * 6)
        assert (len(set(said)) > 1) == different
    near = {(600, 33, 40): (17, 32, 32), (2, 20, 44): (9, 24, 40), (1, 8, 20): (1, 16, 16)}
    assert {size: language.nearest_size(*size) for size in near} == near


def test_the_captioner_sees_what_has_no_caption_and_labelled_clips_only_teach(moving):
    index = recaption.labelled_clips(moving, 3, 20, 0.1)
    assert len(index) == 20 and moving.labelled(index, 0.1).all()
    assert not set(index) & set(recaption.labelled_clips(moving, 4, 20, 0.1))


def test_given_frames_of_a_window_lie_later_in_its_clip(moving):
    """They are encoded as frames of a clip of their own, which is how a person gives them."""
    c, vae = configured("--given", "0.9"), with_random_weights(VAE(VAEConfig(channels=3, width=16)))
    size, ahead = [17, 32, 32], 2
    drawn = [batches.draw_clip(vae, c, i, i, size, 2**31, []) for i in range(80)]
    some = [clip for clip in drawn if clip.known.any() and clip.start]
    assert len(some) > 5 and all(clip.known[-1] and not clip.past for clip in some)
    assert any(clip.known[-1] and not clip.start for clip in drawn)
    for clip, made in zip(some, batches.encode_alike(vae, moving, c, some, ahead), strict=True):
        video = prompting.to_float(moving.clips([clip.index], (17 + 4 * ahead, 32, 32))[0])
        video, known = video[:, :, 4 * ahead :], torch.from_numpy(clip.known)[None]
        given, whole = prompting.encode_given(vae, video, known)
        clean = torch.where(whole[:, None, :, None, None], given[:, :3], vae.encode(video))
        assert close(made, torch.cat([clean, given], dim=1)[0])
        assert np.array_equal(clip.free, ~whole[0].numpy())
    short = [batches.draw_clip(vae, c, i, i, size, 30, []) for i in range(80)]
    assert not any(clip.start for clip in short)  # clips that have no later on


def test_missing_captions_are_written_once_and_windows_are_told_what_lasts(moving, tmp_path):
    """Each of its own clip and of what came with it, whatever is encoded together."""
    flags = "--captions recaptioned --train-clips 300 --rows 8 --tokens 256 --given 0.5"
    c, heard = configured(*flags.split()), {}
    vae, path = with_random_weights(VAE(VAEConfig(channels=3, width=16))), tmp_path / "captions"

    def caption(latents: list[Tensor], told: list[str]) -> list[str]:
        said = [f"{x} at top left moving left fast, 1 bounce. 9 frames." for x in told]
        heard.update(zip(said, latents, strict=True))
        return said

    source = batches.Source(vae, recaption.make_tokenizer(moving, 0.1), moving, written={})
    index = np.arange(c.train_clips)
    size = moving.size(index, images=c.images)
    before = batches.captions_of(source, c, index, size)
    missing = index[[caption is None for caption in before]]
    with pytest.raises(ValueError, match="--captions recaptioned --stage text writes"):
        batches.look(source, c, 3)
    images = moving.size(index, images=1.0)
    todo = np.append(missing, index), np.concatenate([size[missing], images])
    given, total = (SimpleNamespace(caption=caption), vae, moving, path), len(missing)
    total += sum(1 for k, i in enumerate(index) if i not in missing or size[k, 0] > 1)
    assert recaption.write_world(*given, *(x[:50] for x in todo)) == 50
    assert recaption.write_world(*given, *todo) == total - 50
    source.written = read_lines(path)
    after = batches.captions_of(source, c, index, size)
    facts = moving.all_facts(index, size)
    short, known = moving.short_captions(index, facts), moving.labelled(index, c.labelled)
    kinds = set()
    for k, i in enumerate(index.tolist()):
        given, _, start, _ = batches.draw_given(vae, c, i, size[k].tolist(), 2**31)
        lasts = bool(start or given[-1])  # from later on, or what leads to an end
        if before[k] is None:
            told = asked(short[k], size[k].tolist())
            rest = "moving across fast." if lasts else "at top left moving left fast, 1 bounce. 9 f"
            assert after[k].startswith(f"{told} {rest}") and not known[k]
        else:
            long = data.descriptive_caption(facts[k])
            assert after[k] == before[k]
            assert after[k] in (short[k], data.lasting_caption(long) if lasts else long)
            assert known[k] or after[k] == short[k]
        kinds.add((before[k] is None, after[k] == short[k], lasts))
    assert len(kinds) == 6
    k = next(k for k, said in enumerate(after) if before[k] is None and said in heard)
    clip = prompting.to_float(moving.clips(index[[k]], size[k])[0])
    assert close(heard[after[k]], vae.encode(clip)[0].detach())
    # A step takes from these, as they are, and in the phase of images as images.
    for step, sizes in ((0, images), (5, size)):
        of, seen, _, captions = batches.look(source, c, step)
        assert of.max() < 300 and "" in captions and np.array_equal(seen, sizes[of])
        every = batches.captions_of(source, c, index, sizes)
        assert all(said in ("", every[i]) for i, said in zip(of, captions, strict=True))
    assert batches.look(source, replace(c, labelled=1.0), batches.HELD_BACK)[0].min() > 300


def test_lessons_are_dealt_out_and_a_third_comes_with_what_was_written(moving):
    """Of half of these it is shown how they go on, and what is then to be written; some ask for
    another digit, and get it."""
    vae, c = with_random_weights(VAE(VAEConfig(channels=3, width=16))), train.Config()
    words, kinds = recaption.make_tokenizer(moving, c.labelled), set()
    source = batches.Source(vae, words, moving)
    for step in (0, 401, 403, 404, 406):  # images, then videos
        index = recaption.labelled_clips(moving, step, 4 * c.text_batch, c.labelled)[::3]
        with torch.no_grad():
            (clips, briefs, others), count = train.text_batch(
                source, replace(c, accumulate=1), step, 0
            )
            parts = [train.text_batch(source, replace(c, accumulate=2), step, k) for k in (0, 1)]
        assert {tokens for _, tokens in parts} == {count}
        texts = clips[2] + briefs[2] + others[2]
        assert sum(len(x) + 1 for x in texts) == count
        dealt = sum((lesson[2] for lessons, _ in parts for lesson in lessons), [])
        assert sorted(dealt) == sorted(texts)
        assert clips[1] == [] == others[0]
        for i, whole, some, brief, long in zip(index, clips[0][::3], *briefs, strict=False):
            told, said = words.decode(brief), words.decode(long)
            T, n = 1 + 4 * (whole.shape[1] - 1), some.shape[1]
            size = np.array([T, 4 * whole.shape[2], 4 * whole.shape[3]])
            fits = []
            for later in range(0, 4 * batches.FARTHEST + 1, 4):
                video = prompting.to_float(moving.clips([i], size + [later, 0, 0])[0])[:, :, later:]
                if not close(vae.encode(video)[0, :, :n].detach(), some, 1e-4):
                    continue
                for other in range(10):
                    (fact,), (first,) = (moving.all_facts([i], size[None], t) for t in (later, 0))
                    for digit in fact["digits"] + first["digits"]:
                        digit["digit"] = (digit["digit"] + other) % 10
                    noisy = moving.short_captions(np.array([i]), [first])[0]
                    short = data.short_caption(first) if other else noisy
                    if told == asked(short, size.tolist(), later > 0):
                        fits.append(said == data.descriptive_caption(fact))
                        kinds.add((later > 0, n == whole.shape[1], other > 0))
            assert any(fits)
    assert kinds == {
        (a, b, c) for a, b, c in itertools.product((False, True), repeat=3) if not a or not c
    }


def test_only_equal_trainings_are_compared(monkeypatch):
    """The claim is about captions: what else differs would explain the difference, too."""
    configs = {"a": {"captions": "recaptioned", "steps": 5}, "b": {"captions": "noisy", "steps": 5},
               "c": {"captions": "noisy", "steps": 6}}  # fmt: skip
    monkeypatch.setattr(
        sample, "load_run", lambda folder: SimpleNamespace(config=configs[folder.name])
    )

    def measure(run, ones, twos, seed, expanded):
        value = (run.config["captions"] == "recaptioned") + 2 * expanded
        return {"generated": dict.fromkeys(evaluate.SCORES, value)}

    monkeypatch.setattr(evaluate, "measure_prompts", measure)
    args = SimpleNamespace(ones=4, twos=2, seed=0)
    rows = evaluate.compare(Path("a"), Path("b"), args)
    assert [row["digit"] for row in rows.values()] == [0, 1, 3]
    with pytest.raises(ValueError, match="also differ in steps"):
        evaluate.compare(Path("a"), Path("c"), args)
    with pytest.raises(ValueError, match="recaptioned and noisy runs"):
        evaluate.compare(Path("b"), Path("a"), args)


# ================================================== prompting: prompting.py, sample.py and clips.py

QUICK = sample.Settings(steps=2)
PROMPT = ["a 7 moving left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with random weights, as train.py would save it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run")
    vae = VAE(VAEConfig(channels=3, width=16, encoder_depth=1, decoder_depth=1))
    words = Tokenizer.from_captions(["a 7 moving left", "a 3 moving up"], 300)
    dit = DiT(DiTConfig(4 * (2 * 3 + 4), 4 * 3, words.size, width=32, depth=2, heads=2))
    for parameter in dit.parameters():  # its own start says nothing at all
        parameter.data += 0.05 * torch.randn_like(parameter)
    world = asdict(data.WorldConfig())
    facts = {
        "world": world,
        "config": {"patch": 2, "prediction": "x", "shift": 3.0},
        "step": 1,
        "optimizers": [],
    }
    for name, model, more in (("vae", vae, {}), ("dit", dit, {"words": words.words})):
        state = {
            "weights": model.state_dict(),
            "ema": model.state_dict(),
            "model": asdict(model.config),
        }
        torch.save(state | facts | more, path / f"{name}.pt")
    return path


@pytest.fixture(scope="module")
def run(folder) -> sample.Run:
    return sample.load_run(folder, "cpu")


def clip_of(T: int, H: int = 16, W: int = 24, seed: int = 0, C: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (C, T, H, W), np.uint8)


def command(folder: Path, line: str) -> tuple[int, str, str]:
    """A command line, in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = sample.command(["--run", str(folder), "--steps", "2", *shlex.split(line)])
        except SystemExit as stop:  # argparse
            status = stop.code
    return status, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------- given frames, exactly


@pytest.mark.parametrize("L", range(1, 11))
def test_given_frames_are_bit_equal(run, L):
    a, b = clip_of(L), clip_of(max(1, 11 - L), seed=1)
    new = (1, 3, 4, 7, 8, 9, 10, 13, 18, 23)[L - 1]
    longer = sample.extend(run, PROMPT, [a], new, [0], how=QUICK)[0]
    assert longer.shape[1] == L + new and np.array_equal(longer[:, :L], a)
    earlier = sample.extend(run, PROMPT, [a], new, [0], backward=True, how=QUICK)[0]
    assert earlier.shape[1] == L + new and np.array_equal(earlier[:, new:], a)
    ring = sample.loop(run, PROMPT, [a], new, [0], how=QUICK)[0]
    assert ring.shape[1] == L + new and np.array_equal(ring[:, :L], a)
    both = sample.connect(run, PROMPT, [a], [b], new, [0], ["a 3 moving up"], how=QUICK)[0]
    assert both.shape[1] == L + new + b.shape[1]
    assert np.array_equal(both[:, :L], a) and np.array_equal(both[:, L + new :], b)
    moving = sample.animate(run, PROMPT, [a[:, :1]], 1 + new, [0], how=QUICK)[0]
    assert moving.shape[1] == 1 + new and np.array_equal(moving[:, :1], a[:, :1])


def test_whole_latents_are_held_in_the_sampler(run):
    """Not only pasted: what is given whole is the same latent after sampling."""
    clip, known = clip_of(17)[None], np.arange(17) < 6
    x = torch.randn(1, 3, 5, 4, 6)
    x, given, level, held = prompting.show_given(run, clip, known, x)
    assert held.tolist() == [True, True, False, False, False]  # the third is given in part
    assert given[0, 3:, :, 0, 0].T.tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0], [0] * 4, [0] * 4]
    out = prompting.denoise_window(run, PROMPT, x, level, held, QUICK, prompting.seeded([0]), given)
    assert torch.equal(out[:, :, :2], x[:, :, :2]) and not torch.equal(out[:, :, 2:], x[:, :, 2:])


def test_what_is_to_be_made_is_not_in_what_is_shown(run):
    clip, other, known = clip_of(17)[None], clip_of(17, seed=5)[None], np.arange(17) >= 11
    other[:, :, known] = clip[:, :, known]
    x = torch.zeros(1, 3, 5, 4, 6)
    assert torch.equal(
        prompting.show_given(run, clip, known, x)[1], prompting.show_given(run, other, known, x)[1]
    )


def test_extend_uses_what_is_given(run):
    a = clip_of(5)
    b = a.copy()
    b[:, 4] = 255 - b[:, 4]
    one, two = (sample.extend(run, PROMPT, [x], 4, [0], how=QUICK)[0][:, 5:] for x in (a, b))
    assert not np.array_equal(one, two)


def test_only_the_beginning_of_a_clip_starts_at_time_0(run, monkeypatch):
    """A caption says how a clip sets out; a window from later on says that it is one."""
    starts, inner = [], prompting.packed_denoiser

    def spy(run, captions, grid, given=None, start=0):
        starts.append(start)
        return inner(run, captions, grid, given, start)

    monkeypatch.setattr(prompting, "packed_denoiser", spy)

    def of(task, *words, **more) -> list[int]:
        starts.clear()
        task(run, PROMPT, *words, how=QUICK, **more)
        return starts[::2]  # of each two, with and without the caption

    short, long = [clip_of(5)], [clip_of(17)]
    assert of(sample.extend, short, 4, [0]) == [0] and of(sample.extend, long, 4, [0]) == [1]
    assert of(sample.extend, short, 20, [0]) == [0, 1]
    assert of(sample.extend, long, 16, [0], backward=True) == [1, 0]
    assert of(sample.loop, short, 7, [0]) == of(sample.loop, long, 7, [0]) == [1]


# ------------------------------------------------------------------------------------------ editing


def test_strength(run):
    for T in (1, 6, 17, 30):
        clip = clip_of(T)
        assert np.array_equal(sample.edit(run, PROMPT, [clip], 0.0, [3], how=QUICK)[0], clip)
    clip, other = clip_of(17), clip_of(17, seed=1)
    full = [sample.edit(run, PROMPT, [x], 1.0, [3], how=QUICK)[0] for x in (clip, other)]
    assert np.array_equal(*full)
    assert np.array_equal(full[0], sample.generate(run, PROMPT, (17, 16, 24), [3], steps=2)[0])
    half = [sample.edit(run, PROMPT, [x], 0.5, [3], how=QUICK)[0] for x in (clip, other)]
    assert half[0].shape == clip.shape and not np.array_equal(*half)


@pytest.mark.parametrize("size", [(17, 16, 24), (17, 64, 64)])
def test_strength_is_a_share_of_the_way_from_noise(run, monkeypatch, size):
    """At every size, though larger ones need more noise to hide as much."""
    real, seen = prompting.denoise_window, {}

    def denoise_window(run, prompts, x, level, *rest):
        seen["level"] = level
        return real(run, prompts, x, level, *rest)

    monkeypatch.setattr(prompting, "denoise_window", denoise_window)
    grid = prompting.latent_grid(run, *size)
    ratio = prompting.token_ratio(run, grid) * run.config["shift"]
    whole, held = torch.ones(grid[0]), torch.zeros(grid[0], dtype=torch.bool)
    levels = prompting.level_table(10, whole, held, ratio).flatten(1)  # [steps + 1, t]
    for steps in (3, 8):
        sample.edit(run, PROMPT, [clip_of(*size)], steps / 10, [0], QUICK)
        assert close(seen["level"], levels[10 - steps])


def test_connect_changes_the_caption_along_the_way(run):
    a, b = clip_of(5), clip_of(4, seed=1)
    first, both, last = (
        sample.connect(run, [p], [a], [b], 8, [0], [q], how=QUICK)[0][:, 5:13].astype(int)
        for p, q in (
            ("a 7 moving left",) * 2,
            ("a 7 moving left", "a 3 moving up"),
            ("a 3 moving up",) * 2,
        )
    )
    assert np.abs(both - first)[:, :2].mean() < np.abs(both - last)[:, :2].mean()
    assert np.abs(both - last)[:, -2:].mean() < np.abs(both - first)[:, -2:].mean()


# ------------------------------------------------------------------------------------- size, length


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 16, 40), (18, 24, 16), (41, 16, 16), (3, 96, 64)])
def test_any_size(run, size):
    clip = sample.generate(run, PROMPT, size, [0], steps=2)[0]
    assert clip.shape == (1, *size)


def test_impossible_sizes_say_what_would_do(run):
    with pytest.raises(ValueError, match="multiples of 8, such as 32 x 48"):
        sample.generate(run, PROMPT, (1, 33, 50), [0])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_streamed_is_unstreamed(run, eta):
    how = sample.Settings(2, 2.0, eta)
    chunks = list(sample.stream(run, PROMPT, (62, 16, 24), [4], how))
    streamed = np.concatenate(chunks, axis=2)
    assert len(chunks) > 3 and streamed.shape == (1, 1, 62, 16, 24)
    grid = prompting.latent_grid(run, 62, 16, 24)
    latent = torch.cat(list(prompting.roll(run, PROMPT, grid, prompting.seeded([4]), how)), dim=2)
    whole = sample.to_uint8(run.vae.decode(latent))[:, :, :62]
    assert np.abs(streamed.astype(int) - whole).max() <= 1 and (streamed != whole).mean() < 1e-3
    again = np.concatenate(list(sample.stream(run, PROMPT, (62, 16, 24), [4], how)), axis=2)
    assert np.array_equal(streamed, again)


def test_only_a_window_that_begins_the_clip_is_told_how_it_begins(run, monkeypatch):
    """A caption says where things start: later windows are told of it what lasts."""
    real, heard = prompting.denoise_window, []

    def denoise_window(run, prompts, x, level, held, how, *rest):
        heard.append(prompts[0])
        assert how.guidance == (4 if len(heard) == 1 else 2)
        return real(run, prompts, x, level, held, how, *rest)

    monkeypatch.setattr(prompting, "denoise_window", denoise_window)
    first, lasting = (
        "a 3 at top left moving up fast, 1 bounce. 17 frames.",
        "a 3 moving upright fast.",
    )
    size, clip = (30, 16, 24), clip_of(30)
    for task in (
        lambda prompts: list(sample.stream(run, prompts, size, [4], QUICK)),
        lambda prompts: sample.extend(run, prompts, [clip[:, :5]], 25, [4], False, QUICK),
        lambda prompts: sample.edit(run, prompts, [clip], 0.5, [4], QUICK),
    ):
        for prompt, later in ((first, lasting), (PROMPT[0], PROMPT[0])):
            heard.clear()
            task([prompt])
            assert len(heard) > 2 and heard == [prompt] + [later] * (len(heard) - 1)


def test_short_stream_is_generate(run):
    (stream,) = sample.stream(run, PROMPT, (17, 16, 24), [4], QUICK)
    assert np.array_equal(stream[0], sample.generate(run, PROMPT, (17, 16, 24), [4], steps=2)[0])


def test_noisy_context(run):
    latent, eps = torch.randn(2, 3, 5, 4, 6), torch.randn(2, 3, 5, 4, 6)
    clean = prompting.noisy_context(latent, 2, 0.0, eps, 4)
    assert torch.equal(clean[:, :3, :2], latent[:, :, :2]) and (clean[:, :, 2:] == 0).all()
    assert (clean[:, 3:, :2] == 1).all() and clean.shape == (2, 7, 5, 4, 6)
    noisy = prompting.noisy_context(latent, 2, torch.full((2, 1, 1, 1, 1), 1.0), eps, 4)
    assert torch.allclose(noisy[:, :3, :2], eps[:, :, :2])


def test_positions_of_a_window_start_at_one():
    packed = [patches.pack([torch.zeros(3, 2, 2, 2)], [[1, 2]], 2, 4, starts=[s]) for s in (0, 1)]
    assert packed[1].position[0, :, 0].tolist() == [-2, -1, 1, 2]
    assert torch.equal(packed[0].frame_id, packed[1].frame_id)


def test_levels_beyond_the_trained_size():
    level, held = torch.tensor([0.0, 1.0, 0.6]), torch.tensor([True, False, False])
    smaller, plain, larger = (
        prompting.level_table(10, level, held, ratio).flatten(1) for ratio in (0.25, 1.0, 4.0)
    )
    for table in (smaller, plain, larger):
        assert table[0].tolist() == level.tolist() and (table[-1] == 0).all()
        assert (table[1:] <= table[:-1]).all()
    assert (larger[1:-1, 1:] > plain[1:-1, 1:]).all()
    assert (smaller[1:-1, 1:] < plain[1:-1, 1:]).all()  # a run trained with --shift below 1


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", clips.SUFFIXES)
@pytest.mark.parametrize("C", [1, 3])
def test_what_was_written_comes_back(tmp_path, suffix, C):
    smooth = np.linspace(0, 255, 8 * 9 * 10).reshape(1, 9, 8, 10).round().astype(np.uint8)
    clip = np.repeat(smooth, C, axis=0)
    clip[:, 3:6] = clip[:, 3:4]  # still frames are frames
    clip = clip[:, :1] if suffix == ".png" else clip
    clips.write_clip(tmp_path / f"clip{suffix}", clip)
    back, _ = clips.read_clip(tmp_path / f"clip{suffix}", C, 2)
    assert back.shape == clip.shape and os.listdir(tmp_path) == [f"clip{suffix}"]
    error = np.abs(back.astype(int) - clip)
    assert error.max() == 0 if suffix not in (".mp4", ".webm") else error.mean() < 4


def test_fitting(tmp_path):
    picture = np.arange(13 * 21, dtype=np.uint8).reshape(1, 1, 13, 21)
    clips.write_clip(tmp_path / "a.png", picture)
    crop, done = clips.read_clip(tmp_path / "a.png", 1, 8)
    assert np.array_equal(crop[0, 0], picture[0, 0, 2:10, 2:18]) and "cropped to 8 x 16" in done
    pad, done = clips.read_clip(tmp_path / "a.png", 1, 8, mode="pad")
    assert np.array_equal(pad[0, 0, 1:14, 1:22], picture[0, 0]) and "padded to 16 x 24" in done
    for mode in ("crop", "pad"):
        big, done = clips.read_clip(tmp_path / "a.png", 3, 8, (32, 32), mode)
        assert big.shape == (3, 1, 32, 32) and "resized" in done
    Image.fromarray(np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "b.png")
    clear, _ = clips.read_clip(tmp_path / "b.png", 1, 8)
    assert (clear == 0).all()  # transparent
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "c.png")
    assert (clips.read_clip(tmp_path / "c.png", 1, 8)[0] == 255).all()  # 16 bits
    Image.fromarray(np.full((8, 8, 3), (250, 10, 10), np.uint8)).save(tmp_path / "d.png")
    assert "made gray" in clips.read_clip(tmp_path / "d.png", 1, 8)[1]


def test_examples_in_the_help_work(folder, tmp_path, monkeypatch):
    """Word for word, one after the other. The minute is shown to be one, and made shorter."""
    monkeypatch.chdir(tmp_path)
    lines = [
        x.strip() for x in sample.__doc__.splitlines() if x.strip().startswith("python sample.py")
    ]
    assert len(lines) >= 9
    for line in lines:
        line = line.removeprefix("python sample.py ").replace("--seconds 60", "--seconds 5")
        status, out, err = command(folder, line)
        assert status == 0, (line, err)
        assert "wrote" in out
    assert clips.read_clip("minute.mp4", 1, 8)[0].shape == (1, 50, 32, 32)
    seven = clips.read_clip("seven.gif", 1, 8)[0]
    assert seven.shape == (1, 17, 32, 48)
    longer = clips.read_clip("longer.gif", 1, 8)[0]
    assert longer.shape[1] == 50 and np.array_equal(longer[:, :17], seven)
    assert np.array_equal(clips.read_clip("earlier.gif", 1, 8)[0][:, -17:], seven)
    assert np.array_equal(clips.read_clip("loop.webp", 1, 8)[0][:, :17], seven)
    image = clips.read_clip("eight.png", 1, 8)[0]
    assert np.array_equal(clips.read_clip("falling.gif", 1, 8)[0][:, :1], image)
    assert Image.open("both_0.gif").size[0] == 4 * 32


@pytest.fixture
def bad(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    good = clip_of(9, 32, 32)
    for name in ("good.gif", "good.mp4", "good.webm", "good.webp"):
        clips.write_clip(name, good)
    for name in ("good.gif", "good.mp4", "good.webm", "good.webp"):
        data = Path(name).read_bytes()
        Path("cut" + name[4:]).write_bytes(data[: len(data) // 2])
    Path("empty.gif").touch()
    Path("text.gif").write_text("hello\n" * 99)
    Path("text.mp4").write_text("hello\n" * 99)
    Path("text.npy").write_text("hello\n" * 99)
    Path("folder.gif").mkdir()
    Image.new("L", (1, 1)).save("dot.png")
    Image.new("1", (10_000, 10_000)).save("huge.png")
    np.save("float.npy", np.zeros((3, 32, 32, 1)))
    np.save("pickle.npy", np.array([{"a": 1}]), allow_pickle=True)
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 8, 8, 1)}
    np.lib.format.write_array_header_1_0(header, shape)
    Path("liar.npy").write_bytes(header.getvalue())
    return tmp_path


FILES = "missing.gif empty.gif text.gif text.mp4 text.npy folder.gif dot.png huge.png float.npy"
FILES += " pickle.npy liar.npy cut.gif cut.mp4 cut.webp"


def test_bad_files(folder, bad):
    before = sorted(os.listdir(bad))
    for task in ("--image", "--extend", "--loop", "--edit", "--connect good.gif"):
        for name in FILES.split():
            if task == "--image" and name.startswith("cut"):
                continue  # the first frame may be there
            status, out, err = command(folder, f'--prompt "" {task} {name} --out out.gif')
            assert (status, err.count("\n")) == (2, 1), (task, name, status, out, err)
            assert name in err, err
    assert sorted(os.listdir(bad)) == before


@pytest.mark.parametrize("line", [
    "--image good.gif --loop good.gif", "--backward", "--strength 0.5", "--then x",
    "--frames 0", "--frames 3 --seconds 1", "--seconds nan", "--seconds -1",
    "--edit good.gif --frames 9", "--edit good.gif --strength 1.5",
    "--edit good.gif --strength nan", "--connect good.gif", "--height 33",
    "--image good.gif --height 32", "--image good.gif --height 33 --width 32", "--guidance nan",
    "--seed -1", "--out x.jpg", "--out x", "--height 100000 --width 100000", "--steps 0",
    "--fps 0", "--count 0", "--what", "--frames 999999999 --out x.gif", "--out good.gif/x.gif",
    "--run nowhere",
])  # fmt: skip
def test_wrong_flags(folder, bad, line):
    before = sorted(os.listdir(bad))
    status, _, err = command(folder, f'--prompt "a 7" {line}')
    assert (status, err.count("\n")) == (2, 1), err
    assert sorted(os.listdir(bad)) == before


def test_an_interrupted_run_leaves_a_playable_file(folder, tmp_path):
    """Ended by SIGTERM, and by SIGKILL, which nothing can answer."""
    line = f'sample.py --run {folder} --steps 2 --prompt "" --frames 5000 --out {tmp_path}/'
    jobs = {}
    for kind in (signal.SIGTERM, signal.SIGKILL):
        words = shlex.split(f"{line}{kind.name}.mp4")
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        jobs[kind] = subprocess.Popen(
            [sys.executable, *words],
            cwd=HERE,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=one,
        )
    for kind, job in jobs.items():
        path, end = tmp_path / f"{kind.name}.mp4", time.time() + 60
        while time.time() < end and not (path.exists() and path.stat().st_size > 50_000):
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.1)
        job.send_signal(kind)
        _, err = job.communicate(timeout=30)
        if kind == signal.SIGTERM:
            assert job.returncode == 130 and b"Traceback" not in err and b"interrupted" in err
        assert clips.read_clip(path, 1, 8)[0].shape[1] > 20


# ============================================================== measuring the tasks: tasks.py


@pytest.fixture
def job(network) -> tasks.Job:
    """What the tasks measure, of no run at all: each test brings a stand-in for the model, and
    prompts stay what they are."""
    vae = SimpleNamespace(config=VAEConfig())
    run = SimpleNamespace(language=None, vae=vae, world={"durations": (9, 17)})
    return tasks.Job(run, world(0.0), network, n=40, seed=0, how={})


@pytest.mark.parametrize("backward", [False, True])
def test_the_truth_is_right_and_a_frozen_digit_wrong_by_its_way(job, monkeypatch, backward):
    stood = []

    def still(run, prompts, clips, frames, seeds, backward, how):
        assert frames == 16 and {clip.shape[1] for clip in clips} == {9}
        stood.extend(tasks.frozen(clips, frames, backward))
        return stood

    monkeypatch.setattr(tasks.sample, "extend", still)
    tasks.extend(job, backward)
    (figures,) = job.figures.values()
    assert figures["baseline"] == figures["made"]
    real, frozen = figures["real"], figures["made"]
    assert real["seam"] == 1 and real["digit"] >= 0.93
    seam = 16 if backward else 9
    true = tasks.choose(job.world, 40, (25, 32, 32), lambda path: tasks.steady(path, seam)).path
    last, way = (16, -1) if backward else (8, 1)
    for k in (4, 8, 16):
        name = f"pixels off after {k} frames"
        assert real[name] < 1e-3
        gone = np.abs(true[:, last + way * k] - true[:, last]).sum(1)
        assert frozen[name] == pytest.approx(np.median(gone), abs=1e-3) and frozen[name] > 1
    slow = np.abs(true[:, 1] - true[:, 0]).sum(1) == 1  # stops too, but by one pixel only
    assert 0 < frozen["seam"] == slow.mean() < 1


def test_a_seam_is_a_step_unlike_its_neighbours():
    steps = np.array([[2, 2, 2, 2], [2, 2, -2, -2], [2, 2, 9, 2], [2, 0, 0, 0], [1, 1, 0, 0]])
    tracks = np.stack([np.zeros((5, 5)), np.pad(steps, ((0, 0), (1, 0))).cumsum(1)], axis=2)
    assert [tasks.smooth(track[None], 2) for track in tracks] == [1, 0, 0, 0, 1]
    path = tracks.astype(int)
    assert tasks.steady(path, 2).tolist() == [True, False, False, False, False]


def test_clips_take_turns_and_loops_close(job):
    chosen = tasks.choose(job.world, 80, (9, 32, 32), lambda path: np.ones(len(path), bool))
    kinds = [(d, p.split()[-1]) for d, p in zip(chosen.digits, chosen.prompts, strict=True)]
    assert {kinds.count(kind) for kind in kinds} == {2} and len(set(kinds)) == 40
    other = tasks.other_digits(job.world, chosen)
    assert (other.digits != chosen.digits).all() and np.array_equal(other.path, chosen.path)
    assert all(str(d) in p.split() for d, p in zip(other.digits, other.prompts, strict=True))
    offset = tasks.tracks_of(other.clips) - other.path
    assert np.ptp(offset, axis=1).max() < 1e-3  # the pixels move as the path says


def test_blends_are_not_loops_and_hard_cuts_are_seen(job, monkeypatch):
    """Real loops and real connections have no seams; a blend does not go to the wall and back."""
    monkeypatch.setattr(tasks.sample, "room", lambda run, L, task: 8)
    monkeypatch.setattr(tasks.sample, "loop", lambda run, prompts, clips, new, seeds, how: [
        np.concatenate([clip, clip[:, :1].repeat(new, axis=1)], axis=1) for clip in clips
    ])  # fmt: skip
    tasks.loop(job)
    real, mixed, cut = job.figures["loop"].values()
    for seam in ("seam to the new", "seam to the start"):
        assert real[seam] == 1
    assert real["digit"] >= 0.93 and real["pixels off half way"] < 1e-3
    assert mixed["pixels off half way"] > 3 and cut["seam to the new"] < 0.2

    monkeypatch.setattr(tasks.sample, "connect", lambda run, prompts, a, b, new, seeds, ends, how: [
        np.concatenate([x, x[:, -1:].repeat(new, axis=1), y], axis=1)
        for x, y in zip(a, b, strict=True)
    ])  # fmt: skip
    tasks.connect(job)
    real, mixed, cut = job.figures["connect"].values()
    assert real["seam to the new"] == real["seam from the new"] == 1 and real["changes"] >= 0.9
    assert cut["digit before"] >= 0.9 and cut["digit after"] < 0.1 and cut["changes"] < 0.1
    assert cut["seam from the new"] < 0.2
    assert mixed["pixels off half way"] > 2


def test_an_edit_is_the_new_digit_on_the_old_path(job, monkeypatch):
    monkeypatch.setattr(tasks.sample, "edit", lambda run, prompts, clips, *rest: clips)
    tasks.edit(job)
    assert len(job.figures) == 4
    for figures in job.figures.values():
        assert figures["real"]["digit"] >= 0.93 and figures["real"]["path kept"] >= 0.95
        assert figures["made"]["digit"] < 0.1 and figures["made"]["path kept"] == 1


def test_the_table_as_a_user_asks_for_it(folder, network, monkeypatch, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(folder, path)
    monkeypatch.setattr(evaluate, "load_classifier", lambda digit: (network, 1.0))
    monkeypatch.setattr(tasks, "MINUTE", 200)
    monkeypatch.setattr(tasks, "SHORT", 20)
    words = f"evaluate.py prompting --run {path} --clips 2 --minutes 1 --steps 1"
    monkeypatch.setattr(sys, "argv", words.split())
    evaluate.main()
    said = capsys.readouterr().out
    figures = json.loads((path / "prompting.json").read_text())
    assert set(figures) == set(tasks.BARS) and all(task in said for task in tasks.BARS)
    assert figures["a minute"]["cost"]["megabytes, of a tenth"] < 1.5
    assert len(figures["a minute"]["made"]["digit in tenths"]) == 10 and "not yet" in said
    assert figures["a minute"]["real"]["speed, last tenth / first"] == pytest.approx(1, abs=0.1)
    assert Image.open(path / "prompting.png").width > 500


# ======================================================================================== train.py

SMALL = (
    "--width 32 --depth 2 --heads 2 --rows 2 --tokens 160 --steps 6 --vae-steps 4 --vae-width 16 "
    "--vae-batch 2 --save-every 3 --sample-every 6 --image-phase 0.3 --text-steps 4 --text-batch 2 "
    "--text-width 32 --text-depth 1 --text-heads 2 --train-clips 40 --captions prompts"
).split()


def configured(*flags: str) -> train.Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *SMALL, *flags])
        return train.parse()


def test_train_and_sample_as_a_user_does(tmp_path):
    """The real commands, word for word but for the sizes, one after the other."""
    here = Path(__file__).parent

    def command(script, *flags):
        words = [sys.executable, here / script, *flags]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    recaptioned = "--captions", "recaptioned"
    assert "gallery.gif" in command("train.py", "--preset", "tiny", *SMALL, *recaptioned)
    out = tmp_path / "out" / "tiny"
    assert {x.name for x in out.iterdir()} == {
        "config.json", "vae.pt", "text.pt", "dit.pt", "log.jsonl", "loss.png", "samples",
        "gallery.gif", "dit.best-3.pt", "dit.best-6.pt", "captions.jsonl",
    }  # fmt: skip
    with Image.open(out / "gallery.gif") as gallery:
        assert gallery.n_frames == 17
    size = "--frames 9 --height 24 --width 40 --steps 2".split()
    said = command("sample.py", "--prompt", "a 7 moving left", *size, "--out", "seven.npy")
    expand = "--expand", "a 7 moving left", "--frames", "9"
    assert len(command("text.py", *expand)) > 1 and command("text.py", *expand, "--seed", "1")
    assert command("text.py", "--caption", "seven.npy").endswith("\n")
    assert "possible" in command("evaluate.py", "language", "--clips", "20")
    made = np.load(tmp_path / "seven.npy")
    assert made.shape[:3] == (9, 24, 40) and made.std() > 0
    run = sample.load_run(out, "cpu")
    (told,) = sample.expand(run, ["a 7 moving left"], (9, 24, 40), [0])
    assert said.startswith(f"seed 0: {told!r}\nwrote")
    again = sample.generate(run, [told], (9, 24, 40), [0], steps=2)[0]
    assert np.array_equal(made.mean(-1), again.mean(0))  # command and function agree
    short = "--no-expand", "--prompt", "a 7 moving left", *size, "--out", "short.npy"
    assert command("sample.py", *short).startswith("wrote")
    again = sample.generate(run, ["a 7 moving left"], (9, 24, 40), [0], steps=2)[0]
    assert np.array_equal(np.load(tmp_path / "short.npy").mean(-1), again.mean(0))


def weights(out: Path, stages: tuple[str, ...] = ("vae", "text", "dit")) -> dict[str, Tensor]:
    states = {}
    for name in (name for name in stages if (out / f"{name}.pt").exists()):
        saved = torch.load(out / f"{name}.pt", weights_only=True)
        for kind in ("weights", "ema"):
            states |= {f"{name}.{kind}.{k}": v for k, v in saved[kind].items()}
    return states


def stop_and_continue(run, stage: str, step: int) -> None:
    """run() trains; it is stopped by a signal inside a step, then runs to its end."""
    name, place = ("dit_loss", -1) if stage == "dit" else (f"{stage}_batch", -2)
    work = getattr(train, name)

    def interrupted(*args):
        if args[place] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, interrupted)
        with pytest.raises(SystemExit, match=f"stopped at step {step + 1} of {stage}"):
            run()
    loop.STOP.clear()
    run()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stage, step", [("vae", 2), ("text", 2), ("dit", 2), ("dit", 4)])
def test_stopped_and_continued_is_uninterrupted_bit_for_bit(tmp_path, stage, step):
    """Stopped by a signal inside a step, once in each stage, before and after a checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--captions", "recaptioned") if stage == "text" or step == 4 else ()
    train.main(configured(*flags, "--out", str(whole)))
    stop_and_continue(lambda: train.main(configured(*flags, "--out", str(parts))), stage, step)
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    logs = [loop.read_log(out) for out in (whole, parts)]
    steps = [[(x["stage"], x["step"], x["loss"]) for x in log] for log in logs]
    assert steps[0] == steps[1]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train.main(configured("--out", str(tmp_path), "--stage", "vae"))
    with pytest.raises(ValueError, match="model width = 16, and not 24"):
        train.main(configured("--out", str(tmp_path), "--stage", "vae", "--vae-width", "24"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of all three networks, and the same exported."""
    pytest.importorskip("safetensors")
    out = tmp_path_factory.mktemp("trained")
    train.main(configured("--captions", "recaptioned", "--out", str(out)))
    train.main(configured("--stage", "export", "--out", str(out)))
    return out


def only(trained: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(trained / name, folder)
    return folder


def test_exported_weights_are_read_back_and_sample_the_same(trained, tmp_path):
    safe = [f"{name}.safetensors" for name in ("vae", "text", "dit")]
    exported = only(trained, tmp_path / "exported", *safe)
    runs = [sample.load_run(folder, "cpu") for folder in (trained, exported)]
    assert runs[0].language and runs[1].config["captions"] == "recaptioned"
    for of in ("vae", "dit"):
        a, b = (getattr(run, of).state_dict() for run in runs)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    told = [sample.expand(run, PROMPT, (9, 24, 24), [0]) for run in runs]
    pairs = zip(runs, told, strict=True)
    made = [sample.generate(run, t, (9, 24, 24), [0], steps=2)[0] for run, t in pairs]
    assert told[0] == told[1] and np.array_equal(*made)
    assert evaluate.real_clips(data.WorldConfig(**runs[1].world), 6, 2, seed=0)
    assert weights_of.newest_run(str(tmp_path)) == exported
    line = f'--prompt "a 7 moving left" --frames 1 --out {tmp_path / "image.png"}'
    assert command(exported, line)[0] == 0


def test_prompts_are_expanded_beside_what_is_given_of_a_clip(trained, tmp_path, monkeypatch):
    """And only where a window begins with the clip, as the prompt of a clip from its beginning."""
    monkeypatch.chdir(tmp_path)
    for name, L in (("short.npy", 9), ("long.npy", 30)):
        np.save(name, clip_of(L, 24, 24)[0, ..., None])
    real, heard = Language.expand, []

    def expand(self, prompts, size, seeds, part=None, later=False):
        heard.append((*prompts, None if part is None else part[0], later))
        return real(self, prompts, size, seeds, part, later)

    monkeypatch.setattr(Language, "expand", expand)
    vae, clip = sample.load_vae(trained, "cpu"), clip_of(30, 24, 24)
    latents = {
        (a, b): vae.encode(prompting.to_float(clip[None, :, a:b]))[0].detach()
        for a, b in ((0, 9), (0, 17), (13, 30), (0, 1))  # 17 frames are the longest clip
    }
    start, long, end, still = latents.values()
    seven, three = "a 7 moving left", "a 3 moving up"
    for flags, told in (
        ("--frames 9", [(seven, None, False)]),
        ("--image long.npy", [(seven, still, False)]),
        ("--extend short.npy", [(seven, start, False)]),
        ("--edit short.npy", [(seven, start, False)]),
        ("--edit long.npy", [(seven, long, False)]),
        ("--extend short.npy --no-expand", []),
        ("--extend long.npy", [(seven, end, True)]),  # its beginning is not shown to the window
        ("--extend short.npy --backward --frames 8", [(seven, start, True)]),
        ("--extend long.npy --backward --frames 20", [(seven, long, True)]),
        ("--loop long.npy", [(seven, end, True)]),
        (
            f'--connect long.npy short.npy --then "{three}"',
            [(seven, end, True), (three, start, True)],
        ),
        ("--connect long.npy short.npy --no-expand", []),
    ):
        heard.clear()
        status, said, wrong = command(
            trained, f'--prompt "{seven}" {flags} --height 24 --width 24 --out made.npy'
        )
        assert status == 0, wrong
        assert ("seed 0: " in said) == bool(told) and len(heard) == len(told), flags
        for (prompt, part, later), (right, seen, on) in zip(heard, told, strict=True):
            assert (prompt, later) == (right, on) and (part is None) == (seen is None), flags
            assert seen is None or close(part, seen, 1e-4), flags
    # Larger than what it has learned to read: what lasts is not known.
    heard.clear()
    line = f'--prompt "{seven}" --loop short.npy --height 64 --width 64 --out made.npy'
    assert command(trained, line)[0] == 0 and not heard


@pytest.mark.parametrize(
    "stage, kind",
    [("vae", "a folder"), ("text", ".safetensors"), ("dit", "a folder"), ("dit", ".pt")],
)
def test_training_starts_from_given_weights(trained, tmp_path, monkeypatch, stage, kind):
    """It starts with exactly the EMA weights, at step 0; continued, it no longer looks there."""
    given = only(trained, tmp_path / "given", *(x.name for x in trained.glob("*.[ps]*t*")))
    from_ = given if kind == "a folder" else given / (stage + kind)
    flags = ["--stage", stage, "--steps", "4", "--vae-steps", "4", "--out", str(tmp_path / "new")]
    only(trained, tmp_path / "new", *([] if stage == "vae" else ["vae.pt"]))
    flags += ["--captions", "prompts" if stage != "text" else "recaptioned", "--seed", "7"]
    begun, fit = {}, loop.fit

    def looked_at(stage, *args):
        begun.update(deepcopy(stage.model.state_dict()), words=stage.facts.get("words"))
        return fit(stage, *args)

    monkeypatch.setattr(train, "fit", looked_at)
    train.main(configured(*flags, "--init-from", str(from_)))
    saved = torch.load(trained / f"{stage}.pt", weights_only=True)
    assert begun.pop("words") == saved.get("words")
    assert begun.keys() == saved["ema"].keys()
    assert all(torch.equal(begun[k], saved["ema"][k]) for k in begun)
    shutil.rmtree(given)
    after = torch.load(tmp_path / "new" / f"{stage}.pt", weights_only=True)
    train.main(configured(*flags, "--init-from", str(from_)))  # finished, and what it learned stays
    again = torch.load(tmp_path / "new" / f"{stage}.pt", weights_only=True)
    assert all(torch.equal(after["weights"][k], again["weights"][k]) for k in after["weights"])


def test_weights_that_do_not_fit_are_one_line(trained, tmp_path, monkeypatch, capsys):
    def said(flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            train.command(configured(*flags.split(), "--out", str(tmp_path / "new")))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len([x for x in lines if "train.py: " in x]) == 1
        return lines[-1]

    wider = said(f"--stage vae --init-from {trained} --vae-width 24")
    assert "vae.pt is not of this VAE: " in wider and "there and [24" in wider
    other = said(f"--stage vae --init-from {trained / 'dit.safetensors'}")
    assert "dit.safetensors is not of this VAE: " in other and "more)" in other
    assert "say --stage vae, text or dit" in said(f"--init-from {trained / 'dit.pt'}")
    assert "not a checkpoint of ours" in said(f"--stage vae --init-from {HERE / 'digits.png'}")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08" + bytes(20))
    assert "not a checkpoint" in said(f"--stage vae --init-from {tmp_path / 'bad.safetensors'}")
    assert "no nowhere" in said("--stage vae --init-from nowhere")
    assert "no vae, text or dit is in" in said(f"--stage vae --init-from {HERE}")
    assert "nothing to export" in said("--stage export")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in said(
        f"--stage vae --init-from {trained / 'vae.safetensors'}"
    )


def child_of(work, *arguments, said: Path = Path(os.devnull)) -> int:
    """Do `work` in a child process, which has all that is imported; `said`: a file for stderr."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        sys.stderr = open(said, "w", buffering=1)
        work(*arguments)
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    finally:
        os._exit(status)


def test_the_best_checkpoints_are_kept_and_survive_a_restart(tmp_path):
    """The loss on what is held back says which; stopped in between, they are the same."""
    flags = "--steps 12 --save-every 2 --keep 3 --lr 0.3 --sample-every 99".split()  # it wavers
    train.main(configured("--stage", "vae", "--out", str(tmp_path / "whole")))
    only(tmp_path / "whole", tmp_path / "parts", "vae.pt")
    wholes, parts = (
        [*flags, "--stage", "dit", "--out", str(tmp_path / x)] for x in ("whole", "parts")
    )
    measured, keep_best = {}, loop.keep_best

    def noted(stage, count, best, path, step, averaged, device):
        with torch.no_grad(), sample.bf16(device):
            measured[step] = stage.measure(averaged)
        return keep_best(stage, count, best, path, step, averaged, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "keep_best", noted)
        train.main(configured(*wholes))
    stop_and_continue(lambda: train.main(configured(*parts)), "dit", 6)  # saves between, too
    assert list(measured) == [2, 4, 6, 8, 10, 12]
    best = sorted(measured, key=measured.get)[:3]
    for out in (tmp_path / "whole", tmp_path / "parts"):
        kept = {int(x.stem.split("-")[1]): x for x in out.glob("dit.best-*.pt")}
        assert kept.keys() == set(best)
        saved = torch.load(out / "dit.pt", weights_only=True)
        assert [step for _, step in saved["best"]] == best
        run = sample.load_run(kept[best[0]], "cpu")  # one of them can be sampled from
        c = replace(configured(*wholes), out=str(out))
        source = batches.Source(run.vae, run.tokenizer, train.make_world(c))
        with torch.no_grad(), sample.bf16(torch.device("cpu")):
            step, aside = train.held_back(source, c)
            again = sum(train.dit_loss(run.dit, part, c, step)[0].item() for part in aside)
        assert again == saved["best"][0][0] == measured[best[0]]


def test_killed_at_ten_random_moments_and_continued_is_uninterrupted(tmp_path):
    """SIGKILL leaves no time to do anything; with a checkpoint every step, it hits many of them."""
    flags = [*SMALL, "--save-every", "1", "--sample-every", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begun = time.perf_counter()
    train.main(configured(*flags, "--out", str(whole)))
    seconds = time.perf_counter() - begun
    random, left = np.random.default_rng(), 10
    while left:
        pid = child_of(train.main, configured(*flags, "--out", str(parts)))
        time.sleep(random.uniform(0, seconds / 2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left -= 1
    train.main(configured(*flags, "--out", str(parts)))
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    logs = [[(x["stage"], x["step"], x["loss"]) for x in loop.read_log(o)] for o in (whole, parts)]
    assert logs[0] == logs[1]
    files = [sorted(x.relative_to(o) for x in o.rglob("*.[gjp]*")) for o in (whole, parts)]
    left = {x.name for x in files[1]} - {x.name for x in files[0]}
    assert set(files[0]) <= set(files[1]) and all(".part" in name for name in left), left


@pytest.mark.parametrize("bad, ends", [({1, 2, 4}, True), ({2, 3, 4}, False)])
def test_a_step_that_is_not_a_number_is_skipped_and_three_in_a_row_stop(
    bad, ends, tmp_path, monkeypatch
):
    loss = train.dit_loss

    def broken(*args):
        share, logs = loss(*args)
        return share * (torch.nan if args[-1] in bad else 1), logs

    c = configured("--out", str(tmp_path), "--save-every", "2")
    train.main(replace(c, stage="vae"))
    monkeypatch.setattr(train, "dit_loss", broken)
    if ends:
        train.main(replace(c, stage="dit"))
        assert loop.read_log(tmp_path)[-1]["skipped"] == len(bad)
    else:
        with pytest.raises(FloatingPointError, match="dit diverged: in 3 steps in a row.* step 5"):
            train.main(replace(c, stage="dit"))
    saved = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert saved["step"] == (6 if ends else 4)
    assert all(x.isfinite().all() for x in [*saved["weights"].values(), *saved["ema"].values()])


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A limit for the size of a file, in a process of its own, is as good as a full disk."""
    c = configured("--out", str(tmp_path))
    train.main(replace(c, stage="vae"))
    before = weights(tmp_path, ("vae",))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        train.command(replace(c, stage="dit"))

    _, status = os.waitpid(child_of(full, said=tmp_path / "said"), 0)
    said = [x for x in (tmp_path / "said").read_text().splitlines() if "train.py" in x]
    assert os.waitstatus_to_exitcode(status) == 2 and len(said) == 1
    assert "dit.best-3.pt could not be written at step 3" in said[0] and "make room" in said[0]
    assert not list(tmp_path.glob("dit*"))
    after = weights(tmp_path, ("vae",))
    assert all(torch.equal(before[k], after[k]) for k in before)
    train.main(replace(c, stage="dit"))  # there is room again


def float32():
    """Without bf16, whose rounding is far larger than what the order of a sum changes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(muon, "KIND", torch.float32)
    patch.setattr(sample, "bf16", lambda device: nullcontext())
    return patch


def one_of(rank: int, ranks: int, port: int, jobs: list[tuple[list[str], int | None]]) -> None:
    """One process of those that torchrun would start, training (flags, a step to stop at) each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    patch, loss = float32(), train.dit_loss
    for k, (flags, stop) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port + k)

        def stopped(*args, stop=stop):
            if args[-1] == stop and rank == ranks - 1:
                loop.STOP.append(1)  # told to only one of them
            return loss(*args)

        patch.setattr(train, "dit_loss", stopped)
        try:
            train.main(configured(*flags))
        except SystemExit:
            loop.STOP.clear()
            dist.destroy_process_group()


def test_one_process_and_many_take_the_same_steps(tmp_path):
    """DDP, FSDP2, gradient accumulation, and going on with another number of processes: the same
    global batch is the same step."""
    patch = float32()
    ways = {
        "one": "--accumulate 1",
        "accumulated": "--accumulate 2",
        "two": "--accumulate 1",
        "two_accumulated": "--accumulate 2",
        "sharded": "--shard --accumulate 2",
        "changed": "--shard --accumulate 1",
    }
    flags = {
        way: [*"--rows 5 --vae-batch 4 --steps 5 --vae-steps 4".split(), *more.split()]
        + ["--out", str(tmp_path / way)]
        for way, more in ways.items()
    }
    for way in ("one", "accumulated"):
        train.main(configured(*flags[way]))
    jobs = [(flags[way], None) for way in ("two", "two_accumulated", "sharded")]
    jobs += [(flags["changed"], 2)]
    torch.multiprocessing.spawn(one_of, (2, free_port(), jobs), nprocs=2)
    changed = [flag for flag in flags["changed"] if flag != "--shard"]
    assert torch.load(tmp_path / "changed" / "dit.pt", weights_only=True)["step"] == 3
    train.main(configured(*changed))  # two sharded processes did three steps, one does the rest
    patch.undo()
    one = weights(tmp_path / "one")
    for way in list(ways)[1:]:
        other = weights(tmp_path / way)
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert close(other[name], value), (way, name, (other[name] - value).abs().max())
        losses = [[x["loss"] for x in loop.read_log(tmp_path / w)] for w in ("one", way)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def test_dealt_parts_cost_about_the_same():
    random = np.random.default_rng(0)
    for rows, parts in ((16, 4), (17, 4), (5, 5), (64, 8)):
        costs = random.uniform(1, 3, rows).tolist()
        dealt = loop.deal(costs, parts)
        assert sorted(sum(dealt, [])) == list(range(rows))
        assert all(1 <= len(part) <= -(-rows // parts) for part in dealt)
        if rows % parts == 0:
            sums = [sum(costs[k] for k in part) for part in dealt]
            in_turn = [sum(costs[k] for k in range(p, rows, parts)) for p in range(parts)]
            assert max(sums) <= max(in_turn)


def test_muon_is_that_of_pytorch_bit_for_bit():
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in ((24, 8), (8, 24), (16, 16))]
    theirs = [x.clone() for x in ours]
    flags = {"lr": 0.1, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [muon.Muon(ours, lr=0.1), torch.optim.Muon(theirs, **flags)]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_learning_rate_rises_then_falls_to_zero():
    rates = [loop.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:] == pytest.approx([(100 - k) / 90 for k in range(10, 100)])


@pytest.mark.parametrize(
    "preset, millions",
    [("tiny", 2.00), ("small", 33.2), ("base", 132.6), ("large", 458), ("xl", 675), ("3b", 3075)],
)
def test_presets_build_and_have_the_size_they_say(preset, millions, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", preset])
    c = train.parse()
    with torch.device("meta"):
        dit, vae = train.make_dit(c, 300), train.make_vae(c)
    count = sum(p.numel() for p in dit.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01), count
    for shape in (*c.world().shapes, *c.world().image_shapes):  # every size can be cut into patches
        patches.token_count(vae.grid(1, *shape), c.patch)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--preset huge", "no preset huge: there are tiny, small"),
        ("--depht 8", "unrecognized arguments: --depht"),
        ("--stage dit --out nowhere", "train there first"),
        ("--digit 40 --out x", "a digit of 40 pixels does not fit"),
        ("--shapes 32,32 --out x", "--shapes"),
        ("--width 100 --heads 3 --out x", "--width"),
        ("--text-width 100 --out x", "--text-width"),
        ("--labelled 0 --out x", "--labelled 0.0: a share"),
        ("--captions none --out x", "--captions none: prompts, noisy or rec"),
        ("--shift 0 --out x", "--shift 0.0: above 0"),
        ("--mnist nowhere --out x", "--mnist takes the IDX files"),
        ("--rows 2 --accumulate 4 --out x", "--rows 2 cannot be dealt out"),
        ("--shard --out x", "start them with torchrun"),
        ("--dry-run --gpu abacus", "--gpu abacus: 4090, "),
    ],
)
def test_a_training_mistake_is_one_line(words, says, tmp_path):
    script = Path(__file__).parent / "train.py"
    words = [sys.executable, script, *words.split()]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ======================================================================================= own clips


def numbered(T: int, H: int, W: int) -> np.ndarray:
    """A film whose every frame tells its number by its brightness: [T, H, W, 3]."""
    level = (10 + 5 * np.arange(T)).astype(np.uint8)
    return np.broadcast_to(level[:, None, None, None], (T, H, W, 3)).copy()


def numbers_in(clip: np.ndarray) -> list[int]:
    """The frame numbers of what came back, uint8 [3, T, H, W]."""
    return np.round((clip.astype(float).mean((0, 2, 3)) - 10) / 5).astype(int).tolist()


def film(path: Path, frames: np.ndarray, times=None, fps=10, turned=0, sound=False, **options):
    """What imageio cannot write: frames at any times (milliseconds), a turned film, sound."""
    with av.open(str(path), "w", options={"movflags": "faststart"} | options) as file:
        video = file.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        audio = file.add_stream("aac", rate=16000, layout="mono") if sound else None
        video.codec_context.time_base = Fraction(1, 1000)
        if turned:
            video.set_display_rotation(turned)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = int(1000 * k / fps) if times is None else int(times[k])
            frame.time_base = Fraction(1, 1000)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        if audio:
            noise = np.random.default_rng(0).normal(size=(1, 16000)).astype(np.float32) / 10
            sounds = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            sounds.sample_rate, sounds.pts = 16000, 0
            file.mux(audio.encode(sounds))
            file.mux(audio.encode(None))


UNEVEN = np.cumsum([0] + [20] * 20 + [150] * 10)  # milliseconds: fast, then slow


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """Files as people have them."""
    root = tmp_path_factory.mktemp("own")
    (root / "sub" / "deep").mkdir(parents=True)
    pyav = {"plugin": "pyav"}
    iio.imwrite(root / "h264.mp4", numbered(45, 48, 64), codec="libx264", fps=30, **pyav)
    iio.imwrite(root / "vp8.webm", numbered(24, 64, 48), codec="libvpx", fps=12, **pyav)
    iio.imwrite(root / "sub/vp9.webm", numbered(40, 60, 100), codec="libvpx-vp9", fps=20, **pyav)
    full = {"codec": "mjpeg", "out_pixel_format": "yuvj420p"}  # a camera's full range of values
    iio.imwrite(root / "sub/deep/jpeg.mov", numbered(40, 64, 64), fps=8, **full, **pyav)
    iio.imwrite(root / "g.gif", numbered(6, 40, 30), duration=[100, 100, 300, 100, 500, 200])
    film(root / "uneven.mp4", numbered(31, 48, 48), times=UNEVEN)
    film(root / "sound.mp4", numbered(20, 48, 80), sound=True)
    upright = np.zeros((10, 64, 32, 3), np.uint8)  # red above, blue below
    upright[:, :32, :, 0], upright[:, 32:, :, 2] = 255, 255
    film(root / "turned.mp4", np.rot90(upright, 1, (1, 2)), turned=-90)
    for name, size in (("a.png", (300, 200)), ("b.jpg", (90, 160)), ("c.webp", (20, 20))):
        Image.fromarray(numbered(3, *size)[2]).save(root / name)
    whole = (root / "sound.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "sub" / "words.webm").write_text("not a video")
    (root / "sub" / "empty.gif").touch()
    (root / "h264.txt").write_text("frames that\n get brighter \n")
    lines = [
        {"file": "sub/vp9.webm", "caption": "wide"},
        {"file": "h264.mp4", "caption": "not this"},
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


BROKEN = ["cut.mp4", "sub/empty.gif", "sub/words.webm"]


def opened(own: Path, seed: int = 0, workers: int = 0, **config) -> Folder:
    return Folder(own, FolderConfig(**config), seed, workers)


@pytest.mark.parametrize("fps", [10, 4, 24])
@pytest.mark.parametrize(
    "name, begins",
    [
        ("h264.mp4", np.arange(45) / 30),
        ("vp8.webm", np.arange(24) / 12),
        ("sub/vp9.webm", np.arange(40) / 20),
        ("sub/deep/jpeg.mov", np.arange(40) / 8),
        ("g.gif", [0, 0.1, 0.2, 0.5, 0.6, 1.1]),
        ("uneven.mp4", UNEVEN / 1000),
        ("sound.mp4", np.arange(20) / 10),
    ],
)
def test_a_clip_shows_what_is_on_the_screen(own, fps, name, begins):
    """At each time, the last frame that has begun; from any place on, as if all had been read."""
    found = decode.probe(own / name)
    times = np.arange(int(found["seconds"] * fps + 1e-3)) / fps
    expected = [int(np.flatnonzero(np.array(begins) <= t + 2e-3)[-1]) for t in times]
    times = times + found["start"]
    clip = decode.read_window(own / name, times, found["last"], (24, 40))
    assert clip.shape == (3, len(times), 24, 40) and numbers_in(clip) == expected
    assert expected[-1] >= len(begins) - 1 - 30 // fps  # to its end
    later = decode.read_window(own / name, times[len(times) // 2 :], found["last"], (24, 40))
    assert np.array_equal(later, clip[:, len(times) // 2 :])


def test_a_turned_film_is_upright(own):
    found = decode.probe(own / "turned.mp4")
    assert (found["height"], found["width"]) == (64, 32)
    clip = decode.read_window(own / "turned.mp4", np.zeros(1), found["last"], (32, 16))
    above, below = clip[:, 0, :14].mean((1, 2)), clip[:, 0, 18:].mean((1, 2))
    assert above[0] > 200 > 60 > above[2] and below[2] > 200 > 60 > below[0]


def test_the_matrix_of_a_phone_turns_clockwise(tmp_path):
    """A phone's camera lies on its side and says in the file's header: x' = -y, y' = x."""
    lying = np.zeros((3, 32, 64, 3), np.uint8)
    lying[:, :, :32] = 255  # white at the left; turned clockwise, that is above
    film(tmp_path / "phone.mp4", lying)
    raw = bytearray((tmp_path / "phone.mp4").read_bytes())
    at = raw.find(b"tkhd") + 4 + 40  # version 0: the matrix, nine fixed-point numbers
    raw[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(raw)
    clip = decode.read_window(tmp_path / "phone.mp4", np.zeros(1), 0.0, (64, 32))
    assert clip[:, 0, :28].mean() > 240 and clip[:, 0, 36:].mean() < 15


def test_a_clip_keeps_its_shape_but_for_the_grid():
    rng = np.random.default_rng(0)
    for H, W in rng.integers(60, 4000, (500, 2)).tolist():
        if max(H, W) > 6 * min(H, W):
            continue
        h, w = fitted(H, W, 128 * 128, 16)
        scale = (128 * 128 / (H * W)) ** 0.5
        assert h % 16 == w % 16 == 0
        for side, to in ((H, h), (W, w)):
            assert abs(to - min(1, scale) * side) <= 8  # half of what divides it
    assert fitted(32, 48, 128 * 128, 16) == (32, 48)  # small ones are not enlarged
    with pytest.raises(ValueError, match="too thin"):
        fitted(10, 4000, 1024, 8)


def test_a_folder_is_looked_at_once(own, tmp_path, monkeypatch, capsys):
    root = tmp_path / "copy"
    shutil.copytree(own, root, ignore=lambda *_: [INDEX])
    first = opened(root)
    said = capsys.readouterr().err
    assert [said.count(str(root / name)) for name in BROKEN] == [1, 1, 1]
    looked = []
    real = decode.probe
    monkeypatch.setattr("folder.probe", lambda path: looked.append(path.name) or real(path))
    again = opened(root)
    assert not looked and not capsys.readouterr().err  # nothing is looked at, nor warned of, again
    assert again.config == first.config and sorted(again.broken) == sorted(first.broken) == BROKEN
    shutil.copy(root / "sound.mp4", root / "cut.mp4")  # mended
    Image.fromarray(numbered(2, 64, 64)[1]).save(root / "a.png")  # another one
    more = opened(root)
    assert sorted(looked) == ["a.png", "cut.mp4"] and sorted(more.broken) == BROKEN[1:]
    assert more.config.files != first.config.files
    more.close()
    assert [capsys.readouterr().err.count(name) for name in BROKEN[1:]] != [0, 0]  # at the end


def test_captions_stand_beside_or_in_one_file(own):
    found = opened(own)
    names = [entry["file"] for entry in found.entries]
    said = dict(zip(names, found.shown, strict=True))
    assert said.pop("h264.mp4") == "frames that get brighter"
    assert said.pop("sub/vp9.webm") == "wide" and set(said.values()) == {""}


def test_windows_of_an_epoch_do_not_overlap_and_differ_from_epoch_to_epoch(own):
    found = opened(own, longest=9, fps=20)
    N, starts = found.config.windows, set()
    for epoch in range(4):
        index = epoch * N + np.arange(N)
        size = found.size(index, images=0.0)
        assert sorted(found.look_up(index)[0]) == list(range(N))
        shown = {}
        for path, times, *_ in found.jobs(index, size).values():
            frames = np.round(times * 20, 3).tolist()
            assert not set(frames) & set(shown.setdefault(path, []))
            shown[path] += frames
        for name, frames in zip(found.entries, found.length, strict=True):
            inside = shown[own / name["file"]]
            begin = np.round(name["start"] * 20, 3)
            assert min(inside) >= begin and max(inside) < begin + frames + 1e-3
            assert len(inside) >= min(frames - 3, frames // 9 * 9)
        starts.add(min(shown[own / "vp8.webm"]))
    assert len(starts) > 1


def test_no_clip_comes_twice_in_an_epoch_on_three_processes(own):
    c = configured("--data", str(own), "--rows", "3", "--tokens", "120")
    vae, taken, N = train.make_vae(c), [], opened(own, longest=9).config.windows
    for rank in range(3):
        found = opened(own, longest=9)
        source = batches.Source(vae, Tokenizer([]), found)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "rank", lambda rank=rank: rank)
            patch.setattr(batches, "ranks", lambda: 3)
            rows = [batches.own_rows(source, c, step, 1) for step in range(8)]
            source.world = opened(own, longest=9)
            late = batches.own_rows(source, c, 7, 1)
        mine = [[clip.index for clip in batches.own_clips(drawn)] for drawn in (*rows, late)]
        assert mine[-1] == mine[-2]  # a step does not depend on who did those before
        taken += sum(mine[:-1], [])
    assert sorted(taken) == list(range(len(taken)))
    assert len(taken) > 2 * N  # epochs
    for epoch in range(len(taken) // N):
        windows = opened(own, longest=9).look_up(np.arange(epoch * N, (epoch + 1) * N))[0]
        assert sorted(windows) == list(range(N))


def test_a_decoder_that_crashes_takes_only_its_file(own):
    workers = Workers(2)
    futures = [workers.submit(abs, -3), workers.submit(os._exit, 1), workers.submit(abs, -4)]
    assert [workers.result(f) for f in futures] == [3, "its decoder crashed", 4]
    assert workers.result(workers.submit(int, "x")).startswith("invalid literal")
    workers.close()
    alone, many = opened(own), opened(own, workers=2)
    index = np.arange(12)
    many.prefetch(index[4:], many.size(index[4:]))
    pairs = zip(alone.clips(index)[0], many.clips(index)[0], strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    many.close()


def test_a_clip_that_breaks_later_leaves_its_place_empty(own, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(own, root)
    c, known = configured("--data", str(root), "--images", "0", "--image-phase", "0"), Tokenizer([])
    torch.manual_seed(0)
    vae, before, after = train.make_vae(c), opened(root, images=0.0), opened(root, images=0.0)
    whole = batches.dit_parts(batches.Source(vae, known, before), c, 0, 3)
    for name in ("h264.mp4", "a.png"):
        (root / name).write_bytes(b"gone")
    capsys.readouterr()
    broken = batches.dit_parts(batches.Source(vae, known, after), c, 0, 3)
    said = capsys.readouterr().err
    assert said.count("h264.mp4") == said.count("a.png") == 1
    assert after.lost
    for step, ((a,), (b,)) in enumerate(zip(whole, broken, strict=True)):
        drawn = batches.own_rows(batches.Source(vae, known, before), c, step, 1)
        index, a, b = [clip.index for clip in batches.own_clips(drawn)], a.packed, b.packed
        left = [x for i, x in zip(index, patches.unpack(a.tokens, a), strict=True)
                if i not in after.lost]  # fmt: skip
        assert all(map(torch.equal, left, patches.unpack(b.tokens, b)))
        assert len(left) == len(b.grids)


def test_train_on_own_clips_and_sample_as_a_user_does(own, tmp_path):
    """The real commands; VAE, then latents on disk, then the DiT."""

    def command(script, *flags, code=0):
        words = [sys.executable, HERE / script, *flags]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    flags = ["--data", str(own), "--out", "run", "--fps", "8", *SMALL]
    said = command("train.py", *flags)
    assert "8 videos" in said and "3 images" in said and "3 are broken" in said
    assert all(f"not used: {own / name}" in said for name in BROKEN)
    run = sample.load_run(tmp_path / "run", "cpu")
    assert run.vae.config.colors == 3 and run.world["durations"][-1] == 17
    command("sample.py", "--run", "run", "--prompt", "wide", "--steps", "2", "--out", "made.mp4")
    with av.open(str(tmp_path / "made.mp4")) as made:
        stream = made.streams.video[0]
        assert stream.average_rate == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in made.decode(stream)]
    H, W = run.world["shapes"][0]
    assert np.stack(frames).shape == (17, H, W, 3) and np.std(frames) > 0
    empty = tmp_path / "empty"
    empty.mkdir()
    said = command("train.py", "--data", "empty", code=2)
    assert len(said.splitlines()) == 1 and "no file of .mp4 .webm" in said


def own_run(own: Path, out: Path, *flags: str) -> None:
    """train.main without pictures, as tests of training need none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gallery", "preview"):
            patch.setattr(train, name, lambda *_: None)
        train.main(configured("--data", str(own), "--out", str(out), "--workers", "1", *flags))


@pytest.fixture(scope="module")
def own_whole(own, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("own_whole")
    own_run(own, out)
    return out


@pytest.mark.parametrize("stage, step", [("vae", 2), ("dit", 4)])
def test_own_clips_stopped_and_continued_are_uninterrupted(own, own_whole, tmp_path, stage, step):
    stop_and_continue(lambda: own_run(own, tmp_path), stage, step)
    one, other = weights(own_whole), weights(tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def encodings_of(out: Path, c: train.Config) -> dict[int, tuple]:
    stored = latents.Latents(out / "latents", c.channels, c.time_factor)
    return {k: (stored.read(k, True), stored.read(k, False)) for k in stored.where}


def test_what_is_written_to_a_shard_comes_back_and_what_was_torn_is_done_again(tmp_path):
    g, Z, ft, made = random_state(0), 3, 4, []
    for k, t in enumerate((1, 3, 5, 2)):
        shape = (2 * Z + ft, t, 2, 3)
        clip = torch.randn(shape, generator=g).half().float()
        clip[Z:] *= k % 2  # every other one has given frames
        image = torch.cat([clip[:Z, :1] + k, torch.zeros(Z + ft, 1, 2, 3)])
        image = image.half().float()
        made.append((10 * k, image, image if t == 1 else clip))
    latents.Shard(tmp_path, 0, Z).append(made[:2])
    with open(tmp_path / "00000.idx", "ab") as rows, open(tmp_path / "00000.bin", "ab") as numbers:
        rows.write(b"torn"), numbers.write(b"also")
    latents.Shard(tmp_path, 1, Z).append(made[2:3])
    latents.Shard(tmp_path, 0, Z).append(made[3:])
    stored = latents.Latents(tmp_path, Z, ft)
    assert 5 not in stored and 30 in stored
    for number, first, whole in made:
        for image, clip in ((True, first), (False, whole)):
            assert torch.equal(clip, stored.read(number, image))


def test_latents_on_disk_are_what_training_would_make(own, own_whole, tmp_path, monkeypatch):
    """Once by one process; once begun by the first of two, and finished by one."""
    flags = ("--given", "0.5", "--later", "0.2", "--stage", "encode")
    one, other = tmp_path / "one", tmp_path / "other"
    for out in (one, other):
        out.mkdir()
        shutil.copy(own_whole / "vae.pt", out)
    own_run(own, one, *flags)
    monkeypatch.setattr(batches, "ranks", lambda: 2)
    c = configured("--data", str(own), *flags)
    monkeypatch.setattr(train, "open_folder", lambda c: opened(own))
    own_run(own, other, *flags)
    half = encodings_of(other, c)
    monkeypatch.undo()
    own_run(own, other, *flags)
    all_of_one, all_of_other = encodings_of(one, c), encodings_of(other, c)
    found, vae = opened(own), sample.load_vae(one, "cpu")
    N, given = found.config.windows, 0
    assert 0 < len(half) < N and set(all_of_one) == set(all_of_other) == set(range(N))
    assert all(map(torch.equal, all_of_one[k], all_of_other[k]) for k in range(N))
    for k in range(3 * N):  # of later epochs, too, whose order is another one
        size, key = found.size([k], images=0.0)[0].tolist(), int(found.encodings([k], 1)[0])
        kept = all_of_one[key]
        assert list(kept[1].shape[2:]) == [side // 4 for side in size[1:]]
        if k >= N:  # there the windows start elsewhere
            continue
        for stored, T in zip(kept, (1, size[0]), strict=True):
            frames = int(found.frames([k])[0])
            clip = batches.draw_clip(vae, c, k, key, [T, *size[1:]], frames, [])
            given += clip.known.any()
            if not clip.start:  # windows begin anywhere
                assert close(stored, batches.encode_alike(vae, found, c, [clip], 0)[0], 0.05)
    assert given > 2


def test_the_dit_trains_from_latents_alone(own, own_whole, tmp_path, monkeypatch):
    shutil.copy(own_whole / "vae.pt", tmp_path)
    own_run(own, tmp_path, "--stage", "encode", "--encodings", "2", "--given", "0.5")
    monkeypatch.setattr(Folder, "clips", None)  # no pixels are read any more
    own_run(own, tmp_path, "--stage", "dit", "--given", "0.5")
    assert all(np.isfinite(line["loss"]) for line in loop.read_log(tmp_path))
    with pytest.raises(ValueError, match="was encoded with fps 10, and now it is 5"):
        own_run(own, tmp_path, "--stage", "dit", "--given", "0.5", "--fps", "5")
    about = latents.read_about(tmp_path / "latents")
    latents.begin(tmp_path / "latents", {k: v for k, v in about.items() if k != "complete"})
    with pytest.raises(ValueError, match="is incomplete: --stage encode goes on"):
        own_run(own, tmp_path, "--stage", "dit", "--given", "0.5")


def test_the_captioner_writes_what_people_did_not(own, own_whole, tmp_path, monkeypatch):
    root, out = tmp_path / "clips", tmp_path / "run"
    shutil.copytree(own, root)
    shutil.copytree(own_whole, out)
    (out / "dit.pt").unlink()
    (root / "h264.txt").write_text("frames that get lighter")  # the VAE doesn't mind
    own_run(root, out, "--captions", "recaptioned")
    found, path = opened(own), out / "captions.jsonl"
    rest = [found.entries[k]["file"] for k in found.missing()]
    assert len(rest) == 9 and not {"h264.mp4", "sub/vp9.webm"} & set(rest)
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == rest
    assert set(json.loads(lines[0])) == {"file", "caption"}
    seen = prompting.load_language(out, "cpu").world
    assert seen["windows"] == 2  # of the captioned ones alone
    assert sample.load_run(out, "cpu").language is None  # which can't expand a prompt
    # One line is edited, by an editor that ends without a new line, and others are deleted.
    edited = [{"file": "g.gif", "caption": "mine"}, {"file": "h264.mp4", "caption": "not this"}]
    path.write_text("\n".join(map(json.dumps, edited)))
    own_run(root, out, "--stage", "text")
    again = read_lines(path)
    assert set(again) == {*rest, "h264.mp4"} and again["g.gif"] == "mine"
    (out / "dit.pt").unlink()
    taught = set()
    real = Folder.captions
    monkeypatch.setattr(Folder, "captions", lambda *a: [taught.add(x) or x for x in real(*a)])
    own_run(root, out, "--stage", "dit")
    assert {"mine", "frames that get lighter", "wide"} < taught and "not this" not in taught
    shutil.copy(path, root / "captions.jsonl")  # or put into the folder
    (root / "h264.txt").unlink()
    found = opened(root)
    said = dict(zip([entry["file"] for entry in found.entries], found.shown, strict=True))
    assert said["g.gif"] == "mine" and said["h264.mp4"] == "not this"


def test_the_loss_of_own_captions_is_the_same_in_parts(own):
    c = configured("--data", str(own), "--text-batch", "4", "--accumulate", "1")
    some = opened(own).captioned()
    assert {entry["file"] for entry in some.entries} == {"h264.mp4", "sub/vp9.webm"}
    torch.manual_seed(0)
    words = train.make_tokenizer(some, c)
    model = LanguageModel(LanguageConfig(3, 2, words.size, stem=8, width=32, depth=1, heads=2))
    source = batches.Source(train.make_vae(c), words, some)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ranks", lambda: 2)
        for step in range(3):
            lessons, tokens = train.own_text_batch(source, c, step, 0)
            total = model(lessons)[0] / tokens
            patch.setattr(train, "rank", lambda: 1)
            lessons, tokens = train.own_text_batch(source, c, step, 0)
            total += model(lessons)[0] / tokens
            patch.setattr(train, "rank", lambda: 0)
            whole, count = 0.0, 0
            for index, size in some.taught(step, 2, 4):
                latents = source.vae.encode(prompting.to_float(some.clips(index, size)[0]))
                told = [words.encode(said) for said in some.captions(index)]
                assert all(said in ("wide", "frames that get brighter")
                           for said in some.captions(index))  # fmt: skip
                loss = model.loss(model.see(list(latents)), told)
                whole, count = whole + loss[0], count + loss[1]
            assert close(total, whole / count)


def test_a_folder_without_captions_teaches_no_captioner(own, own_whole, tmp_path):
    (tmp_path / "clips").mkdir()
    shutil.copy(own / "a.png", tmp_path / "clips")
    with pytest.raises(ValueError, match="no file has a caption to learn from: name.txt beside"):
        own_run(tmp_path / "clips", own_whole, "--stage", "text")


@pytest.fixture(scope="module")
def writes(folder, speaker, tmp_path_factory) -> Path:
    """A run with a language model, too."""
    path = tmp_path_factory.mktemp("writes")
    shutil.copy(folder / "vae.pt", path)
    words = [f" w{k}" for k in range(300 - text.SPECIALS)]
    state = {"weights": speaker.state_dict(), "ema": speaker.state_dict(), "words": words}
    facts = {"model": asdict(speaker.config), "world": asdict(data.WorldConfig())}
    torch.save(state | facts, path / "text.pt")
    return path


@pytest.mark.parametrize(
    "words, says",
    [
        ("--caption nowhere.gif", "nowhere.gif"),
        ("--caption words.gif", "words.gif: not a readable clip"),
        ("--caption empty.gif", "empty.gif"),
        ("--caption .", "."),
        ("--caption thin.png", "thin.png: 4 x 40 pixels are too few: at least 8 x 8"),
        ("--expand ''", "an empty prompt leaves nothing to expand"),
        ("--expand " + 300 * "x", "the prompt is 301 tokens long: at most"),
        ("--expand 7 --seed -1", "--seed is 0 or more"),
        ("--expand 7 --frames 0", "--frames 1 or more"),
        ("--expand 7 --run bare", "bare/text.pt: train there first"),
        ("--expand 7 --run nowhere", "nowhere/text.pt: train there first"),
        ("--expand 7 --run own", "own learned from own clips: it captions, and nothing else"),
    ],
)
def test_text_py_says_in_a_line_what_is_wrong(writes, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.gif").write_text("not a clip")
    (tmp_path / "empty.gif").touch()
    Image.new("L", (40, 4)).save(tmp_path / "thin.png")
    (tmp_path / "bare").mkdir()
    (tmp_path / "own").mkdir()
    saved = torch.load(writes / "text.pt", weights_only=True)
    saved["world"] = {"durations": (9,), "shapes": ((32, 32),)}
    torch.save(saved, tmp_path / "own" / "text.pt")
    with pytest.raises(SystemExit) as stopped:
        text.command(["--run", str(writes), *shlex.split(words)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.count("\n") == 1 and says in said.err


@pytest.mark.parametrize(
    "words, says",
    [
        ("--data nowhere", "no such folder"),
        ("--stage encode", "--stage encode is for --data"),
        ("--data OWN --tokens 20", "raise that, or lower --pixels or --durations"),
        ("--data OWN --durations 16", "the VAE takes 1 + 4 k frames"),
        ("--data OWN --fps 0", "--fps 0: at least 1"),
        ("--data OWN --captions noisy", "--captions noisy is for moving digits"),
        ("--data BAD", "captions.jsonl, line 2: each line is like"),
        ("--data BROKEN", "none of its 1 files can be read"),
    ],
)
def test_a_mistake_with_own_clips_is_a_sentence(own, tmp_path, words, says):
    for name in ("bad", "broken"):
        (tmp_path / name).mkdir()
    lines = '{"file": "a.png", "caption": "a"}\n{"caption": "b"}'
    (tmp_path / "bad" / "captions.jsonl").write_text(lines)
    shutil.copy(own / "a.png", tmp_path / "bad")
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no")
    places = {"OWN": own, "BAD": tmp_path / "bad", "BROKEN": tmp_path / "broken"}
    words = [str(places.get(word, word)) for word in words.split()]
    with pytest.raises((ValueError, OSError), match=re.escape(says)):
        train.main(configured("--out", str(tmp_path / "run"), *words))
    assert not (tmp_path / "run").exists()
