"""What a worker process begins with, and when it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studies.plan import Job
from studies.store import locked
from studies.workers import Workers
from tests.studies.support import small_study, write_study
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


def test_a_worker_ends_with_the_run_that_was_killed(tmp_path: Path) -> None:
    """Or it would train on beside the next run's workers."""
    study = write_study(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "tests.studies.workload", str(study), str(tmp_path / "logs")]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    _until((out / "began").exists)
    with pytest.raises(BlockingIOError), locked(out / "held", wait=False):
        pass
    run.kill()
    run.wait()

    def free() -> bool:
        try:
            with locked(out / "held", wait=False):
                return True
        except BlockingIOError:
            return False

    _until(free)


def _until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("five minutes were not enough")
