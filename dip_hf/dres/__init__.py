"""DReS: penalise how badly a submodule's outputs are reconstructed from its outputs on coded samples."""

from dip_hf.dres.branch import DReSBranch
from dip_hf.dres.coded_pass import DReSRecord
from dip_hf.dres.options import DReSOptions


__all__ = ["DReSBranch", "DReSOptions", "DReSRecord"]
