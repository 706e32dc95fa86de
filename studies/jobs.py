"""One job from its training run to its scores."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from dip_hf.adapter_files import CONFIG_NAME
from dip_hf.diagnostics import make_batches, suite_rows
from dip_hf.diagnostics.functional import teacher_forced
from dip_hf.diagnostics.passes import prepare_batches
from dip_hf.environment import describe_environment, resolve_device
from dip_hf.evaluation.sampling import make_sampler
from dip_hf.loading import load_adapter, load_base
from dip_hf.noise import NoiseKey
from dip_hf.trainer.checkpoints import last_checkpoint
from recipes.sft import make_trainer
from studies.arguments import parse_training
from studies.measure import measure, probe
from studies.plan import Job
from studies.spec import Arm, Study
from studies.store import Store, locked, write_text
from studies.trainers import trainer_class


SECONDS_NAME = "seconds.json"


class Clock(TrainerCallback):
    """Adds up a training run's seconds over its interruptions, up to the checkpoint that it went on from.

    Args:
        path: where the seconds before the last checkpoint stand.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Since the run began, without what was lost to an interruption."""
        return float(self._before + time.perf_counter() - self._start)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loading of model and data does not count."""
        self._start = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time at which a checkpoint was made."""
        write_text(self._path, json.dumps(self.seconds()))


def run_job(study: Study, store: Store, job: Job) -> dict[str, Any]:
    """Do what is missing of one job, write its result and return it.

    Raises:
        FloatingPointError: a cell's training run diverged. A trial's is a result: it scores nothing.
    """
    start = time.perf_counter()
    runs = [train(study, store, job, member) for member in range(len(job.trained))]
    folders = [store.training_folder(key) for key in job.trained]
    result: dict[str, Any] = {"training": runs[0] if runs else None}
    if job.kind == "trial":
        result |= {"exact_match": 0.0, "nll": None}
        if "diverged" not in runs[0]:
            result |= validate(study, study.arm(job.arm), folders[0])
    else:
        for one in runs:
            if "diverged" in one:
                raise FloatingPointError(one["diverged"])
        if len(runs) > 1:  # the first member's, in the time of all
            result["training"] = runs[0] | {"seconds": round(sum(one["seconds"] for one in runs), 2)}
        arm = study.arm(job.arm)
        result |= measure(study, arm, folders)
        if arm.one_pass:
            result |= probe(study, load_model(study, folders[0] if folders else None))
    result |= {
        "config_hash": job.config_hash,
        "cell_hash": job.key,
        "environment": describe_environment(study.evaluation.device) | {"cores": os.cpu_count()},
        "seconds": round(time.perf_counter() - start, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.write("trials" if job.kind == "trial" else "cells", job.key, result)
    return result


def train(study: Study, store: Store, job: Job, member: int = 0) -> dict[str, Any]:
    """Make one of a job's training runs, or what is left of it, or find it finished; return its training.json."""
    assert job.size is not None and job.seed is not None and job.trial is not None
    folder = store.training_folder(job.trained[member])
    # Renamed when it is whole: what a killed run leaves is never taken for a run, but gone on with. A worker whose
    # parent was killed ends too, but may have it for a moment still.
    part = folder.with_name(f"{folder.name}.part")
    if not store.has_training(job.trained[member]):
        with locked(part / "lock", wait=True):
            if not store.has_training(job.trained[member]):
                config = study.training(study.arm(job.arm), job.size, job.seed, job.trial, member)
                report = {"config": config, **_train(config, part)}
                for path in part.glob("checkpoint-*"):
                    shutil.rmtree(path)
                (part / SECONDS_NAME).unlink(missing_ok=True)
                write_text(part / "training.json", json.dumps(report, indent=2))
                part.rename(folder)
                (folder / "lock").unlink()
    trained: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return trained


def _train(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    data, training, adapter = parse_training(config, str(folder))
    trainer = make_trainer(data, training, adapter, trainer_class(training))
    clock = Clock(folder / SECONDS_NAME)
    trainer.add_callback(clock)
    try:
        result = trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    except FloatingPointError as error:
        return {"diverged": str(error)}
    # Of all steps, where a resumed run's own mean is over those since
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = fmean(logged or [result.training_loss])
    if not math.isfinite(loss):
        return {"diverged": f"the mean training loss is {loss}"}
    # The adapter alone: Trainer's own saving adds its pickled arguments
    trainer.model.save_pretrained(folder)
    report = {
        "seconds": round(clock.seconds(), 2),
        "steps": result.global_step,
        "loss": loss,
        "threads": torch.get_num_threads(),
    }
    del trainer
    gc.collect()
    return report


def load_model(study: Study, folder: Path | None) -> PreTrainedModel | PeftModel:
    """The base in fp32, or with what `folder` holds; noise-free, in evaluation mode, on the device of evaluation."""
    device = resolve_device(study.evaluation.device)
    adapter = folder if folder is not None and (folder / CONFIG_NAME).is_file() else None
    whole = study.model if folder is None or adapter is not None else folder
    model = load_base(whole, dtype=torch.float32).to(device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model.eval()


def validate(study: Study, arm: Arm, folder: Path) -> dict[str, float]:
    """Teacher-forced exact match, and NLL in nats per answer, on the families' validation split at its seed 0.

    Of the arm's own prediction, samples averaged per token; a temperature is fitted later, and an ensemble is chosen
    by its first member.
    """
    model, tokenizer = load_model(study, folder), AutoTokenizer.from_pretrained(study.model)
    rows = suite_rows(study.families, "validation", study.selection.examples)
    sampler = make_sampler(model, arm.num_samples, arm.dropout_at_test)
    parts = []
    for index, batch in enumerate(
        prepare_batches(make_batches(rows, tokenizer, study.evaluation.batch_size), model.device)
    ):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.valid.long()}
        if sampler is None:
            with torch.no_grad():
                logits = model(**inputs).logits
        else:
            logits = sampler.log_probabilities(model, NoiseKey(0, step=index), **inputs)
        parts.append(teacher_forced(logits, batch.labels))
    return {
        "exact_match": torch.cat([part.match for part in parts]).double().mean().item(),
        "nll": torch.cat([part.nll for part in parts]).double().mean().item(),
    }
