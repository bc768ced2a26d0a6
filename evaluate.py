"""Numbers for what the report only shows: does a clip show what its prompt says?

The problem. A sample sheet convinces anybody. A figure needs a reader that is not the eye of the
person who trained the model, and that is told neither the prompt nor the model.

The idea. The world's facts can be read back from pixels alone. A small classifier, trained on the
training digits only, names the digits. Where the ink is in each frame gives the tracks, and a
track's first steps give the direction. One reader reads three sets of clips of the same prompts:

    real         held-out digits, straight from the world: what the reader itself gets wrong
    VAE          those clips, encoded and decoded: the ceiling of any model in this latent space
    generated    the model's own clips

One digit is tracked by its centre of mass. Two digits cross, and while they do, no cut through
the ink is right. So two are first found in the frame where they are best apart, then followed from
there to both ends of the clip: each keeps a stamp (its picture when last seen alone), and their
next places are those where the two stamps, drawn together, are nearest to the frame.

Alphabet: a clip is [C, T, H, W], uint8 in 0..255 or float in -1..1; ink is [T, H, W] in 0..1.

Run `python evaluate.py prompts --run out/tiny`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import data
import sample

BACKGROUND = 0.15  # darker than this is background: noise and the VAE's haze are no ink
SPECK = 0.02  # less ink than this share of a box is no digit; the faintest real one has twice that
NAMES = {v: k for k, v in data.DIRECTIONS.items()}


# ------------------------------------------------------------------------------- from pixels to ink


def to_ink(clip: np.ndarray) -> np.ndarray:
    """clip [C, T, H, W] -> ink [T, H, W] in 0..1."""
    gray = clip.astype(np.float32).mean(0)
    gray = gray / 255 if clip.dtype == np.uint8 else (gray + 1) / 2
    return np.clip((gray - BACKGROUND) / (1 - BACKGROUND), 0, 1)


def centre_of(ink: np.ndarray) -> np.ndarray:
    """The centre of mass (row, column) of one frame [H, W]; the middle where there is no ink."""
    total = ink.sum()
    if total < 1:
        return (np.array(ink.shape) - 1) / 2
    return np.array([ink.sum(1 - k) @ np.arange(ink.shape[k]) / total for k in (0, 1)])


def margin(digit: int) -> int:
    """Windows are wider than a box, whose middle is not quite its digit's centre of mass."""
    return max(2, digit // 7)


def corner_of(centre: np.ndarray, digit: int) -> np.ndarray:
    """The top left pixel of the window around a centre; it may lie outside the canvas."""
    return np.round(centre - (digit + 2 * margin(digit) - 1) / 2).astype(int)


def window(ink: np.ndarray, centre: np.ndarray, digit: int) -> np.ndarray:
    """A digit and its margin, cut from one frame [H, W] -> [S, S]; black beyond the canvas."""
    side = digit + 2 * margin(digit)
    top, left = corner_of(centre, digit) + side
    return np.pad(ink, side)[top : top + side, left : left + side]


# ----------------------------------------------------------------------------- the digit classifier

SIDE = 20  # windows are scaled to this: 20 x 20 is all the detail that an MNIST digit has


def make_network() -> nn.Module:
    def block(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 32, stride=2),  # [N, 32, 10, 10]
        *block(32, 32), *block(32, 64, stride=2),  # [N, 64, 5, 5]
        *block(64, 64), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 25, 10),  # [N, 10]
    ).to(memory_format=torch.channels_last)  # fmt: skip


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """What a generated digit may look like and still be a fair one: turned, shifted, scaled,
    slanted, fainter, blurred, noisy. x [N, 1, 20, 20] -> the same."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    angle, slant, size = uniform(-0.22, 0.22), uniform(-0.15, 0.15), uniform(0.85, 1.18)
    row = torch.stack([angle.cos() * size, (slant - angle.sin()) * size, uniform(-0.15, 0.15)], 1)
    column = torch.stack([angle.sin() * size, angle.cos() * size, uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(torch.stack([row, column], 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
    blurred = F.conv2d(F.conv2d(x, kernel, padding=1), kernel, padding=1)
    x = torch.lerp(x, blurred, uniform(-0.3, 1.0)[:, None, None, None])  # below 0 sharpens
    x = x * uniform(0.7, 1.1)[:, None, None, None]
    noise = torch.randn(x.shape, generator=generator) * uniform(0, 0.08)[:, None, None, None]
    return (x + noise).clamp(0, 1)


def prepare(windows: list[np.ndarray]) -> Tensor:
    """Windows of any size -> [N, 1, 20, 20]."""
    x = torch.from_numpy(np.stack(windows)).float()[:, None]
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)


def sprite_windows(images: np.ndarray, digit: int) -> list[np.ndarray]:
    """Single digits, read the way that clips are read."""
    frames = [to_ink(s[None, None])[0] for s in data.make_sprites(images, digit)]
    return [window(frame, centre_of(frame), digit) for frame in frames]


def train_network(
    digit: int, images: np.ndarray, labels: np.ndarray, seed: int, epochs: int
) -> nn.Module:
    x, y = prepare(sprite_windows(images, digit)), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout; the caller's state stays
        torch.manual_seed(seed)
        network = make_network()
        orders = [torch.randperm(len(x), generator=generator) for _ in range(epochs)]
        batches = [batch for order in orders for batch in order.split(100)]
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
        for batch in tqdm(batches, desc="digit classifier", leave=False):
            guess = network(augment(x[batch], generator))
            loss = F.cross_entropy(guess, y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def load_classifier(
    folder: Path, digit: int, seed: int = 0, epochs: int = 16
) -> tuple[Callable, float]:
    """The classifier of a run, trained at the first call: windows -> probabilities [N, 10]; and its
    accuracy on the held-out digits."""
    sheet = data.load_digits(Path(__file__).parent / "digits.png")
    path = Path(folder, "classifier.pt")
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved.get("made_for") == [digit, seed, epochs]:
        network = make_network().eval()
        network.load_state_dict(saved["network"])
    else:
        network = train_network(digit, *data.split(*sheet, held_out=False), seed, epochs)
        half_written = path.with_suffix(".tmp")
        saved = {"made_for": [digit, seed, epochs], "network": network.state_dict()}
        torch.save(saved, half_written)
        half_written.replace(path)

    @torch.no_grad()
    def classify(windows: list[np.ndarray]) -> np.ndarray:
        return network(prepare(windows)).softmax(1).numpy()

    images, labels = data.split(*sheet, held_out=True)
    accuracy = (classify(sprite_windows(images, digit)).argmax(1) == labels).mean()
    return classify, float(accuracy)


# -------------------------------------------------------------------------------- reading one digit


def heading(track: np.ndarray) -> str:
    """The direction in which a track [T, 2] sets out.

    The world keeps walls ahead at least four frames away. The farthest of four steps, not the last,
    since a generated digit may turn back earlier.
    """
    steps = track[1:5] - track[0]  # [4, 2]
    far = steps[np.abs(steps).max(1).argmax()]
    axis = int(np.abs(far).argmax())
    if abs(far[axis]) < 1:
        return "still"
    return NAMES[tuple(int(np.sign(far[k])) if k == axis else 0 for k in (0, 1))]


def read_one(clip: np.ndarray, classify: Callable, digit: int) -> dict:
    """What a clip of one digit shows: its digit in the first, middle and last frame; its direction.
    A frame without ink reads as -1."""
    ink = to_ink(clip)
    track = np.stack([centre_of(frame) for frame in ink])
    looks = [0, len(ink) // 2, len(ink) - 1]
    read = classify([window(ink[t], track[t], digit) for t in looks]).argmax(1)
    visible = ink[looks].sum((1, 2)) > SPECK * digit**2
    return {"digits": np.where(visible, read, -1).tolist(), "directions": [heading(track)]}


# ------------------------------------------------------------------------------- reading two digits


def find_apart(ink: np.ndarray, digit: int) -> tuple[int, np.ndarray]:
    """The frame where two digits are best apart, and which of its rows or columns are the first's.

    Every straight cut through every frame is scored: is all ink inside one box before and one box
    after the cut, are the halves' centres a box apart, and is neither half just a speck?
    Returns the frame's number and a mask [H, W].
    """
    T, H, W = ink.shape
    total, pad = np.maximum(ink.sum((1, 2)), 1e-6)[:, None], (digit + 1) // 2
    padded = np.pad(ink, ((0, 0), (pad, pad), (pad, pad)))  # narrow digits: the box may hang over
    boxes = np.pad(padded, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
    boxes = boxes[:, digit:] - boxes[:, :-digit]
    boxes = boxes[:, :, digit:] - boxes[:, :, :-digit]  # the ink in each digit x digit box
    best = (-1.0, 0, np.zeros((H, W), bool))
    for axis, length in ((0, H), (1, W)):
        inside = boxes.max(2 - axis)  # [T, n] the fullest box that starts at each row (or column)
        cuts = np.arange(digit - pad, length + 1 - (digit - pad))  # at least half a box each side
        before = np.maximum.accumulate(inside, 1)[:, cuts + pad - digit]
        after = np.maximum.accumulate(inside[:, ::-1], 1)[:, ::-1][:, cuts + pad]
        profile = ink.sum(2 - axis)  # [T, length]
        mass, moment = profile.cumsum(1), (profile * np.arange(length)).cumsum(1)
        m, s = mass[:, cuts - 1], moment[:, cuts - 1]
        rest = np.maximum(mass[:, -1:] - m, 1e-6)
        distance = (moment[:, -1:] - s) / rest - s / np.maximum(m, 1e-6)
        speck = np.minimum(1, 10 * np.minimum(m, rest) / total)
        score = ((before + after) / total) ** 3 * np.clip(distance / digit, 0, 1.1) * speck
        t, k = np.unravel_index(score.argmax(), score.shape)
        if score[t, k] > best[0]:
            index = np.arange(H)[:, None] if axis == 0 else np.arange(W)[None, :]
            best = (score[t, k], int(t), np.broadcast_to(index < cuts[k], (H, W)))
    return best[1], best[2]


def owner(shape: tuple[int, int], centres: np.ndarray) -> np.ndarray:
    """Which pixels are nearer to the first centre than to the second, as boxes are: squarely."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    near = [np.maximum(abs(rows - r), abs(columns - c)) for r, c in centres]
    return near[0] < near[1]


