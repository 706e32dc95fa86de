"""All studies side by side: what each arm that more than one of them has gains over tuned LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dip_hf.evaluation.tables import markdown
from studies.compare import MIN_SEEDS, Measure, Row, measure_rows
from studies.results import Results
from studies.summary import cell


BASELINE = "lora"
"""What every study calls plain LoRA with its own settings chosen."""
_MEASURES = {
    Measure("standard", "accuracy"): "Accuracy",
    Measure("harder", "accuracy"): "Accuracy, harder settings",
    Measure("standard", "nll"): "NLL",
    Measure("standard", "ece"): "ECE",
}
_Column = dict[Measure, dict[str, Row]]
"""Of one study at one size: per measure and arm."""


def overview_section(studies: Sequence[Results]) -> str:
    """A table per measure, with a column per study and size, and a row per arm that two columns have.

    Args:
        studies: counted are those on the test split that have `BASELINE` in at least `MIN_SEEDS` seeds.

    Returns:
        Markdown; empty where no arm but the baseline is in two columns.
    """
    found = sorted((place for results in studies for place in _columns(results)), key=lambda place: place[:2])
    columns = {f"{name}, {size:,}": column for size, name, column in found}
    accuracy = next(iter(_MEASURES))
    named = [arm for column in columns.values() for arm, row in column[accuracy].items() if row.difference]
    shared = [arm for arm in dict.fromkeys(named) if named.count(arm) > 1]
    if not shared:
        return ""
    text = (
        f"Differences to {BASELINE} of the same study, whose values are the first row, with their 95% intervals; bold "
        "where a verdict is given. A column is a study with its examples per family. An arm's setting may be another "
        "one in another study; arms that one study alone has are in its section."
    )
    bases: dict[str, list[str]] = {}
    for results in studies:
        if any(name == results.study.name for _, name, _ in found):
            bases.setdefault(results.study.model, []).append(results.study.name)
    if len(bases) > 1:
        text += " Bases: " + "; ".join(f"`{base}` of {', '.join(names)}" for base, names in bases.items()) + "."
    tables = [_table(title, measure, columns, shared) for measure, title in _MEASURES.items()]
    return "\n\n".join(["## All studies", text, *tables])


def _columns(results: Results) -> Iterator[tuple[int, str, _Column]]:
    study = results.study
    baseline = next((arm for arm in study.arms if arm.name == BASELINE), None)
    if baseline is None or study.evaluation.split != "test":
        return
    compared = replace(results, study=replace(study, reference=BASELINE))
    for size in study.sizes:
        if len(results.seeds(baseline, size)) >= MIN_SEEDS:
            rows = measure_rows(compared, size, list(_MEASURES))
            yield size, study.name, {measure: {row.arm: row for row in own} for measure, own in rows.items()}


def _table(title: str, measure: Measure, columns: dict[str, _Column], arms: Sequence[str]) -> str:
    lines = [
        (
            arm,
            *(
                cell(column[measure][arm], measure, BASELINE) if arm in column[measure] else ""
                for column in columns.values()
            ),
        )
        for arm in (BASELINE, *arms)
    ]
    return markdown([(title, *columns), *lines], right=range(1, len(columns) + 1))
