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

    Panels: derivatives (mean and largest, in units of the embedding RMS); the reconstruction error over N, where it
    was measured; exact match and NLL over the strength of each perturbation.

    Args:
        result: the measured values.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = 3 + bool(result["reconstruction"])
    # A Figure of its own, not pyplot's: nothing global, and no display is looked for
    figure = Figure(figsize=(3.7 * panels, 3.8), layout="constrained", dpi=150)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    _draw_smoothness(axes[0], result["smoothness"])
    if result["reconstruction"]:
        _draw_reconstruction(axes[1], result["reconstruction"])
    _draw_robustness(axes[-2], result["robustness"], "exact_match", "Exact match in %", 100)
    _draw_robustness(axes[-1], result["robustness"], "nll", "NLL, nats per answer", 1)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{Path(result['settings']['adapter']).name}, {int(result['smoothness']['examples'])} examples")
    figure.savefig(path)


def _draw_smoothness(axes: Axes, values: dict[str, float]) -> None:
    names = ("gradient_norm", "hessian_norm")
    for shift, kind, colour in ((-0.2, "mean", "#999999"), (0.2, "max", "#E69F00")):
        heights = [values[f"relative_{name}_{kind}"] for name in names]
        places = [index + shift for index in range(len(names))]
        axes.bar(places, heights, 0.36, color=colour, label=kind)
        for place, height in zip(places, heights, strict=True):
            axes.annotate(
                f"{height:.3g}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.set_xticks(range(2), ["gradient,\nnats / RMS", "Hessian,\nnats / RMS²"])
    axes.set_title("Derivatives of the loss")
    axes.legend(frameon=False, fontsize=8)


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
    axes.set_ylim(bottom=0)
    axes.set_xlabel("strength (× embedding RMS; typos: share of words)")
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
