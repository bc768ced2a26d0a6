"""A folder of your own videos and images, as a numbered, endless sequence of clips at native size.

The problem. People's files have every size, shape, frame rate and length, and some are broken. A
training wants numbered clips, whose sizes it knows long before it needs their pixels; it wants to
continue where it stopped, on any number of processes, and never to wait for a decoder.

The idea. Look at every file once, and remember only how large and how long it is: the index. All
else is arithmetic on it, and a clip is a *pure function* of its number, as in data.py:

    number --divide by N--> epoch, place --the epoch's own shuffling--> window --decode--> pixels

A *window* is a part of a video that is at most `longest` frames long. So in an epoch, N numbers,
every window comes exactly once, on one process: each step takes the next ones, and deals them out.

Native size (the report: training at native size frames and composes better than on square crops):

  * shape: scaled down to about `pixels` pixels, its sides rounded to the patch grid. Never cropped,
    never enlarged, and not stretched by more than that rounding. A turned phone's video is upright.
  * time: frame j is what is on the screen j / fps seconds after the start, read from the file's own
    time stamps, so variable frame rates are right. A video of F frames of ours gives F // longest
    windows side by side, or one of 1 + unit k frames; where exactly they start, each epoch draws
    anew. An image is a window of one frame.

    a video of 47 frames, longest = 17   |   --- 17 --- --- 17 ---    |   2 windows, 13 spare
    a video of 12 frames, unit = 4       | -- 9 --  |                     1 window, 3 spare

Captions: `name.txt` beside `name.mp4`, or lines {"file": "sub/name.mp4", "caption": "a dog"} in
captions.jsonl in the folder; none is an empty one. What a captioner wrote (recaption.py) stands in
such a file elsewhere, and counts where there is no other. decode.py tells how pixels are read.

Alphabet: T frames of H x W pixels; a clip is uint8 [3, T, H, W]; N windows in all.

Run `python folder.py FOLDER` to index a folder and look at it: a contact sheet, what is broken.
"""

import json
import os
import sys
import time
import zlib
from collections import Counter
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from clips import VIDEO, contact_sheet, write_clip
from decode import PICTURE, Workers, probe, read_window

INDEX = ".clips-index.jsonl"  # in the folder, so that every run uses it
AHEAD = 2**30  # bytes; the most that is decoded before it is asked for

# ---------------------------------------------------------------------------------------- the index


def find_files(root: Path) -> list[str]:
    """Names of all videos and images below a folder, sorted. Hidden ones are left alone."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in VIDEO + PICTURE and not name.startswith("."):
                found.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(found)


def stamp(path: Path) -> list[int]:
    """What is another when a file has changed."""
    try:
        return [path.stat().st_mtime_ns, path.stat().st_size]
    except OSError:  # a link that leads nowhere; `probe` says it
        return []


def read_index(root: Path) -> dict[str, dict]:
    """{name: what `probe` said} from an earlier time. A line that is torn ends it."""
    known = {}
    try:
        for line in (root / INDEX).read_text().splitlines():
            entry = json.loads(line)
            known[entry["file"]] = entry
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return known


def make_index(root: str | Path, workers: "Workers") -> tuple[dict[str, dict], dict[str, str]]:
    """What is in a folder: {name: what `probe` said}, and {name: why} of broken files.

    Files that are new, or whose size or time of change is another, are looked at; the others are
    remembered. FileNotFoundError where there is no file to learn from.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder")
    names, known = find_files(root), read_index(root)
    stamps = {name: stamp(root / name) for name in names}
    new = [name for name in names if known.get(name, {}).get("stamp") != stamps[name]]
    index = {name: known[name] for name in names if name not in set(new)}
    asked = [(name, workers.submit(probe, root / name)) for name in new]
    for name, future in tqdm(asked, desc="index", unit="file", disable=len(new) < 100):
        found = workers.result(future)
        found = {"broken": found} if isinstance(found, str) else found
        index[name] = {"file": name, "stamp": stamps[name]} | found
        if "broken" in found:
            warn(root / name, found["broken"])
    if new or len(known) != len(index):
        try:
            part = root / f"{INDEX}.{os.getpid()}"
            part.write_text("".join(json.dumps(index[name]) + "\n" for name in names))
            os.replace(part, root / INDEX)
        except OSError:  # a folder that can only be read: it is looked at again each time
            pass
    broken = {name: index[name]["broken"] for name in names if "broken" in index[name]}
    if len(broken) == len(names):
        kinds = " ".join(VIDEO + PICTURE)
        what = f"none of its {len(names)} files can be read" if names else f"no file of {kinds}"
        raise FileNotFoundError(f"--data {root}: {what}")
    return {name: index[name] for name in names if name not in broken}, broken


