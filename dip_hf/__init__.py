"""dip_hf: fine-tuned language models that generalise better. Importing it registers the DIPNet adapter with PEFT."""

from dip_hf.dipnet import DIPNetConfig, DIPNetModel, export_lora
from dip_hf.noise import NoiseKey
from dip_hf.trainer import DIPSFTConfig, DIPSFTTrainer


__all__ = ["DIPNetConfig", "DIPNetModel", "DIPSFTConfig", "DIPSFTTrainer", "NoiseKey", "export_lora"]
