"""The methods that every check of the trainer is made on, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from dip_hf import DIPNetConfig
from tests.trainer.tiny import ADAPTER


@dataclass(frozen=True)
class Method:
    """One row: what is trained, and how.

    Attributes:
        adapter: makes the PEFT config from the options of LoRA, or is None for full fine-tuning.
        options: fields of `DIPSFTConfig`.
        off: every regulariser is off, so that the run must be TRL's to the last bit.
        inapplicable: names of checks that do not apply, with the reason.
    """

    adapter: Callable[..., PeftConfig] | None
    options: dict[str, Any] = field(default_factory=dict)
    off: bool = False
    inapplicable: dict[str, str] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        """Whether training adds noise to the blocks' inputs, or samples weights."""
        return isinstance(self.config(), DIPNetConfig)

    @property
    def variational(self) -> bool:
        """Whether LoRA's A has a posterior."""
        config = self.config()
        return isinstance(config, DIPNetConfig) and config.variational_rank > 0

    def config(self, **options: Any) -> PeftConfig | None:
        """The PEFT config, with further options of LoRA."""
        return None if self.adapter is None else self.adapter(**{**ADAPTER, **options})


def noise_only(**options: Any) -> PeftConfig:
    return DIPNetConfig(**{**options, "target_modules": []})


def posterior_only(**options: Any) -> PeftConfig:
    return DIPNetConfig(**{"noise_blocks": [], "variational_rank": 4, "variational_blocks": "all", **options})


DRES = {"dres_weight": 0.5, "dres_group_size": 4, "dres_blocks": "2"}
SEQUENCE = {**DRES, "dres_group_size": 2, "dres_placement": "sequence"}
ICP = {"icp_weight": 0.5, "icp_warmup": 0.0, "icp_epsilon": 0.1}
ICP_ADAM = {**ICP, "icp_update": "adam", "icp_steps": 2, "num_trajectories": 2}
EVERY_MEAN = {**ICP_ADAM, "stability_weight": 0.05, "per_device_train_batch_size": 1}
"""With a `DIPNetConfig`: every term that is a mean over tokens, one row at a time."""
# What stands in for these checks is in test_by_hand.py.
GROUPS = dict.fromkeys(
    ("accumulation", "ranks", "packed"),
    "DReS draws its groups from the micro-batch, which this check cuts otherwise",
)
ROWS = dict.fromkeys(("packed", "padding_free"), "DReS by rows refuses batches that are laid end to end")
FULL = {"quantised": "a 4-bit base cannot be trained itself", "exported": "there is no adapter"}
METHODS = {
    "lora": Method(LoraConfig, off=True),
    "full": Method(None, off=True, inapplicable=FULL),
    "dipnet": Method(DIPNetConfig),
    "dipnet, m=2, stability": Method(DIPNetConfig, {"num_trajectories": 2, "stability_weight": 0.05}),
    "dipnet, half the depth, m=2": Method(lambda **k: DIPNetConfig(**k, noise_blocks=2), {"num_trajectories": 2}),
    "frozen noise, m=2": Method(lambda **k: DIPNetConfig(**k, learn_noise=False), {"num_trajectories": 2}),
    "noise only": Method(noise_only, {"num_trajectories": 2}, inapplicable={"exported": "there are no LoRA weights"}),
    "ibvi": Method(posterior_only),
    "ibvi faithful, half the depth, m=2": Method(
        lambda **k: posterior_only(**k, variational_blocks=2),
        {"variational_optimizer": "faithful", "num_trajectories": 2, "stability_weight": 0.05},
    ),
    "dipnet + ibvi, m=2": Method(
        lambda **k: DIPNetConfig(**k, variational_rank=2, variational_blocks="all"), {"num_trajectories": 2}
    ),
    "dres token": Method(LoraConfig, DRES, inapplicable=GROUPS),
    "dres sequence": Method(LoraConfig, SEQUENCE, inapplicable={**GROUPS, **ROWS}),
    "icp": Method(LoraConfig, ICP),
    "icp late, two steps": Method(LoraConfig, {**ICP, "icp_start_block": 1, "icp_steps": 2, "icp_interval": 1}),
    "dipnet + icp adam, two steps": Method(DIPNetConfig, ICP_ADAM),
    "dipnet + dres + icp": Method(DIPNetConfig, {**DRES, **ICP, "num_trajectories": 2}, inapplicable=GROUPS),
    "ibvi + dres + icp": Method(posterior_only, {**DRES, **ICP}, inapplicable=GROUPS),
    "full, dres + icp": Method(None, {**DRES, **ICP}, inapplicable={**GROUPS, **FULL}),
}
