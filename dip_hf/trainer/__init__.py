"""The only part that knows TRL's trainer, around whose loss it composes the regularisers."""

from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.optimizer import optimizer_groups
from dip_hf.trainer.trainer import DIPSFTTrainer


__all__ = ["DIPSFTConfig", "DIPSFTTrainer", "optimizer_groups"]
