"""ICP's options, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dip_hf.icp.functional import DIRECTIONS, POSITIONS, UPDATES, WEIGHTINGS, term_weights


@dataclass(frozen=True)
class ICPOptions:
    """What there is to choose. The fields of `DIPSFTConfig` are these with the prefix `icp_`.

    Args:
        weight: w, weight of the feature loss; 0 is off.
        steps: T, perturbation steps; each after the first costs a forward and a backward pass more.
        epsilon: ε, length of a step relative to the RMS of what it perturbs.
        update: "normalised", "sign" or "adam", see `dip_hf.icp.functional.perturbation_step`.
        direction: "descent" is ICP: the input moves to where the loss is lower. "ascent" (to where it is higher) and
            "random" (a random direction, every token as far as under descent) are its controls.
        positions: perturb "all" tokens, or those of the "prompt"; above the embeddings never a document's first.
        layers: number of decoder blocks whose outputs are compared, evenly spaced up to the last one; all of them
            where there are no more.
        start_block: 0 perturbs the input embeddings; s > 0 perturbs the input of block s, and only the blocks from
            there on run again.
        interval: every n-th step only.
        weighting: "additive" or "paper", see `dip_hf.icp.functional.term_weights`.
        warmup: share of the run before the feature loss sets in.

    Raises:
        ValueError: a value makes no sense; the message names field, value and remedy.
    """

    weight: float = 0.0
    steps: int = 1
    epsilon: float = 0.03
    update: str = "normalised"
    direction: str = "descent"
    positions: str = "all"
    layers: int = 4
    start_block: int = 0
    interval: int = 1
    weighting: str = "additive"
    warmup: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"icp_weight={self.weight} must not be negative; 0 turns ICP off.")
        for name in ("steps", "layers", "interval"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"icp_{name}={getattr(self, name)} must be a whole number, at least 1; to turn ICP off set "
                    "icp_weight to 0."
                )
        if not 0 < self.epsilon < math.inf:
            raise ValueError(
                f"icp_epsilon={self.epsilon} must be positive, for instance 0.03; to turn ICP off set icp_weight to 0."
            )
        if not isinstance(self.start_block, int) or self.start_block < 0:
            raise ValueError(
                f"icp_start_block={self.start_block} must be a whole number and not negative; 0 is the input "
                "embeddings."
            )
        for name, choices in (
            ("update", UPDATES),
            ("direction", DIRECTIONS),
            ("positions", POSITIONS),
            ("weighting", WEIGHTINGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"icp_{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(
                f"icp_warmup={self.warmup} must lie in [0, 1]: it is a share of the run, not a number of steps."
            )

    def due(self, step: int) -> bool:
        """Whether optimiser step `step`, counted from 0, is one with a perturbation."""
        return step % self.interval == 0

    def term_weights(self, progress: float) -> tuple[float, float]:
        """Weights of the task loss and of the feature loss when the share `progress` of the run is done."""
        return term_weights(progress, self.weight, self.warmup, self.weighting)
