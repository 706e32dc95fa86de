"""Several torch optimisers as one: AdamW for some parameter groups, SGD with momentum for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer


class HybridOptimizer(Optimizer):
    """One optimiser that steps each parameter group with the torch optimiser that it came from.

    Groups and state are shared with the parts, so that schedulers, accelerate and checkpoints see one ordinary
    optimiser, and the updates are torch's own.

    Args:
        parts: optimisers over disjoint parameters; they must not be used by themselves afterwards.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        for index, part in enumerate(self.parts):
            for group in part.param_groups:
                group["part"] = index
        # Schedules with a least rate read it from the defaults
        rate = {"lr": self.parts[0].defaults["lr"]}
        super().__init__([group for part in self.parts for group in part.param_groups], rate)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step of every part; `closure` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, part in enumerate(self.parts):
            # Loading a state dict makes new groups and a new state
            part.param_groups = [group for group in self.param_groups if group["part"] == index]
            part.state = self.state
            part.step()
        return loss
