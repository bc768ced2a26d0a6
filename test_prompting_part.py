"""Prompting: given frames, every task of sample.py, and people's own files."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clips
import patches
import prompting
import sample
from data import WorldConfig
from dit import DiT, DiTConfig
from text import Tokenizer
from vae import VAE, VAEConfig

HERE = Path(__file__).parent
QUICK = sample.Settings(steps=2)
PROMPT = ["a 7 moving left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with random weights, as train.py would save it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run")
    vae = VAE(VAEConfig(channels=3, width=16, encoder_depth=1, decoder_depth=1))
    words = Tokenizer.from_captions(["a 7 moving left", "a 3 moving up"], 300)
    dit = DiT(DiTConfig(4 * (2 * 3 + 4), 4 * 3, words.size, width=32, depth=2, heads=2))
    for parameter in dit.parameters():  # its own start says nothing at all
        parameter.data += 0.05 * torch.randn_like(parameter)
    world = asdict(WorldConfig())
    facts = {"world": world, "config": {"patch": 2, "prediction": "x"}, "step": 1, "optimizers": []}
    for name, model, more in (("vae", vae, {}), ("dit", dit, {"words": words.words})):
        state = {
            "weights": model.state_dict(),
            "ema": model.state_dict(),
            "model": asdict(model.config),
        }
        torch.save(state | facts | more, path / f"{name}.pt")
    return path


@pytest.fixture(scope="module")
def run(folder) -> sample.Run:
    return sample.load_run(folder, "cpu")


def clip_of(T: int, H: int = 16, W: int = 24, seed: int = 0, C: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (C, T, H, W), np.uint8)


def command(folder: Path, line: str) -> tuple[int, str, str]:
    """A command line, in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = sample.command(["--run", str(folder), "--steps", "2", *shlex.split(line)])
        except SystemExit as stop:  # argparse
            status = stop.code
    return status, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------- given frames, exactly


@pytest.mark.parametrize("L", range(1, 11))
def test_given_frames_are_bit_equal(run, L):
    a, b = clip_of(L), clip_of(max(1, 11 - L), seed=1)
    new = (1, 3, 4, 7, 8, 9, 10, 13, 18, 23)[L - 1]
    longer = sample.extend(run, PROMPT, [a], new, [0], how=QUICK)[0]
    assert longer.shape[1] == L + new and np.array_equal(longer[:, :L], a)
    earlier = sample.extend(run, PROMPT, [a], new, [0], backward=True, how=QUICK)[0]
    assert earlier.shape[1] == L + new and np.array_equal(earlier[:, new:], a)
    ring = sample.loop(run, PROMPT, [a], new, [0], how=QUICK)[0]
    assert ring.shape[1] == L + new and np.array_equal(ring[:, :L], a)
    both = sample.connect(run, PROMPT, [a], [b], new, [0], ["a 3 moving up"], how=QUICK)[0]
    assert both.shape[1] == L + new + b.shape[1]
    assert np.array_equal(both[:, :L], a) and np.array_equal(both[:, L + new :], b)
    moving = sample.animate(run, PROMPT, [a[:, :1]], 1 + new, [0], how=QUICK)[0]
    assert moving.shape[1] == 1 + new and np.array_equal(moving[:, :1], a[:, :1])


def test_whole_latents_are_held_in_the_sampler(run):
    """Not only pasted: what is given whole is the same latent after sampling."""
    clip, known = clip_of(17)[None], np.arange(17) < 6
    x = torch.randn(1, 3, 5, 4, 6)
    x, given, level, held = prompting.show_given(run, clip, known, x)
    assert held.tolist() == [True, True, False, False, False]  # the third is given in part
    assert given[0, 3:, :, 0, 0].T.tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0], [0] * 4, [0] * 4]
    out = prompting.denoise_window(run, PROMPT, x, level, held, QUICK, prompting.seeded([0]), given)
    assert torch.equal(out[:, :, :2], x[:, :, :2]) and not torch.equal(out[:, :, 2:], x[:, :, 2:])


def test_what_is_to_be_made_is_not_in_what_is_shown(run):
    clip, other, known = clip_of(17)[None], clip_of(17, seed=5)[None], np.arange(17) >= 11
    other[:, :, known] = clip[:, :, known]
    x = torch.zeros(1, 3, 5, 4, 6)
    assert torch.equal(
        prompting.show_given(run, clip, known, x)[1], prompting.show_given(run, other, known, x)[1]
    )


