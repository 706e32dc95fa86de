"""DReS and ICP in the trainer: the gradient of a step against the loss written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dip_hf import DIPNetConfig
from tests.trainer.by_hand import by_hand, recorded_step
from tests.trainer.methods import DRES, ICP, ICP_ADAM, METHODS
from tests.trainer.tiny import ADAPTER, assert_close, gradients


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dres token", {}),
        ("dres token", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (
            "dres token",
            {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        ),
        ("dres sequence", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("icp", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("icp", {"packing": True, "max_length": 64}),
        ("full, dres + icp", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for v in value.values()),
)
def test_step(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Each micro-batch's groups, with its own key, count alike; ICP's mean is over the tokens of the whole step."""
    method = METHODS[name]
    step = recorded_step(tmp_path, method.config(), {**method.options, **options})
    assert len(step["batches"]) == options.get("gradient_accumulation_steps", 1)
    assert len(set(step["keys"])) == len(step["keys"])
    assert_close(step["gradients"], by_hand(tmp_path, method.config(), method.options, step["batches"], step["keys"]))


def test_trajectories_that_agree_give_the_gradient_of_one(tmp_path: Path) -> None:
    """Adam's moments mix the gradients of all steps, which must have one scale."""
    adapter = DIPNetConfig(**ADAPTER, noise_scale=1e-9)
    one, two = (gradients(tmp_path, adapter, {**ICP_ADAM, "num_trajectories": m}) for m in (1, 2))
    assert_close(two, one)


def test_terms_add_up(tmp_path: Path) -> None:
    """With noise and two trajectories, each method adds the gradient it adds alone, in proportion to its weight."""
    method = METHODS["dipnet + dres + icp"]
    off = {"num_trajectories": 2}
    plain = gradients(tmp_path, method.config(), off)
    dres = gradients(tmp_path, method.config(), {**off, **DRES})
    icp = gradients(tmp_path, method.config(), {**off, **ICP})
    both = gradients(tmp_path, method.config(), {**off, **DRES, **ICP, "dres_weight": 1.0, "icp_weight": 1.0})
    assert dres["loss"] > plain["loss"] and icp["loss"] > plain["loss"]
    expected = {name: plain[name] + 2 * (dres[name] - plain[name]) + 2 * (icp[name] - plain[name]) for name in plain}
    assert_close(both, expected)
