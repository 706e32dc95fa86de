"""The only part that knows TRL: the trainer composes the task loss and the regularisers."""

from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.optimizer import optimizer_groups
from dip_hf.trainer.trainer import DIPSFTTrainer


__all__ = ["DIPSFTConfig", "DIPSFTTrainer", "optimizer_groups"]