def test_extend_uses_what_is_given(run):
    a = clip_of(5)
    b = a.copy()
    b[:, 4] = 255 - b[:, 4]
    one, two = (sample.extend(run, PROMPT, [x], 4, [0], how=QUICK)[0][:, 5:] for x in (a, b))
    assert not np.array_equal(one, two)


# ------------------------------------------------------------------------------------------ editing


def test_strength(run):
    for T in (1, 6, 17, 30):
        clip = clip_of(T)
        assert np.array_equal(sample.edit(run, PROMPT, [clip], 0.0, [3], how=QUICK)[0], clip)
    clip, other = clip_of(17), clip_of(17, seed=1)
    full = [sample.edit(run, PROMPT, [x], 1.0, [3], how=QUICK)[0] for x in (clip, other)]
    assert np.array_equal(*full)
    assert np.array_equal(full[0], sample.generate(run, PROMPT, (17, 16, 24), [3], steps=2)[0])
    half = [sample.edit(run, PROMPT, [x], 0.5, [3], how=QUICK)[0] for x in (clip, other)]
    assert half[0].shape == clip.shape and not np.array_equal(*half)


def test_connect_changes_the_caption_along_the_way(run):
    a, b = clip_of(5), clip_of(4, seed=1)
    first, both, last = (
        sample.connect(run, [p], [a], [b], 8, [0], [q], how=QUICK)[0][:, 5:13].astype(int)
        for p, q in (
            ("a 7 moving left",) * 2,
            ("a 7 moving left", "a 3 moving up"),
            ("a 3 moving up",) * 2,
        )
    )
    assert np.abs(both - first)[:, :2].mean() < np.abs(both - last)[:, :2].mean()
    assert np.abs(both - last)[:, -2:].mean() < np.abs(both - first)[:, -2:].mean()


# ------------------------------------------------------------------------------------- size, length


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 16, 40), (18, 24, 16), (41, 16, 16), (3, 96, 64)])
def test_any_size(run, size):
    clip = sample.generate(run, PROMPT, size, [0], steps=2)[0]
    assert clip.shape == (1, *size)


def test_impossible_sizes_say_what_would_do(run):
    with pytest.raises(ValueError, match="multiples of 8, such as 32 x 48"):
        sample.generate(run, PROMPT, (1, 33, 50), [0])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_streamed_is_unstreamed(run, eta):
    how = sample.Settings(2, 2.0, eta)
    chunks = list(sample.stream(run, PROMPT, (62, 16, 24), [4], how))
    streamed = np.concatenate(chunks, axis=2)
    assert len(chunks) > 3 and streamed.shape == (1, 1, 62, 16, 24)
    grid = prompting.latent_grid(run, 62, 16, 24)
    latent = torch.cat(list(prompting.roll(run, PROMPT, grid, prompting.seeded([4]), how)), dim=2)
    whole = sample.to_uint8(run.vae.decode(latent))[:, :, :62]
    assert np.abs(streamed.astype(int) - whole).max() <= 1 and (streamed != whole).mean() < 1e-3
    again = np.concatenate(list(sample.stream(run, PROMPT, (62, 16, 24), [4], how)), axis=2)
    assert np.array_equal(streamed, again)


def test_short_stream_is_generate(run):
    (stream,) = sample.stream(run, PROMPT, (17, 16, 24), [4], QUICK)
    assert np.array_equal(stream[0], sample.generate(run, PROMPT, (17, 16, 24), [4], steps=2)[0])


def test_noisy_context(run):
    latent, eps = torch.randn(2, 3, 5, 4, 6), torch.randn(2, 3, 5, 4, 6)
    clean = prompting.noisy_context(latent, 2, 0.0, eps, 4)
    assert torch.equal(clean[:, :3, :2], latent[:, :, :2]) and (clean[:, :, 2:] == 0).all()
    assert (clean[:, 3:, :2] == 1).all() and clean.shape == (2, 7, 5, 4, 6)
    noisy = prompting.noisy_context(latent, 2, torch.full((2, 1, 1, 1, 1), 1.0), eps, 4)
    assert torch.allclose(noisy[:, :3, :2], eps[:, :, :2])


