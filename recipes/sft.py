"""Fine-tune a language model with DIPNet, with plain LoRA, or whole.

    accelerate launch --num_cpu_threads_per_process 2 recipes/sft.py --config recipes/configs/quickstart.yaml

Any field can be set behind the file, and overrides what it says: `--adapter lora --output_dir runs/lora`.
`--dry_run` prints what would run and stops; `--help` lists every field.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from peft.helpers import MontecloraTrainerMixin
from transformers import AutoTokenizer
from trl import get_quantization_config
from yaml import YAMLError

from dip_hf.hub import HubError
from dip_hf.hub.record import write_data
from dip_hf.model_files import check_base
from dip_hf.recipe.arguments import AdapterArguments, DataArguments, SFTParser, model_options
from dip_hf.recipe.data import check_run, describe_data, load_datasets
from dip_hf.recipe.dry_run import describe_run
from dip_hf.recipe.resume import resumed_checkpoint
from dip_hf.trainer import DIPSFTConfig, DIPSFTTrainer
from dip_hf.trainer.checks.resume import check_resumed


ARCHITECTURES = Path(__file__).parent / "architectures"


def make_trainer(
    data: DataArguments,
    training: DIPSFTConfig,
    adapter: AdapterArguments,
    trainer_class: type[DIPSFTTrainer] = DIPSFTTrainer,
) -> DIPSFTTrainer:
    """Load data and model. Data comes first: a mistake in it costs no wait for the weights."""
    check_run(data, training, adapter)
    train_dataset, eval_dataset = load_datasets(data, training)
    assert adapter.model_name_or_path is not None  # AdapterArguments requires it
    check_base("model_name_or_path", adapter.model_name_or_path)
    training.model_init_kwargs = model_options(training, adapter)
    if adapter.adapter == "monteclora":
        trainer_class = type("MonteCLoRATrainer", (MontecloraTrainerMixin, trainer_class), {})  # adds PEFT's own loss
    return trainer_class(
        model=adapter.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        # The examples are text, so a vision-language model's processor is not needed
        processing_class=AutoTokenizer.from_pretrained(
            adapter.model_name_or_path,
            revision=adapter.model_revision,
            trust_remote_code=training.trust_remote_code,
        ),
        quantization_config=get_quantization_config(adapter),
        peft_config=adapter.peft_config(training.seed),
    )


def train(trainer: DIPSFTTrainer, data: DataArguments, resume: str | None) -> None:
    """Train, from the checkpoint `resume` on, save the adapter (or the whole model) to `output_dir`, and push it.

    Raises:
        SystemExit: the push failed, with one line; what was trained is saved.
    """
    training, failure, trained_on = trainer.args, None, describe_data(data)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training.output_dir)
    if training.should_save:
        write_data(training.output_dir, trained_on)
    trainer.accelerator.print(f"Saved to {training.output_dir}")
    if training.push_to_hub:
        try:
            trainer.push_to_hub(dataset_name=data.dataset_name or data.families)
        except (HubError, ValueError) as error:
            failure = error
    # The DDP wrapper goes before the process group: where its reducer is the last to hold the group, it waits for
    # gloo's threads while it has Python's lock, for which they wait (pytorch/pytorch#56297)
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.end()
    if failure is not None:
        sys.exit(
            f"recipes/sft.py: saved to {training.output_dir}; the push failed ({' '.join(str(failure).split())}); run "
            f"`dip-hf push {training.output_dir} {training.hub_model_id or 'REPO_ID'}`"
        )


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` stands for its words. A mistake that is found before training is said in one line."""
    try:
        data, training, adapter = SFTParser().parse_recipe(argv)
        resume = resumed_checkpoint(training)
        if not data.dry_run:
            trainer = make_trainer(data, training, adapter)
            if resume is not None:
                check_resumed(trainer.model, resume)
        elif training.process_index == 0:
            for line in describe_run(data, training, adapter, ARCHITECTURES):
                print(line)
    except (ImportError, ValueError, OSError, YAMLError) as error:
        sys.exit(f"recipes/sft.py: {' '.join(str(error).split())}")
    if not data.dry_run:
        train(trainer, data, resume)


if __name__ == "__main__":
    main()
