"""Lion, the optimizer of Chen et al. (arXiv 2302.06675, algorithm 2), which torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Moves every weight by the learning rate, in the direction of the sign of an averaged gradient.

    With gradient g and average m: the step is sign(beta_1 m + (1 - beta_1) g), then m becomes
    beta_2 m + (1 - beta_2) g. Weight decay is decoupled, as in AdamW. Steps read nothing back to the host.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; a tensor on the device where steps are captured.
        betas: beta_1 and beta_2.
        weight_decay: what it is multiplied by is the learning rate and the weight.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one update; ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if "exp_avg" not in self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            gradients = [p.grad for p in weights if p.grad is not None]
            averages = [self.state[p]["exp_avg"] for p in weights]
            lr, (old, kept) = group["lr"], group["betas"]
            moves = torch._foreach_sign(torch._foreach_lerp(averages, gradients, 1 - old))
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_mul_(moves, lr)
            torch._foreach_sub_(weights, moves)
            torch._foreach_lerp_(averages, gradients, 1 - kept)
