"""Decoding: any part of a video or image file, at any size and frame rate, in other processes.

The problem. A training wants a few frames out of the middle of a large file, small, upright and at
its own frame rate, thousands of times a minute. Files lie: about their frame rate (it varies),
their shape (a phone was turned), their length (the download broke off). Some crash their decoder.

The idea. Ask for *times*, not for frames. What is on the screen at a time is the last frame that
has begun by then, whatever the frame rate:

    frames of the file   |--0--|--1--|-----2-----|3|3|--4--|         each from its own time stamp on
    times asked for         ^     ^     ^     ^     ^     ^
    given                   0     1     2     2     4     4

Only the way there is decoded: from the last key frame before the first time. Each frame that is
given is scaled while it is converted to RGB, and turned as the file says. `probe` says how large
and how long a file is, without decoding more than a frame. `Workers` are processes that do either;
one that dies is replaced, and its file is called broken.

Videos go through av (FFmpeg), which imageio's plug-in for them is made of, too, but that counts
frames at a constant rate. Images and GIFs go through Pillow.

Alphabet: T frames of H x W pixels; a clip is uint8 [3, T, H, W].
"""

import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence

from clips import MOST_PIXELS, VIDEO, picture_pixels, to_colors

PICTURE = (".gif", ".png", ".jpg", ".jpeg", ".webp")
CLOSE = 1e-3  # seconds; time stamps are rounded

# ------------------------------------------------------------------------------ looking at one file


def probe(path: Path) -> dict:
    """How large and how long a file is, upright: height, width; seconds; and when it starts and its
    last frame begins, in its own time stamps. Raises what a decoder raises, for a broken file."""
    if not path.stat().st_size:
        raise ValueError("an empty file")
    found = (probe_video if path.suffix.lower() in VIDEO else probe_picture)(path)
    if found["height"] * found["width"] > MOST_PIXELS:
        raise ValueError(f"more than {MOST_PIXELS} pixels in a frame")
    return found


