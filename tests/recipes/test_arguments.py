"""The arguments of recipes/sft.py: every file in recipes/configs, overriding, and mistakes in them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from dip_hf import DIPNetConfig
from dip_hf.blocks import parse_blocks
from dip_hf.recipe.arguments import SFTParser, model_options
from tests.recipes.support import CONFIGS, ROOT


def parse(path: Path, *options: str) -> tuple[Any, ...]:
    # A dry run may ask for bfloat16 where the machine has none
    return SFTParser().parse_recipe(["--config", str(path), "--dry_run", *options])


def write(folder: Path, **values: Any) -> Path:
    path = folder / "config.yaml"
    fields = {"model_name_or_path": "some/model", "dataset_name": "some/data", "bf16": False, **values}
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_each_of_its_values_arrives(path: Path) -> None:
    groups = parse(path)
    for key, value in yaml.safe_load(path.read_text()).items():
        arrived = next(getattr(group, key) for group in groups if hasattr(group, key))
        assert arrived == ([] if value == "none" else value), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_opens_with_its_command_and_the_baselines(path: Path) -> None:
    opening = path.read_text().partition("\n\n")[0]
    assert f"--config recipes/configs/{path.name}" in opening
    assert "--adapter lora" in opening
    for word in opening.split():
        if word.startswith("recipes/"):
            assert (ROOT / word).exists()


def test_the_paper_s_values_stand_in_the_gsm8k_configs() -> None:
    for path in CONFIGS:
        if path.stem.startswith("gsm8k"):
            data, training, adapter = parse(path)
            assert (training.learning_rate, training.num_train_epochs) == (5e-4, 1)
            assert (training.variance_weight, training.log_variance_weight) == (0.1, 0.2)
            assert (training.stability_weight, adapter.noise_blocks_choice, adapter.learn_noise) == (0, "all", True)
            assert (data.dataset_name, data.dataset_format) == ("openai/gsm8k", "gsm8k")


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, lora_r=4, learn_noise=True, noise_blocks=2)
    _, training, adapter = parse(path, "--lora_r", "8", "--learning-rate=1e-3", "--learn_noise", "false")
    assert (adapter.lora_r, training.learning_rate, adapter.learn_noise) == (8, 1e-3, False)
    assert adapter.noise_blocks_choice == 2


def test_the_config_option_may_use_an_equals_sign(tmp_path: Path) -> None:
    data, _, _ = SFTParser().parse_recipe([f"--config={write(tmp_path)}"])
    assert data.dataset_name == "some/data"


def test_adapters_become_peft_configs(tmp_path: Path) -> None:
    path = write(tmp_path, lora_r=4, lora_target_modules="all-linear", use_rslora=True, noise_scale=0.3)
    dipnet = parse(path)[2].peft_config()
    assert isinstance(dipnet, DIPNetConfig)
    assert (dipnet.r, dipnet.target_modules, dipnet.use_rslora, dipnet.noise_scale) == (4, "all-linear", True, 0.3)
    lora = parse(path, "--adapter", "lora")[2].peft_config()
    assert type(lora) is LoraConfig and lora.r == 4
    assert parse(path, "--adapter", "none")[2].peft_config() is None


@pytest.mark.parametrize("adapter", ["dipnet", "lora", "monteclora"])
def test_an_adapter_knows_the_revision_of_its_base(adapter: str, tmp_path: Path) -> None:
    words = ("--adapter", adapter, "--model_revision")
    for model, given, kept in (("some/model", "v2", "v2"), ("some/model", "main", None), (str(tmp_path), "v2", None)):
        path = write(tmp_path, model_name_or_path=model)
        assert parse(path, *words, given)[2].peft_config().revision == kept


@pytest.mark.parametrize("adapter", ["dipnet", "lora"])
def test_one_target_is_a_name_and_no_pattern(adapter: str, tmp_path: Path) -> None:
    """TRL makes a text of a list of one, which PEFT would match against whole names."""
    path = write(tmp_path, lora_target_modules=["q_proj"])
    assert parse(path, "--adapter", adapter)[2].peft_config().target_modules == {"q_proj"}
    words = ("--lora_target_modules", "k_proj", "--adapter", adapter)
    assert parse(path, *words)[2].peft_config().target_modules == {"k_proj"}
    pattern = r".*\.[qk]_proj"
    assert parse(path, "--lora_target_modules", pattern)[2].peft_config().target_modules == pattern


def test_an_empty_list_of_targets_leaves_noise_alone(tmp_path: Path) -> None:
    assert parse(write(tmp_path, lora_target_modules=[]))[2].peft_config().noise_only
    path = write(tmp_path, lora_target_modules=["q_proj"])
    assert parse(path, "--lora_target_modules")[2].peft_config().noise_only
    with pytest.raises(ValueError, match=r"lora_target_modules=\[\] leaves adapter='lora' nothing to train"):
        parse(path, "--lora_target_modules", "--adapter", "lora")


@pytest.mark.parametrize("option", ["--dataset_name", "--dataset-name"])
def test_a_dataset_on_the_command_line_wins_over_the_file_s_families(tmp_path: Path, option: str) -> None:
    path = write(tmp_path, families=["lcm"], dataset_name=None)
    for options in ([option, "other/data"], [f"{option}=other/data"], [option, "other/data", "--families"]):
        data, _, _ = parse(path, *options)
        assert (data.dataset_name, data.families) == ("other/data", None)
    with pytest.raises(ValueError, match=r"families=\['gcd'\] and dataset_name='other/data' are both given"):
        parse(path, option, "other/data", "--families", "gcd")


def test_families_on_the_command_line_win_over_the_file_s_dataset(tmp_path: Path) -> None:
    path = write(tmp_path)
    data, _, _ = parse(path, "--families", "gcd", "lcm")
    assert (data.dataset_name, data.families) == (None, ["gcd", "lcm"])
    data, _, _ = parse(path, "--families")
    assert (data.dataset_name, data.families) == ("some/data", None)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("all", "all"), ("4", 4), ("0,5, 9", [0, 5, 9]), (r".*\.1\d", r".*\.1\d"), (3, 3), ([0, 1], [0, 1])],
)
def test_noise_blocks(text: Any, blocks: Any) -> None:
    assert parse_blocks(text) == blocks


def test_an_unknown_key_is_named_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'lerning_rate' is no field; did you mean 'learning_rate'"):
        parse(write(tmp_path, lerning_rate=1e-3))
    with pytest.raises(ValueError, match=r"'zzzzzz' is no field; `--help` lists"):
        parse(write(tmp_path, zzzzzz=1))


def test_an_unknown_option_is_named_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'--noise-scal' is no field; did you mean 'noise_scale'"):
        parse(write(tmp_path), "--noise-scal", "0.1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": "dipnt"}, "adapter='dipnt' is not one of"),
        ({"adapter": "none", "use_peft": True}, "use_peft=True contradicts"),
        ({"dtype": "bf16"}, "dtype='bf16' is not one of 'auto', 'bfloat16'"),
        ({"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type='nf5' is not one of 'fp4', 'nf4'"),
        ({"dataset_format": "gms8k"}, "dataset_format='gms8k' is not one of"),
        ({"packing_strategy": "bfd_spilt"}, "packing_strategy='bfd_spilt' is not one of 'bfd', "),
        ({"families": ["lcm"]}, "families=.* and dataset_name='some/data'"),
        ({"dataset_name": None}, "families and dataset_name are both missing"),
        ({"dataset_name": None, "families": []}, "families and dataset_name are both missing"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"train_size": 0}, "train_size=0 must be at least 1"),
        ({"ignore_bias_buffers": True}, "ignore_bias_buffers=True is not supported.*remove it"),
        ({"dataset_name": ["a", "b"]}, r"'dataset_name' must be a text .*, got \['a', 'b'\]"),
        ({"dataset_name": False}, "'dataset_name' must be a text .*in quotes.*, got False"),
        ({"train_size": 5.5}, "'train_size' must be a whole number, got 5.5"),
        ({"max_length": 256.0}, "'max_length' must be a whole number, got 256.0"),
        ({"learning_rate": True}, "'learning_rate' must be a number, got True"),
        ({"train_size": None}, "'train_size' has no value; give one, or remove the key"),
        ({"lora_r": "eight"}, "lora_r.*invalid int value: 'eight'"),
        ({"noise_scale": 0.0}, "noise_scale=0.0 must be positive"),
        ({"noise_blocks": "150%"}, "noise_blocks='150%' must be from '1%' to '100%'"),
        ({"num_trajectories": 0}, "num_trajectories=0"),
        ({"stability_weight": 0.01}, "stability_weight=0.01"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(write(tmp_path, **values))


def test_a_number_where_a_text_belongs_is_its_digits(tmp_path: Path) -> None:
    values = {"noise_blocks": 2, "max_length": None, "lora_modules_to_save": [1]}
    data, training, adapter = parse(write(tmp_path, dataset_name=42, **values))
    assert adapter.lora_modules_to_save == ["1"]
    assert (data.dataset_name, adapter.noise_blocks_choice, training.max_length) == ("42", 2, None)


def test_what_the_model_is_loaded_with_must_be_a_mapping(tmp_path: Path) -> None:
    _, training, adapter = parse(write(tmp_path, model_init_kwargs={"device_map": "auto"}))
    assert model_options(training, adapter)["device_map"] == "auto"
    training.model_init_kwargs = "auto"
    with pytest.raises(ValueError, match=r"model_init_kwargs='auto' must be a mapping"):
        model_options(training, adapter)


def test_a_missing_path_after_config_is_named() -> None:
    with pytest.raises(ValueError, match="--config needs the path"):
        SFTParser().parse_recipe(["--config"])


def test_the_help_of_every_field_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        SFTParser().parse_args(["--help"])
    assert stop.value.code == 0 and "--dres_blocks" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["families", "lora_target_modules"])
def test_a_text_where_a_list_belongs_is_a_list_of_one(field: str, tmp_path: Path) -> None:
    data, _, adapter = parse(write(tmp_path, **{"dataset_name": None, "families": ["gcd"], field: "number_sorting"}))
    given = {"families": data.families, "lora_target_modules": adapter.lora_target_modules}[field]
    assert given in (["number_sorting"], "number_sorting")  # PEFT takes one module's name as a text


@pytest.mark.parametrize("value", [{"number_sorting": 8, "gcd": 4}, [{"gcd": 4}], [False], 3])
def test_what_is_no_list_where_a_list_belongs(value: Any, tmp_path: Path) -> None:
    """A mapping was taken for the list of its keys."""
    with pytest.raises(
        ValueError, match=r"key 'families' must be a list of words or numbers, got .*; write each on a "
    ):
        parse(write(tmp_path, dataset_name=None, families=value))


def test_a_strategy_of_no(tmp_path: Path) -> None:
    """YAML reads it as false, unless it is quoted."""
    path = tmp_path / "config.yaml"
    path.write_text(Path(write(tmp_path)).read_text() + "\nsave_strategy: no\neval_strategy: no\n")
    _, training, _ = parse(path)
    assert (training.save_strategy, training.eval_strategy) == ("no", "no")


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("1: 2\n")
    with pytest.raises(ValueError, match=r"the config file or an option: .*must be strings"):
        parse(path)
