"""lm-eval's model "hf-dip": a Hugging Face model under an adapter, whose predictions may be averages over samples.

Prediction (arXiv 2506.04690, 2505.20235): by default the noise-free pass, by the posterior's mean; alternatively the
outputs of k samples are averaged. "Outputs" are taken to be next-token probabilities, given the tokens so far (this
project's choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import dip_hf  # noqa: F401  # registers the DIPNet adapter with PEFT, for stock `--model hf` too
from dip_hf.dipnet.plain_pass import draws_in_eval, noise_free
from dip_hf.evaluation.sampling import Ensemble, Sampler, averaged_outputs, make_sampler
from dip_hf.loading import load_adapter
from dip_hf.noise import NoiseKey


try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("dip_hf.evaluation needs lm-eval: install dip_hf with its extra 'eval'") from error


_DRAWN = ("do_sample", "num_beams")
"""Ways to generate that an average of samples has not."""
_LETTER = "x"  # stands for a text that another one continues


class NextSampling(LogitsProcessor):
    """Keeps a sampling context open, and exchanges it for the next one after every token of a generation.

    A context draws the same noise again under the same key, and a new token needs new noise. Scores stay as they are.

    Args:
        open_sampling: from the token's index to a sampling context.
    """

    def __init__(self, open_sampling: Callable[[int], AbstractContextManager[Any]]) -> None:
        self._open_sampling = open_sampling
        self._stack = ExitStack()
        self._tokens = 0

    def __enter__(self) -> NextSampling:
        self._stack.enter_context(self._open_sampling(0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Go on to the next token; returns `scores`."""
        self._tokens += 1
        self._stack.close()
        self._stack.enter_context(self._open_sampling(self._tokens))
        return scores


