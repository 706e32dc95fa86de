"""The private names of TRL, transformers, torch and lm-eval that we stand on; PEFT's are in test_peft_compat."""

from __future__ import annotations

import inspect
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import lm_eval.api.task
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from packaging.requirements import Requirement
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from dip_hf.recipe.parser import RecipeParser
from tests.trainer.tiny import base_model, make_trainer


@pytest.mark.parametrize("package", ["torch", "transformers", "trl", "lm_eval"])
def test_the_installed_version_is_one_that_is_declared(package: str) -> None:
    declared = next(
        Requirement(line) for line in requires("dip_hf") or [] if line.replace("-", "_").startswith(package)
    )
    assert declared.specifier.contains(version(package).partition("+")[0])


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (Trainer, "_finish_current_push", []),
        (Trainer, "_get_grad_norm", ["model", "grad_norm"]),
        (HFLM, "_create_model", ["pretrained", "revision"]),
        (HFLM, "_model_call", ["inps", "attn_mask", "labels"]),
        (HFLM, "_loglikelihood_tokens", ["requests", "disable_tqdm"]),
        (HFLM, "_model_generate", ["context", "max_length", "stop"]),
        (torch._C, "_current_graph_task_id", None),  # of C
        (lm_eval.api.task, "tqdm", None),
    ],
)
def test_what_is_overridden_or_called(owner: Any, name: str, parameters: list[str] | None) -> None:
    found = getattr(owner, name)
    assert callable(found)
    if parameters is not None:
        names = [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]
        assert names[: len(parameters)] == parameters


def test_attributes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None)
    assert set(trainer._metrics) == {"train", "eval"} and isinstance(trainer._train_batch_size, int)
    assert isinstance(SFTTrainer._tag_names, list) and trainer._skip_prepare_dataset is False
    model = base_model()
    assert model.config._attn_implementation == "sdpa" and isinstance(model.config._name_or_path, str)
    model.gradient_checkpointing_enable()
    block = model.model.layers[0]
    assert isinstance(block, GradientCheckpointingLayer) and callable(block._gradient_checkpointing_func)
    assert block.gradient_checkpointing is True and block._compiled_call_impl is None
    block.compile(backend="eager")
    assert block._compiled_call_impl is not None
    parser = RecipeParser([])
    assert "--help" in parser._option_string_actions and parser._actions


def test_no_graph_task_runs_outside_of_a_backward_pass() -> None:
    seen = []
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda gradient: seen.append(torch._C._current_graph_task_id()))
    (2 * leaf).sum().backward()
    assert seen != [-1] and torch._C._current_graph_task_id() == -1
