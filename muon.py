"""Muon: an optimizer for matrices, whole or sharded over many GPUs.

The problem. A layer's gradient is a matrix in which few directions are strong and many are weak.
Gradient descent, and AdamW too, follow the strong ones; what the weak ones say is learned late.

The idea (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"). Take the
gradient's momentum apart into its singular vectors and values, U S V^T, and step along U V^T: all
directions alike. A few rounds of a polynomial make U V^T without a decomposition (Newton-Schulz):

    X <- a X + b (X X^T) X + c (X X^T)^2 X        keeps the singular vectors; drives all values to
                                                  about 1 (0.7 to 1.2, which is near enough)

It is for the matrices inside the blocks; AdamW takes all else (see loop.py).

Blocks are alike, so that many matrices have one shape: some of them are stacked and taken together,
which is up to twice as fast as one after the other.

Sharded (FSDP2): each process has some rows of each matrix. Momentum is a number for each weight, so
shards do. The polynomial is of the whole matrix, so that it is made whole for it, a stack at a
time, and each process keeps its rows of the result. `torch.optim.Muon` (2.13) also runs on shards,
but there the bfloat16 products are rounded shard by shard, and its steps are not those of one
process (16 % off in the first, in a test with two). Whole, they are the same. Every process does
all of the polynomial's work: little beside the step's own, for as long as a process has thousands
of tokens.

Run `python muon.py` to see singular values before and after.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

KIND = torch.bfloat16  # of the polynomial's products: there is nothing to be exact about
STACKED = 8  # matrices at a time


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """x [k, m, n], a stack of matrices U S V^T -> about U V^T of each."""
    a, b, c = 3.4445, -4.7750, 2.0315  # chosen by Jordan et al.: steep at 0, so that 5 rounds do
    tall = x.shape[-2] > x.shape[-1]
    x = x.to(KIND).mT if tall else x.to(KIND)  # X X^T is the smaller product
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(rounds):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """The same step as `torch.optim.Muon`, bit for bit, with adjust_lr_fn="match_rms_adamw": an
    update as large as AdamW's is, so that learning rates mean the same in both."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = {}
            for p in (p for p in group["params"] if p.grad is not None):
                alike.setdefault(p.shape, []).append(p)
            for some in alike.values():
                for k in range(0, len(some), STACKED):
                    self.step_of(some[k : k + STACKED], group["lr"], group["momentum"])

    def step_of(self, matrices: list[Tensor], lr: float, momentum: float) -> None:
        updates = []
        for p in matrices:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(mean, momentum)  # Nesterov: a look ahead
            updates.append(update.full_tensor() if isinstance(p, DTensor) else update)
        made = orthogonal(torch.stack(updates))  # [k, m, n], on every process
        for p, update in zip(matrices, made, strict=True):
            if isinstance(p, DTensor):
                update = DTensor.from_local(update, p.device_mesh, [Replicate()], run_check=False)
                update = update.redistribute(placements=p.placements)
            p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


# --------------------------------------------------------------------------------------------- demo


def main():
    torch.manual_seed(0)
    gradient = torch.randn(64, 8) @ torch.randn(8, 128) + 0.5 * torch.randn(64, 128)
    update = orthogonal(gradient[None])[0].float()
    for name, x in (("a gradient", gradient), ("Muon's update", update)):
        values = torch.linalg.svdvals(x)
        shown = ", ".join(f"{v:.2f}" for v in values[::9].tolist())
        print(f"singular values of {name} {list(x.shape)}: {shown}")


if __name__ == "__main__":
    main()
