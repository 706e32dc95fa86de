"""Which samples are coded: groups, packing, padding, DIPNet's noise and trajectories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from dip_hf.dres import DReSBranch, DReSOptions, coded_pass
from dip_hf.dres.functional import decode, encode, group_permutation, reconstruction_error
from tests.dipnet import models
from tests.dres import oracle
from tests.dres.support import KEY, PLACEMENTS, batch_of, branch_of, gradients, model_of, run


# -- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_groups_change_with_the_key_and_with_nothing_else(placement: str, share: float) -> None:
    model, batch = model_of(), batch_of(8)
    branch = branch_of(model, placement, share=share)
    first, again, other = (run(model, branch, batch, key)[0].error for key in (KEY, KEY, KEY._replace(step=4)))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("placement", "pads"), [("sequence", "right"), ("sequence", None), ("token", None)])
def test_a_share_of_the_groups_estimates_the_mean_over_all(
    placement: str, pads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the groups in reverse order half of them are the other half: the two halves' mean is the whole, exactly."""
    model, batch = model_of(), batch_of(8, pads=pads)

    def error(share: float, reverse: bool) -> torch.Tensor:
        def permutation(key: torch.Tensor, count: int) -> torch.Tensor:
            order = group_permutation(key, count).view(4, -1)
            return (order.flip(1) if reverse else order).flatten()

        monkeypatch.setattr(coded_pass, "group_permutation", permutation)
        return run(model, branch_of(model, placement, share=share), batch)[0].error

    whole, one, other = error(1.0, False), error(0.5, False), error(0.5, True)
    assert one.item() != pytest.approx(other.item(), rel=1e-3)
    assert (one + other).item() / 2 == pytest.approx(whole.item(), rel=1e-6)  # some of Llama is in fp32
    assert error(1.0, True).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize(("share", "coded"), [(1.0, 14), (0.5, 7), (0.3, 5), (1 / 14, 1), (1e-12, 1)])
def test_a_share_is_rounded_up_to_whole_groups(share: float, coded: int) -> None:
    model, shapes = model_of(), []
    branch = branch_of(model, "token", share=share, blocks=[1])
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: shapes.append(tuple(x.shape)) or forward(x)
    record, _ = run(model, branch, batch_of(8))
    assert record.groups == coded
    assert shapes == [(8, 7, 32), (1, 5 * coded, 32)]


@pytest.mark.parametrize(("placement", "rows", "length"), [("sequence", 3, 7), ("token", 1, 3)])
def test_a_batch_too_small_for_one_group_gives_zero(placement: str, rows: int, length: int) -> None:
    model = model_of().train()
    record, logits = run(model, branch_of(model, placement), batch_of(rows, length))
    assert record.groups == 0 and record.error == 0
    (record.error + logits.mean()).backward()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_more_padding_changes_nothing(family: str) -> None:
    """OPT counts positions by the mask, so that rows differ in them where one has padding."""
    model, batch = model_of(family), batch_of(4, pads="right")
    longer = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    branch = branch_of(model, "sequence")
    errors = [run(model, branch, one)[0].error.item() for one in (batch, longer)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9) and errors[0] > 0


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
    """Whatever is noised, the main branch does not change, and either context may be the outer one."""
    model = models.adapt(model_of("llama"), noise_blocks=noised, target_modules=[])
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


def test_rows_below_the_first_noise_stand_for_those_of_all_trajectories() -> None:
    """Trajectories that agree, folded in behind the range's first block, are rows that were given twice."""
    model = models.adapt(model_of(), noise_blocks=[2], noise_scale=1e-9, target_modules=[])
    batch, branch = batch_of(4, pads="right"), branch_of(model.get_base_model(), "sequence")
    twice = {name: value.repeat(2, 1) for name, value in batch.items()}
    errors = []
    for rows, trajectories in ((batch, 2), (twice, 1)):
        with model.base_model.sampling(KEY, trajectories):
            errors.append(run(model, branch, rows)[0].error.item())
    assert errors[0] == pytest.approx(errors[1], rel=1e-6) and errors[0] > 1e-3


def test_noise_inside_the_range_is_coded_like_a_sample() -> None:
    """Where blocks are affine, noise leaves nothing but the affine floor; the gradient reaches the noise."""
    model = models.adapt(model_of("llama"), noise_blocks=[2], target_modules=[])
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


def test_rows_with_a_cache_of_states_alone() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, state_size=4)).eval()
    branch, batch = branch_of(model, "sequence"), {"input_ids": batch_of(4)["input_ids"]}
    errors = []
    for use_cache in (True, False):
        with branch.attached(KEY) as record:
            model(**batch, use_cache=use_cache)
        errors.append(record.error.item())
    assert errors[0] == errors[1] > 0


def test_default_is_the_last_quarter() -> None:
    assert list(DReSBranch(model_of(), DReSOptions(placement="sequence")).modules) == ["model.layers.3"]
    assert list(DReSBranch(model_of(num_hidden_layers=6), DReSOptions()).modules) == [
        "model.layers.4.mlp",
        "model.layers.5.mlp",
    ]
