"""Clips as files: reading people's own, fitting them to what a model takes, and writing what was
made.

The problem. People's files come in every format, size and colour, some of them broken, some made to
harm. A model takes arrays of one shape, whose sides it can divide.

The idea. A file is a stream of frames [H, W, C]. Each is fitted as it comes, so that memory holds
the fitted clip and never the original, and every limit is checked before what it limits is made:

    file --frames--> [H, W, C] --fit--> [H', W', C] ... --> clip [C, T, H', W']  uint8

`Writer` is the other direction: frames go in a chunk at a time. Video is on disk as it comes, in
fragments that play even when the power fails after them. The other formats only exist as a whole:
they are written at the end, under a temporary name first.

A pixel of a clip is a pixel of the file, unless a `scale` is asked for, so what was written can be
read and used again: exactly, in .png, .gif (gray), .webp and .npy; .mp4 and .webm are lossy.

Alphabet: a clip is uint8 [C, T, H, W] with C = 1 (gray) or 3; a frame is [H, W, C].
"""

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps, ImageSequence

VIDEO = (".mp4", ".webm", ".mkv", ".mov", ".avi")  # read through FFmpeg; all else through Pillow
SUFFIXES = (".gif", ".mp4", ".webm", ".webp", ".png", ".npy")  # that we write
MOST_PIXELS = 2**25  # of a frame that is read: four times 4K
MOST_NUMBERS = 2**29  # of a clip in memory: half a gigabyte


# ------------------------------------------------------------------------------------------ reading


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a file, one after the other: uint8 [H, W, 3], or [H, W, 1] where it says gray.

    FileNotFoundError; ValueError for what is no clip, is cut off, or is too large to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}"
        )
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file")
    suffix, count = path.suffix.lower(), 0
    read = read_array if suffix == ".npy" else read_video if suffix in VIDEO else read_picture
    try:
        for frame in read(path):
            yield frame
            count += 1
    except (Image.DecompressionBombError, TooLarge) as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:  # what decoders raise
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        cut = f"; it breaks off after {count} frames" if count else ""
        raise ValueError(f"{path}: not a readable clip{cut} ({type(error).__name__})") from None
    if not count:
        raise ValueError(f"{path}: no frames in it")


class TooLarge(Exception):
    """A frame that we don't even decode."""

    def __init__(self, H: int, W: int):
        super().__init__(f"{H} x {W} pixels are too many: at most {MOST_PIXELS} are read")


def read_picture(path: Path) -> Iterator[np.ndarray]:
    """Everything that Pillow knows: .png .gif .webp .jpg ... What is transparent becomes black."""
    Image.MAX_IMAGE_PIXELS = None  # the check below comes first, and is stricter
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise TooLarge(image.height, image.width)
        if image.format == "GIF" and b";" not in path.read_bytes()[-16:]:
            raise ValueError(f"{path}: a GIF that is cut off")  # Pillow would show what there is
        durations = []
        for frame in ImageSequence.Iterator(image):
            frame.load()  # only then WebP says it
            durations.append(frame.info.get("duration", 0))
        # Encoders write a frame that stays once, with a longer duration: here it stays again.
        shortest = min((d for d in durations if d > 0), default=1)
        for frame, duration in zip(ImageSequence.Iterator(image), durations, strict=True):
            pixels = picture_pixels(ImageOps.exif_transpose(frame))
            yield from [pixels] * max(1, round(duration / shortest))


def picture_pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 1] for what is gray, else [H, W, 3]."""
    if image.mode.startswith(("I", "F")):  # 16 bits a pixel
        deep = np.asarray(image).astype(np.float64)
        return (deep * 255 / max(65535.0, deep.max())).clip(0).astype(np.uint8)[..., None]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, "black")
    return np.asarray(Image.alpha_composite(black, image))[..., :3]


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Everything that FFmpeg knows. Raises if there are fewer frames than the file says."""
    with av.open(str(path)) as container:
        stream, count = container.streams.video[0], 0
        if stream.width * stream.height > MOST_PIXELS:
            raise TooLarge(stream.height, stream.width)
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")
            count += 1
        if count < stream.frames:  # 0 where the file does not say
            raise ValueError(f"{path}: cut off after {count} of {stream.frames} frames")