def test_positions_of_a_window_start_at_one():
    packed = [patches.pack([torch.zeros(3, 2, 2, 2)], [[1, 2]], 2, 4, starts=[s]) for s in (0, 1)]
    assert packed[1].position[0, :, 0].tolist() == [-2, -1, 1, 2]
    assert torch.equal(packed[0].frame_id, packed[1].frame_id)


def test_levels_beyond_the_trained_size():
    level, held = torch.tensor([0.0, 1.0, 0.6]), torch.tensor([True, False, False])
    plain, larger = (
        prompting.level_table(10, level, held, ratio).flatten(1) for ratio in (1.0, 4.0)
    )
    for table in (plain, larger):
        assert table[0].tolist() == level.tolist() and (table[-1] == 0).all()
        assert (table[1:] <= table[:-1]).all()
    assert (larger[1:-1, 1:] > plain[1:-1, 1:]).all()


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", clips.SUFFIXES)
@pytest.mark.parametrize("C", [1, 3])
def test_what_was_written_comes_back(tmp_path, suffix, C):
    smooth = np.linspace(0, 255, 8 * 9 * 10).reshape(1, 9, 8, 10).round().astype(np.uint8)
    clip = np.repeat(smooth, C, axis=0)
    clip[:, 3:6] = clip[:, 3:4]  # still frames are frames
    clip = clip[:, :1] if suffix == ".png" else clip
    clips.write_clip(tmp_path / f"clip{suffix}", clip)
    back, _ = clips.read_clip(tmp_path / f"clip{suffix}", C, 2)
    assert back.shape == clip.shape and os.listdir(tmp_path) == [f"clip{suffix}"]
    error = np.abs(back.astype(int) - clip)
    assert error.max() == 0 if suffix not in (".mp4", ".webm") else error.mean() < 4


def test_fitting(tmp_path):
    picture = np.arange(13 * 21, dtype=np.uint8).reshape(1, 1, 13, 21)
    clips.write_clip(tmp_path / "a.png", picture)
    crop, done = clips.read_clip(tmp_path / "a.png", 1, 8)
    assert np.array_equal(crop[0, 0], picture[0, 0, 2:10, 2:18]) and "cropped to 8 x 16" in done
    pad, done = clips.read_clip(tmp_path / "a.png", 1, 8, mode="pad")
    assert np.array_equal(pad[0, 0, 1:14, 1:22], picture[0, 0]) and "padded to 16 x 24" in done
    for mode in ("crop", "pad"):
        big, done = clips.read_clip(tmp_path / "a.png", 3, 8, (32, 32), mode)
        assert big.shape == (3, 1, 32, 32) and "resized" in done
    Image.fromarray(np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "b.png")
    clear, _ = clips.read_clip(tmp_path / "b.png", 1, 8)
    assert (clear == 0).all()  # transparent
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "c.png")
    assert (clips.read_clip(tmp_path / "c.png", 1, 8)[0] == 255).all()  # 16 bits
    Image.fromarray(np.full((8, 8, 3), (250, 10, 10), np.uint8)).save(tmp_path / "d.png")
    assert "made gray" in clips.read_clip(tmp_path / "d.png", 1, 8)[1]


def test_examples_in_the_help_work(folder, tmp_path, monkeypatch):
    """Word for word, one after the other. The minute is shown to be one, and made shorter."""
    monkeypatch.chdir(tmp_path)
    lines = [
        x.strip() for x in sample.__doc__.splitlines() if x.strip().startswith("python sample.py")
    ]
    assert len(lines) >= 9
    for line in lines:
        line = line.removeprefix("python sample.py ").replace("--seconds 60", "--seconds 5")
        status, out, err = command(folder, line)
        assert status == 0, (line, err)
        assert "wrote" in out
    assert clips.read_clip("minute.mp4", 1, 8)[0].shape == (1, 50, 32, 32)
    seven = clips.read_clip("seven.gif", 1, 8)[0]
    assert seven.shape == (1, 17, 32, 48)
    longer = clips.read_clip("longer.gif", 1, 8)[0]
    assert longer.shape[1] == 50 and np.array_equal(longer[:, :17], seven)
    assert np.array_equal(clips.read_clip("earlier.gif", 1, 8)[0][:, -17:], seven)
    assert np.array_equal(clips.read_clip("loop.webp", 1, 8)[0][:, :17], seven)
    image = clips.read_clip("eight.png", 1, 8)[0]
    assert np.array_equal(clips.read_clip("falling.gif", 1, 8)[0][:, :1], image)
    assert Image.open("both_0.gif").size[0] == 4 * 32


