"""PEFT's test module for custom models, with LoRA's place in it taken by DIPNet."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dip_hf import DIPNetConfig
from tests.conformance.fetch import SUITE, fetch


PACKAGE = "peft_tests"

# This model's activations are so small that with less noise three steps would not move a log-variance visibly.
LOUD: dict[str, Any] = {"noise_scale": 2.0}
POSTERIOR: dict[str, Any] = {"noise_blocks": [], "variational_rank": 2, "variational_blocks": "all"}
# One row a feature of ours that PEFT's own rows cannot have: (name, model, configuration, its arguments).
ROWS: list[tuple[str, str, type[PeftConfig], dict[str, Any]]] = [
    (f"DIPNet {name}", model, DIPNetConfig, arguments)
    for name, model, arguments in [
        ("noise before LoRA", "MLP", {"target_modules": ["lin1"], "block_names": ["lin0"]}),
        ("noise after LoRA", "MLP", {"target_modules": ["lin0"], "block_names": ["lin1"]}),
        ("noise into LoRA", "MLP", {"target_modules": ["lin0"], "block_names": ["lin0"]}),
        ("every block", "MLP", {"target_modules": ["lin0", "lin1"], "block_names": ["lin0", "lin1"]}),
        ("last block", "MLP", {"target_modules": ["lin0"], "block_names": ["lin0", "lin1"], "noise_blocks": 1}),
        ("pattern", "MLP", {"target_modules": "lin1", "block_names": ["lin0", "lin1"], "noise_blocks": ".*0"}),
        ("frozen", "MLP", {"target_modules": ["lin0"], "block_names": ["lin1"], "learn_noise": False}),
        ("DoRA", "MLP", {"target_modules": ["lin0"], "block_names": ["lin1"], "use_dora": True}),
        (
            "modules_to_save",
            "MLP",
            {"target_modules": [], "block_names": ["lin0"], "modules_to_save": ["lin1"]},
        ),
        ("noise only", "MLP", {"target_modules": [], "block_names": ["lin0", "lin1"]}),
        ("posterior", "MLP", {"target_modules": ["lin0"], "block_names": ["lin0"], **POSTERIOR}),
        (
            "posterior everywhere",
            "MLP",
            {"target_modules": ["lin0", "lin1"], "block_names": ["lin0", "lin1"], **POSTERIOR},
        ),
        ("posterior and noise", "MLP", {"target_modules": ["lin0"], "block_names": ["lin0"], "variational_rank": 2}),
        (
            "point posterior",
            "MLP",
            {"target_modules": ["lin0"], "block_names": ["lin0"], **POSTERIOR, "variational_scale": 0.0},
        ),
        ("convolution", "Conv2d", {"target_modules": ["conv2d"], "block_names": ["lin0"]}),
        ("embedding", "EmbConv1D", {"target_modules": ["emb"], "block_names": ["lin0"]}),
    ]
]


def load() -> ModuleType:
    """Import PEFT's test module so that its LoRA tests and rows are DIPNet's, and drop other methods' rows."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(fetch())]
    sys.modules[PACKAGE] = package
    pytest.register_assert_rewrite(PACKAGE)
    # PEFT's shared helpers import it for tests of image models, which are not run here.
    stubs = {} if importlib.util.find_spec("diffusers") else {"diffusers": mock.MagicMock()}
    sys.modules.update(stubs)
    try:
        with mock.patch("peft.LoraConfig", DIPNetConfig):
            suite = importlib.import_module(f"{PACKAGE}.{SUITE.removesuffix('.py')}")
    finally:
        for name in stubs:
            del sys.modules[name]
    # In place: the tests' decorators hold these very lists.
    suite.TEST_CASES[:] = [
        (name, model, kind, LOUD | arguments if model == "EmbConv1D" else arguments)
        for name, model, kind, arguments in [*suite.TEST_CASES, *ROWS]
        if kind is DIPNetConfig
    ]
    suite.ALL_PEFT_CONFIG_CLASSES[:] = [DIPNetConfig]
    multiple = suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    multiple[:] = [row for row in multiple if row[2] is DIPNetConfig]
    mixed = suite.MIXED_ADAPTER_TEST_CASES
    mixed[:] = [row for row in mixed if type(row[1]) is DIPNetConfig]
    return suite


def default_blocks(model: nn.Module, config: DIPNetConfig) -> list[str]:
    """Stands in for `find_decoder_blocks` where a test names no blocks: the first linear layer that can be one."""
    if config.block_names:
        return config.block_names
    saved_names = config.modules_to_save or ()
    inside = ("base_layer", "original_module", "modules_to_save", "dip_noise")
    for name, module in model.named_modules():
        linear = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        parts = name.split(".")
        if not isinstance(getattr(linear, "in_features", None), int) or any(saved in parts for saved in saved_names):
            continue
        # A MultiheadAttention reads its projection's weight and never calls it.
        called = not type(linear).__name__.startswith("NonDynamicallyQuantizable")
        if called and not any(part in inside or part.startswith("lora_") for part in parts):
            return [name]
    raise AssertionError(f"{type(model).__name__} has no layer that could stand for a decoder block")


def in_subset(parameters: dict[str, Any]) -> bool:
    """Whether a test belongs to the subset: it has no rows, or its row is one of a few that differ the most."""
    if "model_id" not in parameters:
        return True
    own = ("noise into LoRA", "every block", "frozen", "modules_to_save", "noise only", "posterior and noise")
    # LoRA whose weight file has other names or shapes than most
    others = ("BD-LoRA both A and B", "MLP 1 using nn.Parameter LoRA", "Vanilla MLP 1 LoRA with Monteclora")
    return parameters["test_name"] in {*(f"DIPNet {row}" for row in own), *others}
