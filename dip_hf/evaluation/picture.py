"""The report's pictures: accuracies of the task sets beside paired differences; and reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dip_hf.evaluation.calibration_report import CalibrationBlock
from dip_hf.evaluation.report import Block, Report


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart in all common forms of colour blindness
_COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")


def draw(report: Report, path: str | Path) -> None:
    """Write the picture of a report's task sets as PNG.

    Args:
        report: the comparison; more than eight checkpoints repeat colours.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = report.names
    # With three checkpoints there is one comparison beside those to the first, and it has a panel of its own
    panels = [1.6] + [1.0] * min(len(names) - 1, 2 if len(names) == 3 else 1)
    bars = len(names) * len(report.sets)
    size = (3.6 * len(panels) + 0.2 * bars, max(4.6, 2.6 + 0.2 * bars))
    figure = _figure(size)
    axes = figure.subplots(1, len(panels), width_ratios=panels, squeeze=False)[0]
    _draw_accuracies(axes[0], report.sets, names)
    if report.settings.split != "test":
        axes[0].set_title(f"Accuracy, {report.settings.split} split")
    if len(panels) > 1:
        _draw_differences(axes[1], report.sets, names, 0)
    if len(panels) > 2:
        _draw_differences(axes[2], report.sets, names, 1)
    _save(figure, axes[0], path)


def draw_calibration(report: Report, path: str | Path) -> None:
    """Write reliability diagrams (arXiv 1706.04599) as PNG, one panel per task set.

    Args:
        report: the comparison, with calibration.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    blocks = report.calibration
    figure = _figure((max(5.5, 3.4 * len(blocks)), 4.4))
    axes = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for panel, block in zip(axes, blocks, strict=True):
        panel.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":")
        for index, row in enumerate(block.rows):
            bins, colour = row.bins, _COLOURS[index % len(_COLOURS)]
            places = [100 * value for value in bins.confidence]
            heights = [100 * value for value in bins.accuracy]
            panel.plot(places, heights, color=colour, linewidth=1, label=row.checkpoint)
            panel.scatter(places, heights, [120 * count / block.items + 4 for count in bins.count], color=colour)
        panel.set_title(f"{_short(block)}, n = {block.items}")
        panel.set_xlabel("confidence in %")
        panel.set_xlim(-3, 103)
        panel.set_ylim(-3, 103)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy in % (areas: share of items)")
    _save(figure, axes[0], path)


def _figure(size: tuple[float, float]) -> Figure:
    """A figure of its own, not pyplot's: nothing global, and no display is looked for."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's picture needs matplotlib: install dip_hf with its extra 'eval'") from error
    return Figure(figsize=size, layout="constrained", dpi=150)


def _save(figure: Figure, axes: Axes, path: str | Path) -> None:
    """Write the figure with a legend of as many columns as fit, its rows below what is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(width, height + 0.2 * (math.ceil(len(labels) / columns) - 1))
    figure.savefig(path)


def _label(block: Block) -> str:
    tasks = f"\n{block.tasks} tasks" if block.tasks > 1 else ""
    return f"{_short(block)}{tasks}\nn = {block.items}"


def _short(block: Block | CalibrationBlock) -> str:
    return block.name.removeprefix("dip_reasoning_").replace("_", " ")


def _draw_accuracies(axes: Axes, blocks: tuple[Block, ...], names: Sequence[str]) -> None:
    bar = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [block.rows[index] for block in blocks]
        places = np.arange(len(blocks)) + (index - (len(names) - 1) / 2) * bar
        heights = [100 * row.accuracy for row in rows]
        errors = np.nan_to_num([100 * row.standard_error for row in rows])
        axes.bar(places, heights, 0.92 * bar, color=_COLOURS[index % len(_COLOURS)], label=name)
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for place, height, error in zip(places, heights, errors, strict=True):
            axes.annotate(
                f"{height:.0f}", (place, height + error), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(range(len(blocks)), [_label(block) for block in blocks])
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy in % (bars: ± 1 standard error)")
    axes.set_title("Accuracy")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(axes: Axes, blocks: tuple[Block, ...], names: Sequence[str], reference: int) -> None:
    """Differences of the checkpoints after the one of index `reference` to that one."""
    later = range(reference + 1, len(names))
    for index in later:
        colour = _COLOURS[index % len(_COLOURS)]
        for position, block in enumerate(blocks):
            difference = block.rows[index].differences[names[reference]]
            place = position + (index - (later[0] + later[-1]) / 2) * 0.6 / len(later)
            # Of an interval without width rounding may leave less than nothing, which matplotlib refuses
            below, above = (
                max(0.0, side) for side in (difference.points - difference.low, difference.high - difference.points)
            )
            axes.errorbar([difference.points], [place], xerr=[[below], [above]], fmt="o", color=colour, capsize=3)
            # On the side away from zero, so that the line through zero does not cross it
            left = difference.points < 0
            axes.annotate(
                f"{difference.points:+.1f}",
                (difference.low if left else difference.high, place),
                (-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
            )
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(blocks)), [_short(block) for block in blocks])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.margins(x=0.2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1), max(high, 1))  # where nothing differs there is no scale to take from the data
    compared = f"{names[-1]} minus {names[reference]}" if len(later) == 1 else f"Difference to {names[reference]}"
    axes.set_title(f"{compared}, same items")
    axes.set_xlabel("percentage points (95% interval)")
    axes.spines[["top", "right"]].set_visible(False)
