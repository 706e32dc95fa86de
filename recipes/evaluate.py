"""Evaluates a base and checkpoints of it through lm-eval: tables, and report.json, report.md and report.png.

    python recipes/evaluate.py --model recipes/base_model \
        --checkpoints base lora=runs/quickstart/lora dipnet=runs/quickstart/dipnet \
        --tasks dip_reasoning dip_reasoning_pretraining --limit 100 --output_dir runs/quickstart

`--config FILE.yaml` takes the same fields from a file; options override it. How a checkpoint predicts stands behind
its folder, so that one run can compare several ways:

    --calibration true --checkpoints lora=DIR temperature=DIR,temperature dropout=DIR,dropout,samples=10 \
        ensemble=DIR+DIR+DIR mean=DIR ibvi=DIR,samples=10

Samples are averaged per token: their probabilities of the next token, given all tokens before it. They share a forward
pass, so that `--batch_size` prompts become samples x batch_size rows in it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from yaml import YAMLError

from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.report import make_report, to_text
from dip_hf.evaluation.results import EvaluationSettings
from dip_hf.evaluation.write import make_folder, write_report
from dip_hf.recipe.parser import RecipeParser


EVALS = Path(__file__).parent.parent / "evals"


@dataclass
class CheckpointArguments:
    """What is compared, and where the report goes."""

    checkpoints: list[str] = field(
        default_factory=lambda: ["base"],
        metadata={
            "help": "Any number of `name=folder` (an adapter on the base, or a whole model) or `name` alone (the base "
            "itself). The first is what the others are compared with. `name=folder,samples=10` averages the "
            "probabilities of 10 samples of a DIPNet adapter's noise and posterior; `name=folder,dropout,samples=10` "
            "those of a LoRA adapter's dropout; `name=folder+folder+folder` those of several LoRA adapters. "
            "`name=folder,temperature` divides the logits by a temperature fitted on the validation split. Folders "
            "with a comma or a plus in their names cannot be given."
        },
    )
    output_dir: str = field(
        default="runs/evaluation",
        metadata={"help": "Where report.json, .md and the pictures are written, after each checkpoint."},
    )


def main(argv: list[str] | None = None) -> None:
    """Run the recipe; `argv` stands for the command line's words.

    Raises:
        SystemExit: with one line, where something asked for cannot be had.
    """
    try:
        _evaluate(argv)
    except (ValueError, OSError, ImportError, YAMLError) as error:
        sys.exit(f"recipes/evaluate.py: {error}")


def _evaluate(argv: list[str] | None) -> None:
    settings, arguments = RecipeParser([EvaluationSettings, CheckpointArguments]).parse_recipe(argv)
    settings = replace(settings, include_path=settings.include_path or str(EVALS))
    checkpoints = [Checkpoint.parse(text) for text in arguments.checkpoints]
    import dip_hf.evaluation.lm  # noqa: F401  # it says which extra has lm-eval, where that is missing
    from dip_hf.evaluation.run import evaluate_checkpoints, prepare_tasks

    make_folder(arguments.output_dir)
    tasks = prepare_tasks(settings, checkpoints)
    results = []
    for scores in evaluate_checkpoints(settings, checkpoints, tasks):
        results.append(scores)
        report = make_report(settings, results)
        paths = write_report(report, arguments.output_dir)  # each time: a later one may fail
    print(f"\n{to_text(report)}\n")
    for path in paths:
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
