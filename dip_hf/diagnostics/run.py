"""All diagnostics of one checkpoint: `dip-hf diagnose`."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from dip_hf.adapter_files import CONFIG_NAME, base_revision, check_adapter_folder, read_config
from dip_hf.diagnostics.data import file_rows, make_batches, suite_rows
from dip_hf.diagnostics.discrepancy import reconstruction_errors
from dip_hf.diagnostics.picture import draw
from dip_hf.diagnostics.posterior import posterior_distance
from dip_hf.diagnostics.robustness import check_scales, robustness
from dip_hf.diagnostics.smoothness import smoothness
from dip_hf.diagnostics.typos import add_instruction_typos
from dip_hf.dres.functional import coding_matrices
from dip_hf.environment import describe_environment, resolve_device
from dip_hf.loading import load_adapter, load_base
from dip_hf.model_files import check_base, check_model_folder
from dip_hf.noise import NoiseKey
from dip_hf.reasoning import FINETUNING
from dip_hf.reasoning.families import Level


GROUP_SIZE = 8
"""K of the reconstruction error, DReS's default."""


@dataclass(frozen=True)
class DiagnoseSettings:
    """What to measure and on what.

    Args:
        adapter: folder of an adapter, or of a whole model.
        base: what the adapter stands on: a folder, or a name on the Hub; None for the one in the adapter's config.
        output_dir: folder for diagnose.json and diagnose.png; None for `diagnose/NAME`.
        dataset: JSON Lines file with prompt and completion, instead of the reasoning suite.
        families: reasoning families; None for the fine-tuning ones.
        split: "validation" or "test".
        level: "standard" or "harder".
        limit: examples per family, or of `dataset`.
        batch_size: examples per pass.
        seed: of everything drawn, the suite's questions included.
        device: such as "cuda"; None for a CUDA device where there is one.
        noise_scales: of embedding noise.
        fgsm_scales: ε of FGSM.
        typo_rates: shares of instruction words with a typing error; None for 0.5 and 1. Not with `dataset`, in whose
            prompts it is not known which words an answer depends on.
        coded_sizes: every N of the reconstruction error, with K = 8; empty leaves it out.

    Raises:
        ValueError: a value that cannot work; names field, value and remedy. Nothing is loaded before.
    """

    adapter: str
    base: str | None = None
    output_dir: str | None = None
    dataset: str | None = None
    families: Sequence[str] | None = None
    split: Literal["validation", "test"] = "validation"
    level: Level = "standard"
    limit: int = 32
    batch_size: int = 16
    seed: int = 0
    device: str | None = None
    noise_scales: Sequence[float] = (0.1, 0.3, 1.0)
    fgsm_scales: Sequence[float] = (0.03, 0.1, 0.3)
    typo_rates: Sequence[float] | None = None
    coded_sizes: Sequence[int] = (10, 12, 16, 24)

    def __post_init__(self) -> None:
        if self.dataset is not None:
            suite = {"families": None, "split": "validation", "level": "standard", "typo_rates": None}
            given = [
                f"{name}={getattr(self, name)!r}" for name, unset in suite.items() if getattr(self, name) != unset
            ]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: of the reasoning suite, which dataset={self.dataset!r} replaces; give one."
                )
        if self.split not in ("validation", "test"):
            raise ValueError(f"split={self.split!r} must be validation or test: these are not trained on.")
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        resolve_device(self.device)
        check_scales("noise_scales", self.noise_scales)
        check_scales("fgsm_scales", self.fgsm_scales)
        if not all(0 < rate <= 1 for rate in self.typo_rates or ()):
            raise ValueError(
                f"typo_rates={list(self.typo_rates or ())} must lie in (0, 1]; without any is the row `none`."
            )
        for size in self.coded_sizes:
            try:
                coding_matrices(GROUP_SIZE, size)
            except ValueError as error:
                raise ValueError(f"coded_sizes={list(self.coded_sizes)}: {error}") from error
        folder = Path(self.folder).resolve()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"output_dir={self.folder!r}: {there} is a file; name a folder.")
        if not os.access(there, os.W_OK):
            raise ValueError(f"output_dir={self.folder!r}: {there} cannot be written; name another folder.")

    def rates(self) -> Sequence[float]:
        """Typo rates to measure."""
        if self.typo_rates is None:
            return (0.5, 1.0) if self.dataset is None else ()
        return self.typo_rates

    @property
    def folder(self) -> str:
        """Where the results go: of a run's checkpoint not under its number alone, which other runs have too."""
        adapter = Path(self.adapter).resolve()
        run = f"{adapter.parent.name}-" if re.fullmatch(r"checkpoint-\d+", adapter.name) else ""
        return self.output_dir or str(Path("diagnose") / (run + adapter.name))


