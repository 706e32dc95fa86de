"""What a worker process begins with, and what becomes of one that dies."""

import os
import signal
from pathlib import Path

import pytest

from studies.plan import Job
from studies.workers import Workers
from tests.studies.support import small_study
from tests.studies.workload import environment


def test_workers_share_the_cores_and_keep_freed_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "4096")  # set by the user, whose it stays
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    before = dict(os.environ)
    with Workers(small_study(tmp_path), environment, 2, tmp_path / "logs") as workers:
        workers.submit(Job("cell", "lora", 8, 0, 0, (), "key"))
        (outcome,) = workers.wait()
    assert dict(os.environ) == before
    assert outcome.error is None and outcome.result is not None
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert outcome.result["OMP_NUM_THREADS"] == str(share)
    assert outcome.result["MALLOC_TOP_PAD_"] == "4096"
    assert int(outcome.result["MALLOC_TRIM_THRESHOLD_"]) >= 2**30


def test_a_worker_that_dies_without_a_job_is_replaced(tmp_path: Path) -> None:
    """As where memory runs out, of which an idle worker keeps what it had."""
    with Workers(small_study(tmp_path), environment, 1, tmp_path / "logs") as workers:
        for key in ("first", "second"):
            workers.submit(Job("cell", "lora", 8, 0, 0, (), key))
            (outcome,) = workers.wait()
            assert outcome.error is None and outcome.result is not None
            (worker,) = workers._workers
            os.kill(worker.process.pid or 0, signal.SIGKILL)
            worker.process.join()
