"""Predicting with the posterior: probabilities averaged over samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from dip_hf.ibvi.functional import average_log_probabilities
from dip_hf.noise import NoiseKey
from dip_hf.peft_compat import DIPPeftType


_KEY = NoiseKey(0)


@torch.no_grad()
def posterior_predictive(model: PeftModel, batch: Mapping[str, Any], num_samples: int, key: NoiseKey = _KEY) -> Tensor:
    """p(y | x) = (1/M) Σ_j softmax f(x; w_j), w_j ~ q: the predictive of arXiv 2505.20235's authors' code.

    The samples are rows of one batch and share the computation below the first variational (or noised) block. The
    model is put into evaluation mode for the call. Where the adapter has noise too, each sample draws its own.

    Args:
        model: a PEFT model whose active adapter is a DIPNet one with a posterior, or with noise.
        batch: arguments of the model's forward pass; labels are not used.
        num_samples: M ≥ 1.
        key: the same key gives the same samples.

    Returns:
        Probabilities of the next token, shape (batch, length, vocabulary), fp32.

    Raises:
        ValueError: `num_samples` < 1, or the active adapter has neither a posterior nor noise.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r} must be a whole number, at least 1.")
    config = model.peft_config[model.active_adapters[0]] if isinstance(model, PeftModel) else None
    if config is None or config.peft_type != DIPPeftType.DIPNET:
        kind = type(model if config is None else config).__name__
        raise ValueError(f"model: there is no posterior in a {kind}; give a PEFT model with a DIPNetConfig.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        tuner: Any = model.base_model
        with tuner.sampling(key, num_samples):
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    finally:
        for module, training in modes.items():  # a PEFT model is born with some in training mode
            module.training = training
    return average_log_probabilities(logits, num_samples).exp()
