"""Saved checkpoints, and a batch with prompts and answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.dipnet.conftest import base  # noqa: F401  # pytest finds fixtures by their names here
from tests.dipnet.models import VOCABULARY
from tests.evaluation.conftest import base_folder, dipnet_folder, lora_folder  # noqa: F401


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three examples of 9, 7 and 5 tokens, padded on the right; the last 3, 2 and 2 tokens are the answers."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (length, answer) in enumerate([(9, 3), (7, 2), (5, 2)]):
        mask[row, :length] = 1
        labels[row, length - answer : length] = ids[row, length - answer : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
