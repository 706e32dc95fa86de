"""Finished cells as arrays over seeds and items, paired across arms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.measure import unpack
from studies.plan import cells, trial_jobs
from studies.spec import Arm, Study
from studies.store import ARCHIVE, ROOT, Store, cell_key, read_lines, training_keys


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """The finished cells of one study, those of an earlier declaration left out.

    Attributes:
        study: as declared.
        lines: of its results, by arm, size and seed; the base's under size and seed None.
        stale: number of lines whose declaration, data or base has changed since.
    """

    study: Study
    lines: dict[tuple[str, int | None, int | None], dict[str, Any]]
    stale: int

    def seeds(self, arm: Arm, size: int) -> list[int]:
        """Seeds in which the arm is finished; the base serves every seed."""
        if arm.untrained:
            return list(self.study.seeds) if (arm.name, None, None) in self.lines else []
        return [seed for seed in self.study.seeds if (arm.name, size, seed) in self.lines]

    def in_order(self) -> list[dict[str, Any]]:
        """All lines, in the order in which a run writes them."""
        places = [(cell.arm.name, cell.size, cell.seed) for cell in cells(self.study)]
        return [self.lines[place] for place in places if place in self.lines]

    def line(self, arm: Arm, size: int, seed: int) -> dict[str, Any]:
        """One finished cell."""
        return self.lines[(arm.name, None, None) if arm.untrained else (arm.name, size, seed)]

    def strata(self, arm: Arm, size: int, seeds: list[int], task_set: str, what: str) -> list[Array]:
        """Per task an array of shape (seeds, items).

        Args:
            arm: which one.
            size: which one.
            seeds: all of which are finished.
            task_set: such as "standard".
            what: "correct" (0 or 1), "nll" (nats per answer) or "confidence" (a probability).
        """
        sets = [self.line(arm, size, seed)["sets"][task_set] for seed in seeds]
        return [np.stack([_values(tasks[task][what], what) for tasks in sets]) for task in sets[0]]

    def probes(self, arm: Arm, size: int, seeds: list[int], *path: str) -> Array | None:
        """One number per seed, such as ("robustness", "none", "exact_match"); None where it was not measured."""
        values = []
        for seed in seeds:
            content: Any = self.line(arm, size, seed)
            for step in path:
                content = content.get(step) if content is not None else None
            if content is None:
                return None
            values.append(float(content))
        return np.asarray(values) if values else None


def _values(text: str, what: str) -> Array:
    if what == "correct":
        return np.asarray([int(digit) for digit in text], dtype=np.float64)
    return unpack(text)


def result_files(study: Study, archive: Path) -> list[Path]:
    """Files that may hold cells of a study, those of its own runs last."""
    return [folder / f"{study.name}.jsonl" for folder in (ARCHIVE, archive)] + [Store(study.output_dir).results(study)]


def read_results(study: Study, *paths: Path) -> Results:
    """Read a study's results; a missing file holds nothing.

    Args:
        study: as declared.
        paths: where cells stand; of two that are the same place of the table, that of the later file counts, and of
            an arm's cells those whose setting was chosen by the same trials as the later file's.

    Raises:
        ValueError: two cells were not scored on the same items, or the base is in the repository and not below the
            folder that this runs in, so that no cell would be known.
    """
    if study.weights is None and not Path(study.model).is_dir() and (ROOT / study.model).is_dir():
        raise ValueError(f"{study.name}: model={study.model!r} is no folder here: run from the repository's root")
    lines: dict[tuple[str, int | None, int | None], dict[str, Any]] = {}
    chosen: dict[tuple[str, int | None], tuple[Any, Any]] = {}
    stale = set()
    for line in (line for path in paths for line in read_lines(path)):
        place = (line["arm"], line["size"], line["seed"])
        if _is_current(study, line):
            lines[place] = line
            # Trials that scored otherwise elsewhere may have chosen another setting: that of the later file counts
            chosen[place[:2]] = _choice(line)
        else:
            stale.add(place)
    mixed = {place for place, line in lines.items() if _choice(line) != chosen[place[:2]]}
    stale |= mixed
    lines = {place: line for place, line in lines.items() if place not in mixed}
    items: dict[str, str] = {}
    for (arm, _, _), line in lines.items():
        for tasks in line["sets"].values():
            for name, task in tasks.items():
                if items.setdefault(name, task["items"]) != task["items"]:
                    raise ValueError(f"{study.name}: {arm!r} was scored on other items of {name!r} than earlier cells")
    return Results(study, lines, len(stale - set(lines)))


def _choice(line: dict[str, Any]) -> tuple[Any, Any]:
    """Which trial chose a cell's setting, and by which scores."""
    return line["trial"], line["trial_scores"]


def _is_current(study: Study, line: dict[str, Any]) -> bool:
    """Whether a cell is what the study would make: its setting, and the trials that chose it."""
    arm = next((arm for arm in study.arms if arm.name == line["arm"]), None)
    if arm is None:
        return False
    trained: tuple[str, ...] = ()
    if not arm.untrained:
        size, seed, trial = line["size"], line["seed"], line["trial"]
        if size not in study.sizes or seed not in study.seeds or trial >= len(arm.trials):
            return False
        if list(line["trial_runs"]) != [job.key for job in trial_jobs(study, arm, size)]:
            return False
        trained = training_keys(study, arm, size, seed, trial)
    return bool(line["cell_hash"] == cell_key(study, arm, trained))


def time_ratio(results: Results, arm: Arm, size: int) -> float | None:
    """Median over seeds of the training time, over the reference's of the same seed; None without both.

    The median, since other work on the machine can make one run many times as long.
    """
    reference = results.study.arm(results.study.reference)
    both = [seed for seed in results.seeds(arm, size) if seed in results.seeds(reference, size)]
    if arm.untrained or not both:
        return None
    ours, theirs = (
        [results.line(one, size, seed)["training"]["seconds"] for seed in both] for one in (arm, reference)
    )
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))
