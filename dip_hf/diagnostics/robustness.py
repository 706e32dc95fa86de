"""Teacher-forced accuracy and NLL of a model whose prompt is perturbed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dip_hf.diagnostics.functional import Answers, add_relative_noise, fgsm, teacher_forced
from dip_hf.diagnostics.passes import DEFAULT_KEY, EmbeddingPass, prepare_batches
from dip_hf.dipnet.plain_pass import noise_free
from dip_hf.noise import NoiseKey


_NOISE = int.from_bytes(b"robust", "little")  # keeps this noise's seed apart from every other


def check_scales(field: str, scales: Sequence[float]) -> None:
    """
    Raises:
        ValueError: a scale is not positive and finite; names the field.
    """
    for scale in scales:
        if not 0 < scale < float("inf"):
            raise ValueError(f"{field}={list(scales)}: {scale} must be positive and finite; 0 is the row `none`.")


def robustness(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    noise_scales: Sequence[float] = (0.1, 0.3, 1.0),
    fgsm_scales: Sequence[float] = (0.03, 0.1, 0.3),
    key: NoiseKey = DEFAULT_KEY,
) -> dict[str, dict[str, float]]:
    """Score the labelled tokens under perturbed embeddings of the prompt; the model itself is noise-free.

    Only tokens in front of an example's first label are perturbed: what is answered after a disturbed prompt, and no
    perturbation of the answer's own tokens, which greedy generation would not see and which FGSM would write the
    answer into. Lengths are relative to each token's own embedding RMS. One draw of noise per example serves all
    scales. FGSM takes one step up the unperturbed loss's gradient.

    Gradients, training flags and global generators stay as they were. For typos, score batches that were made of
    prompts from `add_instruction_typos`.

    Args:
        model: a transformers or PEFT model in fp32, on one device.
        batches: dicts with `input_ids`, `attention_mask` and `labels` (-100 where not trained).
        noise_scales: standard deviations of Gaussian noise.
        fgsm_scales: ε of FGSM.
        key: seed of the noise.

    Returns:
        For "none", "noise_0.1", "fgsm_0.03" and so on: `exact_match`, the share of examples whose every labelled
        token is the argmax, and `nll`, nats per answer (its end included), the mean over examples.

    Raises:
        ValueError: no batches, a malformed one, an example without a prompt, weights narrower than fp32, or a scale
            out of range.
    """
    check_scales("noise_scales", noise_scales)
    check_scales("fgsm_scales", fgsm_scales)
    forward = EmbeddingPass(model)
    scores: dict[str, list[Answers]] = {}

    def note(name: str, answers: Answers) -> None:
        scores.setdefault(name, []).append(Answers(*(part.detach() for part in answers)))

    with noise_free(model):
        for batch in prepare_batches(batches, forward.device):
            prompt = batch.prompt()
            if not prompt.any(1).all():
                row = batch.first + int(prompt.any(1).long().argmin())
                raise ValueError(
                    f"batches: example {row} has no prompt (tokens labelled -100 in front of its answer)."
                )
            clean = forward.embeddings(batch)
            with torch.set_grad_enabled(bool(fgsm_scales)):
                site = clean.clone().requires_grad_(bool(fgsm_scales))
                answers = teacher_forced(forward.logits(batch, site), batch.labels)
                note("none", answers)
                if fgsm_scales:
                    (gradient,) = torch.autograd.grad(answers.nll.sum(), site)
            perturbed = {}
            noise = batch.noise(clean, key, _NOISE).to(clean.dtype)
            for scale in noise_scales:
                perturbed[f"noise_{scale:g}"] = add_relative_noise(clean, noise, prompt, scale)
            for scale in fgsm_scales:
                perturbed[f"fgsm_{scale:g}"] = fgsm(clean, gradient, prompt, scale)
            with torch.no_grad():
                for name, embeddings in perturbed.items():
                    note(name, teacher_forced(forward.logits(batch, embeddings), batch.labels))
    return {
        name: {
            "exact_match": torch.cat([part.match for part in parts]).double().mean().item(),
            "nll": torch.cat([part.nll for part in parts]).double().mean().item(),
        }
        for name, parts in scores.items()
    }
