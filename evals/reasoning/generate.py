"""Writes this folder's YAML files from the families in dip_hf.reasoning: `python evals/reasoning/generate.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

from dip_hf.reasoning import FINETUNING, PRETRAINING, UNSEEN, Family


# Group -> its families, their level, and what the group stands for.
GROUPS: dict[str, tuple[tuple[Family, ...], str, str]] = {
    "standard": (
        FINETUNING,
        "standard",
        "The fine-tuning families at the level of training, on other questions.",
    ),
    "harder": (FINETUNING, "harder", "The same families with longer inputs, or with numbers that lie closer."),
    "unseen": (UNSEEN, "standard", "Families that neither the base nor an adapter is trained on."),
    "pretraining": (PRETRAINING, "standard", "The embedded base's own families: what fine-tuning made it forget."),
}
# Families whose answers are several lines long, and so cannot stop at a line's end.
MULTI_LINE = ("rotate_matrix", "manipulate_matrix")


def task_yaml(group: str, family: str, level: str) -> str:
    """Return the YAML of one family's task in one group."""
    lines = [
        "include: ../_task_yaml",
        f"task: dip_{group}_{family}",
        f"dataset_kwargs: {{family: {family}, level: {level}}}",
    ]
    if family in MULTI_LINE:
        lines.append('generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 64, do_sample: false}')
    return "\n".join(lines) + "\n"


def group_yaml(group: str, families: tuple[Family, ...], meaning: str) -> str:
    """Return the YAML of one group, whose accuracy is the unweighted mean over its families."""
    tasks = "".join(f"  - dip_{group}_{family.name}\n" for family in families)
    aggregate = "aggregate_metric_list:\n  - metric: exact_match\n    weight_by_size: false\n"
    return f"# {meaning}\ngroup: dip_reasoning_{group}\ntask:\n{tasks}{aggregate}metadata:\n  version: 1.0\n"


def write_tasks(root: Path) -> None:
    """Replace the groups' folders under `root`."""
    for group, (families, level, meaning) in GROUPS.items():
        folder = root / group
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / f"dip_reasoning_{group}.yaml").write_text(group_yaml(group, families, meaning), encoding="utf-8")
        for family in families:
            text = task_yaml(group, family.name, level)
            (folder / f"{family.name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tasks(Path(__file__).parent)
