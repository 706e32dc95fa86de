"""An adapter with a posterior on a tiny model, and its samples put into LoRA's A by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from dip_hf import NoiseKey
from dip_hf.dipnet.layer import LogVariance
from dip_hf.ibvi.functional import posterior_number
from dip_hf.ibvi.layer import Covariance, covariances
from dip_hf.noise import derive_seed, few_gaussians
from dip_hf.peft_compat import clean_name
from tests.dipnet.models import adapt


EVERYWHERE: dict[str, Any] = {"variational_blocks": "all", "variational_scale": 1.0}
POSTERIOR: dict[str, Any] = {"noise_blocks": [], "variational_rank": 3, **EVERYWHERE}
KINDS: dict[str, dict[str, Any]] = {
    "noise": {"noise_blocks": 2},
    "posterior": {**POSTERIOR, "variational_blocks": 2},
    "both": {**POSTERIOR, "variational_blocks": 2, "noise_blocks": 2},
}
"""What an adapter may add to LoRA: options of `adapt`."""


def variational(model: Any, adapter_name: str = "default", **arguments: Any) -> PeftModel:
    """An adapter with random LoRA weights and a posterior alone."""
    return adapt(model, adapter_name, **{**POSTERIOR, **arguments})


def posteriors(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[Any, Covariance]]:
    """The variational LoRA layers by their name in the base model, each with its posterior."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    found = {clean_name(name): (module, covariances(module)) for name, module in root.named_modules()}
    return {name: (module, all_[adapter_name]) for name, (module, all_) in found.items() if adapter_name in all_}


def leaves(model: nn.Module) -> list[Any]:
    """The modules that hold what DIPNet and IBVI add to LoRA."""
    return [module for module in model.modules() if isinstance(module, LogVariance | Covariance)]


def coefficients(name: str, key: NoiseKey, trajectory: int, rank: int) -> Tensor:
    """z of a layer, shape (R,), from the noise functions alone."""
    return few_gaussians(rank, derive_seed(key.tensor(), posterior_number(name), trajectory))


@contextmanager
def at_sample(model: PeftModel, key: NoiseKey, trajectory: int) -> Iterator[None]:
    """The oracle: LoRA's A itself is A + Σ z_k S_k, of one trajectory; for passes by the mean."""
    before = {}
    for name, (module, leaf) in posteriors(model).items():
        weight = module.lora_A["default"].weight
        before[weight] = weight.detach().clone()
        z = coefficients(name, key, trajectory, leaf.rank)
        with torch.no_grad():
            for k in range(leaf.rank):
                weight += z[k] * leaf.weight[k]
    try:
        yield
    finally:
        for weight, value in before.items():
            weight.data = value
