"""The recipe's arguments with the study's own baselines, and a study's fields checked against them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dip_hf.environment import resolve_device
from dip_hf.reasoning import FINETUNING
from dip_hf.recipe.arguments import AdapterArguments, DataArguments, SFTParser
from dip_hf.recipe.dry_run import adapt, build_on_meta
from studies.load import close_to
from studies.spec import Arm, Study
from studies.store import base_digest
from studies.trainers import StudyConfig, check_rdrop


_OF_DIPNET = (
    *("learn_noise", "noise_", "variational_"),
    *("num_trajectories", "variance_weight", "log_variance_weight", "stability_weight", "penalty_"),
)
"""What fields that need a DIPNet adapter start with."""
_OF_LEARNED_NOISE = ("variance_weight", "log_variance_weight", "penalty_", "noise_learning_rate")
_OF_POSTERIOR = ("variational_scale", "variational_blocks", "variational_optimizer", "variational_learning_rate")
_NOT_THE_MODELS = ("train_size", "num_train_epochs", "learning_rate")
"""Fields that make no difference to the model: runs that differ in these alone have theirs built once."""


def parse_training(config: dict[str, Any], output_dir: str) -> tuple[DataArguments, StudyConfig, AdapterArguments]:
    """Turn the fields of one training run into the recipe's three argument objects.

    Args:
        config: what `Study.training` returns.
        output_dir: where the run writes.

    Raises:
        ValueError: an unknown field (with its close matches), or a value that its field refuses.
    """
    # A parser keeps what it was given as defaults, so each run has its own
    parser = SFTParser(StudyConfig)
    parser.set_defaults_with_config(
        **config,
        output_dir=output_dir,
        save_strategy="steps",
        save_steps=0.2,  # of all: what a kill costs at most
        save_total_limit=1,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data, training, adapter = parser.parse_args_into_dataclasses(args=[])
    return data, training, adapter


def check_fields(study: Study) -> None:
    """Check all that a study names before anything of it runs, so that a mistake costs no wait.

    Raises:
        ValueError: a base that is not there or not the study's, or as `check_arms`.
    """
    check_arms(study, _check_base(study))


def _check_base(study: Study) -> PretrainedConfig:
    base = Path(study.model)
    if study.weights is not None:
        remedy = "make the base as the study's file says, or change or remove `weights` for another"
        found = base_digest(study.model)
        if not found:
            raise ValueError(f"model={study.model!r} is no folder with safetensors: {remedy}")
        if found != study.weights:
            raise ValueError(
                f"weights={study.weights!r}: those of model={study.model!r} have the SHA-256 {found!r}; {remedy}"
            )
    elif not base.is_dir() and base.parent != Path() and base.parent.is_dir():  # else it may be a name on the Hub
        raise ValueError(
            f"model={study.model!r} is no folder{close_to(base.name, [path.name for path in base.parent.iterdir()])}"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(study.model)
    except OSError as error:
        raise ValueError(f"model={study.model!r}: {str(error).splitlines()[0]}") from error
    return config


def check_arms(study: Study, base_config: PretrainedConfig) -> None:
    """Build the arguments of every arm's every trial, and its adapter on a base without weights.

    Args:
        study: whose families, device and arms are checked.
        base_config: of the base.

    Raises:
        ValueError: a file in the place of `output_dir`, a device that is not there, an unknown family, or a mistake in
            an arm's fields, among them fields without effect and trials alike; names the arm and the trial.
    """
    if Path(study.output_dir).is_file():
        raise ValueError(f"output_dir={study.output_dir!r} is a file; name a folder")
    resolve_device(study.evaluation.device)
    known = [family.name for family in FINETUNING]
    for family in study.families:
        if family not in known:
            raise ValueError(f"families: {family!r} is no fine-tuning family{close_to(str(family), known)}")
    seen: list[dict[str, Any]] = []
    for arm, size in product(study.arms, study.sizes):
        earlier: list[dict[str, Any]] = []
        for trial in range(0 if arm.untrained else len(arm.trials)):
            try:
                config = study.training(arm, size, study.seeds[0], trial)
                if config in earlier:
                    raise ValueError(f"trains as trial {earlier.index(config)} does; each must try something else")
                earlier.append(config)
                _, training, adapter = parse_training(config, study.output_dir)
                _check_effect({**arm.overrides, **arm.trials[trial]}, training, adapter)
                _check_prediction(arm, adapter)
                fields = {name: value for name, value in config.items() if name not in _NOT_THE_MODELS}
                if fields not in seen:
                    tuned, *_ = adapt(build_on_meta(base_config, adapter.dtype), training, adapter)
                    check_rdrop(tuned, training)
                    seen.append(fields)
            except (TypeError, ValueError) as error:
                raise ValueError(f"arms.{arm.name}, size {size}, trial {trial}: {error}") from error


def _check_effect(names: Collection[str], training: StudyConfig, adapter: AdapterArguments) -> None:
    """Refuse fields of an arm that its adapter, or a weight of 0, leaves without effect."""
    noisy = adapter.noise_blocks_choice not in (0, [])
    for is_off, setting, starts in (
        (adapter.adapter != "dipnet", f"adapter={adapter.adapter!r}", _OF_DIPNET),
        (adapter.adapter == "none", "adapter='none'", ("lora_", "use_rslora", "use_dora")),
        (not noisy, f"noise_blocks={adapter.noise_blocks!r}", ("noise_scale", "learn_noise", *_OF_LEARNED_NOISE)),
        (not adapter.learn_noise, "learn_noise=False", _OF_LEARNED_NOISE),
        (adapter.variational_rank == 0, "variational_rank=0", _OF_POSTERIOR),
        (training.dres_weight == 0, "dres_weight=0", ("dres_",)),
        (training.icp_weight == 0, "icp_weight=0", ("icp_",)),
    ):
        field = setting.partition("=")[0]
        for name in names if is_off else ():
            if name.startswith(starts) and name != field:
                raise ValueError(f"{name} has no effect at {setting}: remove it, or change {field}")


def _check_prediction(arm: Arm, adapter: AdapterArguments) -> None:
    """Refuse a way to predict that the trained adapter does not have, before it is trained."""
    plain_lora = adapter.adapter == "lora" and not adapter.use_dora
    if arm.dropout_at_test and not (plain_lora and adapter.lora_dropout > 0):
        raise ValueError(
            f"dropout_at_test needs LoRA (without DoRA) with dropout, got adapter={adapter.adapter!r} and "
            f"lora_dropout={adapter.lora_dropout}: set adapter to 'lora' and lora_dropout above 0"
        )
    if arm.num_samples > 0 and not arm.dropout_at_test and adapter.adapter != "dipnet":
        raise ValueError(
            f"num_samples={arm.num_samples} needs noise or a posterior: set adapter to 'dipnet', or dropout_at_test"
        )
    if arm.ensemble > 1 and not plain_lora:
        raise ValueError(
            f"ensemble={arm.ensemble} is made of LoRA adapters (without DoRA), got adapter={adapter.adapter!r}: set "
            "it to 'lora'"
        )
