"""A folder of your own videos and images, as numbered clips at their native size.

The problem. People's files have every size, shape, frame rate and length, and some are broken. A
training wants numbered clips whose sizes it knows long before it needs their pixels, the same ones
in every process and after every restart.

The idea. Look at each file once, and remember how large and how long it is: the index. All else is
arithmetic on it. Clip i is a *window*, a part of a video of at most `longest` frames:

  * shape: scaled down to about `pixels` pixels, with sides on the patch grid. Never cropped, never
    enlarged, and stretched by no more than the grid asks for (the report: training at native size
    frames and composes better than on square crops). A turned phone's video is upright. sample.py
    reads people's prompts in the same way.
  * time: frame j is what the file shows j / fps seconds after its start, by its own time stamps. A
    video of F such frames gives F // longest windows side by side, or one of 1 + unit k frames. The
    spare frames lie where a hash of the file's name puts them. An image is a window of one frame.

    a video of 47 frames, longest = 17   |   --- 17 --- --- 17 ---    |   2 windows, 13 spare
    a video of 12 frames, unit = 4       | -- 9 --  |                     1 window, 3 spare

Captions: `name.txt` beside `name.mp4`, or lines {"file": "sub/name.mp4", "caption": "a dog"} in
captions.jsonl in the folder. media.py reads the pixels.

Alphabet: F frames of a file, T of a clip, H x W pixels; n numbers are asked for at once.

Run `python -m worlds.folder FOLDER` to look at your files first: sizes, captions, broken files.
"""

import json
import os
import sys
import unicodedata
import zlib
from argparse import ArgumentParser
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Clip, World, WorldConfig, hashed_uniform, sheet
from worlds.media import PICTURES, VIDEO, fitted, made_by_us, probe, read

KINDS = VIDEO + PICTURES
DEMO = "folder_demo.png"  # what `main` draws
INDEX = ".clips-index.jsonl"  # in the folder, so that every run uses it
VERSION = 3  # of `probe`: what an older one found is looked at again

# ------------------------------------------------------------------------------ files and captions


def find_files(root: Path) -> list[str]:
    """Names of all files below a folder, sorted. Links to folders count; hidden files don't, nor
    do runs of train.py: else a model would learn from its own samples."""
    found, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        known = os.path.realpath(folder) in seen  # a link leads back
        seen.add(os.path.realpath(folder))
        known |= "config.json" in names and "samples" in below
        below[:] = [x for x in below if x[0] != "." and not known]
        names = [x for x in names if x[0] != "." and not known and x != DEMO]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def look_at(path: Path) -> dict:
    """What `probe` says of a file, or why it can't be used."""
    try:
        return {"broken": "made by sample.py"} if made_by_us(path) else probe(path)
    except (ValueError, OSError) as error:
        return {"broken": str(error).removeprefix(f"{path}: ")}


def make_index(root: Path, names: list[str]) -> dict[str, dict]:
    """{name: what `look_at` says}. Only files that are new or have changed are looked at; broken
    ones also where their permissions have."""
    known, index, k = {}, {}, 0
    try:
        lines = (root / INDEX).read_text("utf-8").splitlines()
        known = {x["file"]: x for x in map(json.loads, lines) if x["stamp"][0] == VERSION}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours
    for name in names:
        stat = (root / name).stat() if (root / name).exists() else None  # None: a link to nowhere
        stamp = [VERSION, stat.st_mtime_ns, stat.st_size] if stat else [VERSION]
        entry = {"file": name, "stamp": stamp, "ctime": stat.st_ctime_ns if stat else 0}
        was = known.get(name, {"stamp": []})
        mended = "broken" in was and was["ctime"] != entry["ctime"]
        index[name] = entry if mended or was["stamp"] != stamp else was
    new = [name for name in names if len(index[name]) == 3]
    gone, first = len(known.keys() - index.keys()), sum(name not in known for name in new)
    if known and (new or gone):
        warn(f"{root}: {first} new, {len(new) - first} changed, {gone} gone")
    workers = min(8, os.cpu_count() or 1) if len(new) > 16 else 0
    paths = [root / name for name in new]
    loader = DataLoader(paths, batch_size=None, collate_fn=look_at, num_workers=workers)
    try:
        for k, found in enumerate(tqdm(loader, "index", unit="file", disable=len(new) < 100), 1):
            index[new[k - 1]] |= found
            if "broken" in found:
                warn(f"skipped {root / new[k - 1]}: {found['broken']}")
    except RuntimeError:  # a worker died
        near = ", ".join(new[k : k + 2 * workers])
        raise ValueError(f"{root}: a decoder crashes: take one of these away: {near}") from None
    finally:  # also when interrupted
        if new or gone:
            write_index(root / INDEX, [x for x in index.values() if len(x) > 3])
    return index


