"""Make the tables and pictures of one or more studies from what is finished of them.

    python -m studies.report                        # every study in studies/
    python -m studies.report studies/two_cores.yaml --docs elsewhere
    python -m studies.report studies/two_cores.yaml --reference lora_same_rate --docs elsewhere

Writes docs/results.md, and into docs/results/ per study NAME.json (the same numbers), NAME-SIZE.png and NAME.jsonl (a
copy of the cells, from which the report can be made again where the runs are not).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from studies.compare import compare
from studies.load import close_to, load_study
from studies.method import method_section
from studies.overview import overview_section
from studies.picture import draw
from studies.results import Results, read_results, result_files
from studies.spec import Study
from studies.store import ROOT, write_lines, write_text
from studies.tables import study_section


_OTHER_REFERENCE = (
    "The reference is another arm than the one declared, so that verdicts are not corrected for its choice."
)


def write_report(studies: Sequence[Study], docs: Path, note: str = "") -> list[Path]:
    """Write the report of `studies` into the folder `docs`; return the paths.

    Args:
        studies: a section each, those without a finished cell by name alone.
        docs: where results.md is written, and results/.
        note: a paragraph in front of the sections.

    Raises:
        ValueError: cells that were not scored on the same items.
    """
    archive = docs / "results"
    paths = [docs / "results.md"]
    finished = [read_results(study, *result_files(study, archive)) for study in studies]
    parts = ["# Results of the studies", method_section(), note, overview_section(finished)]
    parts.append(_without_a_cell(finished))
    for results in (results for results in finished if results.lines):
        study = results.study
        sizes = [size for size in study.sizes if any(place[1] == size for place in results.lines)]
        comparisons = [compare(results, size) for size in sizes]
        pictures = {}
        for comparison in comparisons:
            picture = archive / f"{study.name}-{comparison.size}.png"
            draw(comparison, study, picture)
            pictures[comparison.size] = picture.relative_to(docs).as_posix()
            paths.append(picture)
        content = {"study": study.name, "sizes": [comparison.to_json() for comparison in comparisons]}
        write_text(archive / f"{study.name}.json", json.dumps(content, indent=2) + "\n")
        paths.append(archive / f"{study.name}.json")
        copy = archive / f"{study.name}.jsonl"
        write_lines(copy, results.in_order())
        paths.append(copy)
        parts.append(study_section(results, comparisons, pictures))
    write_text(paths[0], "\n\n".join(part for part in parts if part) + "\n")
    return paths


def _without_a_cell(finished: Sequence[Results]) -> str:
    """The names of the studies that have nothing to show."""
    names = [
        results.study.name + (f" ({results.stale} of an earlier declaration left out)" if results.stale else "")
        for results in finished
        if not results.lines
    ]
    return f"Without a finished cell: {', '.join(names)}." if names else ""


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` stands for its words."""
    parser = argparse.ArgumentParser(prog="python -m studies.report", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", type=Path, help="YAML files (default: every study in studies/)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where results.md is written (default: docs)")
    parser.add_argument("--reference", help="compare with this arm (default: each study's own); needs --docs")
    arguments = parser.parse_args(argv)
    try:
        studies = [load_study(path) for path in arguments.studies or sorted((ROOT / "studies").glob("*.yaml"))]
        if (arguments.studies or arguments.reference) and arguments.docs.resolve() == (ROOT / "docs").resolve():
            raise ValueError(
                "docs/results.md is of every study, by its own reference, and would be replaced: name another folder "
                "by --docs"
            )
        if arguments.reference is not None:
            studies = [_compared_with(study, arguments.reference) for study in studies]
        for path in write_report(studies, arguments.docs, "" if arguments.reference is None else _OTHER_REFERENCE):
            print(f"Wrote {path}")
    except ValueError as error:
        sys.exit(f"studies.report: {error}")


def _compared_with(study: Study, reference: str) -> Study:
    names = [arm.name for arm in study.arms if not arm.untrained]
    if reference not in names:
        raise ValueError(f"--reference: {reference!r} is no trained arm of {study.name}{close_to(reference, names)}")
    return replace(study, reference=reference)


if __name__ == "__main__":
    main()