def read_array(path: Path) -> Iterator[np.ndarray]:
    """uint8 [T, H, W, C] or [T, H, W]. Mapped, so that a header's false promise costs nothing."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    array = array[..., None] if array.ndim == 3 else array
    if (
        array.dtype != np.uint8
        or array.ndim != 4
        or array.shape[3] not in (1, 3)
        or 0 in array.shape
    ):
        raise ValueError(
            f"{path}: {array.dtype} {list(array.shape)}, where uint8 [T, H, W, C] is read"
        )
    if array.shape[1] * array.shape[2] > MOST_PIXELS:
        raise TooLarge(*array.shape[1:3])
    yield from map(np.array, array)


# ------------------------------------------------------------------------------------------ fitting


def fitted_size(H: int, W: int, multiple: int, mode: str) -> tuple[int, int]:
    """The nearest sides that `multiple` divides: smaller ones by "crop", larger ones by "pad"."""
    if mode == "pad":
        return -(-H // multiple) * multiple, -(-W // multiple) * multiple
    return H // multiple * multiple, W // multiple * multiple


def fit_frame(frame: np.ndarray, size: tuple[int, int], mode: str, resize: bool) -> np.ndarray:
    """frame [H, W, C] -> [*size, C], centred. "crop" fills it and cuts off what sticks out, "pad"
    shows all and leaves black borders. resize: scaled to that first; else no pixel is changed."""
    (H, W), (to_H, to_W) = frame.shape[:2], size
    if resize and (H, W) != size:
        ratio = (max if mode == "crop" else min)(to_H / H, to_W / W)
        H, W = max(1, round(H * ratio)), max(1, round(W * ratio))
        image = Image.fromarray(frame.squeeze(2) if frame.shape[2] == 1 else frame)
        frame = np.asarray(image.resize((W, H), Image.Resampling.BICUBIC))
        frame = frame[..., None] if frame.ndim == 2 else frame
    top, left = max(0, H - to_H) // 2, max(0, W - to_W) // 2
    frame = frame[top : top + to_H, left : left + to_W]
    rows, columns = to_H - frame.shape[0], to_W - frame.shape[1]
    border = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(frame, border)


def to_colors(frame: np.ndarray, colors: int) -> np.ndarray:
    """[H, W, 1 or 3] -> [H, W, colors]. Gray is luma, as television weighs it (ITU-R BT.601)."""
    if frame.shape[2] == colors:
        return frame
    if colors == 3:
        return np.repeat(frame, 3, axis=2)
    return np.asarray(Image.fromarray(frame).convert("L"))[..., None]


def read_clip(
    path: str | Path,
    colors: int,
    multiple: int,
    size: tuple[int, int] | None = None,
    mode: str = "crop",
    most_frames: int | None = None,
) -> tuple[np.ndarray, str]:
    """A person's file as a clip that the model can take: uint8 [C, T, H, W], and what was done to
    it.

    multiple: what divides the sides; size: (H, W) to resize it to. Without one, it keeps its own
    size, but for a border that is cropped or padded. most_frames: no more are read.
    """
    frames, numbers, colourful = [], 0, False
    for frame in read_frames(path):
        if not frames:
            H, W = frame.shape[:2]
            goal = size or fitted_size(H, W, multiple, mode)
            if mode == "crop" and min(H, W) < multiple:
                raise ValueError(
                    f"{path}: {H} x {W} pixels are too few: at least {multiple} x {multiple}, "
                    "or --fit pad, which adds a border"
                )
        if len(frames) == most_frames:
            break
        if frame.shape[:2] != (H, W):
            raise ValueError(f"{path}: its frames are not of one size")
        frame = fit_frame(frame, goal, mode, size is not None)
        colourful |= bool((frame.max(2) - frame.min(2) > 16).any())  # less is a video's rounding
        frames.append(to_colors(frame, colors))
        numbers += frames[-1].size
        if numbers > MOST_NUMBERS:
            raise ValueError(
                f"{path}: too long at {goal[0]} x {goal[1]} pixels, after {len(frames)} frames"
            )
    done = [f"{len(frames)} x {H} x {W}"]
    if goal != (H, W):
        how = {"crop": "cropped", "pad": "padded"}[mode]
        done.append(f"{'resized and ' if size else ''}{how} to {goal[0]} x {goal[1]}")
    if colors == 1 and colourful:
        done.append("made gray")
    return np.stack(frames).transpose(3, 0, 1, 2), f"{path}: {', '.join(done)}"


# ------------------------------------------------------------------------------------------ writing


def enlarge(clip: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [C, T, H, W] -> frames for people [T, scale H, scale W, 3]."""
    frames = clip.transpose(1, 2, 3, 0)  # [T, H, W, C]
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[3] == 1 else frames
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def to_image(frame: np.ndarray) -> Image.Image:
    """[H, W, 3], kept gray where it is: a GIF then has a gray for each value, and none is
    changed."""
    gray = (frame[..., :1] == frame).all()
    return Image.fromarray(np.ascontiguousarray(frame[..., 0] if gray else frame))


def filmstrip(clip: np.ndarray, scale: int) -> Image.Image:
    """The frames of a clip side by side."""
    return to_image(np.concatenate(list(enlarge(clip, scale)), axis=1))