@pytest.fixture
def bad(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    good = clip_of(9, 32, 32)
    for name in ("good.gif", "good.mp4", "good.webm", "good.webp"):
        clips.write_clip(name, good)
    for name in ("good.gif", "good.mp4", "good.webm", "good.webp"):
        data = Path(name).read_bytes()
        Path("cut" + name[4:]).write_bytes(data[: len(data) // 2])
    Path("empty.gif").touch()
    Path("text.gif").write_text("hello\n" * 99)
    Path("text.mp4").write_text("hello\n" * 99)
    Path("text.npy").write_text("hello\n" * 99)
    Path("folder.gif").mkdir()
    Image.new("L", (1, 1)).save("dot.png")
    Image.new("1", (10_000, 10_000)).save("huge.png")
    np.save("float.npy", np.zeros((3, 32, 32, 1)))
    np.save("pickle.npy", np.array([{"a": 1}]), allow_pickle=True)
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 8, 8, 1)}
    np.lib.format.write_array_header_1_0(header, shape)
    Path("liar.npy").write_bytes(header.getvalue())
    return tmp_path


FILES = "missing.gif empty.gif text.gif text.mp4 text.npy folder.gif dot.png huge.png float.npy"
FILES += " pickle.npy liar.npy cut.gif cut.mp4 cut.webp"


def test_bad_files(folder, bad):
    before = sorted(os.listdir(bad))
    for task in ("--image", "--extend", "--loop", "--edit", "--connect good.gif"):
        for name in FILES.split():
            if task == "--image" and name.startswith("cut"):
                continue  # the first frame may be there
            status, out, err = command(folder, f'--prompt "" {task} {name} --out out.gif')
            assert (status, err.count("\n")) == (2, 1), (task, name, status, out, err)
            assert name in err, err
    assert sorted(os.listdir(bad)) == before


@pytest.mark.parametrize("line", [
    "--image good.gif --loop good.gif", "--backward", "--strength 0.5", "--then x",
    "--frames 0", "--frames 3 --seconds 1", "--seconds nan", "--seconds -1",
    "--edit good.gif --frames 9", "--edit good.gif --strength 1.5",
    "--edit good.gif --strength nan", "--connect good.gif", "--height 33",
    "--image good.gif --height 32", "--image good.gif --height 33 --width 32", "--guidance nan",
    "--seed -1", "--out x.jpg", "--out x", "--height 100000 --width 100000", "--steps 0",
    "--fps 0", "--count 0", "--what", "--frames 999999999 --out x.gif", "--out good.gif/x.gif",
    "--run nowhere",
])  # fmt: skip
def test_wrong_flags(folder, bad, line):
    before = sorted(os.listdir(bad))
    status, _, err = command(folder, f'--prompt "a 7" {line}')
    assert (status, err.count("\n")) == (2, 1), err
    assert sorted(os.listdir(bad)) == before


def test_an_interrupted_run_leaves_a_playable_file(folder, tmp_path):
    """Ended by SIGTERM, and by SIGKILL, which nothing can answer."""
    line = f'sample.py --run {folder} --steps 2 --prompt "" --frames 5000 --out {tmp_path}/'
    jobs = {}
    for kind in (signal.SIGTERM, signal.SIGKILL):
        words = shlex.split(f"{line}{kind.name}.mp4")
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        jobs[kind] = subprocess.Popen(
            [sys.executable, *words],
            cwd=HERE,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=one,
        )
    for kind, job in jobs.items():
        path, end = tmp_path / f"{kind.name}.mp4", time.time() + 60
        while time.time() < end and not (path.exists() and path.stat().st_size > 50_000):
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.1)
        job.send_signal(kind)
        _, err = job.communicate(timeout=30)
        if kind == signal.SIGTERM:
            assert job.returncode == 130 and b"Traceback" not in err and b"interrupted" in err
        assert clips.read_clip(path, 1, 8)[0].shape[1] > 20
