"""Reading a clip: a digit classifier and a tracker say what a clip of moving digits shows.

The problem. A sample sheet convinces anybody. A figure needs a reader that is not the eye of the
person who trained the model, and that knows neither the prompt nor the model.

The idea. The facts of this world can be read back from pixels alone:

    clip [C, T, H, W]  ->  ink [T, H, W]  ->  track [T, 2]  ->  windows [S, S]  ->  "a 7, left"

The centre of the ink in each frame gives a track, its first steps the direction. A small
classifier, trained on the training digits only, names what is in a window around it.

Two digits cross, and while they do, no cut through the ink is right: each hides a part of the
other. So the reader finds the frame in which the two are farthest apart, and follows them from
there to both ends of the clip. Each has a stamp, its picture when it was last seen alone; its next
place is where the two stamps, drawn together, come nearest to the frame. This is analysis by
synthesis: to know what you see, draw it and compare.

The reader's own mistakes are measured: it also reads real clips of held-out digits.

Alphabet: a clip is uint8 [C, T, H, W]; ink is [T, H, W] in 0..1; `digit` is the side of a digit's
box in pixels; windows [S, S] are a little wider.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data

BACKGROUND = 0.15  # darker pixels are background: noise and the VAE's haze are not ink
SPECK = 0.02  # less ink than this share of a box is no digit; the faintest real one has twice that


def to_ink(clip: np.ndarray) -> np.ndarray:
    """clip [C, T, H, W] -> ink [T, H, W] in 0..1."""
    gray = clip.astype(np.float32).mean(0) / 255
    return np.clip((gray - BACKGROUND) / (1 - BACKGROUND), 0, 1)


def centre_of(ink: np.ndarray) -> np.ndarray:
    """The centre of mass (row, column) of one frame [H, W]; the middle where there is no ink."""
    total = ink.sum()
    if total < 1:
        return (np.array(ink.shape) - 1) / 2
    return np.array([ink.sum(1 - k) @ np.arange(ink.shape[k]) / total for k in (0, 1)])


def corner_of(centre: np.ndarray, side: int) -> np.ndarray:
    """The top left pixel of a window around a centre; it may lie outside the canvas."""
    return np.round(centre - (side - 1) / 2).astype(int)


def window(ink: np.ndarray, centre: np.ndarray, digit: int) -> np.ndarray:
    """A digit and its margin, cut from one frame [H, W] -> [S, S]; black beyond the canvas."""
    side = digit + 2 * max(2, digit // 7)  # a box's middle is not quite its digit's centre of mass
    top, left = corner_of(centre, side) + side
    return np.pad(ink, side)[top : top + side, left : left + side]


# ----------------------------------------------------------------------------- the digit classifier


def make_network() -> nn.Module:
    def block(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 32, stride=2),  # [N, 32, 10, 10]
        *block(32, 32), *block(32, 64, stride=2),  # [N, 64, 5, 5]
        *block(64, 64), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 25, 10),  # [N, 10]
    ).to(memory_format=torch.channels_last)  # fmt: skip


def augment(x: Tensor) -> Tensor:
    """What a generated digit may look like and still be a fair one: turned, shifted, scaled,
    slanted, fainter, blurred, noisy. x [N, 1, 20, 20] -> the same."""

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(x)))[:, None, None, None]

    bend = torch.eye(2, 3) + 0.2 * torch.empty(len(x), 2, 3).uniform_(-1, 1)  # the first four
    x = F.grid_sample(x, F.affine_grid(bend, list(x.shape), False), align_corners=False)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
    blurred = F.conv2d(F.conv2d(x, kernel, padding=1), kernel, padding=1)
    x = torch.lerp(x, blurred, uniform(-0.3, 1.0))  # below 0 sharpens
    x = x * uniform(0.7, 1.1)
    return (x + torch.randn_like(x) * uniform(0, 0.08)).clamp(0, 1)


def prepare(windows: list[np.ndarray]) -> Tensor:
    """Windows of any size -> [N, 1, 20, 20]: all the detail that an MNIST digit has."""
    x = torch.from_numpy(np.stack(windows)).float()[:, None]
    return F.interpolate(x, (20, 20), mode="bilinear", align_corners=False, antialias=True)


def train_classifier(sprites: np.ndarray, labels: np.ndarray, epochs: int = 12) -> nn.Module:
    """Train on sprites [N, digit, digit] uint8, cut out as if they were the frames of a clip."""
    windows = [window(ink, centre_of(ink), len(ink)) for ink in to_ink(sprites[None])]
    x, y = prepare(windows), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays what it was
        torch.manual_seed(0)  # the same digits always give the same network
        network = make_network()
        batches = [b for _ in range(epochs) for b in torch.randperm(len(x)).split(100)]
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
        for batch in tqdm(batches, desc="digit classifier", leave=False):
            loss = F.cross_entropy(network(augment(x[batch])), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@cache
def load_classifier(digit: int) -> nn.Module:
    """The classifier of digits of this size. It depends on this file and on no run, so the first
    call trains it for all of them."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    path = data.HERE / "out" / f"classifier_{digit}_{version}.pt"
    if not path.exists():
        images, labels = data.load_digits()
        network = train_classifier(data.make_sprites(images, digit), labels)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        torch.save(network.state_dict(), part)
        part.replace(path)
    network = make_network().eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


