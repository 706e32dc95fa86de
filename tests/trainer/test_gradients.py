"""Weights and gradients that lie on meshes, or on none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dip_hf.trainer.gradients import check_finite_gradient, check_finite_weights


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of two dimensions, in one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "ep"))
    dist.destroy_process_group()


def sharded(values: list[float], mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(torch.tensor(values), mesh, [Shard(0)] * mesh.ndim)


@pytest.mark.parametrize("is_sharded", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_parameter_that_is_not_finite(is_sharded: bool, value: float, mesh: DeviceMesh) -> None:
    model = nn.Module()
    model.sharded = nn.Parameter(sharded([value if is_sharded else 1.0, 1.0], mesh))
    model.expert = nn.Parameter(sharded([1.0], mesh["ep"]))
    model.plain = nn.Parameter(torch.tensor([1.0 if is_sharded else value]))
    name = "sharded" if is_sharded else "plain"
    with pytest.raises(FloatingPointError, match=f"Step 2: the optimiser has made {name} infinite or NaN"):
        check_finite_weights(model, 2)
    getattr(model, name).requires_grad_(False)
    check_finite_weights(model, 2)


def test_the_norm_of_sharded_gradients(mesh: DeviceMesh) -> None:
    gradient = sharded([3.0, 4.0], mesh)
    check_finite_gradient(nn.utils.get_total_norm([gradient]), 2)
    with pytest.raises(FloatingPointError, match="Step 2: the norm of the gradient is inf"):
        check_finite_gradient(nn.utils.get_total_norm([gradient / 0]), 2)
