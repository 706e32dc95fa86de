"""The model card: a run's base, data, methods, results and papers, and how to load it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dip_hf.hub.record import scrub
from dip_hf.hub.results import Results
from dip_hf.hub.run import MODEL, FinishedRun
from dip_hf.hub.settings import is_repo_id


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
_TRAINED = ("dip_hf", "trl", "sft")
"""Tags of what this project trained."""


@dataclass(frozen=True)
class Method:
    """A method that was on.

    Attributes:
        name: its short name.
        title: of its paper.
        arxiv: number of its paper.
        values: its settings, by field name.
    """

    name: str
    title: str
    arxiv: str
    values: dict[str, Any]


def methods_on(run: FinishedRun) -> list[Method]:
    """The methods that a run was trained with, as its two configs say."""
    adapter, training = run.adapter, run.training or {}

    def values(source: dict[str, Any], *prefixes: str) -> dict[str, Any]:
        return {name: source[name] for name in sorted(source) if name.startswith(prefixes)}

    found = []
    if run.kind == "DIPNET" and adapter.get("noise_blocks") not in (0, []):
        own = values(adapter, "noise_", "learn_noise") | values(
            training, "num_trajectories", "variance_", "log_variance_", "stability_", "penalty_", "noise_learning"
        )
        title = "Towards Better Generalization via Distributional Input Projection Network"
        found.append(Method("DIPNet", title, "2506.04690", own))
    if run.kind == "DIPNET" and adapter.get("variational_rank", 0) > 0:
        own = values(adapter, "variational_") | values(training, "variational_")
        found.append(Method("IBVI", "Variational Deep Learning via Implicit Regularization", "2505.20235", own))
    if training.get("dres_weight", 0) > 0:
        title = "DReS: Dual Reconstruction Smoothing for Functional Regularization"
        found.append(Method("DReS", title, "2510.00253", values(training, "dres_")))
    if training.get("icp_weight", 0) > 0:
        title = "Self Distillation via Iterative Constructive Perturbations"
        found.append(Method("ICP", title, "2505.14751", values(training, "icp_")))
    return found


def vllm_refusal(adapter: dict[str, Any]) -> str | None:
    """Why vLLM would not serve an adapter's plain LoRA copy; None where it would."""
    unserved = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "monteclora_config")
    for name in unserved:
        if adapter.get(name):
            return f"vLLM does not serve LoRA adapters with `{name}`."
    if adapter.get("bias", "none") != "none":
        return "vLLM does not serve LoRA adapters with trained biases."
    if max_rank(adapter) > VLLM_RANKS[-1]:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}."
    return None


def max_rank(adapter: dict[str, Any]) -> int:
    """The largest rank of an adapter's layers."""
    return max([adapter.get("r") or 1, *(adapter.get("rank_pattern") or {}).values()])


def _one_line(value: object) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(value)).strip()


def code(value: object) -> str:
    """Any value as inline code that nothing in it can end, in a table's cell too."""
    text = _one_line(value)
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def prose(value: object) -> str:
    """Any value as text on one line, without meaning in Markdown or HTML."""
    text = html.escape(_one_line(value), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~$:@])", r"\\\1", text)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("dip_hf.hub", "."),
        undefined=StrictUndefined,
        autoescape=False,  # it is Markdown; every value goes through `code` or `prose`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, prose=prose)
    return environment.get_template("card.md.jinja")


def _is_on_hub(dataset: str) -> bool:
    """Whether a dataset's name is one of the Hub's, and no word or file; those of no owner are not told from words."""
    return "/" in dataset and is_repo_id(dataset) and not Path(dataset).exists()


def render_card(
    run: FinishedRun,
    repo_id: str,
    results: Results | None = None,
    lora: str | None = None,
    has_merged: bool = False,
    tags: Sequence[str] = (),
) -> str:
    """The text of README.md.

    Values from configs and reports go through an escape each; none of them is read as a template, Markdown or YAML.

    Args:
        run: what is described.
        repo_id: where it stands, or will; a valid name on the Hub.
        results: of its evaluation.
        lora: subfolder of the plain LoRA adapter; "" where the run itself is one, None without.
        has_merged: whether merged/ holds the base with the adapter merged in.
        tags: besides this project's own.
    """
    methods = methods_on(run)
    recorded = run.training is not None
    refusal = vllm_refusal(run.adapter) if lora is not None else None
    metadata = ModelCardData(
        base_model=run.base_model,
        base_model_relation=None if run.base_model is None else "finetune" if run.kind == MODEL else "adapter",
        library_name="transformers" if run.kind == MODEL else "peft",
        pipeline_tag="text-generation",
        datasets=[name for name in run.datasets if _is_on_hub(name)] or None,
        tags=sorted({*(_TRAINED if recorded else ()), *(method.name.lower() for method in methods), *tags}),
        model_name=repo_id.rpartition("/")[2],
        eval_results=None if results is None else results.model_index(),
    )
    return _template().render(
        metadata=metadata.to_yaml(),
        run=run,
        datasets=[scrub(name) for name in run.datasets],
        is_model=run.kind == MODEL,
        base=run.base_model or "BASE_MODEL",
        revision=run.base_revision,
        recorded=recorded,
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        methods=methods,
        results=results,
        lora=lora,
        has_merged=has_merged,
        vllm_refusal=refusal,
        vllm_rank=next((rank for rank in VLLM_RANKS if rank >= max_rank(run.adapter)), VLLM_RANKS[-1]),
    )
