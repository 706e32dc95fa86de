"""A process with the Hub's client online: takes one call a line on standard input, answers with one line.

The tests' own process is offline, which the client reads once, on import.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def push(settings: dict[str, Any], **options: Any) -> Any:
    from dip_hf.hub import PushSettings, push

    commit = push(PushSettings(**settings), **options)
    return None if commit is None else commit.oid


def command(arguments: list[str]) -> int:
    from dip_hf.cli import main

    return main(arguments)


def train(output_dir: str, base: str, push_options: dict[str, Any], **config: Any) -> dict[str, Any]:
    """Two steps on a base of the Hub, then `push_to_hub`; the noise-free logits tell what was trained."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from dip_hf import DIPNetConfig, DIPSFTConfig, DIPSFTTrainer

    args = DIPSFTConfig(
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **config,
    )
    trainer = DIPSFTTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "How many?", "completion": " One."}] * 4),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=DIPNetConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    trainer.train()
    commit = trainer.push_to_hub(**push_options)
    commit = commit if push_options.get("blocking", True) else commit.result()
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(torch.arange(1, 11)[None]).logits
    return {"commit": commit.oid, "logits": logits.flatten().tolist()}


def evaluate(model: str, model_args: dict[str, Any], task_folder: str, task: str) -> dict[str, Any]:
    """Per-item log-likelihoods of lm-eval on a task of `task_folder`."""
    import dip_hf.evaluation.lm  # noqa: F401  (registers hf-dip)
    from tests.hub.scoring import score

    return score(model, model_args, task_folder, task)


CALLS = {function.__name__: function for function in (push, command, train, evaluate)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not get between the answers
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"value": CALLS[call["function"]](*call["positional"], **call["named"])}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