def write_index(path: Path, entries: list[dict]) -> None:
    try:
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text("".join(json.dumps(x) + "\n" for x in entries), "utf-8")
        os.replace(part, path)
    except OSError:
        pass  # a folder that can only be read: it is looked at again each time


def parse_lines(path: Path) -> list[tuple[str, str | None]]:
    """(file, caption) of each line of a captions.jsonl; None where it is null. ValueError names a
    line that is none."""
    found = []
    for number, line in enumerate(read_text(path).split("\n") if path.exists() else [], 1):
        try:
            if line.strip():
                entry = json.loads(line)
                file, said = entry["file"] + "", entry["caption"]  # a number is no name
                found.append((file, said if said is None else " ".join(said.split())))
        except (ValueError, KeyError, TypeError, AttributeError):
            form = '{"file": "a.mp4", "caption": "a dog"}'
            raise ValueError(f"{path}, line {number}: each line is like {form}") from None
    return found


def same_name(name: str) -> str:
    """An accented letter is one character or two, as the system pleases that wrote the name."""
    return unicodedata.normalize("NFC", name)


def read_captions(root: Path, names: list[str], others: list[str]) -> dict[str, str]:
    """{name: caption} of files that have one: from beside them, or else from captions.jsonl. Names
    the `others` that are of no use."""
    path, captions, unused = root / "captions.jsonl", {}, {}
    known = {same_name(x): x for x in names}
    for file, caption in parse_lines(path):
        if not caption:
            continue
        file = Path(os.path.relpath(root / file.replace("\\", "/"), root)).as_posix()
        name = known.get(same_name(file), file)
        if same_name(file) in known and name not in captions:
            captions[name] = caption
        else:
            unused.setdefault("lines of captions.jsonl", []).append(name)
    if unused and not captions:
        raise ValueError(f"{path} names none of the {len(names)} files that are there")
    texts = {same_name(x[:-4]): x for x in others if x.lower().endswith(".txt")}
    beside = {name: texts.get(same_name(os.path.splitext(name)[0])) for name in names}
    captions |= {name: " ".join(read_text(root / x).split()) for name, x in beside.items() if x}
    for name in sorted(set(others) - set(beside.values()) - {path.name}):
        unused.setdefault(Path(name).suffix.lower() or "files without a suffix", []).append(name)
    if unused:
        left = (f"{len(x)} {kind}, as {', '.join(x[:3])}" for kind, x in unused.items())
        warn(f"left alone in {root}: {'; '.join(left)}")
    return {name: said for name, said in captions.items() if said}


def read_text(path: Path) -> str:
    """UTF-8; as Windows writes it, too: with a mark in front, or UTF-16."""
    raw = path.read_bytes()
    code = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(raw[:2], "utf-8-sig")
    if b"\0" in raw[:2]:  # without a mark
        code = "utf-16-be" if raw[0] == 0 else "utf-16-le"
    try:
        return raw.decode(code)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: neither UTF-8 nor UTF-16: save it as UTF-8") from None


