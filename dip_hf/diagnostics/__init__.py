"""Quantities of a trained checkpoint that the methods' papers claim to improve and do not measure."""

from dip_hf.diagnostics.data import file_rows, make_batches, suite_rows
from dip_hf.diagnostics.discrepancy import reconstruction_errors
from dip_hf.diagnostics.posterior import posterior_distance, posterior_means
from dip_hf.diagnostics.robustness import robustness
from dip_hf.diagnostics.smoothness import smoothness
from dip_hf.diagnostics.typos import add_instruction_typos, add_typos


__all__ = [
    "add_instruction_typos",
    "add_typos",
    "file_rows",
    "make_batches",
    "posterior_distance",
    "posterior_means",
    "reconstruction_errors",
    "robustness",
    "smoothness",
    "suite_rows",
]
