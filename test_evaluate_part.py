"""The reader of clips and the figures made with it."""

import argparse
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import reader
from dit import DiT, DiTConfig
from vae import VAE, VAEConfig

CONFIG = data.WorldConfig(digit=14, durations=(5, 9, 17), shapes=((32, 32), (24, 40), (48, 32)))


def world(share: float, held_out: bool = True, seed: int = 3) -> data.World:
    """A world in which this share of the clips has two digits."""
    config = data.WorldConfig(**{**asdict(CONFIG), "two_digits": share})
    return data.World(config, *evaluate.digits(held_out), seed)


@pytest.fixture(scope="module")
def network():
    """A classifier trained for a fifth of the usual time."""
    images, labels = evaluate.digits(held_out=False)
    return reader.train_classifier(data.make_sprites(images, CONFIG.digit), labels, epochs=2)


def test_classifier_knows_held_out_digits(network):
    images, labels = evaluate.digits(held_out=True)
    assert len(labels) == 500
    assert reader.accuracy(network, data.make_sprites(images, CONFIG.digit), labels) >= 0.95


@pytest.mark.parametrize("size", [(5, 24, 24), (9, 32, 32), (17, 24, 40)])
def test_one_digit_is_read_from_real_clips(network, size):
    clips, facts = world(0.0).clips(np.arange(80), size)
    seen = [reader.read_one(clip, network, CONFIG.digit) for clip in clips]
    scores = [reader.score_one(s, f["digits"]) for s, f in zip(seen, facts, strict=True)]
    assert all(score["direction"] == 1 for score in scores)
    assert np.mean([score["digit"] for score in scores]) >= 0.93


def test_two_digits_are_tracked_through_crossings():
    two, size, n = world(1.0), (17, 32, 32), 60
    sizes = np.tile(size, (n, 1))
    path = two.path(two.facts(np.arange(n), sizes), sizes, size[0])  # [n, T, 2, 2]
    crosses = (np.abs(path[:, :, 0] - path[:, :, 1]) < 10).all(-1).any(-1)
    assert crosses.sum() > 15
    for clip, true in zip(two.clips(np.arange(n), size)[0], path, strict=True):
        tracks = reader.track_two(reader.to_ink(clip), CONFIG.digit, fastest=2)
        offsets = [tracks[:, order] - true for order in ([0, 1], [1, 0])]  # either may be first
        # A box's corner and its digit's centre differ by the same all the time.
        assert min(np.abs(o - np.median(o, axis=0)).max() for o in offsets) <= 1


def test_two_digits_are_read_and_only_what_is_there(network):
    clips, facts = world(1.0).clips(np.arange(60), (9, 32, 48))
    seen = [reader.read_two(clip, network, CONFIG.digit) for clip in clips]

    def share(asked):
        scores = [reader.score_two(s, f["digits"]) for s, f in zip(seen, asked, strict=True)]
        return np.mean([score["both"] for score in scores])

    assert share(facts) >= 0.9
    assert share(facts[1:] + facts[:1]) <= 0.1  # the prompts of other clips


def test_score_two_takes_either_order_but_no_exchange():
    asked = [{"digit": 3, "direction": "up"}, {"digit": 8, "direction": "right"}]
    swapped = {"digits": [8, 3], "directions": ["right", "up"]}
    assert reader.score_two(swapped, asked) == {"digits": 1, "directions": 1, "both": 1}
    exchanged = {"digits": [8, 3], "directions": ["up", "right"]}
    assert reader.score_two(exchanged, asked) == {"digits": 1, "directions": 1, "both": 0}
    twice = {"digits": [3, 3], "directions": ["up", "right"]}
    assert reader.score_two(twice, asked) == {"digits": 0, "directions": 1, "both": 0}


@pytest.mark.parametrize(
    "steps, way",
    [
        ([(0, -1), (0, -2), (0, -3), (0, -4), (0, 9)], "left"),  # not what comes later
        ([(0, 2), (0, 4), (0, 2), (0, 0)], "right"),  # turns back early
        ([(-1, 0.4), (-2, 0.8), (-3, 1.2), (-4, 1.6)], "up"),
        ([(2, 0)], "down"),
        ([(0.2, 0.3)] * 8, "still"),
        ([], "still"),
    ],
)
def test_heading(steps, way):
    assert reader.heading(np.array([(0, 0), *steps], float) + 7) == way


