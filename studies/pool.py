"""Studies of the same settings in other seeds, taken together.

    python -m studies.pool studies/confirmation.yaml studies/addition.yaml
    python -m studies.pool studies/confirmation.yaml studies/addition.yaml --reference lora_dropout_tenth_more

Prints the differences in accuracy to the reference of all arms that the studies share: the mean over all seeds, each
of which weighs alike whatever its study's number of items, and the 95% t interval over seeds. Items are not resampled,
since studies may share some, so that the interval is of these items. Nothing is corrected for the number of arms, nor
for a study that was added when the results of another were known.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dip_hf.evaluation.tables import markdown
from studies.load import load_study
from studies.results import Array, Results, read_results, result_files
from studies.spec import Arm, Study
from studies.store import ARCHIVE, base_of


TASK_SETS = {"standard": "accuracy %", "harder": "harder settings"}
_OF_A_SEED = ("seed", "data_seed", "families_seed", "eval_size")


def pooled_table(finished: Sequence[Results], reference: str) -> str:
    """The differences over all seeds of all studies, as Markdown.

    Args:
        finished: studies of one and the same size.
        reference: an arm of each.

    Raises:
        ValueError: a seed that two studies have, sizes that are not one and the same, a reference that not all have
            with the same settings, or nothing finished.
    """
    studies = [results.study for results in finished]
    seeds = [seed for study in studies for seed in study.seeds]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(f"seeds: {twice[0]} is in two studies, and would count twice; pool studies with their own")
    sizes = {size for study in studies for size in study.sizes}
    if len(sizes) > 1:
        raise ValueError(f"sizes={sorted(sizes)}: pool studies of one and the same size")
    (size,) = sizes
    shared = [arm.name for arm in studies[0].arms if _is_shared(studies, arm.name, size)]
    if reference not in shared:
        raise ValueError(
            f"reference={reference!r} is no arm with the same settings, none of them chosen by trials, in all of "
            f"{', '.join(study.name for study in studies)}: name one of {', '.join(shared) or 'none'} by --reference"
        )
    task_sets = [name for name in TASK_SETS if all(name in study.evaluation.items for study in studies)]
    lines = [(f"{size:,} examples, differences to {reference}", "seeds", *(TASK_SETS[name] for name in task_sets))]
    for name in shared:
        if name != reference:
            differences = [_differences(finished, name, reference, size, task_set) for task_set in task_sets]
            if len(differences[0]):
                lines.append((name, str(len(differences[0])), *map(_cell, differences)))
    if len(lines) == 1:
        raise ValueError(f"no seed of {reference} and another shared arm is finished; run the studies first")
    return markdown(lines, right=range(1, len(lines[0])))


def _is_shared(studies: Sequence[Study], name: str, size: int) -> bool:
    """Whether every study has this arm, trained and predicting in the same way."""
    arms = [next((arm for arm in study.arms if arm.name == name), None) for study in studies]
    settings = [None if arm is None else _settings(study, arm, size) for study, arm in zip(studies, arms, strict=True)]
    return settings[0] is not None and all(own == settings[0] for own in settings)


def _settings(study: Study, arm: Arm, size: int) -> dict[str, Any] | None:
    """What an arm's results depend on but its seed; None where its setting is chosen, or nothing is trained."""
    if arm.untrained or len(arm.trials) > 1:
        return None
    fields = study.training(arm, size, study.seeds[0], 0)
    prediction = {name: value for name, value in vars(arm).items() if name not in ("name", "overrides", "trials")}
    where = {"split": study.evaluation.split, "weights": base_of(study)}
    return {name: value for name, value in fields.items() if name not in _OF_A_SEED} | prediction | where


def _differences(finished: Sequence[Results], name: str, reference: str, size: int, task_set: str) -> Array:
    """Per seed that both arms have finished the difference in accuracy, in points."""
    parts = []
    for results in finished:
        both = [results.study.arm(arm) for arm in (name, reference)]
        seeds = [seed for seed in results.seeds(both[0], size) if seed in results.seeds(both[1], size)]
        if seeds:
            ours, theirs = (_accuracies(results, arm, size, seeds, task_set) for arm in both)
            parts.append(ours - theirs)
    return np.concatenate(parts) if parts else np.empty(0)


def _accuracies(results: Results, arm: Arm, size: int, seeds: list[int], task_set: str) -> Array:
    tasks = results.strata(arm, size, seeds, task_set, "correct")
    return 100 * np.asarray(np.mean([task.mean(axis=1) for task in tasks], axis=0))


def _cell(differences: Array) -> str:
    """Mean and interval; empty with fewer than two seeds."""
    if len(differences) < 2:
        return ""
    mean, error = differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5
    reach = stats.t.isf(0.025, len(differences) - 1) * error
    return f"{mean:+.1f} [{mean - reach:+.1f}, {mean + reach:+.1f}]"


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` stands for its words."""
    parser = argparse.ArgumentParser(prog="python -m studies.pool", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path, help="YAML files")
    parser.add_argument("--reference", help="compare with this arm (default: that of the first study)")
    arguments = parser.parse_args(argv)
    try:
        studies = [load_study(path) for path in arguments.studies]
        finished = [read_results(study, *result_files(study, ARCHIVE)) for study in studies]
        print(pooled_table(finished, arguments.reference or studies[0].reference))
    except ValueError as error:
        sys.exit(f"studies.pool: {error}")


if __name__ == "__main__":
    main()
