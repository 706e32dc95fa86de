"""The norm of gradients that lie on several meshes, or on none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dip_hf.trainer.gradients import FiniteGradients, total_norm


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of two dimensions, in one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "ep"))
    dist.destroy_process_group()


def sharded(values: list[float], mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(torch.tensor(values), mesh, [Shard(0)] * mesh.ndim)


def test_plain_gradients() -> None:
    assert total_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item() == 5


def test_gradients_of_several_meshes(mesh: DeviceMesh) -> None:
    experts, others = sharded([2.0, 4.0], mesh), sharded([5.0], mesh["fsdp"])
    for gradients in ([experts, torch.tensor([6.0])], [experts, others], [experts, others, torch.tensor([6.0])]):
        norm = total_norm(gradients)
        assert not isinstance(norm, DTensor)
        squares = sum(float(gradient.square().sum()) for gradient in gradients)
        assert norm.item() == pytest.approx(math.sqrt(squares))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_expert", [True, False])
def test_one_of_them_not_finite(is_expert: bool, value: float, mesh: DeviceMesh) -> None:
    model: Any = nn.ParameterList([nn.Parameter(sharded([1.0], mesh)), nn.Parameter(torch.ones(1))])
    model[0].grad, model[1].grad = sharded([value if is_expert else 1.0], mesh), torch.tensor([value])
    if is_expert:
        model[1].grad = torch.ones(1)
    here: Any = (SimpleNamespace(mixed_precision="bf16"), SimpleNamespace(global_step=2), None)
    with pytest.raises(FloatingPointError, match=r"Step 2: the norm of the gradient is (nan|inf)"):
        FiniteGradients().on_pre_optimizer_step(*here, model=model)
    here[0].mixed_precision = "fp16"  # whose scaler leaves such steps out, and which a launcher may have asked for
    FiniteGradients().on_pre_optimizer_step(*here, model=model)
