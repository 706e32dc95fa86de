"""Stand-ins for a job, which worker processes import by name."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from studies.plan import Job
from studies.spec import Study
from studies.store import Store
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


def environment(study: Study, store: Store, job: Job) -> dict[str, Any]:
    """The variables that a worker process began with."""
    return dict(os.environ)
