"""DReS: penalise how badly a submodule's outputs are reconstructed from its outputs on coded samples."""

from dip_hf.dres.branch import DReSBranch
from dip_hf.dres.coded_pass import DReSRecord


__all__ = ["DReSBranch", "DReSRecord"]
