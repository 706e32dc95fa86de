from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import PeftModel
from torch import Tensor

from dip_hf.diagnostics import posterior_distance, posterior_means, smoothness
from dip_hf.diagnostics.posterior import _posteriors
from tests.dipnet import models


def variational(**options: object) -> torch.nn.Module:
    base = models.build(num_hidden_layers=2, hidden_size=8)
    settings = {"noise_blocks": [], "variational_rank": 2, "variational_blocks": "all", **options}
    return models.adapt(base, r=2, target_modules=["q_proj"], **settings)


def dense_square(s: Tensor, t: Tensor) -> float:
    """Of the covariances of two factors of shape (R, r, n), by the textbook's formula."""
    c, d = (np.asarray(m.detach().double().flatten(1).T @ m.detach().double().flatten(1)) for m in (s, t))
    root = scipy.linalg.sqrtm(c + 1e-14 * np.eye(len(c)))
    return float(np.trace(c + d - 2 * np.real(scipy.linalg.sqrtm(root @ d @ root))))


def test_at_the_start_the_distance_is_zero() -> None:
    model = variational()
    found = posterior_distance(model, posterior_means(model))
    assert found["distance"] < 1e-6 and found["mean_distance"] == 0
    assert found["spread"] == found["start_spread"] > 0


def test_distance_is_the_dense_formulas() -> None:
    model = variational()
    means, generator = posterior_means(model), torch.Generator().manual_seed(0)
    assert len(means) == 2
    expected, shift = 0.0, 0.0
    with torch.no_grad():
        for _, leaf, mean in _posteriors(model):
            start = leaf.weight.clone()
            leaf.weight += 0.3 * torch.randn(leaf.weight.shape, generator=generator)
            step = 0.2 * torch.randn(mean.shape, generator=generator)
            mean += step  # A itself, seen without gradient
            expected += dense_square(leaf.weight, start)
            shift += step.square().sum().item()
    found = posterior_distance(model, means)
    assert found["covariance_distance"] ** 2 == pytest.approx(expected, rel=1e-4)
    assert found["mean_distance"] ** 2 == pytest.approx(shift, rel=1e-4)
    assert found["distance"] ** 2 == pytest.approx(expected + shift, rel=1e-4)
    alone = posterior_distance(model)
    assert "distance" not in alone and alone["covariance_distance"] == found["covariance_distance"]
    ratio = alone["covariance_distance"] / alone["start_spread"]
    assert alone["relative_covariance_distance"] == pytest.approx(ratio)


def test_start_is_made_again_from_the_config_of_a_saved_adapter(base: str, tmp_path: object) -> None:
    model = models.adapt(models.load_base(base), noise_blocks=[], variational_rank=3, noise_seed=5)
    with torch.no_grad():
        for _, leaf, _ in _posteriors(model):
            leaf.weight *= 0.5
    model.save_pretrained(f"{tmp_path}/adapter")
    loaded = PeftModel.from_pretrained(models.load_base(base), f"{tmp_path}/adapter")
    found = posterior_distance(loaded)
    assert found["covariance_distance"] == pytest.approx(0.5 * found["start_spread"], rel=1e-5)
    assert found == pytest.approx(posterior_distance(model))


def test_models_without_a_posterior_have_no_distance() -> None:
    assert posterior_distance(models.build()) == {}
    assert posterior_distance(models.adapt(models.build())) == {}
    assert posterior_distance(variational(variational_scale=0.0)) == {}


def test_start_of_another_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="start_means: no mean of shape"):
        posterior_distance(variational(), {})


def test_the_posterior_is_at_its_mean_in_a_noise_free_pass(batch: dict[str, Tensor]) -> None:
    model = variational(noise_in_eval=True)
    assert smoothness(model, [batch], max_iterations=2) == smoothness(model, [batch], max_iterations=2)
    assert all(leaf.in_eval for _, leaf, _ in _posteriors(model))
