"""A model's plain pass: without noise, and at its posterior's mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dip_hf.dipnet.layer import NoiseSite
from dip_hf.ibvi.layer import Covariance


def draws_in_eval(model: nn.Module) -> bool:
    """Whether an adapter of the model keeps noise or samples in evaluation, active or not."""
    return any(
        (isinstance(module, NoiseSite) and any(module.noise_in_eval.values()))
        or (isinstance(module, Covariance) and module.in_eval)
        for module in model.modules()
    )


@contextmanager
def noise_free(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, without noise and at its posterior's mean, whatever `noise_in_eval`."""
    training = {module: module.training for module in model.modules()}
    noisy = [(site, dict(site.noise_in_eval)) for site in model.modules() if isinstance(site, NoiseSite)]
    sampled = [leaf for leaf in model.modules() if isinstance(leaf, Covariance) and leaf.in_eval]
    model.eval()
    for site, flags in noisy:
        site.noise_in_eval = dict.fromkeys(flags, False)
    for leaf in sampled:
        leaf.in_eval = False
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for site, flags in noisy:
            site.noise_in_eval = flags
        for leaf in sampled:
            leaf.in_eval = True
