"""A causal 3D VAE: compresses a video in time and space; an image is a one-frame video.

The problem. A second of video is a million numbers, most of them predictable from their neighbours.
The diffusion transformer should spend its tokens on what happens, not on pixels.

The idea. An encoder turns the video into a small latent grid, a decoder turns the grid into video
(Kingma and Welling 2014, "Auto-encoding variational Bayes"; the report's "video compression
network"). One latent vector of Z numbers stands for a block of ft frames x fs x fs pixels:

    video  [B, C, T, H, W]      T = 1 + ft (t - 1),  H = fs h,  W = fs w
    latent [B, Z, t, h, w]      latent 0 is frame 0 alone, latent j is frames ft (j-1) + 1 .. ft j

*Causal*: a latent frame depends on its own pixels and on the past, never on the future. A
convolution in time pads on the left only, with the first frame repeated. That buys

  * images: T = 1 is nothing special, only a video that stops after its first frame;
  * streaming: a convolution's last two inputs are all that the next chunk needs, so a long video is
    encoded and decoded piece by piece, equal to doing it whole, in memory that does not grow;
  * for the same reason no norm may pool over frames: RMS norm over channels, not group norm.

The network works on the latent grid only: a linear map reads each block of pixels, causal
convolutions see the neighbouring blocks, a linear map writes the block. A linear path around the
convolutions (a learned PCA) is good after seconds of training, and can begin as one (`begin`). Big
VAEs (Wan 2.1, CogVideoX) convolve at full resolution first, at many times the cost.

Alphabet: capitals are pixels (B, C, T, H, W), small letters the latent grid (Z channels, t, h, w).

Run `python vae.py` to see a VAE learn to compress bouncing squares in a few seconds.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


@dataclass
class VAEConfig:
    colors: int = 1  # C
    channels: int = 4  # Z
    time_factor: int = 4  # ft: frames a latent
    space_factor: int = 4  # fs: pixels a latent, in each direction
    width: int = 64
    encoder_depth: int = 2
    decoder_depth: int = 3
    kl: float = 1e-3  # weight of the KL term; small, since latents are standardised anyway


# ------------------------------------------------------------------------------- pixels <-> blocks


def to_float(clips: np.ndarray | list[np.ndarray]) -> Tensor:
    """uint8 0 ... 255 -> [-1, 1]. A list of clips of one size is stacked."""
    return torch.from_numpy(np.ascontiguousarray(clips)).float() / 127.5 - 1


def to_uint8(video: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8 0 ... 255."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def to_blocks(video: Tensor, ft: int, fs: int) -> Tensor:
    """video [B, C, ft t, fs h, fs w] -> [B, C ft fs fs, t, h, w]: each block of pixels a vector."""
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // ft, ft, H // fs, fs, W // fs, fs)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # [B, C, ft, fs, fs, t, h, w]
    return x.reshape(B, C * ft * fs * fs, T // ft, H // fs, W // fs)


def from_blocks(blocks: Tensor, ft: int, fs: int) -> Tensor:
    """The mirror: [B, C ft fs fs, t, h, w] -> [B, C, ft t, fs h, fs w]."""
    B, D, t, h, w = blocks.shape
    x = blocks.reshape(B, D // (ft * fs * fs), ft, fs, fs, t, h, w)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, C, t, ft, h, fs, w, fs]
    return x.reshape(B, -1, t * ft, h * fs, w * fs)


# -------------------------------------------------------------------------------------- the network


class Conv(nn.Module):
    """A convolution over [B, D, t, h, w]: padded in rows and columns, not in time."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.kernel = kernel
        fan_in = inputs * math.prod(kernel)  # a matrix, for optimizers such as Muon
        self.weight = nn.Parameter(torch.randn(outputs, fan_in) * fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, t, h, w] -> [B, outputs, t + 1 - kernel in time, h, w]."""
        weight = self.weight.unflatten(1, (-1, *self.kernel))  # [outputs, inputs, kt, kh, kw]
        return F.conv3d(x, weight, self.bias, padding=(0, self.kernel[1] // 2, self.kernel[2] // 2))


class Block(nn.Module):
    """A residual block: convolution in space, convolution in time, pointwise map. A 3 x 3 x 3
    convolution in two steps, 1 x 3 x 3 and 3 x 1 x 1, is a third of the work and has a
    non-linearity in between (Tran et al. 2018, "R(2+1)D")."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width, 1, 1, 1))
        self.space = Conv(width, width, (1, 3, 3))
        self.time = Conv(width, 2 * width, (3, 1, 1))
        self.out = Conv(2 * width, width, (1, 1, 1))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, D, t, h, w], past [B, D, 2, h, w] (None at the start) -> the same, next past."""
        h = F.gelu(self.space(rms_norm(x) * self.norm))  # [B, D, t, h, w]
        past = h[:, :, :1].expand(-1, -1, 2, -1, -1) if past is None else past
        h = torch.cat([past, h], dim=2)  # [B, D, 2 + t, h, w]
        return x + self.out(F.gelu(self.time(h))), h[:, :, -2:]


def rms_norm(x: Tensor) -> Tensor:
    """Over channels only: each position of each frame is normalised alone."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)


