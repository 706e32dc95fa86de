"""lm-eval's model "hf-dip": a Hugging Face model under a DIPNet adapter, noise-free or averaged over trajectories.

Prediction (arXiv 2506.04690): by default the noise-free pass; alternatively the outputs of k sampled trajectories are
averaged. "Outputs" are taken to be next-token probabilities, given the tokens so far (this project's choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import dip_hf  # noqa: F401  # registers the DIPNet adapter with PEFT, for stock `--model hf` too
from dip_hf.dipnet import DIPNetModel
from dip_hf.noise import NoiseKey


try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("dip_hf.evaluation needs lm-eval: pip install 'dip_hf[eval]'") from error


def average_log_probabilities(logits: Tensor, trajectories: int) -> Tensor:
    """Log of the mean over trajectories of the next-token probabilities: logsumexp_j log_softmax(logits_j) - ln k.

    Args:
        logits: shape (k · batch, ..., vocabulary), trajectory-major: row j · batch + b is trajectory j of row b.
        trajectories: k ≥ 1.

    Returns:
        Normalised log-probabilities in fp32, shape (batch, ..., vocabulary).
    """
    folded = logits.view(trajectories, -1, *logits.shape[1:])
    return folded.log_softmax(dim=-1, dtype=torch.float32).logsumexp(dim=0) - math.log(trajectories)


class TrajectoryAverage(LogitsProcessor):
    """Makes k copies of a batch under generation, each with noise of its own, agree on every token.

    As a context manager it keeps a noise-sampling context open, and exchanges it for the next one after every token:
    `sampling` draws the same noise again under the same key, and a new token needs new noise.

    Args:
        open_sampling: from the token's index to a sampling context.
        trajectories: k.
    """

    def __init__(self, open_sampling: Callable[[int], Any], trajectories: int) -> None:
        self._open_sampling = open_sampling
        self._trajectories = trajectories
        self._stack = ExitStack()
        self._tokens = 0

    def __enter__(self) -> TrajectoryAverage:
        self._stack.enter_context(self._open_sampling(0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Replace scores, shape (k · batch, vocabulary), trajectory-major, by their average, repeated k times."""
        self._tokens += 1
        self._stack.close()
        self._stack.enter_context(self._open_sampling(self._tokens))
        return average_log_probabilities(scores, self._trajectories).repeat(self._trajectories, 1)


@register_model("hf-dip")
class DIPLM(HFLM):
    """lm-eval's `hf` model with one addition: predictions may be averaged over sampled noise trajectories.

    `lm_eval --model hf-dip --model_args pretrained=BASE,peft=ADAPTER,trajectories=8`; every argument of `hf` works.

    Args:
        pretrained: as in `hf`: a folder, a name on the Hub, or a loaded model.
        trajectories: k. 0 is `hf` itself, noise-free unless the adapter was saved with `noise_in_eval=True`.
        noise_seed: the noise is a function of this seed and of the order of the calls.
        **kwargs: as in `hf`.

    Raises:
        ValueError: `trajectories` < 0, or > 0 without a DIPNet adapter that adds noise.
    """

    def __init__(self, pretrained: Any, trajectories: int = 0, noise_seed: int = 0, **kwargs: Any) -> None:
        if trajectories < 0:
            raise ValueError(f"trajectories={trajectories} must be 0 (noise-free) or the number to average over")
        super().__init__(pretrained=pretrained, **kwargs)
        self.trajectories = trajectories
        self.noise_seed = noise_seed
        self._calls = 0
        if trajectories > 0:
            with self._sampling(NoiseKey(noise_seed), 1):  # refuses an adapter without noise
                pass

    def _sampling(self, key: NoiseKey, trajectories: int) -> Any:
        tuner = getattr(self.model, "base_model", None)  # of a plain model too: its decoder
        if not isinstance(tuner, DIPNetModel):
            raise ValueError(
                f"trajectories={self.trajectories} needs a model with a DIPNet adapter, and "
                f"{type(tuner if tuner is not None else self.model).__name__} has no noise: give peft=ADAPTER with a "
                "DIPNet adapter, or trajectories=0"
            )
        return tuner.sampling(key, trajectories=trajectories)

    def _next_key(self) -> NoiseKey:
        self._calls += 1
        return NoiseKey(self.noise_seed, step=self._calls, rank=self.rank)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """As `hf`'s; averaged over trajectories these are log-probabilities. Shape (batch, length, vocabulary)."""
        if self.trajectories == 0:
            return super()._model_call(inps, attn_mask, labels)
        with self._sampling(self._next_key(), self.trajectories):
            logits = super()._model_call(inps, attn_mask, labels)
        return average_log_probabilities(logits, self.trajectories)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As `hf`'s, greedy where trajectories are averaged. Token indices of shape (batch, length)."""
        if self.trajectories == 0:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        if generation_kwargs.get("do_sample") or generation_kwargs.get("num_beams", 1) > 1:
            raise ValueError(
                f"trajectories={self.trajectories} generates greedily, got generation_kwargs {generation_kwargs}: "
                "remove do_sample and num_beams, or set trajectories=0"
            )
        # The copies are rows of the batch from the first token on: a cache has one batch size for all blocks, so that
        # folding from the first noised block on, as in training, is not possible here.
        if "attention_mask" in generation_kwargs:
            generation_kwargs["attention_mask"] = generation_kwargs["attention_mask"].repeat(self.trajectories, 1)
        key = self._next_key()
        average = TrajectoryAverage(lambda token: self._sampling(key._replace(micro_step=token), 1), self.trajectories)
        with average:
            generated = super()._model_generate(
                context.repeat(self.trajectories, 1),
                max_length,
                stop,
                logits_processor=LogitsProcessorList([average]),
                **generation_kwargs,
            )
        return generated[: context.shape[0]]
