"""The coded branch: its term, its gradient, and a main branch that does not notice it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from dip_hf import DIPNetConfig
from dip_hf.dres import DReSOptions, coded_pass
from dip_hf.dres.functional import affine_error
from dip_hf.dres.options import GRADIENTS
from dip_hf.dres.sequence_pass import SequencePass
from dip_hf.dres.token_pass import TokenPass
from tests.dipnet.models import deepstack
from tests.dres import oracle
from tests.dres.support import KEY, PLACEMENTS, assert_close, batch_of, branch_of, gradients, model_of, run


# -- the term is what it should be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("pads", ["right", "left", None])
def test_sequence_error_is_the_loops(family: str, pads: str | None) -> None:
    model, batch = model_of(family), batch_of(9, pads=pads)
    record, _ = run(model, branch_of(model, "sequence"), batch)
    expected = oracle.sequence_error(model, batch, range(1, 3), 4, 5, KEY)
    assert record.groups == 2  # and one row is left out
    assert record.error.item() == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3


# Falcon's blocks add to their MLP's output in place
@pytest.mark.parametrize("family", ["llama", "falcon", "gemma3", "gpt2", "gpt_neox", "mistral", "qwen3"])
def test_token_error_is_the_loops(family: str) -> None:
    model, batch = model_of(family), batch_of(3, pads="right")
    branch = branch_of(model, "token", group_size=5, oversampling=1.5)
    record, _ = run(model, branch, batch)
    expected = oracle.token_error(model, batch, list(branch.modules.values()), 5, 8, KEY)
    assert record.groups == 3  # of 18 valid tokens three are left out
    assert list(record.errors) == list(branch.modules)
    assert record.error.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mistral", "opt"])
def test_sequence_placement_in_further_families(family: str) -> None:
    """With all rows alike the coded rows are that row too, so any argument coded wrongly would show as an error."""
    model = model_of(family, attention="eager")
    batch = {name: value[:1].repeat(4, 1) for name, value in batch_of(2, pads="right").items()}
    batch["attention_mask"][:, -2:] = 0
    record, _ = run(model, branch_of(model, "sequence"), batch)
    assert record.groups == 1 and record.error < 1e-8


def test_eager_and_sdpa_masks_mean_the_same() -> None:
    errors = [
        run(model, branch_of(model, "sequence"), batch_of(4, pads="right"))[0].error
        for model in (model_of(attention="eager"), model_of(attention="sdpa"))
    ]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=1e-4)  # eager softmax is fp32


def test_the_affine_part_of_a_model_gives_the_closed_form() -> None:
    """An MLP that is a linear map, on tokens that spread alike in all directions."""
    model = model_of()
    branch = branch_of(model, "token", blocks=[1], group_size=4)
    mlp = model.model.layers[1].mlp
    inputs = torch.eye(4, 32, dtype=torch.float64)[None]
    weight = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    mlp.forward = lambda x: x @ weight + 3
    model.model.layers[1].forward = lambda x: mlp(x)
    with branch.attached(KEY) as record:
        model.model.layers[1](inputs)
    assert record.error.item() == pytest.approx(affine_error(4, 5), rel=1e-9)


# -- the main branch stays as it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_main_branch_is_the_same_to_the_last_bit(placement: str, dropout: float) -> None:
    model = model_of("llama", torch.float32, attention_dropout=dropout).train()
    model = get_peft_model(
        model, LoraConfig(target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    )
    branch, batch = branch_of(model.get_base_model(), placement, blocks=[1, 2]), batch_of(5, pads="right")
    torch.manual_seed(0)
    plain = model(**batch, use_cache=False).logits
    state = torch.get_rng_state()
    torch.manual_seed(0)
    record, logits = run(model, branch, batch)
    assert torch.equal(plain, logits)
    assert torch.equal(state, torch.get_rng_state())
    assert record.error.isfinite() and record.error > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in branch.blocks.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_hooks_and_recorded_outputs_see_the_main_branch_alone(placement: str) -> None:
    model, batch = model_of(attention="eager"), batch_of(4)
    shapes = []
    block = model.model.layers[2]
    handle = block.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    with branch_of(model, placement).attached(KEY, batch["attention_mask"]):
        output = model(**batch, output_hidden_states=True, output_attentions=True)
    handle.remove()
    assert shapes == [(4, 7, 32)]
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    assert {len(states) for states in (*output.hidden_states, *output.attentions)} == {4}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_cache_is_filled_once(placement: str) -> None:
    model, batch = model_of(), batch_of(4)
    with branch_of(model, placement).attached(KEY, batch["attention_mask"]):
        output = model(**batch, use_cache=True)
    assert output.past_key_values.get_seq_length(2) == 7


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("gradient", ["all", "scale_free"])
def test_gradient_by_finite_differences(gradient: str, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the normaliser is a constant of the gradient, the differences are taken with it held where it was."""
    model, batch = model_of("gpt2").train(), batch_of(5, pads="right")  # Llama's norms compute in fp32
    branch = branch_of(model, placement, blocks=[2], gradient=gradient)
    grads = gradients(model, run(model, branch, batch)[0].error)
    variances: list[torch.Tensor] = []

    def error_at_first_variance(
        outputs: torch.Tensor, reconstruction: torch.Tensor, mask: Any, detach_variance: bool
    ) -> torch.Tensor:
        variances.append(outputs.var(0).sum(-1))
        errors = (outputs - reconstruction).square().sum(-1).mean(0) / variances[0]
        return errors.mean() if mask is None else errors[mask].mean()

    if gradient == "all":
        monkeypatch.setattr(coded_pass, "reconstruction_error", error_at_first_variance)
    with torch.no_grad():
        run(model, branch, batch)
        for name in ("transformer.h.2.mlp.c_proj.weight", "transformer.h.0.attn.c_attn.weight"):
            parameter = model.get_parameter(name)
            direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            values = []
            for step in (1e-6, -1e-6):
                parameter += step * direction
                values.append(run(model, branch, batch)[0].error.item())
                parameter -= step * direction
            slope = (grads[name] * direction).sum().item()
            assert abs(slope) > 1e-5
            assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_activation_checkpointing_changes_no_gradient(placement: str) -> None:
    model, batch = model_of(attention_dropout=0.2).train(), batch_of(4, pads="right")
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False))
    branch = branch_of(model.get_base_model(), placement)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        record, logits = run(model, branch, batch)
        results.append(gradients(model, record.error + logits.square().mean()))
    assert results[0] and any(grad.abs().max() > 1e-3 for grad in results[0].values())
    assert_close(*results)


