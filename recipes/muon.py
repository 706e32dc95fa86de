"""Muon in float32 for the blocks' matrices, AdamW for the rest, as one optimizer.

`torch.optim.Muon` iterates in bfloat16, which CPUs without bfloat16 instructions do several times slower than float32.
Source: https://kellerjordan.github.io/posts/muon/ with the step size matched to AdamW's (https://arxiv.org/abs/2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return about U V^T of `matrix` = U S V^T, shape (rows, columns), by the quintic Newton-Schulz iteration."""
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for groups with `muon=True`, AdamW for the others; one learning rate for both."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "muon": False})

    @classmethod
    def for_model(cls, model: nn.Module, lr: float, weight_decay: float = 0.01) -> Muon:
        """Give Muon the matrices outside the embeddings, AdamW the embeddings and (without decay) the vectors."""
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        embeddings = [p for name, p in named if p.ndim == 2 and ("embed" in name or "lm_head" in name)]
        vectors = [p for _, p in named if p.ndim != 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": True},
            {"params": embeddings},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return cls(groups, lr, weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one update of every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["mean"] = torch.zeros_like(parameter)
                    if not group["muon"]:
                        state["square"] = torch.zeros_like(parameter)
                update = self._muon if group["muon"] else self._adam
                parameter.sub_(group["lr"] * update(parameter.grad, state))

    @staticmethod
    def _muon(gradient: torch.Tensor, state: dict[str, torch.Tensor], momentum: float = 0.95) -> torch.Tensor:
        state["mean"].lerp_(gradient, 1 - momentum)
        direction = orthogonalize(gradient.lerp(state["mean"], momentum))
        return direction * (0.2 * max(gradient.shape) ** 0.5)  # root mean square of an AdamW update

    @staticmethod
    def _adam(gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        state["step"] += 1
        state["mean"].lerp_(gradient, 0.1)
        state["square"].lerp_(gradient.square(), 0.02)
        mean = state["mean"] / (1 - 0.9 ** state["step"])
        return mean / ((state["square"] / (1 - 0.98 ** state["step"])).sqrt() + 1e-8)
