"""A study's file: what it means, and what is wrong with a bad one."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import studies.store
from studies.arguments import check_arms, check_fields, parse_training
from studies.load import load_study
from studies.store import base_digest, cell_key, training_key
from tests.studies.support import BASE, declaration, small_study, write_study


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, r"seeds=\[\] must be a list of at least one"),
        ({"seeds": None}, "the key 'seeds' is missing"),
        ({"seeds": [0, 0]}, "names a seed twice"),
        ({"seed": [0]}, "the key 'seed' is unknown; did you mean 'seeds'"),
        ({"selection": {"seeds": [7]}}, r"selection.seeds: 7 is none of seeds=\[0, 1\]"),
        ({"evaluation": {"items": {"standrad": 4}}}, "evaluation.items: the key 'standrad' is unknown; did you mean"),
        (
            {"evaluation": {"items": {"standard": 0}}},
            "evaluation.items.standard=0 must be a whole number of at least 1",
        ),
        (
            {"evaluation": {"items": {"standard": 4}, "probe_items": -1}},
            "evaluation.probe_items=-1 must be a whole number of at least 0",
        ),
        ({"evaluation": {"items": {"standard": 4}, "typo_rate": 1.5}}, "evaluation.typo_rate=1.5 must be a share"),
        (
            {"evaluation": {"items": {"standard": 4}, "split": "train"}},
            "evaluation.split='train' must be 'test' or 'validation'",
        ),
        (
            {
                "evaluation": {"items": {"standard": 4}, "split": "validation"},
                "arms": {"lora": {}, "b": {"temperature": True}},
            },
            "arms.b.temperature is fitted on the validation split",
        ),
        ({"weights": 5}, "weights=5 must be the SHA-256"),
        ({"families": ["number_sorting"] * 2}, "families: 'number_sorting' is named twice"),
        ({"sizes": {True: {}}}, "sizes: True must be a number"),
        ({"evaluation": {"items": {"standard": 4}, "batch_size": 12.5}}, "evaluation.batch_size=12.5 must be a whole"),
        ({"evaluation": {"items": {"standard": 4}, "probe_items": 2.5}}, "evaluation.probe_items=2.5 must be a whole"),
        ({"reference": "lra"}, "reference='lra' is no trained arm; did you mean 'lora'"),
        ({"reference": "base"}, "reference='base' is no trained arm"),
        ({"sizes": [8]}, r"sizes=\[8\] must map"),
        ({"common": {"seed": 3}}, "common: the study itself sets 'seed'"),
        ({"arms": {"lora": {}}}, "arms must map at least two names"),
        (
            {"arms": {"lora": {"trials": [{}, {}]}, "b": {"trials": [{}, {}, {}]}}},
            "arms.lora.trials has 2 settings and another arm's has 3",
        ),
        ({"arms": {"lora": {}, "b": {"trials": {}}}}, "arms.b.trials={} must be a list of mappings"),
        (
            {"arms": {"lora": {}, "b": {"untrained": True, "lora_r": 2}}},
            "arms.b: untrained leaves nothing",
        ),
        ({"arms": {"lora": {}, "b": {"ensemble": 0}}}, "arms.b.ensemble=0 must be a whole number of at least 1"),
        ({"arms": {"lora": {}, "b": {"num_samples": -1}}}, "arms.b.num_samples=-1 must be a whole number"),
        ({"arms": {"lora": {}, "b": {"temperature": 1.5}}}, "arms.b.temperature=1.5 must be true or false"),
        ({"arms": {"lora": {}, "b": {"dropout_at_test": True}}}, "arms.b.dropout_at_test needs a number of samples"),
        (
            {"arms": {"lora": {}, "b": {"temperature": True, "ensemble": 2}}},
            "arms.b: ensemble and temperature cannot be combined",
        ),
        ({"arms": {"lora": {}, "b": {"untrained": True, "ensemble": 2}}}, "untrained leaves nothing for ensemble"),
        ({"arms": {"lora": {"max_steps": 2}, "b": {"epochs_factor": 2}}}, "arms.lora.max_steps=2 would hide"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_study(tmp_path, **changes)
    assert "study.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"families": ["number_sort"]},
            "families: 'number_sort' is no fine-tuning family; did you",
        ),
        (
            {"arms": {"lora": {}, "b": {"trials": [{"nois_scale": 0.3}]}}},
            "arms.b, size 8, trial 0: .*'nois_scale' is no field; did you mean 'noise_scale'",
        ),
        (
            {"arms": {"lora": {}, "b": {"num_trajectories": 4}}},
            "arms.b, size 8, trial 0: num_trajectories has no effect at adapter='lora': .* change adapter",
        ),
        (
            {"arms": {"lora": {}, "b": {"adapter": "none", "lora_dropout": 0.1}}},
            "arms.b, size 8, trial 0: lora_dropout has no effect at adapter='none'",
        ),
        (
            {"arms": {"lora": {}, "b": {"adapter": "dipnet", "learn_noise": False, "variance_weight": 0.1}}},
            "arms.b, size 8, trial 0: variance_weight has no effect at learn_noise=False",
        ),
        (
            {
                "arms": {
                    "lora": {},
                    "b": {"adapter": "dipnet", "noise_blocks": "0", "variational_rank": 2, "noise_scale": 0.2},
                }
            },
            "arms.b, size 8, trial 0: noise_scale has no effect at noise_blocks='0'",
        ),
        (
            {"arms": {"lora": {}, "b": {"adapter": "dipnet", "variational_scale": 1.0}}},
            "arms.b, size 8, trial 0: variational_scale has no effect at variational_rank=0",
        ),
        (
            {"arms": {"lora": {}, "b": {"icp_epsilon": 0.1}}},
            "arms.b, size 8, trial 0: icp_epsilon has no effect at icp_weight=0",
        ),
        (
            {"arms": {"lora": {}, "b": {"rdrop_weight": 1.0, "adapter": "dipnet"}}},
            "arms.b, size 8, trial 0: rdrop_weight=1.0 is a baseline",
        ),
        (
            {"arms": {"lora": {}, "b": {"rdrop_weight": 1.0, "lora_dropout": 0.0}}},
            "arms.b, size 8, trial 0: rdrop_weight=1.0 compares two dropout masks",
        ),
        (
            {"arms": {"lora": {}, "b": {"adapter": "dipnet", "trials": [{}, {"noise_blocks": [9]}]}}},
            "arms.b, size 8, trial 1: noise_blocks",
        ),
        (
            {"arms": {"lora": {}, "b": {"adapter": "dipnet", "variational_rank": 2, "weight_decay": 0.1}}},
            "arms.b, size 8, trial 0: weight_decay=0.1 with variational_rank > 0",
        ),
        ({"arms": {"lora": {}, "b": {"dres_weight": 1.0, "dres_blocks": [9]}}}, "arms.b, .*: dres_blocks"),
        ({"model": "missing"}, "model='missing': "),
        (
            {"arms": {"lora": {}, "b": {"rdrop_weight": 1.0, "label_smoothing_factor": 0.1}}},
            "trial 0: rdrop_weight=1.0 has a loss of its own, without label smoothing",
        ),
        (
            {"arms": {"lora": {"trials": [{"lora_r": 2}, {"lora_r": 2}]}, "b": {}}},
            "arms.lora, size 8, trial 1: trains as trial 0 does",
        ),
        (
            {"arms": {"lora": {"trials": [{}, {"learning_rate": 1e-2}]}, "b": {}}},  # which is what all have
            "arms.lora, size 8, trial 1: trains as trial 0 does",
        ),
        ({"model": "recipes/base_modl"}, "model='recipes/base_modl' is no folder; did you mean 'base_model'"),
        (
            {"evaluation": {"items": {"standard": 4}, "device": "nosuch"}},
            "device='nosuch' cannot be used here",
        ),
        ({"arms": {"lora": {}, "b": {"sam_rho": -1.0}}}, "arms.b, size 8, trial 0: sam_rho=-1.0 must not be negative"),
        (
            {"arms": {"lora": {}, "b": {"sam_rho": 0.1, "rdrop_weight": 1.0}}},
            "arms.b, size 8, trial 0: .*set one of",
        ),
        (
            {"arms": {"lora": {}, "b": {"num_samples": 5}}},
            "arms.b, size 8, trial 0: num_samples=5 needs noise or a posterior",
        ),
        (
            {"arms": {"lora": {}, "b": {"num_samples": 5, "dropout_at_test": True, "lora_dropout": 0.0}}},
            "trial 0: dropout_at_test needs LoRA .* with dropout, got adapter='lora' and lora_dropout=0.0",
        ),
        (
            {"arms": {"lora": {}, "b": {"ensemble": 2, "adapter": "monteclora"}}},
            "arms.b, size 8, trial 0: ensemble=2 is made of LoRA adapters .*, got adapter='monteclora'",
        ),
        (
            {"sizes": {8: {"num_train_epochs": 1}, 16: {"num_train_epoch": 6}}},
            "arms.lora, size 16, trial 0: .*'num_train_epoch' is no field; did you mean 'num_train_epochs'",
        ),
        (
            {"sizes": {8: {}}, "arms": {"lora": {}, "b": {"epochs_factor": 2}}},
            "arms.b, size 8, trial 0: epochs_factor=2 scales num_train_epochs, which is not set",
        ),
    ],
)
def test_an_arms_fields_are_the_recipes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fields(small_study(tmp_path, **{"model": BASE, **changes}))


def test_a_run_is_refused_on_other_weights_than_the_studys(tmp_path: Path) -> None:
    own = base_digest(BASE)
    check_fields(small_study(tmp_path, model=BASE, weights=own))
    with pytest.raises(ValueError, match=rf"weights='{'0' * 64}': those of model='.*' have the SHA-256 '{own}'; make"):
        check_fields(small_study(tmp_path, model=BASE, weights="0" * 64))
    with pytest.raises(ValueError, match=r"model='runs/none' is no folder with safetensors: make the base as"):
        check_fields(small_study(tmp_path, model="runs/none", weights=own))


@pytest.mark.parametrize("weights", ["", "0" * 63, "A" * 64, int("1" * 64), ["0" * 64]])
def test_weights_are_named_by_their_sha256(tmp_path: Path, weights: Any) -> None:
    with pytest.raises(ValueError, match=rf"weights={re.escape(repr(weights))} must be the SHA-256 of the base's"):
        small_study(tmp_path, weights=weights)


def test_with_weights_named_keys_need_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(weights: str | None) -> str:
        study = small_study(tmp_path, model=BASE, weights=weights)
        return cell_key(study, study.arm("lora"), (training_key(study, study.arm("lora"), 8, 0, 0),))

    here, own = key(None), base_digest(BASE)
    monkeypatch.delattr(studies.store, "base_digest")
    assert key(own) == here != key("0" * 64)


def test_results_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*out' is a file; name a folder"):
        check_fields(small_study(tmp_path, model=BASE))


def test_overrides_go_from_common_to_size_to_arm_to_trial(tmp_path: Path) -> None:
    study = small_study(
        tmp_path,
        common={"learning_rate": 1.0, "lora_r": 1, "lora_alpha": 1, "warmup_steps": 1},
        sizes={8: {"learning_rate": 2.0, "lora_r": 2, "lora_alpha": 2, "num_train_epochs": 3}},
        arms={
            "lora": {"learning_rate": 3.0, "lora_r": 3, "trials": [{}, {"learning_rate": 4.0}], "epochs_factor": 1.5},
            "b": {"trials": [{}, {}]},
        },
    )
    config = study.training(study.arm("lora"), 8, seed=1, trial=1)
    assert [config[name] for name in ("learning_rate", "lora_r", "lora_alpha", "warmup_steps")] == [4.0, 3, 2, 1]
    assert config["num_train_epochs"] == 4.5
    assert [config[name] for name in ("train_size", "seed", "data_seed", "families_seed")] == [8, 1, 1, 1]


def test_the_studys_baselines_reach_the_training_arguments(tmp_path: Path) -> None:
    study = small_study(tmp_path, arms={"lora": {}, "sam": {"sam_rho": 0.05}})
    _, training, adapter = parse_training(study.training(study.arm("sam"), 8, 0, 0), str(tmp_path))
    assert (training.sam_rho, training.seed, adapter.adapter) == (0.05, 0, "lora")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository_are_sound(path: Path) -> None:
    study = load_study(path)
    if study.weights is None:
        check_fields(study)
    else:  # of a base that is not here, but for its shape
        check_arms(study, AutoConfig.from_pretrained(ROOT / "tests" / "fixtures" / Path(study.model).parent.name))
    assert len(study.seeds) >= 5 or study.evaluation.split == "validation"


def test_the_folder_of_a_study_can_be_one_of_many(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("/out", "/a+b"))
    with pytest.raises(ValueError, match=r"output_dir='.*/a\+b' must not contain '\+'"):
        load_study(path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load_study(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("arms: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is no YAML"):
        load_study(broken)


def test_a_control_may_have_nothing_to_choose(tmp_path: Path) -> None:
    study = small_study(tmp_path, arms={"lora": {"trials": [{}, {"lora_r": 4}]}, "b": {"lora_r": 8}})
    assert [len(arm.trials) for arm in study.arms] == [2, 1]


def test_a_file_takes_what_it_leaves_out_from_the_one_it_extends(tmp_path: Path) -> None:
    whole = write_study(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("extends: study.yaml\nseeds: [0, 5]\ncommon: {lora_r: 3}\n")
    study, extended = load_study(other), load_study(whole)
    assert (study.name, study.seeds, study.common) == ("other", (0, 5), {"lora_r": 3})
    assert (study.model, study.sizes, study.evaluation) == (extended.model, extended.sizes, extended.evaluation)
    third = tmp_path / "third.yaml"
    third.write_text("extends: other.yaml")
    with pytest.raises(ValueError, match=r"third\.yaml: extends='other\.yaml' itself extends a file"):
        load_study(third)
    third.write_text("extends: missing.yaml")
    with pytest.raises(ValueError, match=r"missing\.yaml does not exist"):
        load_study(third)


def test_the_declaration_of_the_tests_is_sound(tmp_path: Path) -> None:
    assert set(declaration(tmp_path)) == set(vars(load_study(write_study(tmp_path)))) - {"name", "weights"}
