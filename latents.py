"""Latents on disk: encode your clips once, and train at the speed of the transformer.

The problem. In every epoch the same files are decoded and sent through the same VAE, which does not
learn any more. For large videos that takes longer than the training step.

The idea. Do it once. Each process appends to a shard of its own, two files:

    latents/00003.bin   float16, clip after clip    a memory map: only what is used is read
    latents/00003.idx   int64 [n, 6], a row a clip  number, where in .bin, t, h, w, whether frames
                                                    are given
    one clip in .bin    first  [Z, 1, h, w]         its first frame alone, an image; and if t > 1
                        latent [Z, t, h, w]         the clip
                        given  [Z + ft, t, h, w]    what is shown of given frames, where there are

A row is written after its numbers, and all rows of a group at once. So what has a row is whole,
whatever interrupts; to continue is to do the groups that have none yet, on any number of processes.
A clip without a row was broken. The number says which of the folder's windows it is, of which turn.

Half precision is enough: latents have variance 1, and float16 is exact to 1 in 2,000. `about` says
which VAE and which files they were made of: those of another are refused.

Alphabet: Z channels and t frames of h x w in the latent grid; ft frames to a latent.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

COLUMNS = 6


def write_about(folder: Path, about: dict) -> None:
    part = folder / f"about.{os.getpid()}"
    part.write_text(json.dumps(about) + "\n")
    os.replace(part, folder / "about.json")


def read_about(folder: Path) -> dict:
    path = folder / "about.json"
    return json.loads(path.read_text()) if path.exists() else {}


def begin(folder: Path, about: dict) -> None:
    """Before encoding, on each process. ValueError if another VAE or other files were there."""
    folder.mkdir(parents=True, exist_ok=True)
    if read_about(folder):
        check(folder, about)
    write_about(folder, about | {"complete": 0})


def end(folder: Path, turns: int) -> None:
    """When all is encoded, `turns` times."""
    write_about(folder, read_about(folder) | {"complete": turns})


def complete(folder: Path, about: dict) -> None:
    """Before training. ValueError if not all is encoded, or not by this VAE."""
    check(folder, about)
    if not read_about(folder)["complete"]:
        raise ValueError(f"{folder} is incomplete: --stage encode goes on; or delete that folder")


def check(folder: Path, about: dict) -> None:
    was = read_about(folder)
    for name, value in about.items():
        if was.get(name) != value:
            raise ValueError(
                f"{folder} was encoded with {name} {was.get(name)}, and now it is {value}: "
                "delete that folder, and run --stage encode again"
            )


def read_rows(path: Path) -> np.ndarray:
    """[n, 6]; without a row that was torn."""
    rows = np.fromfile(path, np.int64)
    return rows[: len(rows) // COLUMNS * COLUMNS].reshape(-1, COLUMNS)


class Shard:
    """Where one process writes."""

    def __init__(self, folder: Path, rank: int, channels: int):
        self.channels = channels  # Z
        self.numbers, self.rows = (folder / f"{rank:05d}{end}" for end in (".bin", ".idx"))
        for path in (self.numbers, self.rows):
            path.touch()
        read_rows(self.rows).tofile(self.rows)  # without what was torn
        os.truncate(self.numbers, self.numbers.stat().st_size // 2 * 2)

    def append(self, clips: list[tuple[int, Tensor, Tensor]]) -> None:
        """clips: the number of each; its first frame alone as an image, and all of it, as latents
        and what is shown of given frames [Z + Z + ft, t, h, w]."""
        rows, parts, Z = [], [], self.channels
        at = self.numbers.stat().st_size // 2
        for number, first, clip in clips:
            latent, given = clip[:Z], clip[Z:]
            some, grid = bool(given.any()), latent.shape[1:]
            wanted = [first[:Z]] + [latent] * (grid[0] > 1) + [given] * some
            flat = torch.cat([part.flatten().cpu().half() for part in wanted]).numpy()
            rows.append([number, at, *grid, some])
            parts.append(flat)
            at += len(flat)
        for path, what in ((self.numbers, parts), (self.rows, [np.array(rows, np.int64)])):
            with open(path, "ab") as file:
                file.write(b"".join(part.tobytes() for part in what))


class Latents:
    """What all processes wrote, by number."""

    def __init__(self, folder: Path, channels: int, time_factor: int):
        self.channels, self.time_factor = channels, time_factor
        self.turns = read_about(folder).get("complete", 0)  # how many times each window is encoded
        self.shards, self.where = [], {}
        for path in sorted(folder.glob("*.idx")):
            rows, numbers = read_rows(path), path.with_suffix(".bin")
            if len(rows):
                self.shards.append(np.memmap(numbers, np.float16, "r"))
                self.where |= {row[0]: (len(self.shards) - 1, *row[1:]) for row in rows.tolist()}

    def __contains__(self, number: int) -> bool:
        return number in self.where

    def read(self, number: int, image: bool) -> Tensor:
        """Clip `number`, or its first frame alone: [Z + Z + ft, t, h, w]."""
        shard, at, t, h, w, some = self.where[number]
        Z, ft = self.channels, self.time_factor

        def take(*shape: int) -> Tensor:
            nonlocal at
            count = int(np.prod(shape))
            values, at = self.shards[shard][at : at + count].astype(np.float32), at + count
            return torch.from_numpy(values).view(*shape)

        latent = take(Z, 1, h, w)
        if image or t == 1:
            return torch.cat([latent, latent.new_zeros(Z + ft, 1, h, w)])
        latent = take(Z, t, h, w)
        given = take(Z + ft, t, h, w) if some else latent.new_zeros(Z + ft, t, h, w)
        return torch.cat([latent, given])
