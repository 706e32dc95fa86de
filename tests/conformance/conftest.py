"""PEFT's own suite for custom models, run on the DIPNet adapter: a subset of it, or `--whole`.

Its test module is imported with `peft.LoraConfig` replaced by `DIPNetConfig` (peft_suite.py), so that each of its LoRA
tests becomes one of ours. What cannot apply stands with its reason in inapplicable.py. Nothing of PEFT's tests is
copied into this repository: fetch.py downloads them.
"""

from __future__ import annotations

import pytest
from torch import nn

from dip_hf import DIPNetConfig, DIPNetModel
from tests.conformance import peft_suite


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run all of PEFT's suite, not the subset")


@pytest.fixture(autouse=True)
def _blocks_of_custom_models(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = DIPNetModel._resolve_blocks

    def resolve_any(self: DIPNetModel, model: nn.Module, config: DIPNetConfig) -> list[int]:
        config.block_names = peft_suite.default_blocks(model, config)
        return resolve(self, model, config)

    monkeypatch.setattr(DIPNetModel, "_resolve_blocks", resolve_any)


def _in_subset(item: pytest.Item) -> bool:
    """Our own rows, PEFT's first row, and the tests without rows: every test, on a tenth of the rows."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "test_name" not in parameters or "model_id" not in parameters:
        return True
    return parameters["test_name"].startswith(("DIPNet", "Vanilla MLP 1 LoRA"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("whole", default=False):
        return
    outside = [item for item in items if item.module.__name__.endswith("conformance.test_custom_models") and not _in_subset(item)]
    config.hook.pytest_deselected(items=outside)
    items[:] = [item for item in items if item not in set(outside)]