def test_coded_tokens_keep_no_more_than_the_blocks_do() -> None:
    """Where blocks are checkpointed, what the coded pass computes inside the MLP is computed again, not kept."""
    model, batch = model_of().train(), batch_of(4)
    branch, calls = branch_of(model, "token", blocks=[1]), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        record, _ = run(model, branch, batch)
        projection = model.model.layers[1].mlp.up_proj
        handle = projection.register_forward_hook(lambda _, args, output, now=checkpointing: calls.append(now))
        record.error.backward(inputs=[projection.weight])
        handle.remove()
    # The coded tokens' pass, and the block's own, of which the error needs the MLP's output
    assert calls == [True, True]


def test_prefix_tuning_is_refused_between_rows() -> None:
    model = get_peft_model(model_of().float(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).train()
    batch = {**batch_of(4), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    branch = branch_of(model.get_base_model(), "sequence")
    refused = pytest.raises(ValueError, match=r"dres_placement='sequence' .*prefix tuning.*dres_placement='token'")
    with refused, branch.attached(KEY, batch["attention_mask"]):
        model(**batch)


def test_reentrant_checkpoints_are_refused_at_tokens() -> None:
    model = model_of().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"activation_checkpointing_kwargs=.*use_reentrant"):
        run(model, branch_of(model, "token"), batch_of(4))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_has_a_gradient(placement: str) -> None:
    """Same value; another gradient of the last MLP, through the coded branch alone or through the variance too."""
    model, batch = model_of().train(), batch_of(4)
    errors, grads = [], []
    for gradient in ("all", "coded", "scale_free"):
        record, _ = run(model, branch_of(model, placement, blocks=[2], gradient=gradient), batch)
        errors.append(record.error.item())
        grads.append(gradients(model, record.error)["model.layers.2.mlp.down_proj.weight"])
    assert errors[0] == errors[1] == errors[2]
    assert not any(torch.allclose(grads[0], other, rtol=1e-2) for other in grads[1:])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_coded_branch_alone_has_a_gradient_where_asked_for(gradient: str) -> None:
    outputs, coded = (torch.arange(3.0 * rows).view(rows, 3).cos().requires_grad_() for rows in (4, 5))
    compared = SequencePass({}, DReSOptions(group_size=4, gradient=gradient), KEY.tensor(), None)
    compared.compare("f", outputs, coded)
    compared.record.error.backward()
    assert coded.grad is not None and coded.grad.any()
    assert (outputs.grad is None) == (gradient == "coded")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_posterior_needs_one_sample_for_both_branches(placement: str) -> None:
    """Outside of `sampling` every pass has a sample of its own: the coded branch would have other weights."""
    posterior = {"noise_blocks": [], "variational_rank": 2, "variational_blocks": "all"}
    config = DIPNetConfig(r=2, target_modules="all-linear", **posterior)
    model = get_peft_model(model_of(dtype=torch.float32), config).train()
    branch = branch_of(model.get_base_model(), placement, group_size=2)
    with pytest.raises(RuntimeError, match=r"another sample of the posterior.*open the adapter's `sampling` context"):
        run(model, branch, batch_of(4))
    with model.base_model.sampling(KEY):
        assert run(model, branch, batch_of(4))[0].error.isfinite()


def test_groups_of_a_model_that_is_split_over_devices() -> None:
    """Fake devices: where something lies is all that matters here."""
    key, options = KEY.tensor(), DReSOptions(group_size=2, oversampling=1.5, share=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        first, second = (torch.empty(4, 3, 5, device=f"cuda:{index}") for index in range(2))
        token = TokenPass([], {}, options, key, None)
        sequence = SequencePass({}, options, key, None)
        order = sequence.choose_groups(4, second.device)
        for coded in (token, sequence):
            assert coded._group(first, order).device == first.device
        errors = {"first": first.sum(), "second": second.sum()}
        assert coded_pass.DReSRecord(errors, 2).error.device == first.device


def test_features_of_images_that_enter_between_blocks() -> None:
    """Coded rows that ran through the blocks one after the other would not see the images."""
    model, inputs = deepstack()
    text = {"input_ids": inputs["input_ids"].clamp(max=59), "attention_mask": inputs["attention_mask"]}
    for blocks, given in ((1, inputs), ("all", text)):
        record, _ = run(model, branch_of(model, "sequence", blocks=blocks), given)
        assert record.error < 1e-12  # of equal rows, whatever f is
    with pytest.raises(ValueError, match=r"dres_placement='sequence': .* in front of block 1 of dres_blocks.*'token'"):
        run(model, branch_of(model, "sequence", blocks="all"), inputs)
    run(model, branch_of(model, "token", blocks="all"), inputs)


def test_blocks_inputs_of_several_streams_are_refused() -> None:
    """As Gemma 3n's, whose first dimension is no row."""
    config = Gemma3nTextConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size_per_layer_input=48,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        altup_num_inputs=4,
        layer_types=["full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 3,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    branch = branch_of(model, "sequence")
    with pytest.raises(ValueError, match=r"dres_placement='sequence': blocks' inputs have shape \(4, 8, 7, 16\)"):
        run(model, branch, {"input_ids": torch.ones(8, 7, dtype=torch.long)})
