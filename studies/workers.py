"""Worker processes: each keeps its imports and does one job after the other; one that dies is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from studies.plan import Job
from studies.spec import Study
from studies.store import Store


Do = Callable[[Study, Store, Job], dict[str, Any]]
"""Does a job: writes its result into the store, and returns it. A module's function, so that it can be sent."""

_CONTEXT = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# glibc gives a large buffer back to the system as soon as it is free, and the next operation's is mapped and cleared
# page by page: 7 % of LoRA's step on Llama 192x4, 12 % with four trajectories
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**32, "MALLOC_TRIM_THRESHOLD_": 2**33, "MALLOC_TOP_PAD_": 2**28}


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: which one.
        result: what it wrote; None where it failed.
        error: why it failed: a traceback, or how the process died; None where it did not.
        died: whether the process died, so that another try may succeed.
    """

    job: Job
    result: dict[str, Any] | None = None
    error: str | None = None
    died: bool = False


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job | None = None


class Workers:
    """A fixed number of worker processes.

    Args:
        study: handed to each.
        do: what they do with a job.
        number: of processes; each gets an equal share of the cores as its threads.
        logs: folder for what each prints.
    """

    def __init__(self, study: Study, do: Do, number: int, logs: Path) -> None:
        self._study = study
        self._do = do
        self._logs = logs
        self.threads = max(1, len(os.sched_getaffinity(0)) // number)
        logs.mkdir(parents=True, exist_ok=True)
        self._workers = [self._start(index) for index in range(number)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle worker ends by itself
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    @property
    def idle(self) -> int:
        """Number of workers without a job."""
        return sum(worker.job is None for worker in self._workers)

    @property
    def jobs(self) -> list[Job]:
        """What is being done."""
        return [worker.job for worker in self._workers if worker.job is not None]

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker, or to another in the place of one that has died."""
        index, worker = next((i, worker) for i, worker in enumerate(self._workers) if worker.job is None)
        if not worker.process.is_alive():
            worker = self._workers[index] = self._start(index)
        worker.job = job
        worker.connection.send(job)

    def wait(self) -> list[Outcome]:
        """Wait until a job ends, well or badly."""
        busy = [worker for worker in self._workers if worker.job is not None]
        ready = wait([handle for worker in busy for handle in (worker.connection, worker.process.sentinel)])
        outcomes = []
        for index, worker in enumerate(self._workers):
            if worker.job is None or not {worker.connection, worker.process.sentinel} & set(ready):
                continue
            job = worker.job
            try:
                result, error = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                outcomes.append(
                    Outcome(job, error=f"the worker died with exit code {worker.process.exitcode}", died=True)
                )
                self._workers[index] = self._start(index)
                continue
            worker.job = None
            outcomes.append(Outcome(job, result, error))
        return outcomes

    def _start(self, index: int) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        # Read when the process starts and when torch is imported, so they are set before the process is
        variables = {name: str(value) for name, value in _KEEP_MEMORY.items() if name not in os.environ}
        variables |= dict.fromkeys(_THREAD_VARIABLES, str(self.threads))
        kept = {name: os.environ.get(name) for name in variables}
        os.environ |= variables
        try:
            log = self._logs / f"worker-{index}.log"
            process = _CONTEXT.Process(
                target=_work, args=(self._study, self._do, theirs, log, self.threads), daemon=True
            )
            process.start()
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        return _Worker(process, ours)


def _end_with_parent() -> None:
    """End this process with the run that began it: where that is killed, the job would go on beside the next run's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(study: Study, do: Do, connection: Connection, log: Path, threads: int) -> None:
    """Body of a worker process: jobs in, (result, error) out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = Store(study.output_dir)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        print(f"=== {job.kind} {job.title}", flush=True)
        answer: tuple[dict[str, Any] | None, str | None]
        try:
            answer = (do(study, store, job), None)
        except Exception:
            answer = (None, traceback.format_exc())
        try:
            connection.send(answer)
        except BrokenPipeError:  # the run was ended; what was finished is on disk
            return
