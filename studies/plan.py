"""Which job comes next: trials before the cells that need their verdict, every arm of a seed before the next seed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any, Literal, NamedTuple

from studies.spec import Arm, Study
from studies.store import Store, cell_key, training_key, training_keys, trial_key


PLACE = ("study", "arm", "size", "seed", "trial", "trial_overrides", "trial_scores", "trial_runs")
"""What a line of the results says of a cell's place in its study; the rest is the cell's own, wherever it stands."""


@dataclass(frozen=True)
class Job:
    """One unit of work: training runs where they are not there yet, and what is measured after them.

    Attributes:
        kind: "trial" scores the validation split, "cell" the study's split.
        arm: name of the arm.
        size: training examples per family; None for the base.
        seed: training seed; None for the base.
        trial: index of the arm's setting; None for the base.
        trained: keys of the training runs: several for an ensemble's cell, none for the base.
        key: of the result.
    """

    kind: Literal["trial", "cell"]
    arm: str
    size: int | None
    seed: int | None
    trial: int | None
    trained: tuple[str, ...]
    key: str

    @property
    def config_hash(self) -> str | None:
        """Key of the (first) training run; None for the base."""
        return self.trained[0] if self.trained else None

    @property
    def title(self) -> str:
        """For progress and errors."""
        if self.size is None:
            return f"{self.arm}"
        return f"{self.arm} size {self.size} seed {self.seed}" + (
            f" trial {self.trial}" if self.kind == "trial" else ""
        )


class Work(NamedTuple):
    """What the time that a job takes depends on: its kind, whether it trains or finds its runs made, arm and size."""

    kind: Literal["trial", "cell"]
    trains: bool
    arm: str
    size: int | None


@dataclass(frozen=True)
class Cell:
    """One place in the study's table; `size` and `seed` are None for the base, which has one cell for all."""

    arm: Arm
    size: int | None
    seed: int | None


def cells(study: Study, only: Container[str] | None = None) -> list[Cell]:
    """The cells in the order of work: the base, then all arms and sizes of the first seed, and so on.

    Args:
        study: the study.
        only: names of the arms that are asked for; None: all.
    """
    arms = [arm for arm in study.arms if only is None or arm.name in only]
    base = [Cell(arm, None, None) for arm in arms if arm.untrained]
    trained = [arm for arm in arms if not arm.untrained]
    return base + [Cell(arm, size, seed) for seed in study.seeds for size in study.sizes for arm in trained]


def trial_jobs(study: Study, arm: Arm, size: int) -> list[Job]:
    """The runs that choose among an arm's trials at one size; none where there is no choice."""
    if len(arm.trials) == 1:
        return []
    jobs = []
    for seed in study.selection.seeds:
        for trial in range(len(arm.trials)):
            key = training_key(study, arm, size, seed, trial)
            jobs.append(Job("trial", arm.name, size, seed, trial, (key,), trial_key(study, arm, key)))
    return jobs


def choose(scores: Sequence[tuple[float, float]]) -> int:
    """Index of the best trial: highest exact match, ties by lowest NLL, then the first.

    Args:
        scores: per trial, as `trial_scores` gives them.
    """
    return max(range(len(scores)), key=lambda trial: (scores[trial][0], -scores[trial][1]))  # the first of equals


def trial_runs(study: Study, store: Store, arm: Arm, size: int) -> dict[str, dict[str, Any]]:
    """The finished ones of an arm's trials by their keys: exact match and NLL (None: diverged), of every seed."""
    finished = ((job.key, store.read("trials", job.key)) for job in trial_jobs(study, arm, size))
    return {key: {name: run[name] for name in ("exact_match", "nll")} for key, run in finished if run is not None}


def trial_scores(study: Study, store: Store, arm: Arm, size: int) -> list[tuple[float, float]] | None:
    """Exact match and NLL of each of an arm's trials on the validation split, means over the seeds of selection.

    None while a trial is not finished; empty where there is no choice. NLL is infinite where a run diverged.
    """
    finished = trial_runs(study, store, arm, size)
    runs: list[list[tuple[float, float]]] = [[] for _ in arm.trials]
    for job in trial_jobs(study, arm, size):
        if job.key not in finished:
            return None
        assert job.trial is not None
        match, nll = finished[job.key]["exact_match"], finished[job.key]["nll"]
        runs[job.trial].append((match, float("inf") if nll is None else nll))
    return [(fmean(match for match, _ in own), fmean(nll for _, nll in own)) for own in runs if own]


def chosen_trial(study: Study, store: Store, arm: Arm, size: int) -> int | None:
    """The trial that the validation split chose; None while its runs are not finished."""
    scores = trial_scores(study, store, arm, size)
    return None if scores is None else choose(scores) if scores else 0


