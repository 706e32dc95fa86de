"""The loss of one step with DReS and ICP, written out: what the trainer's gradients are compared with.

It has no hooks that stay, no wrapped loss and no scales of the trainer's; matrices, permutations and the updates'
formulas, which have oracles of their own in tests/dres and tests/icp, are shared with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn import functional as F

from dip_hf.dres.functional import coding_matrices, group_permutation
from dip_hf.noise import NoiseKey
from tests.trainer.tiny import STEADY, base_model, losses, make_trainer


BLOCKS = range(1, 3)
"""The coded blocks: `dres_blocks="2"` of a model of three."""
LAYER_WEIGHTS = [math.cos(i / 2 * math.pi / 4) for i in range(3)]
"""ICP compares all three blocks."""


def steady_trainer(folder: Path, adapter: PeftConfig | None, options: dict[str, Any], **kwargs: Any) -> Any:
    return make_trainer(folder, adapter, {**options, **STEADY}, base_model().double(), **kwargs)


def recorded_step(folder: Path, adapter: PeftConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    """The last step's gradient and logged loss, and the micro-batches and keys it came from, on this rank."""
    trainer = steady_trainer(folder, adapter, options)
    compute_loss, noise_key = trainer.compute_loss, trainer._noise_key
    batches: list[dict[str, Tensor]] = []
    keys: list[NoiseKey] = []

    def record(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        batches.append({name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)})
        return compute_loss(model, inputs, *args, **kwargs)

    def record_key() -> NoiseKey:
        keys.append(noise_key())
        return keys[-1]

    trainer.compute_loss, trainer._noise_key = record, record_key
    trainer.train()
    steps = trainer.args.gradient_accumulation_steps
    found = {**trainer.kept.steps[-1], "loss": torch.tensor(losses(trainer)[-1])}
    return {"gradients": found, "batches": batches[-steps:], "keys": [tuple(key) for key in keys[-steps:]]}


