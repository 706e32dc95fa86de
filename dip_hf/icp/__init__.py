"""ICP: self-distillation via iterative constructive perturbations (arXiv 2505.14751), for token models."""

from dip_hf.icp.options import ICPOptions
from dip_hf.icp.perturbation import FeatureLoss, ICPBranch


__all__ = ["FeatureLoss", "ICPBranch", "ICPOptions"]
