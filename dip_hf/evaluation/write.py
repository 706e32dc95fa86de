"""A report as files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dip_hf.evaluation.picture import draw, draw_calibration
from dip_hf.evaluation.report import Report, to_json, to_markdown


def make_folder(folder: str | Path) -> Path:
    """Make the folder of a report where it is missing.

    Raises:
        ValueError: it cannot be made, or nothing can be written into it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written ({error}): name another folder") from error
    return folder


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.png into `folder`, made where it is missing; return their paths.

    With calibration also report_calibration.png; without, that of an earlier report is removed.
    """
    folder = make_folder(folder)
    paths = [folder / f"report.{suffix}" for suffix in ("json", "md", "png")]
    part = folder / "report.json.part"
    part.write_text(to_json(report), encoding="utf-8")
    part.replace(paths[0])  # whole or not at all: the one before holds finished checkpoints
    diagram = folder / "report_calibration.png"
    if report.calibration:
        paths.append(diagram)
        draw_calibration(report, diagram)
    else:
        diagram.unlink(missing_ok=True)
    paths[1].write_text(to_markdown(report, *(path.name for path in paths[2:])), encoding="utf-8")
    draw(report, paths[2])
    return paths
