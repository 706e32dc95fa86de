"""benchmarks/overhead.py measures a tiny model; no time is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
M2, M4 = "DIPNet m=2 from 0.5 of the depth", "DIPNet m=4 from 0.5 of the depth"


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    """benchmarks/overhead.py, which finds its neighbour interleaved.py as a script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import overhead
    finally:
        sys.path.remove(str(BENCHMARKS))
    return overhead


def test_rows_of_a_tiny_shape(overhead: ModuleType) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    shape = overhead.Shape("tiny", config, 2, 8, torch.float32)
    arms = {arm.name: arm for arm in overhead.ARMS}
    chosen = (overhead.ARMS[0], arms[M2], arms[M4])
    rows = overhead.measure(shape, chosen, rounds=2, builds=1, device=torch.device("cpu"))

    assert [row["name"] for row in rows] == [f"tiny: {arm.name}" for arm in chosen]
    for row in rows:
        assert {"time_ratio", "memory_ratio", "floor", "floor_with_head"} <= set(row)
        assert row["time_ratio"] > 0
    lora, two, four = rows
    # Half of the blocks once, the other half m times: (1 + m)/2
    assert (lora["floor"], two["floor"], four["floor"]) == (1, 1.5, 2.5)
    assert lora["time_ratio"] == lora["memory_ratio"] == 1
    assert lora["floor_with_head"] == pytest.approx(1)
    # (1 - h) f + h k with one h > 0, the head's share, and k = m
    assert (four["floor_with_head"] - 2.5) / 1.5 == pytest.approx((two["floor_with_head"] - 1.5) / 0.5)
    assert two["floor_with_head"] > 1.5
    assert four["memory_ratio"] > two["memory_ratio"] > 1


def test_the_noise_starts_where_the_floor_says(overhead: ModuleType) -> None:
    arms = {arm.name: arm for arm in overhead.ARMS}
    for shape in (shape for shapes in overhead.PRESETS.values() for shape in shapes):
        for m, name in ((2, M2), (4, M4)):
            noised = arms[name].adapter(shape)["noise_blocks"]
            assert (shape.depth - noised + m * noised) / shape.depth == arms[name].floor(shape)


@pytest.mark.parametrize("options", [["--shape", "nope"], ["--arm", "nope"], ["--rounds", "1"], ["--builds", "0"]])
@pytest.mark.parametrize("name", ["overhead.py", "prediction.py"])
def test_options_that_measure_nothing(name: str, options: list[str], tmp_path: Path) -> None:
    if name == "prediction.py" and options[0] == "--arm":
        options = ["--samples", "0"]
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / name), *options, "--json", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there must be" in done.stderr or "has such a name" in done.stderr
    assert not rows.exists()