def test_sharpness_falls_under_blur_and_not_under_noise():
    clips = world(0.0).clips(np.arange(20), (9, 32, 32))[0]
    kernel = torch.ones(1, 1, 3, 3) / 9
    frames = [torch.from_numpy(clip).float().transpose(0, 1) for clip in clips]  # [T, 1, H, W]
    blurred = [torch.conv2d(x, kernel, padding=1).byte().transpose(0, 1).numpy() for x in frames]
    noise = np.random.default_rng(0)
    noisy = [(c + noise.normal(0, 10, c.shape)).clip(0, 255).astype(np.uint8) for c in clips]
    sharp = reader.sharpness(clips)
    assert reader.sharpness(blurred) < 0.8 * sharp
    assert 0.95 * sharp < reader.sharpness(noisy) < 1.15 * sharp  # nor does it pass for detail


def test_prompts_are_balanced_and_in_every_size():
    clips, facts = evaluate.real_clips(CONFIG, 120, 30, seed=1)
    sizes = [clip.shape[1:] for clip in clips]
    assert set(sizes) == {(17, 32, 32), (17, 24, 40), (17, 48, 32), (9, 32, 32), (5, 32, 32)}
    ones = [f["digits"][0] for f in facts if len(f["digits"]) == 1]
    kinds = [(d["digit"], d["direction"]) for d in ones]
    assert len(ones) == 120 and len(facts) == 150
    assert {kinds.count(kind) for kind in kinds} == {3} and len(set(kinds)) == 40


def test_figures_tell_a_perfect_model_from_a_deaf_one(network, monkeypatch, tmp_path):
    """Two stand-ins for a model: one renders its prompts, with digits that no prompt was made of;
    the other renders anything."""
    worlds = world(0.0, held_out=False), world(1.0, held_out=False)
    stock = {}  # a clip's world and number, by its caption
    for many, one in zip((1_000, 20_000), worlds, strict=True):
        facts = one.all_facts(np.arange(many), np.tile((17, 32, 32), (many, 1)))
        stock |= {data.short_caption(fact): (one, i) for i, fact in enumerate(facts)}

    def perfect(run, prompts, size, seeds, steps):
        assert steps == 7 and len(set(seeds)) == len(prompts)
        return [one.clips([i], size)[0][0] for one, i in map(stock.get, prompts)]

    def deaf(run, prompts, size, seeds, steps):
        return worlds[" and " in prompts[0]].clips(seeds, size)[0]

    monkeypatch.setattr(evaluate, "load_classifier", lambda digit: (network, 1.0))
    run = SimpleNamespace(vae=VAE(VAEConfig(width=8)).eval(), world=asdict(CONFIG))
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(evaluate.sample, "generate", perfect)
    good = evaluate.measure_prompts(run, 40, 20, steps=7, sheet=sheet)
    assert sheet.exists() and len(good["sizes"]) == 5
    for name in ("real", "generated"):
        assert good[name]["digit"] >= 0.9 and good[name]["direction"] == 1
        assert good[name]["both"] >= 0.75
    assert good["VAE"]["digit"] < 0.5  # not trained
    assert good["VAE"]["compression"] > 10
    monkeypatch.setattr(evaluate.sample, "generate", deaf)
    bad = evaluate.measure_prompts(run, 40, 20, steps=7)["generated"]
    assert bad["digit"] < 0.3 and bad["direction"] < 0.6 and bad["both"] < 0.2
    assert "generated" in evaluate.table(good)


def test_flops_are_those_that_are_counted():
    dit = DiT(DiTConfig(width=64, depth=2, heads=2))
    packed = evaluate.mixed_batch(VAE(VAEConfig(width=8)), dit.config)["packed"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        level = torch.full(packed.frame_clip.shape, 0.5)
        dit(packed.tokens, level, packed).square().mean().backward()
    real = sum(end - start for _, start, _, end in packed.where)
    assert real == pytest.approx(packed.fill * packed.text.numel())
    assert evaluate.step_flops(dit, packed) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_bench_says_how_fast_and_how_full(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "ROWS", 2)
    evaluate.bench(argparse.Namespace(repeats=1))
    said = capsys.readouterr().out
    assert all(word in said for word in ("packed:   2 rows of 256", "padded", "encode", "decode"))


@pytest.mark.parametrize(
    "words", [["prompts", "--run", "no/where"], ["prompts", "--ones", "0"], ["dance"], []]
)
def test_a_mistake_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("evaluate.py: ") and not said.out
