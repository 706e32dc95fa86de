"""What cannot be coded is refused: options, blocks, batches, and training that the error does not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import JetMoeConfig, JetMoeForCausalLM, MptConfig, MptForCausalLM

from tests.dipnet import models
from tests.dres.support import KEY, PLACEMENTS, batch_of, branch_of, model_of, run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "row"}, "dres_placement='row' must be one of token, sequence"),
        ({"group_size": 1}, "dres_group_size=1 must be at least 2"),
        ({"oversampling": 0.75}, "dres_oversampling=0.75 must be at least 1"),
        ({"oversampling": float("nan")}, "dres_oversampling=nan must be at least 1"),
        ({"oversampling": 2.25}, r"dres_oversampling=2.25: .*always 0; change"),
        ({"share": 0.0}, "dres_share=0.0 must be above 0 and at most 1"),
        ({"share": float("nan")}, "dres_share=nan must be above 0"),
        ({"blocks": [4]}, r"dres_blocks=\[4\]: the model has 4 blocks"),
        ({"blocks": 5}, "dres_blocks=5"),
        ({"placement": "sequence", "blocks": [0, 2]}, "without gaps"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branch_of(model_of(), **{"placement": "token", **options})


def test_refused_mlps() -> None:
    with pytest.raises(ValueError, match=r"no submodule of its own.*use dres_placement='sequence'"):
        branch_of(model_of("opt"), "token")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(family: str, placement: str) -> None:
    """Coded rows go through the same routers as coded tokens."""
    with pytest.raises(
        ValueError, match=r"'model.layers.1' .* has a mixture of experts.*choose blocks without one, or"
    ):
        branch_of(model_of(family), placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("trained", "blocks", "reached"),
    [
        ("layers.2", [0, 1], False),
        ("layers.2", [1, 2], True),
        ("layers.0", [1, 2], True),
        ("layers.1.input", [1], True),
        ("lm_head", [1, 2], False),
        ("lm_head", "all", False),
        ("embed_tokens", [0], True),
        ("rotary_emb", [0], True),  # a name of nothing: of a frozen model the error may well be measured
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_something_that_is_coded_must_be_trained(
    trained: str, blocks: Any, reached: bool, tied: bool, placement: str
) -> None:
    model = model_of(tie_word_embeddings=tied)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained in name or (tied and trained == "lm_head" and "embed" in name))
    branch = branch_of(model, placement, blocks=blocks)
    if reached or (tied and trained == "lm_head"):
        branch.check(4, padding_free=False)
        return
    with pytest.raises(ValueError, match=r"dres_blocks=.*: all that is trained lies above 'model.*; choose later"):
        branch.check(4, padding_free=False)


def test_experts_of_another_name_are_refused() -> None:
    config = JetMoeConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8, intermediate_size=48
    )
    with pytest.raises(ValueError, match="has a mixture of experts"):
        branch_of(JetMoeForCausalLM(config), "token")


def test_an_mlp_that_returns_more_than_its_output() -> None:
    model, batch = model_of(), batch_of(4)
    branch = branch_of(model, "token", blocks=[1])
    model.model.layers[1].mlp.register_forward_hook(lambda mlp, args, output: (output, None))
    with pytest.raises(ValueError, match=r"LlamaMLP returns a tuple, not its output alone; use dres_placement='seq"):
        run(model, branch, batch)


def test_refused_batches() -> None:
    branch = branch_of(model_of(), "sequence")
    branch.check(4, padding_free=False)
    branch_of(model_of(), "token").check(1, padding_free=True)
    with pytest.raises(ValueError, match="padding_free=True lays end to end"):
        branch.check(4, padding_free=True)
    with pytest.raises(ValueError, match="dres_group_size=4 is more than the 3 rows"):
        branch.check(3, padding_free=False)
    with pytest.raises(ValueError, match="the batch's own"), branch.attached(KEY, torch.ones(4, 1, 7, 7)):
        pass


def test_refused_at_the_forward_pass() -> None:
    model, batch = model_of(), batch_of(4)
    positions = torch.arange(7).repeat(4, 1) + torch.arange(4)[:, None]
    with pytest.raises(ValueError, match="'position_ids' differs between the rows"):
        run(model, branch_of(model, "sequence"), {**batch, "position_ids": positions})
    mpt = MptForCausalLM(MptConfig(vocab_size=models.VOCABULARY, d_model=32, n_heads=4, n_layers=4))
    with pytest.raises(ValueError, match=r"argument 'position_bias', of shape .* cannot be split into the batch's 4"):
        run(mpt, branch_of(mpt, "sequence"), batch)  # as many heads as rows
    with branch_of(model, "token").attached(KEY) as record:
        pass
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = record.error
