"""Configuration of a DIPNet adapter."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Self

from peft import LoraConfig

from dip_hf.adapter_files import check_adapter_folder
from dip_hf.peft_compat import DUMMY_TARGET_MODULES, DIPPeftType


ADAPTER_FORMAT = 1
"""Version of the adapter's files; a reader refuses a newer one."""


@dataclass
class DIPNetConfig(LoraConfig):
    """LoRA, and at the input of chosen decoder blocks a sample of a learnable Gaussian around it (arXiv 2506.04690).

    Takes all of `peft.LoraConfig`'s arguments. `target_modules=[]` gives noise without LoRA.

    Args:
        noise_blocks: which decoder blocks get noise at their input: "all"; n for the last n; a list of indices; or a
            regular expression that a block's module name must match. Later blocks cost less when several
            trajectories are trained: they share the computation below the first noised block.
        noise_scale: initial standard deviation, as a multiple of the RMS of the block's input, measured on the first
            batch. Must be positive.
        learn_noise: train the log-variances; False keeps the noise at `noise_scale`.
        noise_in_eval: add noise in evaluation too. By default prediction is noise-free (the paper's default).
        noise_seed: seed of the noise where no trainer provides one.
        block_names: module names of all decoder blocks, in order. Found by itself in transformers models, and
            recorded on injection.
        dip_format: version of the adapter's files, filled in.

    Raises:
        ValueError: a field's value makes no sense; the message names field, value and remedy.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "As for LoRA; an empty list gives noise without LoRA."}
    )
    noise_blocks: str | int | list[int] = field(
        default="all", metadata={"help": "'all', n for the last n, a list of indices, or a regular expression."}
    )
    noise_scale: float = field(
        default=0.1, metadata={"help": "Initial standard deviation relative to the block input's RMS; positive."}
    )
    learn_noise: bool = field(default=True, metadata={"help": "Train the log-variances."})
    noise_in_eval: bool = field(default=False, metadata={"help": "Add noise in evaluation too."})
    noise_seed: int = field(default=0, metadata={"help": "Seed of the noise outside a trainer."})
    block_names: list[str] | None = field(
        default=None, metadata={"help": "Module names of all decoder blocks; found by itself where possible."}
    )
    dip_format: int = field(default=ADAPTER_FORMAT, metadata={"help": "Version of the adapter's files."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DIPPeftType.DIPNET
        if self.dip_format not in range(1, ADAPTER_FORMAT + 1):
            raise ValueError(
                f"dip_format={self.dip_format!r}: this version of dip_hf reads formats 1 to {ADAPTER_FORMAT}; "
                "upgrade dip_hf to load this adapter."
            )
        if not 0 < self.noise_scale < math.inf:  # False for NaN too
            raise ValueError(
                f"noise_scale={self.noise_scale} must be positive and finite; for no noise use peft.LoraConfig."
            )
        if isinstance(self.noise_blocks, tuple | range):
            self.noise_blocks = list(self.noise_blocks)  # JSON knows no tuples
        indices = self.noise_blocks if isinstance(self.noise_blocks, list) else [self.noise_blocks]
        kinds = int if isinstance(self.noise_blocks, list) else str | int
        if any(isinstance(index, bool) or not isinstance(index, kinds) for index in indices):
            raise ValueError(
                f"noise_blocks={self.noise_blocks!r} must be 'all', a number, a list of indices or a pattern."
            )
        if self.layer_replication:
            raise ValueError(
                f"layer_replication={self.layer_replication} shares one block's noise between several depths, which "
                "DIPNet does not define; leave it unset."
            )
        if isinstance(self.target_modules, set) and not self.target_modules and not self.target_parameters:
            self.target_modules = DUMMY_TARGET_MODULES

    @property
    def noise_only(self) -> bool:
        """Whether the adapter has noise and no LoRA weights."""
        return self.target_modules == DUMMY_TARGET_MODULES

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """As PEFT's; a local folder whose weight file is pickled or damaged is refused before anything is read.

        Raises:
            ValueError: see `dip_hf.adapter_files.check_adapter_folder`.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(folder):
            check_adapter_folder(folder, require_weights=False)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
