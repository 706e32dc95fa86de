"""IBVI: a low-rank Gaussian posterior on LoRA's A, trained on the task loss alone (arXiv 2505.20235)."""

from dip_hf.ibvi.prediction import posterior_predictive


__all__ = ["posterior_predictive"]
