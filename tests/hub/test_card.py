"""The model card: what it says, and that no value can break out of its place in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dip_hf.hub.card import code, max_rank, methods_on, prose, render_card, vllm_refusal
from dip_hf.hub.results import Line, Results
from dip_hf.hub.run import FinishedRun


DIPNET = {"noise_blocks": "all", "noise_scale": 0.1, "learn_noise": True, "r": 20, "variational_rank": 0}
NASTY = "{{ 7*7 }} {% raw %} <script>x</script> | `b``c` **d** [e](f) \n---\n# g\n```\n~~~ ![h](i) $j$ &amp; \\"


def run(kind: str = "DIPNET", adapter: dict[str, Any] | None = None, **changes: Any) -> FinishedRun:
    values: dict[str, Any] = {
        "folder": Path("run"),
        "kind": kind,
        "adapter": DIPNET if adapter is None else adapter,
        "training": {"dres_weight": 0.0, "icp_weight": 0.0, "num_trajectories": 2},
        "environment": {},
        "base_model": "you/base",
        "datasets": ("you/data",),
    }
    return FinishedRun(**{**values, **changes})


def test_only_methods_that_were_on_are_named_and_cited() -> None:
    alone = render_card(run(), "you/run", lora="lora")
    assert "2506.04690" in alone and "| `num_trajectories` | `2` |" in alone and "| `noise_scale` | `0.1` |" in alone
    for other in ("2510.00253", "2505.14751", "2505.20235"):
        assert other not in alone
    training = {"dres_weight": 0.5, "dres_group_size": 8, "icp_weight": 0.2, "icp_steps": 3}
    adapter = {**DIPNET, "variational_rank": 4, "noise_blocks": []}
    others = render_card(run(adapter=adapter, training=training), "you/run", lora="lora")
    assert "2506.04690" not in others
    for own in ("2510.00253", "2505.14751", "2505.20235", "| `variational_rank` | `4` |", "| `icp_steps` | `3` |"):
        assert own in others
    assert methods_on(run("LORA", {"r": 8})) == []
    assert "No regulariser of dip_hf was on." in render_card(run("LORA", {"r": 8}), "you/run", lora="")


@pytest.mark.parametrize("kind", ["LORA", "model"])
def test_what_no_record_says_was_trained_here_is_not_said_to_be(kind: str) -> None:
    adapter = {"r": 8} if kind == "LORA" else {}
    recorded, plain = (
        render_card(run(kind, adapter, training=training), "you/run", lora="" if kind == "LORA" else None)
        for training in ({}, None)
    )
    for word in ("`DIPSFTTrainer`", "\n- trl\n", "\n- sft\n", "\n- dip_hf\n", "github.com/huggingface/trl"):
        assert word in recorded and word not in plain
    assert ("A `LORA` adapter for `you/base`.\n" if kind == "LORA" else "`you/base` fine-tuned whole.\n") in plain


def test_it_says_how_to_load_three_ways() -> None:
    text = render_card(run(), "you/run", lora="lora")
    assert "import dip_hf" in text
    assert 'PeftModel.from_pretrained(base, "you/run", subfolder="lora")' in text
    assert "vllm serve you/base --enable-lora --max-lora-rank 32 --lora-modules run=run/lora" in text
    card = ModelCard(text)
    assert card.data.library_name == "peft" and card.data.base_model == "you/base"
    assert card.data.get("base_model_relation") == "adapter"


def test_where_no_copy_was_made_it_says_how_to_make_one() -> None:
    """The card that a trainer leaves in its run's folder."""
    text = render_card(run(), "you/run", lora=None)
    assert "`dip-hf export-lora` makes a plain LoRA copy" in text and "noise alone" not in text
    alone = {**DIPNET, "target_modules": "dummy-target-modules"}
    assert "holds noise alone" in render_card(run(adapter=alone), "you/run", lora=None)


