"""Reading a clip: a digit classifier and a tracker say what a clip of moving digits shows.

The problem. A sample sheet convinces anybody. A figure needs a reader that is not the eye of the
person who trained the model, and that is told neither the prompt nor the model.

The idea. The world's facts can be read back from pixels alone:

    which    a small classifier, trained on the training digits only, names what is in a window
    where    the centre of the ink in each frame gives the track [T, 2]
    whereto  a track's first steps give the direction

        clip [C, T, H, W]  ->  ink [T, H, W]  ->  track [T, 2]  ->  windows [S, S]  ->  "a 7, left"

One digit is tracked by its centre of mass. Two digits cross, and while they do, no cut through the
ink is right: each of them hides a part of the other. So two are first found in the frame where they
are best apart, and followed from there to both ends of the clip. Each keeps a stamp, which is its
picture when last seen alone; its next place is where the two stamps, drawn together, are nearest to
the frame. That is analysis by synthesis: to know what one sees, draw it and compare.

How good the reader is, is measured and not believed: it reads real clips of held-out digits, too.

Alphabet: a clip is [C, T, H, W], uint8 in 0..255 or float in -1..1; ink is [T, H, W] in 0..1;
`digit` is the side of a digit's box in pixels; windows [S, S] are a little wider.

Run `python reader.py` for a picture of tracks and of what was read.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

BACKGROUND = 0.15  # darker than this is background: noise and the VAE's haze are no ink
SPECK = 0.02  # less ink than this share of a box is no digit; the faintest real one has twice that
SIDE = 20  # windows are scaled to this: 20 x 20 is all the detail that an MNIST digit has


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


def side_of(digit: int) -> int:
    """Windows are wider than a box, whose middle is not quite its digit's centre of mass."""
    return digit + 2 * max(2, digit // 7)


def corner_of(centre: np.ndarray, digit: int) -> np.ndarray:
    """The top left pixel of the window around a centre; it may lie outside the canvas."""
    return np.round(centre - (side_of(digit) - 1) / 2).astype(int)


def window(ink: np.ndarray, centre: np.ndarray, digit: int) -> np.ndarray:
    """A digit and its margin, cut from one frame [H, W] -> [S, S]; black beyond the canvas."""
    side = side_of(digit)
    top, left = corner_of(centre, digit) + side
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
        return low + (high - low) * torch.rand(len(x))

    bend = torch.eye(2, 3) + 0.2 * torch.empty(len(x), 2, 3).uniform_(-1, 1)  # the first four
    x = F.grid_sample(x, F.affine_grid(bend, list(x.shape), False), align_corners=False)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
    blurred = F.conv2d(F.conv2d(x, kernel, padding=1), kernel, padding=1)
    x = torch.lerp(x, blurred, uniform(-0.3, 1.0)[:, None, None, None])  # below 0 sharpens
    x = x * uniform(0.7, 1.1)[:, None, None, None]
    return (x + torch.randn_like(x) * uniform(0, 0.08)[:, None, None, None]).clamp(0, 1)


def prepare(windows: list[np.ndarray]) -> Tensor:
    """Windows of any size -> [N, 1, 20, 20]."""
    x = torch.from_numpy(np.stack(windows)).float()[:, None]
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)


def sprite_windows(sprites: np.ndarray) -> Tensor:
    """Sprites [N, digit, digit] uint8, read the way that clips are read -> [N, 1, 20, 20]."""
    frames = to_ink(sprites[None])  # as if they were the frames of a clip
    return prepare([window(frame, centre_of(frame), sprites.shape[-1]) for frame in frames])


def train_classifier(
    sprites: np.ndarray, labels: np.ndarray, seed: int = 0, epochs: int = 12
) -> nn.Module:
    """Train on sprites [N, digit, digit] uint8. The same seed gives the same network."""
    x, y = sprite_windows(sprites), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays what it was
        torch.manual_seed(seed)
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


@torch.no_grad()
def accuracy(network: nn.Module, sprites: np.ndarray, labels: np.ndarray) -> float:
    return float((network(sprite_windows(sprites)).argmax(1).numpy() == labels).mean())


@torch.no_grad()
def classify(network: nn.Module, windows: list[np.ndarray]) -> np.ndarray:
    """Windows of any size -> the probabilities of the ten digits [N, 10]."""
    return network(prepare(windows)).softmax(1).numpy()


