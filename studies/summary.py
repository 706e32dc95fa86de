"""The table that a README shows: all measures of all arms side by side."""

from __future__ import annotations

from dip_hf.evaluation.tables import markdown
from studies.compare import LEVEL, UNANIMOUS, Comparison, Measure, Row
from studies.spec import Study


_TITLES = {
    "accuracy": {"standard": "accuracy %", "harder": "harder settings", "unseen": "unseen", "pretraining": "kept"},
    "nll": {"standard": "NLL", "harder": "NLL, harder"},
    "ece": {"standard": "ECE %", "harder": "ECE %, harder"},
}


def summary(comparison: Comparison, study: Study) -> str:
    """The reference's values, and every other finished arm's differences to it with their intervals."""
    measures = list(comparison.rows)
    by_arm: dict[str, list[str]] = {row.arm: [] for row in comparison.rows[measures[0]] if row.seeds}
    for measure in measures:
        for row in comparison.rows[measure]:
            if row.arm in by_arm:
                by_arm[row.arm].append(cell(row, measure, study.reference))
    names = sorted(by_arm, key=lambda name: name != study.reference)  # the others stay in the study's order
    header = (f"{comparison.size:,} examples", *(_TITLES[measure.what][measure.task_set] for measure in measures))
    text = (
        f"**Summary**: the values of {study.reference}, and differences to it with their 95% intervals; bold where a "
        f"verdict is given (p < {LEVEL:g} after correction, and all of {UNANIMOUS} seeds or fewer agree); *kept*: the "
        "pretraining families"
    )
    first = {row.arm: row for row in comparison.rows[measures[0]]}
    lines = [(_label(first[name], first[study.reference]), *by_arm[name]) for name in names]
    return f"{text}\n\n{markdown([header, *lines], right=range(1, len(header)))}"


def _label(row: Row, reference: Row) -> str:
    """The arm, with the number of seeds that its differences rest on where the reference's value rests on more."""
    own = row.difference
    if own is None or own.seeds == reference.seeds:
        return row.arm
    return f"{row.arm} ({own.seeds} seed{'s' * (own.seeds > 1)})"


def cell(row: Row, measure: Measure, reference: str) -> str:
    """The reference's value, or an arm's difference to it with its interval; empty while pending."""
    digits = 2 if measure.what == "nll" else 1
    if row.arm == reference or row.difference is None:
        return "" if row.mean is None else f"{row.mean:.{digits}f}"
    own = row.difference
    if own.low == own.value == own.high == 0:
        return "0"  # the same answers, as at another temperature
    text = f"{own.value:+.{digits}f} [{own.low:+.{digits}f}, {own.high:+.{digits}f}]"
    return f"**{text}**" if row.verdict(measure) in ("better", "worse") else text
