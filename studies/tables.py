"""A comparison as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dip_hf.evaluation.tables import markdown
from studies.compare import Comparison, Measure, Row, shown_difference
from studies.plan import cells
from studies.results import Results
from studies.spec import Arm, Study
from studies.summary import summary


_UNITS = {"accuracy": "%", "nll": "nats per answer", "ece": "%"}
_SETS = {
    "standard": "the trained families",
    "harder": "the trained families at harder settings",
    "unseen": "families that nobody trained on",
    "pretraining": "the pretraining families (forgetting)",
}


def study_section(results: Results, comparisons: Sequence[Comparison], pictures: dict[int, str]) -> str:
    """One study: what was run and on what, and per size the tables.

    Args:
        results: its finished cells.
        comparisons: one per size with a finished cell.
        pictures: path of each size's picture, relative to the report.
    """
    parts = [f"## {results.study.name}", _progress(results), _where(results)]
    for comparison in comparisons:
        parts.append(f"### {comparison.size:,} examples per family")
        parts.append(f"![Differences to {results.study.reference}]({pictures[comparison.size]})")
        parts.append(summary(comparison, results.study))
        parts += [_measure_table(comparison, measure, results.study) for measure in comparison.rows]
        parts += [_calibration(comparison, name) for name in comparison.discrimination]
        parts += [_robustness(comparison, results.study), _smoothness(comparison, results.study)]
        parts += [_reconstruction(comparison), _posterior(comparison), _settings(comparison, results.study)]
    return "\n\n".join(part for part in parts if part)


def _progress(results: Results) -> str:
    """How much is finished, and by name what is not."""
    study = results.study
    wanted = [(cell.arm.name, cell.size, cell.seed) for cell in cells(study)]
    missing = [place for place in wanted if place not in results.lines]
    text = f"{len(wanted) - len(missing)} of {len(wanted)} cells are finished."
    if results.stale:
        text += f" {results.stale} finished cells of an earlier declaration are left out."
    if not missing or len(missing) == len(wanted):
        return text
    counts: dict[str, int] = {}
    for arm, size, _ in missing:
        place = arm if size is None else f"{arm} ({size:,})"
        counts[place] = counts.get(place, 0) + 1
    pending = ", ".join(f"{place}: {count} seed{'s' * (count > 1)}" for place, count in counts.items())
    return f"{text} **Pending:** {pending}."


def _where(results: Results) -> str:
    """Base, families, device, versions, commit."""
    study = results.study
    text = (
        f"Base `{study.model}`; families {', '.join(study.families)}; seeds {', '.join(map(str, study.seeds))}; "
        f"reference **{study.reference}**; {_choice(study)}. Scored on the {study.evaluation.split} split."
    )
    places: dict[str, int] = {}
    for line in results.lines.values():
        environment = line["environment"]
        packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
        place = f"device {environment['device']}, Python {environment['python']}, {packages}, "
        place += f"commit {environment['commit']}"
        places[place] = places.get(place, 0) + 1
    return "\n".join([text, "", *(f"- {count} cells: {place}" for place, count in places.items())])


def _choice(study: Study) -> str:
    """How many settings each arm could choose from; all that choose have the same number."""
    trials = max(len(arm.trials) for arm in study.arms)
    if trials == 1:
        return "settings given, none chosen"
    given = [arm.name for arm in study.arms if len(arm.trials) == 1 and not arm.untrained]
    text = f"{trials} trials per arm, chosen with seeds {', '.join(map(str, study.selection.seeds))}"
    return text + (f" (settings given for {', '.join(given)})" if given else "")


def _measure_table(comparison: Comparison, measure: Measure, study: Study) -> str:
    header = ("arm", "seeds", measure.what, "difference", "95% interval", "seeds above", "p (Holm)", "verdict")
    lines = [_measure_line(row, measure, study.reference) for row in comparison.rows[measure]]
    title = f"**{measure.what.upper() if measure.what != 'accuracy' else 'Accuracy'}** in {_UNITS[measure.what]} on "
    shown = shown_difference(comparison.rows[measure])
    power = (
        "" if shown is None else f". A difference of {shown:.{_digits(measure)}f} would be shown four times of five"
    )
    return f"{title}{_SETS[measure.task_set]}{power}\n\n{markdown([header, *lines], right=(1, 2, 3, 6))}"


def _digits(measure: Measure) -> int:
    return 3 if measure.what == "nll" else 1


def _measure_line(row: Row, measure: Measure, reference: str) -> tuple[str, ...]:
    digits = _digits(measure)
    if row.mean is None:
        return (row.arm, "0", "", "", "", "", "", "pending")
    mean = f"{row.mean:.{digits}f}" + ("" if row.spread is None else f" ± {row.spread:.{digits}f}")
    if row.difference is None or row.p is None:
        return (row.arm, str(row.seeds), mean, "", "", "", "", "reference" if row.arm == reference else "")
    own = row.difference
    return (
        row.arm,
        str(row.seeds),
        mean,
        f"{own.value:+.{digits}f}",
        f"[{own.low:+.{digits}f}, {own.high:+.{digits}f}]",
        f"{own.higher} of {own.seeds}",
        f"{row.p:.4f}" if row.p < 0.1 else f"{row.p:.2f}",
        row.verdict(measure),
    )


def _calibration(comparison: Comparison, task_set: str) -> str:
    """NLL, ECE, confidence, Brier score and AUROC of all arms side by side."""
    header = (
        "arm",
        "NLL",
        "difference, 95%",
        "ECE %",
        "difference, 95%",
        "by chance",
        "confidence %",
        "Brier",
        "AUROC",
    )
    pairs = zip(*(comparison.rows[Measure(task_set, what)] for what in ("nll", "ece")), strict=True)
    lines = []
    for nll, ece in pairs:
        own = comparison.discrimination[task_set][nll.arm]
        likelihood, error = _calibration_cells(nll, 3), _calibration_cells(ece, 1)
        others = (
            _probe(own.get("chance"), 100, 1),
            _probe(own.get("confidence"), 100, 1),
            _probe(own.get("brier"), 1, 3),
            _probe(own.get("auroc"), 1, 3),
        )
        lines.append((nll.arm, *likelihood, *error, *others))
    title = f"**Calibration** on {_SETS[task_set]}"
    return f"{title}\n\n{markdown([header, *lines], right=range(1, len(header)))}"


def _calibration_cells(row: Row, digits: int) -> tuple[str, str]:
    """Mean, and difference with its interval."""
    mean = "pending" if row.mean is None else f"{row.mean:.{digits}f}"
    own = row.difference
    if own is None:
        return mean, ""
    return mean, f"{own.value:+.{digits}f} [{own.low:+.{digits}f}, {own.high:+.{digits}f}]"


def _robustness(comparison: Comparison, study: Study) -> str:
    names = _probe_names(comparison, "robustness ", " exact_match")
    if not names:
        return ""
    header = ("arm", *(name.split()[1].replace("_", " ") for name in names))
    items = study.evaluation.probe_items * len(study.families)
    text = (
        f"**Robustness**: teacher-forced exact match in % on {items} items under perturbed prompts (noise and FGSM "
        "relative to the RMS)"
    )
    return f"{text}\n\n{_probe_table(comparison, header, names, 100, 1)}"


def _smoothness(comparison: Comparison, study: Study) -> str:
    header = ("gradient norm mean", "gradient norm max", "hessian norm mean", "hessian norm max")
    names = [f"smoothness relative_{name.replace(' ', '_')}" for name in header]
    if not any(names[0] in own for own in comparison.probes.values()):
        return ""
    items = study.evaluation.smoothness_items * len(study.families)
    text = (
        f"**Smoothness** of the loss of {items} items in the embeddings, in units of their RMS (spectral norm of the "
        "Hessian)"
    )
    return f"{text}\n\n{_probe_table(comparison, ('arm', *header), names, 1, 3)}"


def _reconstruction(comparison: Comparison) -> str:
    names = _probe_names(comparison, "reconstruction ", " error")
    if not names:
        return ""
    header = ("arm", *(f"N = {name.split()[1]}" for name in names))
    text = (
        "**Reconstruction**: DReS's relative error in %, of groups of 8 tokens from N coded ones through the MLPs of "
        "the last quarter of the blocks, on the items of smoothness. The first row's is a linear map's, in the mean "
        "over groups; far below it MLPs are as good as constant"
    )
    floors = [name.replace(" error", " floor") for name in names]
    first = next(own for own in comparison.probes.values() if floors[0] in own)
    linear = ("a linear map", *(_probe((first[name][0], None), 100, 2) for name in floors))
    return f"{text}\n\n{_probe_table(comparison, header, names, 100, 2, linear)}"


def _posterior(comparison: Comparison) -> str:
    header = ("spread at the start", "spread", "W2 of the covariances", "in units of the start")
    names = ["start_spread", "spread", "covariance_distance", "relative_covariance_distance"]
    names = [f"posterior {name}" for name in names]
    if not any(names[0] in own for own in comparison.probes.values()):
        return ""
    text = "**Posterior**: how far IBVI's has moved from its start, all layers together"
    return f"{text}\n\n{_probe_table(comparison, ('arm', *header), names, 1, 3)}"


def _probe_table(
    comparison: Comparison,
    header: tuple[str, ...],
    names: Sequence[str],
    scale: float,
    digits: int,
    *more: tuple[str, ...],
) -> str:
    """The arms that have the first of `names`, a column each, below the rows of `more`."""
    lines = [
        *more,
        *(
            (arm, *(_probe(own.get(name), scale, digits) for name in names))
            for arm, own in comparison.probes.items()
            if names[0] in own
        ),
    ]
    return markdown([header, *lines], right=range(1, len(header)))


def _settings(comparison: Comparison, study: Study) -> str:
    lines = []
    for arm in study.arms:
        setting, cost = comparison.settings[arm.name], comparison.costs[arm.name]
        words = "pending" if setting is None else _words(setting)
        tried = [_trial(arm, *pair) for pair in enumerate(comparison.trials.get(arm.name, []))]
        lines.append((arm.name, words, "; ".join(tried), "" if cost is None else f"{cost:.2f}"))
    header = ("arm", "chosen", "tried: exact match in % and NLL on the validation split", f"time / {study.reference}")
    return f"**Settings and cost** in training time\n\n{markdown([header, *lines], right=(3,))}"


def _trial(arm: Arm, index: int, score: dict[str, float | None]) -> str:
    nll = "diverged" if score["nll"] is None else f"{score['nll']:.2f}"
    return f"{_words(arm.trials[index])}: {100 * (score['exact_match'] or 0):.1f}, {nll}"


def _words(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in overrides.items())


def _probe_names(comparison: Comparison, prefix: str, suffix: str) -> list[str]:
    names = dict.fromkeys(name for own in comparison.probes.values() for name in own)
    return [name for name in names if name.startswith(prefix) and name.endswith(suffix)]


def _probe(value: tuple[float, float | None] | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    mean, spread = value
    return f"{scale * mean:.{digits}f}" + ("" if spread is None else f" ± {scale * spread:.{digits}f}")
