"""DReS's term once more, in plain loops: no hooks, no batching, no matrices; one coded row or token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from dip_hf.dres.functional import coded_nodes, group_permutation, sample_nodes
from dip_hf.noise import NoiseKey


def spline(knots: np.ndarray, values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """scipy's natural cubic spline, continued by straight lines; values of shape (n, ...)."""
    order = np.argsort(knots)
    curve = CubicSpline(knots[order], values[order], bc_type="natural")
    inside = np.clip(points, knots.min(), knots.max())
    return np.stack([curve(i) + (p - i) * curve(i, 1) for p, i in zip(points, inside, strict=True)])


def code(samples: Tensor, size: int, decode: bool = False) -> Tensor:
    """(K, ...) to (N, ...), or back."""
    if decode:
        knots, points = coded_nodes(len(samples)), sample_nodes(size)
    else:
        knots, points = sample_nodes(len(samples)), coded_nodes(size)
    return torch.from_numpy(spline(knots.numpy(), samples.numpy(), points.numpy()))


def relative_error(outputs: Tensor, reconstruction: Tensor) -> float:
    """At one place: outputs and reconstruction of shape (K, d)."""
    size = len(outputs)
    distance = sum(float((f - g) @ (f - g)) for f, g in zip(outputs, reconstruction, strict=True)) / size
    mean = sum(outputs) / size
    variance = sum(float((f - mean) @ (f - mean)) for f in outputs) / (size - 1)
    return distance / variance


@torch.no_grad()
def sequence_error(model: Any, batch: dict[str, Tensor], chosen: range, k: int, n: int, key: NoiseKey) -> float:
    """Of an fp64 model with sdpa attention, whose last block is not in the range."""
    states = model(**batch, output_hidden_states=True).hidden_states
    inputs, outputs = states[chosen[0]], states[chosen[-1] + 1]
    rows, length = batch["input_ids"].shape
    positions = torch.arange(length)[None]
    order = group_permutation(key.tensor(), rows).tolist()
    errors = []
    for g in range(rows // k):
        group = [order[i * (rows // k) + g] for i in range(k)]
        valid = [all(batch["attention_mask"][row, t] for row in group) for t in range(length)]
        coded = torch.stack([code(inputs[group, t], n) for t in range(length)], 1)
        results = []
        for row in range(n):
            hidden = coded[row][None]
            for index in chosen:
                block = model.model.layers[index]
                layer_type = model.config.layer_types[index] if model.config.model_type == "gemma3_text" else None
                window = model.config.sliding_window if layer_type == "sliding_attention" else length
                mask = [[valid[j] and i - window < j <= i for j in range(length)] for i in range(length)]
                arguments = (hidden, positions, layer_type) if layer_type else (hidden, positions)
                hidden = block(
                    hidden,
                    attention_mask=torch.tensor(mask)[None, None],
                    position_embeddings=model.model.rotary_emb(*arguments),
                    position_ids=positions,
                )
            results.append(hidden[0])
        for t in range(length):
            if valid[t]:
                reconstruction = code(torch.stack([result[t] for result in results]), k, decode=True)
                errors.append(relative_error(outputs[group, t], reconstruction))
    return sum(errors) / len(errors)


@torch.no_grad()
def token_error(model: Any, batch: dict[str, Tensor], mlps: list[nn.Module], k: int, n: int, key: NoiseKey) -> float:
    seen: dict[nn.Module, Tensor] = {}
    handles = [mlp.register_forward_hook(lambda mlp, args, _: seen.update({mlp: args[0]})) for mlp in mlps]
    model(**batch, use_cache=False)  # with a cache, transformers does not see that rows are packed
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    valid = [(r, t) for r in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[r, t]]
    order = group_permutation(key.tensor(), len(valid)).tolist()
    groups = len(valid) // k
    errors = []
    for mlp in mlps:
        for g in range(groups):
            samples = torch.stack([seen[mlp][valid[order[i * groups + g]]] for i in range(k)])
            results = torch.stack([mlp(coded[None, None])[0, 0] for coded in code(samples, n)])
            outputs = torch.stack([mlp(sample[None, None])[0, 0] for sample in samples])
            errors.append(relative_error(outputs, code(results, k, decode=True)))
    return sum(errors) / len(errors)
