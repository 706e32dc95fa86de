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
from dataclasses import dataclass, field
from pathlib import Path

from yaml import YAMLError

from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.evaluation.report import make_report, to_text
from dip_hf.evaluation.results import EvaluationSettings
from dip_hf.evaluation.write import make_folder, write_report
from dip_hf.recipe.parser import RecipeParser


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and where to write the report."""

    model: str = field(metadata={"help": "The base: a folder, or a name on the Hub."})
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
    tasks: list[str] = field(
        default_factory=lambda: ["dip_reasoning"],
        metadata={"help": "lm-eval tasks or groups: this project's (evals/) and lm-eval's own; patterns work."},
    )
    families: list[str] | None = field(
        default=None,
        metadata={"help": "Fine-tuning families the checkpoints were trained on; the others' tasks are left out."},
    )
    split: str = field(
        default="test",
        metadata={"help": "`test`, or `validation` to choose settings by; of this project's tasks only."},
    )
    limit: int | None = field(
        default=None, metadata={"help": "The first so many items of each task; all if not given."}
    )
    num_samples: int = field(
        default=0,
        metadata={
            "help": "Samples to average over for DIPNet adapters and `,dropout` without `samples=` of their own; the "
            "probabilities are averaged for each token, given the tokens before it. 0 is the plain pass: noise-free, "
            "by the posterior's mean."
        },
    )
    noise_seed: int = field(default=0, metadata={"help": "Seed of those samples."})
    calibration: bool = field(
        default=False,
        metadata={
            "help": "Negative log-likelihood, calibration error, Brier score and AUROC of the answers, with a "
            "reliability diagram; takes one more pass over the answers."
        },
    )
    in_distribution: str | None = field(
        default=None,
        metadata={
            "help": "The task set that the others are a shift from, and whose validation split temperatures "
            "are fitted on; the first if not given. Used by calibration."
        },
    )
    batch_size: int = field(
        default=128,
        metadata={
            "help": "Prompts per forward pass. Where samples are averaged, they become num_samples x batch_size rows."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as `cuda`; a CUDA device where there is one if not given."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "`float32`, `bfloat16` or `float16`; `auto` is the checkpoint's own."}
    )
    include_path: str = field(
        default=str(Path(__file__).parent.parent / "evals"), metadata={"help": "Folder of task files."}
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
    (arguments,) = RecipeParser([EvaluationArguments]).parse_recipe(argv)
    settings = EvaluationSettings(
        model=arguments.model,
        tasks=tuple(arguments.tasks),
        include_path=arguments.include_path,
        families=None if arguments.families is None else tuple(arguments.families),
        split=arguments.split,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        num_samples=arguments.num_samples,
        noise_seed=arguments.noise_seed,
        calibration=arguments.calibration,
        in_distribution=arguments.in_distribution,
        device=arguments.device,
        dtype=arguments.dtype,
    )
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