def cell_job(study: Study, store: Store, cell: Cell) -> Job | None:
    """The job of a cell; None while its setting is not chosen yet."""
    if cell.size is None or cell.seed is None:
        return Job("cell", cell.arm.name, None, None, None, (), cell_key(study, cell.arm, ()))
    trial = chosen_trial(study, store, cell.arm, cell.size)
    if trial is None:
        return None
    trained = training_keys(study, cell.arm, cell.size, cell.seed, trial)
    key = cell_key(study, cell.arm, trained)
    return Job("cell", cell.arm.name, cell.size, cell.seed, trial, trained, key)


def open_jobs(study: Study, store: Store, only: Container[str] | None = None) -> Iterator[Job]:
    """Jobs that could start now and are not finished, in order; a result that two arms share is one job.

    Arms as for `cells`.
    """
    seen: set[str] = set()
    for cell in cells(study, only):
        job = cell_job(study, store, cell)
        assert job is not None or cell.size is not None  # the base waits for nothing
        wanted = [job] if job is not None else trial_jobs(study, cell.arm, cell.size or 0)
        for one in wanted:
            kind = "trials" if one.kind == "trial" else "cells"
            if one.key not in seen and not store.has(kind, one.key):
                seen.add(one.key)
                yield one


def next_job(
    study: Study, store: Store, busy: Container[str], given_up: Container[str], only: Container[str] | None = None
) -> Job | None:
    """The first open job that needs no training run that another worker is busy with.

    Args:
        study: the study.
        store: what is finished.
        busy: keys of the results and training runs that workers are busy with.
        given_up: keys of the jobs that failed.
        only: arms as for `cells`.
    """
    for job in open_jobs(study, store, only):
        if job.key not in given_up and not any(key in busy for key in (job.key, *job.trained)):
            return job
    return None


def work_of(store: Store, job: Job) -> Work:
    """What a job that is not begun yet will have to do."""
    trains = not all(store.has_training(key) for key in job.trained)
    return Work(job.kind, trains, job.arm, job.size)


def remaining(study: Study, store: Store, only: Container[str] | None = None) -> list[Work]:
    """Every result that is still to be made, those without a chosen setting included.

    Arms as for `cells`.
    """
    rest: dict[tuple[str, ...], Work] = {}
    for cell in cells(study, only):
        job = cell_job(study, store, cell)
        if job is None:
            assert cell.size is not None
            for trial in trial_jobs(study, cell.arm, cell.size):
                if not store.has("trials", trial.key):
                    rest[("trial", trial.key)] = work_of(store, trial)
            trains = cell.seed not in study.selection.seeds or cell.arm.ensemble > 1  # or the trial's run is taken
            rest[("cell", cell.arm.name, str(cell.size), str(cell.seed))] = Work(
                "cell", trains, cell.arm.name, cell.size
            )
        elif not store.has("cells", job.key):
            rest[("cell", job.key)] = work_of(store, job)
    return list(rest.values())


def finished_cells(study: Study, store: Store) -> list[dict[str, Any]]:
    """The lines of the results: every finished cell of the study as it stands, under the arm's own name."""
    lines = []
    for cell in cells(study):
        job = cell_job(study, store, cell)
        result = None if job is None else store.read("cells", job.key)
        if job is not None and result is not None:
            scores = None if cell.size is None else trial_scores(study, store, cell.arm, cell.size)
            place = {
                "study": study.name,
                "arm": cell.arm.name,
                "size": cell.size,
                "seed": cell.seed,
                "trial": job.trial,
                "trial_overrides": None if job.trial is None else cell.arm.trials[job.trial],
                "trial_scores": [
                    {"exact_match": match, "nll": nll if isfinite(nll) else None} for match, nll in scores or []
                ],
                "trial_runs": {} if cell.size is None else trial_runs(study, store, cell.arm, cell.size),
            }
            assert list(place) == list(PLACE)
            lines.append({**place, **result})
    return lines


def adopt(store: Store, lines: Iterable[dict[str, Any]]) -> None:
    """Take the cells and trials of another folder's results over, so that they are not made again.

    Args:
        store: keeps what it has.
        lines: as `finished_cells` gives them. One of an earlier declaration is of no harm: nothing asks for its key.
    """
    for line in lines:
        if not store.has("cells", line["cell_hash"]):
            own = {name: value for name, value in line.items() if name not in PLACE}
            store.write("cells", line["cell_hash"], own)
        for key, run in line["trial_runs"].items():
            if not store.has("trials", key):
                store.write("trials", key, run)
