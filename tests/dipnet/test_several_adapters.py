"""Several adapters on one model: beside one another, in one batch, and summed up."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tests.dipnet.models import KEY, adapt, batch, config, load_base, logits, noisy, sites


def test_adapters_that_take_turns_draw_by_their_own_seeds(base: str) -> None:
    model = adapt(load_base(base), "one", noise_blocks=[0], noise_seed=1).train()
    model.add_adapter("two", config(noise_blocks=[1], noise_seed=2))
    keys = []
    for name in ("one", "two", "one", "two", "two"):
        model.set_adapter(name)
        model(**batch())
        keys.append(tuple(model.base_model.noise_state.key[:2].tolist()))
    assert [seed for seed, _ in keys] == [1, 2, 1, 2, 2]
    assert len(set(keys)) == 5  # and each pass has noise of its own


def test_deleting_the_active_adapter_activates_one_and_the_same_everywhere(base: str) -> None:
    model = adapt(load_base(base), "a", noise_blocks=[1])
    model.add_adapter("b", config(noise_blocks=[2]))
    model.add_adapter("c", config(noise_blocks=[1]))  # block 1 holds a and c, so that c would be its next
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert all(site.active_adapters == ["b"] for site in sites(model))
    with model.base_model.sampling(KEY):
        assert model.base_model.noised_layers() == [2]


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters_take_the_first_ones_noise(model: PeftModel, combination: str) -> None:
    noisy(model)
    model.add_adapter("other", config(noise_blocks=[0]))
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type=combination)
    model.set_adapter("both")
    assert model.peft_config["both"].variational_scale == model.peft_config["default"].variational_scale
    with model.base_model.sampling(KEY):
        assert model.base_model.noised_layers() == [2, 3]
    assert noisy(model).isfinite().all()
    for site in sites(model):
        if "both" in site.lora_dip_log_variance:
            assert torch.equal(site.leaf("both").rms, site.leaf("default").rms)
            assert torch.equal(site.leaf("both").weight, site.leaf("default").weight)


def test_weighted_adapters_without_lora(base: str) -> None:
    model = adapt(load_base(base), target_modules=[])
    model.add_adapter("other", config(target_modules=[]))
    with pytest.raises(ValueError, match=r"adapters=\['default', 'other'\] have noise and no LoRA weights to add up"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    assert list(model.peft_config) == ["default", "other"]


def test_deleting_the_active_adapter_activates_another_that_shares_no_layer(base: str) -> None:
    model = adapt(load_base(base), "a", noise_blocks=[0], target_modules=[])
    model.add_adapter("b", config(noise_blocks=[3], target_modules=["layers.3.mlp.up_proj"]))
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and model.active_adapter == "b"
    assert not torch.equal(noisy(model), logits(model))
