from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from dip_hf import NoiseKey
from dip_hf.dres import DReSBranch, coded_pass
from dip_hf.dres.functional import affine_error, decode, encode, group_permutation, reconstruction_error
from tests.dipnet import models
from tests.dres import oracle


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
    return DReSBranch(model, **{"placement": placement, "blocks": [1, 2], "group_size": 4, **options})


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


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "mistral", "qwen3"])
def test_token_error_is_the_loops(family: str) -> None:
    model, batch = model_of(family), batch_of(3, pads="right")
    branch = branch_of(model, "token", group_size=5, oversampling=1.5)
    record, _ = run(model, branch, batch)
    expected = oracle.token_error(model, batch, list(branch.modules.values()), 5, 8, KEY)
    assert record.groups == 3  # of 18 valid tokens three are left out
    assert list(record.errors) == list(branch.modules)
    assert record.error.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mistral", "opt", "mixtral", "qwen3_moe"])
def test_sequence_placement_in_further_families(family: str) -> None:
    """With all rows alike the coded rows are that row too, so any argument coded wrongly would show as an error."""
    model = model_of(family, torch.float32, attention="eager")  # grouped experts know no fp64
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
    family = "mixtral" if placement == "sequence" else "llama"
    model, batch = model_of(family, torch.float32, attention="eager"), batch_of(4)
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
def test_gradient_by_finite_differences(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The normaliser is a constant of the gradient, so the differences are taken with it held where it was."""
    model, batch = model_of("gpt2").train(), batch_of(5, pads="right")  # Llama's norms compute in fp32
    branch = branch_of(model, placement, blocks=[2])
    grads = gradients(model, run(model, branch, batch)[0].error)
    variances: list[torch.Tensor] = []

    def error_at_first_variance(outputs: torch.Tensor, reconstruction: torch.Tensor, mask: Any) -> torch.Tensor:
        variances.append(outputs.var(0).sum(-1))
        errors = (outputs - reconstruction).square().sum(-1).mean(0) / variances[0]
        return errors.mean() if mask is None else errors[mask].mean()

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


def test_reentrant_checkpoints_are_refused_at_tokens() -> None:
    model = model_of().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        run(model, branch_of(model, "token"), batch_of(4))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_detached_target(placement: str) -> None:
    """Same value; no gradient along f(x): what reaches the last MLP is that of the coded branch alone."""
    model, batch = model_of().train(), batch_of(4)
    errors, grads = [], []
    for detach in (False, True):
        record, _ = run(model, branch_of(model, placement, blocks=[2], detach_target=detach), batch)
        errors.append(record.error.item())
        grads.append(gradients(model, record.error)["model.layers.2.mlp.down_proj.weight"])
    assert errors[0] == errors[1]
    assert not torch.allclose(grads[0], grads[1], rtol=1e-2)


# -- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_groups_change_with_the_key_and_with_nothing_else(placement: str) -> None:
    model, batch = model_of(), batch_of(8)
    branch = branch_of(model, placement)
    first, again, other = (run(model, branch, batch, key)[0].error for key in (KEY, KEY, KEY._replace(step=4)))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("placement", "rows", "length"), [("sequence", 3, 7), ("token", 1, 3)])
def test_a_batch_too_small_for_one_group_gives_zero(placement: str, rows: int, length: int) -> None:
    model = model_of().train()
    record, logits = run(model, branch_of(model, placement), batch_of(rows, length))
    assert record.groups == 0 and record.error == 0
    (record.error + logits.mean()).backward()


def test_packed_rows() -> None:
    """Padding-free: one row, several examples, no mask; each token's MLP output knows nothing of the layout."""
    model = model_of()
    ids = models.batch(1, 12)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    branch = branch_of(model, "token")
    with branch.attached(KEY) as record:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    batch = {"input_ids": ids, "position_ids": positions}
    mlps = list(branch.modules.values())
    assert record.groups == 3
    assert record.error.item() == pytest.approx(oracle.token_error(model, batch, mlps, 4, 5, KEY), rel=1e-9)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bf16_is_fp32_up_to_rounding(placement: str) -> None:
    errors = [
        run(model, branch_of(model, placement), batch_of(8, pads="right"))[0].error
        for model in (model_of(dtype=torch.bfloat16), model_of(dtype=torch.float32))
    ]
    assert errors[0].dtype == torch.float32
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=0.1)