def warn(path: str | Path, reason: str) -> None:
    tqdm.write(f"skipped {path}: {reason}", file=sys.stderr)


def checksum(captions: list[str]) -> int:
    """What tells these captions from others."""
    return zlib.crc32(json.dumps(captions).encode())


def read_lines(path: Path) -> dict[str, str]:
    """{name: caption} of a captions.jsonl; nothing where there is no such file."""
    listed = {}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else {"file": "", "caption": ""}
            listed[Path(entry["file"]).as_posix()] = " ".join(str(entry["caption"]).split())
        except (ValueError, KeyError, TypeError):
            form = '{"file": "a.mp4", "caption": "a dog"}'
            raise ValueError(f"{path}, line {number}: each line is like {form}") from None
    return listed


def read_captions(root: Path, names: list[str]) -> list[str]:
    """The caption of each file; "" where there is none. What stands beside the file goes first."""
    path = root / "captions.jsonl"
    listed, captions = read_lines(path), []
    if listed and not set(listed) & set(names):
        raise ValueError(f"{path} names none of the {len(names)} files that are there")
    for name in names:
        beside = (root / name).with_suffix(".txt")
        text = beside.read_text("utf-8", "replace") if beside.exists() else listed.get(name, "")
        captions.append(" ".join(text.split()))
    return captions


# --------------------------------------------------------------------------------------- the folder


def fitted(H: int, W: int, pixels: int, multiple: int) -> tuple[int, int]:
    """The size at which a file is shown: about `pixels` in all, sides that `multiple` divides."""
    scale = min(1.0, (pixels / (H * W)) ** 0.5)
    if min(H, W) * scale < multiple / 2:
        raise ValueError(f"{H} x {W} is too thin: a side would be less than half of {multiple}")
    height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in (H, W))
    return height, width


@dataclass
class FolderConfig:
    """How a folder is looked at; then, what was found in it."""

    fps: int = 10  # frames a second
    longest: int = 17  # frames of a window, at most
    unit: int = 4  # a window has 1 + unit k frames
    pixels: int = 1024  # of a frame, about
    multiple: int = 8  # pixels; what divides the sides
    images: float = 0.3  # the share of the windows of which only the first frame is shown
    windows: int = 0  # how many there are
    durations: tuple[int, ...] = ()  # of windows, in frames, rising
    shapes: tuple[
        tuple[int, int], ...
    ] = ()  # of windows (of videos, if any), the most common first
    files: int = 0  # a checksum of names and sizes: other files are another folder
    captions: int = 0  # a checksum, too


