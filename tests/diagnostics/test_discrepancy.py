from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dip_hf import NoiseKey
from dip_hf.diagnostics import reconstruction_errors
from dip_hf.dres.functional import affine_error
from tests.diagnostics.test_smoothness import state_of
from tests.dipnet import models
from tests.dres import oracle


def test_error_is_the_loops_over_several_batches(batch: dict[str, Tensor]) -> None:
    model = models.build(initializer_range=0.5).double()
    small = {name: value[1:, :7] for name, value in batch.items()}
    found = reconstruction_errors(model, [batch, small], [5, 8], group_size=4)
    assert list(found) == [5, 8]
    mlps = [model.model.layers[3].mlp]  # the last quarter of four blocks
    for size, row in found.items():
        parts = []
        for step, part in enumerate([batch, small]):
            inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
            groups = int(part["attention_mask"].sum()) // 4
            parts.append((groups, oracle.token_error(model, inputs, mlps, 4, size, NoiseKey(0, step=step))))
        assert [groups for groups, _ in parts] == [5, 3]
        assert row["error"] == pytest.approx(sum(g * e for g, e in parts) / 8, rel=1e-6)
        assert row["floor"] == affine_error(4, size)


def test_noise_is_off_and_the_model_stays_as_it_was(batch: dict[str, Tensor]) -> None:
    model = models.adapt(models.build(), noise_in_eval=True).train()
    before = state_of(model)
    found = reconstruction_errors(model, [batch], [5], group_size=4)
    assert state_of(model) == before
    merged = reconstruction_errors(model.merge_and_unload(), [batch], [5], group_size=4)
    assert found[5]["error"] == pytest.approx(merged[5]["error"], rel=1e-4)


def test_refusals(batch: dict[str, Tensor]) -> None:
    model = models.build()
    with pytest.raises(ValueError, match="coded_size=3 is below group_size=4"):
        reconstruction_errors(model, [batch], [5, 3], group_size=4)
    with pytest.raises(ValueError, match="coded_size=9"):
        reconstruction_errors(model, [batch], [9], group_size=4)
    with pytest.raises(ValueError, match="no batch has group_size=32"):
        reconstruction_errors(model, [batch], [40], group_size=32)
    with pytest.raises(ValueError, match="no submodule"):
        reconstruction_errors(models.build("opt"), [batch], [5], group_size=4)
    assert torch.is_grad_enabled()
