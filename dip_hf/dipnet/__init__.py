"""DIPNet: noise at the input of every decoder block, with a learnable variance (arXiv 2506.04690)."""

from dip_hf.dipnet.config import DIPNetConfig
from dip_hf.dipnet.export import export_lora
from dip_hf.dipnet.model import DIPNetModel
from dip_hf.peft_compat import DIPPeftType, register


register(DIPPeftType.DIPNET, DIPNetConfig, DIPNetModel)

__all__ = ["DIPNetConfig", "DIPNetModel", "export_lora"]
