"""Tests: each fails when its concept is wrong. `python -m pytest -q -n 2` runs all, two at a time.

In the order of the files that they are about: concepts and worlds, prompting, training, measures.
"""

import base64
import inspect
import io
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
import threading
import time
from collections import Counter
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, replace
from fractions import Fraction
from http.client import HTTPConnection
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import attention
import data
import diffusion
import evaluate
import language
import patches
import play
import prompting
import sample
import train
from data import Clip, Digits, WorldConfig, hashed_uniform, open_world
from dit import TURN, DiT, DiTConfig
from language import END, NOTHING, Language, LanguageConfig, LanguageModel, Tokenizer, asked
from measure import bench, framing, prompts, reader, tasks
from measure import language as facts_said
from measure import worlds as measure_worlds
from training import batches, checkpoints, cost, items, loop, muon, processes, words
from training import cache as decoded
from training import plot as plotting
from vae import VAE, VAEConfig, from_blocks, to_blocks, to_float, to_uint8
from worlds import folder, game, media, room, wall

torch.set_num_threads(1)  # everything here is small: a second thread costs more than it brings


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to `tolerance` of the largest number (of 1, where all are smaller)."""
    most = tolerance * max(1.0, float(b.detach().abs().max()))
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= most


def reach(output: Tensor, x: Tensor, axis: int) -> Tensor:
    """Which places of x along an axis have any influence on the output: bool [n]."""
    (slope,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    return slope.abs().transpose(0, axis).flatten(1).amax(1) > 0


def with_random_weights(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():  # zeros would hide what is behind them from a test
        parameter.data += 0.08 * torch.randn_like(parameter)
    return model


def write_clip(path: str | Path, clip: np.ndarray, fps: float = 10) -> None:
    """A file as if it were somebody's: without the tag of what a model made."""
    with media.Writer(path, fps, comment="") as file:
        file.write(clip)


def random_state(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ============================================================================== the concept: vae.py


@pytest.fixture(scope="module")
def small_vae() -> VAE:
    torch.manual_seed(0)
    vae = with_random_weights(VAE(VAEConfig(colors=2, width=24))).requires_grad_(False)
    vae.mean, vae.std = torch.randn(4, 1, 1, 1), 1 + torch.rand(4, 1, 1, 1)
    return vae


def video_of(T: int, B: int = 2) -> Tensor:
    return torch.rand(B, 2, T, 12, 8, generator=random_state(T)) * 2 - 1


def test_a_block_holds_its_own_pixels_and_each_gray_comes_back():
    video = torch.arange(2 * 3 * 4 * 6 * 4).reshape(2, 3, 4, 6, 4)
    blocks = to_blocks(video, ft=2, fs=2)  # [2, 24, 2, 3, 2]
    assert torch.equal(blocks[:, :, 1, 2, 1], video[:, :, 2:4, 4:6, 2:4].flatten(1))
    assert torch.equal(from_blocks(blocks, 2, 2), video)
    grays = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 16, 16)
    assert np.array_equal(to_uint8(to_float(grays)), grays) and to_float(grays).aminmax() == (-1, 1)


def test_an_image_is_one_frame_and_a_still_clip_stays_one_latent(small_vae):
    video = video_of(9)
    latent, image = small_vae.encode(video), small_vae.encode(video[:, :, :1])
    assert latent.shape == (2, 4, *small_vae.grid(9, 12, 8)) == (2, 4, 3, 3, 2)
    assert close(image, latent[:, :, :1]) and image.std() > 0.1
    assert close(small_vae.decode(image), small_vae.decode(latent)[:, :, :1])
    still = small_vae.encode(video[:, :, :1].expand(-1, -1, 13, -1, -1))
    frames = small_vae.decode(still)  # before frame 0 was frame 0: nothing begins
    assert close(still, image.expand_as(still)) and close(frames[:, :, 1:5], frames[:, :, 5:9])


def test_nothing_depends_on_the_future(small_vae):
    video, latent = video_of(13).requires_grad_(), torch.randn(1, 4, 4, 3, 2, requires_grad=True)
    for j, frame in enumerate(small_vae.encode(video).unbind(2)):
        seen = reach(frame, video, 2)  # [T]: its own frames, some before them, none after
        assert seen[max(0, 4 * j - 3) : 4 * j + 1].all() and not seen[4 * j + 1 :].any()
        assert j == 0 or seen[: 4 * j - 3].any()
    for T, frame in enumerate(small_vae.reconstruct(latent)[0].unbind(2)):
        j, seen = (T + 3) // 4, reach(frame, latent, 2)  # [t]
        assert seen[j] and not seen[j + 1 :].any()


@pytest.mark.parametrize("chunks", [[1] * 6, [2, 4], [5, 1], [1, 3, 2]])
def test_streamed_is_whole(small_vae, chunks):
    video, frames = video_of(21), [4 * n - 3 * (k == 0) for k, n in enumerate(chunks)]
    parts = list(small_vae.encode_stream(video.split(frames, dim=2)))
    assert [part.shape[2] for part in parts] == chunks
    assert close(torch.cat(parts, dim=2), small_vae.encode(video))
    latent = 0.3 * torch.randn(2, 4, 6, 3, 2, generator=random_state(1))
    parts, whole = list(small_vae.decode_stream(latent.split(chunks, 2))), small_vae.decode(latent)
    assert [part.shape[2] for part in parts] == frames
    assert close(torch.cat(parts, dim=2), whole) and (whole.abs() < 1).float().mean() > 0.3


def test_what_is_to_be_made_is_not_in_what_is_shown(small_vae):
    """Exactly the known frames reach what the network is shown; the rest is black and masked."""
    known = torch.tensor([[0] * 9, [1] + [0] * 8, [1] * 5 + [0] * 4, [0] * 5 + [1] * 4,
                          [1, 1, 1, 0, 0, 0, 0, 0, 1]]).bool()  # fmt: skip
    video = video_of(9, B=5).requires_grad_()
    given, whole = small_vae.encode_known(video, known)
    there = torch.cat([known[:, :1].expand(5, 3), known], dim=1).view(5, 3, 4)  # [B, t, ft]
    assert torch.equal(whole, there.all(2)) and given.shape == (5, 4 + 4, 3, 3, 2)
    assert (given[:, 4:] == there.mT[..., None, None]).all()  # frame 0 fills latent 0
    black = small_vae.encode(torch.where(known[:, None, :, None, None], video, -1.0))
    assert close(given[:, :4], black * there.any(2)[:, None, :, None, None])
    assert close(given[2, :4, :2], small_vae.encode(video)[2, :, :2])  # a known beginning
    assert all(torch.equal(reach(given[k], video, 2), known[k]) for k in range(5))


def test_the_loss_is_squared_error_and_kl_and_statistics_standardise(small_vae):
    video = video_of(5)
    mu, log_var, _ = small_vae.posterior(video)
    q = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).mean().item()
    noise = torch.randn(mu.shape, generator=random_state(2))
    loss, logs = small_vae.loss(video, noise)
    error = (small_vae.reconstruct(mu + q.stddev * noise)[0] - video).square().mean().item()
    assert loss.item() == pytest.approx(error + small_vae.config.kl * kl, rel=1e-5)
    assert logs == pytest.approx({"psnr": 10 * np.log10(4 / error), "kl": kl}, rel=1e-4)
    vae, videos = deepcopy(small_vae), [video_of(9), video, video_of(1)]
    vae.measure_statistics(videos)
    latent = torch.cat([vae.encode(x).transpose(0, 1).flatten(1) for x in videos], dim=1)
    assert close(latent.mean(1), torch.zeros(4), 1e-4) and close(latent.std(1), torch.ones(4), 1e-4)


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_principal_components_keep_what_they_can(channels):
    """Blocks of four numbers: two of these vary a hundred times as much as the others."""
    blocks = torch.randn(4, 3, 1, 8, 8) * torch.tensor([1, 1, 0.01, 0.01]).view(4, 1, 1, 1, 1)
    blocks = (torch.linalg.qr(torch.randn(4, 4))[0] @ blocks.flatten(1)).view(4, 3, 1, 8, 8)
    video = from_blocks(blocks.transpose(0, 1), 1, 2) + 0.3  # [3, 1, 1, 16, 16]
    vae = VAE(VAEConfig(channels=channels, time_factor=1, space_factor=2, width=8))
    vae.begin([video])
    error = (vae.reconstruct(vae.posterior(video)[0])[0] - video).square().mean().sqrt()
    assert error < (1e-5 if channels >= 4 else 0.01)


# ================================================ the concepts: patches.py, attention.py and dit.py

LEVELS = [torch.tensor([0.7]), torch.tensor([0.0, 0.4, 0.9]), torch.tensor([1.0, 0.2])]
ACTIONS = [patches.latent_actions(a, 2) for a in ([3], [0, 1, 2, 3, 1], [2, 2, 1])]


def test_patches_are_in_reading_order_and_unpatchify_undoes_it():
    latent = torch.arange(2 * 2 * 4 * 6).reshape(2, 2, 4, 6)  # [Z, t, h, w]
    places = patches.grid_positions(2, 4, 6, 2).tolist()
    for token, (t, r, c) in zip(patches.patchify(latent, 2), places, strict=True):
        square = latent[:, t, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]  # [Z, p, p]
        assert torch.equal(token, square.permute(1, 2, 0).flatten())  # row, column, channel
    assert places == sorted(places) and len(places) == patches.token_count((2, 4, 6), 2) == 12
    for grid, p in (((1, 2, 2), 2), ((2, 6, 3), 3), ((2, 3, 5), 1)):
        latent = torch.randn(2, 3, 5, *grid)
        assert torch.equal(patches.unpatchify(patches.patchify(latent, p), grid, p), latent)


def test_rows_are_filled_first_fit_by_the_longest_prefix_that_fits():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lengths, most = rng.integers(1, 65, rng.integers(1, 80)).tolist(), int(rng.integers(1, 9))
        rows = patches.first_fit(lengths, 64)
        used = [sum(lengths[c] for c in row) for row in rows]
        assert sorted(sum(rows, [])) == list(range(len(lengths))) and max(used) <= 64
        for r, row in enumerate(rows):  # no clip would have fitted into an earlier row
            assert row and all(used[q] + lengths[c] > 64 for q in range(r) for c in row)
        plan = patches.longest_prefix(lengths, 64, most)
        n = sum(map(len, plan))
        assert plan == patches.first_fit(lengths[:n], 64) and 1 <= len(plan) <= most
        assert n == len(lengths) or len(patches.first_fit(lengths[: n + 1], 64)) > most