def warn(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of all processes of a training, one
        tqdm.write(line, file=sys.stderr)


# ----------------------------------------------------------------------------------------- windows


class Folder(World):
    colors, briefs, slow = 3, False, True  # one caption a clip, at most; decoding takes long
    sampling = {"guidance": 1.5, "alone": 0.0}  # with few clips, more burns their colours

    def __init__(self, config: WorldConfig):
        super().__init__(config)
        self.root, self.broken = Path(config.kind), {}
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder, nor a world of that name")
        found = find_files(self.root)
        names = [name for name in found if Path(name).suffix.lower() in KINDS]
        self.files, shapes = [], []
        for name, file in make_index(self.root, names).items():
            try:
                if "broken" in file:
                    raise ValueError(file["broken"])
                shapes.append(fitted(file["height"], file["width"], config.pixels, config.multiple))
                self.files.append(file)
            except ValueError as error:
                self.broken[name] = str(error)
        if not self.files:
            why = f"none of its {len(names)} files can be used" if names else "no file of "
            raise FileNotFoundError(f"{self.root}: {why}{'' if names else ' '.join(KINDS)}")
        said = read_captions(self.root, names, sorted(set(found) - set(names)))
        self.captions = {x["file"]: said[x["file"]] for x in self.files if x["file"] in said}
        self.arrange(np.array(shapes))

    def arrange(self, shapes: np.ndarray) -> None:
        """The windows of the files, whose shapes are [files, 2]."""
        c, unit = self.config, self.config.unit
        longest = 1 + (max(c.durations) - 1) // unit * unit
        # F frames of ours in each file; of its windows, how many there are, and of how many frames.
        seconds = np.array([file["seconds"] for file in self.files])
        self.length = np.maximum(1, (seconds * c.fps + 1e-3).astype(int))  # [files]
        T = np.minimum(1 + (self.length - 1) // unit * unit, longest)
        count = np.where(T < longest, 1, self.length // longest)
        self.keys = np.array([zlib.crc32(file["file"].encode()) for file in self.files])
        spare = hashed_uniform(c.seed, self.keys, 1)[:, 0] * (self.length - count * T + 1)
        self.file = np.repeat(np.arange(len(count)), count)  # [N]; each window's
        part = np.arange(len(self.file)) - (np.cumsum(count) - count)[self.file]  # 0 1 2 0 0 1
        self.start = spare.astype(int)[self.file] + part * T[self.file]  # [N]
        self.windows = np.column_stack([T, shapes])[self.file]  # [N, 3]
        self.durations = tuple(np.unique(self.windows[:, 0]).tolist())
        moves = self.windows[:, 0] > 1
        shapes = (self.windows[which, 1:].tolist() for which in (moves, ~moves))
        videos, images = (Counter(map(tuple, some)) for some in shapes)
        self.shapes = tuple(shape for shape, _ in (videos or images).most_common(8))
        images = (shape for shape, _ in images.most_common(8))
        self.image_shapes = tuple(shape for shape in images if shape not in self.shapes)

    def __len__(self) -> int:
        return len(self.file)

    def sizes(self, i, image: bool = False) -> np.ndarray:
        return np.where([image, False, False], 1, self.windows[i])

    def frames(self, i) -> np.ndarray:
        return (self.length[self.file] - self.start)[i]

    def labelled(self, i) -> np.ndarray:
        return np.array([bool(clip.caption) for clip in self.told(i)], bool)

    def held_back(self, i) -> np.ndarray:
        """About 2% of the files, with all their windows; of fewer than 20 files, none."""
        u = hashed_uniform(self.config.seed + 2**35, self.keys, 1)[self.file[i], 0]
        return (u < 0.02) & (len(self.files) >= 20)

    def told(self, i, image: bool = False, later=0, frames: int | None = None) -> list[Clip]:
        names = [self.files[k]["file"] for k in self.file[i]]
        return [Clip(name, self.captions.get(name, "")) for name in names]

    def clips(self, i, image=False, later=0, frames: int | None = None) -> list[Clip | None]:
        """Windows that follow each other in a video are decoded in one pass."""
        clips, sizes, first = self.told(i), self.sizes(i, image), self.start[i] + later
        sizes[:, 0] = frames or sizes[:, 0]
        after = np.diff(self.file[i], prepend=-1) == 0
        after[1:] &= first[1:] >= (first + sizes[:, 0])[:-1]
        todo = np.split(np.arange(len(clips)), np.flatnonzero(~after)[1:])
        while todo and len(some := todo.pop(0)):
            (_, H, W), file = sizes[some[0]].tolist(), self.files[self.file[i[some[0]]]]
            name, frame = file["file"], [first[k] + np.arange(sizes[k, 0]) for k in some]
            path = self.root / name
            try:
                times = np.concatenate(frame) / self.fps
                pixels = read(path, times, (H, W), self.colors, file)
                parts = np.split(pixels, np.cumsum(sizes[some, 0])[:-1], axis=1)
                for k, part in zip(some, parts, strict=True):
                    clips[k].pixels = part
            except ValueError as error:
                if len(some) > 1:  # those before the fault are whole
                    todo = [*np.split(some, len(some)), *todo]
                    continue
                if name not in self.broken:
                    warn(f"skipped {error}")
                self.broken[name] = str(error).removeprefix(f"{path}: ")
                clips[some[0]] = None
        return clips

    def prompts(self, n: int) -> list[tuple[str, tuple[int, int, int]]]:
        """Captions, each once, and sizes of the first files that have one; or of any files."""
        i = np.unique(self.file, return_index=True)[1]
        i = i[self.labelled(i)] if self.captions else i[:n]
        said = [clip.caption for clip in self.told(i)]
        if self.captions:
            first = np.sort(np.unique(said, return_index=True)[1])[:n]
            i, said = i[first], [said[k] for k in first]
        return list(zip(said, map(tuple, self.sizes(i).tolist()), strict=True))

    def stamp(self) -> str:
        what = [[file["file"], file["stamp"]] for file in self.files]
        what.append(asdict(self.config) | {"kind": ""})  # the same folder may have other paths
        return f"{zlib.crc32(json.dumps(what).encode()):08x}"

    def summary(self) -> str:
        """One line: what was found."""
        videos, seconds = int((self.length > 1).sum()), self.length.sum() / self.fps
        found = f"{videos} videos of {seconds:.0f} seconds, {len(self.length) - videos} images"
        found += f"; {len(self)} clips of {len(np.unique(self.windows, axis=0))} sizes"
        has = f"{len(self.captions)} files have captions; {len(self.broken)} are broken"
        return f"{self.root}: {found}; {has}"

    def close(self) -> None:
        """Say again what could not be used."""
        for name, reason in sorted(self.broken.items()):
            warn(f"not used: {self.root / name}: {reason}")


WORLD = Folder

# --------------------------------------------------------------------------------------------- demo


def cuts(clip: np.ndarray) -> np.ndarray:
    """Which frames of [C, T, H, W] begin another scene: bool [T]."""
    steps = np.abs(np.diff(clip.astype(float), axis=1)).mean((0, 2, 3))  # [T - 1]
    return np.append(False, steps > max(25, 4 * np.median(steps) if len(steps) else 0))


def main() -> None:
    parser = ArgumentParser("folder.py", description="Look at a folder's clips before training.")
    parser.add_argument("folder", help="of videos and images")
    parser.add_argument("--pixels", type=int, default=WorldConfig.pixels, help="as in training")
    parser.add_argument("--fps", type=float, default=WorldConfig.fps, help="as in training")
    args = parser.parse_args()
    world = Folder(WorldConfig(args.folder, fps=args.fps, pixels=args.pixels))
    print(world.summary())
    for (T, H, W), count in Counter(map(tuple, world.windows.tolist())).most_common(10):
        print(f"  {count:6d} windows of {T} x {H} x {W}")
    clips = [clip for clip in world.clips(np.arange(min(len(world), 12))) if clip]
    cut, titles = [cuts(clip.pixels) for clip in clips], []
    for clip, where in zip(clips, cut, strict=True):
        size = " x ".join(map(str, clip.pixels.shape[1:]))
        size += f", cut at frame {where.argmax()}" * bool(where.any())
        titles.append(f"{clip.name} ({size}): {clip.caption or '(no caption)'}"[:120])
    after = [where.cumsum() % 2 > 0 for where in cut]  # marked: from a cut to the next one
    sheet([clip.pixels for clip in clips], titles, marks=after).save(DEMO)
    print(f"wrote {DEMO}")
    world.close()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"folder.py: {error}", file=sys.stderr) or 2)