@torch.no_grad()
def classify(network: nn.Module, windows: list[np.ndarray]) -> np.ndarray:
    """Windows of any size -> the probabilities of the ten digits [N, 10]."""
    return network(prepare(windows)).softmax(1).numpy()


# ---------------------------------------------------------------------------------- reading digits


def heading(track: np.ndarray) -> str:
    """The direction in which a track [T, 2] starts. The farthest of four steps counts: no wall is
    nearer ahead, and a generated digit may turn back earlier."""
    steps = track[:5] - track[0]
    far = steps[np.abs(steps).max(1).argmax()]
    way = max(data.DIRECTIONS, key=lambda way: far @ data.DIRECTIONS[way])
    return way if far @ data.DIRECTIONS[way] >= 1 else "still"


def tracks_of(clips: list[np.ndarray]) -> np.ndarray:
    """Where the digit is in each frame of clips of one digit and one size: [n, T, 2]."""
    return np.stack([[centre_of(frame) for frame in to_ink(clip)] for clip in clips])


def name_one(clip: np.ndarray, looks: list[int], network: nn.Module, digit: int) -> list[int]:
    """Which digit is seen in each of the frames `looks`; -1 where there is no ink."""
    ink = to_ink(clip[:, looks])
    read = classify(network, [window(frame, centre_of(frame), digit) for frame in ink]).argmax(1)
    return np.where(ink.sum((1, 2)) > SPECK * digit**2, read, -1).tolist()


def owner(shape: tuple[int, int], centres: np.ndarray) -> np.ndarray:
    """Which pixels are nearer to the first centre than to the second, in the distance of boxes."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    near = [np.maximum(abs(rows - r), abs(columns - c)) for r, c in centres]
    return near[0] < near[1]


def split(frame: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Cut the ink of one frame [H, W] in two by 2-means (Lloyd 1982), begun at both sides of the
    middle, along the direction in which the ink is spread widest -> the two parts [H, W], their
    centres [2, 2], and how well that went: the variance between the means, which falls where the
    parts are near each other or where one is just a speck."""
    middle, total = centre_of(frame), max(frame.sum(), 1e-6)
    offset = np.indices(frame.shape).reshape(2, -1) - middle[:, None]  # [2, H W]
    spread, direction = np.linalg.eigh(offset * frame.ravel() @ offset.T / total)
    step = direction[:, 1] * np.sqrt(max(spread[1], 1e-6))
    centres = np.stack([middle - step, middle + step])
    for _ in range(5):
        mine = owner(frame.shape, centres)
        parts = [frame * mine, frame * ~mine]
        centres = np.stack([centre_of(part) for part in parts])
    between = parts[0].sum() * parts[1].sum() / total * np.square(centres[0] - centres[1]).sum()
    return parts, centres, between


def draw(stamp: np.ndarray, centre: np.ndarray, moves: np.ndarray, shape: tuple) -> np.ndarray:
    """A stamp on an empty canvas, around the centre after each of the moves [M, 2] -> [M, H, W]."""
    side = len(stamp)
    canvas = np.zeros((len(moves), shape[0] + 2 * side, shape[1] + 2 * side), np.float32)
    corners = np.clip(corner_of(centre, side) + moves, -side, shape) + side
    for frame, (r, c) in zip(canvas, corners, strict=True):
        frame[r : r + side, c : c + side] = stamp
    return canvas[:, side:-side, side:-side]


