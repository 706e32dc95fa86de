"""The order of jobs, what is skipped, and what a change of the study makes anew."""

from pathlib import Path

import pytest

from studies.plan import (
    cells,
    choose,
    chosen_trial,
    finished_cells,
    next_job,
    open_jobs,
    remaining,
    trial_jobs,
    trial_scores,
)
from studies.spec import Study
from studies.store import Store
from tests.studies.support import finish_cells, finish_trials, small_study


def _titles(study: Study, store: Store) -> list[str]:
    return [f"{job.kind} {job.title}" for job in open_jobs(study, store)]


def test_trials_come_before_cells_and_seeds_one_after_the_other(tmp_path: Path) -> None:
    study, store = small_study(tmp_path), Store(tmp_path / "out")
    assert [(cell.arm.name, cell.seed) for cell in cells(study)] == [
        ("base", None),
        *(("lora", 0), ("neftune", 0), ("lora", 1), ("neftune", 1)),
    ]
    trials = [f"trial {arm} size 8 seed 0 trial {trial}" for arm in ("lora", "neftune") for trial in (0, 1)]
    assert _titles(study, store) == ["cell base", *trials]
    finish_trials(study, store)
    assert _titles(study, store) == [
        "cell base",
        *(f"cell {arm} size 8 seed {seed}" for seed in (0, 1) for arm in ("lora", "neftune")),
    ]


def test_finished_jobs_are_skipped_and_an_interrupted_write_is_not_finished(tmp_path: Path) -> None:
    study, store = small_study(tmp_path), Store(tmp_path / "out")
    finish_trials(study, store)
    finish_cells(study, store, {"base": 0.0, "lora": 0.5}, seeds=(0,))
    places = ("neftune size 8 seed 0", "lora size 8 seed 1", "neftune size 8 seed 1")
    assert _titles(study, store) == [f"cell {place}" for place in places]
    assert [(line["arm"], line["seed"]) for line in finished_cells(study, store)] == [("base", None), ("lora", 0)]
    (job, *_) = open_jobs(study, store)
    (store.folder / "cells" / f"{job.key}.json.part").write_text("{")
    (store.folder / "study.jsonl.9.part").write_text("{")
    begun = store.folder / "trainings" / "begun.part"
    begun.mkdir(parents=True)
    (begun / "training.json.9.part").write_text("{")
    assert next(open_jobs(study, store)) == job
    store.clear_parts()
    assert list(store.folder.rglob("*.part")) == [begun] and not list(begun.iterdir())


def test_a_changed_arm_keeps_the_others(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    before = small_study(tmp_path)
    finish_trials(before, store)
    finish_cells(before, store, {"base": 0.0, "lora": 0.5, "neftune": 0.5})
    assert not remaining(before, store)
    arms = {"base": {"untrained": True}, "lora": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]}}
    after = small_study(tmp_path, arms={**arms, "dipnet": {"adapter": "dipnet", "trials": [{}, {"noise_scale": 0.3}]}})
    assert {work.arm for work in remaining(after, store)} == {"dipnet"}
    other = small_study(tmp_path, common={**before.common, "lora_r": 4})
    assert {work.arm for work in remaining(other, store)} == {"lora", "neftune"}
    items = {"items": {"standard": 5}}
    assert {work.kind for work in remaining(small_study(tmp_path, evaluation=items), store)} == {"cell"}


def test_arms_that_share_training_runs_make_them_once(tmp_path: Path) -> None:
    trials = [{"noise_scale": 0.1}, {"noise_scale": 0.3}]
    arms = {
        "lora": {"trials": [{}, {"lora_r": 4}]},
        "mean": {"adapter": "dipnet", "trials": trials},
        "samples": {"adapter": "dipnet", "trials": trials, "num_samples": 10},
    }
    study, store = small_study(tmp_path, arms=arms), Store(tmp_path / "out")
    trials = {job.arm: job for job in open_jobs(study, store)}
    assert trials["mean"].trained == trials["samples"].trained and trials["mean"].key != trials["samples"].key
    finish_trials(study, store)
    jobs = [job for job in open_jobs(study, store) if job.arm != "lora"]
    assert jobs[0].trained == jobs[1].trained and jobs[0].key != jobs[1].key
    # While one of the two is being trained, the other waits
    busy = {jobs[0].key, *jobs[0].trained}
    given_up = {job.key for job in open_jobs(study, store) if job.arm == "lora"}
    job = next_job(study, store, busy, given_up)
    assert job is not None and (job.arm, job.seed) == ("mean", 1)