# -------------------------------------------------------------------------------- reading one digit


def heading(track: np.ndarray) -> str:
    """The direction in which a track [T, 2] sets out.

    The world keeps walls ahead at least four frames away. The farthest of four steps, not the last,
    since a generated digit may turn back earlier.
    """
    if len(track) == 1:
        return "still"
    steps = track[1:5] - track[0]  # [4, 2]
    far = steps[np.abs(steps).max(1).argmax()]
    axis = int(np.abs(far).argmax())
    if abs(far[axis]) < 1:
        return "still"
    return (("up", "down"), ("left", "right"))[axis][int(far[axis] > 0)]


def track_one(ink: np.ndarray) -> np.ndarray:
    """Where the one digit is in each frame: ink [T, H, W] -> centres [T, 2]."""
    return np.stack([centre_of(frame) for frame in ink])


def name_one(
    ink: np.ndarray, track: np.ndarray, looks: list[int], network: nn.Module, digit: int
) -> list[int]:
    """Which digit is seen in each of the frames `looks`; -1 where there is no ink."""
    read = classify(network, [window(ink[t], track[t], digit) for t in looks]).argmax(1)
    visible = ink[looks].sum((1, 2)) > SPECK * digit**2
    return np.where(visible, read, -1).tolist()


def read_one(clip: np.ndarray, network: nn.Module, digit: int) -> dict:
    """What a clip of one digit shows: its digit in the first, middle and last frame; its
    direction."""
    ink = to_ink(clip)
    track, looks = track_one(ink), [0, len(ink) // 2, len(ink) - 1]
    return {
        "digits": name_one(ink, track, looks, network, digit),
        "directions": [heading(track)],
    }


# ------------------------------------------------------------------------------- reading two digits


def owner(shape: tuple[int, int], centres: np.ndarray) -> np.ndarray:
    """Which pixels are nearer to the first centre than to the second, as boxes are: squarely."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    near = [np.maximum(abs(rows - r), abs(columns - c)) for r, c in centres]
    return near[0] < near[1]


def split(frame: np.ndarray) -> tuple[float, list[np.ndarray], np.ndarray]:
    """Cut the ink of one frame [H, W] in two by 2-means (Lloyd 1982), begun at both sides of the
    middle, along the direction in which the ink is spread widest.

    Returns how well that went, the two parts [H, W] and their centres [2, 2]. The measure is the
    variance between the means, which falls where the parts are near or where one is just a speck.
    """
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
    return between, parts, centres


def draw(stamp: np.ndarray, corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A stamp on an empty canvas, at each of the corners [M, 2] -> [M, H, W]."""
    side = len(stamp)
    canvas = np.zeros((len(corners), shape[0] + 2 * side, shape[1] + 2 * side), np.float32)
    for frame, (r, c) in zip(canvas, np.clip(corners, -side, shape) + side, strict=True):
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
        first, second = (
            draw(stamps[k], corner_of(centres[k], digit) + moves, frame.shape) for k in (0, 1)
        )
        cost = ((np.maximum(first[:, None], second[None]) - frame) ** 2).sum((2, 3))  # [M, M]
        if velocity is not None:  # a digit that is hidden behind the other one goes on as before
            turn = [((moves - v) ** 2).sum(1) for v in velocity]
            cost = cost + 0.01 * frame.sum() * (turn[0][:, None] + turn[1][None]).clip(max=8)
        velocity = moves[list(np.unravel_index(cost.argmin(), cost.shape))]
        centres = np.clip(centres + velocity, 0, np.array(frame.shape) - 1)
        if np.abs(centres[0] - centres[1]).max() >= digit:  # alone: a new picture, the exact place
            mine = owner(frame.shape, centres)
            for k, part in enumerate((frame * mine, frame * ~mine)):
                corner = corner_of(centres[k], digit)
                centres[k] = corner + centre_of(window(part, centres[k], digit))
                stamps[k] = window(part, centres[k], digit)
        yield centres.copy()


def track_two(ink: np.ndarray, digit: int, fastest: int) -> np.ndarray:
    """Where two digits are in each frame: ink [T, H, W] -> centres [T, 2, 2]."""
    start = int(np.argmax([split(frame)[0] for frame in ink]))
    _, parts, centres = split(ink[start])
    before = list(follow(ink[:start][::-1], parts, centres, digit, fastest))
    after = list(follow(ink[start + 1 :], parts, centres, digit, fastest))
    return np.stack([*before[::-1], centres, *after])


def pictures(ink: np.ndarray, tracks: np.ndarray, k: int, digit: int) -> list[np.ndarray]:
    """Windows [S, S] of digit k without the other one: those of the frames where they are apart.

    On a small canvas there may be none. Then one picture is made of all frames: a digit's ink moves
    with it, so that what the windows along its track have in common is the digit alone.
    """
    apart = np.abs(tracks[:, 0] - tracks[:, 1]).max(1) >= digit
    if not apart.any():
        windows = [window(ink[t], tracks[t, k], digit) for t in range(len(ink))]
        return [np.quantile(windows, 0.1, axis=0)]  # not the darkest: generated digits tremble
    alone = {t: ink[t] * owner(ink[t].shape, tracks[t, [k, 1 - k]]) for t in np.flatnonzero(apart)}
    return [window(frame, tracks[t, k], digit) for t, frame in alone.items()]


def read_two(clip: np.ndarray, network: nn.Module, digit: int, fastest: int = 2) -> dict:
    """What a clip of two digits shows: which, each named by the mean over its pictures; and the
    direction of each. A digit without ink reads as -1."""
    ink = to_ink(clip)
    tracks = track_two(ink, digit, fastest)
    seen = []
    for k in (0, 1):
        windows = pictures(ink, tracks, k, digit)
        visible = np.mean([w.sum() for w in windows]) > SPECK * digit**2
        seen.append(int(classify(network, windows).mean(0).argmax()) if visible else -1)
    return {"digits": seen, "directions": [heading(tracks[:, k]) for k in (0, 1)]}


# ------------------------------------------------------------------------------------------- scores


def score_one(seen: dict, digits: list[dict]) -> dict[str, float]:
    """One reading against the facts that were asked for."""
    return {
        "digit": float(np.mean([k == digits[0]["digit"] for k in seen["digits"]])),
        "direction": float(seen["directions"][0] == digits[0]["direction"]),
    }


def score_two(seen: dict, digits: list[dict]) -> dict[str, float]:
    """The same for two digits. Either track may be either of the two that were asked for, so order
    counts for nothing. `both` is right only where every digit moves in its own direction."""
    read = list(zip(seen["digits"], seen["directions"], strict=True))
    asked = [(d["digit"], d["direction"]) for d in digits]
    return {
        "digits": float(sorted(r[0] for r in read) == sorted(a[0] for a in asked)),
        "directions": float(sorted(r[1] for r in read) == sorted(a[1] for a in asked)),
        "both": float(sorted(read) == sorted(asked)),
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


# --------------------------------------------------------------------------------------------- demo


def main() -> None:
    import data  # the demo's clips; the reader itself is handed everything

    sheet, config = data.load_digits(), data.WorldConfig(two_digits=1.0)
    images, labels = data.split(*sheet, held_out=False)
    network = train_classifier(data.make_sprites(images, config.digit), labels, epochs=3)
    images, labels = data.split(*sheet, held_out=True)
    clips, facts = data.World(config, images, labels).clips(np.arange(6), (9, 32, 48))
    page = Image.new("RGB", (9 * 148 + 8, 6 * 120), (32, 32, 32))
    pen = ImageDraw.Draw(page)
    for k, (clip, fact) in enumerate(zip(clips, facts, strict=True)):
        tracks = track_two(to_ink(clip), config.digit, fastest=2)
        read = " and ".join(map("{} {}".format, *read_two(clip, network, config.digit).values()))
        pen.text((8, 120 * k + 4), f"{data.short_caption(fact)}, read as {read}")
        print(f"clip {list(clip.shape)} -> tracks {list(tracks.shape)}, read as {read}")
        for t, frame in enumerate(clip[0]):
            left, top = 8 + 148 * t, 120 * k + 18
            page.paste(Image.fromarray(frame).resize((144, 96), Image.NEAREST), (left, top))
            for (r, c), color in zip(tracks[t], ((255, 120, 60), (80, 180, 255)), strict=True):
                x, y = left + 3 * c + 1, top + 3 * r + 1  # three pixels for one
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=color, width=2)
    page.save("reader_demo.png")
    print("wrote reader_demo.png")


if __name__ == "__main__":
    main()
