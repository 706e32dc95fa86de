"""dip_hf: fine-tuned language models that generalise better. Importing it registers the DIPNet adapter with PEFT."""

from dip_hf.dipnet import DIPNetConfig, DIPNetModel, export_lora
from dip_hf.noise import NoiseKey

__all__ = ["DIPNetConfig", "DIPNetModel", "NoiseKey", "export_lora"]