def by_hand(
    folder: Path,
    adapter: PeftConfig | None,
    options: dict[str, Any],
    batches: list[dict[str, Tensor]],
    keys: list[tuple[int, ...]],
) -> dict[str, Tensor]:
    """Gradient and value of task + μ · mean of errors + w (1 - a) · mean over tokens, a = cos(π/4) at half the run.

    Args:
        batches: the step's micro-batches, of all ranks.
        keys: the key of each.
    """
    model = steady_trainer(folder, adapter, options).model.eval()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.__dict__.pop("forward", None)  # TRL's fused head
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    task, error, features, tokens = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for batch, key in zip(batches, keys, strict=True):
        here, states = summed_loss(base, batch)
        task = task + here
        if options.get("dres_weight"):
            of = sequence_error if options.get("dres_placement") == "sequence" else token_error
            share = options.get("dres_share", 0.5)
            error = error + of(base, batch, states, options["dres_group_size"], share, NoiseKey(*key))
        if options.get("icp_weight"):
            total, count = feature_total(base, batch, here, states, options["icp_epsilon"])
            features, tokens = features + total, tokens + count
    loss = task / labels + options.get("dres_weight", 0) * error / len(batches)
    loss = loss + options.get("icp_weight", 0) * (1 - math.cos(math.pi / 4)) * features / tokens.clamp(min=1)
    loss.backward()
    return {**{n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "loss": loss.detach()}


def summed_loss(
    base: Any, batch: dict[str, Tensor], replace: Callable[[Tensor], Tensor] = lambda embedded: embedded
) -> tuple[Tensor, list[Tensor]]:
    """Cross-entropy summed over label tokens; the embeddings and every block's output, before the final norm."""
    states: list[Tensor] = []
    handle = base.model.embed_tokens.register_forward_hook(
        # with a frozen embedding a leaf, to have a gradient
        lambda module, args, output: replace(output if output.requires_grad else output.detach().requires_grad_())
    )
    handles = [base.model.layers[0].register_forward_pre_hook(lambda block, args: states.append(args[0]))]
    for block in base.model.layers:
        handles.append(block.register_forward_hook(lambda block, args, output: states.append(output)))
    names = ("input_ids", "attention_mask", "position_ids")
    logits = base(**{name: batch[name] for name in names if name in batch}, use_cache=False).logits[:, :-1]
    for each in [handle, *handles]:
        each.remove()
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"), states


def valid_tokens(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def relative_error(outputs: Tensor, coded: Tensor) -> Tensor:
    """Per place, from f(x), shape (K, ..., d), and f(coded), shape (N, ..., d)."""
    decoder = coding_matrices(len(outputs), len(coded))[1]
    distance = (outputs - torch.einsum("kn,n...->k...", decoder, coded)).square().sum(-1).mean(0)
    return distance / outputs.var(0).sum(-1)


def token_error(
    base: Any, batch: dict[str, Tensor], states: list[Tensor], k: int, share: float, key: NoiseKey
) -> Tensor:
    """`states` serve for the blocks' inputs, from which each MLP's input is computed once more."""
    seen: dict[int, Tensor] = {}
    handles = [
        base.model.layers[i].mlp.register_forward_pre_hook(lambda mlp, args, i=i: seen.update({i: args[0]}))
        for i in BLOCKS
    ]
    summed_loss(base, batch)
    for handle in handles:
        handle.remove()
    mask = valid_tokens(batch)
    groups = int(mask.sum()) // k
    order = group_permutation(key.tensor(), int(mask.sum()))[: k * groups].view(k, groups)
    order = order[:, : math.ceil(share * groups)]
    encoder = coding_matrices(k, math.ceil(1.25 * k))[0]
    errors = []
    for i in BLOCKS:
        mlp, samples = base.model.layers[i].mlp, seen[i][mask][order]
        errors.append(relative_error(mlp(samples), mlp(torch.einsum("nk,k...->n...", encoder, samples))).mean())
    return torch.stack(errors).mean()


def sequence_error(
    base: Any, batch: dict[str, Tensor], states: list[Tensor], k: int, share: float, key: NoiseKey
) -> Tensor:
    rows, length = batch["input_ids"].shape
    order = group_permutation(key.tensor(), rows)[: rows // k * k].view(k, -1)
    places = valid_tokens(batch)[order].all(0).sum() / order.shape[1]  # a group, on average over all groups
    order = order[:, : math.ceil(share * order.shape[1])]
    encoder = coding_matrices(k, math.ceil(1.25 * k))[0]
    valid = valid_tokens(batch)[order].all(0)  # (G, length)
    coded = torch.einsum("nk,k...->n...", encoder, states[BLOCKS[0]][order])
    mask = (valid[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()).repeat(len(coded), 1, 1, 1)
    hidden, positions = coded.flatten(0, 1), torch.arange(length)[None]
    for i in BLOCKS:
        rotary = base.model.rotary_emb(hidden, positions)
        hidden = base.model.layers[i](hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    errors = relative_error(states[BLOCKS[-1] + 1][order], hidden.unflatten(0, (len(coded), -1)))
    return errors[valid].sum() / (order.shape[1] * places)


def feature_total(
    base: Any, batch: dict[str, Tensor], loss: Tensor, states: list[Tensor], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Sum over the compared tokens, and their number: one normalised step from the embeddings."""
    (g,) = torch.autograd.grad(loss, states[0], retain_graph=True)
    g = g / g.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    rms = states[0].detach().square().mean(-1, keepdim=True).sqrt()
    shift = -epsilon * rms * g / g.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    mask = valid_tokens(batch)
    shift = shift * mask[..., None]
    with torch.no_grad():
        _, teacher = summed_loss(base, batch, lambda embedded: embedded + shift)
    if "position_ids" in batch:
        compared = mask & (batch["position_ids"] != 0)
    else:
        compared = mask & (torch.arange(mask.shape[1]) > 0)  # padded on the right
    total = torch.zeros((), dtype=torch.float64)
    for weight, h, target in zip(LAYER_WEIGHTS, states[1:], teacher[1:], strict=True):
        relative = (h - target).square().sum(-1) / target.square().sum(-1)
        total = total + weight * relative[compared].sum()
    return total, compared.sum()
