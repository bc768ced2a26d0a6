"""Media files: reading any part of people's videos and pictures, and writing what was made.

The problem. A training wants a few frames out of the middle of a large file, small, upright and at
its own frame rate. So does a prompt ("animate my photo"), and it must look as it did in training.
Files lie about their frame rate (it varies), their shape (a phone was turned, pixels are not
square), their length (the download broke off) and even their suffix.

The idea. A file is a stream of frames, each with the time at which it begins. Ask for *times*, not
for frames: at a time, a clip shows the last frame that has begun by then.

    frames of the file   |--0--|--1--|-----2-----|3|3|--4--|         each begins at its time stamp
    times asked for         ^     ^     ^     ^     ^     ^
    given                   0     1     2     2     4     4

Decoding starts at the last key frame before the first time, and each frame is scaled as it comes.
`probe` finds how large and how long a file is, `read` its pixels; `Writer` is the way back. Written
files read back the same: .png, .npy, .webp and gray .gif exactly, .mp4 and .webm nearly.

Alphabet: T frames of H x W pixels with C = 1 (gray) or 3 colors; a clip is uint8 [C, T, H, W].
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from data import enlarge

VIDEO = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp",
         ".ogv", ".ts", ".mts", ".m2ts")  # fmt: skip
PICTURES = (".gif", ".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".jfif", ".tif", ".tiff")
SUFFIXES = (".gif", ".mp4", ".webm", ".webp", ".png", ".npy")  # that we write
MOST_PIXELS = 2**25  # of a frame that is read: four times 4K
MOST_NUMBERS = 2**29  # of a clip in memory: half a gigabyte
MADE = "made by a model of sample.py"  # is in what a model made, and is never learned from
BT709, UNTAGGED, PQ, HLG = 1, 2, 16, 18  # how video encodes colours, as FFmpeg counts
CODECS = {  # name, quality, how it becomes a file: in fragments that play by themselves
    ".mp4": ("libx264", {"crf": "12", "tune": "zerolatency"},
             {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ".webm": ("libvpx-vp9", {"crf": "15", "b:v": "0"}, {}),
}  # fmt: skip

# ------------------------------------------------------------------------------ looking at one file


@contextmanager
def naming(path: Path):
    """Any error in here becomes one line that starts with the path."""
    try:
        yield
    except Exception as error:  # people's files make decoders raise anything
        ours = type(error) is ValueError
        reason = str(error) if ours else f"not a readable clip ({type(error).__name__})"
        raise ValueError(f"{path}: {reason}") from None


def probe(path: str | Path) -> dict:
    """What a file holds: kind ("video" or "picture", by its content), number of frames, height and
    width (upright, in square pixels), seconds (0 without motion), its own time stamp at the start,
    and when its last frame begins, in seconds from there."""
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file")
    with naming(path):
        try:  # each frame: only decoding shows that it is there, and how long it lasts
            *seen, (end, _) = [(begin, page and page.info.get("whole", page.size))
                               for begin, page in pictures(path, 1)]  # fmt: skip
        except UnidentifiedImageError:
            return probe_video(path)
    last, (W, H) = seen[-1]
    found = {"kind": "picture", "frames": len(seen), "height": H, "width": W}
    return found | {"start": 0.0, "last": last, "seconds": end if len(seen) > 1 else 0.0}


def probe_video(path: Path) -> dict:
    """Decodes the first frame alone; times are those of the packets."""
    frame, packets = None, []
    with av.open(str(path)) as container:
        stream = moving(container)
        check_size(stream.height, stream.width)
        unit, aspect = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
        for p in container.demux(stream):
            frame = frame or next(iter(p.decode()), None)
            if p.pts is not None:
                packets.append((p.is_corrupt, p.is_discard, p.pts * unit, (p.duration or 0) * unit))
        promised = stream.frames  # 0 where the file does not say
    # A cut without re-encoding discards frames, which are still in the file.
    times = sorted(packet[2:] for packet in packets if not packet[1])
    if frame is None or not times:
        raise ValueError("no frames in it")
    start, (last, lasts) = times[0][0], times[-1]
    seconds = last - start + (lasts or (last - start) / max(1, len(times) - 1))  # as the others
    # An .avi may promise up to two packets that hold no frame.
    if any(packet[0] for packet in packets) or len(packets) < promised - 2:
        raise ValueError(f"cut off or damaged after {seconds:.1f} seconds")
    H, W = frame.height, max(1, round(frame.width * aspect))
    H, W = (W, H) if frame.rotation % 180 else (H, W)
    found = {"kind": "video", "frames": len(times), "height": H, "width": W}
    return found | {"start": start, "last": last - start, "seconds": seconds}


def moving(container):
    """The first video stream that is no cover art."""
    if not (streams := container.streams.video):
        raise ValueError("no video in it")
    cover = Disposition.attached_pic
    return min(streams, key=lambda x: (bool(x.disposition & cover), x.frames == 1))  # the first


def check_size(H: int, W: int) -> None:
    if H * W > MOST_PIXELS:
        raise ValueError(f"{H} x {W} pixels are too many: at most {MOST_PIXELS} are read")


def fitted(H: int, W: int, pixels: int, multiple: int) -> tuple[int, int]:
    """The size at which a file is shown: sides that `multiple` divides, about `pixels` in all. Of
    the four such sizes around the exact one, the one with the nearest shape."""
    scale = min(1.0, (pixels / (H * W)) ** 0.5)
    if min(H, W) * scale < multiple / 2:
        raise ValueError(f"{H} x {W} is too thin: a side would be less than half of {multiple}")
    sides = []
    for side in (H, W):
        low = max(1, int(side * scale / multiple)) * multiple
        sides.append((low, low + multiple * (low < side * scale and low + multiple <= side)))
    stretch = {(h, w): abs(np.log(h * W / (w * H))) for h in sides[0] for w in sides[1]}
    area = {(h, w): abs(np.log(h * w / (H * W * scale**2))) for h, w in stretch}
    return min(stretch, key=lambda size: (round(stretch[size], 6), area[size]))


# ------------------------------------------------------------------------------------------ reading


def read(path: str | Path, times=None, size=None, colors: int = 3, found=None, box=None):
    """What a file shows at `times`, rising seconds from its start (None: ten a second): uint8
    [colors, T, H, W]. size: (H, W) to scale to; found: what `probe` said; box: (left, top, right,
    bottom) to cut out then, black outside. ValueError where the file breaks off."""
    path, found = Path(path), found or probe(path)
    times = np.arange(max(1, round(found["seconds"] * 10))) / 10 if times is None else times
    H, W = size or (found["height"], found["width"])
    if len(times) * H * W * colors > MOST_NUMBERS:
        raise ValueError(f"{path}: too long: {len(times)} x {H} x {W} pixels do not fit in memory")
    video, clip, last, shown = found["kind"] == "video", [], 0.0, None
    close = 0.001 if video else 0.006  # a GIF rounds to hundredths
    with naming(path):
        stream = videos(path, found, times[0]) if video else pictures(path, 2 * max(H, W))
        for begin, frame in chain(stream, [(np.inf, None)]):  # the last one stays
            if frame is None and last < found["last"] - 0.25:  # an .avi may end in empty packets
                raise ValueError(f"cut off or damaged after {last:.1f} seconds")
            if count := int(np.searchsorted(times, begin - close)) - len(clip):
                image = to_image(shown or frame, (H, W), colors)
                clip += [np.asarray(image.crop(box) if box else image)] * count
            if len(clip) == len(times):
                break
            last, shown = begin, frame or shown
    clip = np.stack(clip).reshape(len(clip), *clip[0].shape[:2], colors)  # [T, H, W, colors]
    return np.ascontiguousarray(clip.transpose(3, 0, 1, 2))


def pictures(path: Path, side: int) -> Iterator[tuple[float, Image.Image | None]]:
    """(begin, upright frame) of a picture or .npy; then (end, None). No side is needed larger than
    `side`; info["whole"] has the size of the whole picture."""
    Image.MAX_IMAGE_PIXELS, begin = None, 0.0  # ours is the stricter limit
    if path.suffix.lower() == ".npy":  # mapped, so that a header's false promise costs nothing
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype != np.uint8 or not array.size or array.shape[3:] not in ((), (1,), (3,)):
            raise ValueError(f"{array.dtype} {list(array.shape)}, where uint8 [T, H, W, C] is read")
        for k, frame in enumerate(array):  # without a clock: ten a second
            yield k / 10, Image.fromarray(frame[..., 0] if frame.shape[2:] == (1,) else frame)
        yield len(array) / 10, None
        return
    with Image.open(path) as image:
        whole = image.size
        image.draft("RGB", (side, side))  # decodes a large JPEG smaller
        check_size(image.height, image.width)
        # A phone's JPEG may hold a preview and a depth map besides, as if they were frames.
        moves = image.format in ("GIF", "WEBP", "PNG", "AVIF")
        for frame in ImageSequence.Iterator(image) if moves else [image]:
            frame.load()  # only then is its duration known
            page = ImageOps.exif_transpose(frame)  # a copy
            page.info["whole"] = whole[:: 1 if page.size == frame.size else -1]
            yield begin, page
            lasts = frame.info.get("duration", 0)
            begin += (lasts if lasts > 10 else 100) / 1000  # as in browsers
        yield begin, None


def videos(path: Path, found: dict, first: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(begin, frame) from the last key frame before `first`, or from 0 where it can't seek."""
    with av.open(str(path)) as container:
        stream, seeks = moving(container), first > 0
        stream.codec_context.thread_count = 1  # other processes read other files meanwhile
        if seeks:
            container.seek(int((found["start"] + first) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            begin = frame.time - found["start"]
            if seeks and begin > first + 0.001:
                break
            seeks = False
            yield begin, frame
    if seeks:
        yield from videos(path, found, 0.0)


def to_image(frame, size: tuple[int, int], colors: int) -> Image.Image:
    """One frame, upright and scaled. What is transparent becomes black."""
    if isinstance(frame, av.VideoFrame):
        frame = upright(frame, size)
    elif frame.mode.startswith(("I", "F")):  # 16 bits a pixel
        deep = np.asarray(frame).astype(np.float64)
        frame = Image.fromarray((deep * 255 / max(65535.0, deep.max())).clip(0).astype(np.uint8))
    elif frame.mode not in ("1", "L", "RGB"):
        frame = frame.convert("RGBA")
        frame = Image.alpha_composite(Image.new("RGBA", frame.size, "black"), frame)
    frame = frame.convert("L" if colors == 1 else "RGB")  # gray is luma, ITU-R BT.601
    return frame.resize((size[1], size[0]), Image.Resampling.BICUBIC)  # a copy if it fits


def upright(frame: av.VideoFrame, size: tuple[int, int]) -> Image.Image:
    """A video's frame is scaled while it is converted to RGB, then turned by the file's matrix."""
    if frame.is_corrupt:
        raise ValueError(f"damaged at {frame.time:.1f} seconds")
    W, H = size if frame.rotation % 180 else size[::-1]
    # Players take untagged video for BT.709 in high definition, and for BT.601 below.
    high = frame.width >= 1280 or frame.height > 576
    space = BT709 if frame.colorspace == UNTAGGED and high else None
    how = "AREA" if H * W < frame.height * frame.width else "BICUBIC"
    pixels = frame.reformat(W, H, "rgb24", space, interpolation=how, threads=1).to_ndarray()
    if frame.color_trc in (PQ, HLG):
        pixels = tone_mapped(pixels / 255, frame.color_trc)
    if (side := frame.side_data.get(Type.DISPLAYMATRIX)) is not None:
        a, b, _, c, d = np.frombuffer(side, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
        if frame.rotation % 180:
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return Image.fromarray(pixels)


def tone_mapped(x: np.ndarray, transfer: int) -> np.ndarray:
    """HDR [H, W, 3] in [0, 1], with the colours of BT.2020, as uint8 for an ordinary screen. Light
    up to 3/4 of a white page's stays as it is; what is brighter comes ever closer to white."""
    if transfer == PQ:  # BT.2100, table 4: x -> candela a square metre
        x = x ** (1 / 78.84375)
        light = 10_000 * ((x - 0.8359375).clip(0) / (18.8515625 - 18.6875 * x)) ** 6.2773946
    else:  # table 5: x -> light of the scene -> that of a screen of 1,000 candela
        bright = (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(x < 0.5, x**2 / 3, bright)
        light = 1000 * scene * (scene @ [[0.2627], [0.6780], [0.0593]]) ** 0.2
    to_bt709 = [[1.6605, -0.1246, -0.0182], [-0.5876, 1.1329, -0.1006], [-0.0728, -0.0083, 1.1187]]
    light = (light / 203 @ to_bt709).clip(0)  # 1: a white page (BT.2408)
    light = np.where(light < 0.75, light, 1 - 0.25 * np.exp(3 - 4 * light))
    return (255 * light ** (1 / 2.2)).round().astype(np.uint8)


def read_clip(path: str | Path, colors: int, size: tuple[int, int] | None = None, fit: str = "",
              fps: float = 10, found: dict | None = None) -> tuple[np.ndarray, str]:  # fmt: skip
    """A person's file as uint8 [C, T, H, W], and a line on what was done. size: (H, W) to scale to
    (None: as it is): stretched, or with its own shape, and then what is too much is cut off
    ("crop"), what lacks is black ("pad"). fps: frames a second; 0: the first frame alone."""
    found = found or probe(path)
    H, W = scaled = goal = found["height"], found["width"]
    if size:
        goal, ratios = size, (size[0] / H, size[1] / W)
        ratio = {"crop": max, "pad": min}[fit](ratios) if fit else 0
        scaled = (max(1, round(H * ratio)), max(1, round(W * ratio))) if fit else size
    rate = 10 if fps and Path(path).suffix.lower() == ".npy" else fps  # an array has no clock
    T = max(1, round(found["seconds"] * rate))
    top, left = (int((side - to) / 2) for side, to in zip(scaled, goal, strict=True))
    box, times = (left, top, left + goal[1], top + goal[0]), np.arange(T) / max(1, rate)
    clip = read(path, times, scaled, colors, found, box)
    again = f" at {fps:g} frames a second" * (fps > 0 and T != found["frames"])
    done = [f"{T} x {H} x {W}{again}"]
    if tuple(goal) != (H, W):
        done.append(f"scaled{' and cropped' * (fit == 'crop')}{' and padded' * (fit == 'pad')}"
                    f" to {goal[0]} x {goal[1]}")  # fmt: skip
    if colors == 1 and np.ptp(read(path, times[:1], scaled, 3, found), axis=0).max() > 16:
        done.append("made gray")  # less is a video's rounding
    return clip, f"{path}: {', '.join(done)}"


# ------------------------------------------------------------------------------------------ writing


class Writer:
    """A file that takes chunks uint8 [C, n, H, W], in the format that its suffix names.

    Interrupted (Ctrl-C), it keeps the frames so far; after an error, it leaves no file. Only .mp4
    and .webm stream to disk, and play even after a power cut.
    """

    def __init__(self, path: str | Path, fps: float = 10, scale: int = 1, comment: str = MADE):
        self.path, self.fps, self.scale, self.comment = Path(path), fps, scale, comment
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: write to a name that ends in one of {' '.join(SUFFIXES)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.chunks, self.container = [], None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        keep = kind is None or issubclass(kind, KeyboardInterrupt)
        if keep and self.chunks:
            self.save(np.concatenate(self.chunks, axis=1))
        if self.container:
            self.container.mux(self.stream.encode(None) if keep else [])
            self.container.close()
            if not keep:
                self.path.unlink(missing_ok=True)

    def write(self, chunk: np.ndarray) -> None:
        if self.path.suffix not in CODECS:
            return self.chunks.append(chunk)
        frames = enlarge(chunk, self.scale)  # [n, H, W, 3]
        # Colours at half the resolution, which is what every player plays: even sides.
        even = [(0, side % 2) for side in frames.shape[1:3]]
        frames = np.pad(frames, ((0, 0), *even, (0, 0)), "edge")
        self.container = self.container or self.open(*frames.shape[1:3])
        for frame in frames:
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709)
            self.container.mux(self.stream.encode(frame))

    def open(self, H: int, W: int):
        codec, quality, how = CODECS[self.path.suffix]
        container = av.open(str(self.path), "w", options=how | {"flush_packets": "1"})
        container.metadata["comment"] = self.comment
        quality = quality | {"g": str(round(self.fps))}  # a key frame, and so a fragment, a second
        rate = Fraction(self.fps).limit_denominator(1001)  # 29.97 is 2,997 / 100
        stream = self.stream = container.add_stream(codec, rate=rate, options=quality)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        tags = stream.codec_context
        tags.colorspace = tags.color_primaries = tags.color_trc = tags.color_range = BT709
        return container

    def save(self, clip: np.ndarray) -> None:
        """.npy is uint8 [T, H, W, C] and never scaled; .png a filmstrip; .gif and .webp move."""
        if self.path.suffix == ".npy":
            with renamed(self.path) as part:
                return np.save(part, clip.transpose(1, 2, 3, 0))
        frames = list(enlarge(clip, self.scale))  # T times [H, W, 3]
        frames = [np.concatenate(frames, axis=1)] if self.path.suffix == ".png" else frames
        # What is gray stays gray: a GIF then has each gray, and none changes.
        frames = [x[..., 0].copy() if (x[..., :1] == x).all() else x for x in frames]
        write_gif(self.path, list(map(Image.fromarray, frames)), self.fps, self.comment)


@contextmanager
def renamed(path: str | Path):
    """A name to write to, which becomes `path` when all is there."""
    part = Path(path).with_name(f".{Path(path).stem}.part{Path(path).suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_gif(path: str | Path, pages: list[Image.Image], fps: float = 10, comment=MADE) -> None:
    """Also .webp, and a single .png. Delays are whole hundredths (.webp: thousandths) of a second
    that add up to the right time, and long enough that browsers keep to them."""
    unit, least = (10, 20) if Path(path).suffix == ".gif" else (1, 11)
    ends = (np.arange(len(pages) + 1) * max(1000 / fps, least) / unit).round().astype(int) * unit
    how = {"duration": np.diff(ends).tolist(), "loop": 0, "lossless": True, "comment": comment}
    how["exif"] = Image.Exif()
    how["exif"][0x10E] = comment  # the description: .png and .webp
    with renamed(path) as part:
        pages[0].save(part, save_all=True, append_images=pages[1:], **how)


def made_by_us(path: Path) -> bool:
    """Whether `MADE` is in the file; in all containers as it stands, close to one of the ends."""
    with open(path, "rb") as file:
        start = file.read(2**16)
        file.seek(max(0, path.stat().st_size - 2**16))
        return MADE.encode() in start + file.read()
