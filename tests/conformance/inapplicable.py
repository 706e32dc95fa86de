"""The tests of PEFT's suite that cannot hold for a DIPNet adapter, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple


class Inapplicable(NamedTuple):
    """A shell pattern on "Class::test[row]", with "(" for "[" and ")" for "]", and why those tests cannot hold."""

    pattern: str
    reason: str


_CUSTOM = "TestPeftCustomModel::"
_PICKLE = "DIPNet reads safetensors only: a pickled adapter can execute code when it is loaded"
_FP32 = "log-variances stay in fp32 at any precision of the base: in half precision their updates would round away"
_NO_EFFECT = "an adapter of noise alone leaves the evaluation pass as it is, and the test requires a change"
_EXACT_LIST = "lists all trainable parameters of LoRA by name; DIPNet trains its log-variances besides"
# Which rows do so depends on the draws of noise
_DIVERGES = "at the test's learning rate of 0.5 weights reach 1e20; a log-variance's exponential is then infinite"
_NO_LINEAR = "the test's model has no layer that could stand for a decoder block"
_HUB = "downloads a model from the Hub"
_OTHER_METHOD = "tests another PEFT method"

# Run all the same, and required to fail: one that begins to pass must leave this table.
FAILING: Sequence[Inapplicable] = [
    Inapplicable(_CUSTOM + "test_save_pretrained_pickle(*", _PICKLE),
    Inapplicable(_CUSTOM + "test_adapter_dtype_autocast(*-False-dtype[01]-*", _FP32),
    Inapplicable(_CUSTOM + "test_safe_merge(DIPNet noise only*", _NO_EFFECT),
    Inapplicable(_CUSTOM + "test_safe_merge(DIPNet modules_to_save*", _NO_EFFECT),
    Inapplicable(_CUSTOM + "test_disable_adapters(DIPNet noise only*", _NO_EFFECT),
    Inapplicable(_CUSTOM + "test_disable_adapters_with_merging(DIPNet noise only*", _NO_EFFECT),
    *(
        Inapplicable(f"{_CUSTOM}test_parameters_after_loading_model({row}-*", _DIVERGES)
        for row in (
            *("DIPNet every block", "DIPNet modules_to_save", "DIPNet noise into LoRA", "DIPNet noise before LoRA"),
            *("DIPNet posterior and noise", "DIPNet pattern"),
            *(f"Vanilla MLP {number} LoRA" for number in range(1, 7)),
            *(f"Vanilla MLP {number} LoRA with DoRA" for number in (8, 9)),
            *(
                "Vanilla MLP 1 LoRA with KaSA",
                "Vanilla MLP 1 LoRA with MiCA",
                "Vanilla MLP 10 LoRA with VeLoRA random",
            ),
            *(f"Vanilla MLP {row}" for row in ("11 LoRA with VeLoRA batch_average", "1 LoRA with lora_b bias")),
            "Vanilla MLP 12 LoRA with VeLoRA batch_average_once",
            *("Conv2d 2 LoRA", "Conv2d Groups2 LoRA", "Conv2d Groups2 LoRA with DoRA", "Conv3d 2 LoRA"),
            *("MLP 1 using nn.Parameter LoRA", "MLP 2 using nn.Parameter LoRA"),
            *("BD-LoRA A only", "BD-LoRA B only", "BD-LoRA both A and B"),
        )
    ),
    Inapplicable("TestRequiresGrad::test_requires_grad_modules_to_save_*", _EXACT_LIST),
    Inapplicable("TestRequiresGrad::test_requires_grad_follows_inference_mode_*", _EXACT_LIST),
    Inapplicable("TestRequiresGrad::test_requires_grad_lora_*", _EXACT_LIST),
    Inapplicable("TestMultiRankAdapter::test_multirank_2", "takes every tuner layer for one with a matrix lora_A"),
    Inapplicable(
        "TestMixedAdapterBatches::test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save(LoRA*",
        _NO_LINEAR,
    ),
    Inapplicable("TestDynamicDispatch::test_target_layer_without_in_features_out_features", _NO_LINEAR),
    Inapplicable(
        "TestDynamicDispatch::test_saving_and_loading",
        "compares a pass in training mode, where DIPNet's noise is on, with one in evaluation mode, where it is off",
    ),
    Inapplicable(
        "TestDynamicDispatch::test_custom_lora_layer_issues_warning",
        "compares a message that holds the name of PEFT's own test package",
    ),
    Inapplicable(
        _CUSTOM + "test_load_resized_embedding_ignore_mismatched_sizes",
        "expects torch's RuntimeError of a shape that does not fit; here it is a ValueError with the remedy",
    ),
    Inapplicable(
        _CUSTOM + "test_add_adapter_rejects_duplicate_name_without_mutation(True)",
        "PeftMixedModel takes a fixed list of PEFT's own methods",
    ),
]

# Not run: they test nothing of ours, or cannot run here.
OTHER: Sequence[Inapplicable] = [
    *(
        Inapplicable(_CUSTOM + name, _HUB)
        for name in (
            "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
            "test_multiple_adapters_automatic_modules_to_save",
            "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
            "test_multiple_adapters_no_needless_copy_modules_to_save",
            "test_gpt2_dora_merge_and_unload*",
            "test_dora_save_and_load_remapping",
        )
    ),
    Inapplicable("TestDynamicDispatch::test_override_lora_linear", _HUB),
    *(
        Inapplicable(_CUSTOM + f"test_{method}_*", _OTHER_METHOD)
        for method in ("ia3", "glora", "gralora", "pvera", "trainable_tokens")
    ),
    Inapplicable(_CUSTOM + "test_set_requires_grad_trainable_tokens", _OTHER_METHOD),
    *(
        Inapplicable(f"TestRequiresGrad::test_requires_grad_{method}_*", _OTHER_METHOD)
        for method in (
            *("ia3", "adalora", "loha", "lokr", "oft", "hra", "miss", "boft", "lntuning", "vera", "pvera", "randlora"),
            *("vblora", "fourierft"),
        )
    ),
    Inapplicable("TestDefaultTargetModules::test_default_target_modules_osf", _OTHER_METHOD),
]


def find(table: Sequence[Inapplicable], name: str) -> Inapplicable | None:
    """The first entry that covers the test "Class::test[row]"."""
    name = name.replace("[", "(").replace("]", ")")
    return next((entry for entry in table if fnmatchcase(name, entry.pattern)), None)
