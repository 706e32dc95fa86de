"""ICP's branch around a model: what it repeats, what it leaves untouched, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from dip_hf.dipnet import DIPNetConfig
from dip_hf.dipnet.trajectories import repeat_rows
from dip_hf.icp import ICPBranch, ICPOptions
from dip_hf.icp.functional import compared_tokens
from dip_hf.noise import NoiseKey
from tests.dipnet.models import build
from tests.icp.support import DEPTH, HIDDEN, VOCABULARY, icp, padded_batch, task_loss, tiny_llama, with_lora


@pytest.mark.parametrize("dipnet", [False, True])
@pytest.mark.parametrize("start_block", [0, 1, 3])
def test_teacher_repeats_the_clean_pass_bit_for_bit(start_block: int, dipnet: bool) -> None:
    """Without a perturbation: dropout of one half, noise and folded trajectories are those of the clean pass."""
    if dipnet:
        config = DIPNetConfig(
            target_modules="all-linear", r=4, lora_dropout=0.5, noise_blocks=2, noise_scale=0.3, task_type="CAUSAL_LM"
        )
        model = get_peft_model(tiny_llama(attention_dropout=0.5), config).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    else:
        model = tiny_llama(attention_dropout=0.5, attn_implementation="eager")
    inputs = padded_batch()
    labels = repeat_rows(inputs["labels"], 2) if dipnet else inputs["labels"]
    branch = ICPBranch(model, ICPOptions(start_block=start_block))
    with model.base_model.sampling(NoiseKey(3), 2) if dipnet else nullcontext():
        with branch.clean() as record:
            task = task_loss(model, inputs, labels)
        before = torch.get_rng_state()
        teacher = branch.teacher(record, record.site)
        moved = branch.loss(record, inputs, task)
    assert torch.get_rng_state().equal(before)
    assert list(teacher) == list(record.features) == branch.layers
    for index, states in teacher.items():
        assert states.equal(record.features[index])
    term = branch.compare(record, inputs, teacher)
    assert term.total == 0 and moved.total > 0
    assert term.tokens == compared_tokens(inputs).sum()
    if dipnet:
        assert record.features[DEPTH - 1].shape[0] == 6


@pytest.mark.parametrize("start_block", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_nothing_leaks_and_the_task_gradient_is_untouched(
    start_block: int, checkpointing: bool, adapter: bool
) -> None:
    def gradients(with_icp: bool) -> list[Tensor]:
        model = with_lora(tiny_llama()) if adapter else tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = padded_batch()
        if with_icp:
            _, term, task = icp(model, inputs, start_block=start_block, steps=2)
            assert all(parameter.grad is None for parameter in model.parameters())
            (task + 0 * term.total).backward()
        else:
            task_loss(model, inputs).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-9)


def test_checkpointing_changes_nothing() -> None:
    totals = []
    for checkpointing in (False, True):
        model = with_lora(tiny_llama(), dropout=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        _, term, task = icp(model, padded_batch(), steps=2)
        (task + term.total).backward()
        totals.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*totals, rtol=1e-4, atol=1e-7)


def test_keys_that_blocks_share_stay_the_clean_passs_under_checkpointing() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma4TextConfig(
        **sizes,
        **{"num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8, "vocab_size": VOCABULARY},
        **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
        use_cache=False,
    )
    totals = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = with_lora(Gemma4ForCausalLM(config).double().train())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _, term, task = icp(model, padded_batch(), start_block=1, epsilon=0.3)
        (task + term.total).backward()
        totals.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*totals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start_block", [0, 2])
def test_gradient_of_the_feature_term_by_finite_differences(start_block: int) -> None:
    """With the teacher held constant, along a direction of one weight below and one above the site."""
    model = tiny_llama()
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):  # Llama's own computes in fp32
            model.set_submodule(name, nn.RMSNorm(HIDDEN, 1e-6))
    model.double()
    inputs = padded_batch()
    branch = ICPBranch(model, ICPOptions(start_block=start_block, epsilon=0.1))
    with branch.clean() as record:
        task = task_loss(model, inputs)
    teacher = branch.teacher(record, branch.perturb(record, inputs, task))
    branch.compare(record, inputs, teacher).total.backward()

    def value() -> float:
        with branch.clean() as again:
            task_loss(model, inputs)
        return branch.compare(again, inputs, teacher).total.item()

    for weight in (model.model.layers[1].mlp.down_proj.weight, model.model.layers[3].self_attn.q_proj.weight):
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * 1e-5)
            ends.append(value())
            with torch.no_grad():
                weight.sub_(direction, alpha=sign * 1e-5)
        expected = (ends[0] - ends[1]) / 2e-5
        assert (weight.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("start_block", [0, 1, 3])
def test_default_cache_of_transformers_is_harmless(start_block: int) -> None:
    inputs = padded_batch()
    totals = [icp(tiny_llama(use_cache=cache), inputs, start_block=start_block)[1].total for cache in (False, True)]
    assert totals[0] == totals[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon"])
def test_caches_of_other_names_and_places(family: str, attention: str) -> None:
    """In double precision: with a cache GPT-2's eager attention alone may round otherwise, by the CPU."""
    inputs = padded_batch()
    totals = [
        icp(build(family, use_cache=cache, _attn_implementation=attention).double(), inputs, start_block=2)[1].total
        for cache in (False, True)
    ]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)


