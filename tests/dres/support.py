"""Tiny models and batches, and a pass of the branch over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dip_hf import NoiseKey
from dip_hf.dres import DReSBranch, DReSOptions
from tests.dipnet import models


KEY = NoiseKey(7, step=3)
PLACEMENTS = ["sequence", "token"]


def model_of(
    family: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any
) -> Any:
    model = models.build(family, **changes).to(dtype)
    model.set_attn_implementation(attention)
    return model


def batch_of(rows: int, length: int = 7, pads: str | None = None) -> dict[str, torch.Tensor]:
    batch = models.batch(rows, length)
    for row in range(rows if pads else 0):
        pad = row % 4
        batch["attention_mask"][row, slice(length - pad, None) if pads == "right" else slice(0, pad)] = 0
    return batch


def branch_of(model: Any, placement: str, **options: Any) -> DReSBranch:
    given = {"placement": placement, "blocks": [1, 2], "group_size": 4, "share": 1.0, **options}
    return DReSBranch(model, DReSOptions(**given))


def run(model: Any, branch: DReSBranch, batch: dict[str, torch.Tensor], key: NoiseKey = KEY) -> tuple[Any, Any]:
    with branch.attached(key, batch.get("attention_mask")) as record:
        output = model(**batch, use_cache=False)
    return record, output.logits


def gradients(model: nn.Module, error: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    error.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=tolerance, atol=tolerance), name
