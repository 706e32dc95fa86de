"""What an adapter's weight file must hold to be loaded into a model, checked before the model allocates for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dip_hf.adapter_files import Shapes
from dip_hf.blocks import select_blocks
from dip_hf.dipnet.layer import LOG_VARIANCE
from dip_hf.dipnet.placement import block_of
from dip_hf.ibvi.layer import COVARIANCE
from dip_hf.peft_compat import MONTECLORA_SAMPLER, BaseTunerLayer, LoraModel, clean_name, get_pattern_key


if TYPE_CHECKING:
    from dip_hf.dipnet.config import DIPNetConfig


_FILE_PREFIX = "base_model.model."


def check_target(
    config: DIPNetConfig, name: str, target: nn.Module, shapes: Shapes, parameter: str | None = None
) -> None:
    """Refuse weights for a module, before they are allocated, that the weight file has not in that size.

    Args:
        config: gives the module's rank, and whether it is variational; its blocks are resolved.
        name: the module's name in the model; of `target_parameters`, the parameter's.
        target: the module.
        shapes: the weight file's.
        parameter: the last part of a parameter's name; LoRA stands in its module.

    Raises:
        ValueError: the file has no LoRA weights of the module, or of another rank or width, or a posterior of another
            size. Names the module.
    """
    remedy = "correct target_modules, r or rank_pattern, or save or download the adapter again."
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    leaves = ("lora_A.weight", "lora_embedding_A")
    if parameter is not None:
        name = name.removesuffix(f".{parameter}")
    found = {
        key: shape
        for key, shape in shapes.items()
        if key.startswith(f"{_FILE_PREFIX}{name}.") and key.endswith(leaves) and len(shape) >= 2
    }
    if not found:
        raise ValueError(f"The weight file has no LoRA weights for the module {name!r}, which needs some; {remedy}")
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for key, shape in found.items():
        if shape[0] < rank:
            raise ValueError(f"{key} is declared with shape {shape}, but the module's rank is {rank}; {remedy}")
        if isinstance(base, nn.Linear) and shape[1] != base.in_features and not config.use_bdlora:  # which is narrower
            raise ValueError(
                f"{key} is declared with shape {shape}, but the module's input has {base.in_features} features; load "
                f"the adapter on the base model that it was trained on, or {remedy}"
            )
    if config.variational_rank:
        _check_posterior(config, name, shapes)


def check_saved_modules(config: DIPNetConfig, model: nn.Module, shapes: Shapes) -> None:
    """Refuse a file without the weights of a module that `modules_to_save` names, before PEFT copies that module.

    A name that fits no module asks for nothing: for classification PEFT adds both `classifier` and `score`, of which
    a model has one.

    Args:
        config: of the adapter.
        model: the base, perhaps with other adapters.
        shapes: the weight file's.

    Raises:
        ValueError: the file holds nothing of such a module. Names the module.
    """
    suffixes = tuple(config.modules_to_save or ())  # as PEFT matches them
    for name, module in model.named_modules():
        prefix = f"{_FILE_PREFIX}{clean_name(name)}."
        has_weights = next(module.parameters(), None) is not None
        if name.endswith(suffixes) and has_weights and not any(key.startswith(prefix) for key in shapes):
            raise ValueError(
                f"modules_to_save: the weight file holds nothing of {name!r}; save or download the adapter again."
            )


def _check_posterior(config: DIPNetConfig, name: str, shapes: Shapes) -> None:
    """Where the module is variational, S of shape (R, r, n) must be declared beside A of shape (r, n)."""
    names = [clean_name(block) for block in config.all_block_names or ()]
    chosen = select_blocks(names, config.variational_blocks, "variational_blocks")
    if block_of(name, names, chosen) is None:
        return
    key = f"{_FILE_PREFIX}{name}.{COVARIANCE}.weight"
    expected = (config.variational_rank, *shapes.get(f"{_FILE_PREFIX}{name}.lora_A.weight", ()))
    if shapes.get(key) != expected:
        raise ValueError(
            f"{key} is declared with shape {shapes.get(key)}, but is to have {expected}; correct variational_rank or "
            "variational_blocks, or save or download the adapter again."
        )


def check_loaded(
    loaded: Mapping[str, Tensor], model: Mapping[str, Tensor], adapter_name: str, compare_shapes: bool
) -> None:
    """Refuse weights that do not fit the model, or cannot be computed with.

    Args:
        loaded: an adapter's weights, under the model's names.
        model: the model's state dict; a parameter that is sharded away (ZeRO-3) has no elements and is not compared.
        adapter_name: the adapter's.
        compare_shapes: False leaves shapes to PEFT (its `ignore_mismatched_sizes`) and torch (a RuntimeError).

    Raises:
        ValueError: a weight is missing, fits nothing, has another shape, is not finite, or is a noise scale out of
            range. Names the weight.
    """
    remedy = "load the adapter on the base model that it was trained on, or save or download it again."
    own = {key for key in model if _is_adapter_key(key, adapter_name)}
    missing = sorted(own - set(loaded))
    if missing:
        raise ValueError(f"The adapter's weights lack {missing[0]!r} ({len(missing)} are missing); {remedy}")
    for key, tensor in loaded.items():
        if ".lora_" in key and key not in own and MONTECLORA_SAMPLER not in key:
            raise ValueError(f"{key!r} is a weight of no module of the model; {remedy}")
        if compare_shapes and key in model and model[key].numel() and model[key].shape != tensor.shape:
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}, the model's has {tuple(model[key].shape)}; {remedy}"
            )
        if tensor.is_meta or not tensor.is_floating_point():
            if key in own and not tensor.is_floating_point():
                raise ValueError(f"{key!r} is of the type {tensor.dtype}, no floating-point one; {remedy}")
            continue
        log_variance = f".{LOG_VARIANCE}." in key and key.endswith(".weight")
        if not torch.isfinite((tensor.float() / 2).exp() if log_variance else tensor.float()).all():
            raise ValueError(f"{key!r} holds values that are not finite, or too large for a log-variance; {remedy}")
        if key in own and key.endswith(".rms") and (tensor < 0).any():
            raise ValueError(f"{key!r} is negative, which no RMS is; {remedy}")


def _is_adapter_key(key: str, adapter_name: str) -> bool:
    parts = key.split(".")
    return adapter_name in parts[-2:] and any(part.startswith("lora_") for part in parts)


class CheckedLoraModel(LoraModel):
    """`LoraModel` that compares an adapter from a file with the model, before it allocates and before it loads."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an option in a file that PEFT trips over, in whatever way but for want of memory, is the file's.

        Raises:
            ValueError: for a configuration from a file, in place of any other error.
        """
        config = self.peft_config[adapter_name]
        if config._weight_shapes is not None:
            check_saved_modules(config, model, config._weight_shapes)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception as error:
            if config._weight_shapes is None or isinstance(error, ValueError | torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"adapter_config.json cannot be applied to {type(model).__name__} ({type(error).__name__}: {error}); "
                "correct the option that it names, or save or download the adapter again."
            ) from error

    def _create_and_replace(
        self,
        lora_config: DIPNetConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if lora_config._weight_shapes is not None:
            check_target(lora_config, clean_name(current_key), target, lora_config._weight_shapes, parameter_name)
        super()._create_and_replace(
            *(lora_config, adapter_name, target, target_name, parent),
            current_key=current_key,
            parameter_name=parameter_name,
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DIPNetConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_loaded(loaded, model.state_dict(), adapter_name, compare_shapes=config._weight_shapes is not None)
        return loaded