def probe_video(path: Path) -> dict:
    """Nothing but the first frame is decoded; the time stamps are those of the packets."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.pts is not None]
        damaged = any(p.is_corrupt for p in packets)
        packets = sorted((p.pts, p.duration or 0) for p in packets)
        promised, unit = stream.frames, float(stream.time_base)
        told = stream.metadata.get("DURATION", "0:0:0").split(":")  # WebM's, for its video
    if not packets:
        raise ValueError("no frames in it")
    start, (last, duration) = packets[0][0] * unit, packets[-1]
    if not duration:  # of the last frame, where nobody says it: as long as the others
        duration = (last - packets[0][0]) / max(1, len(packets) - 1)
    seconds = (last + duration) * unit - start
    told = sum(float(part) * 60**k for k, part in enumerate(reversed(told)))
    # 0 where the file does not say
    if damaged or len(packets) < promised or seconds + start < told - 0.5:
        raise ValueError(f"cut off after {seconds:.1f} seconds")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        H, W = frame.height, frame.width * float(stream.sample_aspect_ratio or 1)
        H, W = (W, H) if frame.rotation % 180 else (H, W)
    found = {"height": round(H), "width": round(W), "seconds": seconds}
    return found | {"start": start, "last": last * unit}


def probe_picture(path: Path) -> dict:
    """A picture has no length, but for a GIF or WebP that moves."""
    Image.MAX_IMAGE_PIXELS = None  # `probe` has a stricter limit
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS} pixels in a frame")
        if image.format == "GIF" and b";" not in path.read_bytes()[-16:]:
            raise ValueError("a GIF that is cut off")  # Pillow would show what there is
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientation: lying on a side
        H, W = (image.width, image.height) if turned else (image.height, image.width)
        lengths = []
        for frame in ImageSequence.Iterator(image):
            frame.load()  # all of it is there; and only then WebP says how long
            lengths.append(length_of(frame))
    moves = len(lengths) > 1
    found = {"height": H, "width": W, "seconds": sum(lengths) if moves else 0.0, "start": 0.0}
    return found | {"last": sum(lengths[:-1]) if moves else 0.0}


def length_of(frame: Image.Image) -> float:
    """In seconds; what says 0 is shown for a tenth of a second, as browsers do."""
    return frame.info.get("duration", 0) / 1000 or 0.1


# ------------------------------------------------------------------------------ pixels of a window


def read_window(path: Path, times: np.ndarray, last: float, size: tuple[int, int]) -> np.ndarray:
    """What a file shows at `times` (seconds, rising, [T]), scaled to `size`: uint8 [3, T, H, W].

    last: when its last frame begins. Raises what a decoder raises, for a broken file.
    """
    if path.suffix.lower() in VIDEO:
        frames = read_video(path, times, last, size)
    else:
        frames = read_picture(path, times, last, size)
    return np.ascontiguousarray(np.stack(frames).transpose(3, 0, 1, 2))


def read_video(path: Path, times, last: float, size: tuple[int, int], seek=True) -> list:
    """Frames [H, W, 3]. Decoding begins at the last key frame before the first time."""
    taken, shown = [], None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # there are as many processes as there should be
        if seek:
            container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if shown is None and seek and frame.time > times[0] + CLOSE:
                return read_video(path, times, last, size, seek=False)  # it cannot seek: from 0
            while shown is not None and len(taken) < len(times):
                if times[len(taken)] >= frame.time - CLOSE:
                    break
                taken.append(video_pixels(shown, size))
            shown = frame
            if len(taken) == len(times):
                return taken
    if shown is None or shown.time < last - CLOSE:
        raise ValueError(f"breaks off after {shown.time if shown else 0:.1f} seconds")
    stays = video_pixels(shown, size)  # the last frame stays until the end
    return taken + [stays] * (len(times) - len(taken))


def video_pixels(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """One frame, scaled and upright: [H, W, 3]."""
    if frame.is_corrupt:
        raise ValueError(f"its data are damaged at {frame.time:.1f} seconds")
    H, W = size[::-1] if frame.rotation % 180 else size
    pixels = frame.reformat(W, H, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90))  # both count counterclockwise


def read_picture(path: Path, times: np.ndarray, last: float, size: tuple[int, int]) -> list:
    """Frames [H, W, 3]."""
    taken, begin, (H, W) = [], 0.0, size
    with Image.open(path) as image:
        image.draft("RGB", (2 * max(size), 2 * max(size)))  # a large JPEG is decoded smaller
        for frame in ImageSequence.Iterator(image):
            frame.load()
            end = np.inf if begin >= last - CLOSE else begin + length_of(frame)
            still = int((times[len(taken) :] < end - CLOSE).sum())
            if still:
                pixels = to_colors(picture_pixels(ImageOps.exif_transpose(frame)), 3)
                scaled = Image.fromarray(pixels).resize((W, H), Image.Resampling.BICUBIC)
                taken += [np.asarray(scaled)] * still
            if len(taken) == len(times):
                return taken
            begin = end
    raise ValueError(f"breaks off after {begin:.1f} seconds")


# ---------------------------------------------------------------------------------- many processes


def start_worker(parent: int) -> None:
    """A worker leaves signals to its parent, and ends with it even if that is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempt(function, *args):
    """The result; or, as a string, why there is none. People's files make decoders raise
    anything."""
    try:
        return function(*args)
    except Exception as error:
        ours = isinstance(error, ValueError) and not isinstance(error, av.FFmpegError)
        return str(error) if ours else f"not a readable clip ({type(error).__name__})"


class Workers:
    """Processes that do `attempt`s; none at all for count = 0, where all is done here and now."""

    def __init__(self, count: int):
        self.count, self.pool = count, None
        if count:
            self.start()

    def start(self) -> None:
        # Forked, as PyTorch's DataLoader does it: a new interpreter would load PyTorch again.
        context = get_context("fork" if sys.platform == "linux" else None)
        self.pool = ProcessPoolExecutor(self.count, context, start_worker, (os.getpid(),))

    def submit(self, function, *args) -> Future:
        if not self.count:
            future = Future()
            future.set_result(attempt(function, *args))
            return future
        try:
            future = self.pool.submit(attempt, function, *args)
        except BrokenProcessPool:
            self.start()
            future = self.pool.submit(attempt, function, *args)
        future.job = (self.pool, function, args)
        return future

    def result(self, future: Future):
        """What `attempt` gave. A job whose process died is tried once more, alone: it may have been
        another one that killed it."""
        try:
            return future.result()
        except BrokenProcessPool:
            pool, function, args = future.job
            if pool is self.pool:
                self.start()
        try:
            return self.submit(function, *args).result()
        except BrokenProcessPool:
            self.start()
            return "its decoder crashed"

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