def three_clips() -> tuple[list[Tensor], list[list[int]]]:  # those of the docstring of patches.py
    g = random_state(0)
    latents = [torch.randn(5, *grid, generator=g) for grid in ((1, 4, 4), (3, 4, 6), (2, 6, 4))]
    return latents, [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_the_packing_of_the_docstring():
    latents, texts = three_clips()
    packed = patches.pack(latents, texts, 2, 24, actions=ACTIONS)
    assert packed.sample_id.tolist() == [[1] * 22 + [-1] * 2, [2] * 15 + [0] * 7 + [-1] * 2]
    assert packed.frame_clip.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert packed.frame_id[1].tolist() == [6] * 3 + [7] * 6 + [8] * 6 + [0] * 3 + [1] * 4 + [0] * 2
    assert packed.text[1].tolist() == [8, 9, 10] + [-1] * 12 + [1, 2, 3] + [-1] * 6
    assert packed.position[0, 2:6].tolist() == [[-2, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert all(map(torch.equal, patches.unpack(packed.tokens, packed), latents))
    table = patches.per_frame(packed, LEVELS)
    assert table.tolist() == pytest.approx([0, 0.7, 0, 0.0, 0.4, 0.9, 0, 1.0, 0.2])
    assert packed.actions.tolist() == [
        [0, 0], [0, 3], [0, 0], [0, 0], [1, 2], [3, 1], [0, 0], [0, 2], [2, 1]]  # fmt: skip
    assert patches.latent_actions(np.array([1, 2, 3, 4]), 4).tolist() == [[1, 2, 3, 4]]  # no start
    later = patches.pack(latents, texts, 2, 24, starts=[0, 1, 0])  # a window from the middle
    moved = (packed.sample_id == 1) & packed.is_patch
    assert torch.equal((later.position - packed.position)[..., 0], moved.long())
    assert torch.equal(later.frame_id, packed.frame_id) and packed.fill == 44 / 48
    assert later.actions.shape == (9, 1) and not later.actions.any()


def test_rotary_scores_know_only_distances():
    """Shift a clip in time, rows and columns: q . k stays, for each pair of its tokens."""
    position, scores = patches.grid_positions(3, 8, 10, 2)[None], []  # [1, n, 3]
    q, k = torch.randn(2, 1, 1, position.shape[1], 64, generator=random_state(3))
    for shift in ((0, 0, 0), (5, 0, 0), (0, 9, 0), (0, 0, 13), (-4, 2, 11)):
        turn = attention.rotary_angles(position + torch.tensor(shift), 64, 100.0)
        a, b = (attention.rotate(x, *turn) for x in (q, k))
        scores.append(a @ b.mT)
    assert all(close(x, scores[0]) for x in scores) and close(a.norm(dim=-1), q.norm(dim=-1))
    assert not close(scores[0], q @ k.mT, 0.05)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("ids", [
    [[1] * 22 + [-1] * 2, [2] * 15 + [0] * 7 + [-1] * 2],
    [[0] * 22 + [-1] * 2, [1] * 7 + [-1] * 17, [-1] * 24],  # one clip a row, and an empty row
    [[0] + [1] + [2] * 22, [3] * 24],  # no padding
    [[0] * 24, [1] * 24],  # no mask is needed
])  # fmt: skip
def test_attention_by_rows_is_softmax_under_the_mask(ids, device):
    ids, dtype = torch.tensor(ids), torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = torch.randn(3, *ids.shape, 2, 16, generator=random_state(4)).to(device, dtype)
    who = attention.who_sees_whom(ids.to(device), dtype)
    out = attention.packed_attention(q, k, v, who).float().cpu()
    q, k, v = (x.float().cpu().transpose(1, 2) for x in (q, k, v))
    score = (q @ k.mT / 4).masked_fill(ids[:, None, :, None] != ids[:, None, None], -torch.inf)
    alone = (score.softmax(-1) @ v).transpose(1, 2)
    assert close(out[ids >= 0], alone[ids >= 0], 1e-5 if device == "cpu" else 2e-2)
    assert out.isfinite().all()


def test_neighbours_are_adjacent_and_a_stencil_over_them_is_a_depthwise_convolution():
    """Against a search of all pairs, conv3d on one clip's grid, and numerical gradients."""
    z, weight, rest, x = (torch.randn(*size, generator=random_state(24), dtype=torch.float64)
                          for size in ((4, 3, 6, 8), (6, 1, 4), (2, 4), (48, 2)))  # fmt: skip
    packs = patches.pack(*three_clips(), 2, 24, starts=[0, 1, 0]), patches.pack([z], [[]], 1, 146)
    (place, ids, is_text), lone = (
        [x.flatten(0, 1) for x in (packed.position, packed.sample_id, packed.text >= 0)]
        for packed in packs
    )
    near = attention.neighbours(place, ids, is_text)  # [N, 6]
    alike = (ids[:, None] == ids) & (ids >= 0) & (is_text[:, None] == is_text)
    for k, way in enumerate(attention.BESIDE):
        there = alike & (place - place[:, None] == way).all(-1)  # [N, N]
        assert torch.equal(near[:, k], torch.where(there.any(1), there.int().argmax(1), 48))
    given = x.requires_grad_(), weight[..., :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: attention.Stencil.apply(x, near, w), given)
    kernel = torch.zeros(4, 1, 3, 3, 3, dtype=torch.float64)
    for (t, row, column), one in zip(attention.BESIDE.tolist(), weight, strict=True):
        kernel[:, 0, 1 + t, 1 + row, 1 + column] = one[0]
    expected = torch.nn.functional.conv3d(z, kernel, padding=1, groups=4)  # [4, 3, 6, 8]
    near, x = attention.neighbours(*lone), torch.cat([z.flatten(1).T, rest])  # and two of padding
    out = attention.Stencil.apply(x, near, weight)
    assert close(out[:-2], expected.flatten(1).T) and not out[-2:].any()


@pytest.fixture(scope="module")
def small_dit() -> DiT:
    torch.manual_seed(0)
    return with_random_weights(DiT(DiTConfig(20, 20, 16, 64, 3, 2, actions=3, time_factor=2)))


def denoise_packed(model, latents, texts, levels, actions, budget=24, rows=None) -> list[Tensor]:
    packed = patches.pack(latents, texts, 2, budget, rows, actions=actions)
    return patches.unpack(model(packed.tokens, patches.per_frame(packed, levels), packed), packed)


@pytest.mark.parametrize("budget, rows", [
    (24, None), (44, [[2, 0, 1]]), (64, [[], [1, 2], [0], []]), (22, [[1], [0], [2]]),
])  # fmt: skip
def test_a_packed_clip_gives_what_it_gives_alone_and_so_do_gradients(small_dit, budget, rows):
    given = *three_clips(), LEVELS, ACTIONS

    def run_of(which: list[int], *plan) -> tuple[list[Tensor], list[Tensor]]:
        latents, *others = [[x[k] for k in which] for x in given]
        latents = [latent.requires_grad_() for latent in latents]
        outs = denoise_packed(small_dit, latents, *others, *plan)
        loss = sum(out.square().sum() * (1 + k) for k, out in zip(which, outs, strict=True))
        return outs, torch.autograd.grad(loss, [*latents, *small_dit.parameters()])

    together, slopes = run_of([0, 1, 2], budget, rows)
    alone = [run_of([k]) for k in range(3)]
    for k, ((out,), (slope, *_)) in enumerate(alone):
        assert close(together[k], out) and close(slopes[k], slope)
        assert out.std() > 0.1 and slope.abs().max() > 0.01
    for packed, *parts in zip(slopes[3:], *(one[1][1:] for one in alone), strict=True):
        assert close(packed, sum(parts)) and packed.abs().max() > 0


def test_padding_has_no_influence(small_dit):
    clean = patches.pack(*three_clips(), 2, 30, [[1], [2, 0], []], actions=ACTIONS)
    level, padded = patches.per_frame(clean, LEVELS), clean.sample_id < 0
    dirty = replace(clean, tokens=clean.tokens.masked_fill(padded[..., None], 1000.0),
                    position=clean.position.masked_fill(padded[..., None], -77),
                    frame_id=clean.frame_id.masked_fill(padded, 3))  # fmt: skip
    outs = [small_dit(x.tokens, level, x)[~padded] for x in (clean, dirty)]
    slopes = [torch.autograd.grad(x.square().sum(), [*small_dit.parameters()]) for x in outs]
    assert padded.sum() == 90 - 44 and close(*outs, 1e-6) and all(map(close, *slopes))


def test_caption_order_level_position_and_action_all_matter(small_dit):
    """Else the tests of packing would hold for a network that ignores them."""
    given = [[x[1]] for x in (*three_clips(), LEVELS, ACTIONS)]
    packed = patches.pack(*given[:2], 2, 24, actions=given[3])
    level, here = patches.per_frame(packed, given[2]), packed.position
    outs = [small_dit(packed.tokens, level, replace(packed, position=x))[packed.is_patch]
            for x in (here, here + torch.tensor([3, 5, 2]), here * 2)]  # fmt: skip
    assert close(outs[0], outs[1]) and (outs[0] - outs[2]).abs().max() > 1e-3
    (out,) = denoise_packed(small_dit, *given)
    others = [(1, x) for x in ([4, 5, 7, 6], [4, 5, 6, 8], [4, 5, 6])]
    others += [(2, torch.tensor([0.0, 0.5, 0.9]))]
    others += [(3, torch.tensor([[0, 0], x, [3, 1]])) for x in ([2, 1], [1, 3], [1, 0])]
    for which, other in others:
        (made,) = denoise_packed(small_dit, *given[:which], [other], *given[which + 1 :])
        change = (made - out).abs().mean((0, 2, 3))  # [t]; of level and action, in their own frame
        most = {1: 0, 2: 2, 3: 1}[which]  # an action turns what comes later, too
        assert change.min() > 1e-4 and change[1] > most * change[[0, 2]].max()


def test_actions_turn_queries_and_keys_by_how_often_they_were_done(small_dit):
    latents, texts = three_clips()
    acts = [torch.randint(1, 4, (len(z[0]), 2), generator=random_state(k))
            for k, z in enumerate(latents)]  # fmt: skip
    packed = patches.pack(latents, texts, 2, 24, actions=acts)
    turned = small_dit.turned(packed)
    assert turned.shape[:2] == packed.text.shape and not turned[packed.text >= 0].any()
    for clip, done in enumerate(acts):
        count = torch.nn.functional.one_hot(done, 4)[..., 1:].sum(1).cumsum(0).float()
        here = packed.is_patch & (packed.sample_id == clip)
        time = packed.position[here][:, 0] - packed.position[here][:, 0].min()
        assert close(turned[here], (count @ (TURN * small_dit.turn))[time])


@pytest.mark.parametrize("how", ["recomputed", "compiled"])
def test_recomputed_and_compiled_blocks_give_the_same_gradients(how):
    if how == "compiled" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    plain, packed = DiT(DiTConfig(20, 20, 16, 16, 1, 1)), patches.pack(*three_clips(), 2, 24)
    other, found = deepcopy(with_random_weights(plain)), []
    other.recompute = how == "recomputed"
    if how == "compiled":
        other.blocks[0].compile()
    for model in (plain, other):
        out = model(packed.tokens, patches.per_frame(packed, LEVELS), packed)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    assert all(map(close, *found))


def test_adaln_zero_starts_as_the_identity_and_says_zero():
    model, seen = DiT(DiTConfig(20, 20, 16, width=64, depth=2, heads=2)), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    assert not any(out.any() for out in denoise_packed(model, *three_clips(), LEVELS, None))
    assert len(seen) == 2 and all(torch.equal(x, y) and x.std() > 0 for x, y in seen)


# ======================================================================== the concept: diffusion.py

EVERY_LEVEL = torch.linspace(0, 1, 101)


def test_signal_and_noise_are_sides_of_a_right_triangle_and_levels_are_spread_evenly():
    signal, noise = diffusion.signal_noise(EVERY_LEVEL)
    assert close(signal.square() + noise.square(), torch.ones(101), 1e-6)
    assert signal[-1] == 0 and noise[0] == 0 and signal[0] == 1 and noise[-1] == 1  # exactly
    assert (signal.diff() < 0).all() and (noise.diff() > 0).all()
    for ratio in (0.25, 1.0, 9.0):  # shifted levels hide more, by the square root
        shifted = diffusion.shift_level(EVERY_LEVEL, ratio)
        assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()  # exactly
        s, n = diffusion.signal_noise(shifted[1:-1])
        assert torch.allclose(n / s, ratio**0.5 * (noise / signal)[1:-1], rtol=1e-4)
    level = diffusion.training_levels(64, random_state(0))
    share = torch.special.ndtr(torch.logit(level) - diffusion.LOGIT_MEAN)  # under the bell curve
    assert ((share.sort()[0] * 64).floor() == torch.arange(64)).all() and (level.diff() < 0).any()


def test_the_loss_is_an_error_of_v_until_it_is_clipped():
    clean, eps, error = torch.randn(3, 101, 8, generator=random_state(7))
    level, wrong = EVERY_LEVEL[:, None], clean + error
    signal, noise = diffusion.signal_noise(level)
    loss = diffusion.denoising_error(lambda x, level: wrong, clean, eps, level)
    x = signal * clean + noise * eps
    v_error = (signal * x - wrong) / noise.clamp(min=1e-9) - (signal * eps - noise * clean)
    free = (noise.square() > 1 / 5).expand_as(loss)
    assert torch.allclose(loss[free], v_error.square()[free], rtol=1e-3, atol=1e-4)
    assert torch.allclose(loss[~free], 5 * (wrong - clean).square()[~free])


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_ddim_with_the_true_clean_clip_keeps_its_noise_and_recovers_it(prediction):
    clean, eps = torch.randn(2, 3, 4, 5, generator=random_state(10)).double()
    start = torch.full((3, 1, 1), 0.98 if prediction == "eps" else 1.0).double()

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        signal, noise = diffusion.signal_noise(level)
        assert close(x, signal * clean + noise * eps)  # the noise is still the same
        output = {"x": clean, "eps": eps, "v": signal * eps - noise * clean}[prediction]
        assert close(diffusion.to_clean(output, x, level, prediction), clean)
        return output

    levels = diffusion.straight_levels(7, start)
    out = diffusion.sample(denoise, diffusion.add_noise(clean, eps, start), levels, 0.0, prediction)
    assert close(out, clean) and levels.shape == (8, 3, 1, 1)


@pytest.mark.parametrize("level, to", [(1.0, 0.9), (0.9, 0.3), (0.5, 0.49), (0.2, 0.0), (1.0, 0.0)])
def test_an_ancestral_step_draws_from_the_posterior(level, to):
    """DDPM, equations 6 and 7, in DDPM's letters, with `to` one step before `level`."""
    levels = torch.tensor([level, to]).double().view(2, 1, 1)
    a_bar, a_bar_before = (diffusion.signal_noise(x)[0] ** 2 for x in levels)
    alpha, (x0, xt) = a_bar / a_bar_before, torch.randn(2, 3, 9, generator=random_state(9)).double()
    mean = a_bar_before.sqrt() * (1 - alpha) / (1 - a_bar) * x0
    mean = mean + alpha.sqrt() * (1 - a_bar_before) / (1 - a_bar) * xt
    variance = (1 - a_bar_before) / (1 - a_bar) * (1 - alpha)
    generators = [random_state(k) for k in range(3)]
    out = diffusion.sample(lambda x, level: x0, xt, levels, 1.0, generators=generators)
    eps = torch.stack([torch.randn(9, generator=random_state(k)) for k in range(3)])
    assert close(out, mean + variance.sqrt() * eps)


def mix(x: Tensor, level: Tensor) -> Tensor:
    """A stand-in for a network: each clip's output depends on all of its numbers."""
    return torch.tanh(x + x.flatten(1).mean(1).view(-1, 1, 1, 1, 1) * level)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fixed_frames_stay_bit_equal_and_clips_do_not_depend_on_their_batch(eta):
    x = torch.randn(3, 3, 5, 4, 4, generator=random_state(15))
    fixed = torch.tensor([1, 0, 0, 1, 0]).bool()
    levels = diffusion.straight_levels(6, torch.where(fixed, 0.0, 1.0).view(1, 1, 5, 1, 1))
    levels[:, :, :, 3] = 0.07  # a noisy past: it stays, too

    def made(which: list[int]) -> Tensor:
        generators = [random_state(100 + k) for k in which]
        return diffusion.sample(mix, x[which], levels, eta, generators=generators)

    out = made([0, 1, 2])
    assert torch.equal(out[:, :, fixed], x[:, :, fixed]) and (out != x)[:, :, ~fixed].all()
    assert all(torch.equal(made(which), out[which]) for which in ([0], [2], [1, 0]))


def test_guidance_1_is_no_guidance_and_more_goes_beyond_down_to_a_level():
    x, level, without = torch.randn(2, 1, 3, 4, 4), torch.tensor(0.5), lambda x, level: 0.3 * x - 1
    assert diffusion.guided(mix, without, 1) is mix
    for w in (-1.0, -0.5, 1e-7, 2.0):  # equation 6 of the paper
        expected = (1 + w) * mix(x, level) - w * without(x, level)
        assert close(diffusion.guided(mix, without, 1 + w)(x, level), expected)
        assert torch.equal(diffusion.guided(mix, without, 1 + w, 0.5)(x, level), mix(x, level))


# ========================================================================= the concept: language.py

SEEN = [torch.randn(3, *x, generator=random_state(3)) for x in ((3, 4, 6), (1, 4, 4), (2, 6, 4))]
HEARD = [[259, 260, 261, 262, 263], [264], [265, 266, 10]]


def test_any_text_comes_back_and_known_words_are_one_token():
    words = Tokenizer.from_captions(["a 7 moving left", "a 3 moving up and an 8"], 300)
    for said in ("", " ", "  ", "\n", " a", "a ", "a  b\t\r\n", "A 7 MOVING", "löft", "\0",
                 "日本語", "\U0001f642\u200d\u2642", "\ufeff\u2028\x85\ufffd", "a7,b"):  # fmt: skip
        assert words.decode(words.encode(said)) == said
    assert len(words.encode("a 7 moving left")) == 4 and len(set(words.encode("a a a"))) == 1
    assert words.encode("a löft")[1:] == list(" löft".encode())
    assert words.encode("") == [language.NOTHING] and words.decode([language.NOTHING, END]) == ""
    assert words.decode(words.encode("ö")[:-1] + words.encode("\ud800")) == "\ufffd ?"
    assert Tokenizer(words.words).encode("a 3 moving up") == words.encode("a 3 moving up")
    assert Tokenizer.from_captions(["b b b a a c"], language.SPECIALS + 2).words == [" b", " a"]


def test_what_is_often_said_is_one_token():
    said = [f"a {k % 15} moving {way}. an {k}{k} moving {way}." for k in range(99)
            for way in ("left", "up fast")]  # fmt: skip
    words = Tokenizer.from_captions(said, 500)
    assert words.decode(words.encode("a 7 moving up fast, a b")) == "a 7 moving up fast, a b"
    assert {" moving up fast.", " moving left.", " a 7"} <= set(words.words)
    assert not any(". " in word for word in words.words)
    alone = words.encode("a 7 moving left.")
    assert len(alone) == 2 and words.encode("an 8 moving up fast. a 7 moving left.")[-2:] == alone
    assert Tokenizer.from_captions(said[:4], 500).longest == 1  # too few to tell


@pytest.fixture(scope="module")
def speaker() -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageConfig(3, 2, 300, stem=8, width=32, depth=2, heads=2)
    return with_random_weights(LanguageModel(config)).requires_grad_(False)


@pytest.mark.parametrize("latents, prompts", [(SEEN, []), ([], HEARD), (SEEN, HEARD)])
def test_cached_writing_is_uncached_and_does_not_depend_on_the_batch(speaker, latents, prompts):
    prefix, seen = speaker.prefix(latents, prompts), []

    def pick(logits: Tensor) -> Tensor:
        seen.append(logits)
        return (37 * len(seen) + torch.arange(3)) % 250  # anything; no END

    texts = torch.tensor(speaker.write(prefix, pick, most=9))  # [3, 9]
    given = torch.cat([torch.full((3, 1), END), texts[:, :-1]], dim=1)
    together = speaker.logits(prefix, given)
    assert texts.shape == (3, 9) and close(torch.stack(seen, dim=1), together)
    for k in range(3):
        alone = speaker.prefix(latents[k : k + 1], prompts[k : k + 1])
        assert close(together[[k]], speaker.logits(alone, given[[k]])) and together[k].std() > 0.1


def test_the_prefix_sees_all_of_itself_and_nothing_of_the_text(speaker):
    x = torch.randn(1, 10, 32, generator=random_state(2)).requires_grad_()
    mask = language.prefix_mask(torch.ones(1, 6, dtype=torch.bool), 4)
    position = torch.arange(10)[None, :, None].expand(1, -1, 3)
    for place, out in enumerate(speaker.run(x, position, mask, 10)[0]):
        last = max(6, place + 1)  # exactly nothing later
        assert reach(out, x, 1).tolist() == [True] * last + [False] * (10 - last)
    padding = language.prefix_mask(torch.tensor([[True, False]]), 2)[0].int().tolist()
    assert padding == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


def test_the_loss_is_the_probability_of_each_whole_text(speaker):
    (prompts, texts), expected = ([[259, 260], [264]], [[5, 6, 7], [8]]), 0.0
    for prompt, ids in zip(prompts, texts, strict=True):
        logits = speaker.logits(speaker.hear([prompt]), torch.tensor([[END, *ids]]))[0]
        expected -= logits.log_softmax(-1)[range(len(ids) + 1), [*ids, END]].sum().item()
    total, count = speaker([([], prompts, texts), ([], [], [])])
    assert count == 6 and total.item() == pytest.approx(expected, rel=1e-4)


def test_drawn_tokens_are_about_as_likely_as_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(4000, -1)
    u = (torch.arange(4000) + 0.5) / 4000
    for least, shares in ((0.0, [0.1, 0.4, 0.2, 0.3]), (0.6, [0, 4 / 7, 0, 3 / 7])):
        drawn = torch.bincount(language.likely(logits, least, u), minlength=4) / 4000
        assert close(drawn, torch.tensor(shares), 1e-3)
    assert (language.likely(logits, 1.0, u) == language.greedy(logits)).all()
    assert language.likely(logits[:1], 0.0, torch.tensor([1 - 2**-24])).item() == 3


def test_prompts_are_expanded_and_clips_captioned_each_by_itself(speaker):
    words = Tokenizer([f" w{k}" for k in range(300 - language.SPECIALS)])
    world = {"durations": (9, 17), "shapes": ((32, 32), (24, 40)), "image_shapes": ((16, 16),)}
    fluent, size, seeds = Language(speaker, words, world), (17, 32, 32), [3, 4, 5, 6]
    prompts = ["a 7", "", "a 7. 9 frames.", "a 7."]
    full = fluent.expand(prompts, size, seeds)
    assert [a == b for a, b in zip(full, prompts, strict=True)] == [False, True, True, False]
    assert fluent.expand(["a 7"], size, [3]) == full[:1]  # alone: the same
    assert fluent.expand(["a 7"], size, [3], later=True) != full[:1]
    assert replace(fluent, world={"briefs": False}).expand(prompts, size, seeds) == prompts
    for part, different in ((SEEN[0][:, :1], True), (SEEN[0], False)):  # motion leaves nothing open
        said = fluent.expand(["a 7"] * 4, size, range(4), [part] * 4)
        assert (len(set(said)) > 1) == different
    nearest = [fluent.nearest_size(*size) for size in ((600, 33, 40), (2, 20, 44), (1, 8, 20))]
    assert nearest == [(17, 32, 32), (9, 24, 40), (1, 16, 16)]
    asked, bare = ["w1 w2", "", "w3"], fluent.caption(SEEN)
    said = [fluent.caption([z], [x])[0] for z, x in zip(SEEN, asked, strict=True)]
    assert fluent.caption(SEEN, asked) == said and bare[1] == said[1] and bare[0] != said[0]


# =========================================================== the contract of worlds, and the digits

MOVING = Digits(WorldConfig(seed=5))


@pytest.fixture(scope="module", params="digits square folder wall room paint game".split())
def any_world(request, tmp_path_factory) -> data.World:
    """The folder has a film of two windows with a caption, a short one, and an image."""
    if (kind := request.param) == "folder":
        kind = str(tmp_path_factory.mktemp("clips"))
        for k, (name, T) in enumerate({"a.mp4": 23, "b.gif": 6, "c.png": 1}.items()):
            (clip,) = Digits(WorldConfig(shapes=((24, 32),))).clips([k], frames=T)
            write_clip(Path(kind, name), np.concatenate([clip.pixels, 255 - clip.pixels] * 2)[:3])
        Path(kind, "a.txt").write_text("a digit that moves")
    square = ("digits", "square") if kind == "square" else (kind, "none")
    return open_world(WorldConfig(square[0], durations=(5, 9), crop=square[1]))


def plain(x):
    """Arrays, wherever they are, as lists."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, np.ndarray) else x


def same(a: list[Clip], b: list[Clip]) -> bool:
    return plain([vars(x) for x in a]) == plain([vars(x) for x in b])


def test_a_number_is_the_same_clip_in_any_order_and_company(any_world):
    i = np.arange(min(len(any_world), 12))
    clips, order = any_world.clips(i), np.random.default_rng(0).permutation(len(i))
    for which in (order, order[:2], order[-1:]):
        assert same(any_world.clips(i[which]), [clips[k] for k in which])
    assert same(open_world(any_world.config).clips(i), clips)
    assert len({clip.pixels.tobytes() for clip in clips}) == len(i)  # all different


def test_all_but_the_pixels_is_known_before_they_are(any_world):
    i, most = np.arange(min(len(any_world), 12)), len(any_world.actions)
    later = np.minimum(any_world.frames(i) - any_world.sizes(i)[:, 0], 2)
    for how in ({}, {"image": True}, {"later": later}, {"later": later, "frames": 1}):
        clips, sizes = any_world.clips(i, **how), any_world.sizes(i, "image" in how).tolist()
        assert same(any_world.told(i, **how), [replace(clip, pixels=None) for clip in clips])
        for clip, (T, *shape) in zip(clips, sizes, strict=True):
            assert T in ((1,) if "image" in how else any_world.durations)
            assert tuple(shape) in (*any_world.shapes, *any_world.image_shapes)
            T = how.get("frames", T)
            assert clip.pixels.shape == (any_world.colors, T, *shape) and clip.pixels.std() > 0
            assert clip.pixels.dtype == np.uint8 and (clip.actions is None) == (not most)
            assert not most or len(clip.actions) == T and set(clip.actions) <= set(range(most + 1))


def test_later_and_frames_show_parts_of_the_clip_from_its_start(any_world):
    i = np.arange(min(len(any_world), 12))
    total = any_world.frames(i)
    later = np.minimum(total - any_world.sizes(i)[:, 0], 1 + i % 4)
    for k, some in enumerate(zip(any_world.clips(i), any_world.clips(i, later=later), strict=True)):
        most, at = int(min(total[k], 30)), int(later[k])
        (whole,) = any_world.clips(i[[k]], frames=most)
        (rest,) = any_world.clips(i[[k]], later=most // 2, frames=most - most // 2)
        assert whole.pixels.shape[1] == most and at >= 0
        for clip, first in zip((*some, rest), (0, at, most // 2), strict=True):
            span = slice(first, first + clip.pixels.shape[1])
            assert np.array_equal(clip.pixels, whole.pixels[:, span])
            assert whole.actions is None or np.array_equal(clip.actions, whole.actions[span])


@pytest.mark.parametrize("kind", ["game", "paint", "room"])
@pytest.mark.parametrize("beyond", [False, True])
def test_what_is_read_in_the_pixels_is_the_state(kind, beyond):
    world = open_world(WorldConfig(kind, seed=3, beyond=beyond))
    for clip in world.clips(np.arange(24), frames=40):
        found, facts = world.read(clip.pixels), clip.facts
        if kind == "room":
            material, _, far = world.cast(facts)
            facts = {"material": material, "height": (room.TALL / far).clip(0, room.HIGH / 2)}
        assert found
        for name, value in found.items():
            assert np.abs(value.astype(float) - facts[name]).max() <= 0.05 * (name == "height")


@pytest.mark.parametrize("kind", ["game", "paint", "room"])
def test_a_step_is_a_function_of_state_and_action_and_each_action_counts(kind):
    world = open_world(WorldConfig(kind, seed=4))
    n, many = 40, len(world.actions)
    state = world.begin(hashed_uniform(0, np.arange(n), 64))
    before, after = plain(state), []
    for action in range(1, many + 1):
        done = [world.step(state, np.full(n, action)) for _ in range(2)]
        assert plain(done[0]) == plain(done[1]) and plain(state) == before
        after.append(world.render(done[0]))
        (k,) = hashed_uniform(1, [action], 1)[0] * n
        alone = world.step({name: x[[int(k)]] for name, x in state.items()}, np.array([action]))
        assert np.array_equal(world.render(alone)[0], after[-1][int(k)])  # whoever is beside it
    differ = np.array([[(a != b).any((1, 2, 3)).mean() for a in after] for b in after])
    assert (differ[~np.eye(many, dtype=bool)] > 0.5).all()
    # The same past, and from frame 5 on other actions.
    ways = [world.clips(np.arange(8), frames=9, actions=np.full(9, k), after=5) for k in (1, 2)]
    for a, b in zip(*ways, strict=True):
        assert np.array_equal(a.pixels[:, :5], b.pixels[:, :5])
        assert a.actions[5:].tolist() == [1] * 4 and b.actions[5:].tolist() == [2] * 4
        assert a.actions[:5].tolist() == b.actions[:5].tolist()
    assert any((a.pixels[:, 5:] != b.pixels[:, 5:]).any() for a, b in zip(*ways, strict=True))


def alone(world, **changes) -> dict:
    """The state of one clip, with some of it changed."""
    state = world.begin(hashed_uniform(0, [0], 64))
    return state | {name: np.array([value]) for name, value in changes.items()}


def test_rays_meet_walls_and_pillars_where_geometry_says():
    world, north = open_world(WorldConfig("room")), 4  # a quarter of 16 turns: along y
    columns = np.deg2rad(room.VIEW / room.WIDE * (np.arange(room.WIDE) + 0.5 - room.WIDE / 2))
    for y in (0.5, 2.0, 5.5):
        state = alone(world, place=(3.0, y), heading=north, there=np.zeros(6, bool))
        far = world.cast(state)[2][0]
        expected = (room.ROOM - y) / np.cos(columns)
        ahead = np.abs(3.0 - expected * np.sin(columns) - 3.0) < 3.0  # the others meet the sides
        assert np.allclose(far[ahead], expected[ahead], rtol=1e-4) and ahead.sum() > 8
    there = np.arange(6) == 0
    pillars = np.tile((3.0, 5.0), (6, 1))
    state = alone(world, place=(3.0, 1.0), heading=north, there=there, pillars=pillars)
    lower, _, far = (x[0] for x in world.cast(state))
    middle = room.WIDE // 2  # 1.4 degrees aside: by the law of cosines, a little more than 4 - r
    aside = columns[middle]
    root = room.PILLAR**2 - (4 * np.sin(aside)) ** 2
    assert far[middle] == pytest.approx(4 * np.cos(aside) - root**0.5, rel=1e-4)
    assert lower[middle] == state["paints"][0, 0] == lower[middle - 1]


def test_who_turns_around_sees_the_same_and_nobody_walks_through_things():
    world = open_world(WorldConfig("room", seed=1))
    state = begun = world.begin(hashed_uniform(0, np.arange(50), 64))
    for turn in range(16):
        before, state = world.render(state), world.step(state, np.full(50, 5))
        assert np.array_equal(world.render(state)[..., :-8], before[..., 8:])  # 22.5 of 90 degrees
        assert (state["heading"] != begun["heading"]).all() == (turn < 15)
    assert np.array_equal(world.render(state), world.render(begun))
    for k in range(200):
        state = world.step(state, 2 + (hashed_uniform(k, np.arange(50), 1)[:, 0] * 4).astype(int))
        assert world.free(state, state["place"]).all()
    assert np.linalg.norm(state["place"] - begun["place"], axis=1).max() > 2


def test_the_ball_is_reflected_takes_a_brick_and_comes_back():
    world = open_world(WorldConfig("game"))
    empty = np.zeros((game.ROWS, game.COLUMNS), bool)
    wall = empty | (np.arange(game.ROWS) == 3)[:, None]  # in row 4 of the cells
    free = {"bricks": wall, "palette": [5, 6, 2, 1], "paddle": 0, "lost": False}

    def after(action: int = 1, **changes) -> dict:
        state = world.step(alone(world, **free | changes), np.array([action]))
        return {name: value[0].tolist() for name, value in state.items()}

    for ball, sign, to, way in (
        ((6, 5), (1, 1), [7, 6], [1, 1]), ((7, 0), (1, -1), [8, 0], [1, 1]),
        ((7, 9), (-1, 1), [6, 9], [-1, -1]), ((8, 5), (1, 1), [5, 5], [1, 1]),  # lost
        ((8, 1), (1, -1), [8, 0], [-1, -1]), ((8, 3), (1, -1), [8, 2], [-1, 1]),  # an end
        ((8, 2), (1, -1), [8, 1], [-1, -1]), ((8, 0), (1, 1), [8, 1], [-1, 1]),  # the middle
    ):  # fmt: skip
        state = after(ball=ball, sign=sign)
        assert (state["ball"], state["sign"], state["bricks"]) == (to, way, wall.tolist())
        assert state["lost"] == (ball == (8, 5))
    state = after(ball=(5, 5), sign=(1, 1), lost=True)  # it is back
    assert (state["lost"], state["ball"], state["sign"]) == (False, [5, 5], [1, 1])
    state = after(ball=(0, 5), sign=(-1, 1), bricks=empty)
    assert (state["ball"], state["sign"]) == ([0, 6], [1, 1])
    state = after(ball=(5, 4), sign=(-1, 1))
    assert np.argwhere(wall & ~np.array(state["bricks"])).tolist() == [[3, 2]]
    assert state["sign"] == [1, 1] and state["ball"] == [5, 5]
    last = empty.copy()
    last[3, 2] = True
    state = after(ball=(5, 4), sign=(-1, 1), bricks=last)  # all are there again, in other colours
    assert np.all(state["bricks"]) and state["palette"] == [1, 2, 3, 4]
    for action, paddle in ((1, 4), (2, 3), (3, 5)):
        assert after(action, ball=(8, 8), sign=(1, 1), paddle=4)["paddle"] == paddle
    assert after(2, ball=(8, 8), sign=(1, 1))["paddle"] == 0


def test_strokes_stay_and_the_eraser_bites():
    world = open_world(WorldConfig("paint"))
    state = alone(world, paper=np.zeros((7, 8), int), brush=(5, 2), down=False, tool=1)
    for action in (5, 6, 5, 5, 3, 6, 5):  # right; down: right, right, down; lifted: right
        state = world.step(state, np.array([action]))
    painted = [[5, 3], [5, 4], [5, 5], [6, 5]]
    assert np.argwhere(state["paper"][0] == 2).tolist() == painted
    assert np.count_nonzero(state["paper"]) == 4 and state["brush"].tolist() == [[6, 6]]
    for action in (7, 7, 7, 6):  # blue, then the eraser, which is put down
        state = world.step(state, np.array([action]))
    assert np.argwhere(state["paper"][0]).tolist() == [[5, 3], [5, 4]]
    for _ in range(10):
        state = world.step(state, np.array([2]))
    assert state["brush"].tolist() == [[0, 6]]  # the edge of the paper


def test_a_hidden_digit_goes_on_behind_its_wall():
    config = WorldConfig("wall", 6, (33,), ((24, 64), (48, 32)), (), digit=12)
    world, hidden = open_world(config), 0
    for clip in world.clips(np.arange(60)):
        ink = clip.pixels[0].copy()  # [T, H, W]
        for upright, first, thick in clip.facts["walls"]:
            part = (slice(None), slice(None), slice(first, first + thick))
            part = part if upright else (part[0], part[2], part[1])
            assert set(np.unique(ink[part])) == set(wall.LEVELS) and thick > 12
            ink[part] = 0
        hidden += sum(d["hidden"].sum() for d in clip.facts["digits"])
        if len(clip.facts["digits"]) == 1:
            gone = clip.facts["digits"][0]["hidden"]
            assert (ink[gone] == 0).all()
            seen = world.read(clip.pixels)
            assert np.isnan(seen["box"][gone]).all()
    assert hidden > 100
    assert wall.hidden_runs(np.array([0, 1, 1, 0, 1], bool)) == [(1, 3), (4, 5)]


def test_what_is_held_back_and_captioned_is_a_function_of_the_number(any_world):
    i = np.arange(min(len(any_world), 3000))
    for name in ("held_back", "labelled"):
        found = getattr(any_world, name)(i)
        assert found.dtype == bool and found.shape == i.shape
        assert np.array_equal(getattr(open_world(any_world.config), name)(i[::-1]), found[::-1])
    said = [bool(clip.caption) for clip in any_world.told(i)]
    assert found.tolist() == said and any(said) and any_world.held_back(i).mean() < 0.05


def test_a_world_is_described_by_plain_values(any_world, tmp_path):
    about, i = any_world.about(), np.arange(min(len(any_world), 12))
    torch.save(about, tmp_path / "about.pt")
    assert torch.load(tmp_path / "about.pt", weights_only=True) == about and json.dumps(about)
    again, other = (open_world(WorldConfig(**about["config"] | {"seed": k})) for k in (0, 1))
    assert same(again.clips(i), any_world.clips(i)) and again.stamp() == any_world.stamp()
    assert other.stamp() != any_world.stamp()
    for said in ("", "at home. a cat.", *(clip.caption for clip in any_world.told(i))):
        lasting = any_world.lasting(said)
        assert any_world.lasting(lasting) == lasting and bool(lasting) == bool(said)
    for said, (T, *shape) in any_world.prompts(12):
        assert said and T in any_world.durations and tuple(shape) in any_world.shapes


@pytest.mark.parametrize("extra", [(0, 9), (3, 5), (30, 1), (18, 26)])
def test_digits_bounce_as_in_a_simulation_step_by_step(extra):
    n, frames, d = 100, 41, MOVING.config.digit
    size = np.tile((frames, d + extra[0], d + extra[1]), (n, 1))
    raw = MOVING.draw(np.arange(n), size)
    path, facts = MOVING.path(raw, size, frames), MOVING.describe(raw, size)
    for k, j in np.argwhere(raw["present"]):
        turns = 0
        for axis, space in enumerate(extra):
            place, velocity = raw["start"][k, j, axis], raw["velocity"][k, j, axis]
            for t in range(frames):
                assert path[k, t, j, axis] == place
                for _ in range(abs(velocity) * (space > 0) * (t + 1 < frames)):  # pixel by pixel
                    if not 0 <= place + np.sign(velocity) <= space:  # behind the wall: turn round
                        velocity, turns = -velocity, turns + 1
                    place += np.sign(velocity)
        assert facts[k]["digits"][j]["bounces"] == turns
    start = np.arange(n) % 20  # from later on, it is a clip that begins there
    ways = MOVING.path(raw | MOVING.after(raw, size, start), size, 21)
    assert all(np.array_equal(ways[k], path[k, t : t + 21]) for k, t in enumerate(start))


def test_pixels_are_the_sprites_at_their_places():
    sizes, d = MOVING.sizes(np.arange(30)), MOVING.config.digit
    raw = MOVING.draw(np.arange(30), sizes)
    path = MOVING.path(raw, sizes, 17)
    for k, clip in enumerate(MOVING.clips(np.arange(30))):
        expected = np.zeros(sizes[k], np.uint8)
        for t, j in np.ndindex(sizes[k, 0], raw["present"][k].sum()):
            r, c = path[k, t, j]
            box = expected[t, r : r + d, c : c + d]
            np.maximum(box, MOVING.sprites[raw["sprite"][k, j]], out=box)
        assert np.array_equal(clip.pixels[0], expected)


@pytest.mark.parametrize("later", [0, 7])
def test_captions_agree_with_the_facts_and_facts_with_the_path(later):
    sizes, lengths = MOVING.sizes(np.arange(300)), set()
    path = MOVING.path(MOVING.draw(np.arange(300), sizes), sizes, 5 + later)[:, later:]
    hows = {"later": later}, {"image": True}
    for k, clip in enumerate(x for how in hows for x in MOVING.told(np.arange(300), **how)):
        still, digits = k >= 300, clip.facts["digits"]
        said, short = data.descriptive_caption(clip.facts), data.short_caption(clip.facts)
        assert said.endswith(" an image." if still else f" {sizes[k % 300, 0]} frames.")
        for j, d in enumerate(digits):
            pace, way = "fast" if d["speed"] > 1 else "slowly", f" moving {d['direction']}"
            full = f" at {d['region']}" + f"{way} {pace}, {d['bounces']} b" * (not still)
            assert f"{d['digit']}{full}" in said and f"{d['digit']}{way}" in short
            step = d["speed"] * np.array(data.DIRECTIONS[d["direction"]])  # four frames as said
            walk = d["start"] + step * np.arange(1 if later else 5)[:, None]
            assert still or np.array_equal(path[k, : len(walk), j], walk)
        ordered, ends = data.reading_order(digits), [d["start"] for d in digits]
        far = np.abs(np.subtract(ends[0], ends[-1]))
        first = [d["start"][int(far[1] >= far[0])] for d in ordered]  # along the farther axis
        assert first == sorted(first) and (later or len(digits) == 1 or max(far) >= 14 or still)
        names = [f"{'an' if d['digit'] == 8 else 'a'} {d['digit']}" for d in ordered]
        assert all(re.findall(r"\ban? \d", text) == names for text in (said, short))
        lengths.add((still, len(digits), len(language.pieces(said))))
        other = MOVING.otherwise(clip, k / 600)  # an edit: other digits on the same way
        for a, b in zip(digits, other.facts["digits"], strict=True):
            assert a["digit"] != b["digit"] and a == b | {"digit": a["digit"]}
    assert lengths == {(True, 1, 9), (True, 2, 15), (False, 1, 15), (False, 2, 27)}


def test_briefs_are_true_and_full_captions_are_few():
    clips, clean = MOVING.told(np.arange(2000)), []
    for clip in clips:
        clean.append(clip.brief == data.short_caption(clip.facts))
        digits = data.reading_order(clip.facts["digits"])
        for part, d in zip(clip.brief.split(" and "), digits, strict=True):
            (name,) = set(part.split()) - {"a", "an", "moving", "going", d["direction"]}
            assert name in (str(d["digit"]), data.NUMBERS[d["digit"]], "digit")
        assert clip.caption in ("", data.descriptive_caption(clip.facts))
    assert {"a 7", "7 left", "an eight", "digit", "nine moving"} <= {clip.brief for clip in clips}
    assert 0.45 < np.mean(clean) < 0.6 and 0.08 < np.mean([x.caption > "" for x in clips]) < 0.12


def test_what_lasts_is_true_of_a_clip_from_any_frame_on():
    said = "a 7 at top left moving left slowly, 1 bounce. an 8 at top right moving up fast, "
    lasting = "a 7 moving across slowly. an 8 moving upright fast."
    assert MOVING.lasting(said + "2 bounces. 17 frames.") == lasting
    assert MOVING.lasting("a 7 at top left. an image.") == "a 7 at top left. an image."
    for clips in zip(*(MOVING.told(np.arange(200), later=k) for k in (0, 9, 30)), strict=True):
        texts = [MOVING.lasting(data.descriptive_caption(clip.facts)) for clip in clips]
        assert len({str(sorted(text[:-1].split(". "))) for text in texts}) == 1  # in any order


def test_held_out_digits_are_never_trained_on_and_seeds_differ():
    for held_out, each in ((False, 450), (True, 50)):
        assert np.bincount(data.load_digits(held_out)[1]).tolist() == [each] * 10
    train, test = (Digits(WorldConfig(held_out=held_out)).sprites for held_out in (False, True))
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    clips = [x for k in (0, 1) for x in Digits(WorldConfig(seed=k)).told(np.arange(99))]
    assert len({str(clip.facts) for clip in clips}) == 2 * 99


def test_hashed_numbers_are_uniform_and_independent():
    u = data.hashed_uniform(3, np.arange(40_000), 8)
    assert u.shape == (40_000, 8) and 0 <= u.min() and u.max() < 1
    assert abs(u.mean(0) - 1 / 2).max() < 0.007 and abs(u.var(0) - 1 / 12).max() < 0.002
    assert abs(np.histogram(u, 64, (0, 1))[0] / (u.size / 64) - 1).max() < 0.06
    beside = [u[1:], u[:-1], data.hashed_uniform(4, np.arange(39_999), 8)]  # of clip and of seed
    assert abs(np.corrcoef(np.concatenate(beside, axis=1).T) - np.eye(24)).max() < 0.025
    assert np.array_equal(data.hashed_uniform(3, [77], 3)[0], u[77, :3])
    assert len(np.unique(data.hashed_uniform(3, np.array([2**62, 2**62 + 1]), 2))) == 4


@pytest.mark.parametrize("does, says", [
    (lambda: VAE(VAEConfig()).grid(4, 8, 8), r"4 frames: the VAE takes 1 \+ 4 k frames"),
    (lambda: VAE(VAEConfig()).grid(5, 6, 8), "6 x 8 pixels: the VAE takes multiples of 4 pixels"),
    (lambda: VAE(VAEConfig(2)).posterior(video_of(3), []), "3 frames: chunks after the first take"),
    (lambda: patches.first_fit([3, 25], 24), "clip 1 has 25 tokens, but a row has room for 24"),
    (lambda: patches.pack(*three_clips(), 2, 24, [[0], [2]]), "each of the 3 clips once"),
    (lambda: patches.pack(*three_clips(), 2, 24, [[0, 1], [2]]), "row 0 of the plan has 29 tokens"),
    (lambda: diffusion.sample(mix, torch.ones(1), torch.tensor([1, 0.5, 0.6])), "never rise"),
    (lambda: Digits(WorldConfig(shapes=((8, 48),))).told([0]), "14 pixels does not fit into 8"),
    (lambda: open_world(WorldConfig("nowhere")), "no such folder, nor a world of that name"),
])  # fmt: skip
def test_a_mistake_is_a_sentence(does, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        does()


@pytest.mark.parametrize("concept", [
    "data", "vae", "patches", "attention", "dit", "diffusion", "language", "prompting",
])  # fmt: skip
def test_a_demo_runs_and_draws(concept, tmp_path):
    call, one = [sys.executable, data.HERE / f"{concept}.py"], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=tmp_path, env=one, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"wrote {concept}_demo.png" in done.stdout and "False" not in done.stdout
    written = re.findall(r"written: '(.+)', true: '(.+)'", done.stdout)  # a model that has learned
    assert sum(a == b for a, b in written) >= 4 * (concept == "language")
    picture = np.asarray(Image.open(tmp_path / f"{concept}_demo.png").convert("L"))
    assert min(picture.shape) >= 100 and picture.std() > 10 and len(os.listdir(tmp_path)) == 1


# ============================================================ prompting: prompting.py and sample.py

SEVEN, THREE, TWO_STEPS = "a 7 moving left", "a 3 moving up", prompting.Settings(2)


def save_toy_run(folder: Path, ft=4, longest=17, actions=("left", "turn left", "right")) -> Path:
    """A run with random weights, as train.py saves it."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=3, width=16, encoder_depth=1, decoder_depth=1, time_factor=ft))
    words = Tokenizer.from_captions([SEVEN, THREE, asked("", (17, 32, 32), later=True)], 300)
    text = LanguageModel(LanguageConfig(3, 2, words.size, width=32, depth=1, heads=2))
    size = {"width": 32, "depth": 2, "heads": 2, "actions": len(actions), "time_factor": ft}
    dit = DiT(DiTConfig(4 * (3 + 3 + ft), 4 * 3, words.size, **size))
    for parameter in dit.parameters():  # as made, it says 0 whatever it is shown
        parameter.data += 0.05 * torch.randn_like(parameter)
    world = data.Digits(data.WorldConfig(durations=(longest,))).about() | {"actions": actions}
    config = {"patch": 2, "prediction": "x", "shift": 3.0, "captions": "recaptioned"}
    for name, network in (("vae", vae), ("text", text), ("dit", dit), ("dit.best-8", dit)):
        saved = {"ema": network.state_dict(), "model": asdict(network.config), "world": world}
        torch.save(saved | {"config": config, "words": words.words}, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory) -> Path:
    return save_toy_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy_run(toy_folder) -> prompting.Run:
    return prompting.load_run(toy_folder, "cpu")


@pytest.fixture
def watched(monkeypatch):
    """watched(home, name): a list of a function's calls from now on, arguments and result."""

    def watch(home, name: str) -> list[SimpleNamespace]:
        calls, real = [], getattr(home, name)

        def call(*args, **named):
            given = inspect.signature(real).bind(*args, **named)
            given.apply_defaults()
            calls.append(SimpleNamespace(**given.arguments, result=real(*args, **named)))
            return calls[-1].result

        monkeypatch.setattr(home, name, call)
        return calls

    return watch


def noise_clip(T: int, H: int = 8, W: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, T, H, W), np.uint8)


def toy_made(run, task: prompting.Task, seed=0, how=TWO_STEPS) -> np.ndarray:
    return prompting.finished(run, [task], [seed], vars(how))[0]


def tasks_beside(clip: np.ndarray, n: int, prompt: str = SEVEN) -> list[prompting.Task]:
    """Each task that makes n frames beside a clip: forward, backward, a loop, to another clip."""
    tasks = [prompting.extend(clip, n, prompt, backward) for backward in (False, True)]
    to = noise_clip(3, seed=1), n, prompt, THREE
    return [*tasks, prompting.loop(clip, n, prompt), prompting.connect(clip, *to)]


@pytest.mark.parametrize("L, n", [
    (1, 0), (2, 1), (3, 3), (4, 4), (5, 7), (6, 8), (7, 9), (8, 13), (9, 18), (10, 23)
])  # fmt: skip
def test_known_frames_are_bit_equal(toy_run, L, n):
    clip, other = noise_clip(L), noise_clip(3, seed=1)
    longer, earlier, ring, joined = (toy_made(toy_run, task) for task in tasks_beside(clip, n))
    assert longer.shape[1] == earlier.shape[1] == ring.shape[1] == L + n == joined.shape[1] - 3
    for made in (longer, earlier[:, n:], ring, joined):
        assert np.array_equal(made[:, :L], clip)
    assert np.array_equal(joined[:, L + n :], other)
    moving = toy_made(toy_run, prompting.animate(clip[:, :1], 1 + n, SEVEN))
    assert moving.shape[1] == 1 + n and np.array_equal(moving[:, :1], clip[:, :1])
    for T, many in ((7, 1), (17, 1), (33, 7)):  # any frames, one by one or in groups
        known = (np.random.default_rng(L).random(T) < 0.4).repeat(many)[:T]
        made = toy_made(toy_run, prompting.Task(noise_clip(T), known, SEVEN))
        assert np.array_equal(made[:, known], noise_clip(T)[:, known])
        assert known.all() or not np.array_equal(made, noise_clip(T))


def test_known_latents_stay_in_the_sampler(toy_run, watched):
    made, shown = watched(prompting.Batch, "denoise"), watched(VAE, "encode_known")
    toy_made(toy_run, prompting.extend(noise_clip(3), 14, SEVEN))
    given, whole = shown[0].result
    assert whole[0].tolist() == [True] + 4 * [False]  # the second is known in part
    assert torch.equal(made[0].result[:, :, 0], given[:, :3, 0])


@pytest.mark.parametrize("known", [np.arange(17) < 6, np.arange(17) > 11, np.arange(17) % 5 < 2])
def test_known_frames_are_used_and_no_others(toy_run, known):
    clips = clip, same, other = noise_clip(17), noise_clip(17, seed=5), noise_clip(17)
    same[:, known], other[:, known.argmax() + 1] = clip[:, known], 0
    tasks = (prompting.Task(clip, known, SEVEN) for clip in clips)
    made = [toy_made(toy_run, task)[:, ~known] for task in tasks]
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


@pytest.mark.parametrize("ft, longest", [
    (4, 17), (4, 9), (4, 5), (4, 1), (1, 8), (1, 2), (1, 1), (2, 9), (3, 16), (8, 33)
])  # fmt: skip
def test_every_frame_is_made_once(tmp_path, ft, longest):
    """In windows as long as in training. Each is shown only what is known, or made before it."""
    run = prompting.load_run(save_toy_run(tmp_path, ft, longest, actions=()), "cpu")
    for L, n in product((*range(1, 11), 20), (1, 2, 5, 9, 16, 40)):
        for task in (prompting.new(run, (n, 8, 16), ""), *tasks_beside(noise_clip(L), n)):
            there = task.known.copy()
            for window in prompting.windows(task, run):
                frames, (lo, hi) = window.first + np.arange(len(window.known)), window.made
                assert (len(frames) - (not window.past)) % ft == 0  # they fill latents
                assert len(frames) <= ft * max(4, run.window)
                assert frames[window.past * ft] <= lo < hi <= frames[-1] + 1
                assert there[frames[window.known]].all() and not there[lo:hi].any()
                there[lo:hi] = True
            assert there.all()
    for task in tasks_beside(noise_clip(20), 23):
        assert toy_made(run, task, how=prompting.Settings(1, 1.0)).shape[1] >= 43


def test_only_the_beginning_of_a_clip_starts_at_time_0(toy_run):
    for L, n, right in (
        (5, 4, [[0], [0], [1], [1]]),
        (5, 20, [[0, 1], [1, 0], [0, 1, 1], [0, 1, 1]]),
        (17, 16, [[1, 1], [1, 0], [1, 1, 1], [1, 1, 1]]),
    ):
        plans = [prompting.windows(task, toy_run) for task in tasks_beside(noise_clip(L), n)]
        assert [[window.start for window in plan] for plan in plans] == right


@pytest.mark.parametrize("ft", [1, 2, 4])
def test_each_window_has_its_own_start_caption_guidance_and_actions(tmp_path, watched, ft):
    run = prompting.load_run(save_toy_run(tmp_path, ft), "cpu")
    full, lasts = "a 3 at top left moving up fast, 1 bounce. 17 frames.", "a 3 moving upright fast."
    said = {later: [run.tokenizer.encode(x)] for later, x in ((False, full), (True, lasts))}
    packs, guided = watched(patches, "pack"), watched(diffusion, "guided")
    tasks = [prompting.new(run, (40, 8, 16), full), prompting.edit(noise_clip(40), 0.5, full)]
    for task in tasks + tasks_beside(noise_clip(6), 30, full):
        packs.clear(), guided.clear()
        T, plan = len(task.known), prompting.windows(task, run)
        done = 1 + np.arange(T) % 3
        task = replace(task, prompt_end=None, actions=done)
        toy_made(run, task, how=prompting.Settings(1))
        for window, call, idle, how in zip(plan, packs[::2], packs[1::2], guided, strict=True):
            later, frames = window.past > 0, window.first + np.arange(len(window.known))
            assert call.starts == idle.starts == [window.start]
            assert list(call.texts) == said[later] and idle.texts == [[NOTHING]]
            assert how.strength == (2 if later else 6)
            right = np.where((frames >= 0) & (frames < T), done[frames.clip(0, T - 1)], 0)
            assert call.actions[0].flatten()[-len(frames) :].tolist() == right.tolist()
            assert call.actions[0].shape[1] == ft and not idle.actions[0].any()


def test_another_action_changes_the_pixels(toy_run):
    for task in (prompting.new(toy_run, (30, 8, 16), SEVEN), *tasks_beside(noise_clip(6), 24)):
        there = np.arange(len(task.known)) == 15
        tasks = [replace(task, actions=x) for x in (None, 0 * there, 1 * there, 2 * there)]
        plain, idle, left, turned = (toy_made(toy_run, task) for task in tasks)
        assert np.array_equal(plain, idle)
        assert not np.array_equal(idle, left) and not np.array_equal(left, turned)


@pytest.mark.parametrize("n", [8, 30])
def test_one_prompt_turns_into_the_other(toy_run, n):
    pairs = (SEVEN, SEVEN), (SEVEN, THREE), (THREE, THREE)
    tasks = (prompting.connect(noise_clip(5), noise_clip(4, seed=1), n, *pair) for pair in pairs)
    seven, both, three = (toy_made(toy_run, task)[:, 5 : 5 + n].astype(int) for task in tasks)
    near_seven, near_three = (-np.abs(both - x).mean((0, 2, 3)) for x in (seven, three))  # [n]
    assert near_seven[:2].sum() > near_three[:2].sum()
    assert near_seven[-2:].sum() < near_three[-2:].sum()


def test_any_possible_size(toy_run):
    for size in ((1, 8, 8), (2, 16, 40), (18, 24, 16), (41, 8, 8), (3, 96, 64)):
        assert toy_made(toy_run, prompting.new(toy_run, size, SEVEN)).shape == (1, *size)
    with pytest.raises(ValueError, match="multiples of 8, such as 32 x 48"):
        toy_made(toy_run, prompting.new(toy_run, (1, 33, 50), ""))
    with pytest.raises(ValueError, match="too large: .* patches at once, of at most 65536"):
        toy_made(toy_run, prompting.new(toy_run, (17, 8192, 8192), ""))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_frames_that_stream_are_those_of_the_whole(toy_run, watched, eta):
    task, how = prompting.new(toy_run, (62, 8, 16), SEVEN), prompting.Settings(2, 2.0, eta)
    calls = watched(prompting.Batch, "denoise")
    chunks = list(prompting.complete(toy_run, [task], [4], how))
    for one, two in pairwise(calls):
        assert torch.equal(two.past, one.result[:, :, -two.window.past :])
    latent = torch.cat([call.result[:, :, call.window.past :] for call in calls], dim=2)
    whole = to_uint8(toy_run.vae.decode(latent))[:, :, :62]
    off = np.concatenate(chunks, axis=2).astype(int) - whole
    assert len(chunks) > 3 and off.shape == (1, 1, 62, 8, 16)
    assert np.abs(off).max() <= 1 and (off != 0).mean() < 1e-3


def test_a_clip_does_not_depend_on_its_batch(toy_run, monkeypatch):
    monkeypatch.setattr(prompting, "bf16", lambda device: nullcontext())  # its rounding does
    one, two, how = noise_clip(20), noise_clip(20, seed=5), prompting.Settings(2, 2.0, 1.0)
    edits = [prompting.edit(clip, 0.5, SEVEN) for clip in (one, two)]
    news = [prompting.new(toy_run, (30, 8, 16), said) for said in (SEVEN, THREE)]
    beside = zip(tasks_beside(one[:, :6], 20), tasks_beside(two[:, :6], 20, THREE), strict=True)
    for pair in (edits, news, *map(list, beside)):
        both = prompting.finished(toy_run, pair, [3, 9], vars(how))
        for task, seed, made in zip(pair, (3, 9), both, strict=True):
            off = np.abs(made.astype(int) - toy_made(toy_run, task, seed, how))
            assert off.max() <= 1 and (off > 0).mean() < 1e-2
    for batch in ([], edits[:1], [edits[0], news[0]], [edits[0], replace(edits[1], strength=0.4)]):
        with pytest.raises(ValueError, match="one size, mask and strength, and a seed for each"):
            next(prompting.complete(toy_run, batch, [0, 1], TWO_STEPS))


@pytest.mark.parametrize("size", [(9, 8, 16), (30, 8, 16), (9, 64, 64)])
def test_strength_is_a_share_of_the_way_from_noise(toy_run, watched, size):
    """At every size, though larger ones need more noise to hide as much."""
    calls, clips = watched(diffusion, "sample"), (noise_clip(*size), noise_clip(*size, seed=1))
    tasks = [prompting.new(toy_run, size, ""), prompting.edit(clips[0], 0.0, "")]
    tasks += [prompting.edit(clip, strength, "") for strength in (1.0, 0.4) for clip in clips]
    steps = prompting.Settings(5, 1.0)
    new, kept, all_one, all_two, some_one, some_two = (
        toy_made(toy_run, task, how=steps) for task in tasks
    )
    assert np.array_equal(kept, clips[0]) and not np.array_equal(some_one, some_two)
    assert np.array_equal(all_one, new) and np.array_equal(all_two, new)
    tables = [call.levels.flatten(1) for call in calls]  # [steps + 1, t] of each window
    assert torch.allclose(tables[-len(tables) // 5][0], tables[0][3])


def test_prompts_are_expanded_beside_what_is_known(toy_run, watched):
    """As those of a whole clip only where the first window starts with the clip."""
    asks, long, huge = watched(Language, "expand"), noise_clip(30, 24, 24), noise_clip(9, 64, 64)
    short, first, last, image = long[:, :9], long[:, :17], long[:, 13:], long[:, :1]
    for task, right in (  # 17 frames are the longest clip in training, 48 pixels the largest
        (prompting.new(toy_run, (9, 24, 24), SEVEN), [(SEVEN, None, False)]),
        (prompting.animate(image, 17, SEVEN), [(SEVEN, image, False)]),
        (prompting.extend(short, 8, SEVEN), [(SEVEN, short, False)]),
        (prompting.extend(long, 8, SEVEN), [(SEVEN, last, True)]),
        (prompting.extend(short, 8, SEVEN, backward=True), [(SEVEN, short, True)]),
        (prompting.extend(long, 20, SEVEN, backward=True), [(SEVEN, first, True)]),
        (prompting.edit(short, 0.6, SEVEN), [(SEVEN, short, False)]),
        (prompting.edit(long, 0.6, SEVEN), [(SEVEN, first, False)]),
        (prompting.loop(long, 7, SEVEN), [(SEVEN, last, True)]),
        (prompting.loop(huge, 7, SEVEN), []),
        (prompting.connect(long, short, 7, SEVEN, THREE),
         [(SEVEN, last, True), (THREE, short, True)]),
    ):  # fmt: skip
        asks.clear()
        (expanded,) = prompting.expand(toy_run, [task], [0])
        assert (expanded.prompt != SEVEN) == bool(right)
        for ask, (said, seen, later) in zip(asks, right, strict=True):
            assert (ask.prompts, ask.later, ask.part is None) == ([said], later, seen is None)
            if seen is not None:
                latent = toy_run.vae.encode(to_float(seen)[None])
                assert torch.allclose(ask.part[0], latent[0], atol=1e-4)


def test_settings_go_by_what_is_known(toy_run):
    tasks = [prompting.edit(noise_clip(5), 0.5, ""), prompting.animate(noise_clip(1), 5, "")]
    found = [prompting.settings(toy_run, task) for task in tasks + tasks_beside(noise_clip(5), 5)]
    assert [how.guidance for how in found] == [6, 6, 2, 2, 1, 1]
    assert [how.eta for how in found] == [0.75, 0.75, 1, 1, 1, 1]


def test_noisy_past():
    latent, eps = torch.randn(2, 2, 3, 5, 4, 6)  # [N, Z, t, h, w] each
    clean, noisy = (prompting.noisy_past(latent, 2, level, eps, 4) for level in (0.0, 1.0))
    assert clean.shape == (2, 7, 5, 4, 6) and torch.equal(clean[:, :3, :2], latent[:, :, :2])
    assert (clean[:, 3:, :2] == 1).all() and (clean[:, :, 2:] == 0).all()
    assert torch.allclose(noisy[:, :3, :2], eps[:, :, :2])


def test_levels_beyond_the_trained_size():
    level, fixed = torch.tensor([0.0, 1.0, 0.6]), torch.tensor([True, False, False])
    ratios = (0.25, 1.0, 4.0)  # below 1 where a run was trained with such a shift
    tables = [prompting.level_table(10, level, fixed, ratio).flatten(1) for ratio in ratios]
    for table in tables:
        assert torch.equal(table[0], level) and (table[-1] == 0).all()
        assert (table[1:] <= table[:-1]).all()
    smaller, plain, larger = (table[1:-1, 1:] for table in tables)
    assert (smaller < plain).all() and (plain < larger).all()


def sample_command(folder: Path, line: str) -> tuple[int, str, str]:
    """sample.py in this process: exit status, stdout, stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = sample.command(["--run", str(folder), "--steps", "1", *shlex.split(line)])
        except SystemExit as stop:  # argparse
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def test_examples_in_the_help_work(toy_folder, tmp_path, monkeypatch):
    """Word for word, one after the other, but for the minute, which is shorter here."""
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for line in sample.__doc__.splitlines() if "python sample.py" in line]
    for line in lines:
        line = line.removeprefix("python sample.py ").replace("--seconds 60", "--seconds 5")
        status, out, err = sample_command(toy_folder, line)
        assert status == 0 and ("wrote" in out) == ("seed 0: " in out) == ("--prompt" in line), err
    names = "seven.gif longer.gif earlier.gif loop.webp eight.png falling.gif minute.mp4 both_0.gif"
    clips = [media.read_clip(name, 1)[0] for name in names.split()]
    seven, longer, earlier, ring, eight, falling, minute, enlarged = clips
    assert len(lines) >= 12 and seven.shape == (1, 17, 32, 48) and minute.shape == (1, 50, 32, 32)
    for clip in (longer[:, :17], earlier[:, -17:], ring[:, :17]):
        assert np.array_equal(clip, seven)
    assert longer.shape[1] == 50 and np.array_equal(falling[:, :1], eight)
    assert enlarged.shape[2:] == (4 * 32, 4 * 32) and Path("both_sheet.png").exists()
    status, out, _ = sample_command(toy_folder / "dit.best-8.pt", "--prompt 'a 7' --no-expand")
    assert status == 0 and "seed 0: " not in out


@pytest.mark.parametrize("line", [
    "", "--image good.gif --loop good.gif", "--extend good.gif --loop good.gif", "--what",
    "--loop missing.gif", "--backward", "--then x", "--strength 0.5", "--connect good.gif",
    "--edit good.gif --strength 1.5", "--edit good.gif --strength nan",
    "--edit good.gif --frames 9", "--frames 0", "--frames 3 --seconds 1", "--seconds nan",
    "--seconds -1", "--seconds 0", "--frames 999999999 --out x.gif",
    "--seconds 1000000 --out x.mp4", "--height 33", "--image good.gif --height 32",
    "--image good.gif --height 33 --width 32", "--guidance nan", "--height 100000 --width 100000",
    "--height 100000 --width 100000 --out x.mp4", "--steps 0",
    "--caption good.gif --height 64 --width 64", "--fps 0", "--count 0", "--seed -1", "--out x",
    "--out x.jpg", "--out good.gif/x.gif", "--run nowhere", "--loop good.gif --actions left",
    "--actions left*9 --frames 3", "--actions 'left up'", "--actions leftright",
    "--actions missing.txt", "--actions left*9999999999",
])  # fmt: skip
def test_a_wrong_command_line_is_one_sentence(toy_folder, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    write_clip("good.gif", noise_clip(9, 32, 32))
    status, _, err = sample_command(toy_folder, f"--prompt 'a 7' {line}" if line else "")
    assert (status, err.count("\n")) == (2, 1) and os.listdir() == ["good.gif"], err


def test_actions_of_a_command_line(toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("good.gif", noise_clip(9, 32, 32))
    Path("done.txt").write_text("left\nturn left\nturn left\n")

    def actions(line: str) -> list[list[int]]:
        args = sample.arguments(shlex.split(f"--prompt '' --fps 10 --actions {line}"))
        task = sample.task_of(toy_run, args, sample.read_files(toy_run, args))
        return [task.actions.tolist() for task in sample.tasks_of(toy_run, args, task)]

    assert actions("'left*2 turn left right*3'") == [[0, 1, 1, 2, 3, 3, 3]]
    assert actions("done.txt --frames 6") == [[0, 1, 2, 2, 0, 0]]
    assert actions("done.txt --extend good.gif") == [[0] * 9 + [1, 2, 2]]
    one, two = actions("random --count 2")
    assert one != two and len(one) == 17 and one[0] == 0 and set(one[1:]) == {1, 2, 3}
    with pytest.raises(ValueError, match="have none"):
        sample.actions_of(SimpleNamespace(world={"actions": ()}), "left", 0, None)


def test_an_interrupted_run_leaves_a_playable_file(toy_folder, tmp_path):
    path, end = tmp_path / "a.mp4", time.time() + 90
    line = f"sample.py --run {toy_folder} --steps 1 --prompt '' --frames 5000 --out {path}"
    job = subprocess.Popen(
        [sys.executable, *shlex.split(line)], cwd=Path(sample.__file__).parent,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while time.time() < end and not (path.exists() and path.stat().st_size > 30_000):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 130 and b"interrupted" in err and b"Traceback" not in err
    assert media.read_clip(path, 1)[0].shape[1] > 20


tqdm.set_lock(threading.RLock())  # its own is shared with children, and stays held by a killed one

# ======================================================================================== train.py

CODE = Path(train.__file__).parent
STAGES = ("vae", "text", "dit")
BEFORE_DIT = ("vae.pt", "items", "text.pt", "captions.jsonl")  # what the DiT is trained from
SMALL = """--width 32 --depth 2 --heads 2 --rows 2 --tokens 160 --steps 6 --image-phase 0.3
    --vae-width 16 --vae-steps 4 --vae-batch 2 --text-width 64 --text-steps 4 --text-batch 2
    --items 24 --save-every 3 --sample-every 6 --compile no --workers 0""".split()
SMALLER = [*SMALL, *"""--items 0 --tokens 64 --given 0.5 --later 0.25 --digit 8 --durations 5,9
    --shapes 16x16,16x24""".split()]  # fmt: skip
FORK = get_context("fork").Process  # has all that is imported


class Acting(Digits):
    """A few clips of digits, with actions."""

    actions = ("left", "right")

    def __len__(self) -> int:
        return 40

    def labelled(self, i):
        return np.asarray(i) % 3 == 0

    def held_back(self, i):
        return np.asarray(i) % 10 == 7

    def clips(self, i, image=False, later=0, frames=None, pixels=True):
        clips = super().clips(i, image, later, frames, pixels)
        for k, first, clip in zip(i, np.broadcast_to(later, len(i)), clips, strict=True):
            actions = 1 + (hashed_uniform(self.config.seed, [k], 99)[0] < 0.5)
            clip.actions = actions[first : first + clip.facts["frames"]]
        return clips


def train_acting(out: Path, *flags: str, command=train.main, half: bool = False) -> None:
    """train.py in this process, in that world, without pictures. In float32, unless `half`: the
    rounding of bfloat16 is far larger than what the order of a sum changes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (prompting, loop, muon, items):
            patch.setattr(module, "bf16", lambda _: torch.autocast("cpu", torch.bfloat16, half))
        patch.setattr(train, "open_world", Acting)
        patch.setattr(train, "gallery", lambda *_: None)
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
        command(train.parse([*SMALLER, "--out", str(out), *flags]))


def meddled(stop=(), bad=()):
    """`fit`, but in the steps (stage, step) of `stop` somebody asks to stop, and in those of `bad`
    the loss is not a number."""

    def fit(stage, *rest):
        def loss(model, part, step):
            share, logs = stage.loss(model, part, step)
            loop.STOP.extend([1] * ((stage.name, step) in stop))
            return share * (torch.nan if (stage.name, step) in bad else 1), logs

        return loop.fit(replace(stage, loss=loss), *rest)

    return fit


def differing(a: Path, b: Path, stages=STAGES, tolerance: float = 0.0) -> list:
    """The weights, their averages and logged losses in which two runs differ."""
    found = []
    for out in (a, b):
        log = [x for x in checkpoints.read_log(out) if x["stage"] in stages]
        found.append({(x["stage"], x["step"]): torch.tensor(x["loss"]) for x in log})
        for name in stages:
            saved = torch.load(out / f"{name}.pt", weights_only=True)
            found[-1] |= {(name, key): x for key, x in saved["weights"].items()}
            found[-1] |= {(name, "ema", key): x for key, x in saved["ema"].items()}
    assert found[0].keys() == found[1].keys()
    one, other = found
    return [key for key, x in one.items()
            if not (x - other[key]).abs().max() <= tolerance * (1 + x.abs().max())]  # fmt: skip


def same_items(a: Path, b: Path) -> bool:
    one, other = (items.Items(out / "items", 3, 4) for out in (a, b))
    columns = [name for name in items.COLUMNS if name != "at"]
    pairs = [(one.read(k), other.read(k)) for k in range(len(one))]
    return all(np.array_equal(one[name], other[name]) for name in columns) and all(
        x[k] is y[k] or torch.equal(x[k], y[k]) for x, y in pairs for k in x)  # fmt: skip


def copy_of(run: Path, out: Path, *names: str) -> Path:
    out.mkdir(exist_ok=True)
    for name in names:
        copy = shutil.copytree if (run / name).is_dir() else shutil.copy
        copy(run / name, out / name)
    return out


@pytest.fixture(scope="module")
def user_run(tmp_path_factory) -> Path:
    """The real command in a process of its own: interrupted by a signal, and repeated."""
    out = tmp_path_factory.mktemp("user") / "out" / "tiny"
    how = {"cwd": out.parents[1], "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, CODE / "train.py", "--preset", "tiny", *SMALL]
    job = subprocess.Popen(line, **how)
    while not (out / "vae.pt").exists() and job.poll() is None:
        time.sleep(0.02)
    job.terminate()
    said = job.communicate()[1]
    assert job.returncode == 1 and "the same command continues" in said, said
    done = subprocess.run(line, **how)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def acting_run(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    train_acting(out := tmp_path_factory.mktemp("acting"))
    return out


def test_train_then_sample_as_a_user_does(user_run):
    files = "config.json log.jsonl loss.png captions.jsonl items vae.pt text.pt dit.pt samples " \
            "gallery.gif dit.best-3.pt dit.best-6.pt .lock"  # fmt: skip
    assert {x.name for x in user_run.iterdir()} == set(files.split())
    assert os.listdir(user_run / "samples") == ["000006.gif"]
    line = [sys.executable, CODE / "sample.py", "--prompt", "a 7 moving left", "--steps", "2"]
    line += "--frames 9 --height 24 --width 40 --out seven.npy".split()
    how = {"cwd": user_run.parents[1], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run(line, **how, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = np.load(user_run.parents[1] / "seven.npy").transpose(3, 0, 1, 2)  # [C, T, H, W]
    assert made.shape == (1, 9, 24, 40) and made.std() > 0
    run = prompting.load_run(user_run, "cpu")  # command and function agree
    told = prompting.expand(run, [prompting.new(run, (9, 24, 40), "a 7 moving left")], [0])
    assert done.stdout == f"seed 0: {told[0].prompt!r}\nwrote seven.npy: 9 x 24 x 40\n"
    assert np.array_equal(prompting.finished(run, told, [0], {"steps": 2})[0], made)


def test_stopped_anywhere_and_continued_is_uninterrupted_bit_for_bit(acting_run, tmp_path):
    """Once or twice in each stage, before and after a checkpoint."""

    def stopping(work):
        return lambda *args: (loop.STOP.append(1), work(*args))[1]

    places = ("vae", 2), (items, "encode"), ("text", 1), (Language, "caption"), ("dit", 1)
    for place in (*places, ("dit", 4)):
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(place[0], str):
                patch.setattr(train, "fit", meddled(stop=[place]))
            else:
                patch.setattr(*place, stopping(getattr(*place)))
            with pytest.raises(SystemExit, match="stopped.*; the same command continues"):
                train_acting(tmp_path)
        loop.STOP.clear()
        if place[0] is items:  # a row that was being written
            assert 0 < len(items.Items(tmp_path / "items", 3, 4)) < 80
            for path in (tmp_path / "items").glob("00000.*"):
                path.write_bytes(path.read_bytes() + b"torn!")
    train_acting(tmp_path)
    assert same_items(acting_run, tmp_path) and not differing(acting_run, tmp_path)
    captions = [(out / "captions.jsonl").read_text() for out in (acting_run, tmp_path)]
    assert captions[0] == captions[1]
    assert {x.name for x in acting_run.iterdir()} == {x.name for x in tmp_path.iterdir()}


def test_every_stage_learns_in_bfloat16(acting_run, tmp_path):
    """Also where tests run on a CPU that would not choose it."""
    train_acting(tmp_path, half=True)
    lines = [checkpoints.read_log(out) for out in (acting_run, tmp_path)]
    assert not same_items(acting_run, tmp_path)
    for exact, rounded in zip(*lines, strict=True):
        assert exact["stage"] == rounded["stage"] and exact["step"] == rounded["step"]
        assert 0 < abs(exact["loss"] - rounded["loss"]) < 0.05 * exact["loss"]


def test_killed_at_random_moments_and_continued_is_uninterrupted(acting_run, tmp_path):
    """SIGKILL leaves no time to do anything; with a checkpoint every step, it hits many of them."""
    for wait in np.random.default_rng().uniform(0.1, 1.5, 8):
        child = FORK(target=train_acting, args=(tmp_path, "--save-every", "1"))
        child.start()
        time.sleep(wait)
        child.kill()
        child.join()
    train_acting(tmp_path, "--save-every", "1")
    assert same_items(acting_run, tmp_path) and not differing(acting_run, tmp_path)
    left = {x.name for x in tmp_path.iterdir()} - {x.name for x in acting_run.iterdir()}
    assert all("part" in name or "best" in name for name in left), left


def one_of(rank: int, ranks: int, port: int, jobs: list[tuple[Path, list[str]]]) -> None:
    """One of the processes that torchrun would start; in the run "changed", one is told to stop."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    for k, (out, flags) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port + k)
        train.fit = meddled(stop=[("dit", 2)] if out.name == "changed" and rank == 1 else ())
        try:
            train_acting(out, *flags)
        except SystemExit:
            loop.STOP.clear()
            dist.destroy_process_group()


def test_one_process_and_many_take_the_same_steps(tmp_path):
    """DDP, FSDP2, gradient accumulation, and going on with another number of processes: the same
    global batch is the same step. Each stage starts from the same files: a VAE that differs in its
    last bits would make other items, and a captioner other words."""
    alone, one = "--rows 5 --vae-batch 4 --text-batch 4 --steps 5".split(), tmp_path / "one"
    parts, shard = [*alone, "--accumulate", "2"], ["--shard"]
    ways = {"parts": parts, "two": alone, "sharded": parts + shard, "changed": alone + shard}
    train_acting(one, *alone)
    for way in ways:
        names = BEFORE_DIT if way in ("sharded", "changed") else ("vae.pt", "captions.jsonl")
        copy_of(one, tmp_path / way, *names)
    train_acting(tmp_path / "parts", *parts)
    jobs = [(tmp_path / way, flags) for way, flags in ways.items() if way != "parts"]
    jobs.append((tmp_path / "vae", [*parts, "--stage", "vae"]))
    with socket.socket() as place:
        place.bind(("localhost", 0))
        port = place.getsockname()[1]
    torch.multiprocessing.spawn(one_of, (2, port, jobs), nprocs=2)
    assert torch.load(tmp_path / "changed" / "dit.pt", weights_only=True)["step"] == 3
    train_acting(tmp_path / "changed", *alone)  # two sharded processes did 3 steps, one the rest
    assert not differing(one, tmp_path / "vae", ["vae"], 1e-5)
    for way in ways:
        assert not differing(one, tmp_path / way, ["dit"], 1e-5), way
    for way in ("parts", "two"):  # the others took the captioner as it was
        # AdamW makes steps of up to 0.003 of any gradient, however nearly it is zero.
        assert not differing(one, tmp_path / way, ["text"], 3e-4), way
    assert len([*(tmp_path / "two" / "items").glob("*.idx")]) == 2
    assert same_items(one, tmp_path / "two")


@pytest.mark.parametrize("stage, limit", [("dit", 20_000), ("items", 3_000)])
def test_a_full_disk_is_one_line_and_loses_nothing(acting_run, tmp_path, capfd, stage, limit):
    """A limit for the size of a file, in a process of its own, is as good as a full disk."""
    out = copy_of(acting_run, tmp_path / "run", *BEFORE_DIT[: 1 if stage == "items" else 4])

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        train_acting(out, "--stage", stage, command=train.command)

    child = FORK(target=full)
    child.start()
    child.join()
    said = [x for x in capfd.readouterr().err.splitlines() if "train.py: " in x]
    assert child.exitcode == 2 and len(said) == 1 and not list(out.glob("dit*"))
    right = "dit.best-3.pt could not be written at step 3, with " if stage == "dit" else "large"
    assert right in said[0]
    train_acting(out)  # there is room again
    assert same_items(acting_run, out) and not differing(acting_run, out, ["dit"])


@pytest.mark.parametrize("bad, last", [({1, 2, 4}, 6), ({2, 3, 4}, 4)])
def test_bad_steps_are_skipped_but_three_in_a_row(acting_run, tmp_path, monkeypatch, bad, last):
    copy_of(acting_run, tmp_path, *BEFORE_DIT)
    monkeypatch.setattr(train, "fit", meddled(bad=[("dit", step) for step in bad]))
    stops = pytest.raises(FloatingPointError, match="dit diverged: in 3 steps in a row.* step 5")
    with stops if last == 4 else nullcontext():
        train_acting(tmp_path, "--save-every", "2")
        assert checkpoints.read_log(tmp_path)[-1]["skipped"] == len(bad)
    assert torch.load(tmp_path / "dit.pt", weights_only=True)["step"] == last
    assert not differing(tmp_path, tmp_path)  # NaN differs from itself


def test_the_best_checkpoints_are_kept_and_survive_a_restart(acting_run, tmp_path, monkeypatch):
    """The loss on what is held back says which."""
    copy_of(acting_run, tmp_path, *BEFORE_DIT)
    flags, losses = "--steps 12 --save-every 2 --keep 3 --lr 0.3".split(), {}  # it wavers

    def noted(state, path, facts, loss, count):
        losses[state.step] = loss
        checkpoints.keep_best(state, path, facts, loss, count)

    monkeypatch.setattr(loop, "keep_best", noted)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "fit", meddled(stop=[("dit", 6)]))
        train_acting(tmp_path, *flags)
    loop.STOP.clear()
    train_acting(tmp_path, *flags)
    best = sorted(losses, key=losses.get)[:3]
    kept = {int(path.stem.split("-")[1]): path for path in tmp_path.glob("dit.best-*.pt")}
    assert list(losses) == [2, 4, 6, 8, 10, 12] and kept.keys() == set(best)
    assert prompting.read_weights(kept[best[0]], "cpu")["held_back"] == losses[best[0]]
    assert prompting.load_run(kept[best[0]], "cpu").dit  # it can be sampled from


@pytest.mark.parametrize("stage, kind", [("vae", ""), ("text", "weights"), ("dit", ".pt")])
def test_training_starts_from_given_weights(acting_run, tmp_path, monkeypatch, stage, kind):
    """It starts with exactly the EMA weights, at step 0; continued, it no longer looks there.
    kind: a file of weights; "" and "weights": a folder, and that of what is exported."""
    given = copy_of(acting_run, tmp_path / "given", "vae.pt", "text.pt", "dit.pt")
    train.main(train.parse(["--stage", "export", "--out", str(given)]))
    start = given / (stage + kind if kind == ".pt" else kind)
    saved = prompting.read_weights(start if kind == ".pt" else start / f"{stage}.pt", "cpu")
    new = copy_of(acting_run, tmp_path / "new", *() if stage == "vae" else BEFORE_DIT[:2])
    flags = ["--stage", stage, "--init-from", str(start)]
    begun = {}

    def looked_at(stage, *rest):
        begun.update(deepcopy(stage.model.state_dict()), words=stage.facts.get("words"))
        return loop.fit(stage, *rest)

    monkeypatch.setattr(train, "fit", looked_at)
    train_acting(new, *flags)
    assert begun.pop("words") == saved.get("words") and begun.keys() == saved["ema"].keys()
    assert all(torch.equal(x.float(), begun[name]) for name, x in saved["ema"].items())
    before = copy_of(new, tmp_path / "before", f"{stage}.pt", "log.jsonl")
    shutil.rmtree(given)
    train_acting(new, *flags)  # finished, and what it learned stays
    assert not differing(before, new, [stage])


@pytest.mark.parametrize("flags, says", [
    ("--preset huge", "no preset huge: there are tiny, clips, small"),
    ("--depht 8", "unrecognized arguments: --depht"),
    ("--stage dit --out nowhere", "train there first"),
    ("--digit 40", "a digit of 40 pixels does not fit"),
    ("--shapes 32,32", "--shapes 32,32: like 32x32,24x40"),
    ("--width 100 --heads 3", "--width 100 --heads 3: a multiple of 6"),
    ("--shift 0", "--shift 0.0: above 0"), ("--images 2", "--images 2.0: a share, from 0 to 1"),
    ("--ema 1.5", "--ema 1.5: a share"), ("--vae-lr nan", "--vae-lr nan: above 0"),
    ("--workers -1", "--workers -1: at least 0"), ("--heads 0", "--heads 0: at least 1"),
    ("--seed 9999999999", "--seed 9999999999: below 4294967296"),
    ("--fps nan", "--fps nan: at least 1"), ("--durations 9,x", "--durations: invalid values"),
    ("--seed 1 --out RUN", "world seed = 0, and not 1: set --seed 0 again"),
    ("--rows 2 --accumulate 4", "--rows 2: at least 4: one for each of 4 parts"),
    ("--shard", "start them with torchrun"),
    ("--tokens 20", "raise that, or lower --pixels or --durations"),
    ("--durations 16", "the VAE takes 1 + 4 k frames"),
    ("--vae-width 24 --out RUN", "model width = 16, and not 24: set --vae-width 16 again, or name"),
    ("--fps 5 --out RUN", "world fps = 10, and not 5: set --fps 10 again, or name another folder"),
    ("--stage vae --out BEST", "cannot be trained on: name another folder with --out, and --init"),
    ("--stage vae --init-from RUN --vae-width 24", "vae.pt is not of this VAE: "),
    ("--init-from RUN/dit.pt", "of one network: --stage vae, text or dit"),
    ("--stage vae --init-from CODE/assets/digits.png", "digits.png is not a checkpoint of ours"),
    ("--stage export", "nothing to export in out/tiny: train there first"),
    ("--world nowhere", "nowhere: no such folder, nor a world of that name"),
    ("--data CODE/training", "no file of .mp4 .webm"),
    ("--data BAD", "captions.jsonl, line 2: each line is like"),
    ("--data BAD --out BAD", "--out BAD: another folder than that of the clips"),
    ("--data BROKEN", "none of its 1 files can be used"),
])  # fmt: skip
def test_a_training_mistake_is_one_line(user_run, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    copy_of(user_run, Path("RUN"), "vae.pt", "dit.pt")
    for name in ("BEST", "BAD", "BROKEN"):
        Path(name).mkdir()
    shutil.copy(user_run / "dit.best-3.pt", "BEST/vae.pt")
    Image.new("L", (40, 40)).save("BAD/a.png")
    Path("BAD/captions.jsonl").write_text('{"file": "a.png", "caption": "a"}\n{"caption": "b"}')
    Path("BROKEN/a.png").write_bytes(b"no")
    with pytest.raises(SystemExit) as stopped:
        train.command(train.parse([*SMALL, *flags.replace("CODE", str(CODE)).split()]))
    said = [x for x in capsys.readouterr().err.splitlines() if "train.py: " in x]
    assert stopped.value.code == 2 and len(said) == 1 and says in said[0]


def test_the_preset_for_own_clips_fits_them(own_files):
    said = train.dry_run(train.parse(["--preset", "clips", "--data", str(own_files)]))
    assert "dit: 2.0 M" in said and "in 4 rows of 512" in said


@pytest.mark.parametrize("preset, millions", [("tiny", 2.0), ("small", 33), ("base", 133),
                                              ("large", 462), ("xl", 680), ("3b", 3099)])
def test_presets_build_and_have_the_size_they_say(preset, millions):
    c = train.parse(["--preset", preset])
    world = train.make_world(c)  # every size can be cut into patches, and fits into a row
    with torch.device("meta"):
        dit, vae = train.make_dit(c, 300, world), train.make_vae(c, world)
    assert sum(p.numel() for p in dit.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert patches.token_count(vae.grid(max(c.durations), *world.shapes[0]), c.patch) < c.tokens


def test_learning_rate_rises_then_falls_to_zero():
    rates = [loop.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:] == pytest.approx([(100 - k) / 90 for k in range(10, 100)])


def test_dealt_parts_cost_about_the_same():
    random = np.random.default_rng(0)
    for rows, parts in ((16, 4), (17, 4), (5, 5), (64, 8)):
        costs = random.uniform(1, 3, rows)
        dealt = processes.deal(costs.tolist(), parts)
        assert sorted(sum(dealt, [])) == list(range(rows))
        assert all(1 <= len(part) <= -(-rows // parts) for part in dealt)
        in_turn = max(costs[p::parts].sum() for p in range(parts))
        assert max(costs[part].sum() for part in dealt) <= in_turn or rows % parts


def test_muon_is_that_of_pytorch(monkeypatch):
    half = torch.autocast("cpu", torch.bfloat16)  # as in PyTorch
    monkeypatch.setattr(muon, "bf16", lambda device: half)
    torch.manual_seed(0)
    begun = [torch.randn(shape) for shape in ((24, 8), (8, 24), (16, 16), (24, 8))]
    ours, theirs = ([x.clone() for x in begun] for _ in range(2))
    flags = {"lr": 0.1, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = muon.Muon(ours, lr=0.1), torch.optim.Muon(theirs, **flags)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, x in zip(ours, theirs, begun, strict=True):
        assert (a - b).norm() <= 0.02 * (b - x).norm()  # bfloat16 has 8 bits


# ----------------------------------------------------------------- what the transformer learns from


@pytest.fixture(scope="module")
def acting(acting_run) -> SimpleNamespace:
    """What that run was trained from."""
    c = train.parse([*SMALLER, "--out", str(acting_run)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_world", Acting)
        world = train.make_world(c)
    made, vae = items.Items(acting_run / "items", 3, 4), prompting.load_vae(acting_run, "cpu")
    said, tokenizer = words.words_of(world, made), words.make_tokenizer(world)
    texts = [tokenizer.encode(x) for x in words.captions_of(world, c, made, said)]
    source = batches.Source(made, texts, c, world)
    return SimpleNamespace(c=c, world=world, vae=vae, items=made, said=said, source=source)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)  # float16 on disk


def test_items_are_what_training_would_make(acting):
    kinds, made = Counter(), acting.items
    which = made["number"], made["image"], made.conditioned
    assert len({*zip(*which, strict=True)}) == len(made) > 100
    for k in range(len(made)):
        row, item = {name: int(made[name][k]) for name in items.COLUMNS}, made.read(k)
        number, image, ahead, T = [row["number"]], row["image"] > 0, row["ahead"], 4 * row["t"] - 3
        (clip,) = acting.world.clips(number, image, row["later"], T + 4 * ahead)
        assert acting.world.sizes(number, image)[0].tolist() == [T, *clip.pixels.shape[2:]]
        video, lasts = to_float([clip.pixels]), ahead > 0
        assert near(item["whole"], acting.vae.encode(video)[0])  # a window's past: a longer clip's
        assert torch.equal(item["latent"], item["whole"][:, ahead:])
        actions = np.concatenate([[0, 0, 0], clip.actions]).reshape(-1, 4)
        assert np.array_equal(item["actions"], actions[ahead:])
        if row["given"]:
            mask = item["given"][3:]  # [ft, t, h, w]
            known = mask[:, :, 0, 0].T.flatten()[3:] > 0  # [T]
            assert 0 < known.sum() < T and (mask == mask[:, :, :1, :1]).all()
            video[:, :, ~known] = -1  # what is to be made is not in what is shown
            assert near(item["given"][:3], acting.vae.encode(video)[0] * mask.amax(0))
            assert made.held(k).tolist() == [bool(known[0]), *known[1:].view(-1, 4).all(1).tolist()]
            lasts = row["later"] > 0 or bool(known[-1])
        assert row["lasts"] == lasts
        kinds[image, row["given"], ahead > 0, row["later"] > 0] += 1
    assert kinds[True, 0, False, False] == kinds[False, 0, False, False] == 40
    assert len(kinds) == 5 and min(kinds.values()) > 1


def test_a_draw_is_a_function_of_seed_and_step_and_holds_clips_back(acting):
    count, made = Counter(), acting.items
    held = acting.world.held_back(made["number"])

    def drawn(step: int, **more) -> str:  # by another process
        return str(batches.draw_step(replace(acting.source, c=replace(acting.c, **more)), step))

    assert drawn(5) == drawn(5) not in (drawn(6), drawn(5, seed=1))
    for step in range(200):
        clips, plan = batches.draw_step(acting.source, step)
        assert sorted(sum(plan, [])) == list(range(len(clips)))
        for clip in clips:
            image, past, known = made["image"][clip.item] > 0, clip.past > 0, clip.level[~clip.free]
            assert not held[clip.item] and (image or step >= 0.3 * acting.c.steps)
            assert (len(known) > 0) <= (past or made["given"][clip.item] > 0)
            assert (known <= acting.world.noise * past).all()  # known frames: 0
            rising = clip.level[clip.free]
            assert (np.diff(rising) >= 0).all()
            kinds = {"images": image, "dropped": clip.text == [NOTHING], "acts": clip.acts,
                     "conditioned": made.conditioned[clip.item],
                     "rising": len(rising) > 1 and rising[0] < rising[-1]}  # fmt: skip
            count.update([*(name for name, is_so in kinds.items() if is_so), "n"])
    share = {name: times / count["n"] for name, times in count.items()}
    assert 0.2 < share["images"] < 0.4 and 0.05 < share["dropped"] < 0.15
    assert 0.15 < share["rising"] / (1 - share["images"]) < batches.RISING
    other = share["conditioned"] / (1 - share["images"])
    assert abs(other - acting.c.given - acting.c.later) < 0.05
    assert 0.85 < share["acts"] < 0.95
    assert all(held[clip.item] for clip in batches.draw_step(acting.source, batches.HELD_BACK)[0])


def test_actions_of_a_step_are_those_of_its_clips(acting):
    for step in range(4):
        (part,), drawn = batches.parts(acting.source, step), batches.draw_step(acting.source, step)
        actions = [acting.items.read(clip.item)["actions"] for clip in drawn[0] if clip.acts]
        rows = part.packed.actions[part.packed.actions.any(1)]  # others: captions, or dropped
        assert sorted(rows.tolist()) == sorted(torch.cat(actions).tolist()) != []


def test_captions_are_written_once_and_each_item_learns_its_own(acting, acting_run, tmp_path):
    out, heard = copy_of(acting_run, tmp_path / "run", "text.pt"), {}
    c, world, made, said = replace(acting.c, out=str(out)), acting.world, acting.items, acting.said
    path, brief = out / "captions.jsonl", words.keeps_brief(c, made, said)
    with pytest.raises(ValueError, match="lacks .* --stage text writes them"):
        words.captions_of(world, c, made, said)

    def caption(latents, told):
        said = [f"an {len(heard) + k} at top left moving up fast, 0 bounces. 9 frames."
                for k in range(len(told))]  # fmt: skip
        heard.update(zip(said, zip(latents, told, strict=True), strict=True))
        return said

    def write() -> set[str]:
        before = words.read_lines(path).keys()
        words.write_captions(SimpleNamespace(caption=caption), c, made, said)
        return words.read_lines(path).keys() - before

    assert write() == {x.name for k, x in enumerate(said) if not x.caption and not brief[k]}
    assert write() == set() and 0.02 < brief.mean() < 0.25  # a tenth of the clips
    # Two lines are deleted, one is null, one is edited, by an editor that ends without a new line.
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    gone, entries[0]["caption"] = {x["file"] for x in entries[1:4]}, "mine, all mine"
    entries[3]["caption"] = None
    path.write_text("\n".join(map(json.dumps, entries[3:] + entries[:1])))
    assert write() == gone and words.read_lines(path)[entries[0]["file"]] == "mine, all mine"
    whole = path.read_bytes()
    for torn in (b'\n{"file": "cl', b"\n{"):  # a disk was full
        path.write_bytes(whole + torn)
        words.write_captions(SimpleNamespace(caption=caption), c, made, said)
        assert path.read_bytes() == whole + b"\n"
    written, kinds = words.read_lines(path), set()
    for k, text in enumerate(words.captions_of(world, c, made, said)):
        own = said[k].brief if brief[k] else said[k].caption or written[said[k].name]
        assert text == (world.lasting(own) if made["lasts"][k] else own)
        kinds.add((bool(brief[k]), bool(said[k].caption), bool(made["lasts"][k])))
        if own in heard:  # it saw the clip from its own start, beside what came with it
            (clip,) = world.clips([made["number"][k]], bool(made["image"][k]), made["later"][k])
            latent, told = heard[own]
            assert near(latent, acting.vae.encode(to_float([clip.pixels]))[0])
            assert told == asked(clip.brief, clip.pixels.shape[1:])
    assert len(kinds) >= 6
    c = replace(c, captions="written")
    assert words.missing(c, made, said) == []
    assert words.captions_of(world, c, made, said) == [x.brief for x in said]


def test_lessons_are_true_and_are_dealt_out_to_parts_that_add_up(acting):
    world, vae, c = acting.world, acting.vae, replace(acting.c, text_batch=4, text_steps=8)
    halves, tokenizer, kinds = replace(c, accumulate=2), words.make_tokenizer(world), set()
    torch.manual_seed(0)
    model = train.make_text(c, tokenizer.size)
    for step in range(10):  # images, then videos
        lessons, image = words.draw_lessons(world, c, step)
        for text, prompt, (k, later), share in [x for x in lessons if x[2]]:
            (clip,), (first,) = world.told([k], image, later), world.told([k], image)
            others = [world.otherwise(first, (n + 0.5) / 9) for n in range(9)] * (later == 0)
            size = world.sizes([k], image)[0].tolist()
            pairs = [(asked(x.brief, size), x.caption) for x in others]  # of edits
            right = [("", clip.caption), (asked(first.brief, size, later > 0), clip.caption)]
            assert (prompt, text) in right + pairs
            assert k % 3 == 0 and k % 10 != 7  # somebody wrote its caption; not held back
            kinds.add((prompt > "", later > 0, share < 1, text == clip.caption))
        with torch.no_grad():
            whole, *parts = [words.encoded(vae, part) for how in (c, halves)
                             for part in words.read_lessons(world, tokenizer, how, step)]
            total, *shares = (float(model(part)[0]) for part, _ in [whole, *parts])
        assert [tokens for _, tokens in parts] == 2 * [whole[1]] and len(whole[0]) == 3
        assert sum(shares) == pytest.approx(total, rel=1e-5)
    assert len(kinds) == 7


# ======================================================================================= own clips

BEGINS = {  # of each frame, in milliseconds
    "long.mp4": 100 * np.arange(47),
    "sub/uneven.webm": np.cumsum([0] + [20] * 20 + [150] * 10),  # fast, then slow
    "g.gif": np.array([0, 100, 200, 500, 600, 1100]),
}


def numbered(T: int, H: int, W: int) -> np.ndarray:
    """Frames that show their number by their brightness: [T, H, W, 3]."""
    level = 10 + 5 * np.arange(T, dtype=np.uint8)
    return np.broadcast_to(level[:, None, None, None], (T, H, W, 3))


def numbers_in(clip: np.ndarray) -> list[int]:
    """The numbers of the frames of a clip [3, T, H, W]."""
    return np.round((clip.astype(float).mean((0, 2, 3)) - 10) / 5).astype(int).tolist()


def film(path: Path, frames: np.ndarray, begins, codec: str = "libx264") -> None:
    with av.open(str(path), "w") as file:
        video = file.add_stream(codec, rate=30)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        for pixels, begin in zip(frames, begins, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = int(begin), Fraction(1, 1000)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))


@pytest.fixture(scope="module")
def own_files(tmp_path_factory) -> Path:
    """Files as people have them; three of them are broken."""
    root = tmp_path_factory.mktemp("own")
    (root / "sub").mkdir()
    film(root / "long.mp4", numbered(47, 48, 64), BEGINS["long.mp4"])
    film(root / "sub/uneven.webm", numbered(31, 64, 48), BEGINS["sub/uneven.webm"], "libvpx-vp9")
    first, *others = map(Image.fromarray, numbered(6, 40, 30))
    lasts = [100, 100, 300, 100, 500, 200]
    first.save(root / "g.gif", save_all=True, append_images=others, duration=lasts)
    # A phone's camera lies on its side and says so in the header (tkhd): x' = -y, y' = x.
    lying = np.zeros((5, 32, 64, 3), np.uint8)
    lying[:, :, :32] = 255  # white at the left; turned clockwise, that is above
    film(root / "phone.mp4", lying, 100 * np.arange(5))
    raw = bytearray((root / "phone.mp4").read_bytes())
    at = raw.find(b"tkhd") + 44  # nine fixed-point numbers
    raw[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    (root / "phone.mp4").write_bytes(raw)
    Image.fromarray(numbered(3, 300, 200)[2]).save(root / "a.png")
    whole = (root / "long.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "sub" / "words.webm").write_text("not a video")
    (root / "sub" / "empty.gif").touch()
    (root / "long.txt").write_text("frames that\n get brighter \n")
    captions = {"sub/uneven.webm": "fast, then slow", "long.mp4": "not this"}
    lines = [json.dumps({"file": name, "caption": said}) for name, said in captions.items()]
    (root / "captions.jsonl").write_text("\n".join(lines))
    return root


WHOLE = ["a.png", "g.gif", "long.mp4", "phone.mp4", "sub/uneven.webm"]
BROKEN = ["cut.mp4", "sub/empty.gif", "sub/words.webm"]


@pytest.mark.parametrize("fps", [10, 4, 24])
@pytest.mark.parametrize("name", BEGINS)
def test_a_clip_shows_what_is_on_the_screen(own_files, fps, name):
    """At each time, the last frame that has begun; from any place on, as if all had been read."""
    path, found = own_files / name, media.probe(own_files / name)
    times = np.arange(int(found["seconds"] * fps + 1e-3)) / fps
    right = [int((BEGINS[name] <= 1000 * t + 2).sum()) - 1 for t in times]
    clip = media.read(path, times, (24, 40))
    assert numbers_in(clip) == right and right[-1] >= len(BEGINS[name]) - 1 - 30 // fps
    assert np.array_equal(media.read(path, times[-5:], (24, 40), found=found), clip[:, -5:])


def test_only_what_a_player_shows_is_read(own_files, tmp_path):
    whole = media.read(own_files / "long.mp4", np.arange(30, 47) / 10, (24, 32))
    with av.open(str(own_files / "long.mp4")) as file, av.open(str(tmp_path / "a.mov"), "w") as cut:
        stream = cut.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):  # as `ffmpeg -ss 3 -c copy`: from the key frame before
            if packet.dts is not None:
                late = int(3 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - late, packet.dts - late, stream
                cut.mux(packet)
    cut = media.read(tmp_path / "a.mov", np.arange(17) / 10, (24, 32))
    assert np.array_equal(cut, whole) and 1.5 < media.probe(tmp_path / "a.mov")["seconds"] < 1.8
    film(tmp_path / "b.mkv", numbered(9, 32, 48), 5000 + 100 * np.arange(9))  # starts at 5 seconds
    late = media.read(tmp_path / "b.mkv", np.arange(9) / 10)
    assert numbers_in(late) == list(range(9)) and media.probe(tmp_path / "b.mkv")["start"] == 5


def encoded(path: Path, films: dict[str, tuple[str, list[int]]], **tags) -> None:
    """Streams of a file: {codec: (pixel format, gray of each frame)}."""
    with av.open(str(path), "w") as file:
        streams = {file.add_stream(codec, rate=10): films[codec] for codec in films}
        for stream, (form, _) in streams.items():
            stream.height, stream.width, stream.pix_fmt = 32, 48, form
            for name, tag in tags.items():
                setattr(stream.codec_context, name, tag)
        for stream, (_, levels) in streams.items():
            for level in levels:
                pixels = np.full((32, 48, 3), level, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode(None))


def test_files_as_phones_and_browsers_make_them(tmp_path):
    path = tmp_path / "a.mp4"
    encoded(path, {"mjpeg": ("yuvj420p", [250]), "libx264": ("yuv420p", [100] * 3)})  # has a cover
    assert media.probe(path)["frames"] == 3 and abs(media.read(path).mean() - 100) < 3
    for transfer, white in ((media.PQ, 0.58), (media.HLG, 0.75)):  # a white page is bright, not dim
        page = media.tone_mapped(np.full((1, 1, 3), white), transfer)
        assert 235 < page.min() and page.max() < 245
    encoded(path, {"libx264": ("yuv420p", [189])}, color_trc=media.HLG, colorspace=9)
    assert media.read(path).min() > 230
    wide = av.VideoFrame(1280, 544, "yuv420p")  # a film's shape, untagged: BT.709, by its width
    for plane, level in zip(wide.planes, (81, 90, 240), strict=True):
        plane.update(bytes([level]) * plane.buffer_size)
    untagged = media.to_image(wide, (8, 16), 3)
    wide.colorspace = media.BT709
    assert untagged == media.to_image(wide, (8, 16), 3)
    # 48 megapixels, turned, of which no process ever holds more than it needs
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("L", (8064, 6048), 77).save(tmp_path / "a.jpg", exif=exif)
    found, clip = media.probe(tmp_path / "a.jpg"), media.read(tmp_path / "a.jpg", size=(40, 30))
    assert (found["height"], found["width"]) == (8064, 6048) and (clip == 77).all()
    first, *others = map(Image.fromarray, numbered(4, 16, 16))
    path = tmp_path / "a.gif"  # up to 10 ms is 100 ms; without an end, or with more behind it
    first.save(path, save_all=True, append_images=others, duration=[10, 20, 0, 300])
    assert media.probe(path)["seconds"] == pytest.approx(0.1 + 0.02 + 0.1 + 0.3)
    for raw in (path.read_bytes()[:-1], path.read_bytes() + b"more" * 9):
        path.write_bytes(raw)
        assert media.probe(path)["frames"] == 4
    write_clip(path, RAMP, fps=30)  # 33.3 ms each, which adds up
    assert media.probe(path)["seconds"] == pytest.approx(0.3)
    path.rename(tmp_path / "b.mp4")  # a kind is told by what is in it
    assert media.probe(tmp_path / "b.mp4")["kind"] == "picture"


def test_a_folder_is_looked_at_once(own_files, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(own_files, tmp_path / "own", ignore=lambda *_: [folder.INDEX])
    looked, config = [], WorldConfig(str(root))
    monkeypatch.setattr(folder, "probe", lambda x: looked.append(x.name) or media.probe(x))
    world = folder.Folder(config)
    said = capsys.readouterr().err
    assert len(looked) == 8 and [said.count(name) for name in BROKEN] == [1, 1, 1]
    again, i = folder.Folder(config), np.arange(len(world))
    assert len(looked) == 8 and again.stamp() == world.stamp() and sorted(again.broken) == BROKEN
    said = {clip.name: clip.caption for clip in world.told(i)}
    assert sorted(said) == WHOLE and said.pop("long.mp4") == "frames that get brighter"
    assert said.pop("sub/uneven.webm") == "fast, then slow" and not any(said.values())
    sizes = dict(zip([clip.name for clip in world.told(i)], world.sizes(i).tolist(), strict=True))
    assert [sizes[x] for x in WHOLE] == [
        [1, 40, 24], [13, 32, 24], [17, 24, 32], [5, 48, 24], [17, 32, 24]]  # fmt: skip
    clips = {clip.name: clip.pixels for clip in world.clips(i)}
    above, below = np.split(clips["phone.mp4"], 2, axis=2)
    assert above[:, :, :20].mean() > 240 and below[:, :, 4:].mean() < 15  # upright
    shown = [numbers_in(x.pixels) for x in world.clips(i) if x.name == "long.mp4"]
    first = shown[0][0]  # two windows side by side
    assert sum(shown, []) == list(range(first, first + 34)) and len(world) == 6
    (root / "long.mp4").write_bytes(b"gone")  # a file that breaks later leaves its place empty
    assert [x is None for x in world.clips(i)] == [x.name == "long.mp4" for x in world.told(i)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_world", lambda config: world)
        patch.setattr(signal, "signal", lambda *_: None)
        for stage in ("vae", "items"):
            flags = ["--stage", stage, "--data", str(root), "--out", str(tmp_path / "run")]
            train.main(train.parse([*SMALL, *flags]))
    made = items.Items(tmp_path / "run" / "items", 3, 4)["number"]
    assert {x.name for x in world.told(made)} == {*WHOLE} - {"long.mp4"}
    Image.new("L", (10, 4000)).save(root / "a.png")  # another one
    more = folder.Folder(config)
    assert "too thin" in more.broken["a.png"] and folder.fitted(32, 48, 10**5, 16) == (32, 48)
    assert sorted(looked[8:]) == ["a.png", "long.mp4"] and more.stamp() != world.stamp()


def test_captions_in_every_way_that_people_write_them(tmp_path, capsys):
    root, e = tmp_path / "cafe\u0301", "\u00e9"  # an accent of its own, and as a part of its letter
    (root / "sub").mkdir(parents=True)
    said = {"bom": b"\xef\xbb\xbfa", "wide": "a".encode("utf-16"), "bare": "a".encode("utf-16-le")}
    for name in (*said, "e\u0301", "back", "abs", "null", "typo"):
        Image.new("L", (40, 40)).save(root / "sub" / f"{name}.png")
        if name in said:
            (root / "sub" / f"{name}.TXT").write_bytes(said[name])
    (root / "sub" / f"{e}.txt").write_text("a")
    lines = {"sub\\back.png": "a\u2028", f"{root}/sub/abs.png": "a", "tpo": "a"}
    lines["sub/null.png"] = None
    lines = [json.dumps({"file": x, "caption": y}, ensure_ascii=False) for x, y in lines.items()]
    path = root / "captions.jsonl"
    path.write_text("\n".join([*lines, lines[0]]), "utf-8")
    (root / "sub" / "bom.png.txt").write_text("for nothing")
    world = folder.Folder(WorldConfig(str(root)))
    assert {*world.captions} == {f"sub/{x}.png" for x in (*said, "e\u0301", "back", "abs")}
    assert {*world.captions.values()} == {"a"}
    left = "2 lines of captions.jsonl, as tpo, sub/back.png; 1 .txt, as sub/bom.png.txt"
    assert left in capsys.readouterr().err
    for wrong in ('["a", "b"]', "5"):
        path.write_text(f'{{"file": "sub/abs.png", "caption": {wrong}}}')
        with pytest.raises(ValueError, match="captions.jsonl, line 1: each line is like"):
            folder.Folder(WorldConfig(str(root)))
    path.write_bytes("caf\u00e9".encode("cp1252"))
    with pytest.raises(ValueError, match="captions.jsonl: neither UTF-8 nor UTF-16"):
        folder.Folder(WorldConfig(str(root)))


def test_a_folder_that_changes(own_files, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(own_files, tmp_path / "own", ignore=lambda *_: [folder.INDEX])
    run = root / "out" / "mine"  # a run in it, whose samples are no data
    (run / "samples").mkdir(parents=True)
    (run / "config.json").touch()
    shutil.copy(root / "g.gif", run / "gallery.gif")
    (root / "sub" / "again").symlink_to(root)
    config = WorldConfig(str(root))
    assert [x["file"] for x in folder.Folder(config).files] == WHOLE
    capsys.readouterr()
    when = (root / "cut.mp4").stat().st_mtime_ns
    shutil.copy(root / "long.mp4", root / "cut.mp4")  # whole now
    os.truncate(root / "cut.mp4", (root / "long.mp4").stat().st_size)
    os.utime(root / "cut.mp4", ns=(when, when))
    for name in "xyz":
        shutil.copy(root / "a.png", root / f"{name}.png")
    (root / "a.png").unlink()
    world = folder.Folder(config)
    assert f"{root}: 3 new, 1 changed, 1 gone" in capsys.readouterr().err
    assert {x["file"] for x in world.files} == {*WHOLE[1:], "cut.mp4", "x.png", "y.png", "z.png"}
    entries, looked = (root / folder.INDEX).read_text().splitlines(), []

    def probe(path):
        looked.append(path.name)
        if len(looked) == 3:
            raise KeyboardInterrupt
        return media.probe(path)

    monkeypatch.setattr(folder, "probe", probe)  # what was done before Ctrl-C is kept
    old = [json.dumps(json.loads(x) | {"stamp": [1]}) for x in entries]  # of an older version
    (root / folder.INDEX).write_text("\n".join(old))
    with pytest.raises(KeyboardInterrupt):
        folder.Folder(config)
    assert len(folder.Folder(config).files) == 8 and len(looked) == 3 + len(entries) - 2


def test_the_contact_sheet_says_what_is_in_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip = np.repeat(np.uint8([20, 200]), 8)[:, None, None, None].repeat(3, 3)
    film(tmp_path / "cut.mp4", np.tile(clip, (1, 64, 96, 1)), 80 * np.arange(16))
    (tmp_path / "cut.txt").write_text("two scenes")
    shown, real = [], data.sheet
    monkeypatch.setattr(folder, "sheet", lambda *x, **y: shown.append((x, y)) or real(*x, **y))
    monkeypatch.setattr("sys.argv", ["folder.py", ".", "--pixels", "1600", "--fps", "12.5"])
    for _ in range(2):  # its own picture is no clip
        folder.main()
        assert "1 videos of 1 seconds, 0 images" in capsys.readouterr().out
    (clips, titles), marks = shown[-1][0], shown[-1][1]["marks"][0]
    found = re.fullmatch(r"cut.mp4 \(13 x 32 x 48, cut at frame (\d+)\): two scenes", titles[0])
    assert np.array_equal(marks, clips[0].mean((0, 2, 3)) > 100) and marks.argmax() == int(found[1])


def test_clips_are_decoded_once(own_files, tmp_path, monkeypatch):
    world, looked = folder.Folder(WorldConfig(str(own_files))), []
    i, real = np.arange(len(world)), folder.read
    asked = [(i,), (i, True), (i[[2, 0, 2]],), (i, False, 1), (i[:1], False, 0, 1)]
    asked += [(i[2:3], False, 0, 20)]
    right = [world.clips(*how) for how in asked]
    monkeypatch.setattr(folder, "read", lambda *x: looked.append(x) or real(*x))
    monkeypatch.setattr(decoded, "STOP", [2])
    with pytest.raises(SystemExit, match="the same command continues"):
        decoded.decode_once(world, tmp_path / "cache", 0)
    monkeypatch.setattr(decoded, "STOP", [])
    for _ in range(2):  # again, all is there
        world = folder.Folder(WorldConfig(str(own_files)))
        decoded.decode_once(world, tmp_path / "cache", 0)
        assert len(looked) == len(world.files)  # a video in one pass
    assert all(same(x, world.clips(*how)) for x, how in zip(right, asked, strict=True))
    assert len(looked) == 2 * len(world.files) + 1  # from later on, and longer: decoded anew


def test_what_a_model_made_is_never_learned_from(tmp_path):
    for suffix in media.SUFFIXES:
        write_clip(tmp_path / f"real{suffix}", RAMP)
        with media.Writer(tmp_path / f"made{suffix}") as file:
            file.write(RAMP)
    found = {x["file"] for x in folder.Folder(WorldConfig(str(tmp_path))).files}
    assert found == {f"real{x}" for x in media.SUFFIXES if x != ".npy"}


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_data_set_grows_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    Path("own").mkdir()
    for k in range(3):
        Image.new("L", (32, 32), 80 * k).save(f"own/{k}.png")
        Path(f"own/{k}.txt").write_text("gray " * 200 * (k + 1))
    flags = [*SMALL, "--data", "own", "--fps", "29.97", "--keep", "0", "--images", "1"]
    train.main(train.parse(flags))
    vae, words = Path("out/own/vae.pt").read_bytes(), torch.load("out/own/dit.pt")["words"]
    assert "3 captions are too long, as that of 0.png: at most 256" in capsys.readouterr().out
    Image.new("L", (64, 24)).save("own/wide.png")  # of another shape, with other words
    Path("own/0.png").unlink()
    for k in (1, 2):
        Path(f"own/{k}.txt").write_text("dim and bright")
    train.main(train.parse([*flags, "--steps", "8"]))
    said, made = capsys.readouterr(), items.Items(Path("out/own/items"), 3, 4)
    assert "own: 1 new, 0 changed, 1 gone" in said.err and len(made) == 3
    assert "2 of 3 files have captions: 20 with" in said.out and "too long" not in said.out
    dit = torch.load("out/own/dit.pt")
    assert dit["step"] == 8 and dit["words"] == words and dit["world"]["fps"] == 29.97
    assert Path("out/own/vae.pt").read_bytes() == vae
    Path("moved").symlink_to("own")  # the same files elsewhere: everything is there
    train.main(train.parse([*flags, "--steps", "8", "--data", "moved", "--out", "out/own"]))
    with processes.alone_in(Path("out/own")):
        other = [sys.executable, CODE / "train.py", *flags]
        done = subprocess.run(other, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith(
        "train.py: another training writes to out/own: name another --out\n")  # fmt: skip
    monkeypatch.setattr(folder, "find_files", interrupt)
    with pytest.raises(SystemExit, match="stopped; the same command continues"):
        train.command(train.parse(flags))


@pytest.mark.parametrize("n, have, briefs, pays", [
    (40, 20, 0, 1), (40, 19, 0, 0), (40, 21, 0, 0), (900, 89, 0, 0), (900, 90, 0, 1), (9, 9, 1, 1)])
def test_a_captioner_learns_where_it_pays(n, have, briefs, pays):
    told = [Clip(str(k), "a" * (k < have)) for k in range(n) for _ in range(2)]  # two windows each
    world = type("", (), {"briefs": briefs, "told": lambda *_: told, "__len__": lambda _: 2 * n})()
    assert words.pays(world) == pays


def test_train_on_own_clips_and_sample_as_a_user_does(own_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    taught, real = [], words.captions_of
    monkeypatch.setattr(words, "captions_of", lambda *x: taught.extend(real(*x)) or real(*x))
    flags = [*SMALL, "--data", str(own_files), "--out", "own", "--fps", "8", "--workers", "1"]
    flags += ["--captions", "recaptioned"]  # of so few
    train.command(train.parse(flags))
    said, path = capsys.readouterr().err, Path("own/captions.jsonl")
    lacking = {"a.png", "g.gif", "phone.mp4"}
    assert all(f"not used: {own_files / name}" in said for name in BROKEN)
    assert sample.command("--run own --prompt fast --steps 2 --out made.mp4".split()) == 0
    made, run = media.probe("made.mp4"), prompting.load_run("own", "cpu")
    # A photo lies on its side and is much larger; the film is read at the run's frame rate.
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (640, 480), "red").save("turned.jpg", exif=exif)
    for line, says, of in (
            ("--image turned.jpg", "1 x 640 x 480, scaled to 32 x 24", (17, 32, 24)),
            (f"--extend {own_files}/long.mp4 --frames 2",
             "37 x 48 x 64 at 8 frames a second, scaled to 24 x 32", (39, 24, 32))):  # fmt: skip
        capsys.readouterr()
        line = f"--run own --prompt fast --steps 1 --out b.npy {line}"
        assert sample.command(line.split()) == 0 and says in capsys.readouterr().out
        assert np.load("b.npy").shape[:3] == of
    size = made["frames"], made["height"], made["width"], made["seconds"]
    assert size == (17, *run.world["shapes"][0], 17 / 8) and not run.world["briefs"]
    # The captioner wrote what people did not. One of these is edited, and the others are deleted.
    assert len(path.read_text().splitlines()) == 3 and words.read_lines(path).keys() == lacking
    path.write_text('{"file": "g.gif", "caption": "mine"}')
    Path("own/dit.pt").unlink()
    taught.clear()
    for stage in ("text", "dit"):
        train.main(train.parse([*flags, "--stage", stage]))
    written = words.read_lines(path)
    assert written.keys() == lacking and written["g.gif"] == "mine"
    assert set(taught) == {"frames that get brighter", "fast, then slow", *written.values()}


# ----------------------------------------------------------------------------------- media files

RAMP = np.linspace(0, 255, 8 * 9 * 10).reshape(1, 9, 8, 10).round().astype(np.uint8)


@pytest.mark.parametrize("suffix", media.SUFFIXES)
@pytest.mark.parametrize("C, fps", [(1, 10), (3, 24), (1, 7)])
def test_what_was_written_comes_back(tmp_path, suffix, C, fps):
    clip, path = np.repeat(RAMP, C, axis=0), tmp_path / f"clip{suffix}"
    clip[:, 3:6] = clip[:, 3:4]  # still frames are frames
    clip = clip[:, :1] if suffix == ".png" else clip
    write_clip(path, clip, fps)
    back = media.read_clip(path, C, fps=fps)[0]
    assert back.shape == clip.shape and os.listdir(tmp_path) == [path.name]
    error = np.abs(back.astype(int) - clip)
    assert error.max() == 0 if suffix not in (".mp4", ".webm") else error.mean() < 4


def test_fitting(tmp_path):
    picture, path = np.arange(13 * 21, dtype=np.uint8).reshape(1, 1, 13, 21), tmp_path / "a.png"
    write_clip(path, picture)
    assert np.array_equal(media.read_clip(path, 1)[0], picture)
    for fit, how in ("crop", " and cropped"), ("pad", " and padded"), ("", ""):
        big, done = media.read_clip(path, 3, (32, 32), fit)
        assert big.shape == (3, 1, 32, 32) and f"scaled{how} to 32 x 32" in done
        assert big.any((0, 1, 3)).sum() == {"pad": 20}.get(fit, 32)  # rows that are not black
    for color, gray in (((255, 0, 0, 0), 0), ((9, 9, 9), 9), (65535, 255)):  # clear, gray, 16 bits
        deep = np.uint16 if color == 65535 else np.uint8
        Image.fromarray(np.full((8, 8, *np.shape(color)), color, deep)).save(path)
        assert (media.read_clip(path, 1)[0] == gray).all()


def test_a_bad_file_is_one_line(tmp_path):
    for name in ("cut.gif", "cut.webp"):
        write_clip(tmp_path / name, RAMP)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    for name in ("words.gif", "words.mp4", "words.npy"):
        (tmp_path / name).write_text("hello\n" * 99)
    (tmp_path / "empty.gif").touch()
    (tmp_path / "folder.gif").mkdir()
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    np.save(tmp_path / "float.npy", np.zeros((3, 32, 32, 1)))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}]), allow_pickle=True)
    for path in [*tmp_path.iterdir(), tmp_path / "missing.gif"]:
        with pytest.raises((ValueError, FileNotFoundError)) as stopped:
            media.read_clip(path, 1)
        assert str(stopped.value).startswith(str(path)) and "\n" not in str(stopped.value)


@pytest.mark.parametrize("suffix", media.SUFFIXES)
def test_an_interrupted_writer_leaves_a_playable_file_and_an_error_none(tmp_path, suffix):
    path, frames = tmp_path / f"clip{suffix}", 1 if suffix == ".png" else 5
    for error, left in ((ValueError, []), (KeyboardInterrupt, [path.name])):
        with pytest.raises(error), media.Writer(path) as file:
            file.write(RAMP[:, :frames])
            raise error
        assert os.listdir(tmp_path) == left
    assert media.read_clip(path, 1)[0].shape == (1, frames, 8, 10)


# ================================================================= measuring: measure/, evaluate.py


def real_clips(two_digits: float, T: int, H: int, W: int, n: int) -> list[data.Clip]:
    shape = {"durations": (T,), "shapes": ((H, W),), "two_digits": two_digits}
    return data.Digits(data.WorldConfig(held_out=True, **shape)).clips(np.arange(n))


def measured_run() -> prompting.Run:
    world = data.Digits(data.WorldConfig())
    vae = train.make_vae(train.Config(vae_width=16), world)
    return prompting.Run(vae, None, None, world.about(), {"patch": 2})  # others make the clips


def test_held_out_digits_are_known_and_real_clips_are_read():
    images, labels = data.load_digits(held_out=True)
    sprites, network = data.make_sprites(images, 14)[None], reader.load_classifier(14)
    assert np.mean(reader.name_one(sprites, range(500), network, 14) == labels) >= 0.97
    assert reader.name_one(sprites // 20, [0], network, 14) == [-1]
    for count, *size in ((1, 5, 24, 24), (1, 17, 24, 40), (2, 9, 32, 48)):
        clips, score = real_clips(count - 1, *size, 40), ("digit", "both")[count - 1]
        seen = [reader.read(clip.pixels, count, network, 14) for clip in clips]
        asked = [clip.facts["digits"] for clip in clips]
        right = prompts.average(list(map(prompts.score, seen, asked)))[score]
        wrong = prompts.average(list(map(prompts.score, seen, asked[1:] + asked[:1])))[score]
        assert right >= 0.9 and wrong <= 0.25  # other clips' facts are not seen


def test_a_heading_is_where_a_track_starts_and_digits_keep_theirs_in_any_order():
    for way, *steps in (
        ("left", (0, -1), (0, -2), (0, -3), (0, -4), (0, 9)),  # not what comes later
        ("right", (0, 2), (0, 4), (0, 2), (0, 0)),  # turns back early
        ("up", (-1, 0.4), (-2, 0.8), (-3, 1.2)), ("down", (2, 0)), ("still", (0.2, 0.3)), ("still",)
    ):  # fmt: skip
        assert reader.heading(np.array([(0, 0), *steps], float) + 7) == way
    asked = [{"digit": 3, "direction": "up"}, {"digit": 8, "direction": "right"}]
    for digits, ways, right in (((8, 3), "right up", (1, 1, 1)), ((8, 3), "up right", (1, 1, 0)),
                                ((3, 3), "up right", (0, 1, 0))):  # fmt: skip
        score = prompts.score({"digits": digits, "directions": ways.split()}, asked)
        assert score == dict(zip(("digits", "directions", "both"), right, strict=True))


def test_sharpness_falls_under_blur_and_not_under_noise():
    clips, box = [x.pixels for x in real_clips(0.0, 9, 32, 32, 12)], torch.ones(1, 1, 1, 3, 3) / 9
    blurred = [torch.conv3d(torch.from_numpy(x).float()[None], box)[0].numpy() for x in clips]
    noisy = [(x + np.random.default_rng(0).normal(0, 10, x.shape)).clip(0, 255) for x in clips]
    blurred, noisy = (reader.sharpness(x) / reader.sharpness(clips) for x in (blurred, noisy))
    assert blurred < 0.8 and 0.95 < noisy < 1.15  # nor does noise pass for detail


def test_prompts_are_balanced_and_tell_a_perfect_model_from_a_deaf_one(monkeypatch):
    run = measured_run()
    chosen = prompts.real_clips(run.world, 80, 8)
    kinds = [x for one in chosen for x in one.prompts if "and" not in x]
    assert len(set(kinds)) == 40 and {kinds.count(x) for x in kinds} == {2}
    sizes, shapes = {one.clips[0].shape[1:] for one in chosen}, run.world["shapes"]
    assert sizes == {(17, *shape) for shape in shapes} | {(9, *shapes[0])}
    stock = {(clip.shape, prompt): clip for one in chosen for clip, prompt in one.pairs}
    for deaf in (0, 1):  # a deaf model shows what another prompt says
        monkeypatch.setattr(prompting, "finished", lambda run, asked, *_, deaf=deaf: [
            stock[x.clip.shape, x.prompt] for x in asked[deaf:] + asked[:deaf]])  # fmt: skip
        figures, page = prompts.measure(run, 80, 8, {})
        real, made = figures["real"], figures["generated"]
        assert real["digit"] >= 0.95 and real["direction"] == 1 and real["both"] >= 0.8
        assert made["digit"] < 0.3 and made["both"] < 0.2 if deaf else made == real
    assert figures["VAE"]["digit"] < 0.5 and page.width > 500  # it is not trained


def test_captions_are_read_back_as_their_facts_and_impossible_ones_are_impossible():
    world, i = data.Digits(data.WorldConfig()), np.arange(150)
    for clip in world.told(i) + world.told(i, image=True):
        fact, said = clip.facts, facts_said.read_caption(data.descriptive_caption(clip.facts))
        assert said["frames"] == fact["frames"] and len(said["digits"]) == len(fact["digits"])
        hidden = ("direction", "speed", "bounces")[: 3 * (fact["frames"] == 1)]
        for d in fact["digits"]:
            want = d | {"speed": "fast" if d["speed"] > 1 else "slowly"} | dict.fromkeys(hidden)
            assert {name: want[name] for name in facts_said.FACTS} in said["digits"]
        assert facts_said.is_kept(facts_said.read_prompt(clip.brief), said)
        assert facts_said.is_possible(said, tuple(fact.values())[:3], world.config)  # (T, H, W)
    for said in ("", "a 7.", "a 7 moving left", "17 frames.", "a 7 at top left. 9 frames. x"):
        assert facts_said.read_caption(said) is None
    for said in (
        "middle right moving right fast, 1 bounce. 9 frames.",  # the wall is too near
        "middle right moving left slowly, 1 bounce. 9 frames.",  # too slow to get there
        "middle right moving left fast, 1 bounce. 17 frames.",  # a clip of 9 was asked for
        "middle right moving up fast, 0 bounces. 9 frames.",  # it would reach the wall
        "middle right moving somewhere slowly, 0 bounces. 9 frames.",
    ):
        said = facts_said.read_caption(f"a 7 at {said}")
        assert not facts_said.is_possible(said, (9, 32, 32), world.config)


def test_wrong_captions_lose_what_is_wrong_and_no_more():
    three = "a 3 at top right moving up fast, 2 bounces. 9 frames."
    right = f"a 7 at top left moving left slowly, 1 bounce. {three}"
    want, names = facts_said.read_caption(right), facts_said.FACTS
    for said, lost in (
        (right, {}), (right.replace("9 f", "17 f"), {"length": 0}),
        (right.replace("a 3", "a 5"), {"digit": 0.5}),
        (right.replace("g left", "g down").replace("up", "down"), {"direction": 0}),
        (three, dict.fromkeys(names, 0.5) | {"number": 0}),
        ("a cat.", dict.fromkeys((*names, "number", "length"), 0)),
    ):  # fmt: skip
        score = facts_said.score(facts_said.read_caption(said), want)
        assert {name: value for name, value in score.items() if value < 1} == lost
    for said in ("3 up and seven", "7 up and 3 left", "a 3", "a 3 and a 7 and a 7", "a 3 and a 4"):
        assert facts_said.is_kept(facts_said.read_prompt(said), want) == (said[-1] == "n")


def freeze(run, asked, seeds, how=None, expanded=False) -> list[np.ndarray]:
    """A model that repeats the last known frame, and jumps to what is known next."""
    made = []
    for x in asked:
        at, t, clip = np.flatnonzero(x.known), np.arange(len(x.known)), x.clip
        last = at[(np.searchsorted(at, t, "right") - 1).clip(0)] if len(at) else t
        if x.strength == 1 and not len(at):  # of a prompt: any clip
            clip = real_clips(0.0, *clip.shape[1:], 1)[0].pixels
        made.append(clip[:, last[: x.frames]])
    return made


def test_the_truth_is_right_in_every_task_and_baselines_are_wrong_as_they_should(monkeypatch):
    monkeypatch.setattr(prompting, "finished", freeze)
    monkeypatch.setattr(tasks, "MINUTE", 200)
    figures = tasks.measure(measured_run(), 24, 2, {})[0]
    for name, x in (pair for kinds in figures.values() for pair in kinds["real"].items()):
        if "tenths" not in name:
            assert x == 1 if "seam" in name else x < 1e-3 if "pixels" in name else x > 0.89, name
    still, frozen = ({k: x[kind] for k, x in figures.items()} for kind in ("baseline", "made"))
    for name, x in (("image to video", "direction"), ("a minute", "speed, last tenth / first")):
        assert still[name][x] == 0
    world = tasks.held_out(measured_run().world, two_digits=0.0)
    for kind, seam, last, way in (("forward", 9, 8, 1), ("backward", 16, 16, -1)):
        fits, row = lambda path, seam=seam: tasks.steady(path, seam), still[f"extend {kind}"]
        true = tasks.choose(world, (25, 32, 32), range(24), fits).path
        gone = np.abs(true - true[:, [last]]).sum(2)  # [n, T]: it stays where it was seen last
        for k, off in ((k, np.median(gone[:, last + way * k])) for k in tasks.OFF):
            assert row[f"pixels off after {k} frames"] == pytest.approx(off, abs=1e-3)
        assert row["seam"] == np.mean(gone[:, last + way] == 1) and row == frozen[f"extend {kind}"]
    assert min(still[name]["pixels off half way"] for name in ("loop", "connect")) > 2  # blended
    assert frozen["loop"]["seam to the new"] < 0.2 and frozen["loop"]["seam to the start"] < 0.2
    assert frozen["connect"]["digit before"] > 0.9 and frozen["connect"]["changes"] < 0.1
    for strength in tasks.STRENGTHS:  # unchanged, it is the old digit on the old path
        assert still[f"edit at {strength}"] == {"digit": pytest.approx(0, abs=0.1), "path kept": 1}


def test_work_and_memory_are_those_of_pytorch():
    c = train.parse("--width 64 --depth 2 --heads 2".split())
    dit = train.make_dit(c, 9, data.World(data.WorldConfig()))
    packed = patches.pack([torch.randn(10, 5, 8, 8)] * 2, [[1, 2, 3]] * 2, 2, 83, [[0], [1]])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dit(packed.tokens, torch.full(packed.frame_clip.shape, 0.5), packed).sum().backward()
    linear, attention = cost.step_flops(dit, packed.lengths, packed.words, len(packed.frame_clip))
    assert attention == counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert linear + attention == pytest.approx(counter.get_total_flops(), rel=0.05)
    kept, states = cost.memory(dit, 1), []
    for optimizer in loop.make_optimizers(dit, 1e-3):
        optimizer.step()
        states += [x for of in optimizer.state.values() for x in of.values() if x.ndim]
    assert kept["optimizer"] == sum(x.nbytes for x in states)
    assert kept["weights"] == sum(weight.nbytes for weight in dit.parameters())
    said = train.dry_run(train.parse("--preset base --items 500 --gpus 4 --shard".split()))
    *parts, total = (float(x) for x in re.findall(r"([\d.]+) GB", said))
    assert len(parts) == 7 and total == pytest.approx(sum(parts), abs=0.04)


def test_plots_and_sheets_show_what_they_are_given():
    page = plotting.plot({"a": {"b": ([1, 10, 100], [0, 1, 2])}}, log_x=True)
    assert page.getpixel((390, 154)) == plotting.COLORS[0]  # half way in both directions
    clips = np.random.default_rng(0).integers(0, 256, (3, 3, 2, 8, 8), np.uint8)
    page = np.asarray(data.sheet(clips, "abc", columns=2, scale=2, marks=[[True, False]] * 3))
    assert (page[20:36, 26:42] == data.enlarge(clips[0], 2)[1]).all()
    assert [(page[37:39, x] == (255, 190, 80)).all() for x in (8, 26)] == [True, False]
    wide = np.asarray(data.sheet(clips[:1], ["W" * 60]))  # a title of wide letters fits
    said, font = data.lettering("a dog \ufdd0")
    assert said == "a dog (and letters that no font here has)" and data.lettering("a")[0] == "a"
    assert wide[:16, -8:].max() == 32 and wide.shape[1] > font.getlength("W" * 60)


def played_by_a_page(out: Path, world) -> None:
    """A server is asked as the page asks it: two sessions, nonsense, and another site."""
    server = play.Server(0, [str(out)])
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str, body, **headers) -> tuple[int, bytes]:
        page = HTTPConnection(*server.server_address)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        page.request("POST" if path in ("/new", "/step", "/end") else "GET", path, body, headers)
        reply = page.getresponse()
        return reply.status, reply.read()

    def told(path: str, body) -> dict:
        status, said = ask(path, body)
        assert status == 200, said
        return json.loads(said)

    a, b, c = (told("/new", {"number": k}) for k in (1, 1, 999_999))
    assert a["actions"] == list(world.actions) and a["session"] != b["session"]
    frames = [
        [told("/step", {"session": x["session"], "steps": 1}) for _ in range(6)] for x in (a, b)
    ]
    assert frames[0] == frames[1]  # each in its own world, and neither disturbs the other
    H, W = frames[0][0]["model"]["height"], frames[0][0]["model"]["width"]
    assert len(base64.b64decode(frames[0][0]["model"]["rgb"])) == 3 * H * W
    if world.actions:
        acts, many = [], len(world.actions)
        for x, action in ((a, many - 1), (b, many)):
            some = {"session": x["session"], "action": action, "steps": 1}
            acts.append([told("/step", some) for _ in range(3)])
        assert acts[0][-1]["real"] != acts[1][-1]["real"] and acts[0] != acts[1]
        assert told("/step", {"session": a["session"], "resync": True, "steps": 1})["error"] >= 0
    assert ask("/play.gif?session=" + c["session"], b"")[0] == 400  # nothing was played yet
    assert ask("/play.gif?session=" + a["session"], b"")[1][:4] == b"GIF8"
    status, page = ask("/", b"")
    assert status == 200 and str(out).encode() in page and b"://" not in page  # works offline
    ours = {"session": a["session"]}
    for path, body in (
        ("/step", {"session": "none"}), ("/step", ours | {"action": 99}), ("/step", b"["),
        ("/step", ours | {"action": "up"}), ("/step", ours | {"steps": 0}), ("/step", b"[1]"),
        ("/step", ours | {"noise": float("nan")}), ("/step", b" " * 5000),
        ("/new", {"run": "/etc"}), ("/new", {"number": -1}),
    ):  # fmt: skip
        status, said = ask(path, body)
        assert status == 400 and said.count(b"\n") == 1, (body, said)
    for path in ("/../train.py", "/assets/digits.png", "/etc/passwd"):
        assert ask(path, b"")[0] == 404
    assert ask("/", b"", Host="evil.example")[0] == 403
    assert ask("/new", {}, Origin="http://evil.example")[0] == 403
    assert told("/end", ours)["ended"] and ask("/step", ours)[0] == 400
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["wall", "room", "paint", "game"])
def test_a_simulated_world_is_learned_prompted_and_measured(kind, tmp_path, monkeypatch, capsys):
    """By the commands, and too shortly to learn anything."""
    out, clip = tmp_path / kind, tmp_path / "clip.gif"
    few = ["--items", "8", "--out", str(out), "--tokens", "416", "--durations", "9"]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    train.command(train.parse([*SMALL, "--world", kind, *few]))
    about = torch.load(out / "dit.pt", weights_only=True)["world"]
    assert (out / "gallery.gif").exists() and about["config"]["kind"] == kind
    world = open_world(WorldConfig(**about["config"]))
    write_clip(clip, world.clips([7], frames=9)[0].pixels)
    flags = ["--run", str(out), "--steps", "2", "--out", str(tmp_path / "new.npy")]
    if world.actions:
        acts = ["--actions", f"{world.actions[1]}*2 {world.actions[0]}"]
        assert sample.command(["--prompt", "", "--extend", str(clip), *acts, *flags]) == 0
        assert len(np.load(tmp_path / "new.npy")) == 9 + 3
        assert sample.command(["--prompt", "", "--actions", "random", *flags]) == 0
    monkeypatch.setattr(play, "FOREVER", 4)  # then it goes on
    played_by_a_page(out, world)
    for name, value in (("LONG", 8), ("ENDLESS", 16), ("STILL", 16)):
        monkeypatch.setattr(measure_worlds, name, value)
    line = f"worlds --run {out} --clips 3 --steps 1"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *line.split()])
    evaluate.main()
    figures = json.loads((out / "worlds.json").read_text())
    assert (out / "worlds.png").exists() and next(iter(figures)).startswith(kind)
    assert "frozen" in capsys.readouterr().out


def test_the_weights_that_ship_do_what_they_are_asked():
    """All of sampling, end to end: what is asked for is seen in the pixels."""
    run = prompting.load_run(prompting.SHIPPED / "tiny", "cpu")
    network, ways = reader.load_classifier(14), ("left", "right", "up", "down")
    asked = [(digit, ways[digit % 4]) for digit in range(10)]
    some = [prompting.new(run, (9, 32, 32), f"a {digit} moving {way}") for digit, way in asked]
    made = prompting.finished(run, some, list(range(10)), {"steps": 20}, expanded=True)
    seen = [reader.read(clip, 1, network, 14) for clip in made]
    pairs = list(zip(asked, seen, strict=True))
    assert sum(x["digits"] == [digit] * 3 for (digit, _), x in pairs) >= 8
    assert sum(x["directions"] == [way] for (_, way), x in pairs) >= 9
    run = prompting.load_run(prompting.SHIPPED / "game", "cpu")
    world = data.unseen(run.world)
    clips = measure_worlds.games(world, 16, 8)
    figures = measure_worlds.score_game(world, clips, measure_worlds.go_on(run, clips, {}))
    assert figures["paddle"] > 0.97 and figures["first wrong, frames"] >= 8


def test_without_a_run_the_weights_that_ship_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "--prompt x --frames 1 --height 32 --width 32 --steps 2 --out a.png"
    assert sample.command(line.split()) == 0 and Path("a.png").exists()
    assert play.main("--bench --frames 2".split()) == 0
    monkeypatch.setattr("sys.argv", ["evaluate.py", "prompts"])
    with pytest.raises(SystemExit):
        evaluate.main()  # figures are of a run of one's own
    assert "no trained run below out/" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of runs that train.py could have saved: done, half done, and of people's clips."""
    root = tmp_path_factory.mktemp("measured")
    c = train.parse("--width 32 --depth 1 --heads 2 --tokens 160 --rows 2 --vae-width 16 --items 60"
                    " --text-width 64 --shapes 32x32,24x32 --steps 16 --captions written".split())
    world, words = train.make_world(c), Tokenizer.from_captions(["a 7 moving left"], 300)
    networks = {"vae": train.make_vae(c, world), "text": train.make_text(c, words.size),
                "dit": train.make_dit(c, words.size, world)}  # fmt: skip
    for place, step, kind in (("done", 16, "digits"), ("half", 1, "digits"), ("own", 16, "cats"),
                              ("square", 16, "digits")):  # fmt: skip
        (root / place).mkdir()
        about = world.about() | {"config": asdict(world.config) | {"kind": kind}}
        facts = {"config": asdict(c), "world": about, "step": step, "words": words.words}
        facts["config"]["crop"] = "square" if place == "square" else "none"
        for name, x in networks.items():
            saved = facts | {"ema": x.state_dict(), "model": asdict(x.config)}
            torch.save(saved, root / place / f"{name}.pt")
    items.make_items(world, networks["vae"], c, root / "done" / "items")
    return root


def test_what_a_square_cuts_off_is_noticed_and_nothing_else_is():
    world = Digits(WorldConfig(shapes=((24, 40), (40, 24), (32, 48)), two_digits=0.0))
    whole, square = (x.clips(np.arange(60)) for x in (world, data.Square(world)))
    whole, square = ([framing.cut_off(x.pixels, 14) for x in clips] for clips in (whole, square))
    assert max(whole) == 0 and 3 <= max(square) <= 14 and 20 < sum(x > 0 for x in square) < 50


def test_measures_print_and_save_their_figures(measured, monkeypatch, tmp_path, capsys):
    done = torch.load(measured / "done" / "dit.pt")
    monkeypatch.setattr(train, "main", lambda c: torch.save(done, c.folder / "dit.pt"))
    monkeypatch.setattr(prompting, "finished", freeze)
    monkeypatch.setattr(tasks, "MINUTE", 100)
    monkeypatch.setattr(bench, "ROWS", 2)
    run = f"--run {measured}/done"
    for line in (f"prompts {run}/dit.pt --ones 2 --twos 1",
                 f"tasks {run} --clips 2 --minutes 1 --steps 1",
                 f"language {run} --clips 2", f"scaling {run} --clips 2 --out {tmp_path}", "cost",
                 f"framing {run} --against {measured}/square --clips 4", "bench --repeats 1"):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *line.split()])
        evaluate.main()
    said = capsys.readouterr().out
    names = {x.name for root in (measured / "done", tmp_path) for x in root.glob("*")}
    assert names > {f"{x}.{y}" for x in ("prompts", "tasks", "framing", "scaling")
                    for y in ("json", "png")}
    assert names > {"language.json", "scaling_clips.png", "1x", "4x"} and "16x" not in names
    flops = [row["flops"] for row in json.loads((tmp_path / "scaling.json").read_text())]
    assert flops == pytest.approx([flops[0], 4 * flops[0], 16 * flops[0]])
    assert f"| 17 x 32 x 32 | {5 * 4 * 4 + 8} |" in said and said.count("\n| 3b |") == 4
    packed, padded = (int(x) for x in re.findall(r"(\d+)% full", said))
    fuller = float(re.search(r"([\d.]+) times as full", said)[1])
    assert fuller == pytest.approx(packed / padded, abs=0.05) and packed > padded


@pytest.mark.parametrize("line, says", [
    ("", "required: prompts|tasks"), ("dance", "invalid choice: 'dance'"),
    ("prompts --run no/where", "no no/where/dit.pt"), ("prompts --ones 0", "--ones 0: at least 1"),
    ("language --run {}/done --against {}/done", "--run needs --captions recaptioned"),
    ("scaling --run {}/half", "has done 1 of 16"),
    *((f"{name} --run {{}}/own", "run learned from cats: only moving digits can be measured")
      for name in ("prompts", "tasks", "language")),
    ("framing --run {}/done", "--against: an equal run of train.py --crop square"),
    ("framing --run {}/done --against {}/done", "--run needs --crop none, and --against --crop"),
    ("worlds --run {}/own", "run learned from cats: worlds are for wall, room"),
    ("scaling --run {}/own", "run learned from cats: only digits, wall"),
])  # fmt: skip
def test_a_mistake_of_measuring_is_one_line(measured, monkeypatch, capsys, line, says):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *line.replace("{}", str(measured)).split()])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1) and says in err
