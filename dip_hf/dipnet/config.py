"""Configuration of a DIPNet adapter."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from peft import LoraConfig

from dip_hf.adapter_files import (
    CONVERSION,
    PICKLED_NAME,
    WEIGHTS_NAME,
    Shapes,
    check_adapter_folder,
    declared_shapes,
    fetch_weights,
    read_config,
)
from dip_hf.blocks import check_choice
from dip_hf.dipnet.field_checks import check_declared, check_fields
from dip_hf.peft_compat import DUMMY_TARGET_MODULES, DIPPeftType, requested_variants


ADAPTER_FORMAT = 2
"""Version of the adapter's files; a reader refuses a newer one. Adapters without a posterior are written as 1."""


@dataclass
class DIPNetConfig(LoraConfig):
    """LoRA, and at the input of chosen decoder blocks a sample of a learnable Gaussian around it (arXiv 2506.04690).

    With `variational_rank` > 0 LoRA's A has a low-rank Gaussian posterior besides, or, with `noise_blocks=[]`, instead
    (IBVI, arXiv 2505.20235; see dip_hf/ibvi/README.md).

    Takes all of `peft.LoraConfig`'s arguments. `target_modules=[]` gives noise without LoRA.

    Args:
        noise_blocks: which decoder blocks get noise at their input: "all"; n for the last n; "25%" for the last
            quarter; a list of indices; or a regular expression that a block's module name must match. Later blocks
            cost less when several trajectories are trained: they share the computation below the first noised block.
            `[]` or 0 for none, with `variational_rank` > 0 only.
        noise_scale: initial standard deviation, as a multiple of the RMS of the block's input, measured on the first
            batch. Must be positive. 0.1 is this project's choice; on four blocks trials chose 0.1 with 50 examples a
            family and 0.2 with 100 (docs/results.md), and it adds up over blocks.
        learn_noise: train the log-variances; False keeps the noise at `noise_scale`.
        noise_in_eval: add noise in evaluation too, and sample the posterior; read when the adapter is made or loaded.
            By default prediction is noise-free (the paper's default) and by the posterior's mean.
        noise_seed: seed of the posterior's initial covariance, and of the noise where no trainer provides one.
        variational_rank: R, rank of the posterior's covariance; 0 is off.
        variational_scale: c, initial standard deviation of a weight as a multiple of 1/√n, n the layer's input size
            (c = 1 is the paper's; 2 is this project's choice, from studies/ibvi_sweep.yaml on a base since replaced,
            see docs/first_base). 0 keeps the covariance at zero: LoRA to the last bit.
        variational_blocks: in which decoder blocks the targeted linear layers are variational, chosen as in
            `noise_blocks`. Predictions share the computation below the first. The last quarter is this project's
            choice, from the same sweep; the paper has no adapters.
        block_names: module names of all decoder blocks, in order; unset, they are found in transformers models.
        found_block_names: what was found where `block_names` is unset, filled in on injection.
        dip_format: version of the adapter's files, filled in.
        dip_hf_version: version of this package that made the adapter, filled in.

    Raises:
        ValueError: a field's value makes no sense; the message names field, value and remedy.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "As for LoRA; an empty list gives noise without LoRA."}
    )
    noise_blocks: str | int | list[int] = field(
        default="all", metadata={"help": "'all', the last by number or percentage, a list of indices, or a pattern."}
    )
    noise_scale: float = field(
        default=0.1, metadata={"help": "Initial standard deviation relative to the block input's RMS; positive."}
    )
    learn_noise: bool = field(default=True, metadata={"help": "Train the log-variances."})
    noise_in_eval: bool = field(default=False, metadata={"help": "Noise and a sampled posterior in evaluation too."})
    noise_seed: int = field(
        default=0, metadata={"help": "Seed of a posterior's start, and of the noise outside a trainer."}
    )
    variational_rank: int = field(default=0, metadata={"help": "R, rank of the covariance of LoRA's A; 0 is off."})
    variational_scale: float = field(
        default=2.0, metadata={"help": "c, initial standard deviation of a weight relative to 1/√n."}
    )
    variational_blocks: str | int | list[int] = field(
        default="25%", metadata={"help": "Blocks with a posterior: as for noise_blocks."}
    )
    block_names: list[str] | None = field(
        default=None, metadata={"help": "Module names of all decoder blocks; found by itself where possible."}
    )
    found_block_names: list[str] | None = field(
        default=None, metadata={"help": "The blocks that were found, filled in on injection."}
    )
    dip_format: int = field(default=1, metadata={"help": "Version of the adapter's files."})
    dip_hf_version: str = field(default=version("dip_hf"), metadata={"help": "What made the adapter."})

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            super().__post_init__()
        except TypeError as error:  # of PEFT's nested configurations
            raise ValueError(f"{error}; correct the field, or leave it unset.") from error
        self.peft_type = DIPPeftType.DIPNET
        self.auto_mapping = None  # PEFT would import the module that it names
        self._weight_shapes: Shapes | None = None  # of the weight file that this configuration came with
        if self.dip_format not in range(1, ADAPTER_FORMAT + 1):
            raise ValueError(
                f"dip_format={self.dip_format!r}: this version of dip_hf reads formats 1 to {ADAPTER_FORMAT}; "
                "upgrade dip_hf to load this adapter."
            )
        if not 0 < self.noise_scale < math.inf:  # False for NaN too
            raise ValueError(
                f"noise_scale={self.noise_scale} must be positive and finite; for no noise use peft.LoraConfig."
            )
        if self.block_names == []:
            raise ValueError("block_names=[] names no block; name all decoder blocks, or leave it unset.")
        twice = [name for name, times in Counter(self.block_names).items() if times > 1]
        if twice:
            raise ValueError(f"block_names has {twice[0]!r} twice; name every block once, in order.")
        for name in ("noise_blocks", "variational_blocks"):
            blocks = getattr(self, name)
            if isinstance(blocks, tuple | range):
                blocks = list(blocks)  # JSON knows no tuples
                setattr(self, name, blocks)
            check_choice(blocks, name)
        if self.layer_replication:
            raise ValueError(
                f"layer_replication={self.layer_replication} shares one block's noise between several depths, which "
                "DIPNet does not define; leave it unset."
            )
        if isinstance(self.target_modules, set) and not self.target_modules and not self.target_parameters:
            self.target_modules = DUMMY_TARGET_MODULES
        if not isinstance(self.noise_seed, int):
            raise ValueError(f"noise_seed={self.noise_seed!r} must be a whole number.")
        self._check_posterior()

    def _check_posterior(self) -> None:
        rank = self.variational_rank
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"variational_rank={rank!r} must be a whole number, 0 (off) or more.")
        if not 0 <= self.variational_scale < math.inf:
            raise ValueError(
                f"variational_scale={self.variational_scale} must not be negative; 0 keeps the covariance at zero."
            )
        if rank == 0:
            if not self.projected:
                raise ValueError(
                    f"noise_blocks={self.noise_blocks!r} and variational_rank=0 leave nothing but LoRA; use "
                    "peft.LoraConfig, or set one of them."
                )
            return
        self.dip_format = max(self.dip_format, 2)
        if variants := requested_variants(self):
            raise ValueError(
                f"variational_rank={rank} with {', '.join(variants)}: a LoRA layer cannot be both; leave "
                f"{', '.join(variants)} unset, or set variational_rank to 0."
            )
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters} with variational_rank={rank}: only linear layers can be "
                "variational; leave target_parameters unset, or set variational_rank to 0."
            )
        if self.noise_only:
            raise ValueError(
                f"target_modules=[] with variational_rank={rank}: without LoRA nothing can be variational; name "
                "target modules, or set variational_rank to 0."
            )

    @property
    def all_block_names(self) -> list[str] | None:
        """Module names of all decoder blocks, given or found; None before they are found."""
        return self.found_block_names if self.block_names is None else self.block_names

    @property
    def projected(self) -> bool:
        """Whether there is noise at the input of any block."""
        return self.noise_blocks not in (0, [])

    @property
    def noise_only(self) -> bool:
        """Whether the adapter has noise and no LoRA weights."""
        return self.target_modules == DUMMY_TARGET_MODULES

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, with a warning beside weights that were pickled, which cannot be loaded as they are."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        if (folder / PICKLED_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
            warnings.warn(
                f"safe_serialization=False has pickled the weights in {folder}, and dip_hf reads only safetensors; "
                f"save again without it, or {CONVERSION}.",
                stacklevel=3,  # the caller of the model's save_pretrained
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """As PEFT's; what cannot be loaded safely and whole is refused before any weight is read or allocated.

        The configuration remembers the shapes in its weight file, and fits only models that have them;
        `dataclasses.replace(config)` makes one for a new adapter.

        Raises:
            ValueError: see `dip_hf.adapter_files.check_adapter_folder`; or `subfolder` leads out of the folder, the
                file has unknown keys or another `peft_type`, or a field's value makes no sense.
        """
        if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
            raise ValueError(f"subfolder={subfolder!r} leads out of the adapter's folder; name one inside it.")
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            folder = fetch_weights(str(pretrained_model_name_or_path), subfolder, kwargs)
        content = read_config(folder)
        # A model's file says so; a configuration that was saved alone has no weights beside it.
        check_adapter_folder(folder, require_weights=content.get("inference_mode") is True)
        if content.get("peft_type") != DIPPeftType.DIPNET.value:
            raise ValueError(
                f"{folder}: peft_type={content.get('peft_type')!r} is no DIPNet adapter; PEFT loads it as it is."
            )
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        unknown = sorted(set(content) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"{folder}: adapter_config.json has the unknown keys {unknown}; upgrade dip_hf and peft if a newer "
                "release wrote it, or remove them."
            )
        if (folder / WEIGHTS_NAME).is_file() and not kwargs.get("ignore_mismatched_sizes"):
            config._weight_shapes = declared_shapes(folder)
            check_declared(config, config._weight_shapes)
        if (samples := config.monteclora_config) is not None:  # how many are drawn at a time changes none of them
            samples.buffer_size = min(samples.buffer_size, type(samples).buffer_size)  # PEFT's default
        return config