@register_model("hf-dip")
class DIPLM(HFLM):
    """lm-eval's `hf` model, whose predictions may be averaged over samples or made at a temperature.

    `lm_eval --model hf-dip --model_args pretrained=BASE,peft=ADAPTER,num_samples=10`; every argument of `hf` works.

    Args:
        pretrained: as in `hf`: a folder, a name on the Hub, or a loaded model.
        num_samples: k samples of a DIPNet adapter's noise and posterior, or of dropout, whose probabilities are
            averaged. 0 is `hf` itself, but noise-free and by the posterior's mean where an adapter was saved with
            `noise_in_eval=True` too; generated texts keep a leading space with every tokenizer, probabilities are in
            float32, and an adapter finds its base with all rows of the vocabulary that it was trained with.
        noise_seed: samples are a function of this seed; those of noise and dropout, of the order of calls too.
        dropout: sample a LoRA adapter's dropout.
        temperature: logits are divided by it; greedy generation stays as it is.
        **kwargs: as in `hf`, but `revision` is the base's alone, and an adapter on the Hub is that of its main branch.
            `peft` may name several LoRA adapters, `A+B+C`, whose probabilities are averaged.

    Attributes:
        cut_prompts: of the requests so far, those longer than the model's context, of which it read the end only.

    Raises:
        ValueError: `num_samples` < 0, or > 0 without anything to sample; `temperature` ≤ 0; or two kinds of averages,
            or an average and a temperature, at once.
    """

    _model: Any

    def __init__(
        self,
        pretrained: Any,
        num_samples: int = 0,
        noise_seed: int = 0,
        dropout: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(num_samples, int) or num_samples < 0:
            raise ValueError(f"num_samples={num_samples} must be 0 (a plain pass) or how many to average over")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be positive and finite; 1 changes nothing")
        member, *others = (kwargs.pop("peft", None) or "").split("+")
        averages = [bool(others), num_samples > 0 or dropout, temperature != 1.0]
        if sum(averages) > 1:
            raise ValueError(
                f"peft with {len(others) + 1} adapters, num_samples={num_samples}, dropout={dropout} and "
                f"temperature={temperature}: an ensemble, samples and a temperature cannot be combined; choose one"
            )
        kwargs.setdefault("softmax_dtype", "float32")  # bfloat16's step next to 1 is 0.4 %; averages are in float32
        super().__init__(pretrained=pretrained, peft=member or None, **kwargs)
        self.num_samples = num_samples
        self.noise_seed = noise_seed
        self.temperature = temperature
        self.cut_prompts: set[str] = set()
        self._calls = 0
        self._sampler: Sampler | None
        if others:
            self._sampler = Ensemble(self.model, others)
        else:
            self._sampler = make_sampler(self.model, num_samples, dropout, noise_seed)
        # Asked once, since it goes through all modules
        self._plain_pass: Callable[[], AbstractContextManager[None]] = (
            partial(noise_free, self.model) if draws_in_eval(self.model) else nullcontext
        )

    def _create_model(
        self, pretrained: str, revision: str | None = "main", peft: str | None = None, **kwargs: Any
    ) -> None:
        """As `hf`'s, which would cut a base with more rows of embeddings than its tokenizer has tokens (Qwen2.5 and
        Gemma 3 have some to spare) before the adapter is loaded, and so refuse an adapter with a head of its own."""
        if kwargs.get("delta"):  # which cannot be had together, as `hf` says
            super()._create_model(pretrained, revision=revision, peft=peft, **kwargs)
            return
        super()._create_model(pretrained, revision=revision, **kwargs)
        if peft is not None:
            self._model = load_adapter(self._model, peft, tokens=len(self.tokenizer))
            # `hf` goes on to tie the head to the embeddings again, of which the adapter may have brought its own
            for module in self._model.modules():  # a text model inside of another has a config of its own
                if isinstance(module, PreTrainedModel):
                    module.config.tie_word_embeddings = False

    def _next_key(self) -> NoiseKey:
        self._calls += 1
        return NoiseKey(self.noise_seed, step=self._calls, rank=self.rank)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `hf`'s, which cuts the prompts of generations here."""
        tokens, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        if left_truncate_len is not None and tokens.shape[1] == left_truncate_len:
            self.cut_prompts.update(text for text in strings if len(self.tok_encode(text)) > left_truncate_len)
        return tokens, mask

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As `hf`'s, which cuts the prompts of choices here."""
        room = self.max_length + 1  # the last token is predicted only
        self.cut_prompts.update(
            texts[0] for texts, prompt, answer in requests if texts is not None and len(prompt) + len(answer) > room
        )
        return super()._loglikelihood_tokens(requests, disable_tqdm, **kwargs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """As `hf`'s, over the temperature; averages are log-probabilities. Shape (batch, length, vocabulary)."""
        sampler = self._sampler
        if sampler is None:
            with self._plain_pass():
                logits = super()._model_call(inps, attn_mask, labels)
            return logits if self.temperature == 1.0 else logits.float() / self.temperature
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return sampler.log_probabilities(self.model, self._next_key(), inps)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As `hf`'s, greedy where samples are averaged. Token indices of shape (batch, length).

        What the base's generation settings do to scores, such as a repetition penalty, they do to the average.

        Raises:
            ValueError: sampled tokens or beams are asked of an average, or at a temperature.
        """
        sampler = self._sampler
        is_drawn = generation_kwargs.get("do_sample") or generation_kwargs.get("num_beams", 1) > 1
        if is_drawn and (sampler is not None or self.temperature != 1.0):
            asked = [f"{name}={generation_kwargs[name]}" for name in _DRAWN if name in generation_kwargs]
            raise ValueError(
                f"{', '.join(asked)}: with num_samples={self.num_samples} and a model at temperature="
                f"{self.temperature} answers are generated greedily; leave these out, or predict by one plain pass"
            )
        if sampler is None:
            with self._plain_pass():
                return super()._model_generate(context, max_length, stop, **generation_kwargs)
        batch, copies = context.shape[0], sampler.copies
        if "attention_mask" in generation_kwargs:
            generation_kwargs["attention_mask"] = generation_kwargs["attention_mask"].repeat(copies, 1)
        key = self._next_key()
        # Where the model folds the samples into the batch itself, blocks have caches of different batch sizes: those
        # below the first random block hold each row once.
        sampling = NextSampling(lambda token: sampler.sampling(key._replace(micro_step=token)))
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        with averaged_outputs(inner, sampler), sampling:
            generated = super()._model_generate(
                context.repeat(copies, 1),
                max_length,
                stop,
                logits_processor=LogitsProcessorList([sampling]),
                **sampler.arguments(batch),
                **generation_kwargs,
            )
        return generated[:batch]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """As `hf`'s; a generated text keeps its leading space, which SentencePiece's decoders take for their own."""
        if not isinstance(tokens, list) or not self._drops_space:
            return super().tok_decode(tokens, skip_special_tokens)
        head = self.tok_encode(_LETTER, add_special_tokens=False)
        text: str = super().tok_decode(head + tokens, skip_special_tokens)
        return text.removeprefix(super().tok_decode(head, skip_special_tokens))

    @cached_property
    def _drops_space(self) -> bool:
        """Whether the tokenizer decodes the end of "x x" without its space, as Llama 2's and Mistral's do."""
        return super().tok_decode(self._continuation(f" {_LETTER}")) == _LETTER

    def _continuation(self, text: str) -> list[int]:
        """Tokens of a text behind others: without the space that some tokenizers put in front of every text."""
        head, both = (self.tok_encode(part, add_special_tokens=False) for part in (_LETTER, _LETTER + text))
        if both[: len(head)] == head:
            return both[len(head) :]
        return self.tok_encode(text, add_special_tokens=False)  # its beginning merges with a letter before it

    def answer_log_probabilities(
        self, answers: Sequence[tuple[str, str, Sequence[str]]], disable_tqdm: bool = False
    ) -> list[float]:
        """ln of the probability that a sampled continuation of a prompt is exactly this answer.

        An answer ends with the end-of-text token, as training completions do, or with one of the task's stop
        sequences; the probabilities of its ends are added. The answer is taken in the tokens that the tokenizer makes
        of prompt and answer together, as in training.

        Args:
            answers: prompt, answer, and the stop sequences of the task.
            disable_tqdm: show no progress bar.

        Returns:
            One number ≤ 0 per answer.
        """
        requests, owners = [], []
        for index, (prompt, answer, until) in enumerate(answers):
            prompt_tokens, answer_tokens = self._encode_pair(prompt, answer)
            for end in self._ends(until):
                requests.append((None, prompt_tokens, answer_tokens + end))
                owners.append(index)
        totals = [-math.inf] * len(answers)
        values = self._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)
        for index, (value, _) in zip(owners, values, strict=True):
            low, high = sorted((totals[index], value))
            totals[index] = high + math.log1p(math.exp(low - high)) if math.isfinite(high) else high
        return [min(total, 0.0) for total in totals]  # rounding may leave the sum of certain ends above 1

    def _ends(self, until: Sequence[str]) -> list[list[int]]:
        """Token sequences that end an answer, none the beginning of another, so that they exclude each other."""
        encoded = [self._continuation(stop) for stop in until]
        ends: list[list[int]] = []
        for end in sorted([[self.eot_token_id], *encoded], key=len):
            if end and not any(end[: len(other)] == other for other in ends):
                ends.append(end)
        return ends
