"""Muon: an optimizer for matrices, whole or sharded (Jordan et al. 2024).

In a layer's gradient few directions are strong and many are weak. AdamW follows the strong ones;
what the weak ones say is learned late. Muon splits the gradient's momentum into singular vectors
and values, U S V^T, and steps along U V^T: all directions count alike. A polynomial makes U V^T
without a decomposition (Newton-Schulz). It needs whole matrices, also where a process holds only
some rows: `torch.optim.Muon` rounds shard by shard, so its first step is 16% off.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from prompting import bf16


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """x [k, m, n], a stack of matrices U S V^T -> about U V^T of each, with values of 0.7 to 1.2:
    in each round X <- a X + b (X X^T) X + c (X X^T)^2 X, which is steep at 0."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.mT.contiguous() if (tall := x.shape[-2] > x.shape[-1]) else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(rounds):
        square = x @ x.mT  # the smaller product: x is wide
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """As `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw": updates as large as AdamW's."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        for p in matrices:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        some = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for shape in dict.fromkeys(p.shape for p in some):  # many are alike: a stack is faster
            self.step_of([p for p in some if p.shape == shape])

    def step_of(self, alike: list[Tensor]) -> None:
        group, device, updates = self.param_groups[0], alike[0].device, []
        with bf16(device):  # the polynomial's products need not be exact
            kind = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        for p in alike:
            mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(mean, group["momentum"]).to(kind)  # Nesterov: a look ahead
            updates.append(update.full_tensor() if isinstance(p, DTensor) else update)
        for p, update in zip(alike, orthogonal(torch.stack(updates)), strict=True):
            if isinstance(p, DTensor):  # this process keeps its rows
                update = DTensor.from_local(update, p.device_mesh, [Replicate()], run_check=False)
                update = update.redistribute(placements=p.placements)
            p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