class Writer:
    """A file that frames go into, a chunk at a time, in the format that its suffix names.

        with Writer("minute.mp4") as file:
            for chunk in ...:  # uint8 [C, n, H, W]
                file.write(chunk)

    Left by an interruption (Ctrl-C), it keeps what there is as a file that plays. Left by an error,
    it leaves no file behind. Memory does not grow for .mp4 and .webm; the others hold the clip.
    """

    def __init__(self, path: str | Path, fps: int = 10, scale: int = 1):
        self.path, self.fps, self.scale = Path(path), fps, scale
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: write to a name that ends in one of {' '.join(SUFFIXES)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.chunks, self.container, self.frames = [], None, 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None or (issubclass(kind, KeyboardInterrupt) and self.frames):
            self.close()
        elif self.container:
            self.container.close()
            self.path.unlink(missing_ok=True)

    def write(self, chunk: np.ndarray) -> None:
        self.frames += chunk.shape[1]
        if self.path.suffix not in (".mp4", ".webm"):
            self.chunks.append(chunk)
            return
        for frame in enlarge(chunk, self.scale):
            # Half the colour resolution in both directions, which is what every player can play.
            frame = np.pad(
                frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), "edge"
            )
            self.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))

    def encode(self, frame: av.VideoFrame | None) -> None:
        """One frame into the video; None ends it."""
        if self.container is None:
            webm = self.path.suffix == ".webm"
            # A fragment is playable by itself: a file that was cut off plays up to there.
            moov = {} if webm else {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
            self.container = av.open(str(self.path), "w", options=moov | {"flush_packets": "1"})
            quality = (
                {"crf": "12", "tune": "zerolatency"} if not webm else {"crf": "15", "b:v": "0"}
            )
            codec = "libvpx-vp9" if webm else "libx264"
            self.stream = self.container.add_stream(
                codec, rate=self.fps, options=quality | {"g": str(self.fps)}
            )
            self.stream.width, self.stream.height, self.stream.pix_fmt = (
                frame.width,
                frame.height,
                "yuv420p",
            )
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        if self.container:
            self.encode(None)
            self.container.close()
            return
        part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")
        try:
            self.save(part, np.concatenate(self.chunks, axis=1))
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def save(self, part: Path, clip: np.ndarray) -> None:
        if self.path.suffix == ".npy":
            np.save(part, clip.transpose(1, 2, 3, 0))
        elif self.path.suffix == ".png":
            filmstrip(clip, self.scale).save(part)
        else:
            frames = [to_image(frame) for frame in enlarge(clip, self.scale)]
            lossless = {"lossless": True} if self.path.suffix == ".webp" else {}
            save_frames(part, frames, self.fps, **lossless)


def save_frames(path: Path, frames: list[Image.Image], fps: int, **options) -> None:
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0, **options
    )


def write_clip(path: str | Path, clip: np.ndarray, fps: int = 10, scale: int = 1) -> None:
    """Write uint8 [C, T, H, W] in the format that the suffix names: .png is a filmstrip, .npy is
    uint8 [T, H, W, C] and never scaled."""
    with Writer(path, fps, scale) as file:
        file.write(clip)


# --------------------------------------------------------------------------------- many at a glance


def contact_sheet(clips: list[np.ndarray], titles: list[str], scale: int = 3) -> Image.Image:
    """Up to nine frames of each clip in a row, its title above."""
    strips = []
    for clip in clips:
        frames = np.linspace(0, clip.shape[1] - 1, min(9, clip.shape[1])).round().astype(int)
        strips.append(filmstrip(clip[:, frames], scale))
    height = sum(strip.height + 22 for strip in strips)
    sheet = Image.new(
        "RGB", (max(max(s.width for s in strips) + 12, 320), height + 6), (32, 32, 32)
    )
    pen, y = ImageDraw.Draw(sheet), 4
    for strip, title in zip(strips, titles, strict=True):
        pen.text((6, y), title, fill=(255, 255, 255))
        sheet.paste(strip, (6, y + 14))
        y += strip.height + 22
    return sheet


def gallery(
    clips: list[np.ndarray], titles: list[str], columns: int = 4, scale: int = 4
) -> list[np.ndarray]:
    """All clips playing side by side, each under its prompt: frames [Ty, Wx, 3] for a GIF. Short
    clips start again from their beginning; an image stands still."""
    cell_w = max(max(c.shape[3] for c in clips) * scale, 150) + 10
    lines = [clips[k : k + columns] for k in range(0, len(clips), columns)]
    heights = [max(c.shape[2] for c in line) * scale + 34 for line in lines]
    frames = []
    for t in range(max(c.shape[1] for c in clips)):
        page = Image.new(
            "RGB", (cell_w * min(columns, len(clips)) + 10, sum(heights) + 10), (32, 32, 32)
        )
        pen, y = ImageDraw.Draw(page), 10
        for row, line in enumerate(lines):
            for column, clip in enumerate(line):
                x = 10 + column * cell_w
                T, H, W = clip.shape[1:]
                first, _, rest = titles[row * columns + column].partition(" and ")
                pen.text((x, y), first + (" and" if rest else ""), fill=(255, 255, 255))
                pen.text(
                    (x, y + 11),
                    rest or f"{T} x {H} x {W}",
                    fill=(255, 255, 255) if rest else (130, 130, 130),
                )
                page.paste(Image.fromarray(enlarge(clip, scale)[t % T]), (x, y + 25))
            y += heights[row]
        frames.append(np.asarray(page))
    return frames


def write_gallery(path: str | Path, frames: list[np.ndarray], fps: int = 6) -> None:
    path = Path(path)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    save_frames(part, [to_image(frame) for frame in frames], fps)
    os.replace(part, path)