def load_checkpoint(adapter: str, base: str | None, device: str) -> tuple[Any, Any]:
    """A model in fp32 and evaluation mode, and its tokenizer: the adapter folder's own, or else the base's.

    A base on the Hub is loaded at the revision in the adapter's config.

    Raises:
        ValueError: the folder is missing, damaged or pickled, names no base, or the base cannot be loaded.
    """
    revision = None
    is_adapter = (Path(adapter) / CONFIG_NAME).is_file()
    if is_adapter:
        check_adapter_folder(adapter)
        config = read_config(Path(adapter))
        base = base or config.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"adapter={adapter!r} names no base model in its {CONFIG_NAME}; give base.")
        check_base("base", base)
        revision = base_revision(config)
    elif not Path(adapter).is_dir():
        raise ValueError(f"adapter={adapter!r} is no folder: give the one that training wrote.")
    else:
        check_model_folder("adapter", adapter)
        if base is not None:
            raise ValueError(f"base={base!r}: {adapter!r} is a whole model and stands on no base; leave base out.")
    source = base or adapter
    try:
        model = load_base(source, dtype=torch.float32, revision=revision)
        own = (Path(adapter) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(
            adapter if own else source, revision=None if own else revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:  # a ValueError where code of the folder's own would have to run
        place = f"base={source!r} or the tokenizer in adapter={adapter!r}"
        raise ValueError(f"{place} cannot be loaded ({error}); give base, a folder or a name.") from error
    if is_adapter:
        model = load_adapter(model, adapter, tokens=len(tokenizer))
    return model.to(device).eval(), tokenizer


def diagnose(settings: DiagnoseSettings) -> dict[str, Any]:
    """Measure everything; writes nothing.

    Returns:
        What diagnose.json holds: `settings`, `environment`, `smoothness`, `reconstruction` (by N), `robustness` (by
        perturbation), `posterior` (empty without one).

    Raises:
        ValueError: data or a checkpoint that cannot be used; names field, value and remedy.
        ImportError: reasoning-gym or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: F401  # the picture needs it, and comes last
    except ImportError as error:
        raise ImportError("dip_hf.diagnostics needs matplotlib: install dip_hf with its extra 'eval'") from error

    if settings.dataset is not None:
        rows = file_rows(settings.dataset, settings.limit)
    else:
        families = [family.name for family in FINETUNING] if settings.families is None else settings.families
        rows = suite_rows(families, settings.split, settings.limit, settings.level, settings.seed)
    device = resolve_device(settings.device)
    model, tokenizer = load_checkpoint(settings.adapter, settings.base, device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # none with ALiBi
    batches = make_batches(rows, tokenizer, settings.batch_size, positions)
    key = NoiseKey(settings.seed)
    results = robustness(model, batches, noise_scales=settings.noise_scales, fgsm_scales=settings.fgsm_scales, key=key)
    for rate in settings.rates():
        misspelt = [{**row, "prompt": add_instruction_typos(row["prompt"], rate, settings.seed)} for row in rows]
        typos = robustness(
            model, make_batches(misspelt, tokenizer, settings.batch_size, positions), noise_scales=(), fgsm_scales=()
        )
        results[f"typos_{rate:g}"] = typos["none"]
    try:
        errors = reconstruction_errors(model, batches, settings.coded_sizes, group_size=GROUP_SIZE, key=key)
    except ValueError as error:
        raise ValueError(f"{error} Or give no coded_sizes, which leaves the reconstruction error out.") from error
    return {
        "settings": asdict(settings),
        "environment": describe_environment(device),
        "smoothness": smoothness(model, batches, key=key),
        "reconstruction": errors,
        "robustness": results,
        "posterior": posterior_distance(model),
    }


def to_text(result: dict[str, Any]) -> str:
    """The result as plain tables."""
    smooth = result["smoothness"]
    lines = [f"{int(smooth['examples'])} examples, loss {smooth['loss']:.4f} nats per token", ""]
    lines.append(f"{'with respect to the embeddings':32}{'mean':>11}{'max':>11}{'mean, rel.':>12}{'max, rel.':>12}")
    for name, label in (("gradient_norm", "gradient norm"), ("hessian_norm", "spectral norm of the Hessian")):
        values = [smooth[f"{prefix}{name}_{kind}"] for prefix in ("", "relative_") for kind in ("mean", "max")]
        lines.append(f"{label:32}" + "".join(f"{value:>{11 + (i > 1)}.4g}" for i, value in enumerate(values)))
    lines.append(f"rel.: in units of the embedding RMS, {smooth['embedding_rms']:.4g}, and of its square")
    if smooth["hessian_unconverged"]:
        lines.append(f"{int(smooth['hessian_unconverged'])} of the Hessians' norms are lower bounds (not converged)")
    if result["reconstruction"]:
        lines += ["", f"{'DReS reconstruction error':32}{'error':>11}{'linear':>11}"]
        for size, row in result["reconstruction"].items():
            lines.append(f"{f'N = {size}, K = {GROUP_SIZE}':32}{row['error']:>11.4f}{row['floor']:>11.4f}")
    if result["posterior"]:
        values = result["posterior"]
        lines += ["", f"{'posterior of LoRA A':32}{'W2':>11}{'relative':>11}"]
        lines.append(
            f"{'covariance, from its start':32}{values['covariance_distance']:>11.4g}"
            f"{values['relative_covariance_distance']:>11.4g}"
        )
        lines.append("relative: to the start's distance from a point; where the mean started is not in the file")
    lines += ["", f"{'perturbation of the prompt':32}{'exact':>11}{'NLL':>11}"]
    for name, row in result["robustness"].items():
        lines.append(f"{name.replace('_', ' '):32}{100 * row['exact_match']:>10.1f}%{row['nll']:>11.3f}")
    return "\n".join(lines)


def write(result: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write diagnose.json and diagnose.png into `folder`, both or none; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        parts = [Path(staging) / f"diagnose.{suffix}" for suffix in ("json", "png")]
        parts[0].write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(result, parts[1])
        return [part.replace(folder / part.name) for part in parts]
