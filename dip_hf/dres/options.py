"""DReS's options, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dip_hf.blocks import check_choice
from dip_hf.dres.functional import coding_matrices


PLACEMENTS = ("token", "sequence")
GRADIENTS = ("scale_free", "all", "coded")


@dataclass(frozen=True)
class DReSOptions:
    """What there is to choose. The fields of `DIPSFTConfig` are these with the prefix `dres_`.

    Args:
        placement: "token": samples are valid tokens, f is the MLP sublayer of each chosen block. "sequence": samples
            are rows of the batch, f is the range of chosen blocks.
        blocks: which blocks, as in `dip_hf.blocks.select_blocks`.
        group_size: K, samples in a group.
        oversampling: N/K; N is rounded up.
        share: share of the groups coded in a pass, rounded up to a whole group: a random sample, whose error is an
            unbiased estimate of the mean over all groups.
        gradient: "scale_free": through both branches, and the variance of f(x) that the error is divided by, so that
            shrinking f does not make the error smaller. "all": with the variance held constant. "coded": f(x) is a
            constant too, so that the coded branch alone has a gradient.

    Raises:
        ValueError: a value that cannot work in any model; the message names field, value and remedy.
    """

    placement: str = "token"
    blocks: str | int | Sequence[int] = "25%"
    group_size: int = 8
    oversampling: float = 1.25
    share: float = 0.5
    gradient: str = "scale_free"

    def __post_init__(self) -> None:
        for name, choices in (("placement", PLACEMENTS), ("gradient", GRADIENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"dres_{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        check_choice(self.blocks, "dres_blocks")
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"dres_group_size={self.group_size} must be at least 2: one sample leaves no path.")
        if not 1 <= self.oversampling < math.inf:
            raise ValueError(
                f"dres_oversampling={self.oversampling} must be at least 1: with fewer coded samples than samples the "
                "error measures the interpolation and not the curvature; 1.25 to 1.5 is usual."
            )
        try:
            coding_matrices(self.group_size, self.coded_size)
        except ValueError as error:
            raise ValueError(f"dres_oversampling={self.oversampling}: {error}") from error
        if not 0 < self.share <= 1:
            raise ValueError(
                f"dres_share={self.share} must be above 0 and at most 1: the share of the groups coded per step; "
                "1 codes all, and dres_weight=0 turns DReS off."
            )

    @property
    def coded_size(self) -> int:
        """N, the number of coded samples."""
        return math.ceil(round(self.oversampling * self.group_size, 9))
