"""What a study leaves on disk: one folder per training run, one file per finished trial and cell, written whole.

    OUTPUT_DIR/trainings/KEY/     the adapter, and training.json; KEY.part, with a checkpoint, until it is finished
    OUTPUT_DIR/trials/KEY.json    a training run's scores on the validation split
    OUTPUT_DIR/cells/KEY.json     a cell's scores on the study's split
    OUTPUT_DIR/failures/KEY.txt   why a job failed
    OUTPUT_DIR/NAME.jsonl         the cells of the study NAME as it stands, one line each

A key is a hash of what the study says, the data and the base's weights, so a changed study keeps what it still needs,
and studies with one output_dir share what they have in common. It does not know the defaults of fields that the study
leaves out, the base's tokenizer, nor how evals/reasoning generates: begin a new output_dir where one of these changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dip_hf.reasoning import FAMILIES
from studies.spec import Arm, Study


ROOT = Path(__file__).parents[1]
ARCHIVE = ROOT / "docs" / "results"
"""Copies of the results, NAME.jsonl, that came with the repository."""


def digest(content: Any) -> str:
    """Sixteen hex digits of the SHA-256 of `content` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@cache
def training_key(study: Study, arm: Arm, size: int, seed: int, trial: int, member: int = 0) -> str:
    """Key of a training run: the recipe's fields, the families as they are defined, and the base's weights."""
    config = study.training(arm, size, seed, trial, member)
    return digest([config, [FAMILIES[name].settings() for name in study.families], base_of(study)])


def training_keys(study: Study, arm: Arm, size: int, seed: int, trial: int) -> tuple[str, ...]:
    """Keys of the training runs that a cell needs: one, or those of an ensemble's members."""
    return tuple(training_key(study, arm, size, seed, trial, member) for member in range(arm.ensemble))


@cache
def trial_key(study: Study, arm: Arm, trained: str) -> str:
    """Key of a trial: what was trained, and how it predicts the validation split."""
    return digest([trained, arm.num_samples, arm.dropout_at_test])


@cache
def cell_key(study: Study, arm: Arm, trained: tuple[str, ...]) -> str:
    """Key of a cell: what was trained (none: the base), and all that its prediction and evaluation depend on."""
    prediction = [arm.num_samples, arm.dropout_at_test, arm.temperature]
    evaluation = {
        name: value for name, value in vars(study.evaluation).items() if name not in ("batch_size", "device")
    }
    suite = {name: [family.settings("standard"), family.settings("harder")] for name, family in FAMILIES.items()}
    base = base_of(study)
    return digest([trained, prediction, evaluation, list(study.families), suite, study.model, base])


def base_of(study: Study) -> str:
    """What keys know of the base's weights."""
    return base_digest(study.model) if study.weights is None else study.weights


@cache
def base_digest(model: str) -> str:
    """SHA-256 over the weights of a model's folder, the file's own where there is one; empty where there is none."""
    whole = hashlib.sha256()
    paths = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest() if paths else ""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, also where two processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold a lock file while the context is open; a killed process's lock goes with it.

    Args:
        path: the file, made where it is missing.
        wait: until another process lets go.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class Store:
    """The finished parts of a study.

    Args:
        folder: the study's `output_dir`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def training_folder(self, key: str) -> Path:
        """Where a training run stands once it is finished."""
        return self.folder / "trainings" / key

    def has_training(self, key: str) -> bool:
        """Whether a training run is finished."""
        return (self.training_folder(key) / "training.json").is_file()

    def clear_parts(self) -> None:
        """Remove the files that killed processes left half-written; begun training runs stay, to be gone on with."""
        for path in list(self.folder.rglob("*.part")):
            if path.is_file():
                path.unlink()

    def has(self, kind: str, key: str) -> bool:
        """Whether a part is finished; `kind` is "trials" or "cells"."""
        return (self.folder / kind / f"{key}.json").is_file()

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """A finished part; None where it is not finished."""
        if not self.has(kind, key):
            return None
        content: dict[str, Any] = json.loads((self.folder / kind / f"{key}.json").read_text(encoding="utf-8"))
        return content

    def write(self, kind: str, key: str, content: dict[str, Any]) -> None:
        """Note a finished part."""
        write_text(self.folder / kind / f"{key}.json", json.dumps(content, allow_nan=False))
        self.failure(key).unlink(missing_ok=True)

    def failure(self, key: str) -> Path:
        """Where the reason for a failed job stands."""
        return self.folder / "failures" / f"{key}.txt"

    def results(self, study: Study) -> Path:
        """Where the finished cells of a study stand together."""
        return self.folder / f"{study.name}.jsonl"

    def write_results(self, study: Study, cells: list[dict[str, Any]]) -> Path:
        """Write `results`, one line per cell."""
        path = self.results(study)
        write_lines(path, cells)
        return path


def write_lines(path: Path, cells: list[dict[str, Any]]) -> None:
    """Write finished cells, one line each."""
    write_text(path, "".join(json.dumps(cell, allow_nan=False) + "\n" for cell in cells))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote; nothing where there is no file.

    Raises:
        ValueError: a line is no JSON.
    """
    cells = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), start=1):
        try:
            cells.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no finished cell ({error}); restore or remove it") from error
    return cells