def test_ways_to_predict_share_training_runs(tmp_path: Path) -> None:
    trials = [{"lora_dropout": 0.1}, {"lora_dropout": 0.2}]
    arms = {
        "lora": {"trials": trials},
        "temperature": {"trials": trials, "temperature": True},
        "dropout": {"trials": trials, "dropout_at_test": True, "num_samples": 10},
        "ensemble": {"trials": trials, "ensemble": 3},
    }
    study, store = small_study(tmp_path, arms=arms, seeds=[0]), Store(tmp_path / "out")
    # One choice for all that validate alike, which is by the prediction they make
    assert [job.arm for job in open_jobs(study, store)] == ["lora", "lora", "dropout", "dropout"]
    finish_trials(study, store)
    lora, *others, ensemble = open_jobs(study, store)
    assert [job.trained for job in others] == [lora.trained] * 2
    assert ensemble.trained[:1] == lora.trained and len(set(ensemble.trained)) == 3
    assert len({job.key for job in (lora, *others, ensemble)}) == 4
    # The ensemble waits for whoever trains any of its members
    given_up = {job.key for job in (lora, *others)}
    assert next_job(study, store, {ensemble.trained[2]}, given_up) is None
    assert next_job(study, store, set(), given_up) == ensemble
    assert next_job(study, store, set(), set(), only=["dropout"]) == others[1]
    assert {work.arm for work in remaining(study, store, only=["lora", "ensemble"])} == {"lora", "ensemble"}


def test_an_ensembles_members_read_the_same_examples_from_another_start(tmp_path: Path) -> None:
    study = small_study(tmp_path, arms={"lora": {}, "ensemble": {"ensemble": 2}})
    first, second = (study.training(study.arm("ensemble"), 8, 1, 0, member) for member in (0, 1))
    assert first == study.training(study.arm("lora"), 8, 1, 0)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"seed", "data_seed"} and first["families_seed"] == 1
    assert not {second["seed"], second["data_seed"]} & set(study.seeds)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.6, 2.0)], 1),
        ([(0.5, 1.0), (0.5, 0.9)], 1),
        ([(0.5, 1.0), (0.5, 1.0)], 0),
        ([(0.0, float("inf")), (0.0, 5.0)], 1),
    ],
)
def test_the_best_trial_matches_most_then_has_the_lowest_nll(scores: list, best: int) -> None:
    assert choose(scores) == best


def test_no_setting_is_chosen_before_all_trials_are_finished(tmp_path: Path) -> None:
    study, store = small_study(tmp_path), Store(tmp_path / "out")
    assert chosen_trial(study, store, study.arm("lora"), 8) is None
    finish_trials(study, store, best=1)
    assert chosen_trial(study, store, study.arm("lora"), 8) == 1


def test_trials_are_scored_by_their_mean_over_the_seeds_of_selection(tmp_path: Path) -> None:
    study = small_study(tmp_path, selection={"seeds": [0, 1], "examples": 4})
    store, arm = Store(tmp_path / "out"), study.arm("lora")
    assert trial_scores(study, store, arm, 8) is None
    results = {(0, 0): (0.9, 1.0), (0, 1): (0.1, 2.0), (1, 0): (0.6, 3.0), (1, 1): (0.6, None)}
    for job in trial_jobs(study, arm, 8):
        match, nll = results[job.trial, job.seed]  # type: ignore[index]
        store.write("trials", job.key, {"exact_match": match, "nll": nll})
    assert trial_scores(study, store, arm, 8) == [(0.5, 1.5), (0.6, float("inf"))]
    assert chosen_trial(study, store, arm, 8) == 1
    single = small_study(tmp_path, arms={"lora": {}, "neftune": {"neftune_noise_alpha": 1.0}})
    assert trial_scores(single, store, single.arm("lora"), 8) == []
