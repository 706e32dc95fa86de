"""How far IBVI's posterior has moved from its start (arXiv 2505.20235): 2-Wasserstein distance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dip_hf.diagnostics.functional import gaussian_w2
from dip_hf.ibvi.layer import Covariance, covariances
from dip_hf.peft_compat import clean_name


def _posteriors(model: nn.Module) -> Iterator[tuple[str, Covariance, Tensor]]:
    """Name, posterior and mean of every variational layer of the active adapters; a point has no posterior."""
    for name, module in model.named_modules():
        layer: Any = module
        for adapter, leaf in covariances(module).items():
            if adapter in layer.active_adapters and leaf.scale > 0:
                yield f"{clean_name(name)}.{adapter}", leaf, layer.lora_A[adapter].weight.detach()


def posterior_means(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every posterior's mean (LoRA's A, shape (r, n)), for `posterior_distance` to compare with later."""
    return {name: mean.clone() for name, _, mean in _posteriors(model)}


@torch.no_grad()
def posterior_distance(model: nn.Module, start_means: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """W2 distance between the posterior N(A, S Sᵀ) of all variational layers together and its start N(A₀, S₀ S₀ᵀ).

    Layers are independent, so squared distances add. S₀ is made again from the adapter's config. A₀ is not: PEFT draws
    LoRA's A from torch's global generator and no file keeps it, so that the distance of an adapter from a file is
    that of the covariances alone (both Gaussians moved to one mean), a lower bound of the whole. B has no
    distribution and takes no part.

    Args:
        model: a model with a DIPNet adapter whose config has `variational_rank` > 0.
        start_means: what `posterior_means` returned before training, for the whole distance.

    Returns:
        `covariance_distance`; `start_spread` = ‖S₀‖_F over all layers, the distance of the start from a point, and
        `spread` = ‖S‖_F; `relative_covariance_distance` = covariance_distance / start_spread; `mean_norm` = ‖A‖_F.
        With `start_means` also `mean_distance` = ‖A - A₀‖_F, and `distance`. Empty where the active adapters have no
        posterior.

    Raises:
        ValueError: `start_means` are of other layers.
    """
    squares: dict[str, float] = {}

    def add(name: str, value: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + value.double().square().sum().item()

    for name, leaf, mean in _posteriors(model):
        s, start = leaf.weight.detach().flatten(1).mT, leaf.initial().to(leaf.weight.device).flatten(1).mT
        origin = torch.zeros(len(s), device=s.device)
        add("covariance_distance", gaussian_w2(origin, s, origin, start))
        add("start_spread", start)
        add("spread", s)
        add("mean_norm", mean)
        if start_means is None:
            continue
        if name not in start_means or start_means[name].shape != mean.shape:
            raise ValueError(
                f"start_means: no mean of shape {tuple(mean.shape)} for {name}; take it from this very adapter with "
                "`posterior_means` before training."
            )
        before = start_means[name].to(mean)
        add("mean_distance", mean - before)
        add("distance", gaussian_w2(mean.flatten(), s, before.flatten(), start))
    report = {name: value**0.5 for name, value in squares.items()}
    if report:
        report["relative_covariance_distance"] = report["covariance_distance"] / report["start_spread"]
    return report
