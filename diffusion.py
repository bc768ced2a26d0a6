"""Diffusion (DDPM): noising, the loss, and samplers in which each frame has its own noise level.

The problem. Noise is easy to make; a video that fits a caption is not.

The idea (Sohl-Dickstein et al. 2015; Ho et al. 2020, "Denoising diffusion probabilistic models").
Mix a clean clip with noise, a little or a lot, and train a network to predict the clean clip. To
sample, start from pure noise and repeat: predict the clean clip, move a step towards it.

    noising       x_level = signal(level) clean + noise(level) eps,    eps ~ N(0, 1)
    training      || denoise(x_level, level) - clean ||^2, weighted
    sampling      level 1 = pure noise  ->  ...  ->  level 0 = clean

*A level for each frame.* `level` is not one number but a tensor that broadcasts against the clip.
So frames may be at different levels: a frame at level 0 is known, and the others are made to fit.
A sampling run is a table of levels, one row a step:

    text to video            1 1 1 1 1  ->  .5 .5 .5 .5 .5  ->  0 0 0 0 0
    animate an image         0 1 1 1 1  ->   0 .5 .5 .5 .5  ->  0 0 0 0 0
    extend, connect, loop    0 0 1 1 0  ->   0  0 .5 .5  0  ->  0 0 0 0 0
    edit (SDEdit)           .6 .6 .6 .6 .6  ->  .3 ...      ->  0 0 0 0 0

Nothing here knows a network or a shape: `denoise` is any callable, and formulas are elementwise.

Run `python diffusion.py` for a demo: diffusion of points in the plane, with a perfect denoiser.
"""

import math
from collections.abc import Callable

import torch
from PIL import Image, ImageDraw
from torch import Tensor

# ------------------------------------------------------------------------------------- the schedule


def signal_noise(level: Tensor) -> tuple[Tensor, Tensor]:
    """level in [0, 1] -> (signal, noise), DDPM's sqrt(alpha_bar) and sqrt(1 - alpha_bar).

    The cosine schedule (Nichol and Dhariwal 2021, equation 17, with s = 0) in continuous time:
    signal^2 + noise^2 = 1, all signal at level 0 and none at level 1, so that sampling can start
    from pure noise (Lin et al. 2024, "Common diffusion noise schedules ... are flawed").
    """
    angle = level * (math.pi / 2)
    signal = torch.where(level < 1, torch.cos(angle), 0.0)  # cos(pi / 2) is not 0 in floating point
    return signal, torch.sin(angle)


def shift_level(level: Tensor, ratio: float) -> Tensor:
    """The level at which a clip with `ratio` times as many patches is hidden equally well.

    More patches hold more copies of what a frame shows, and the same noise hides less. The signal
    to noise ratio has to fall by the number of copies (Hoogeboom et al. 2023, "Simple diffusion",
    section 3.1): noise / signal is multiplied by sqrt(ratio). Levels 0 and 1 do not change.
    """
    signal, noise = signal_noise(level)
    return torch.atan2(math.sqrt(ratio) * noise, signal) / (math.pi / 2)


