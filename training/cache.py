"""Clips that take long to decode, decoded once: their pixels in a memory-mapped file of the run.

A step wants a few windows of 17 small frames, each somewhere inside a large video: to decode them
again and again takes longer than to learn from them. All windows of a folder are some megabytes, or
a few gigabytes. So they are decoded before the first step. Each is marked when it is there, so that
what was interrupted goes on from there.
"""

import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Clip, World
from training.loop import STOP
from training.processes import barrier, made_ahead, rank, ranks

MOST = 2**33  # bytes; more are decoded anew each time
AT_ONCE = 16  # clips


def open_files(folder: Path, stamp: str, sizes: tuple[int, int]) -> list[np.ndarray]:
    """Bytes in files, zero at first: of pixels, and of which clips are there."""
    if not (folder / f"{stamp}.done").exists() and rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of clips that were others
        folder.mkdir()
        for end, size in zip(("pixels", "done"), sizes, strict=True):
            with open(folder / f"{stamp}.{end}", "wb") as file:  # a full disk says so here
                for k in range(0, size, 2**24):
                    file.write(bytes(min(2**24, size - k)))
    barrier()
    return [np.memmap(folder / f"{stamp}.{end}", np.uint8, "r+") for end in ("pixels", "done")]


def decode_once(world: World, folder: Path, workers: int) -> None:
    """Decode all clips of a world, each process its share; from then on the world reads them."""
    sizes, decode = world.sizes(np.arange(len(world))), world.clips  # [N, 3]
    ends = np.cumsum(sizes.prod(1) * world.colors)  # [N]: where the bytes of each clip end
    if ends[-1] > MOST:
        return
    pixels, done = open_files(folder, world.stamp(), (ends[-1], len(world)))

    def clips(i, image=False, later=0, frames: int | None = None) -> list[Clip | None]:
        i = np.asarray(i)
        T = np.full(len(i), frames or 1) if frames or image else sizes[i, 0]
        if np.any(later) or (T > sizes[i, 0]).any():  # more than what is kept
            return decode(i, image, later, frames)
        lacking, found = np.unique(i[done[i] == 0]), world.told(i)
        for k, clip in zip(lacking, decode(lacking) if len(lacking) else (), strict=True):
            if clip:
                pixels[ends[k] - clip.pixels.size : ends[k]] = clip.pixels.ravel()
                done[k] = 1
        for k, clip, n in zip(i, found, T, strict=True):
            shape = (world.colors, *sizes[k])
            clip.pixels = pixels[ends[k] - np.prod(shape) : ends[k]].reshape(shape)[:, :n].copy()
        return [clip if done[k] else None for k, clip in zip(i, found, strict=True)]

    todo = np.array_split(np.flatnonzero(done == 0), ranks())[rank()]
    some = range(0, len(todo), AT_ONCE)  # neighbours: Folder decodes those of a video in one pass
    ready = made_ahead(lambda k: len(clips(todo[k : k + AT_ONCE])), some, workers)
    quiet = rank() > 0 or not len(todo)
    for _ in tqdm(ready, "decode", unit="clip", unit_scale=AT_ONCE, disable=quiet):
        if STOP:
            raise SystemExit("stopped while decoding; the same command continues")
    barrier()
    world.clips = clips
