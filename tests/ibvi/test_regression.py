"""The implicit bias in closed form: overparametrised linear regression, through the adapter and its optimiser.

With fewer examples than inputs, (momentum) SGD on the expected loss ends at the interpolating mean that is closest to
where it began, and at the part of the initial covariance that the data cannot see (arXiv 2505.20235):
μ∞ = μ0 + X⁺(y - X μ0), S∞ = P_null(X) S0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dip_hf import DIPSFTConfig, NoiseKey
from dip_hf.ibvi.functional import posterior_coefficients
from dip_hf.ibvi.layer import covariances
from dip_hf.trainer.optimizer import compose_optimizer
from tests.ibvi.models import variational


EXAMPLES, INPUTS, OUTPUTS, RANK, STEPS = 4, 8, 2, 3, 1000


def regression() -> tuple[PeftModel, Tensor, Tensor]:
    """y = B (A + Σ z_k S_k) x with B = I, on four examples with eight inputs, in float64."""
    base = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    nn.init.zeros_(base[0].weight)
    options = {"task_type": None, "target_modules": ["0"], "block_names": ["0"], "r": OUTPUTS, "lora_alpha": OUTPUTS}
    model = variational(base, **options, variational_rank=RANK).double().train()
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data = torch.eye(OUTPUTS, dtype=torch.float64)
    layer.lora_B["default"].weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(INPUTS, EXAMPLES, generator=generator, dtype=torch.float64))
    inputs = torch.linspace(0.8, 1.0, EXAMPLES, dtype=torch.float64)[:, None] * directions.T
    return model, inputs, torch.randn(EXAMPLES, OUTPUTS, generator=generator, dtype=torch.float64)


def trained(folder: Path, **options: Any) -> tuple[dict[str, float], float]:
    """Errors of μ and S relative to the closed form, and the loss, after training on the task loss."""
    model, x, y = regression()
    layer = model.base_model.model[0]
    mean, covariance = layer.lora_A["default"].weight, covariances(layer)["default"].weight
    mean_0, covariance_0 = mean.detach().clone(), covariance.detach().clone()
    args = DIPSFTConfig(output_dir=str(folder), learning_rate=0.1, use_cpu=True, bf16=False, **options)
    every = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = compose_optimizer(torch.optim.AdamW(every, lr=0.1, weight_decay=0.0), model, args)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for step in range(STEPS):
        with model.base_model.sampling(NoiseKey(0, step)):
            loss = (model(x) - y).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    null = torch.eye(INPUTS, dtype=torch.float64) - torch.linalg.pinv(x) @ x
    expected_mean = mean_0 + (torch.linalg.pinv(x) @ (y - x @ mean_0.T)).T
    expected = covariance_0 @ null
    errors = {
        "mean": ((mean - expected_mean).norm() / expected_mean.norm()).item(),
        "covariance": ((covariance - expected).norm() / expected.norm()).item(),
    }
    return errors, loss.item()


def test_faithful_gives_the_closed_form(tmp_path: Path) -> None:
    errors, loss = trained(tmp_path, variational_optimizer="faithful")
    assert errors["mean"] < 1e-6 and errors["covariance"] < 1e-6 and loss < 1e-10


def test_hybrid_keeps_the_covariance_and_not_the_mean(tmp_path: Path) -> None:
    """AdamW's mean still fits the data, but it is another one: why this mode is called a departure."""
    errors, loss = trained(tmp_path, variational_optimizer="hybrid")
    assert errors["covariance"] < 1e-6 and loss < 1e-10
    assert errors["mean"] > 1e-2


@pytest.mark.parametrize("step", range(3))
def test_the_covariances_gradient_is_the_sampled_weights_times_z(step: int) -> None:
    """S.grad = ∂L/∂A_z ⊗ z, exactly: one product of a float, and ∂L/∂A_z is the mean's gradient too."""
    model, x, y = regression()
    layer = model.base_model.model[0]
    leaf, key = covariances(layer)["default"], NoiseKey(0, step)
    with model.base_model.sampling(key):
        (model(x) - y).square().sum().backward()
    z = posterior_coefficients(key.tensor(), leaf.number, 1, RANK)[0].double()
    gradient = layer.lora_A["default"].weight.grad
    assert gradient.abs().sum() > 0
    assert torch.equal(leaf.weight.grad, z[:, None, None] * gradient)
