"""The picture of a checkpoint's diagnostics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart in all common forms of colour blindness
_KINDS = {"noise": ("Gaussian noise", "#0072B2"), "fgsm": ("FGSM", "#D55E00"), "typos": ("typos", "#009E73")}


def draw(result: dict[str, Any], path: str | Path) -> None:
    """Write what `dip_hf.diagnostics.run.diagnose` returns as PNG.

    Panels: norms of gradient and Hessian (mean and largest, in units of the embedding RMS); the reconstruction error
    over N, where it was measured; exact match and NLL over the strength of each perturbation.

    Args:
        result: the measured values.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    widths = [0.5, 0.5, *([1.0] if result["reconstruction"] else []), 1.0, 1.0]
    # A Figure of its own, not pyplot's: nothing global, and no display is looked for
    figure = Figure(figsize=(3.7 * sum(widths), 3.8), layout="constrained", dpi=150)
    axes = list(figure.subplots(1, len(widths), width_ratios=widths))
    _draw_smoothness(axes[0], result["smoothness"], "gradient_norm", "Gradient norm", "nats / RMS")
    _draw_smoothness(axes[1], result["smoothness"], "hessian_norm", "Hessian norm", "nats / RMS²")
    if result["reconstruction"]:
        _draw_reconstruction(axes[2], result["reconstruction"])
    _draw_robustness(axes[-2], result["robustness"], "exact_match", "Exact match in %", 100)
    axes[-2].set_ylim(-3, 105)
    _draw_robustness(axes[-1], result["robustness"], "nll", "NLL, nats per answer", 1)
    axes[-1].set_ylim(bottom=0)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{Path(result['settings']['adapter']).name}, {int(result['smoothness']['examples'])} examples")
    figure.savefig(path)


def _draw_smoothness(axes: Axes, values: dict[str, float], name: str, title: str, unit: str) -> None:
    for kind, colour in (("mean", "#999999"), ("max", "#E69F00")):
        bar = axes.bar(kind, values[f"relative_{name}_{kind}"], color=colour)
        axes.bar_label(bar, fmt="{:.3g}", fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title)


def _draw_reconstruction(axes: Axes, rows: dict[int, dict[str, float]]) -> None:
    sizes = sorted(rows)
    axes.plot(sizes, [rows[size]["error"] for size in sizes], "o-", color="#0072B2", label="model")
    axes.plot(sizes, [rows[size]["floor"] for size in sizes], "o--", color="#999999", label="linear map")
    axes.set_yscale("log")
    axes.set_xticks(sizes)
    axes.set_xlabel("coded samples N")
    axes.set_title("DReS reconstruction error")
    axes.legend(frameon=False, fontsize=8)


def _draw_robustness(axes: Axes, rows: dict[str, dict[str, float]], field: str, title: str, factor: float) -> None:
    clean = factor * rows["none"][field]
    axes.axhline(clean, color="black", linewidth=0.8, linestyle=":", label="none")
    for kind, (label, colour) in _KINDS.items():
        points = sorted(
            (float(name.removeprefix(f"{kind}_")), factor * row[field])
            for name, row in rows.items()
            if name.startswith(f"{kind}_")
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("strength (× embedding RMS; typos: share of words)")
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