def test_layers() -> None:
    model = tiny_llama()
    assert ICPBranch(model, ICPOptions(layers=1)).layers == [3]
    assert ICPBranch(model, ICPOptions(layers=2)).layers == [1, 3]
    assert ICPBranch(model, ICPOptions(layers=3)).layers == [1, 2, 3]
    assert ICPBranch(model, ICPOptions(layers=8)).layers == [0, 1, 2, 3]
    assert ICPBranch(model, ICPOptions(layers=8, start_block=2)).layers == [2, 3]


def test_no_hook_stays() -> None:
    model = tiny_llama()
    icp(model, padded_batch(), start_block=2, steps=2)
    icp(model, padded_batch())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_reducers_of_ddp_hear_of_one_backward_pass_only() -> None:
    model = with_lora(tiny_llama())
    wrapped = DistributedDataParallel(model)
    reductions: list[object] = []

    def hook(state, bucket):  # DDP wants its annotations to be classes, and here they would be strings
        reductions.append(bucket)
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    inputs = padded_batch()
    branch = ICPBranch(model, ICPOptions(steps=2))
    for step in range(1, 3):
        with branch.clean() as record:
            task = task_loss(wrapped, inputs)
        term = branch.loss(record, inputs, task, lambda: task_loss(model, inputs))
        assert len(reductions) == step - 1
        (task + term.total).backward()
        assert len(reductions) == step


def test_four_bit_base() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    for block in model.model.layers:
        plain = block.mlp.up_proj
        block.mlp.up_proj = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        block.mlp.up_proj.load_state_dict(plain.state_dict())
        block.mlp.up_proj.to("cpu")
    model = with_lora(model.requires_grad_(False))
    for start_block in (0, 2):
        _, term, task = icp(model, padded_batch(), start_block=start_block)
        (task + term.total).backward()
        assert term.total > 0


def test_prefix_tuning_is_refused() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama(), config)
    branch = ICPBranch(model, ICPOptions(start_block=1))
    with pytest.raises(ValueError, match="prefix-tuning"), branch.clean():
        task_loss(model, padded_batch())


def test_misuse() -> None:
    model, inputs = tiny_llama(), padded_batch()
    with pytest.raises(ValueError, match="icp_start_block=4: the model has 4 blocks; give a number from 0 to 3"):
        ICPBranch(model, ICPOptions(start_block=4))
    branch = ICPBranch(model, ICPOptions(steps=2))
    with branch.clean() as record, torch.no_grad():
        task = task_loss(model, inputs)
    with pytest.raises(ValueError, match="icp_steps=2 needs"):
        branch.loss(record, inputs, task)
    with pytest.raises(RuntimeError, match="no forward pass with gradient"):
        ICPBranch(model, ICPOptions()).loss(record, inputs, task)
    config = DIPNetConfig(target_modules=[], noise_blocks=2, task_type="CAUSAL_LM")
    noisy = get_peft_model(tiny_llama(), config).train()
    branch = ICPBranch(noisy, ICPOptions())
    with branch.clean() as record, noisy.base_model.sampling(NoiseKey(0), 2):
        task = task_loss(noisy, inputs, repeat_rows(inputs["labels"], 2))
    with pytest.raises(RuntimeError, match="inside the adapter's `sampling` context"):
        branch.loss(record, inputs, task)


def test_a_clean_pass_that_goes_around_something() -> None:
    with pytest.raises(ValueError, match=r"icp_start_block=0: OPTModel did not run as a whole .*icp_start_block to 1"):
        icp(build("opt"), padded_batch())
    model = tiny_llama()
    branch = ICPBranch(model, ICPOptions())
    model.config.num_hidden_layers = 3  # of four blocks
    with branch.clean() as record:
        task = task_loss(model, padded_batch())
    with pytest.raises(
        ValueError, match=r"icp_layers=4 compares the outputs of blocks \[0, 1, 2, 3\], .* skipped \[3\]"
    ):
        branch.loss(record, padded_batch(), task)


def test_a_mask_for_pairs_of_tokens_is_refused() -> None:
    model, inputs = tiny_llama(), padded_batch()
    pairs = inputs["attention_mask"][:, None, None, :].bool()
    branch = ICPBranch(model, ICPOptions())
    with branch.clean() as record:
        task = task_loss(model, inputs, inputs["labels"])
    with pytest.raises(ValueError, match=r"icp_weight: a mask of shape .* do not say which tokens are compared"):
        branch.loss(record, {**inputs, "attention_mask": pairs}, task)
