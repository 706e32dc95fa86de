"""A small study's file, and finished cells made up without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from studies.load import load_study
from studies.measure import pack
from studies.plan import cell_job, cells, trial_jobs
from studies.spec import Study
from studies.store import Store


ITEMS = 40
BASE = str(Path(__file__).parents[2] / "recipes" / "base_model")
"""One that is there, for what reads its config."""


def declaration(output_dir: Path, model: Path | str = "missing/base", **changes: Any) -> dict[str, Any]:
    """A study of the base, LoRA and two more arms; `changes` replace top-level keys."""
    return {
        "model": str(model),
        "families": ["number_sorting"],
        "sizes": {8: {"num_train_epochs": 1}},
        "seeds": [0, 1],
        "reference": "lora",
        "selection": {"seeds": [0], "examples": 4},
        "evaluation": {"items": {"standard": 4, "harder": 4}, "probe_items": 2, "smoothness_items": 1},
        "common": {
            "adapter": "lora",
            "lora_r": 2,
            "lora_target_modules": "all-linear",
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "logging_steps": 1,
        },
        "arms": {
            "base": {"untrained": True},
            "lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]},
            "neftune": {"trials": [{"neftune_noise_alpha": 1.0}, {"neftune_noise_alpha": 5.0}]},
        },
        "output_dir": str(output_dir),
        **changes,
    }


def write_study(folder: Path, **changes: Any) -> Path:
    """Write `declaration` as folder/study.yaml."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(declaration(folder / "out", **changes), sort_keys=False))
    return path


def small_study(folder: Path, **changes: Any) -> Study:
    """`declaration`, loaded."""
    return load_study(write_study(folder, **changes))


def finish_trials(study: Study, store: Store, best: int = 1) -> None:
    """Write every trial's result; trial `best` matches most."""
    for arm in study.arms:
        for size in study.sizes:
            for job in [] if arm.untrained else trial_jobs(study, arm, size):
                score = 0.9 if job.trial == best else 0.1
                store.write("trials", job.key, {"exact_match": score, "nll": 1.0, "seconds": 2.0})


def cell_result(
    accuracy: float, seed: int | None, *, confidence: float = 0.5, seconds: float = 10.0
) -> dict[str, Any]:
    """A cell's result: in every task the first `accuracy` of the items right, nudged by one item per seed."""
    right = np.arange(ITEMS) < round(accuracy * ITEMS) + (seed or 0) % 2
    task = {
        "items": "0" * 16,
        "correct": "".join("1" if one else "0" for one in right),
        "nll": pack(np.where(right, 0.5, 2.0)),
        "confidence": pack(np.full(ITEMS, confidence)),
    }
    return {
        "training": None if seed is None else {"seconds": seconds},
        "sets": {name: {f"dip_{name}_number_sorting": task} for name in ("standard", "harder")},
        "robustness": {"none": {"exact_match": accuracy, "nll": 1.0}, "typos": {"exact_match": 0.0, "nll": 3.0}},
        "smoothness": {"relative_gradient_norm_mean": 1.5},
        "reconstruction": {"10": {"error": 0.125, "floor": 0.01}, "16": {"error": 0.0625, "floor": 0.001}},
        "posterior": {"start_spread": 2.0, "covariance_distance": 0.5},
        "environment": {"device": "cpu", "python": "3.11", "packages": {"torch": "2"}, "commit": "abc"},
        "seconds": seconds,
    }


def finish_cells(study: Study, store: Store, accuracies: dict[str, float], seeds: tuple[int, ...] = (0, 1)) -> None:
    """Write the cells of the arms named, in `seeds`; their trials must be finished."""
    for cell in cells(study):
        if cell.arm.name in accuracies and (cell.seed is None or cell.seed in seeds):
            job = cell_job(study, store, cell)
            assert job is not None
            result = cell_result(accuracies[cell.arm.name], cell.seed)
            store.write("cells", job.key, result | {"config_hash": job.config_hash, "cell_hash": job.key})