def follow(
    frames: np.ndarray, parts: list[np.ndarray], centres: np.ndarray, digit: int, fastest: int
) -> Iterator[np.ndarray]:
    """Follow two digits, last seen as parts [H, W] at centres [2, 2], through the frames that come
    next. Yields the centres [2, 2] of each."""
    stamps = [window(part, c, digit) for part, c in zip(parts, centres, strict=True)]
    reach = range(-fastest - 1, fastest + 2)  # generated digits may be a little too fast
    moves = [(r, c) for r in reach for c in reach if r * c == 0 or abs(r * c) == 1]
    moves = np.array(sorted(moves, key=lambda m: abs(m[0]) + abs(m[1])))  # of equals: the least
    velocity = None
    for frame in frames:
        first, second = (draw(stamps[k], centres[k], moves, frame.shape) for k in (0, 1))
        cost = ((np.maximum(first[:, None], second[None]) - frame) ** 2).sum((2, 3))  # [M, M]
        if velocity is not None:  # a digit that is hidden behind the other one goes on as before
            turn = [((moves - v) ** 2).sum(1) for v in velocity]
            cost = cost + 0.01 * frame.sum() * (turn[0][:, None] + turn[1][None]).clip(max=8)
        velocity = moves[list(np.unravel_index(cost.argmin(), cost.shape))]
        centres = np.clip(centres + velocity, 0, np.array(frame.shape) - 1)
        if np.abs(centres[0] - centres[1]).max() >= digit:  # alone: a new picture, the exact place
            mine = owner(frame.shape, centres)
            for k, part in enumerate((frame * mine, frame * ~mine)):
                near = window(part, centres[k], digit)
                centres[k] = corner_of(centres[k], len(near)) + centre_of(near)
                stamps[k] = window(part, centres[k], digit)
        yield centres.copy()


def track_two(ink: np.ndarray, digit: int, fastest: int) -> np.ndarray:
    """Where two digits are in each frame: ink [T, H, W] -> centres [T, 2, 2]."""
    start = int(np.argmax([split(frame)[2] for frame in ink]))
    parts, centres, _ = split(ink[start])
    before = list(follow(ink[:start][::-1], parts, centres, digit, fastest))
    after = list(follow(ink[start + 1 :], parts, centres, digit, fastest))
    return np.stack([*before[::-1], centres, *after])


def pictures(ink: np.ndarray, tracks: np.ndarray, k: int, digit: int) -> list[np.ndarray]:
    """Windows [S, S] of digit k without the other one, from the frames where they are apart.

    On a small canvas there may be none. Then one picture is made of all frames: a digit's ink moves
    with it, so what the windows along its track have in common is the digit alone.
    """
    apart = np.abs(tracks[:, 0] - tracks[:, 1]).max(1) >= digit
    if not apart.any():
        windows = [window(ink[t], tracks[t, k], digit) for t in range(len(ink))]
        return [np.quantile(windows, 0.1, axis=0)]  # not the darkest: generated digits tremble
    alone = {t: ink[t] * owner(ink[t].shape, tracks[t, [k, 1 - k]]) for t in np.flatnonzero(apart)}
    return [window(frame, tracks[t, k], digit) for t, frame in alone.items()]


def read(clip: np.ndarray, count: int, network: nn.Module, digit: int, fastest: int = 2) -> dict:
    """What a clip of one digit or two shows: "digits" and "directions". One is named in the first,
    middle and last frame, each of two by the mean over its pictures."""
    ink, T = to_ink(clip), clip.shape[1]
    if count == 1:
        named = name_one(clip, [0, T // 2, T - 1], network, digit)
        return {"digits": named, "directions": [heading(tracks_of([clip])[0])]}
    tracks, named = track_two(ink, digit, fastest), []
    for k in (0, 1):
        windows = pictures(ink, tracks, k, digit)
        visible = np.mean([w.sum() for w in windows]) > SPECK * digit**2
        named.append(int(classify(network, windows).mean(0).argmax()) if visible else -1)
    return {"digits": named, "directions": [heading(tracks[:, k]) for k in (0, 1)]}


def sharpness(clips: list[np.ndarray]) -> float:
    """How steep the edges are: the mean absolute gradient for each unit of ink. Blur spreads the
    ink and flattens the edges. Only near ink: a noisy background must not pass for edges."""
    edges = total = 0.0
    for clip in clips:
        gray = torch.from_numpy(clip.astype(np.float32)).mean(0) / 255  # [T, H, W]
        near = F.max_pool2d(torch.from_numpy(to_ink(clip)), 3, 1, 1) > 0
        for axis in (1, 2):
            steps = gray.diff(dim=axis).abs()
            edges += (steps * near.narrow(axis, 1, steps.shape[axis])).sum().item()
        total += (gray * near).sum().item()
    return edges / max(total, 1e-6)