def add_noise(clean: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """DDPM, equation 4."""
    signal, noise = signal_noise(level)
    return signal * clean + noise * eps


# ------------------------------------------------------------------------------------- the training

PREDICTIONS = ("x", "v", "eps")
LOGIT_MEAN = 0.5  # of the logit-normal training levels, before they are shifted


def to_clean(output: Tensor, x: Tensor, level: Tensor, prediction: str) -> Tensor:
    """The clean clip according to the network's output. x is the noisy clip it was shown.

    x: the clean clip itself. eps: the noise (DDPM). v = signal eps - noise clean (Salimans and Ho
    2022, "Progressive distillation", section 4 and appendix D): the clean clip is `signal x`, which
    needs no network, less what v corrects. So a small network does not blur what is hardly noisy.
    """
    if prediction == "x":
        return output
    signal, noise = signal_noise(level)
    if prediction == "v":
        return signal * x - noise * output
    return (x - noise * output) / signal.clamp(min=1e-3)  # eps says nothing at level 1


def loss_weight(level: Tensor, most: float = 5.0) -> Tensor:
    """The weight of a squared error of the clean clip.

    An error of v is the error of the clean clip divided by noise(level): the weight is 1 / noise^2
    = 1 + SNR (Salimans and Ho 2022, section 4), which explodes where there is hardly any noise. We
    clip it at `most`, as min-SNR does (Hang et al. 2023).
    """
    _, noise = signal_noise(level)
    return 1 / noise.square().clamp(min=1 / most)


def training_levels(count: int, generator: torch.Generator) -> Tensor:
    """One level for each of `count` clips [count]: logit-normal (Esser et al. 2024, "Scaling
    rectified flow transformers", section 3.1). With hardly any noise, or nothing but noise, the
    caption is of little use to the network; what is drawn is decided in between.

    Each clip draws from a slice of the distribution of its own, in shuffled order. So levels are
    spread evenly, and the loss varies less from step to step.
    """
    slices = torch.randperm(count, generator=generator)
    share = (slices + torch.rand(count, generator=generator)) / count
    return torch.sigmoid(LOGIT_MEAN + torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)))


def denoising_error(
    denoise: Callable, clean: Tensor, eps: Tensor, level: Tensor, prediction: str = "x"
) -> Tensor:
    """The weighted squared error of each number, in the shape of `clean`. The caller takes the mean
    over what counts: known frames and padding don't. denoise(x, level) -> output."""
    x = add_noise(clean, eps, level)
    guess = to_clean(denoise(x, level).float(), x, level, prediction)
    return loss_weight(level) * (guess - clean).square()


# ------------------------------------------------------------------------------------- the sampling


def guided(denoise: Callable, untold: Callable, strength: float, least: float = 0.0) -> Callable:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6, with strength = 1 + w): start at
    the prediction without the caption, and go past the one with it. Only above level `least`
    (Kynkäänniemi et al. 2024, "Applying guidance in a limited interval"): below, what is drawn has
    been decided, and going past it would only bend its strokes."""

    def both(x: Tensor, level: Tensor) -> Tensor:
        told = denoise(x, level)
        return told if level.max() <= least else torch.lerp(untold(x, level), told, strength)

    return denoise if strength == 1 else both


def step(x: Tensor, clean: Tensor, level: Tensor, to: Tensor, eta: float, fresh: Tensor) -> Tensor:
    """One step from `level` down to level `to`, taking `clean` for the clean clip.

    Song et al. 2021, "Denoising diffusion implicit models", equation 12. eta = 0 is DDIM: x keeps
    the noise it holds. eta = 1 is DDPM's ancestral step, a draw from the posterior
    q(x_to | x_level, clean) (Ho et al. 2020, equations 6 and 7): `fresh` noise replaces part of it.
    """
    (signal, noise), (signal_to, noise_to) = signal_noise(level), signal_noise(to)
    noise = noise.clamp(min=1e-12)  # at level 0 there is nothing to do: see `sample`
    eps = (x - signal * clean) / noise
    share = (1 - (signal / signal_to.clamp(min=1e-12)).square()).clamp(min=0).sqrt()
    spread = eta * (noise_to / noise) * share
    kept = (noise_to.square() - spread.square()).clamp(min=0).sqrt()
    return signal_to * clean + kept * eps + spread * fresh


def straight_levels(steps: int, start: Tensor) -> Tensor:
    """Levels that fall evenly from `start` to 0 in `steps` steps: [steps + 1, *start.shape]."""
    fraction = torch.linspace(1, 0, steps + 1, device=start.device)
    return fraction.view(-1, *[1] * start.ndim) * start


@torch.no_grad()
def sample(
    denoise: Callable,
    x: Tensor,
    levels: Tensor,
    eta: float = 0.0,
    prediction: str = "x",
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Follow a table of levels from noise to a clean clip.

    x: the clip at levels[0], already noised. levels [steps + 1, ...]: each row broadcasts against
    x, and never rises. Where the level doesn't fall, x doesn't change by a bit: known frames.
    eta: 0 DDIM, 1 DDPM ancestral, whose fresh noise comes from a generator for each clip x[k], so
    that a clip does not depend on its batch. denoise(x, level) -> the network's output.
    """
    if (levels[1:] > levels[:-1]).any():
        raise ValueError("levels must never rise from one step to the next")
    for level, to in zip(levels[:-1], levels[1:], strict=True):
        clean = to_clean(denoise(x, level), x, level, prediction)
        fresh = torch.zeros_like(x)
        if eta:
            fresh = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
        x = torch.where(to < level, step(x, clean, level, to, eta, fresh), x)
    return x


