"""Run a study, or what is left of it.

    python -m studies.run studies/two_cores.yaml --workers 2 --hours 2
    python -m studies.run studies/two_cores.yaml --arms lora ibvi

Finished parts are kept under the study's `output_dir`, so that the same command goes on after a stop, a kill or a
change of the study; cells and trials that docs/results holds, of this or another study, are taken over from there, so
that a fresh clone goes on too. `python -m studies.report` makes the tables from what there is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from studies.arguments import check_fields
from studies.jobs import run_job
from studies.load import close_to, load_study
from studies.plan import Work, adopt, cells, finished_cells, next_job, remaining, work_of
from studies.spec import Study
from studies.store import ARCHIVE, Store, locked, read_lines, write_text
from studies.workers import Do, Outcome, Workers


TRIES = 2
"""Times that a job is given out whose worker died; one that raised is given out once."""


class Progress:
    """Estimates the time that is left from the jobs that this run has seen.

    Args:
        workers: number of jobs at a time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._seconds: list[tuple[Work, float]] = []

    def note(self, work: Work, seconds: float) -> None:
        """Note how long a job took."""
        self._seconds.append((work, seconds))

    def left(self, rest: list[Work]) -> float | None:
        """Seconds that `rest` will take; None before the first job is done.

        A job is expected to take the mean of those of its kind, arm and size that trained or did not as it does, or
        of the nearest there are: of any arm, of any arm and kind, of the size, of all.
        """
        if not self._seconds:
            return None
        return sum(self._expected(work) for work in rest) / self._workers

    def _expected(self, work: Work) -> float:
        for alike in (
            lambda other: other == work,
            lambda other: other._replace(arm=work.arm) == work,
            lambda other: (other.trains, other.size) == (work.trains, work.size),
            lambda other: other.size == work.size,
        ):
            seconds = [took for other, took in self._seconds if alike(other)]
            if seconds:
                return fmean(seconds)
        return fmean(took for _, took in self._seconds)


def run(study: Study, do: Do, number: int, hours: float | None = None, only: Sequence[str] | None = None) -> int:
    """Run what is left of a study.

    Args:
        study: what to run.
        do: what does a job: `studies.jobs.run_job`.
        number: jobs side by side.
        hours: no job starts after so many; None for no limit.
        only: names of the arms to run; None: all. What the others have finished stays.

    Returns:
        Number of jobs that failed.
    """
    store, progress = Store(study.output_dir), Progress(number)
    store.clear_parts()
    start, total = time.monotonic(), len(cells(study, only))
    failures: dict[str, str] = {}
    died: Counter[str] = Counter()
    under_way: dict[str, Work] = {}
    store.write_results(study, finished_cells(study, store))
    asked = "" if only is None else f" of {', '.join(only)}"
    print(f"{study.name}: {_finished(study, store, only)} of {total} cells{asked} are finished", flush=True)
    if not remaining(study, store, only):
        return 0
    with Workers(study, do, number, store.folder / "logs") as workers:
        print(f"{number} workers with {workers.threads} threads each, logs in {store.folder / 'logs'}", flush=True)
        while True:
            in_time = hours is None or time.monotonic() - start < 3600 * hours
            while in_time and workers.idle:
                busy = {key for job in workers.jobs for key in (job.key, *job.trained)}
                job = next_job(study, store, busy, failures, only)
                if job is None:
                    break
                under_way[job.key] = work_of(store, job)
                workers.submit(job)
            if not workers.jobs:
                break
            for outcome in workers.wait():
                job = outcome.job
                died[job.key] += outcome.died
                if outcome.error is not None and not (outcome.died and died[job.key] < TRIES):
                    failures[job.key] = job.title
                    write_text(store.failure(job.key), outcome.error)
                if outcome.result is not None:
                    progress.note(under_way[job.key], outcome.result["seconds"])
                store.write_results(study, finished_cells(study, store))
                rest = progress.left(remaining(study, store, only))
                done = _finished(study, store, only)
                print(f"[{done}/{total}] {_describe(outcome)}; {_time_left(rest)}", flush=True)
    path = store.write_results(study, finished_cells(study, store))
    print(f"{_finished(study, store, only)} of {total} cells{asked} are finished; results in {path}")
    for key, title in failures.items():
        print(f"failed: {title}, see {store.failure(key)}; the next run tries it again")
    return len(failures)


def _finished(study: Study, store: Store, only: Sequence[str] | None) -> int:
    return sum(only is None or line["arm"] in only for line in finished_cells(study, store))


def _describe(outcome: Outcome) -> str:
    job, result = outcome.job, outcome.result
    if result is None:
        return f"{job.kind} {job.title} FAILED: {(outcome.error or '').strip().splitlines()[-1]}"
    if job.kind == "trial":
        score = f"validation exact match {100 * result['exact_match']:.1f}%"
    else:
        correct = [task["correct"] for task in result["sets"]["standard"].values()]
        score = f"standard {100 * fmean(text.count('1') / len(text) for text in correct):.1f}%"
    return f"{job.kind} {job.title}: {score}, {result['seconds']:.0f} s"


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return "time left unknown"
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60:02d} min left"


def main(argv: list[str] | None = None) -> int:
    """The command; `argv` stands for its words. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m studies.run", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--workers", type=int, default=1, help="jobs side by side, sharing the cores (default 1)")
    parser.add_argument("--hours", type=float, default=None, help="start no job after so many hours")
    parser.add_argument("--arms", nargs="+", default=None, help="run these arms only (default: all)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.workers < 1:
            raise ValueError(f"--workers {arguments.workers} must be at least 1")
        study = load_study(arguments.study)
        names = [arm.name for arm in study.arms]
        for name in arguments.arms or []:
            if name not in names:
                raise ValueError(f"--arms: {name!r} is no arm of {arguments.study}{close_to(name, names)}")
        check_fields(study)
        finished = [line for path in sorted(ARCHIVE.glob("*.jsonl")) for line in read_lines(path)]
    except ValueError as error:
        sys.exit(f"studies.run: {error}")
    try:
        Path(study.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"studies.run: output_dir={study.output_dir!r}: {error}; name a folder that can be made")
    try:
        with locked(Path(study.output_dir, "lock"), wait=False):
            adopt(Store(study.output_dir), finished)
            return 1 if run(study, run_job, arguments.workers, arguments.hours, arguments.arms) else 0
    except BlockingIOError:
        sys.exit(f"studies.run: output_dir={study.output_dir!r}: another study is running there; wait for it")


if __name__ == "__main__":
    sys.exit(main())
