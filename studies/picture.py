"""A comparison as a picture: every arm's difference to the reference with its interval, one panel per task set."""

from __future__ import annotations

from pathlib import Path

from studies.compare import Comparison
from studies.spec import Study


_COLOURS = {"better": "#009E73", "worse": "#D55E00", "no difference shown": "#0072B2"}
_WITHOUT_VERDICT = "#999999"


def draw(comparison: Comparison, study: Study, path: Path) -> None:
    """Write the differences in accuracy as PNG; arms of which nothing is finished are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the study's pictures need matplotlib: install dip_hf with its extra 'eval'") from error
    measures = [measure for measure in comparison.rows if measure.what == "accuracy"]
    # The base, far from every trained arm, would squeeze the scale
    shown = {arm.name for arm in study.arms if arm.name != study.reference and not arm.untrained}
    names = [row.arm for row in comparison.rows[measures[0]] if row.arm in shown and row.seeds]
    figure = Figure(figsize=(3 + 2.6 * len(measures), 1.6 + 0.32 * len(names)), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for own, measure in zip(axes, measures, strict=True):
        rows = {row.arm: row for row in comparison.rows[measure]}
        for place, name in enumerate(names):
            row = rows[name]
            if row.difference is None:
                own.annotate("pending", (0, place), ha="center", va="center", fontsize=7, color="#777777")
                continue
            low, high = row.difference.value - row.difference.low, row.difference.high - row.difference.value
            colour = _COLOURS.get(row.verdict(measure), _WITHOUT_VERDICT)
            own.errorbar(
                [row.difference.value], [place], xerr=[[max(low, 0)], [max(high, 0)]], fmt="o", color=colour, capsize=3
            )
        own.axvline(0, color="black", linewidth=0.8, zorder=0)
        own.set_title(measure.task_set)
        own.set_xlabel("points")
        own.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    title = f"Accuracy minus {study.reference}, {comparison.size:,} examples per family"
    figure.suptitle(f"{title} (95% intervals; green: better, orange: worse)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
