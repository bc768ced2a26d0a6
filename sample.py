"""Sample: text to video and text to image, at any duration and shape.

    python sample.py --prompt "a 7 moving left" --frames 17 --height 32 --width 48 --out seven.gif
    python sample.py --prompt "a 3 moving up and an 8 moving right" --count 8 --out both.gif
    python sample.py --prompt "an 8 moving down" --frames 1 --out eight.png

The size of what is made is the grid of noise patches that sampling starts from: lay out more frames,
rows or columns of noise, and a longer, taller or wider clip comes out (the report's "choosing the
output size"). A checkpoint carries its own configuration, so nothing here needs a preset.

`--out` takes .gif, .mp4, .webp, .png (the frames side by side) and .npy (uint8 [T, H, W, C]). With
`--count 8` there are eight files and a contact sheet. Clip k has the seed `--seed` + k, and depends
on nothing else: it is the same clip alone, in a batch and tomorrow.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import diffusion
import patches
from dit import DiT, DiTConfig
from text import NOTHING, Tokenizer
from vae import VAE, VAEConfig

SUFFIXES = (".gif", ".mp4", ".webp", ".png", ".npy")
SCALE = 4  # pixels of a picture for people, per pixel of a clip: 32 pixels are too small to look at
MOST_WORDS = 256  # a caption longer than this is a mistake


# ------------------------------------------------------------------------------------- a trained run


@dataclass
class Run:
    """All that sampling needs: two networks and a tokenizer; the world that they were trained on and
    the flags of the training, as plain dicts."""

    vae: VAE
    dit: DiT
    tokenizer: Tokenizer
    world: dict
    config: dict

    @property
    def device(self) -> torch.device:
        return self.dit.read.weight.device


def newest_run(root: str = "out") -> Path:
    """The folder below `root` whose DiT was saved last."""
    found = sorted(Path(root).glob("*/dit.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no trained run below {root}/: python train.py --preset tiny makes one")
    return found[-1].parent


def load_checkpoint(path: str | Path, device: str | torch.device) -> dict:
    """Read one file of a run. Nothing is unpickled but tensors and plain values."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {path}: train there first, or name another folder")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        return saved | {"model": saved["model"], "ema": saved["ema"]}
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of ours ({type(error).__name__})") from None


def load_vae(folder: str | Path, device: str | torch.device) -> VAE:
    saved = load_checkpoint(Path(folder, "vae.pt"), device)
    vae = VAE(VAEConfig(**saved["model"])).to(device).eval().requires_grad_(False)
    vae.load_state_dict(saved["ema"])
    return vae