# --------------------------------------------------------------------------------------------- demo


def perfect_denoiser(points: Tensor) -> Callable:
    """The expected clean point, if each of `points` [K, 2] is equally likely to be the clean one.
    Bayes: point k weighs exp(-|x - signal point_k|^2 / (2 noise^2)). A known coordinate (level 0)
    leaves only the points that have its value."""

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        signal, noise = signal_noise(level)
        miss = (x[:, None] - (signal * points)[None]) / noise.clamp(min=0.02)  # [N, K, 2]
        return (-0.5 * miss.square().sum(-1)).softmax(-1) @ points  # [N, 2]

    return denoise


def main():
    turn = torch.arange(40) / 40 * 2 * math.pi
    heart = torch.stack([16 * turn.sin() ** 3, -13 * turn.cos() + 5 * (2 * turn).cos()], dim=1)
    heart[:, 1] += 2 * (3 * turn).cos() + (4 * turn).cos()
    points = (heart - heart.mean(0)) / heart.std(0)  # [K, 2], standardised as latents are
    denoise = perfect_denoiser(points)
    N, steps = 600, 40
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    both, row = torch.ones(2), torch.tensor([1.0, 0.0])  # the second coordinate is known
    known = torch.stack([x[:, 0], points[12, 1].expand(N)], dim=1)
    runs = {"DDIM": (x, both, 0.0), "DDPM": (x, both, 1.0), "known height": (known, row, 1.0)}
    sheet = Image.new("RGB", (6 * 160, len(runs) * 180), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for r, (name, (start, level, eta)) in enumerate(runs.items()):
        generators = [torch.Generator().manual_seed(k) for k in range(N)]  # one for each point
        levels = straight_levels(steps, level)  # [steps + 1, 2]
        seen = []  # x, step by step

        def watched(x: Tensor, level: Tensor, seen: list = seen) -> Tensor:
            seen.append(x)
            return denoise(x, level)

        end = sample(watched, start, levels, eta, generators=generators)
        far, which = torch.cdist(end, points).min(dim=1)
        print(f"{name}: {list(end.shape)} from noise in {steps} steps, {far.mean():.3f} from a "
              f"clean point; {len(which.unique())} of {len(points)} were hit")  # fmt: skip
        for c, k in enumerate((0, 8, 16, 24, 32, steps)):
            pen.text((160 * c + 6, 180 * r + 4), f"{name}, level {levels[k, 0]:.1f}")
            center, x = torch.tensor([160 * c + 80, 180 * r + 98]), [*seen, end][k]
            for cloud, size, colour in ((points, 1, "gray"), (x, 1 + c // 5, "orange")):
                for u, v in (center + 24 * cloud).tolist():
                    pen.ellipse((u - size, v - size, u + size, v + size), fill=colour)
    print(f"known coordinates are the same to the bit: {torch.equal(end[:, 1], known[:, 1])}")
    sheet.save("diffusion_demo.png")
    print("wrote diffusion_demo.png")


if __name__ == "__main__":
    main()