class Folder:
    """An endless, numbered sequence of clips."""

    def __init__(self, root: str | Path, config: FolderConfig, seed: int = 0, workers: int = 0):
        self.root, self.seed, self.workers = Path(root), seed, Workers(workers)
        index, self.broken = make_index(root, self.workers)
        self.lost, self.ready = set(), {}  # clips that could not be decoded; clips in the making
        self.starts = [0]  # how many clips were taken before each step
        self.entries, self.shapes = [], []
        for name, entry in index.items():
            try:
                shape = fitted(entry["height"], entry["width"], config.pixels, config.multiple)
                self.shapes.append(shape)
                self.entries.append(entry)
            except ValueError as error:
                self.broken[name] = str(error)
                warn(self.root / name, str(error))
        if not self.entries:
            raise ValueError(f"--data {root}: no file has a shape that can be used")
        self.shown = read_captions(self.root, [entry["file"] for entry in self.entries])
        self.arrange(config)

    def arrange(self, config: FolderConfig) -> None:
        """The windows of the files that there are."""
        # F frames of ours in each file; of its windows, how many there are, and of how many frames.
        seconds = np.array([entry["seconds"] for entry in self.entries])
        self.length = np.maximum(1, (seconds * config.fps + 1e-3).astype(int))  # [files]
        whole = 1 + (self.length - 1) // config.unit * config.unit
        duration = np.minimum(whole, config.longest)
        count = np.where(whole < config.longest, 1, self.length // config.longest)
        self.file = np.repeat(np.arange(len(count)), count)  # [N]; each window's
        self.part = np.arange(len(self.file)) - (np.cumsum(count) - count)[self.file]  # 0 1 2 0 0 1
        self.spare = self.length - count * duration  # [files]
        self.sizes = np.column_stack([duration, np.array(self.shapes)])[self.file]  # [N, 3]
        videos = self.sizes[self.sizes[:, 0] > 1] if (duration > 1).any() else self.sizes
        common = Counter(map(tuple, videos[:, 1:].tolist()))
        told = json.dumps(
            [[e["file"], e["height"], e["width"], e["seconds"]] for e in self.entries]
        )
        self.config = replace(
            config,
            windows=len(self.file),
            durations=tuple(np.unique(self.sizes[:, 0]).tolist()),
            shapes=tuple(shape for shape, _ in common.most_common(8)),
            files=zlib.crc32(told.encode()),
            captions=checksum(self.shown),
        )

    # Captions that are missing, and those that somebody wrote since.

    def captioned(self) -> "Folder":
        """The same folder, as if there were only the files with a caption in it."""
        some, keep = copy(self), [k for k, said in enumerate(self.shown) if said]
        if not keep:
            form = 'name.txt beside name.mp4, or captions.jsonl with {"file": ..., "caption": ...}'
            raise ValueError(f"--data {self.root}: no file has a caption to learn from: {form}")
        for name in ("entries", "shapes", "shown"):
            setattr(some, name, [getattr(self, name)[k] for k in keep])
        some.lost, some.ready, some.starts = set(), {}, [0]
        some.arrange(self.config)
        return some

    def missing(self) -> list[int]:
        """Which files have no caption."""
        return [k for k, said in enumerate(self.shown) if not said]

    def add_captions(self, listed: dict[str, str]) -> int:
        """Take these for files that have none. Returns how many that are."""
        told = {k: listed.get(self.entries[k]["file"]) for k in self.missing()}
        told = {k: said for k, said in told.items() if said}
        for k, said in told.items():
            self.shown[k] = said
        self.config = replace(self.config, captions=checksum(self.shown))
        return len(told)

    def middle(self, files: list[int]) -> list[np.ndarray | str]:
        """A window from the middle of each file: uint8 [3, T, H, W], or why it can't be read."""
        sizes = self.sizes[np.searchsorted(self.file, files)].tolist()  # of the first windows
        jobs = [
            self.job(k, (self.length[k] - size[0]) // 2, size)
            for k, size in zip(files, sizes, strict=True)
        ]
        started = [self.workers.submit(read_window, *job) for job in jobs]
        return [self.workers.result(one) for one in started]

    # Numbers -> windows.

    @lru_cache(4)  # noqa: B019, there is one folder in a training
    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's order of windows [N]; where in the spare frames of its file each begins, and
        what decides whether only its first frame is shown: both [N] in [0, 1)."""
        random, N = np.random.default_rng([self.seed, 11, number]), len(self.file)
        order, offset, chance = random.permutation(N), random.random(len(self.entries)), random
        return order, offset[self.file[order]], chance.random(N)

    def look_up(self, index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three of `epoch` for clip numbers of any epochs: index [n] -> [n] each."""
        number, place = np.divmod(np.asarray(index, int), len(self.file))
        found = np.empty((3, len(place)))
        for one in np.unique(number):
            here = number == one
            found[:, here] = [values[place[here]] for values in self.epoch(int(one))]
        return found[0].astype(int), found[1], found[2]

    def size(self, index, images: float | None = None) -> np.ndarray:
        """(T, H, W) of each clip: index [n] -> [n, 3]. Cheap, so that packing can look ahead.

        images: the share of clips that are shown as their first frame, if not the config's.
        """
        window, _, chance = self.look_up(index)
        size = self.sizes[window]
        size[chance < (self.config.images if images is None else images), 0] = 1
        return size

    def frames(self, index) -> np.ndarray:
        """How many frames the whole file of each clip has: index [n] -> [n]."""
        return self.length[self.file[self.look_up(index)[0]]]

    def encodings(self, index, turns: int) -> np.ndarray:
        """Which encoding of which window each clip is, where all windows are encoded `turns` times,
        as in the first epochs: index [n] -> [n]."""
        N = len(self.file)
        return np.asarray(index) // N % turns * N + self.look_up(index)[0]

    def captions(self, index, size=None) -> list[str]:
        return [self.shown[file] for file in self.file[self.look_up(index)[0]]]

    def numbers(self, step: int, most: int) -> np.ndarray:
        """The next clips, after those that `took` counted in each step before: [most]."""
        return self.starts[step] + np.arange(most)

    def known_steps(self, step: int) -> int:
        """Where to begin, to know which clips a step begins with: where nobody has yet counted."""
        return min(step, len(self.starts) - 1)

    def took(self, step: int, count: int) -> None:
        if len(self.starts) == step + 1:
            self.starts.append(self.starts[step] + count)

    # Windows -> pixels.

    def job(self, file: int, first: int, size: list[int]) -> tuple:
        """The arguments of `read_window`: a window (T, H, W) of a file, from frame `first` on."""
        entry, (T, H, W) = self.entries[file], size
        times = entry["start"] + (first + np.arange(T)) / self.config.fps
        return self.root / entry["file"], times, entry["last"], (H, W)

    def jobs(self, index, size) -> dict[tuple[int, int], tuple]:
        """{(number, T): the arguments of `read_window`}: index [n], size [n, 3] or [3]."""
        window, offset, _ = self.look_up(index)
        file, size = self.file[window], np.broadcast_to(np.asarray(size), (len(index), 3))
        first = (offset * (self.spare[file] + 1)).astype(int)
        first += self.part[window] * self.sizes[window, 0]
        first = np.minimum(first, self.length[file] - size[:, 0])  # a longer one begins earlier
        of = zip(np.asarray(index).tolist(), file, first, size.tolist(), strict=True)
        return {(number, s[0]): self.job(k, start, s) for number, k, start, s in of}

    def prefetch(self, index, size) -> None:
        """Start to decode clips that will be asked for next. What was started before and is not
        among them is forgotten."""
        if not self.workers.count:
            return
        old, self.ready, room = self.ready, {}, AHEAD
        size = np.broadcast_to(np.asarray(size), (len(index), 3))
        for (key, job), one in zip(self.jobs(index, size).items(), size, strict=True):
            room -= 3 * int(np.prod(one))
            if room > 0:
                self.ready[key] = old.pop(key, None) or self.workers.submit(read_window, *job)
        for future in old.values():
            future.cancel()

    def clips(self, index, size=None) -> tuple[list[np.ndarray], list[str]]:
        """A list of [3, T, H, W] uint8 arrays, and a list of their captions.

        index [n] clip numbers; size [n, 3] overrides their T: 1 for the first frame alone; more for
        a longer part of the file. A clip that cannot be decoded is black, and among the `lost`.
        """
        size = self.size(index) if size is None else size
        jobs, found = self.jobs(index, size), []
        started = {
            key: self.ready.pop(key, None) or self.workers.submit(read_window, *job)
            for key, job in jobs.items()
        }
        for (number, T), (path, _, _, shape) in jobs.items():
            clip = self.workers.result(started[number, T])
            if isinstance(clip, str):
                name = path.relative_to(self.root).as_posix()
                if name not in self.broken:
                    warn(path, clip)
                self.broken[name] = clip
                self.lost.add(number)
                clip = np.zeros((3, T, *shape), np.uint8)
            found.append(clip)
        return found, self.captions(index)

    # Batches of one size, for the VAE.

    @lru_cache(4)  # noqa: B019
    def groups(self, number: int, count: int) -> list[np.ndarray]:
        """An epoch's clips, in groups of one size: as many numbers as `count` of the largest size
        have pixels for, at most 4 count. The groups are in random order."""
        order, N = self.epoch(number)[0], len(self.file)
        sizes, kind = np.unique(self.sizes[order], axis=0, return_inverse=True)
        volume, groups = sizes.prod(1), []
        for k in range(len(sizes)):
            members = number * N + np.flatnonzero(kind.ravel() == k)  # in the epoch's order
            most = int(np.clip(count * volume.max() // volume[k], 1, 4 * count))
            groups += [members[i : i + most] for i in range(0, len(members), most)]
        shuffle = np.random.default_rng([self.seed, 12, number]).permutation(len(groups))
        return [groups[k] for k in shuffle]

    def group(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Group `number` of all epochs: its clips' numbers [n] and their size [n, 3]."""
        each = len(self.groups(0, count))  # in every epoch
        index = self.groups(number // each, count)[number % each]
        return index, self.size(index, images=0.0)

    def taught(self, step: int, parts: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The clips of each part of a batch for the captioner: a group each, of one size, together
        about as many pixels as `count` of the largest have."""
        count = -(-count // parts)
        return [self.group(step * parts + part, count) for part in range(parts)]

    def batch(self, step: int, part: int, parts: int, count: int) -> tuple[list, float]:
        """One of `parts` of a batch, and its share of it: clips of one size, another one each step,
        in all as many pixels as its share of `count` clips of the largest size; in every eighth
        step their first frames."""
        count = -(-count // parts)
        coming = [self.group((step + k) * parts + part, count) for k in range(8)]
        for k, (index, size) in enumerate(coming):
            size[:, 0] = 1 if (step + k) % 8 == 0 else size[:, 0]
            self.prefetch(*(np.concatenate(x) for x in zip(*coming[k : k + 4], strict=True)))
            clips = self.clips(index, size)[0]
            clips = [c for i, c in zip(index.tolist(), clips, strict=True) if i not in self.lost]
            if clips:  # else the whole group is broken: the next one instead
                return clips, 1 / parts
        raise ValueError(f"{self.root}: not one of many clips can be read any more")

    def examples(self, count: int):
        """Batches to measure the VAE's latents on: all sizes, in the share that they have."""
        return (self.batch(step, 0, 1, count)[0] for step in range(1, 33) if step % 8)

    def summary(self) -> str:
        """One line: what was found."""
        videos, seconds = int((self.length > 1).sum()), self.length.sum() / self.config.fps
        return (
            f"{self.root}: {videos} videos of {seconds:.0f} seconds, {len(self.length) - videos} "
            f"images; {self.config.windows} clips of {len(np.unique(self.sizes, axis=0))} sizes; "
            f"{sum(map(bool, self.shown))} files have captions; {len(self.broken)} are broken"
        )

    def close(self) -> None:
        """End all processes, and say again what could not be used."""
        self.workers.close()
        for name, reason in sorted(self.broken.items()):
            tqdm.write(f"not used: {self.root / name}: {reason}", file=sys.stderr)


# --------------------------------------------------------------------------------------------- demo


def demo_files(root: Path) -> None:
    """Three files to look at, where nobody has named a folder."""
    y, x = np.mgrid[:90, :160]
    ball = [np.hypot(y - 45 - 30 * np.sin(t / 5), x - 20 - 3 * t) < 15 for t in range(40)]
    clip = np.stack(ball)[None] * np.array([255, 200, 60], np.uint8)[:, None, None, None]
    write_clip(root / "ball.mp4", clip, fps=20)
    write_clip(root / "tall.gif", clip[:, ::2].swapaxes(2, 3), fps=10)
    write_clip(root / "still.png", clip[:, :1])
    (root / "ball.txt").write_text("a yellow ball in waves")
    (root / "cut.mp4").write_bytes((root / "ball.mp4").read_bytes()[:1500])


def main(root: str | None) -> None:
    with TemporaryDirectory() as made:
        if root is None:
            demo_files(Path(made))
        begun = time.perf_counter()
        clips = Folder(root or made, FolderConfig(), workers=os.cpu_count())
        took, N = time.perf_counter() - begun, clips.config.windows
        print(f"{clips.summary()}; index in {took:.2f} s")
        for (T, H, W), count in Counter(map(tuple, clips.sizes.tolist())).most_common(10):
            print(f"  {count:6d} windows of {T} x {H} x {W}")
        index = np.arange(min(N, 12))
        begun = time.perf_counter()
        shown, captions = clips.clips(index, clips.size(index, images=0.0))
        print(f"{len(index) / (time.perf_counter() - begun):.0f} windows a second decoded")
        contact_sheet(shown, [caption or "(no caption)" for caption in captions]).save(
            "folder_demo.png"
        )
        print("wrote folder_demo.png")
        clips.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
    except (ValueError, OSError) as error:
        sys.exit(print(f"folder.py: {error}", file=sys.stderr) or 2)
