"""What a run of recipes/sft.py would do, worked out without weights, downloads or written files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, SchedulerType
from transformers.training_args import OptimizerNames

from dip_hf.blocks import select_blocks
from dip_hf.dipnet import DIPNetConfig
from dip_hf.dres import DReSBranch
from dip_hf.icp import ICPBranch
from dip_hf.model_files import check_base, model_weights
from dip_hf.peft_compat import BaseTunerLayer, is_own
from dip_hf.recipe.arguments import AdapterArguments, DataArguments, model_options
from dip_hf.recipe.data import check_run, is_local, load_datasets
from dip_hf.recipe.gsm8k import TRAIN_ROWS as GSM8K_TRAIN_ROWS
from dip_hf.trainer import DIPSFTConfig, optimizer_groups
from dip_hf.trainer.checks.optimizer import check_posterior
from dip_hf.trainer.checks.second_pass import check_one_loss_pass
from dip_hf.trainer.publishing import check_public_base


_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def describe_run(
    data: DataArguments, training: DIPSFTConfig, adapter: AdapterArguments, architectures: Path
) -> Iterator[str]:
    """Yield the lines that say what would run.

    The model is built on the meta device, from its own config where that is on this machine and from a bundled shape
    otherwise; the adapter is put on it and the optimiser's groups are made of it as in training.

    Args:
        data: where the examples come from.
        training: the trainer's config.
        adapter: the model and its adapter.
        architectures: folder of `NAME.json`, the shapes of models whose config may not be at hand.

    Raises:
        ValueError: the same mistakes that stop a real run before its weights load, those in a dataset of the Hub
            and weights that are missing from a model's folder excepted; or a model of unknown shape.
    """
    base = str(adapter.model_name_or_path)
    if not Path(base, "config.json").is_file() or any(path.is_file() for path in model_weights(base)):
        check_base("model_name_or_path", base)
    check_run(data, training, adapter)
    if training.push_to_hub:
        peft_config = adapter.peft_config(training.seed)
        check_public_base(adapter.model_name_or_path, peft_config, Path(training.output_dir))
    config, source = _model_config(adapter, architectures)
    dtype = model_options(training, adapter)["dtype"]
    model = build_on_meta(config, dtype)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    yield "Dry run: nothing is downloaded, written or trained."
    yield f"model       {adapter.model_name_or_path}: {type(model).__name__}, {base_parameters:,} parameters"
    yield f"            shape from {source}; weights {_weights_at_hand(adapter)}"
    yield f"            {_weight_memory(model, adapter, dtype)}"

    tuned, dres, icp = adapt(model, training, adapter)
    yield from _describe_adapter(tuned, training, adapter)
    yield from _describe_second_passes(dres, icp, training)

    rows, lines = _describe_data(data, training)
    yield from lines
    yield from _describe_steps(rows, training)
    yield from _describe_optimizer(tuned, training)
    yield f"output      {training.output_dir} (not made in a dry run)"


def adapt(
    model: PreTrainedModel, training: DIPSFTConfig, adapter: AdapterArguments
) -> tuple[nn.Module, DReSBranch | None, ICPBranch | None]:
    """Put the adapter on a model and DReS and ICP around it, as the trainer would.

    Args:
        model: on any device, meta included; it is changed in place.
        training: the trainer's config.
        adapter: the adapter.

    Returns:
        The model with its adapter, DReS and ICP; None for what is off.

    Raises:
        ValueError: the mistakes that only a model shows, such as a block that it has not.
    """
    peft_config = adapter.peft_config(training.seed)
    tuned: nn.Module = model if peft_config is None else get_peft_model(model, peft_config)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"lora_target_modules={adapter.lora_target_modules} has the LM head, which TRL's trainer computes with "
            "the base's weight alone: take it out"
        )
    check_posterior(tuned, training)
    if isinstance(peft_config, DIPNetConfig) or training.dres_weight > 0 or training.icp_weight > 0:
        check_one_loss_pass(training, has_loss_function=False)
    dres = None
    if training.dres_weight > 0:
        dres = DReSBranch(model, training.dres_options())
        padding_free = training.padding_free or (training.packing and training.packing_strategy != "wrapped")
        dres.check(training.per_device_train_batch_size, padding_free)
    icp = ICPBranch(model, training.icp_options()) if training.icp_weight > 0 else None
    return tuned, dres, icp


def _describe_second_passes(dres: DReSBranch | None, icp: ICPBranch | None, training: DIPSFTConfig) -> Iterator[str]:
    """DReS's and ICP's part of the run."""
    if dres is not None:
        yield (
            f"DReS        weight {training.dres_weight}, {training.dres_placement} placement through "
            f"{', '.join(dres.modules)}, K = {training.dres_group_size}, N = {dres.options.coded_size}, "
            f"{training.dres_share:g} of the groups"
        )
    if icp is not None:
        yield (
            f"ICP         weight {training.icp_weight}, {training.icp_steps} step(s) of {training.icp_epsilon} from "
            f"block {training.icp_start_block}, every {training.icp_interval} step(s), comparing blocks {icp.layers}"
        )


def build_on_meta(config: PretrainedConfig, dtype: str | None) -> PreTrainedModel:
    """Build the model that `config` describes on the meta device: shapes and names, no memory.

    Args:
        config: a model's config, whose `architectures` names its class.
        dtype: "float32", "bfloat16", "float16", or "auto" (the config's own).
    """
    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise ValueError(f"the model's config names the architectures {names}, none of which transformers has")
    with torch.device("meta"):
        model = architecture(config)
    wanted = (config.dtype or torch.float32) if dtype in (None, "auto") else getattr(torch, str(dtype))
    return model.to(wanted)


def _model_config(adapter: AdapterArguments, architectures: Path) -> tuple[PretrainedConfig, str]:
    name = str(adapter.model_name_or_path)
    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name, trust_remote_code=False), f"{name}/config.json"
    try:
        config = AutoConfig.from_pretrained(
            name, revision=adapter.model_revision, local_files_only=True, trust_remote_code=False
        )
        return config, "the local Hub cache"
    except OSError:
        bundled = architectures / f"{name.split('/')[-1]}.json"
    if not bundled.exists():
        known = ", ".join(sorted(path.stem for path in architectures.glob("*.json")))
        raise ValueError(
            f"model_name_or_path={name!r} is neither a folder nor in the local cache, and its shape is not among the "
            f"bundled ones ({known}): a dry run downloads nothing, so give a folder that holds its config.json"
        )
    return AutoConfig.from_pretrained(str(bundled)), f"{bundled.parent.name}/{bundled.name}"


def _weights_at_hand(adapter: AdapterArguments) -> str:
    name = str(adapter.model_name_or_path)
    if Path(name).is_dir():
        return "in that folder" if any(Path(name).glob("*.safetensors")) else "missing: no *.safetensors there"
    cached = [try_to_load_from_cache(name, file, revision=adapter.model_revision) for file in _WEIGHT_FILES]
    return "in the local cache" if any(isinstance(path, str) for path in cached) else "would be downloaded"


def _weight_memory(model: PreTrainedModel, adapter: AdapterArguments, dtype: str | None) -> str:
    sizes: dict[Any, int] = {
        parameter: parameter.numel() * parameter.element_size() for parameter in model.parameters()
    }
    bits = 4 if adapter.load_in_4bit else 8 if adapter.load_in_8bit else None
    if bits is None:
        return f"weights {_size(sum(sizes.values()))} in {dtype}"
    head = model.get_output_embeddings()
    for module in model.modules():
        # bitsandbytes leaves the head and whatever is no linear layer as it is
        if isinstance(module, nn.Linear) and module is not head:
            sizes[module.weight] = module.weight.numel() * bits // 8
    kind = adapter.bnb_4bit_quant_type if bits == 4 else "int8"
    size = _size(sum(sizes.values()))
    return f"weights about {size}: linear layers in {bits} bits ({kind}), the rest in {dtype}"


def _describe_adapter(model: nn.Module, training: DIPSFTConfig, adapter: AdapterArguments) -> Iterator[str]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trainable.values())
    # Over a quantised base TRL trains LoRA in bf16; `DIPNetObjective.restore_precision` leaves out what is DIPNet's
    quantised = adapter.load_in_4bit or adapter.load_in_8bit
    in_bf16 = {n for n in trainable if quantised and not is_own(n) and "magnitude_vector" not in n}
    # A parameter, its gradient and Adam's two moments
    memory = sum(4 * p.numel() * (2 if n in in_bf16 else p.element_size()) for n, p in trainable.items())
    yield f"adapter     {adapter.adapter}: {count:,} trainable parameters, {_size(memory)} with gradients and moments"
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, DIPNetConfig) or config.all_block_names is None:
        return
    depth, m, starts = len(config.all_block_names), training.num_trajectories, []
    if config.projected:
        layers = select_blocks(config.all_block_names, config.noise_blocks, "noise_blocks")
        learning = "learned" if config.learn_noise else "fixed"
        starts.append(layers[0])
        yield (
            f"noise       at the input of {len(layers)} of {depth} blocks, {config.all_block_names[layers[0]]} to "
            f"{config.all_block_names[layers[-1]]}; {learning}, initially {config.noise_scale:g} x RMS"
        )
    if config.variational_rank > 0:
        tuner: Any = model.base_model
        layers = tuner.variational_layers()
        starts.append(layers[0])
        yield (
            f"posterior   of rank {config.variational_rank} in {len(layers)} of {depth} blocks, "
            f"{config.all_block_names[layers[0]]} to {config.all_block_names[layers[-1]]}; initially "
            f"{config.variational_scale:g} x 1/sqrt(inputs), {training.variational_optimizer} optimiser"
        )
    first = min(starts)
    yield (
        f"            {m} trajectories, sharing the {first} blocks below: "
        f"{(first + m * (depth - first)) / depth:.2f} x one pass through the blocks"
    )


def _describe_data(data: DataArguments, training: DIPSFTConfig) -> tuple[int | None, list[str]]:
    if data.families is None and not is_local(str(data.dataset_name)):
        known_size = (data.dataset_name, data.dataset_train_split) == ("openai/gsm8k", "train")
        rows = GSM8K_TRAIN_ROWS if known_size else None
        where = " ".join(filter(None, (data.dataset_name, data.dataset_config)))
        known = f", {rows:,} rows as published" if rows else ""
        return rows, [
            f"data        would load {where}, split {data.dataset_train_split!r}, format {data.dataset_format}{known}"
        ]
    # Streamed, a local file is read in place rather than copied into the datasets cache
    dataset, held_out = load_datasets(dataclasses.replace(data, dataset_streaming=True), training)
    first = next(iter(dataset))
    rows = sum(1 for _ in dataset)
    source = f"families {', '.join(data.families)}" if data.families else str(data.dataset_name)
    lines = [f"data        {rows:,} rows from {source}; the first:"]
    lines += [f"            {key}: {_shorten(value)}" for key, value in first.items()]
    if held_out is not None:
        lines.append(f"            and {sum(1 for _ in held_out):,} rows to evaluate on")
    return rows, lines


def _describe_steps(rows: int | None, training: DIPSFTConfig) -> Iterator[str]:
    per_device, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    batch, epochs = per_device * accumulated * training.world_size, training.num_train_epochs
    yield f"batch       {batch} rows: {per_device} x {accumulated} accumulated x {training.world_size} processes"
    if training.max_steps > 0:
        yield f"steps       {training.max_steps} (max_steps)"
    elif rows is None:
        yield f"steps       {epochs:g} epochs; the number of steps is known once the data is loaded"
    else:
        before_packing = " at most, before packing" if training.packing else ""
        batches = rows / (per_device * training.world_size)
        whole = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
        steps = math.ceil(math.ceil(whole / accumulated) * epochs)
        yield f"steps       {steps}{before_packing} ({epochs:g} epochs)"


def _describe_optimizer(model: nn.Module, training: DIPSFTConfig) -> Iterator[str]:
    name, schedule = OptimizerNames(training.optim).value, SchedulerType(training.lr_scheduler_type).value
    yield f"optimiser   {schedule} schedule; groups:"
    for group in optimizer_groups(model, training):
        size = sum(parameter.numel() for parameter in group["params"])
        own = f"SGD with momentum {group['momentum']:g}" if "momentum" in group else name
        yield (
            f"            {own}: {size:,} parameters in {len(group['params'])} tensors, "
            f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _shorten(value: Any, width: int = 160) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