def load_run(folder: str | Path, device: str | None = None) -> Run:
    """Read vae.pt and dit.pt (their EMA weights)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    saved = load_checkpoint(Path(folder, "dit.pt"), device)
    dit = DiT(DiTConfig(**saved["model"])).to(device).eval().requires_grad_(False)
    dit.load_state_dict(saved["ema"])
    words = Tokenizer(saved["words"])
    return Run(load_vae(folder, device), dit, words, saved["world"], saved["config"])


# ------------------------------------------------------------------------------------------ sampling


def packed_denoiser(
    run: Run, captions: list[list[int]], grid: tuple[int, int, int], given: Tensor | None = None
) -> Callable:
    """A callable for `diffusion.sample` over latents x [N, Z, t, h, w] of one size, a clip a row.

    level broadcasts as [N or 1, 1, t or 1, 1, 1]; given: what `encode_given` made, if anything.
    """
    p, Z = run.config["patch"], run.vae.config.channels
    length = max(map(len, captions)) + patches.token_count(grid, p)
    blank = [torch.zeros(Z, *grid, device=run.device)] * len(captions)
    layout = patches.pack(blank, captions, p, length, rows=[[k] for k in range(len(captions))])
    if given is None:
        given = torch.zeros(len(captions), Z + run.vae.config.time_factor, *grid, device=run.device)

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        shown = patches.patchify(torch.cat([x, given], dim=1), p).flatten(0, 1)  # [N n, inputs]
        tokens = shown.new_zeros(*layout.text.shape, shown.shape[-1])
        tokens[layout.is_patch] = shown  # rows are in clip order
        levels = level.expand(len(x), 1, grid[0], 1, 1).flatten(1)  # [N, t]
        table = patches.frame_levels(layout, list(levels))  # [F]
        output = run.dit(tokens, table, layout)  # [N, L, D]
        return torch.stack(patches.unpack(output, layout))  # [N, Z, t, h, w]

    return denoise


def encode_given(vae: VAE, video: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """What the network is shown of given frames: video [B, C, T, H, W], known [B, T] bool ->

    given [B, Z + ft, t, h, w]: latents of the video with all that is not given blanked, and a mask
    that says which of the ft frames of each latent are given (latent 0 has but one, which fills all);
    whole [B, t] bool: latent frames all of whose frames are given.

    Blanked, since a latent looks into the past: the latents of a given *ending*, cut from the whole
    clip, would tell what came before it, and training would teach the network to read it there.
    """
    ft = vae.config.time_factor
    blanked = torch.where(known[:, None, :, None, None], video, -1.0)  # black
    latent = vae.encode(blanked)  # [B, Z, t, h, w]
    frames = torch.cat([known[:, :1].expand(-1, ft - 1), known], dim=1)  # [B, ft t]
    frames = frames.unflatten(1, (-1, ft)).transpose(1, 2)  # [B, ft, t]
    mask = frames[..., None, None].expand(-1, -1, -1, *latent.shape[3:]).to(latent)
    return torch.cat([latent * mask.amax(1, keepdim=True), mask], dim=1), frames.all(1)


@torch.no_grad()
def generate(
    run: Run,
    prompts: list[str],
    size: tuple[int, int, int],
    seeds: list[int],
    steps: int = 30,
    guidance: float = 2.0,
    eta: float = 0.0,
) -> list[np.ndarray]:
    """Clips of `size` (T, H, W) in pixels, one for each prompt: a list of uint8 [C, T, H, W].

    A clip is a function of its prompt, size and seed. ValueError for a size the VAE cannot make.
    """
    grid = run.vae.grid(*size)
    Z = run.vae.config.channels
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(Z, *grid, generator=g) for g in generators]).to(run.device)
    captions = [run.tokenizer.encode(prompt) for prompt in prompts]
    denoise = diffusion.guided(
        packed_denoiser(run, captions, grid),
        packed_denoiser(run, [[NOTHING]] * len(prompts), grid),
        guidance,
    )
    levels = diffusion.straight_levels(steps, torch.ones(1, 1, grid[0], 1, 1, device=run.device))
    prediction = run.config["prediction"]
    latent = diffusion.sample(denoise, noise, levels, eta, prediction, generators)  # [N, Z, t, h, w]
    return list(to_uint8(run.vae.decode(latent)))


def to_uint8(video: Tensor) -> np.ndarray:
    """[-1, 1] float -> 0 ... 255."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


# -------------------------------------------------------------------------------------- files on disk