def test_only_names_on_the_hub_are_linked_as_data(tmp_path: Path) -> None:
    names = ("you/data", "number_sorting", str(tmp_path / "mine.jsonl"))
    text = render_card(run(datasets=names), "you/run", lora="lora")
    assert ModelCard(text).data.datasets == ["you/data"]
    assert "**Data:** `you/data`, `number_sorting`, `mine.jsonl`." in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("adapter", "rank", "refusal"),
    [
        ({"r": 8}, 8, None),
        ({"r": 8, "rank_pattern": {"q": 65}}, 65, None),
        ({"r": 600}, 600, "ranks up to 512"),
        ({"r": 8, "use_dora": True}, 8, "`use_dora`"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, 8, "`modules_to_save`"),
        ({"r": 8, "bias": "all"}, 8, "biases"),
        ({"r": 8, "monteclora_config": {}}, 8, None),
        ({"r": 8, "monteclora_config": {"buffer_size": 4}}, 8, "`monteclora_config`"),
    ],
)
def test_what_vllm_serves(adapter: dict[str, Any], rank: int, refusal: str | None) -> None:
    assert max_rank(adapter) == rank
    found = vllm_refusal(adapter)
    assert found is None if refusal is None else found is not None and refusal in found
    text = render_card(run("LORA", adapter), "you/run", lora="")
    assert ("vllm serve" in text) == (refusal is None)


def test_nothing_in_a_value_is_read_as_a_template_or_as_markup() -> None:
    results = Results(
        checkpoint=NASTY,
        reference=NASTY,
        lines=(Line(NASTY, 3, NASTY, 50.0, None, (1.0, 0.0, 2.0)),),
        report={
            "settings": {"limit": 3, "split": NASTY},
            "checkpoints": [{"name": NASTY, "cut_prompts": NASTY}],
            "task_sets": [],
            "tasks": [{"items": 3}],
        },
        picture=None,
    )
    adapter = {**DIPNET, "noise_blocks": NASTY, f"noise_{NASTY}": NASTY}
    text = render_card(run(adapter=adapter, datasets=(NASTY,)), "you/run", results, "lora", tags=[NASTY])
    card = ModelCard(text)
    assert NASTY in (card.data.tags or []) and card.data.datasets is None
    body = MarkdownIt("commonmark").enable("table").parse(card.text)
    plain = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(ModelCard(render_card(run(), "you/run", results_of("x"), "lora")).text)
    )
    kinds = [token.type for token in body if not token.type.startswith(("tr_", "td_", "inline", "tbody"))]
    assert kinds == [token.type for token in plain if not token.type.startswith(("tr_", "td_", "inline", "tbody"))]
    inner = [child for token in body if token.type == "inline" for child in token.children or []]
    assert not any(child.type in ("html_inline", "image", "strong_open") and "x" in child.content for child in inner)
    assert {child.attrs.get("href") for child in inner if child.type == "link_open"}.isdisjoint({"f", "i"})
    assert not any(child.type == "image" for child in inner)
    assert "49" not in card.text


def results_of(name: str) -> Results:
    line = Line(name, 3, name, 50.0, None, (1.0, 0.0, 2.0))
    settings = {"limit": 3, "split": "validation"}
    report = {"settings": settings, "checkpoints": [{"name": name}], "task_sets": [], "tasks": [{"items": 3}]}
    return Results(name, name, (line,), report, None)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
@example(NASTY)
@example("`")
@example("a|b")
def test_code_and_prose_give_the_value_back(value: str) -> None:
    """In a table's cell each is one cell, of one piece of code, or of plain text."""
    line = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", value).strip()
    for rendered, kind in ((code(value), "code_inline"), (prose(value), "text")):
        table = f"| a | b |\n|---|---|\n| {rendered} | end |\n"
        tokens = MarkdownIt("commonmark").enable("table").parse(table)
        cells = [token for token in tokens if token.type == "inline"]
        assert len(cells) == 4, rendered
        children = cells[2].children or []
        if line:
            assert {child.type for child in children} <= {kind, "text_special"}, rendered
            assert "".join(child.content for child in children).strip() == line
