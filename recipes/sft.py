"""Fine-tune a language model with DIPNet, with plain LoRA, or whole.

    accelerate launch recipes/sft.py --config recipes/configs/quickstart.yaml

Any field of the file can be overridden behind it, and further fields be given: `--adapter lora --output_dir runs/lora`.
`--dry_run` prints what would run and stops; `--help` lists every field.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trl import get_quantization_config

import dip_hf  # noqa: F401  registers the adapter with PEFT
from dip_hf.recipe.arguments import AdapterArguments, DataArguments, make_parser
from dip_hf.recipe.data import load_eval_dataset, load_train_dataset
from dip_hf.recipe.dry_run import describe_run
from dip_hf.trainer import DIPSFTConfig, DIPSFTTrainer


ARCHITECTURES = Path(__file__).parent / "architectures"


def main(data: DataArguments, training: DIPSFTConfig, adapter: AdapterArguments) -> None:
    """Train and save the adapter (or the whole model) to `output_dir`."""
    evaluates = training.eval_strategy != "no"
    train_dataset = load_train_dataset(data, training.dataset_text_field)
    eval_dataset = load_eval_dataset(data, training.dataset_text_field) if evaluates else None
    training.model_init_kwargs = {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **(training.model_init_kwargs or {}),
    }
    trainer = DIPSFTTrainer(
        model=adapter.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(adapter),
        peft_config=adapter.peft_config(),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Saved to {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.end()


if __name__ == "__main__":
    try:
        arguments = make_parser().parse_recipe()
    except ValueError as error:
        sys.exit(f"recipes/sft.py: {error}")
    if arguments[0].dry_run:
        for line in describe_run(*arguments, ARCHITECTURES):
            print(line)
    else:
        main(*arguments)
