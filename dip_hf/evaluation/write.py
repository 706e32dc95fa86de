"""A report as files."""

from __future__ import annotations

from pathlib import Path

from dip_hf.evaluation.picture import draw, draw_calibration
from dip_hf.evaluation.report import Report, to_json, to_markdown


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.png into `folder`, made where it is missing; return their paths.

    With calibration also report_calibration.png.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"report.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(to_json(report), encoding="utf-8")
    if report.calibration:
        paths.append(folder / "report_calibration.png")
        draw_calibration(report, paths[3])
    paths[1].write_text(to_markdown(report, *(path.name for path in paths[2:])), encoding="utf-8")
    draw(report, paths[2])
    return paths
