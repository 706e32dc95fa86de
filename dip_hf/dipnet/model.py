"""The DIPNet tuner: LoRA with noise sites on decoder blocks, and posteriors in LoRA layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dip_hf.blocks import find_visible_blocks, input_size, select_blocks
from dip_hf.dipnet.config import DIPNetConfig
from dip_hf.dipnet.layer import SITE_NAME, NoiseSite, random_layers
from dip_hf.dipnet.placement import add_posteriors, check_targets
from dip_hf.dipnet.saving import SavedLoraModel
from dip_hf.dipnet.trajectories import check_trajectories, fold_trajectories
from dip_hf.ibvi.layer import Covariance, all_active_covariances, forget_posterior, make_point, note_sample
from dip_hf.noise import NoiseKey
from dip_hf.noise_state import NoiseState, Sampling, given_mask
from dip_hf.peft_compat import BaseTunerLayer, LoraLayer, convert_targets, include_all_linear_layers


class DIPNetModel(SavedLoraModel):
    """`LoraModel` that also puts noise sites on decoder blocks, and posteriors in LoRA layers, as its config says.

    A site is a child module of the block with a forward pre-hook; the block itself is not wrapped, so everything
    that PEFT, transformers and TRL do with blocks goes on working.

    Attributes:
        noise_state: what all sites and posteriors of the model share.
        decoder_blocks: names of the model's blocks; None where every adapter's `block_names` gave them.
    """

    decoder_blocks: list[str] | None = None
    tuner_layer_cls = (LoraLayer, NoiseSite)  # PEFT uses it in `isinstance` alone

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's, then add noise sites and posteriors. Blocks and targets are checked before anything is changed.

        Raises:
            ValueError: `noise_blocks`, `variational_blocks` or `block_names` fits no block of the model; a targeted
                module of the variational blocks cannot have a posterior.
        """
        config = self.peft_config[adapter_name]
        convert_targets(config, model)
        chosen = self._resolve_blocks(model, config)
        variational = self._resolve_posterior(model, config)
        for module in model.modules():  # of a base that was adapted before, of which PEFT makes LoRA anew alone
            forget_posterior(module, adapter_name)
            if isinstance(module, NoiseSite):
                module.forget(adapter_name)
        earlier = {name: module for name, module in model.named_modules() if isinstance(module, NoiseSite)}
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        for name, site in earlier.items():
            site.keep_outside(model.get_submodule(name.rpartition(".")[0]))
        # After PEFT's own injection, which takes a model that already holds tuner layers for a second adapter's
        self.noise_state = self._shared_state(model)
        # EVA fills LoRA's weights alone that were made without memory, and no file the log-variances
        without_memory = low_cpu_mem_usage and config.init_lora_weights != "eva"
        for layer in chosen:
            self._add_site(model, adapter_name, config, layer, without_memory)
        if variational:
            add_posteriors(model, adapter_name, config, variational, self.noise_state, low_cpu_mem_usage)

    def _resolve_posterior(self, model: nn.Module, config: DIPNetConfig) -> list[int]:
        if config.variational_rank == 0:
            return []
        assert config.all_block_names is not None  # resolved before
        chosen = select_blocks(config.all_block_names, config.variational_blocks, "variational_blocks")
        named = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))  # PEFT's targets
        named = include_all_linear_layers(named, model)
        check_targets(model, config, chosen, lambda name: bool(self._check_target_module_exists(named, name)))
        return chosen

    def _resolve_blocks(self, model: nn.Module, config: DIPNetConfig) -> list[int]:
        modules = dict(model.named_modules())
        if config.block_names is None:
            self.decoder_blocks = find_visible_blocks(model, [self.decoder_blocks, config.found_block_names])
        config.found_block_names = self.decoder_blocks if config.block_names is None else None
        names = config.all_block_names or []
        if missing := [name for name in names if name not in modules]:
            raise ValueError(f"block_names: {missing} are no modules of {type(model).__name__}; correct the names.")
        chosen = select_blocks(names, config.noise_blocks, "noise_blocks") if config.projected else []
        for layer in chosen:
            input_size(model, modules[names[layer]], names[layer])
        noised = {names[layer] for layer in chosen}
        noised |= {name.rpartition(".")[0] for name, module in modules.items() if isinstance(module, NoiseSite)}
        saved = {name for other in self.peft_config.values() for name in other.modules_to_save or ()}
        copied = sorted(block for block in noised if any(f".{name}." in f".{block}." for name in saved))
        if copied:
            raise ValueError(
                f"modules_to_save={sorted(saved)}: PEFT would copy the noised blocks {copied}, noise and all; leave "
                "them out of `noise_blocks`, or adapt them with LoRA instead."
            )
        return chosen

    def _add_site(
        self, model: nn.Module, adapter_name: str, config: DIPNetConfig, layer: int, without_memory: bool
    ) -> None:
        assert config.all_block_names is not None  # resolved above
        name = config.all_block_names[layer]
        block = model.get_submodule(name)
        site = getattr(block, SITE_NAME, None)  # not from _modules: a compiled block passes the question on
        if not isinstance(site, NoiseSite):
            site = NoiseSite(layer, input_size(model, block, name), self.noise_state)
            site.attach(block)
            # A LoRA layer is born in training mode, whatever the mode of what it wraps.
            site.train((block.get_base_layer() if isinstance(block, BaseTunerLayer) else block).training)
        site.update_layer(
            adapter_name, config.noise_scale, config.learn_noise, config.noise_in_eval, config.noise_seed
        )
        leaf = site.leaf(adapter_name)
        if without_memory:
            leaf.weight = nn.Parameter(leaf.weight.to("meta"))  # assigned on loading, like LoRA's
        if (parameter := next(block.parameters(), None)) is not None and not parameter.is_meta:
            leaf.rms = leaf.rms.to(parameter.device)
            if not without_memory:
                # Past `register_parameter`, by which PEFT puts new ones on the meta device where memory is saved
                leaf._parameters["weight"] = nn.Parameter(leaf.initial().to(parameter.device))
        site._active_adapter = self.active_adapters
        trainable = adapter_name in self.active_adapters and config.learn_noise and not config.inference_mode
        leaf.weight.requires_grad_(trainable)

    @staticmethod
    def _shared_state(model: nn.Module) -> NoiseState:
        """What the model's sites and posteriors share; a new one where there are none yet."""
        kinds = (NoiseSite, Covariance)
        return next((module.state for module in model.modules() if isinstance(module, kinds)), NoiseState())

    def _sites(self) -> list[NoiseSite]:
        return [module for module in self.model.modules() if isinstance(module, NoiseSite)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; the sites learn which tokens are padding, which must not count in the noise's scale."""
        with self.noise_state.masked(given_mask(self.model, args, kwargs)):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, in training mode too without noise, which is on inside `sampling` and with `noise_in_eval`.

        PEFT calls it for an adapter with a `task_type`, and otherwise the model's own.

        Raises:
            ValueError: inside `sampling` with several trajectories, whose next tokens would be m for every row.
        """
        sampling, m = self.noise_state.sampling, self.noise_state.trajectories
        if m > 1 and not (sampling and sampling.averaged):
            raise ValueError(
                f"generate inside sampling(trajectories={m}): a row would get {m} next tokens; generate with "
                f"trajectories=1, or by the average of {m} with lm-eval's model hf-dip (num_samples={m})."
            )
        with self.noise_state.generation():
            return self.model.generate(*args, **kwargs)

    def block_names(self) -> list[str]:
        """Module names of all decoder blocks, in order of depth."""
        # Not the config's `all_block_names`: the same config may since have been injected into another model
        names = self.peft_config[self.active_adapters[0]].block_names or self.decoder_blocks
        assert names is not None  # resolved on injection
        return names

    def noised_layers(self) -> list[int]:
        """Indices of the blocks that would add noise in a forward pass now, ascending."""
        return sorted(site.layer for site in self._sites() if site.drawn_adapter() is not None)

    def variational_layers(self) -> list[int]:
        """Indices of the blocks in which an active adapter has a posterior, ascending."""
        return sorted({leaf.block for leaf in all_active_covariances(self.model)})

    @contextmanager
    def sampling(
        self,
        key: NoiseKey,
        trajectories: int = 1,
        posterior_key: NoiseKey | None = None,
        averaged: bool = False,
        everywhere: bool = True,
    ) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Forward passes inside draw noise, and weights from the posterior, under `key`, in evaluation mode too.

        With m = `trajectories` > 1 the batch is repeated m times from the first noised or variational block on, so
        that the output has m · batch rows, trajectory-major (row j · batch + b is trajectory j of row b).

        Args:
            key: the noise's key; passes under one key see the same noise.
            trajectories: m ≥ 1; each has a noise and a z of its own.
            posterior_key: the key of z, where it shall stay while the noise changes, as in a generation token by
                token; None for `key`.
            averaged: the caller makes one output of every row's m, by a hook on the model, which `generate` needs.
            everywhere: False in evaluation for the noise of adapters with `noise_in_eval` alone, under this key.

        Yields:
            A dictionary that a forward pass fills: block index to (log-variance relative to the squared RMS, shape
            (d,), with its gradient; that RMS, shape (1,)). It stays empty without noise.

        Raises:
            ValueError: `trajectories` is no whole number from 1 on, or more than 1 in a model that counts its rows
                before the blocks or with aLoRA; or the active adapter has neither noise nor a posterior.
            TypeError: a key is no `NoiseKey`.
        """
        for given in (key, posterior_key or key):
            if not isinstance(given, NoiseKey):
                raise TypeError(f"key={given!r} must be a NoiseKey, such as NoiseKey(0).")
        if isinstance(trajectories, bool) or not isinstance(trajectories, int) or trajectories < 1:
            raise ValueError(f"trajectories={trajectories!r} must be a whole number, at least 1.")
        if trajectories > 1:
            check_trajectories(self.model, [self.peft_config[name] for name in self.active_adapters], trajectories)
        sampling = Sampling(key.tensor(), (posterior_key or key).tensor(), trajectories, averaged, everywhere)
        if any(self.peft_config[name].variational_rank for name in self.active_adapters):
            note_sample(self.model, sampling.posterior_key, trajectories)
        with self.noise_state.passes_under(sampling):
            layers = random_layers(self.model)
            first = next(layers, None)
            if first is None:
                raise ValueError(
                    "sampling: the active adapter adds no noise and has no posterior; activate an unmerged DIPNet one."
                )
            blocks = []
            if trajectories > 1:
                names = self.block_names()[min([first, *layers]) :]
                blocks = [self.model.get_submodule(name) for name in names]
            with fold_trajectories(blocks, trajectories, self.noise_state):
                yield sampling.log_variances

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, after which every layer has the same active adapters, and one at least where one is left."""
        # PEFT lets each layer choose its next one among those it holds, and adapters need not noise the same blocks
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            self.set_adapter(self.active_adapters or next(iter(self.peft_config)))

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's for the LoRA weights; the noise is the first adapter's, like the rest of the configuration.

        Posteriors are not combined, but their means: the new one is a point.

        Raises:
            ValueError: as PEFT, or none of the adapters has LoRA weights.
        """
        known = [self.peft_config[name] for name in adapters if name in self.peft_config]
        if known and all(config.noise_only for config in known):
            raise ValueError(
                f"adapters={adapters} have noise and no LoRA weights to add up; activate one of them instead."
            )
        is_new = adapter_name not in self.peft_config
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for site in self._sites():
            if is_new and adapter_name in site.lora_dip_log_variance:
                site.leaf(adapter_name).load_state_dict(site.leaf(adapters[0]).state_dict())
        if is_new and self.peft_config[adapter_name].variational_rank > 0:
            self.peft_config[adapter_name].variational_scale = 0.0
            for module in self.model.modules():
                make_point(module, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None and not self.training:
            sampled = any(leaf.sampled for leaf in all_active_covariances(self.model))
            named = {name for name in kwargs["adapter_names"] if name in self.peft_config}
            if sampled or self.noised_layers() or any(self.peft_config[name].noise_in_eval for name in named):
                raise ValueError(
                    f"adapter_names={kwargs['adapter_names']}: the rows of one batch cannot have different noise; run "
                    "adapters with noise_in_eval=True, or inside `sampling`, one at a time."
                )
        # A PeftModel without a task type calls the model inside of this, and never the tuner
        mask = self.noise_state.masked(given_mask(self.model, args, kwargs))
        with mask, super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for block in list(model.modules()):
            site = block._modules.get(SITE_NAME)
            if isinstance(site, NoiseSite):
                site.detach(block)
        return model