def enlarge(clip: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [C, T, H, W] -> frames for people [T, scale H, scale W, 3]."""
    frames = clip.transpose(1, 2, 3, 0)  # [T, H, W, C]
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[3] == 1 else frames
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def filmstrip(clip: np.ndarray, scale: int) -> Image.Image:
    """The frames of a clip side by side."""
    return Image.fromarray(np.concatenate(list(enlarge(clip, scale)), axis=1))


def write_clip(path: str | Path, clip: np.ndarray, fps: int = 10, scale: int = SCALE) -> None:
    """Write uint8 [C, T, H, W] in the format that the suffix names, under a temporary name first, so
    that no half written file is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        if path.suffix == ".npy":
            np.save(part, clip.transpose(1, 2, 3, 0))
        elif path.suffix == ".png":
            filmstrip(clip, scale).save(part)
        elif path.suffix == ".mp4":
            even = enlarge(clip, scale + scale % 2)  # H.264 takes even sizes only
            iio.imwrite(part, even, plugin="pyav", codec="libx264", fps=fps)
        else:
            frames = [Image.fromarray(frame) for frame in enlarge(clip, scale)]
            lossless = {"lossless": True} if path.suffix == ".webp" else {}
            frames[0].save(part, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0, **lossless)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def contact_sheet(clips: list[np.ndarray], titles: list[str], scale: int = 3) -> Image.Image:
    """Up to nine frames of each clip in a row, its title above."""
    strips = []
    for clip in clips:
        frames = np.linspace(0, clip.shape[1] - 1, min(9, clip.shape[1])).round().astype(int)
        strips.append(filmstrip(clip[:, frames], scale))
    height = sum(strip.height + 22 for strip in strips)
    sheet = Image.new("RGB", (max(max(s.width for s in strips) + 12, 320), height + 6), (32, 32, 32))
    pen, y = ImageDraw.Draw(sheet), 4
    for strip, title in zip(strips, titles, strict=True):
        pen.text((6, y), title, fill=(255, 255, 255))
        sheet.paste(strip, (6, y + 14))
        y += strip.height + 22
    return sheet


def gallery(clips: list[np.ndarray], titles: list[str], columns: int = 4, scale: int = 4) -> list[np.ndarray]:
    """All clips playing side by side, each under its prompt: frames [Ty, Wx, 3] for a GIF. Short
    clips start again from their beginning; an image stands still."""
    cell_w = max(max(c.shape[3] for c in clips) * scale, 150) + 10
    lines = [clips[k : k + columns] for k in range(0, len(clips), columns)]
    heights = [max(c.shape[2] for c in line) * scale + 34 for line in lines]
    frames = []
    for t in range(max(c.shape[1] for c in clips)):
        page = Image.new("RGB", (cell_w * min(columns, len(clips)) + 10, sum(heights) + 10), (32, 32, 32))
        pen, y = ImageDraw.Draw(page), 10
        for row, line in enumerate(lines):
            for column, clip in enumerate(line):
                x = 10 + column * cell_w
                T, H, W = clip.shape[1:]
                first, _, rest = titles[row * columns + column].partition(" and ")
                pen.text((x, y), first + (" and" if rest else ""), fill=(255, 255, 255))
                pen.text((x, y + 11), rest or f"{T} x {H} x {W}", fill=(255, 255, 255) if rest else (130, 130, 130))
                page.paste(Image.fromarray(enlarge(clip, scale)[t % T]), (x, y + 25))
            y += heights[row]
        frames.append(np.asarray(page))
    return frames


def write_gallery(path: str | Path, frames: list[np.ndarray], fps: int = 6) -> None:
    path = Path(path)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    pictures = [Image.fromarray(frame).convert("L") for frame in frames]
    pictures[0].save(part, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
    os.replace(part, path)


# --------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a folder that train.py wrote (default: the newest below out/)")
    parser.add_argument("--prompt", required=True, help='what to show; "" for anything')
    parser.add_argument("--frames", type=int, default=17, help="T; 1 makes an image")
    parser.add_argument("--height", type=int, default=32, help="H in pixels")
    parser.add_argument("--width", type=int, default=32, help="W in pixels")
    parser.add_argument("--count", type=int, default=1, help="how many clips, with seeds from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="1: none")
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim")
    parser.add_argument("--out", default="sample.gif", help="a name ending in " + " ".join(SUFFIXES))
    args = parser.parse_args()
    if Path(args.out).suffix not in SUFFIXES:
        parser.error(f"--out {args.out}: write to a name that ends in one of {' '.join(SUFFIXES)}")
    for name in ("frames", "height", "width", "count", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: 0 or more")
    return args


def main(args: argparse.Namespace) -> None:
    run = load_run(args.run or newest_run())
    size = (args.frames, args.height, args.width)
    run.vae.grid(*size)  # says what would be right, before any work is done
    words = len(run.tokenizer.encode(args.prompt))
    if words > MOST_WORDS:
        raise ValueError(f"the prompt is {words} tokens long: at most {MOST_WORDS}")
    seeds = list(range(args.seed, args.seed + args.count))
    clips, at_once = [], 16
    for k in range(0, args.count, at_once):
        few = seeds[k : k + at_once]
        eta = float(args.sampler == "ddpm")
        clips += generate(run, [args.prompt] * len(few), size, few, args.steps, args.guidance, eta)
    out = Path(args.out)
    names = [out] if args.count == 1 else [out.with_stem(f"{out.stem}_{seed}") for seed in seeds]
    for name, clip in zip(names, clips, strict=True):
        write_clip(name, clip)
    if args.count > 1:
        sheet = out.with_name(f"{out.stem}_sheet.png")
        contact_sheet(clips, [f"{args.prompt}, seed {seed}" for seed in seeds]).save(sheet)
        names.append(sheet)
    print("wrote " + ", ".join(map(str, names)))


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        sys.exit(print(f"sample.py: {error}", file=sys.stderr) or 2)
