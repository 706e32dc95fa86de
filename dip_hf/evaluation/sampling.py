"""The predictions averaged into one: noise or posterior samples, dropout samples, or an ensemble's members."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from dip_hf.dipnet import DIPNetModel
from dip_hf.ibvi.functional import average_log_probabilities
from dip_hf.loading import check_loaded_whole
from dip_hf.noise import NoiseKey, derive_seed
from dip_hf.peft_compat import LoraLayer


class Sampler(ABC):
    """Makes a forward pass yield k predictions per row of a batch.

    Attributes:
        num_samples: k.
        copies: how often the input rows must be repeated, sample-major; 1 where the model repeats them itself.
    """

    num_samples: int
    copies: int

    @abstractmethod
    def sampling(self, key: NoiseKey) -> AbstractContextManager[Any]:
        """A context in which forward passes are sampled under `key`."""

    def arguments(self, batch: int) -> dict[str, Any]:
        """What the model's forward pass and `generate` are to be given besides `batch` rows, repeated."""
        return {}

    def log_probabilities(self, model: nn.Module, key: NoiseKey, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """One sampled forward pass: log of the averaged next-token probabilities.

        Args:
            model: the one that the sampler was made for.
            key: of the samples.
            input_ids: shape (batch, length).
            inputs: further arguments of the model, one row each, such as `attention_mask`.

        Returns:
            As `average_log_probabilities`, shape (batch, length, vocabulary).
        """
        rows = {name: value.repeat(self.copies, 1) for name, value in {"input_ids": input_ids, **inputs}.items()}
        with torch.no_grad(), self.sampling(key):
            logits = model(**rows, **self.arguments(len(input_ids))).logits
        return average_log_probabilities(logits, self.num_samples)


@contextmanager
def averaged_outputs(model: nn.Module, sampler: Sampler) -> Iterator[None]:
    """Forward passes inside give logits of the averaged next-token probabilities in the place of their own.

    They are normalised as the samples' logits are in the mean, so that equal samples give what one of them gives: a
    repetition penalty, for one, depends on where zero is. Of the last position alone, and once for each copy of a
    row: `generate` and every processor of scores in it see as many rows as they gave, and all copies agree on a token.

    Args:
        model: the one that `generate` calls, inside of PEFT's.
        sampler: of the passes, in its `sampling` context.
    """

    def average(module: nn.Module, inputs: Any, output: Any) -> None:
        last = output.logits[:, -1:].float()
        normaliser = last.logsumexp(-1, keepdim=True).unflatten(0, (sampler.num_samples, -1)).mean(0)
        averaged = average_log_probabilities(last, sampler.num_samples) + normaliser
        output.logits = averaged.repeat(sampler.copies, 1, 1)

    with model.register_forward_hook(average):
        yield


class NoiseSampler(Sampler):
    """Samples of a DIPNet adapter's noise and of its posterior, folded into the batch from the first random block on.

    The posterior's k samples are the same in every pass, so that likelihoods, generations and their tokens come from
    the same k models; the noise is new under every key.

    Args:
        model: with an active DIPNet adapter.
        num_samples: k ≥ 1.
        seed: of the posterior's samples.

    Raises:
        ValueError: the model has no such adapter, or one with neither noise nor a posterior.
    """

    copies = 1

    def __init__(self, model: nn.Module, num_samples: int, seed: int) -> None:
        tuner = getattr(model, "base_model", model)  # a PeftModel's, compiled or not; a plain model's decoder
        if not isinstance(tuner, DIPNetModel):
            raise ValueError(
                f"num_samples={num_samples} needs a model with a DIPNet adapter, and {type(tuner).__name__} has "
                "neither noise nor a posterior: give peft=ADAPTER with a DIPNet adapter, dropout=True for a LoRA "
                "adapter's dropout, or num_samples=0"
            )
        self._tuner = tuner
        self.num_samples = num_samples
        self._posterior_key = NoiseKey(seed)
        with self.sampling(NoiseKey(seed)):  # refuses an adapter without anything random
            pass

    def sampling(self, key: NoiseKey) -> AbstractContextManager[Any]:
        """The tuner's own context, for passes whose outputs are averaged."""
        return self._tuner.sampling(
            key, trajectories=self.num_samples, posterior_key=self._posterior_key, averaged=True
        )


class DropoutSampler(Sampler):
    """LoRA with its dropout on (MC dropout, arXiv 1506.02142): every copy of a row has masks of its own.

    torch's dropout can draw from the global generators only, so they are forked and seeded for each pass, and left as
    they were.

    Args:
        model: with LoRA layers that have dropout.
        num_samples: k ≥ 1.

    Raises:
        ValueError: `num_samples` < 1, no LoRA layer has dropout, or a device that is neither a CPU nor CUDA's.
    """

    def __init__(self, model: nn.Module, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"dropout=True with num_samples={num_samples}: give the number of samples, at least 1")
        self._dropouts = [
            dropout
            for layer in model.modules()
            if isinstance(layer, LoraLayer)
            for dropout in layer.lora_dropout.values()
            if isinstance(dropout, nn.Dropout)
        ]
        if not self._dropouts:
            raise ValueError(
                f"dropout=True needs a LoRA adapter trained with lora_dropout > 0, and {type(model).__name__} has no "
                "such layer: give one, or leave dropout out"
            )
        self._device = next(model.parameters()).device
        if self._device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"dropout=True on device={str(self._device)!r}, whose masks would depend on more than the seed: use "
                "the CPU or a CUDA device"
            )
        self.num_samples = self.copies = num_samples

    @contextmanager
    def sampling(self, key: NoiseKey) -> Iterator[None]:
        """The masks are a function of `key`, the shapes and the device's kind."""
        seed = derive_seed(key.tensor(), 0, 0)
        on_gpu = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                with torch.cuda.device(self._device):
                    torch.cuda.manual_seed(seed)
            for dropout in self._dropouts:
                dropout.train()
            try:
                yield
            finally:
                for dropout in self._dropouts:
                    dropout.eval()


def make_sampler(model: nn.Module, num_samples: int, dropout: bool, seed: int = 0) -> Sampler | None:
    """What samples one model: its dropout where `dropout` is set, else its noise and posterior; None for 0 samples.

    Args:
        model: with what is to be sampled.
        num_samples: k; 0 without `dropout` is a plain pass.
        dropout: sample LoRA's dropout.
        seed: of a posterior's samples.

    Raises:
        ValueError: there is nothing to sample, or dropout without a number of samples.
    """
    if dropout:
        return DropoutSampler(model, num_samples)
    return NoiseSampler(model, num_samples, seed) if num_samples > 0 else None


class Ensemble(Sampler):
    """Several LoRA adapters on one base, one per copy of the batch (PEFT's mixed batches).

    Args:
        model: with the first member loaded.
        folders: of the other members, at least one.
    """

    def __init__(self, model: PeftModel, folders: Sequence[str]) -> None:
        self._names = [model.active_adapter]
        for index, folder in enumerate(folders, start=1):
            self._names.append(f"member_{index}")
            result = model.load_adapter(folder, adapter_name=self._names[-1], torch_device=str(model.device))
            check_loaded_whole(model, result, folder)
        model.eval()
        self.num_samples = self.copies = len(self._names)

    def sampling(self, key: NoiseKey) -> AbstractContextManager[Any]:
        """Members are not random."""
        return nullcontext()

    def arguments(self, batch: int) -> dict[str, Any]:
        """Which adapter each of the k · batch rows is for."""
        return {"adapter_names": [name for name in self._names for _ in range(batch)]}
