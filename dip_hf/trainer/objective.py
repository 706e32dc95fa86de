"""DIPNet's objective, Eq. 4 of arXiv 2506.04690, around a trainer's own task loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dip_hf.dipnet.functional import head_gram, output_variance, variance_penalty
from dip_hf.dipnet.layer import LogVariance, own_parameters, random_layers
from dip_hf.dipnet.model import DIPNetModel
from dip_hf.dipnet.trajectories import repeat_rows
from dip_hf.noise import NoiseKey
from dip_hf.trainer.config import DIPSFTConfig
from dip_hf.trainer.terms import Term, token_mean


class DIPNetObjective:
    """The parts of Eq. 4 that are not the task loss: penalty and stability.

    Args:
        model: a PEFT model with a DIPNet adapter.
        args: α, β, λ_s, m and the penalty's reduction and unit.
    """

    def __init__(self, model: PeftModel, args: DIPSFTConfig) -> None:
        self.model = model
        self.tuner: DIPNetModel = model.base_model
        self.args = args
        self._gram: Tensor | None = None

    def gram(self, head: Tensor) -> Tensor:
        """`head_gram` of the LM head's weight, computed once where that is frozen."""
        if self._gram is not None:
            return self._gram
        gram = head_gram(head.full_tensor() if isinstance(head, DTensor) else head)
        if not head.requires_grad:
            self._gram = gram
        return gram

    def is_random(self) -> bool:
        """Whether a pass in evaluation draws noise or samples, as adapters with `noise_in_eval` have it."""
        kept = [self.model.peft_config[name].noise_in_eval for name in self.tuner.active_adapters]
        return any(kept) and next(random_layers(self.tuner.model), None) is not None

    @contextmanager
    def scale_unchanged(self) -> Iterator[None]:
        """Noise whose scale is first measured inside has none again afterwards."""
        leaves = [module for module in self.model.modules() if isinstance(module, LogVariance)]
        unmeasured = [leaf for leaf in leaves if not leaf.is_measured and not leaf.rms.item() > 0]
        try:
            yield
        finally:
            for leaf in unmeasured:
                leaf.rms.zero_()
                leaf.is_measured = False

    def restore_precision(self, given: dict[str, Tensor]) -> None:
        """Make our parameters fp32 again: `SFTTrainer` casts the adapter of a quantised model to bf16.

        Args:
            given: copies of their values before the cast, by name; those that are new get their initial value.
        """
        for name, parameter in own_parameters(self.model).items():
            if parameter.dtype.itemsize < 4:
                leaf: Any = self.model.get_submodule(name.rpartition(".")[0])
                parameter.data = given.get(name, leaf.initial()).to(parameter.device, torch.float32)
        for module in self.model.modules():
            if isinstance(module, LogVariance):
                module.rms = module.rms.float()

    @contextmanager
    def sampling(self, key: NoiseKey) -> Iterator[DIPNetPass]:
        """Noise, posterior samples and trajectories for one forward pass, whose terms are read from what it yields."""
        with self.tuner.sampling(key, self.args.num_trajectories) as log_variances:
            record = DIPNetPass(self.args, log_variances, self.gram)
            if self.args.stability_weight == 0:
                yield record
                return
            base = self.tuner.model
            record.head = base.get_output_embeddings().weight
            with base.base_model.register_forward_hook(record.keep_hidden_states):
                yield record


def fold_labels(inputs: dict[str, Any], trajectories: int) -> dict[str, Any]:
    """The batch with its labels repeated m times, to meet outputs that are folded above the first random block."""
    if trajectories == 1:
        return inputs
    return {**inputs, "labels": repeat_rows(inputs["labels"], trajectories)}


class DIPNetPass:
    """What one forward pass leaves behind for the penalty and the stability term.

    Args:
        args: as for `DIPNetObjective`.
        log_variances: filled by the pass, see `DIPNetModel.sampling`.
        gram: `DIPNetObjective.gram`.
    """

    def __init__(
        self,
        args: DIPSFTConfig,
        log_variances: dict[int, tuple[Tensor, Tensor]],
        gram: Callable[[Tensor], Tensor],
    ) -> None:
        self.args = args
        self.log_variances = log_variances
        self.gram = gram
        self.hidden_states: Tensor | None = None
        self.head: Tensor | None = None

    def keep_hidden_states(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the backbone."""
        self.hidden_states = output.last_hidden_state

    def terms(
        self, labels: Tensor, num_items: Tensor | int | None, num_processes: int, accumulation_steps: int
    ) -> tuple[list[Term], dict[str, float]]:
        """Eq. 4's terms beside the task loss, and what to log beside them.

        Args:
            labels: of the unfolded batch, shape (batch, length), -100 where ignored.
            num_items: as for `token_mean`; None where TRL takes the mean over the micro-batch.
            num_processes: over how many processes `num_items` is counted.
            accumulation_steps: micro-batches over which it is counted.
        """
        terms: list[Term] = []
        values: dict[str, float] = {}
        if self.log_variances:  # there are none where the adapter has a posterior alone
            penalty, values = self.penalty()
            # Without learnable noise the penalty is a constant, which would only blur the logged loss.
            terms = [penalty] if penalty.value.requires_grad else []
        if self.args.stability_weight > 0:
            if num_items is None:
                num_processes, num_items = 1, (labels[:, 1:] != -100).sum()
            terms.append(self.stability(labels, num_items, num_processes, accumulation_steps))
        return terms, values

    def penalty(self) -> tuple[Term, dict[str, float]]:
        """Eq. 4's penalty as one term, and what to log beside it: its raw parts and each block's noise level.

        Noise levels are mean standard deviations relative to the RMS of the block's input.
        """
        device = next(iter(self.log_variances.values()))[0].device  # a model may be split over several
        relative = torch.stack([weight.to(device) for weight, _ in self.log_variances.values()])
        rho = relative
        if self.args.penalty_unit == "absolute":
            rho = relative + 2 * torch.stack([rms.to(device) for _, rms in self.log_variances.values()]).float().log()
        penalty, variance, log_variance = variance_penalty(
            rho, self.args.variance_weight, self.args.log_variance_weight, self.args.penalty_reduction
        )
        levels = (relative.detach() / 2).exp().mean(-1)
        values = torch.cat([torch.stack([variance, log_variance]).detach(), levels]).tolist()
        names = ["dipnet/variance", "dipnet/log_variance", *(f"dipnet/noise_{layer}" for layer in self.log_variances)]
        return Term("dipnet/penalty", penalty, 1.0), dict(zip(names, values, strict=True))

    def stability(self, labels: Tensor, num_items: Tensor | int, num_processes: int, accumulation_steps: int) -> Term:
        """Eq. 4's last term, a mean over the tokens whose prediction is trained.

        Args:
            labels: of the unfolded batch, shape (batch, length), -100 where ignored.
        """
        assert self.hidden_states is not None and self.head is not None  # set by the forward pass
        states = self.hidden_states[:, :-1]  # of a model that is split over devices, elsewhere than head and labels
        gram, valid = self.gram(self.head).to(states.device), (labels[:, 1:] != -100).to(states.device)
        total = output_variance(states, gram, valid, self.args.num_trajectories)
        return token_mean(
            "dipnet/stability", total, self.args.stability_weight, num_items, num_processes, accumulation_steps
        )