# -- with other adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("trajectories", [1, 3])
@pytest.mark.parametrize("noised", [[0], [1], [2], "all", [3]])
def test_with_dipnets_noise_and_trajectories(placement: str, trajectories: int, noised: Any) -> None:
    """Whatever is noised, the main branch does not change, and noise as such makes no error."""
    model = models.adapt(model_of("llama"), noise_blocks=noised, target_modules=[], r=0)
    batch, branch = batch_of(5, pads="right"), branch_of(model.get_base_model(), placement)
    with model.base_model.sampling(KEY, trajectories):
        plain = model(**batch, use_cache=False).logits
    outputs = []
    for branch_outside in (True, False):
        if branch_outside:
            with branch.attached(KEY, batch["attention_mask"]) as record, model.base_model.sampling(KEY, trajectories):
                logits = model(**batch, use_cache=False).logits
        else:
            with model.base_model.sampling(KEY, trajectories), branch.attached(KEY, batch["attention_mask"]) as record:
                logits = model(**batch, use_cache=False).logits
        assert torch.equal(plain, logits)
        outputs.append(record.error.item())
    assert outputs[0] == outputs[1]
    rows = 5 * (1 if noised == [3] else trajectories)
    if placement == "sequence":
        assert record.groups == rows // 4


def test_noise_inside_the_range_is_coded_like_a_sample() -> None:
    """Where blocks are affine, noise leaves nothing but the affine floor; the gradient reaches the noise."""
    model = models.adapt(model_of("llama"), noise_blocks=[2], target_modules=[], r=0)
    base = model.get_base_model()
    for layer in base.model.layers:
        layer.forward = lambda hidden_states, **_: 2 * hidden_states + 1
    batch = batch_of(4)
    with model.base_model.sampling(KEY, 1), branch_of(base, "sequence").attached(KEY) as record:
        with torch.no_grad():
            states = base.model.embed_tokens(batch["input_ids"])
        seen = []
        handle = base.model.layers[2].register_forward_hook(lambda module, args, output: seen.append(output))
        model(input_ids=batch["input_ids"])
        handle.remove()
    order = group_permutation(KEY.tensor(), 4)
    outputs = seen[0][order]
    expected = reconstruction_error(outputs, decode(encode(outputs, 5), 4))
    assert not torch.allclose(seen[0], 2 * (2 * (2 * states + 1) + 1) + 1)
    assert record.error.item() == pytest.approx(expected.item(), rel=1e-6)
    record.error.backward()
    noise = next(p for name, p in model.named_parameters() if "lora_dip" in name)
    assert noise.grad.abs().max() > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_prompt_tunings_virtual_tokens_are_valid_tokens(placement: str) -> None:
    model = get_peft_model(model_of(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).double()
    batch = batch_of(4)
    record, _ = run(model, branch_of(model.get_base_model(), placement), batch)
    assert record.groups == (1 if placement == "sequence" else 4 * 9 // 4)
    gradients(model, record.error)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "row"}, "dres_placement='row' must be one of sequence, token"),
        ({"group_size": 1}, "dres_group_size=1 must be at least 2"),
        ({"oversampling": 0.75}, "dres_oversampling=0.75 must be at least 1"),
        ({"oversampling": float("nan")}, "dres_oversampling=nan must be at least 1"),
        ({"oversampling": 2.25}, r"dres_oversampling=2.25: .*always 0; change"),
        ({"blocks": [4]}, r"dres_blocks=\[4\]: the model has 4 blocks"),
        ({"blocks": 5}, "dres_blocks=5"),
        ({"placement": "sequence", "blocks": [0, 2]}, "without gaps"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branch_of(model_of(), **{"placement": "token", **options})


@pytest.mark.parametrize(
    ("family", "message"), [("opt", "no submodule of its own"), ("mixtral", "mixture of experts")]
)
def test_refused_mlps(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*use dres_placement='sequence'"):
        branch_of(model_of(family), "token")


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
    with branch_of(model, "token").attached(KEY) as record:
        pass
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = record.error


def test_default_is_the_last_quarter() -> None:
    assert list(DReSBranch(model_of(), placement="sequence").modules) == ["model.layers.3"]
    assert list(DReSBranch(model_of(num_hidden_layers=6)).modules) == ["model.layers.4.mlp", "model.layers.5.mlp"]
