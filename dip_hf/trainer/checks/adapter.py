"""Checks of the adapter that is to be trained."""

from __future__ import annotations

from peft import LoraConfig, PeftModel
from torch import nn

from dip_hf.dipnet.layer import NoiseSite, own_parameters


def active_lora(model: nn.Module) -> list[LoraConfig]:
    """The configurations of the active adapters that are LoRA, DIPNet's among them."""
    configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    return [config for config in configs if isinstance(config, LoraConfig)]


def check_trainable(model: PeftModel) -> None:
    """
    Raises:
        ValueError: an adapter without a parameter that learns, or that is to save modules which the model has not.
    """
    names = [name for name, _ in model.named_modules()]
    for config in active_lora(model):
        missing = [name for name in config.modules_to_save or () if not any(own.endswith(name) for own in names)]
        if missing:
            raise ValueError(
                f"modules_to_save={list(config.modules_to_save or ())}: the model has no module of the name "
                f"{missing[0]!r}, and the adapter could not be exported; correct it, or leave it out."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the adapter leaves nothing to train (learn_noise=False without target_modules, or loaded for inference); "
            "name target_modules, learn the noise, or load with is_trainable=True."
        )


def check_drawn_noise(model: nn.Module) -> None:
    """
    Raises:
        ValueError: log-variances would be trained of an adapter whose noise no pass draws, another one being active
            before it.
    """
    for site in (module for module in model.modules() if isinstance(module, NoiseSite)):
        drawn, *others = site.adapters_with_noise() or [""]
        for name in others:
            if site.leaf(name).weight.requires_grad:
                raise ValueError(
                    f"active adapters {[drawn, *others]}: block {site.layer} draws the noise of {drawn!r}, the first "
                    f"of them, so that the noise of {name!r} would be trained without being drawn; activate {name!r} "
                    f"first or alone, or merge {drawn!r} into the base by merge_and_unload."
                )


def check_no_adapter(model: nn.Module) -> None:
    """
    Raises:
        ValueError: there is a DIPNet adapter, but put in by transformers' `add_adapter`, which hides it from PEFT and
            TRL.
    """
    if own_parameters(model):
        raise ValueError(
            f"model={type(model).__name__} holds a DIPNet adapter outside of a PeftModel, as add_adapter leaves it; "
            "pass peft_config=DIPNetConfig(...) instead, or a model from get_peft_model or PeftModel.from_pretrained."
        )
