"""Real jobs on a random model: what they leave, what they make once, and that all arms read the data in one order."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dip_hf.diagnostics import make_batches, robustness, suite_rows
from dip_hf.evaluation.checkpoints import Checkpoint
from dip_hf.ibvi import posterior_predictive
from recipes.sft import make_trainer
from studies.arguments import parse_training
from studies.jobs import Clock, load_model, run_job, train, validate
from studies.measure import pack, prediction, unpack
from studies.plan import finished_cells, open_jobs, trial_jobs
from studies.report import write_report
from studies.results import read_results
from studies.spec import Arm, Study
from studies.store import Store
from studies.trainers import trainer_class
from tests.recipes.support import save_small_model
from tests.studies.support import small_study


ARMS: dict[str, Any] = {
    "base": {"untrained": True},
    "lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e30}]},
    "dipnet": {"adapter": "dipnet", "trials": [{"noise_scale": 0.1}, {"noise_scale": 0.3}]},
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return small_study(tmp_path, model=str(save_small_model(tmp_path / "model")), arms=ARMS, seeds=[0])


def test_a_study_from_its_trials_to_its_report(study: Study, tmp_path: Path) -> None:
    store = Store(study.output_dir)
    done = []
    while job := next(iter(open_jobs(study, store)), None):
        result = run_job(study, store, job)
        done.append((job.kind, job.arm, job.trial))
        assert result["config_hash"] == job.config_hash and result["environment"]["threads"] == torch.get_num_threads()
    trials = [("trial", arm, trial) for arm in ("lora", "dipnet") for trial in (0, 1)]
    assert [place for place in done if place[0] == "trial"] == trials
    assert [place[1] for place in done if place[0] == "cell"] == ["base", "lora", "dipnet"]

    runs = list((store.folder / "trainings").iterdir())
    assert len(runs) == 4  # the chosen trial's run is the first seed's cell
    assert not [path for run in runs for path in run.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    base, lora, _ = finished_cells(study, store)
    assert (lora["trial"], lora["trial_overrides"]) == (0, {"learning_rate": 1e-3})  # the other one diverged
    (key,) = (job.key for job in trial_jobs(study, study.arm("lora"), 8) if job.trial == 1)
    diverged = store.read("trials", key)
    assert diverged is not None and diverged["exact_match"] == 0
    assert lora["training"]["steps"] == 2 and base["training"] is None
    task = lora["sets"]["harder"]["dip_harder_number_sorting"]
    assert len(task["correct"]) == 4 and unpack(task["nll"]).shape == unpack(task["confidence"]).shape == (4,)
    assert task["items"] == base["sets"]["harder"]["dip_harder_number_sorting"]["items"]
    assert set(lora["robustness"]) >= {"none", "typos", "fgsm_0.1", "noise_0.1"}
    assert lora["smoothness"]["hessian_norm_mean"] > 0 and "posterior" not in lora
    assert all(own["error"] > 0 for size, own in lora["reconstruction"].items() if int(size) > 8)

    path = store.write_results(study, finished_cells(study, store))
    assert len(read_results(study, path).lines) == 3
    write_report([study], tmp_path / "docs")
    assert "3 of 3 cells are finished" in (tmp_path / "docs" / "results.md").read_text()


@pytest.mark.parametrize("fields", [{"lora_dropout": 0.3}, {"adapter": "dipnet", "dres_weight": 1.0}], ids="-".join)
def test_a_killed_training_run_is_gone_on_with(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends where an uninterrupted one ends, and counts the seconds of both parts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, sizes = str(save_small_model(tmp_path / "model")), {8: {"num_train_epochs": 3}}
    study = small_study(tmp_path, model=model, sizes=sizes, arms={"lora": fields, "other": {}}, seeds=[0])
    weights, seconds = [], []
    for name, is_killed in (("whole", False), ("killed", True)):
        store = Store(tmp_path / name)
        job = next(open_jobs(study, store))
        if is_killed:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Clock, "on_save", _note_100_seconds_and_stop)
                train(study, store, job)
            assert not store.has_training(job.trained[0])
            store.clear_parts()
        report = train(study, store, job)
        folder = store.training_folder(job.trained[0])
        assert sorted(path.name for path in folder.iterdir() if "check" in path.name or "sec" in path.name) == []
        assert report["steps"] == 6 and [path.name for path in folder.parent.iterdir()] == [folder.name]
        weights.append(load_file(folder / "adapter_model.safetensors"))
        seconds.append(report["seconds"])
    whole, killed = weights
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert seconds[0] < 100 < seconds[1]


def _note_100_seconds_and_stop(clock: Clock, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    clock._path.write_text("100.0")
    if state.epoch >= 2:
        raise KeyboardInterrupt


def test_every_way_to_predict_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arms: dict[str, Any] = {
        "lora": {"lora_dropout": 0.5},
        "temperature": {"lora_dropout": 0.5, "temperature": True},
        "dropout": {"lora_dropout": 0.5, "dropout_at_test": True, "num_samples": 3},
        "ensemble": {"lora_dropout": 0.5, "ensemble": 2},
        "monteclora": {"adapter": "monteclora"},
    }
    evaluation = {"items": {"standard": 4, "harder": 3, "unseen": 1}, "probe_items": 2, "smoothness_items": 1}
    model = str(save_small_model(tmp_path / "model"))
    study = small_study(tmp_path, model=model, arms=arms, seeds=[0], evaluation=evaluation)
    store = Store(study.output_dir)
    while job := next(iter(open_jobs(study, store)), None):
        run_job(study, store, job)
    assert len(list((store.folder / "trainings").iterdir())) == 3  # lora's, the second member's, MonteCLoRA's
    cells = {line["arm"]: line for line in finished_cells(study, store)}
    assert list(cells) == list(arms)
    nlls = {}
    for name, line in cells.items():
        sets = line["sets"]
        assert [{len(task["correct"]) for task in own.values()} for own in sets.values()] == [{4}, {3}, {1}]
        assert list(sets["standard"]) == ["dip_standard_number_sorting"]
        nlls[name] = unpack(sets["standard"]["dip_standard_number_sorting"]["nll"]).tolist()
    assert len(set(map(tuple, nlls.values()))) == len(arms)  # each predicts in a way of its own
    assert {name for name, line in cells.items() if "robustness" in line} == {"lora", "monteclora"}
    assert cells["temperature"]["temperature"] > 0 and "temperature" not in cells["lora"]
    correct = [
        cells[name]["sets"]["standard"]["dip_standard_number_sorting"]["correct"] for name in ("lora", "temperature")
    ]
    assert correct[0] == correct[1]
    one, both = (cells[name]["training"]["seconds"] for name in ("lora", "ensemble"))
    assert both > one
    assert capfd.readouterr().out.count("ensemble: LORA") == 1  # one evaluation for all task sets


def test_the_validation_split_is_predicted_as_the_arm_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    variational: dict[str, Any] = {"adapter": "dipnet", "noise_blocks": [], "variational_rank": 2, "lora_dropout": 0.3}
    variational["variational_scale"] = 30.0
    arms: dict[str, Any] = {
        "mean": variational,
        "samples": {**variational, "num_samples": 3},
        "dropout": {**variational, "num_samples": 3, "dropout_at_test": True},
    }
    model = str(save_small_model(tmp_path / "model"))
    study = small_study(tmp_path, model=model, arms=arms, reference="mean", seeds=[0])
    store = Store(study.output_dir)
    job = next(open_jobs(study, store))
    run_job(study, store, job)
    folder = store.training_folder(job.trained[0])
    scores = {arm.name: validate(study, arm, folder) for arm in study.arms}
    assert len({score["nll"] for score in scores.values()}) == 3
    assert scores["samples"] == validate(study, study.arm("samples"), folder)

    rows = suite_rows(study.families, "validation", study.selection.examples)
    (batch,) = make_batches(rows, AutoTokenizer.from_pretrained(model), 128)
    loaded = load_model(study, folder)
    plain = robustness(loaded, [batch], noise_scales=(), fgsm_scales=())["none"]
    assert scores["mean"] == pytest.approx(plain)
    # Answers that were scored token by token with the mean of the samples' probabilities
    labels = batch["labels"][:, 1:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    probabilities = posterior_predictive(loaded, inputs, 3)[:, :-1]
    right = probabilities.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    nll = -right.log().masked_fill(labels < 0, 0).sum(1).mean().item()
    assert scores["samples"]["nll"] == pytest.approx(nll, rel=1e-5)


def test_an_arm_becomes_a_checkpoint() -> None:
    folders = [Path("a"), Path("b")]
    assert prediction(Arm("base", untrained=True), []) == Checkpoint("base", samples=0)
    assert prediction(Arm("e", ensemble=2), folders) == Checkpoint("e", "a+b", samples=0)
    assert prediction(Arm("t", temperature=True), folders[:1]) == Checkpoint("t", "a", samples=0, temperature=True)
    dropout = Arm("d", dropout_at_test=True, num_samples=5)
    assert prediction(dropout, folders[:1]) == Checkpoint("d", "a", samples=5, dropout=True)
    assert [arm.one_pass for arm in (dropout, Arm("e", ensemble=2), Arm("plain"))] == [False, False, True]


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "dipnet"},
        {"lora_dropout": 0.3},
        {"neftune_noise_alpha": 5.0},
        {"sam_rho": 0.1},
        {"lora_dropout": 0.1, "rdrop_weight": 1.0},
        {"dres_weight": 1.0, "icp_weight": 0.5},
        {"adapter": "dipnet", "num_trajectories": 2, "dres_weight": 1.0, "icp_weight": 0.5},
        {"adapter": "dipnet", "noise_blocks": [], "variational_rank": 2},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_arm_reads_the_same_data_in_the_same_order_from_the_same_start(
    fields: dict[str, Any], study: Study, tmp_path: Path
) -> None:
    def record(fields: dict[str, Any], seed: int) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        config = study.training(study.arm("lora"), 8, seed, 0) | {"num_train_epochs": 2, "learning_rate": 1e-30}
        folder = tmp_path / "-".join(map(str, (*fields, seed)))
        data, training, adapter = parse_training(config | fields, str(folder))
        batches: list[list[int]] = []

        class Recording(trainer_class(training)):  # type: ignore[misc]
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
                batches.append(inputs["input_ids"].flatten().tolist())
                return super().training_step(model, inputs, num_items_in_batch)

        torch.rand(1 + len(fields))  # whatever was drawn before
        trainer = make_trainer(data, training, adapter, Recording)
        trainer.train()
        trainer.model.save_pretrained(folder)
        weights = load_file(folder / "adapter_model.safetensors")
        return batches, {name: value for name, value in weights.items() if "lora_A" in name}

    (lora, start), (arm, same_start), (other, _) = record({}, 0), record(fields, 0), record({}, 1)
    assert len(lora) == 4 and lora == arm and lora != other
    assert lora[:2] != lora[2:]  # each epoch has an order of its own
    assert start.keys() == same_start.keys() and all(torch.equal(start[name], same_start[name]) for name in start)


def test_items_are_packed_to_three_digits() -> None:
    values = [0.0, 0.12345, 7.891, 1e9]
    assert unpack(pack(values)) == pytest.approx([0.0, 0.12345, 7.891, 65504], rel=1e-3)
    assert unpack(pack([])).size == 0
