"""The noise at one decoder block's input, in PEFT's form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dip_hf.block_call import BlockCall
from dip_hf.dipnet.functional import token_rms
from dip_hf.dipnet.trajectories import repeat_rows
from dip_hf.ibvi.layer import active_covariances
from dip_hf.noise import add_noise
from dip_hf.noise_state import NoiseState
from dip_hf.peft_compat import PARAMETER_PREFIX, BaseTunerLayer, LoraLayer, check_adapters_to_merge, is_own


LOG_VARIANCE = f"{PARAMETER_PREFIX}log_variance"
"""Name of the ModuleDict of a noise site."""
SITE_NAME = "dip_noise"
"""Name of the child module that a noised block gets."""


class LogVariance(nn.Module):
    """Learnable log-variance of one adapter at one block, relative to the RMS of the block's input.

    λ = rms² · exp(weight), so `weight` is the paper's ρ = ln λ up to a constant, has the same gradient, and can be
    created (and sharded) before the RMS is known.

    Args:
        size: d, the hidden size.
        scale: initial standard deviation relative to the RMS.
    """

    weight: nn.Parameter
    rms: Tensor

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.size, self.scale = size, scale
        self.weight = nn.Parameter(self.initial())
        self.register_buffer("rms", torch.zeros(1))
        # Not read off `rms`, for which a pass on a GPU would have to wait
        self.is_measured = False
        self.register_load_state_dict_post_hook(_look_again)

    def initial(self) -> Tensor:
        """The initial weight, shape (d,), fp32."""
        return torch.full((self.size,), 2 * math.log(self.scale), dtype=torch.float32)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The relative log-variance, shape (d,), fp32, and the standard deviation rms · exp(weight / 2)."""
        weight = self.weight.float().clone()  # outlives the pass, where FSDP frees the gathered parameter
        return weight, self.rms.float() * (weight / 2).exp()


def _look_again(leaf: LogVariance, incompatible_keys: Any) -> None:
    """Loaded weights may be those from before the first batch, with an RMS of 0."""
    leaf.is_measured = False


