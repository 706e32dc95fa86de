"""What the picture of the diagnostics shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dip_hf.diagnostics.picture import draw


def test_heights_are_in_proportion_and_nothing_right_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))
    norms = {"gradient_norm": (2.3, 2.97), "hessian_norm": (14.0, 181.0)}
    smoothness = {
        f"relative_{name}_{kind}": value
        for name, values in norms.items()
        for kind, value in zip(("mean", "max"), values, strict=True)
    }
    result = {
        "settings": {"adapter": "runs/dipnet"},
        "smoothness": {"examples": 4, **smoothness},
        "reconstruction": {},
        "robustness": {name: {"exact_match": 0.0, "nll": 1.5} for name in ("none", "fgsm_0.1", "fgsm_0.3")},
    }
    draw(result, tmp_path)
    gradient, hessian, exact_match, _ = figures[0].axes
    for axes, heights in ((gradient, norms["gradient_norm"]), (hessian, norms["hessian_norm"])):
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
        assert tuple(bar.get_height() for bar in axes.patches) == heights
    assert exact_match.get_ylim() == (-3, 105)
