"""Stand-ins for a job, which worker processes import by name."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from studies.load import load_study
from studies.plan import Job
from studies.spec import Study
from studies.store import Store, locked
from studies.workers import Workers
from tests.studies.support import cell_result


def do(study: Study, store: Store, job: Job) -> dict[str, Any]:
    """Write a made-up result, and a line in output_dir/calls; do what output_dir's files ask for.

    `kill-ARM` kills the process the first time that ARM has a job, `raise-ARM` raises while it is there.
    """
    with (store.folder / "calls").open("a") as calls:
        calls.write(f"{job.kind} {job.title}\n")
    kill = store.folder / f"kill-{job.arm}"
    if kill.exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # the signal is on its way
    if (store.folder / f"raise-{job.arm}").exists():
        raise RuntimeError("asked to fail")
    if job.kind == "trial":
        result = {"exact_match": 0.5, "nll": 1.0, "seconds": 1.0}
    else:
        result = cell_result(0.5, job.seed) | {"config_hash": job.config_hash, "cell_hash": job.key}
    store.write("trials" if job.kind == "trial" else "cells", job.key, result)
    return result


def endless(study: Study, store: Store, job: Job) -> dict[str, Any]:
    """Hold output_dir/held and never end."""
    with locked(store.folder / "held", wait=True):
        (store.folder / "began").touch()
        threading.Event().wait()
    raise AssertionError


def environment(study: Study, store: Store, job: Job) -> dict[str, Any]:
    """The variables that a worker process began with."""
    return dict(os.environ)


if __name__ == "__main__":  # a run whose only job never ends
    with Workers(load_study(Path(sys.argv[1])), endless, 1, Path(sys.argv[2])) as workers:
        workers.submit(Job("cell", "lora", 8, 0, 0, (), "key"))
        workers.wait()
