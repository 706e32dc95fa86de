"""The files of one push: what is taken from a run's folder, and what is made from it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import eval_result_entries_to_yaml
from transformers import AutoTokenizer

from dip_hf.adapter_files import CONFIG_NAME, WEIGHTS_NAME, check_inside, read_config
from dip_hf.dipnet.export import export_lora
from dip_hf.hub.card import render_card
from dip_hf.hub.record import DATA_NAME, ENVIRONMENT_NAME, TRAINING_NAME, scrub
from dip_hf.hub.results import (
    BENCHMARK_FOLDER,
    EVALUATION_FOLDER,
    PICTURE_NAME,
    REPORT_NAME,
    Results,
    StaleReportError,
    read_results,
)
from dip_hf.hub.run import MODEL, FinishedRun, local_base, other_adapters, read_mapping, read_run
from dip_hf.hub.settings import PushSettings
from dip_hf.loading import load_adapter, load_base
from dip_hf.model_files import model_weights
from dip_hf.peft_compat import LoraLayer


RECORD_NAME = ".dip_hf_push.json"
"""In a run's folder: where it was pushed to, and the commit that each push made. No push of ours has it; Trainer's own
pushes of a whole folder do, until the next of ours."""
LORA_FOLDER = "lora"
MERGED_FOLDER = "merged"
_WEIGHTS = re.compile(
    r"(?:adapter_model|model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?|training_args\.bin"
)
_RECORDS = (TRAINING_NAME, DATA_NAME, ENVIRONMENT_NAME, RECORD_NAME, REPORT_NAME)
_CONFIGS = (CONFIG_NAME, "config.json", "generation_config.json")

# What tokenizers and processors save; anything else in a run's folder stays there
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
)
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_TEXT_SUFFIXES = {".json", ".yaml", ".md", ".jinja", ".txt"}
_ACCESS_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass
class Staging:
    """What would be pushed.

    Attributes:
        files: path in the repository to local file.
        left_out: path in the repository to the reason why it is missing.
        origin: where the results were taken from; None without any.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    origin: str | None = None

    def sizes(self) -> dict[str, int]:
        """Path in the repository to bytes, in order of the paths."""
        return {name: self.files[name].stat().st_size for name in sorted(self.files)}


def stage(settings: PushSettings, work: Path, tags: list[str] | None = None) -> Staging:
    """Collect and make the files of a push. The run's folder is only read.

    Args:
        settings: of the push.
        work: an empty folder for what is made; must outlive the result.
        tags: for the card, besides this project's own.

    Raises:
        ValueError: the run cannot be pushed; names the field, the value and the remedy.
    """
    run = read_run(settings.folder, settings.base_model, settings.datasets)
    staging = Staging()
    results = _find_results(run, settings, staging)
    lora = None
    if run.kind == MODEL:
        if settings.merged:
            raise ValueError(f"merged=True: {run.folder} holds a whole model, no adapter to merge; leave it out")
        weights = [path.name for path in model_weights(run.folder)]
        _take(run.folder, staging, (*_MODEL_FILES, *weights))
    else:
        staging.files[CONFIG_NAME] = _public_config(run, run.folder / CONFIG_NAME, work / CONFIG_NAME)
        staging.files[WEIGHTS_NAME] = run.folder / WEIGHTS_NAME
        lora = _stage_lora(run, work, staging)
        if settings.merged:
            _stage_merged(run, work / MERGED_FOLDER, staging)
    _take(run.folder, staging, (*_TOKENIZER_FILES, *([DATA_NAME] if run.has_data else [])))
    for name in (TRAINING_NAME, ENVIRONMENT_NAME):
        _take(run.folder, staging, (name,))
        if name not in staging.files:
            staging.left_out[name] = "the run's folder has none; DIPSFTTrainer.save_model writes it"
    made = {name.partition("/")[0] for name in staging.files if "/" in name}
    others = [name for name in other_adapters(run.folder) if name not in made]
    staging.left_out |= {f"{name}/": "another adapter; push its own folder" for name in others}
    for path in staging.files.values():
        if path.suffix == ".json":
            read_mapping(path)  # which refuses a damaged one
    if results is not None:
        _stage_results(results, settings, work, staging)
    card = render_card(run, settings.repo_id, results, lora, settings.merged, tags or [])
    staging.files["README.md"] = _write(work / "README.md", card)
    _refuse_tokens(staging)
    return staging


def _find_results(run: FinishedRun, settings: PushSettings, staging: Staging) -> Results | None:
    """The run's results; those that lie in its folder on earlier weights are left out, those asked for are refused."""
    missing = "no report; give the one that recipes/evaluate.py wrote"
    try:
        results = read_results(run.folder, settings.report, settings.checkpoint)
    except StaleReportError as error:
        if settings.report is not None or settings.benchmarks:
            raise
        results, missing = None, str(error)
    if results is None:
        if settings.benchmarks:
            raise ValueError(f"benchmarks={settings.benchmarks} need a report: give the one of recipes/evaluate.py")
        staging.left_out[f"{EVALUATION_FOLDER}/{REPORT_NAME}"] = missing
        return None
    staging.origin = results.origin
    return results


