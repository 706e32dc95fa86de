"""What the report's pictures show."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dip_hf.evaluation.picture import draw, draw_calibration
from dip_hf.evaluation.report import make_report
from tests.evaluation.test_calibration_report import SETTINGS, scores


@pytest.mark.parametrize("write", [draw, draw_calibration])
def test_the_legend_is_no_wider_than_the_picture(
    write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))
    names = [f"dipnet_of_a_long_name_{index}" for index in range(8)]
    write(make_report(SETTINGS, [scores(name, 0) for name in names]), tmp_path)  # type: ignore[operator]
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
