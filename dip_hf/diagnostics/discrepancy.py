"""DReS's reconstruction error of a trained model, whether or not it was trained with DReS (arXiv 2510.00253)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dip_hf.diagnostics.passes import DEFAULT_KEY, EmbeddingPass, prepare_batches
from dip_hf.dipnet.plain_pass import noise_free
from dip_hf.dres import DReSBranch, DReSOptions
from dip_hf.dres.functional import affine_error, coding_matrices
from dip_hf.noise import NoiseKey


def reconstruction_errors(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    coded_sizes: Sequence[int] = (10, 12, 16, 24),
    *,
    group_size: int = 8,
    key: NoiseKey = DEFAULT_KEY,
) -> dict[int, dict[str, float]]:
    """Relative reconstruction error of valid tokens through the MLPs of the last quarter of the blocks, noise-free.

    Args:
        model: a transformers or PEFT model in fp32, on one device.
        batches: dicts with `input_ids`, `attention_mask` and `labels`.
        coded_sizes: every N to measure, each ≥ K and not 2K·j + 1.
        group_size: K.
        key: seed of the groups, which are the same for every N.

    Returns:
        By N: `error`, see `dip_hf.dres.functional.reconstruction_error`, the mean over groups and blocks; and
        `floor`, what a linear MLP would give.

    Raises:
        ValueError: no batches, none with K tokens, a model whose MLPs cannot be coded, or an N that cannot work.
    """
    for size in coded_sizes:
        coding_matrices(group_size, size)  # refuses before anything runs
    forward = EmbeddingPass(model)
    branches = {
        size: DReSBranch(forward.base, DReSOptions(group_size=group_size, oversampling=size / group_size, share=1.0))
        for size in coded_sizes
    }
    totals = dict.fromkeys(coded_sizes, 0.0)
    groups = 0
    with noise_free(model), torch.no_grad():
        for index, batch in enumerate(prepare_batches(batches, forward.device)):
            embeddings = forward.embeddings(batch)
            for size, branch in branches.items():
                with branch.attached(key._replace(step=key.step + index), batch.valid) as record:
                    forward.logits(batch, embeddings)
                totals[size] += record.error.item() * record.groups
            groups += record.groups if branches else 0
    if branches and not groups:
        raise ValueError(f"batches: no batch has group_size={group_size} tokens; give longer or larger ones.")
    return {size: {"error": totals[size] / groups, "floor": affine_error(group_size, size)} for size in coded_sizes}
