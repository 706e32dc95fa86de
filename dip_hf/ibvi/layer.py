"""The posterior of LoRA's A in one linear layer, in PEFT's form."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dip_hf.ibvi.functional import (
    compiled_coefficients,
    deviation,
    initial_covariance,
    posterior_coefficients,
    posterior_number,
    project,
)
from dip_hf.noise import derive_seed
from dip_hf.noise_state import NoiseState, recomputing
from dip_hf.peft_compat import PARAMETER_PREFIX, LoraLayer, LoraVariant


COVARIANCE = f"{PARAMETER_PREFIX}covariance"
"""Name of the ModuleDict that a variational LoRA layer gets."""


class _Deviation(torch.autograd.Function):
    """`deviation`, which also saves an empty tensor whose shape is a number that stands for the sample.

    A checkpoint compares the shapes of what is saved in the forward pass and in its recomputation: one that would
    recompute with another sample, of a later pass, stops with an error and not with a wrong gradient.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, coefficients: Tensor, tag: int) -> Tensor:
        ctx.save_for_backward(coefficients, coefficients.new_empty(0, tag))
        return deviation(covariance, coefficients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        coefficients, _ = ctx.saved_tensors
        return deviation(grads[0], coefficients.mT), None, None


class Covariance(nn.Module):
    """S of one adapter in one LoRA layer, where A ~ N(lora_A.weight, S Sᵀ).

    Args:
        shape: (r, n) of LoRA's A.
        rank: R.
        scale: c; at 0 the posterior is a point, and nothing is sampled.
        in_eval: sample in evaluation too.
        seed: of the initial values, and of the samples where no trainer provides a key.
        name: the LoRA layer's, on which the samples depend.
        block: index of the decoder block that the layer lies in.
        state: shared by all noise sites and posteriors of the model.
        device: where S lies; on the meta device it is to be assigned on loading.
    """

    weight: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        scale: float,
        in_eval: bool,
        seed: int,
        name: str,
        block: int,
        state: NoiseState,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape, self.rank, self.scale, self.in_eval, self.seed = shape, rank, scale, in_eval, seed
        self.name, self.number, self.block, self.state = name, posterior_number(name), block, state
        self.drawn: tuple[Tensor, int] | None = None
        empty = torch.empty(rank, *shape, dtype=torch.float32, device="meta")
        self.weight = nn.Parameter(empty if device.type == "meta" else self.initial().to(device))

    def initial(self) -> Tensor:
        """The initial S, shape (R, r, n), fp32, on the CPU; always the same."""
        return initial_covariance(self.rank, self.shape, self.scale, self.seed, self.number)

    def resized(self, mean: Tensor) -> Covariance:
        """A new one with these settings, of the shape of A and on its device."""
        settings = (self.rank, self.scale, self.in_eval, self.seed, self.name, self.block, self.state)
        return Covariance((mean.shape[0], mean.shape[1]), *settings, mean.device)

    def to(self, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Covariance:
        """As a module's, but for a `dtype` by name: PEFT, loading without memory, casts an adapter to its base's."""
        return super().to(*args, **kwargs)

    @property
    def sampled(self) -> bool:
        """Whether a forward pass now samples: in training, inside `sampling`, or where evaluation shall, too."""
        return self.scale > 0 and self.state.draws(self.training, self.in_eval)

    def _sample(self, number: int) -> tuple[Tensor, int]:
        """Key and m of the sample in this pass, or in the one that a backward pass recomputes.

        Kept here, for another adapter, as DPO's reference, may have drawn since; by `note_sample` where a
        `sampling` context is open, since compiled code in a checkpoint may change nothing.
        """
        if self.state.sampling is not None:
            return self.state.posterior_sample(number, self.seed)
        if not recomputing() or self.drawn is None:
            self.drawn = self.state.posterior_sample(number, self.seed)
        return self.drawn

    def forward(self, x: Tensor, mean: Tensor, position: int) -> Tensor:
        """x (A + Σ_k z_k S_k)ᵀ, with one z per trajectory, shared by its rows and tokens.

        S is read here and nowhere else, so that FSDP and ZeRO-3 gather it.

        Args:
            x: shape (m · rows, ..., n), trajectory-major.
            mean: A, shape (r, n).
            position: of the adapter among the active ones, whose samples are independent.

        Returns:
            Shape (m · rows, ..., r).

        Raises:
            ValueError: the layer sees other tokens than its block, so that they cannot be told apart by trajectory; or
                A is offloaded.
        """
        number = self.number ^ position
        key, trajectories = self._sample(number)
        if trajectories > 1 and self.state.sampling is not None and x.shape[:-1].numel() != self.state.tokens:
            raise ValueError(
                f"trajectories={trajectories}: a variational layer of block {self.block} sees {x.shape[:-1].numel()} "
                f"tokens of {self.state.tokens}, as an expert does; leave it out of variational_blocks or "
                "target_modules, or sample one trajectory."
            )
        if mean.is_meta:
            raise ValueError(
                f"device_map: the LoRA weights of block {self.block} are offloaded and cannot be sampled; keep the "
                "adapted layers on a device, or predict by the posterior's mean."
            )
        covariance = self.weight.float() if self.weight.dtype.itemsize < 4 else self.weight
        if torch.compiler.is_compiling():
            z = compiled_coefficients(key, number, trajectories, self.rank).to(covariance)
            sample = deviation(covariance, z)
        else:
            # Without waiting for the device: copied from pageable memory, which the call leaves behind
            z = posterior_coefficients(key, number, trajectories, self.rank).to(covariance, non_blocking=True)
            sample = _Deviation.apply(covariance, z, derive_seed(key, number, trajectories) & (2**31 - 1))
        return project(x, (mean + sample).to(mean.dtype))


class VariationalLora(LoraVariant):
    """y = W0 x + (lora_alpha / r) B (A + Σ_k z_k S_k) x, z ~ N(0, I_R); without sampling, and merged, plain LoRA.

    The family is arXiv 2505.20235's; that it sits on LoRA's A, under a deterministic B, is this project's choice.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Add the posterior to a layer that holds the adapter's LoRA weights; keyword arguments as `Covariance`'s.

        PEFT calls it with arguments of its own for a layer that has the adapter's posterior, where it has made A anew
        at another rank (EVA).
        """
        if COVARIANCE not in module._modules:
            module.adapter_layer_names = (*module.adapter_layer_names, COVARIANCE)
            module.add_module(COVARIANCE, nn.ModuleDict())
        mean, earlier = module.lora_A[adapter_name].weight, covariances(module).get(adapter_name)
        leaf = Covariance(tuple(mean.shape), **kwargs) if earlier is None else earlier.resized(mean)
        leaf.train(module.get_base_layer().training)  # a LoRA layer is born in training mode, whatever it wraps
        module._modules[COVARIANCE][adapter_name] = leaf
        module.lora_variant[adapter_name] = VariationalLora()
        if leaf.scale == 0:
            make_point(module, adapter_name)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        leaf = covariances(module)[active_adapter]
        hidden = leaf(x, lora_a.weight, module.active_adapters.index(active_adapter)) if leaf.sampled else lora_a(x)
        return result + lora_b(hidden) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def covariances(module: nn.Module) -> dict[str, Covariance]:
    """The posteriors that a module holds, by adapter; empty where it is no variational LoRA layer."""
    leaves = module._modules.get(COVARIANCE)
    return cast(dict[str, Covariance], leaves._modules) if isinstance(leaves, nn.ModuleDict) else {}


def forget_posterior(module: nn.Module, adapter_name: str) -> None:
    """Drop an adapter's posterior from a layer, if it has one; the LoRA weights stay."""
    if adapter_name in covariances(module):
        layer: Any = module
        del covariances(module)[adapter_name]
        layer.lora_variant.pop(adapter_name)
        layer.frozen_peft_weight_names.pop(adapter_name, None)


def make_point(module: nn.Module, adapter_name: str) -> None:
    """Set a layer's covariance to zero for good, where it has one."""
    if adapter_name in covariances(module):
        layer: Any = module
        leaf = covariances(module)[adapter_name]
        leaf.scale = 0.0
        leaf.weight = nn.Parameter(torch.zeros_like(leaf.weight), requires_grad=False)
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: (COVARIANCE,)}


def active_covariances(layer: LoraLayer) -> list[Covariance]:
    """Those of one LoRA layer whose posterior a sampled forward pass would draw from now; zeros are among them."""
    module: Any = layer
    if not covariances(module) or module.disable_adapters or module.merged:
        return []
    return [leaf for name, leaf in covariances(module).items() if name in module.active_adapters]


def all_active_covariances(model: nn.Module) -> list[Covariance]:
    """Those of all LoRA layers of a model."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [leaf for layer in layers for leaf in active_covariances(layer)]


def note_sample(model: nn.Module, key: Tensor, trajectories: int) -> None:
    """Tell the active posteriors the sample of a `sampling` context, for a backward pass that recomputes after it.

    Nothing is to be told where no gradient is asked for, as token by token where text is generated.

    Args:
        model: with the LoRA layers.
        key: `NoiseKey.tensor()` of the posteriors.
        trajectories: m.
    """
    if torch.is_grad_enabled():
        for leaf in all_active_covariances(model):
            leaf.drawn = (key, trajectories)