def draw(stamp: np.ndarray, corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A stamp on an empty canvas, at each of the corners [M, 2] -> [M, H, W]."""
    side = len(stamp)
    canvas = np.zeros((len(corners), shape[0] + 2 * side, shape[1] + 2 * side), np.float32)
    for frame, (r, c) in zip(canvas, np.clip(corners, -side, shape) + side, strict=True):
        frame[r : r + side, c : c + side] = stamp
    return canvas[:, side:-side, side:-side]


def follow(
    ink: np.ndarray, frames: Iterable, stamps: list, centres: np.ndarray, digit: int, fastest: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Follow two stamps from one frame to the next. Yields (frame number, centres [2, 2])."""
    reach = range(-fastest - 1, fastest + 2)  # generated digits may be a little too fast
    moves = [(r, c) for r in reach for c in reach if r * c == 0 or abs(r * c) == 1]
    moves = np.array(sorted(moves, key=lambda m: abs(m[0]) + abs(m[1])))  # of equals: the least
    velocity = None
    for t in frames:
        first, second = (
            draw(stamps[k], corner_of(centres[k], digit) + moves, ink[t].shape) for k in (0, 1)
        )
        cost = ((np.maximum(first[:, None], second[None]) - ink[t]) ** 2).sum((2, 3))  # [M, M]
        if velocity is not None:  # a digit that is hidden behind the other one goes on as before
            turn = [((moves - v) ** 2).sum(1) for v in velocity]
            cost = cost + 0.01 * ink[t].sum() * (turn[0][:, None] + turn[1][None]).clip(max=8)
        best = np.unravel_index(cost.argmin(), cost.shape)
        velocity = moves[list(best)]
        centres = np.clip(centres + velocity, 0, np.array(ink[t].shape) - 1)
        if apart(centres, digit):  # seen alone: take a new picture, and the exact place
            mine = owner(ink[t].shape, centres)
            for k, part in enumerate((ink[t] * mine, ink[t] * ~mine)):
                rest = corner_of(centres[k], digit)
                centres[k] = centre_of(window(part, centres[k], digit)) + rest
                stamps[k] = window(part, centres[k], digit)
        yield t, centres.copy()


def apart(centres: np.ndarray, digit: int) -> bool:
    return np.abs(centres[0] - centres[1]).max() >= digit


def track_two(ink: np.ndarray, digit: int, fastest: int) -> np.ndarray:
    """Where two digits are in each frame: ink [T, H, W] -> centres [T, 2, 2]."""
    start, mask = find_apart(ink, digit)
    parts = [ink[start] * mask, ink[start] * ~mask]
    tracks = np.zeros((len(ink), 2, 2))
    tracks[start] = [centre_of(part) for part in parts]
    for frames in (range(start + 1, len(ink)), range(start - 1, -1, -1)):
        stamps = [window(part, c, digit) for part, c in zip(parts, tracks[start], strict=True)]
        for t, centres in follow(ink, frames, stamps, tracks[start].copy(), digit, fastest):
            tracks[t] = centres
    return tracks


def read_two(clip: np.ndarray, classify: Callable, digit: int, fastest: int = 2) -> dict:
    """What a clip of two digits shows: which, each named by the mean over all frames where they are
    apart (or the frame where they are nearest to that), and the direction of each."""
    ink = to_ink(clip)
    tracks = track_two(ink, digit, fastest)
    distance = np.abs(tracks[:, 0] - tracks[:, 1]).max(1)
    looks = np.flatnonzero(distance >= min(digit, distance.max()))
    seen = []
    for k in (0, 1):
        alone = {t: ink[t] * owner(ink[t].shape, tracks[t][[k, 1 - k]]) for t in looks}
        windows = [window(alone[t], tracks[t, k], digit) for t in looks]
        visible = np.mean([w.sum() for w in windows]) > SPECK * digit**2
        seen.append(int(classify(windows).mean(0).argmax()) if visible else -1)
    return {"digits": seen, "directions": [heading(tracks[:, k]) for k in (0, 1)]}


# ------------------------------------------------------------------------------------------ figures


def score_one(seen: dict, digits: list[dict]) -> dict[str, float]:
    """One reading against the facts that were asked for."""
    return {
        "digit": float(np.mean([k == digits[0]["digit"] for k in seen["digits"]])),
        "direction": float(seen["directions"][0] == digits[0]["direction"]),
    }


def score_two(seen: dict, digits: list[dict]) -> dict[str, float]:
    """The same for two digits: a track may be either of the two asked for, so both matchings count.
    `both` is right only where one matching has every digit and every direction right."""
    read = list(zip(seen["digits"], seen["directions"], strict=True))
    asked = [(d["digit"], d["direction"]) for d in digits]
    pairs = [list(zip(read, order, strict=True)) for order in (asked, asked[::-1])]
    return {
        "digits": float(any(all(r[0] == a[0] for r, a in pair) for pair in pairs)),
        "directions": float(any(all(r[1] == a[1] for r, a in pair) for pair in pairs)),
        "both": float(any(all(r == a for r, a in pair) for pair in pairs)),
    }


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


def measure(
    clips: list[np.ndarray], facts: list[dict], classify: Callable, world: data.WorldConfig
) -> dict:
    """Read uint8 clips [C, T, H, W] and compare them with their facts (those of `World.clips`).

    Returns each clip's reading and scores, and the means: of clips with one digit, and with two.
    """
    seen, scores = [], []
    for clip, fact in zip(clips, facts, strict=True):
        if len(fact["digits"]) == 1:
            seen.append(read_one(clip, classify, world.digit))
            scores.append(score_one(seen[-1], fact["digits"]))
        else:
            seen.append(read_two(clip, classify, world.digit, max(world.speeds)))
            scores.append(score_two(seen[-1], fact["digits"]))
    return {"seen": seen, "scores": scores, "sharpness": sharpness(clips), **average(scores)}


def average(scores: list[dict]) -> dict[str, float | None]:
    """The mean of each score over the clips that have it; None where no clip does."""
    names = ("digit", "direction", "digits", "directions", "both")
    values = {n: [s[n] for s in scores if n in s] for n in names}
    return {n: float(np.mean(v)) if v else None for n, v in values.items()}


# ------------------------------------------------------------------------------------------ prompts


def collect(world: data.World, size: tuple, first: int, wanted: Counter) -> tuple[list, list]:
    """Take clips from number `first` on until there are enough of each kind: `wanted` counts how
    many, by (digit, direction), or under 2 how many with two digits."""
    clips, facts = [], []
    for start in range(first, first + 100_000, 100):
        for clip, fact in zip(*world.clips(np.arange(start, start + 100), size), strict=True):
            digits = fact["digits"]
            kind = (digits[0]["digit"], digits[0]["direction"]) if len(digits) == 1 else 2
            if wanted[kind] and (kind != 2 or start_apart(fact, world.config.digit)):
                wanted[kind] -= 1
                clips.append(clip)
                facts.append(fact)
        if not wanted.total():
            return clips, facts
    raise ValueError(f"cannot find clips of {size} for every prompt: {dict(+wanted)} are missing")


def start_apart(fact: dict, digit: int) -> bool:
    """Whether two digits begin side by side, where there is room. One on top of the other, nobody
    could name them, and a ceiling that is low for that reason would say nothing about models."""
    a, b = np.array([d["start"] for d in fact["digits"]])
    return np.abs(a - b).max() >= min(digit, max(fact["height"], fact["width"]) - digit)


def real_clips(config: data.WorldConfig, ones: int, twos: int, seed: int) -> tuple[list, list]:
    """Clips of held-out digits, whose captions are the prompts: `ones` with one digit, each digit
    and direction at each size equally often, and `twos` with two."""
    durations = sorted((T for T in config.durations if T > 1), reverse=True)  # images don't move
    shapes = [tuple(shape) for shape in config.shapes]
    sizes = [(durations[0], *s) for s in shapes] + [(T, *shapes[0]) for T in durations[1:]]
    kinds = [(s, d, way) for s in sizes for d in range(10) for way in data.DIRECTIONS]
    order = np.random.default_rng(seed).permutation(len(kinds))  # any number is a fair choice
    chosen = [kinds[order[i % len(kinds)]] for i in range(ones)]
    held_out = data.split(*data.load_digits(Path(__file__).parent / "digits.png"), held_out=True)
    clips, facts = [], []
    for k, size in enumerate(sizes):
        single = Counter((d, way) for s, d, way in chosen if s == size)
        double = Counter({2: len(range(k, twos, len(sizes)))})
        for share, wanted in ((0.0, single), (1.0, double)):
            if wanted.total():
                world = data.World(replace(config, two_digits=share), *held_out, seed=seed)
                more = collect(world, size, k * 1_000_000, wanted)
                clips, facts = clips + more[0], facts + more[1]
    return clips, facts


def by_size(facts: list[dict], batch: int) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Batches of equal size: ((T, H, W), clip numbers)."""
    sizes = [(f["frames"], f["height"], f["width"]) for f in facts]
    for size in dict.fromkeys(sizes):
        group = [i for i, s in enumerate(sizes) if s == size]
        for start in range(0, len(group), batch):
            yield size, group[start : start + batch]


@torch.no_grad()
def reconstruct(vae: nn.Module, clips: list[np.ndarray], facts: list[dict]) -> tuple[list, dict]:
    """Clips after the VAE; its PSNR (peak-to-peak 2) and compression (pixels per latent number)."""
    device = next(vae.parameters()).device
    made, squares, pixels, numbers = [None] * len(clips), 0.0, 0, 0
    for _, group in by_size(facts, 16):
        video = torch.from_numpy(np.stack([clips[i] for i in group])).to(device)  # [B, C, T, H, W]
        video = video.float() / 127.5 - 1
        latent = vae.encode(video)  # [B, Z, t, h, w]
        again = vae.decode(latent).float().clamp(-1, 1)
        squares += (again - video).square().sum().item()
        pixels, numbers = pixels + video.numel(), numbers + latent.numel()
        for i, clip in zip(group, ((again + 1) * 127.5).round().byte().cpu().numpy(), strict=True):
            made[i] = clip
    psnr = 10 * float(np.log10(4 / max(squares / pixels, 1e-12)))
    return made, {"psnr": psnr, "compression": pixels / numbers}


def generate(run: object, facts: list[dict], seed: int) -> list[np.ndarray]:
    """One clip for each caption, at its size."""
    made = [None] * len(facts)
    with tqdm(total=len(facts), desc="generating", unit="clip") as bar:
        for size, group in by_size(facts, 20):
            captions = [data.short_caption(facts[i]) for i in group]
            clips = sample.generate(run, captions, size=size, seed=seed + group[0])
            for i, clip in zip(group, clips, strict=True):
                made[i] = clip
            bar.update(len(group))
    return made


def contact_sheet(clips: list, facts: list[dict], result: dict, count: int = 75) -> Image.Image:
    """First, middle and last frame of some clips; above the prompt, below what was read, red if
    any of it is wrong."""
    some = np.unique(np.linspace(0, len(clips) - 1, count).astype(int))
    H, W = (max(f[k] for f in facts) for k in ("height", "width"))
    zoom, across = max(1, 96 // H), 5
    cell = (max(3 * (W * zoom + 4), 210) + 12, H * zoom + 36)
    sheet = Image.new("RGB", (across * cell[0], -(-len(some) // across) * cell[1]), (24, 24, 32))
    pen = ImageDraw.Draw(sheet)
    for place, i in enumerate(some):
        left, top = place % across * cell[0] + 6, place // across * cell[1]
        seen, right = result["seen"][i], min(result["scores"][i].values()) == 1
        pen.text((left, top + 2), data.short_caption(facts[i]), fill=(220, 220, 220))
        for k, t in enumerate((0, facts[i]["frames"] // 2, facts[i]["frames"] - 1)):
            frame = Image.fromarray(clips[i][:, t].mean(0).astype(np.uint8))
            frame = frame.resize((frame.width * zoom, frame.height * zoom), Image.NEAREST)
            sheet.paste(frame.convert("RGB"), (left + k * (frame.width + 4), top + 16))
        read = " ".join("-" if k < 0 else str(k) for k in seen["digits"])
        read += "  " + " ".join(seen["directions"])
        color = (120, 200, 120) if right else (255, 90, 90)
        pen.text((left, top + H * zoom + 18), f"read: {read}", fill=color)
    return sheet


def percent(share: float | None) -> str:
    return "      -  " if share is None else f"{100 * share:7.1f} %"


def table(results: dict[str, dict], ones: int, twos: int) -> str:
    """The three sets of clips, one a line."""
    names = ("digit", "direction", "sharpness", "digits", "directions", "both")
    head = f"{'':10}{f'one digit ({ones} clips)':36}two digits ({twos} clips)"
    lines = [head, " " * 9 + "".join(f"{n:>12}" for n in names)]
    for title, result in results.items():
        sharp = f"{result['sharpness'] / results['real']['sharpness']:9.2f}"
        cells = [sharp if n == "sharpness" else percent(result[n]) for n in names]
        lines.append(f"{title:9}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def prompts(args: argparse.Namespace) -> None:
    """`evaluate.py prompts`: does a clip show what its prompt says?"""
    folder = Path(args.run)
    run = sample.load_run(folder)
    world = data.WorldConfig(**run.config["world"])
    classify, accuracy = load_classifier(folder, world.digit)
    clips, facts = real_clips(world, args.clips, args.pairs, args.seed)
    made = {"real": clips}
    made["VAE"], vae = reconstruct(run.vae, clips, facts)
    made["generated"] = generate(run, facts, args.seed)
    results = {title: measure(those, facts, classify, world) for title, those in made.items()}
    vae["recognised"] = results["VAE"]["digit"] / max(results["real"]["digit"], 1e-6)

    print(table(results, args.clips, args.pairs))
    print(f"classifier: {100 * accuracy:.1f} % of the held-out digits")
    print(f"VAE: {vae['psnr']:.1f} dB (peak-to-peak 2), {vae['compression']:.1f}x compression")
    print(f"VAE: digits recognised {100 * vae['recognised']:.1f} % as often as the originals")
    print("generated, by size:")
    sizes = {}
    for size, group in by_size(facts, len(facts)):
        name = " x ".join(map(str, size))
        sizes[name] = average([results["generated"]["scores"][i] for i in group])
        print(f"  {name:14}" + "  ".join(f"{n} {percent(v)}" for n, v in sizes[name].items()))
    figures = {"clips": args.clips, "pairs": args.pairs, "seed": args.seed}
    figures |= {"classifier": accuracy, "vae": vae, "sizes": sizes}
    for title, result in results.items():
        figures[title] = {k: v for k, v in result.items() if k not in ("seen", "scores")}
    Path(folder, "prompts.json").write_text(json.dumps(figures, indent=2) + "\n")
    contact_sheet(made["generated"], facts, results["generated"]).save(folder / "prompts.png")
    print(f"wrote {folder / 'prompts.json'} and {folder / 'prompts.png'}")


# ------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse would print its usage first
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("prompts", help="does a clip show what its prompt says?")
    command.set_defaults(call=prompts)
    command.add_argument("--run", default="out/tiny", help="folder of the run")
    command.add_argument("--clips", type=int, default=480, help="how many prompts of one digit")
    command.add_argument("--pairs", type=int, default=120, help="how many prompts of two digits")
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not Path(args.run).is_dir():
        parser.error(f"no folder {args.run}: --run takes that of a trained run, like out/tiny")
    if args.call is prompts and min(args.clips, args.pairs) < 1:
        parser.error("--clips and --pairs take 1 or more")
    try:
        args.call(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
