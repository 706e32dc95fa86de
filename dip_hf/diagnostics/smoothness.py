"""Input-gradient norm and spectral norm of the input Hessian, which DIPNet's theorems bound and its paper does not
measure (arXiv 2506.04690, Theorems 1 to 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dip_hf.diagnostics.functional import spectral_norms, teacher_forced
from dip_hf.diagnostics.passes import DEFAULT_KEY, EmbeddingPass, prepare_batches
from dip_hf.dipnet.plain_pass import noise_free
from dip_hf.noise import NoiseKey


_START = int.from_bytes(b"power", "little")  # keeps the start vector's seed apart from every other


def smoothness(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    key: NoiseKey = DEFAULT_KEY,
) -> dict[str, float]:
    """First and second derivatives of each example's loss with respect to its input embeddings, noise-free.

    The loss is the mean of -ln p over an example's labelled tokens, in nats, and its input the embeddings of all its
    tokens together, a vector of length · d numbers. The Hessian's norm is its largest absolute eigenvalue, by power
    iteration with Hessian-vector products, all examples of a batch at once. `relative_` values are in units of the
    example's own embedding RMS, s: the gradient times s, the Hessian times s², comparable between models whose
    embeddings differ in scale.

    Needs a second derivative of attention: `attn_implementation` "sdpa", here with its plain ("math") kernel, or
    "eager". Gradients, training flags and global generators stay as they were.

    Args:
        model: a transformers or PEFT model in fp32, on one device.
        batches: dicts with `input_ids`, `attention_mask` and `labels` (-100 where not trained).
        max_iterations: Hessian-vector products per batch at most.
        tolerance: as for `spectral_norms`.
        key: seed of the start vectors.

    Returns:
        `examples`; `loss`, `embedding_rms` (means); `gradient_norm_mean`, `gradient_norm_max`, `hessian_norm_mean`,
        `hessian_norm_max` over examples, and each with `relative_` in front; `hessian_iterations` (most of any
        batch), `hessian_unconverged` (number of examples whose value is only a lower bound).

    Raises:
        ValueError: no batches, a malformed one, weights narrower than fp32, an attention without second derivative,
            or a value out of range.
    """
    forward = EmbeddingPass(model)
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("loss", "embedding_rms", "gradient_norm", "hessian_norm", "converged")
    }
    iterations = 0
    with noise_free(model), torch.enable_grad(), forward.twice_differentiable():
        for batch in prepare_batches(batches, forward.device):
            site = forward.embeddings(batch).requires_grad_()
            answers = teacher_forced(forward.logits(batch, site), batch.labels)
            loss = answers.nll / answers.tokens
            # Rows do not meet, so the gradient of the sum is each row's own, and the Hessian is block-diagonal
            (gradient,) = torch.autograd.grad(loss.sum(), site, create_graph=True)

            def product(vector: Tensor, gradient: Tensor = gradient, site: Tensor = site) -> Tensor:
                return torch.autograd.grad(gradient, site, vector, retain_graph=True)[0]

            start = batch.noise(site, key, _START).to(site.dtype)
            norms = spectral_norms(product, start, max_iterations, tolerance)
            iterations = max(iterations, norms.iterations)
            squares = site.detach().square().mean(-1).where(batch.valid, 0).sum(1) / batch.valid.sum(1)
            columns["loss"].append(loss.detach())
            columns["embedding_rms"].append(squares.sqrt())
            columns["gradient_norm"].append(gradient.detach().flatten(1).norm(dim=1))
            columns["hessian_norm"].append(norms.values)
            columns["converged"].append(norms.converged)
    values = {name: torch.cat(parts).double() for name, parts in columns.items()}
    unit = values["embedding_rms"]
    report = {
        "examples": float(len(unit)),
        "loss": values["loss"].mean().item(),
        "embedding_rms": unit.mean().item(),
    }
    for name, order in (("gradient_norm", 1), ("hessian_norm", 2)):
        for prefix, column in (("", values[name]), ("relative_", values[name] * unit**order)):
            report[f"{prefix}{name}_mean"] = column.mean().item()
            report[f"{prefix}{name}_max"] = column.max().item()
    report["hessian_iterations"] = float(iterations)
    report["hessian_unconverged"] = float((values["converged"] == 0).sum())
    return report
