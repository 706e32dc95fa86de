"""PEFT's own suite for custom models, run on the DIPNet adapter: a subset of its rows, or all with `--whole`.

Its test module is imported with `peft.LoraConfig` replaced by `DIPNetConfig` (peft_suite.py), so that each of its LoRA
tests becomes one of ours. What cannot apply stands with its reason in inapplicable.py. Nothing of PEFT's tests is
copied into this repository: fetch.py downloads them.
"""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftConfig
from torch import nn

from dip_hf import DIPNetConfig, DIPNetModel
from tests.conformance import peft_suite
from tests.conformance.inapplicable import FAILING, OTHER, find


SUITE_TESTS: pytest.StashKey[list[str]] = pytest.StashKey()
"""Names of all tests of the suite that were collected, whether they are run or not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run PEFT's suite on all its rows")


@pytest.fixture(autouse=True)
def _blocks_of_custom_models(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = DIPNetModel._resolve_blocks

    def resolve_any(self: DIPNetModel, model: nn.Module, config: DIPNetConfig) -> list[int]:
        config.block_names = peft_suite.default_blocks(model, config)
        return resolve(self, model, config)

    monkeypatch.setattr(DIPNetModel, "_resolve_blocks", resolve_any)


def _is_other_method(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return issubclass(kind, PeftConfig) and not issubclass(kind, DIPNetConfig)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole = config.getoption("whole", default=False)
    names = config.stash.setdefault(SUITE_TESTS, [])
    kept, dropped = [], []
    for item in items:
        if item.path.parent.name == "conformance" and item.path.name == peft_suite.SUITE:
            name = item.nodeid.partition("::")[2]
            names.append(name)
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            other = any(map(_is_other_method, parameters.values())) or find(OTHER, name)
            if other or not (whole or peft_suite.in_subset(parameters)):
                dropped.append(item)
                continue
            if entry := find(FAILING, name):
                item.add_marker(pytest.mark.xfail(reason=entry.reason, strict=True))
        kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