class NoiseSite(nn.Module, BaseTunerLayer):
    """Child of a decoder block, whose forward pre-hook replaces the block's input v by a sample of N(v, diag λ).

    Args:
        layer: the block's index.
        size: d, the hidden size.
        state: shared by all sites of the model.
    """

    adapter_layer_names = (LOG_VARIANCE,)
    other_param_names = ()
    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it; noise is added in fp32 either way
    frozen_peft_weight_names: dict[str, tuple[str, ...]]
    merged_adapters: list[str]
    hook: RemovableHandle

    def __init__(self, layer: int, size: int, state: NoiseState) -> None:
        super().__init__()
        self.layer = layer
        self.in_features = self.out_features = size
        self.state = state
        self.lora_dip_log_variance = nn.ModuleDict()
        self.noise_in_eval: dict[str, bool] = {}
        self.seeds: dict[str, int] = {}
        self.merged_adapters: list[str] = []

    @property
    def weight(self) -> Tensor:  # BaseTunerLayer's would look for a base layer and find this module, for ever
        raise AttributeError("a noise site wraps no layer, so it has no weight")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("a noise site wraps no layer, so it has no bias")

    def attach(self, block: nn.Module) -> None:
        """Become a child of `block`, and act on its input from now on."""
        block.add_module(SITE_NAME, self)
        self.hook = block.register_forward_pre_hook(self.pre_hook, with_kwargs=True)

    def detach(self, block: nn.Module) -> None:
        """Undo `attach`."""
        self.hook.remove()
        delattr(block, SITE_NAME)

    def keep_outside(self, block: nn.Module) -> None:
        """Move from a block that a later adapter's LoRA has wrapped to `block`, its wrapper: LoRA sees the noise."""
        if SITE_NAME not in block._modules:
            self.detach(next(module for module in block.modules() if module._modules.get(SITE_NAME) is self))
            self.attach(block)

    def update_layer(self, adapter_name: str, scale: float, learn: bool, noise_in_eval: bool, seed: int) -> None:
        """Add an adapter's noise; arguments as in `DIPNetConfig`."""
        self.lora_dip_log_variance[adapter_name] = LogVariance(self.in_features, scale)
        self.noise_in_eval[adapter_name] = noise_in_eval
        self.seeds[adapter_name] = seed
        if not learn:
            self.frozen_peft_weight_names = {
                **self.frozen_peft_weight_names,
                adapter_name: self.adapter_layer_names,
            }

    def _active_names(self) -> list[str]:
        return cast(list[str], self.active_adapters)

    def leaf(self, adapter_name: str) -> LogVariance:
        """An adapter's log-variance at this block."""
        return cast(LogVariance, self.lora_dip_log_variance[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merging keeps the mean of the projection, which is the identity: there is nothing to add to a weight."""
        names = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters += [name for name in names if name in self.lora_dip_log_variance]

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Drop what the site holds of an adapter, if anything; which adapters are active stays."""
        if adapter_name in self.lora_dip_log_variance:
            del self.lora_dip_log_variance[adapter_name]
        for values in (self.noise_in_eval, self.seeds, self.frozen_peft_weight_names):
            values.pop(adapter_name, None)

    def drawn_adapter(self) -> str | None:
        """The adapter whose noise this pass adds: the first active one, or None where noise is off."""
        names = self.adapters_with_noise()
        if not names or self.disable_adapters or self.merged:
            return None
        return names[0] if self.state.draws(self.training, self.noise_in_eval[names[0]]) else None

    def adapters_with_noise(self) -> list[str]:
        """The active adapters that have noise here; that of the first is drawn."""
        return [name for name in self._active_names() if name in self.lora_dip_log_variance]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """u ~ N(v, diag λ) while noise is on, v itself otherwise.

        Args:
            hidden_states: v, shape (m · batch, length, d) or (tokens, d).

        Raises:
            ValueError: the batch is not folded here, so that trajectories cannot be told apart.
        """
        name = self.drawn_adapter()
        if name is None:
            return hidden_states
        sampling = self.state.sampling
        if sampling is None:
            self.state.enter_layer(self.layer, self.seeds[name])
        elif sampling.trajectories > 1 and hidden_states.shape[:-1].numel() != self.state.tokens:
            raise ValueError(
                f"trajectories={sampling.trajectories}: noise of {name!r} sees {hidden_states.shape[:-1].numel()} "
                f"tokens of {self.state.tokens}; open `sampling` after activating an adapter, and give adapters of "
                "one model the same block_names."
            )
        leaf = self.leaf(name)
        if not leaf.is_measured:
            self._calibrate(leaf, hidden_states)
        log_variance, std = leaf()
        if sampling is not None:
            sampling.log_variances[self.layer] = (log_variance, leaf.rms)
        # Of a model that is split over devices, the block's input may still lie on the device of the block before it
        std = std.to(hidden_states.device)
        return add_noise(hidden_states, std, self.state.key, self.layer, self.state.trajectories)

    @torch.compiler.disable
    def _calibrate(self, leaf: LogVariance, hidden_states: Tensor) -> None:
        """Measure the RMS of the block's input, once; a loaded adapter brings its own. Averaged over ranks."""
        if not leaf.rms.item() > 0:
            mask = self.state.attention_mask
            if mask is not None:
                mask = repeat_rows(mask.bool(), self.state.trajectories).to(hidden_states.device)
                hidden_states = hidden_states[mask] if mask.shape == hidden_states.shape[:2] else hidden_states
            mean_square = token_rms(hidden_states).square().reshape(1).to(leaf.rms.device)
            if dist.is_initialized():
                dist.all_reduce(mean_square)
                mean_square /= dist.get_world_size()
            if not mean_square.item() > 0:
                raise ValueError(
                    f"noise_scale: the input of block {self.layer} has RMS {mean_square.sqrt().item()} on the first "
                    "batch, which is no scale for noise; leave this block out of noise_blocks."
                )
            leaf.rms.copy_(mean_square.sqrt())
        leaf.is_measured = True

    def pre_hook(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the block."""
        call = BlockCall(args, kwargs)
        return call.with_hidden_states(self(call.hidden_states))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What DIPNet and IBVI add to LoRA, by parameter name: log-variances and posterior covariances."""
    return {name: parameter for name, parameter in model.named_parameters() if is_own(name)}


def random_layers(model: nn.Module) -> Iterator[int]:
    """Indices of blocks that would add noise, or sample weights, in a forward pass now; lazily, in no order."""
    for module in model.modules():
        if isinstance(module, NoiseSite):
            if module.drawn_adapter() is not None:
                yield module.layer
        elif isinstance(module, LoraLayer):
            yield from (leaf.block for leaf in active_covariances(module))
