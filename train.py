"""Train everything: the VAE, then the diffusion transformer, from a CPU toy to many GPUs. 

    python train.py --preset tiny                          # moving MNIST on a laptop CPU
    torchrun --nproc_per_node=8 train.py --preset xl       # the same code on 8 GPUs

A preset is a set of defaults and every one of them is a flag (--depth 8). The same command continues
a run that was stopped. Progress is one integer, the step: data, noise and learning rate are functions
of (seed, step, rank), so a continued run is bit for bit the run that was not interrupted.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
import patches
import sample
from dit import DiT, DiTConfig
from text import Tokenizer, NOTHING
from vae import VAE, VAEConfig


@dataclass
class Config:
    preset: str = "tiny"
    stage: str = "all"
    out: str = ""
    mnist: str = ""
    seed: int = 0
    # the world
    digit: int = 14
    durations: str = "9,17"
    shapes: str = "32x32,24x40,40x24,32x48,48x32"
    two_digits: float = 0.3
    # the VAE
    time_factor: int = 4
    space_factor: int = 8
    channels: int = 20
    vae_width: int = 128
    encoder_depth: int = 2
    decoder_depth: int = 3
    kl: float = 1e-4
    vae_steps: int = 600
    vae_batch: int = 32
    vae_lr: float = 5e-3
    # the DiT
    patch: int = 1
    width: int = 256
    depth: int = 8
    heads: int = 4
    prediction: str = "x"
    steps: int = 1500
    rows: int = 8
    tokens: int = 256
    lr: float = 5e-3
    images: float = 0.6
    image_phase: float = 0.3
    dropout: float = 0.1
    given: float = 0.2
    ema: float = 0.99
    warmup: float = 0.03
    cooldown: float = 1.0
    save_every: int = 200
    sample_every: int = 300


def muon_direction(g: Tensor) -> Tensor:
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in [(4.0848,-6.8946,2.9270),(3.9505,-6.3029,2.6377),(3.7418,-5.5913,2.3037),(2.8769,-3.1427,1.2046),(2.8366,-3.0525,1.2012)]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x
