"""Arguments of recipes/sft.py: TRL's dataclasses, a few fields of this project, and a parser that knows a typo."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, MontecloraConfig
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, ScriptArguments

from dip_hf.blocks import parse_blocks
from dip_hf.dipnet import DIPNetConfig
from dip_hf.recipe.parser import RecipeParser
from dip_hf.trainer import DIPSFTConfig


@dataclass
class DataArguments(ScriptArguments):
    """Where the examples come from: reasoning families, or any dataset that `datasets.load_dataset` opens.

    Fields beside those of [`~trl.ScriptArguments`], which stand for a dataset by name or path, are described in their
    own help texts: `python recipes/sft.py --help`.
    """

    families: list[str] | None = field(
        default=None,
        metadata={"help": "Procedural reasoning families to train on (dip_hf.reasoning), in place of `dataset_name`."},
    )
    train_size: int = field(default=1000, metadata={"help": "Training examples per reasoning family."})
    eval_size: int = field(
        default=100, metadata={"help": "Validation examples per reasoning family, where `eval_strategy` is not `no`."}
    )
    families_seed: int = field(
        default=0, metadata={"help": "Draws other examples of the same splits. Not the training seed: see `seed`."}
    )
    dataset_format: str = field(
        default="auto",
        metadata={
            "help": "`auto`: prompt/completion, messages or text columns, as TRL reads them. `gsm8k`: question/answer "
            "columns, with '#### x' rewritten as 'The answer is x' behind a zero-shot chain-of-thought prompt.",
            "choices": ["auto", "gsm8k"],
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print what would run (model, data, optimiser groups), load no weights, download nothing."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.families, str):
            self.families = [self.families]
        self.families = self.families or None  # `--families` without a value stands for none
        if self.families is not None and self.dataset_name is not None:
            raise ValueError(
                f"families={self.families} and dataset_name={self.dataset_name!r} are both given: remove one of them"
            )
        if self.families is None and self.dataset_name is None:
            raise ValueError("families and dataset_name are both missing: give one of them to say what to train on")
        if self.ignore_bias_buffers:
            raise ValueError(
                "ignore_bias_buffers=True is not supported: it works around boolean buffers that the models of today "
                "no longer have; remove it"
            )
        for name in ("train_size", "eval_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass
class AdapterArguments(ModelConfig):
    """The model and its adapter: [`~trl.ModelConfig`]'s LoRA and quantisation fields, and DIPNet's.

    `use_peft` follows from `adapter` and need not be given. `lora_target_modules: []` in a file, or
    `--lora_target_modules` without a value, makes a DIPNet adapter of noise alone.
    """

    adapter: str = field(
        default="dipnet",
        metadata={
            "help": "`dipnet`: LoRA with learnable input noise per decoder block. `lora`: plain LoRA, the baseline. "
            "`monteclora`: PEFT's MonteCLoRA at its defaults, a peer of the posterior. `none`: every weight of the "
            "model is trained.",
            "choices": ["dipnet", "lora", "monteclora", "none"],
        },
    )
    noise_scale: float = field(
        default=0.1,
        metadata={"help": "DIPNet: initial standard deviation of the noise, relative to the RMS of a block's input."},
    )
    noise_blocks: str = field(
        default="all",
        metadata={
            "help": "DIPNet: decoder blocks to put noise before. `all`, a number n for the last n, a percentage for "
            "the last so many, indices such as `0,5,9`, or a regular expression that matches whole block names; `0` "
            "for none, with a posterior only."
        },
    )
    learn_noise: bool = field(
        default=True, metadata={"help": "DIPNet: learn the log-variances; if false they stay as calibrated."}
    )
    variational_rank: int = field(
        default=0, metadata={"help": "IBVI: rank R of the posterior of LoRA's A; 0 is off. For adapter `dipnet`."}
    )
    variational_scale: float = field(
        default=2.0, metadata={"help": "IBVI: c, initial standard deviation of a weight relative to 1/sqrt(inputs)."}
    )
    variational_blocks: str = field(
        default="25%", metadata={"help": "IBVI: decoder blocks with a posterior; as for `noise_blocks`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # TRL makes a text of a list of one, which PEFT takes for a pattern of whole names, as `all-linear` is to be
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules.isidentifier():
            self.lora_target_modules = [self.lora_target_modules]
        if self.use_peft and self.adapter == "none":
            raise ValueError("use_peft=True contradicts adapter='none': remove use_peft, or choose adapter 'lora'")
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing: give a model's folder or its name on the Hub")
        if (
            self.adapter in ("lora", "monteclora")
            and self.lora_target_modules == []
            and not self.lora_target_parameters
        ):
            raise ValueError(
                f"lora_target_modules=[] leaves adapter={self.adapter!r} nothing to train: name modules, or choose "
                "adapter 'dipnet' for noise alone"
            )
        self.use_peft = self.adapter != "none"
        self.noise_blocks_choice = parse_blocks(self.noise_blocks)
        if self.variational_rank != 0 and self.adapter != "dipnet":
            raise ValueError(
                f"variational_rank={self.variational_rank} contradicts adapter={self.adapter!r}: set it to 0, or "
                "choose adapter 'dipnet' (with noise_blocks '0' for the posterior alone)"
            )
        self.peft_config()  # refuses what it would refuse once data and weights are loaded

    def peft_config(self, seed: int = 0) -> LoraConfig | None:
        """The adapter's config for the trainer, or None where every weight is trained.

        Args:
            seed: the training run's, of which a posterior's initial covariance is drawn.
        """
        if self.adapter == "none":
            return None
        is_default = self.model_revision == "main" or Path(str(self.model_name_or_path)).is_dir()  # which has none
        lora: dict[str, Any] = {
            "task_type": self.lora_task_type,
            "revision": None if is_default else self.model_revision,  # of the base, by which AutoPeft loads it
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
            "target_parameters": self.lora_target_parameters,
            "modules_to_save": self.lora_modules_to_save,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        if self.adapter == "lora":
            return LoraConfig(**lora)
        if self.adapter == "monteclora":
            # Samples are drawn in stocks of this size: another changes memory alone, and PEFT's 150 takes much
            return LoraConfig(**lora, monteclora_config=MontecloraConfig(buffer_size=4))
        return DIPNetConfig(
            **lora,
            noise_scale=self.noise_scale,
            noise_blocks=self.noise_blocks_choice,
            learn_noise=self.learn_noise,
            variational_rank=self.variational_rank,
            variational_scale=self.variational_scale,
            variational_blocks=parse_blocks(self.variational_blocks),
            noise_seed=seed,
        )


class SFTParser(RecipeParser):
    """The parser of recipes/sft.py, which yields (DataArguments, `training`, AdapterArguments).

    Args:
        training: the trainer's config.
    """

    def __init__(self, training: type[DIPSFTConfig] = DIPSFTConfig) -> None:
        super().__init__((DataArguments, training, AdapterArguments))

    def parse_args_into_dataclasses(self, args: Any = None, *others: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As the parent's, but `families` and `dataset_name` stand in each other's place: one of them among `args`
        undoes the other in the file. And a dry run may ask for bfloat16 on a machine that could not train in it."""
        args = sys.argv[1:] if args is None else list(args)
        namespace, _ = self.parse_known_args(args)
        options = {word.partition("=")[0][2:].replace("-", "_") for word in args if word.startswith("--")}
        sources = {"families", "dataset_name"}
        given = {name for name in sources & options if vars(namespace)[name]}
        if len(given) == 1:
            self.set_defaults(**dict.fromkeys(sources - given))
        if namespace.dry_run and not is_torch_bf16_gpu_available():
            self.set_defaults(use_cpu=True)
        return super().parse_args_into_dataclasses(args, *others, **kwargs)


def model_options(training: DIPSFTConfig, adapter: AdapterArguments) -> dict[str, Any]:
    """What the model is loaded with: the fields of `adapter`, and over them `model_init_kwargs`.

    Raises:
        ValueError: `model_init_kwargs` is no mapping.
    """
    given = training.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise ValueError(f"model_init_kwargs={given!r} must be a mapping, such as {{'device_map': 'auto'}}")
    return {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **given,
    }