class Half(nn.Module):
    """Encoder or decoder: linear in, causal blocks, linear out, and a linear path around them."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int):
        super().__init__()
        self.read = Conv(inputs, width, (1, 1, 1))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.write = Conv(width, outputs, (1, 1, 1))
        self.around = Conv(inputs, outputs, (1, 1, 1))
        nn.init.zeros_(self.write.weight)  # training starts from the linear path alone

    def forward(self, x: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        """x [B, inputs, t, h, w] -> [B, outputs, t, h, w], and the cache for the next chunk."""
        h, after = self.read(x), []
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            h, past = block(h, past)
            after.append(past)
        return self.around(x) + self.write(rms_norm(h)), after


class VAE(nn.Module):
    """Pixels to standardised latents and back. `mean` and `std` are saved with the weights."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = c = config
        pixels = c.colors * c.time_factor * c.space_factor**2
        self.encoder = Half(pixels, c.width, c.encoder_depth, 2 * c.channels)
        self.decoder = Half(c.channels, c.width, c.decoder_depth, pixels)
        self.register_buffer("mean", torch.zeros(c.channels, 1, 1, 1))
        self.register_buffer("std", torch.ones(c.channels, 1, 1, 1))

    def grid(self, T: int, H: int, W: int) -> tuple[int, int, int]:
        """The latent grid (t, h, w) of a video's size. ValueError says which sizes are possible."""
        ft, fs = self.config.time_factor, self.config.space_factor
        if (T - 1) % ft or T < 1:
            raise ValueError(f"{T} frames: the VAE takes 1 + {ft} k frames (1, {1 + ft}, ...)")
        if H % fs or W % fs or min(H, W) < fs:
            raise ValueError(f"{H} x {W} pixels: the VAE takes multiples of {fs} pixels")
        return 1 + (T - 1) // ft, H // fs, W // fs

    def blocks(self, video: Tensor, first: bool = True) -> Tensor:
        """video [B, C, T, H, W] -> [B, C ft fs fs, t, h, w]; first: whether it has frame 0."""
        ft, fs = self.config.time_factor, self.config.space_factor
        if first:  # frame 0 gets a block of its own, which holds it ft times
            self.grid(*video.shape[2:])
            video = torch.cat([video[:, :, :1].expand(-1, -1, ft - 1, -1, -1), video], dim=2)
        elif video.shape[2] % ft:
            raise ValueError(f"{video.shape[2]} frames: chunks after the first take {ft} k frames")
        return to_blocks(video, ft, fs)

    def posterior(self, video: Tensor, cache: list | None = None) -> tuple[Tensor, Tensor, list]:
        """video [B, C, T, H, W] in [-1, 1] -> mu, log sigma^2 [B, Z, t, h, w], and the cache."""
        h, cache = self.encoder(self.blocks(video, cache is None), cache)
        mu, log_var = h.chunk(2, dim=1)
        return mu, log_var.clamp(-20, 10), cache

    def encode(self, video: Tensor) -> Tensor:
        """video [B, C, T, H, W] in [-1, 1] -> standardised latent [B, Z, t, h, w], the mean."""
        return (self.posterior(video)[0] - self.mean) / self.std

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a video that arrives in chunks: the first of 1 + ft k frames, others of ft k."""
        cache = None
        for chunk in chunks:
            mu, _, cache = self.posterior(chunk, cache)
            yield (mu - self.mean) / self.std

    def encode_known(self, video: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """What a network is shown of the known frames: video [B, C, T, H, W], known [B, T] bool ->
        given [B, Z + ft, t, h, w]: latents, and a mask of which of the ft frames of each latent are
        known (latent 0 holds one frame, which fills its ft places); whole [B, t] bool: latents of
        which all frames are known. Unknown frames are black: latents of a known *ending*, cut from
        the whole clip, contain its past, and a network would learn to read the answer there."""
        ft = self.config.time_factor
        latent = self.encode(torch.where(known[:, None, :, None, None], video, -1.0))
        frames = torch.cat([known[:, :1].expand(-1, ft - 1), known], dim=1)  # [B, ft t]
        frames = frames.unflatten(1, (-1, ft)).transpose(1, 2)  # [B, ft, t]
        mask = frames[..., None, None].expand(-1, -1, -1, *latent.shape[3:]).to(latent)
        return torch.cat([latent * mask.amax(1, keepdim=True), mask], dim=1), frames.all(1)

    def reconstruct(self, z: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        """z [B, Z, t, h, w], not standardised -> video [B, C, T, H, W], not clipped, and cache."""
        ft, fs = self.config.time_factor, self.config.space_factor
        blocks, after = self.decoder(z, cache)
        video = from_blocks(blocks, ft, fs)  # [B, C, ft t, H, W]
        return video[:, :, ft - 1 :] if cache is None else video, after

    def decode(self, latent: Tensor) -> Tensor:
        """standardised latent [B, Z, t, h, w] -> video [B, C, T, H, W] in [-1, 1]."""
        return self.reconstruct(latent * self.std + self.mean)[0].clamp(-1, 1)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents that arrive in chunks of any number of latent frames."""
        cache = None
        for chunk in chunks:
            video, cache = self.reconstruct(chunk * self.std + self.mean, cache)
            yield video.clamp(-1, 1)

    def loss(self, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Kingma and Welling 2014, equation 10, with a Gaussian decoder: squared error + KL.
        Squared, not absolute: the median of every pixel is black. noise: N(0, 1), like z."""
        mu, log_var, _ = self.posterior(video)
        z = mu + (0.5 * log_var).exp() * noise
        error = (self.reconstruct(z)[0] - video).float().square().mean()
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).float().mean()
        psnr = 10 * torch.log10(4 / error.detach())  # peak to peak is 2
        return error + self.config.kl * kl, {"psnr": psnr.item(), "kl": kl.item()}

    forward = loss  # wrappers such as DDP call it

    @torch.no_grad()
    def begin(self, videos: Iterable[Tensor]) -> None:
        """Start the linear path as the principal components of some training videos' blocks: from
        random weights, the small ones, textures, take forever to find. Their variances keep half
        of their range (in logarithms): all equal, an error in brightness would count no more than
        one in texture; and they are mixed at random, so that `std` does not make them equal."""
        blocks = torch.cat([self.blocks(x).transpose(0, 1).flatten(1) for x in videos], dim=1)
        mean, (variance, axes) = blocks.mean(1), torch.linalg.eigh(torch.cov(blocks))  # ascending
        Z, read, write = self.config.channels, self.encoder.around, self.decoder.around
        std, axes = variance[-Z:].clamp(min=1e-6).sqrt(), axes[:, -Z:]  # [Z], [C ft fs fs, Z]
        mix = torch.linalg.qr(torch.randn(Z, Z))[0][: len(std)].to(mean)  # a block may be smaller
        scale = (std / std.mean()).sqrt() / std
        down, up = (axes * scale @ mix).T, axes / scale @ mix
        read.weight.copy_(torch.cat([down, torch.zeros_like(down)]))
        read.bias.copy_(torch.cat([-down @ mean, torch.full((Z,), -5.0).to(mean)]))  # little noise
        write.weight.copy_(up)
        write.bias.copy_(mean)

    @torch.no_grad()
    def measure_statistics(self, videos: Iterable[Tensor]) -> None:
        """Set `mean` and `std` of each channel from some training videos."""
        mu = [self.posterior(video)[0].transpose(0, 1).flatten(1) for video in videos]
        mu = torch.cat(mu, dim=1).double()  # [Z, numbers]
        self.mean.copy_(mu.mean(1).view(-1, 1, 1, 1))
        self.std.copy_(mu.std(1).clamp(min=1e-6).view(-1, 1, 1, 1))


# --------------------------------------------------------------------------------------------- demo


def bouncing_squares(B: int, T: int, size: int) -> Tensor:
    """Bright squares of 7 x 7 that bounce on a black canvas: [B, 1, T, size, size] in [-1, 1]."""
    room, velocity = size - 7, torch.randint(-2, 3, (B, 2, 1))
    straight = (torch.randint(room, (B, 2, 1)) + velocity * torch.arange(T)) % (2 * room)
    corner = torch.minimum(straight, 2 * room - straight)[..., None]  # [B, 2, T, 1]
    inside = (torch.arange(size) >= corner) & (torch.arange(size) < corner + 7)  # [B, 2, T, size]
    video = inside[:, 0, :, :, None] & inside[:, 1, :, None, :]  # [B, T, size, size]
    return 2.0 * video[:, None] - 1


def draw(video: Tensor, decoded: Tensor, latent: Tensor) -> Image.Image:
    """Rows of frames: each video, the same decoded, and one channel of its latent."""
    blocks = (latent[:, :1] / 4).repeat_interleave(4, 2)[:, :, 3:]  # [B, 1, T, h, w]
    blocks = blocks.repeat_interleave(4, 3).repeat_interleave(4, 4)  # [B, 1, T, H, W]
    rows = F.pad(torch.cat([video, decoded, blocks], dim=1), (1, 1, 1, 1))  # [B, 3, T, H, W]
    picture = Image.fromarray(to_uint8(rows.transpose(2, 3).flatten(3).flatten(0, 2)))
    return picture.resize((2 * picture.width, 2 * picture.height), Image.NEAREST)


def main():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=8, width=32, encoder_depth=1, decoder_depth=2))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    for step in range(1, 301):
        loss, logs = vae.loss(bouncing_squares(8, 9, 24), torch.randn(8, 8, *vae.grid(9, 24, 24)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, 10, 50, 100, 200, 300):
            print(f"step {step:3d}  loss {loss.item():.3f}  PSNR {logs['psnr']:4.1f} dB")
    vae.measure_statistics(bouncing_squares(8, 9, 24) for _ in range(4))
    with torch.no_grad():
        video = bouncing_squares(3, 17, 24)  # longer than in training
        latent = vae.encode(video)
        parts = torch.cat(list(vae.encode_stream(video.split([1, 4, 12], dim=2))), dim=2)
        image = vae.encode(video[:, :, :1])  # frame 0 alone
        draw(video, vae.decode(latent), latent).save("vae_demo.png")
    print(f"video {list(video.shape)} -> latent {list(latent.shape)}")
    print(f"encoded in 3 chunks: differs by {(parts - latent).abs().max():.0e}")
    print(f"frame 0 as an image: differs by {(image - latent[:, :, :1]).abs().max():.0e}")
    print("wrote vae_demo.png: each video above its decoding and one channel of its latent")


if __name__ == "__main__":
    main()
