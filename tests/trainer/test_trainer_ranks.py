"""Two ranks (gloo, launched by torchrun) against one: the same gradient, and noise of each rank's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dip_hf import DIPNetConfig
from tests.trainer import two_ranks
from tests.trainer.by_hand import by_hand
from tests.trainer.methods import EVERY_MEAN, METHODS
from tests.trainer.test_every_method import applicable, every_method, whole_batch
from tests.trainer.tiny import ADAPTER, assert_close, mean_of_two_rows


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's results for every method."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(two_ranks.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launch, two_ranks.__file__, str(folder)], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


@every_method
def test_same_gradient(name: str, ranks: list[dict[str, Any]]) -> None:
    """Two ranks with two micro-batches each, of unequal token counts, give one rank's gradient and logged loss."""
    applicable(name, "ranks")
    assert_close(ranks[0][name]["gradients"], whole_batch(name))


def test_tokens_that_are_not_counted_over_ranks(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """With `average_tokens_across_devices=False`, or without a count, a step is the mean of the ranks' own."""
    expected = mean_of_two_rows(tmp_path, DIPNetConfig(**ADAPTER), EVERY_MEAN)
    for name in ("own count", "no count"):
        assert_close(ranks[0][name], expected)


@every_method
def test_own_noise(name: str, ranks: list[dict[str, Any]]) -> None:
    """On the same data, ranks see the same block inputs without noise, and different ones with it."""
    first, second = (rank[name]["noised"] for rank in ranks)
    assert torch.equal(first, second) != METHODS[name].noisy


@pytest.mark.parametrize("name", ["dres token", "dres sequence", "full, dres + icp"])
def test_groups_of_each_rank(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Where groups are drawn per micro-batch and rank, the gradient is the one computed by hand with the same keys."""
    method = METHODS[name]
    recorded = [rank[name]["step"] for rank in ranks]
    keys = [key for step in recorded for key in step["keys"]]
    assert [key[2:] for key in keys] == [(0, 0), (1, 0), (0, 1), (1, 1)]  # (micro-step, rank)
    batches = [batch for step in recorded for batch in step["batches"]]
    expected = by_hand(tmp_path, method.config(), method.options, batches, keys)
    assert_close(recorded[0]["gradients"], expected)