def _take(folder: Path, staging: Staging, names: tuple[str, ...]) -> None:
    staging.files.update(_found(folder, names))


def _found(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Those of the files that are there, none of them a link to a file elsewhere."""
    found = {name: folder / name for name in names if (folder / name).is_file()}
    for path in found.values():
        check_inside(folder, path)
    return found


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _public_config(run: FinishedRun, source: Path, target: Path) -> Path:
    """An adapter's config that names the base as others know it."""
    content = {**read_config(source.parent), "base_model_name_or_path": run.base_model}
    return _write(target, json.dumps(scrub(content), indent=2, sort_keys=True) + "\n")


def _stage_lora(run: FinishedRun, work: Path, staging: Staging) -> str | None:
    """Add the plain LoRA copy; returns the subfolder that stock PEFT loads, None where there is none."""
    if run.kind != "DIPNET":
        return "" if run.kind == "LORA" else None
    if not run.has_plain_weights:
        staging.left_out[f"{LORA_FOLDER}/"] = "the adapter has noise alone: its noise-free pass is the base's"
        return None
    folder = export_lora(run.folder, work / "exported")
    config = work / LORA_FOLDER / CONFIG_NAME
    staging.files[f"{LORA_FOLDER}/{CONFIG_NAME}"] = _public_config(run, folder / CONFIG_NAME, config)
    staging.files[f"{LORA_FOLDER}/{WEIGHTS_NAME}"] = folder / WEIGHTS_NAME
    return LORA_FOLDER


def _stage_merged(run: FinishedRun, target: Path, staging: Staging) -> None:
    assert run.base_model is not None  # an adapter has one
    # What it was trained on, where that is here; a path that is not here may be a stranger's name on the Hub
    base = local_base(run.adapter.get("base_model_name_or_path") or "", run.folder) or run.base_model
    has_tokenizer = (run.folder / "tokenizer_config.json").is_file()
    try:
        loaded = load_base(base, revision=run.base_revision)  # which a folder has none of
        tokens = len(AutoTokenizer.from_pretrained(run.folder, trust_remote_code=False)) if has_tokenizer else 0
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"base_model={str(base)!r}, or the tokenizer in {run.folder}, cannot be loaded ({reason}), which "
            "merged=True needs: give base_model, a name on the Hub that you can read, and be online, or push without "
            "merged"
        ) from error
    model = load_adapter(loaded, run.folder, tokens=tokens)
    ends = [loaded.get_input_embeddings(), loaded.get_output_embeddings()]
    if ends[1] is not None and ends[0].weight is ends[1].weight and any(isinstance(end, LoraLayer) for end in ends):
        raise ValueError(
            f"merged=True: the adapter changes the embeddings, which {base} shares with its head, and merging would "
            "change both; push without merged"
        )
    model.merge_and_unload().save_pretrained(target)
    made = {path.name: path for path in sorted(target.iterdir())}
    files = _found(run.folder, _TOKENIZER_FILES) | made
    staging.files.update({f"{MERGED_FOLDER}/{name}": path for name, path in files.items()})


def _stage_results(results: Results, settings: PushSettings, work: Path, staging: Staging) -> None:
    text = json.dumps(results.report, indent=2) + "\n"
    staging.files[f"{EVALUATION_FOLDER}/{REPORT_NAME}"] = _write(work / EVALUATION_FOLDER / REPORT_NAME, text)
    if results.picture is not None:
        check_inside(results.picture.parent, results.picture)
        staging.files[f"{EVALUATION_FOLDER}/{PICTURE_NAME}"] = results.picture
    for name, entry in results.benchmark_entries(settings.benchmarks or []).items():
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        staging.files[f"{BENCHMARK_FOLDER}/{name}"] = _write(work / "eval_results" / name, text)


def _refuse_tokens(staging: Staging) -> None:
    for name, path in staging.files.items():
        if path.suffix in _TEXT_SUFFIXES and _ACCESS_TOKEN.search(path.read_bytes()):
            raise ValueError(f"{name} holds what looks like an access token of the Hub; remove it from {path}")


def is_of_a_run(name: str) -> bool:
    """Whether a file is weights or a tokenizer's, or says what is true of other weights than those now pushed."""
    folder, _, file = name.rpartition("/")
    if name.startswith((f"{EVALUATION_FOLDER}/", f"{BENCHMARK_FOLDER}/")) or name in _RECORDS:
        return True
    is_own = file in (*_CONFIGS, *_TOKENIZER_FILES) or _WEIGHTS.fullmatch(file) is not None
    return is_own and folder in ("", LORA_FOLDER, MERGED_FOLDER)
