"""ICP's perturbation and teacher, by hooks on a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dip_hf.block_call import BlockCall
from dip_hf.blocks import find_decoder_blocks
from dip_hf.icp.features import (
    ICPRecord,
    evenly_spaced,
    keep_outputs,
    watch_backbone,
    watch_block,
    watch_output,
)
from dip_hf.icp.functional import (
    compared_tokens,
    feature_loss,
    layer_weights,
    perturbation_step,
    perturbed_tokens,
    random_shift,
)
from dip_hf.icp.options import ICPOptions
from dip_hf.noise import NoiseKey
from dip_hf.second_pass import Surroundings, block_output, fit_mask


_LOSS_SCALES = (2.0**12, 1.0, 2.0**-12)
"""Times which the loss is differentiated, until nothing overflows: in fp16 the gradient of a mean over thousands of
tokens is lost, and that of one over a few can be too large. Powers of two change nothing in wider types (this
project's choice)."""


class FeatureLoss(NamedTuple):
    """ICP's term of one micro-batch.

    Attributes:
        total: sum over compared tokens, a scalar with gradient.
        tokens: their number, a scalar. `total / tokens` is the mean.
    """

    total: Tensor
    tokens: Tensor


class ICPBranch:
    """The perturbed second pass beside a training step's own.

    ```python
    with branch.clean() as record:
        task_loss = ...  # one forward pass with gradient
    term = branch.loss(record, inputs, task_loss)
    ```

    Nothing here writes into `.grad` or calls a wrapped model, so the reducers of DDP never hear of it. Passes under
    a DIPNet adapter's `sampling` context see one and the same noise: open `clean` inside of it, and call `loss` before
    it closes.

    Args:
        model: a transformers model, or a PEFT model around one; not wrapped by DDP.
        options: what to perturb and to compare.
        block_names: the decoder blocks' module names, in order of depth, where they are not found by themselves.

    Raises:
        ValueError: `start_block` lies outside the model.
    """

    def __init__(self, model: nn.Module, options: ICPOptions, block_names: Sequence[str] | None = None) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.options = options
        remedy = "pass the blocks' module names as `ICPBranch(block_names=[...])`, or set icp_weight to 0"
        self.blocks = [base.get_submodule(name) for name in block_names or find_decoder_blocks(base, remedy)]
        depth = len(self.blocks)
        if options.start_block >= depth:
            raise ValueError(
                f"icp_start_block={options.start_block}: the model has {depth} blocks; give a number from 0 to "
                f"{depth - 1}."
            )
        self.embedding: nn.Module = base.get_input_embeddings()
        self.backbone: nn.Module = base.base_model
        self.layers = evenly_spaced(options.start_block, depth, options.layers)
        self.weights = layer_weights(len(self.layers))

    @contextmanager
    def clean(self) -> Iterator[ICPRecord]:
        """Watch the one forward pass with gradient that runs inside, and make its input differentiable.

        Input embeddings (or a block's input) that carry no gradient, as with a frozen base, become a leaf; what is
        trained keeps its graph. Neither the pass's result nor any parameter's gradient changes.
        """
        record = ICPRecord(start=self._surroundings())
        with keep_outputs(self._compared(), record.features), ExitStack() as hooks:
            watch = watch_backbone(record, self.options.start_block, self._surroundings)
            hooks.enter_context(self.backbone.register_forward_pre_hook(watch, with_kwargs=True))
            hooks.enter_context(self._hook_site(self._open_site(record)))
            if self.options.start_block > 0:
                for index in range(self.options.start_block, len(self.blocks)):
                    # Prepended: in front of hooks that fold and add noise, which will run again on the same arguments.
                    hook = watch_block(record, index, self.options.start_block)
                    block = self.blocks[index]
                    hooks.enter_context(block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
                    hooks.enter_context(block.register_forward_hook(watch_output(record)))
            yield record

    def loss(
        self,
        record: ICPRecord,
        inputs: Mapping[str, Any],
        task_loss: Tensor,
        clean_loss: Callable[[], Tensor] | None = None,
        key: NoiseKey | None = None,
    ) -> FeatureLoss:
        """The feature loss between the clean pass and a pass on the perturbed input, which is the teacher.

        Args:
            record: what `clean` yielded.
            inputs: the batch, not folded: `input_ids`, and `attention_mask`, `position_ids` and `labels` where it has
                them.
            task_loss: the clean pass's loss, its graph alive; of any scale.
            clean_loss: runs a forward pass on the same batch and returns its loss; needed for more than one step.
            key: what a random direction depends on; needed for that alone.
        """
        perturbed = self.perturb(record, inputs, task_loss, clean_loss, key)
        return self.compare(record, inputs, self.teacher(record, perturbed))

    def perturb(
        self,
        record: ICPRecord,
        inputs: Mapping[str, Any],
        task_loss: Tensor,
        clean_loss: Callable[[], Tensor] | None = None,
        key: NoiseKey | None = None,
    ) -> Tensor:
        """The perturbed input after T steps, shape and dtype of `record.site`, without gradient.

        Arguments as for `loss`. The first step's gradient comes from the clean graph, which stays alive; every further
        one from a graph of its own.

        Raises:
            RuntimeError: `record` has seen no forward pass with gradient.
            ValueError: several steps without a `clean_loss`, a random direction without a `key`, masks or outputs of
                other dimensions, or a pass that went around the backbone or a compared block.
        """
        options = self.options
        if options.steps > 1 and clean_loss is None:
            raise ValueError(f"icp_steps={options.steps} needs `clean_loss`, a function that returns the loss anew.")
        if options.direction == "random" and key is None:
            raise ValueError("icp_direction='random' needs `key`, a NoiseKey, another one for every micro-batch.")
        if record.site is None:
            raise RuntimeError("ICP: no forward pass with gradient ran inside `clean`; run the task loss there.")
        self._check_passed(record)
        tokens = perturbed_tokens(inputs, options.positions)
        features = next(iter(record.features.values()))
        if tokens.dim() != 2 or features.dim() != 3:
            raise ValueError(
                f"icp_weight: a mask of shape {tuple(tokens.shape)} and blocks' outputs of shape "
                f"{tuple(features.shape)} do not say which tokens are compared, as (batch, length) and (rows, length, "
                "size) do; give such an attention_mask, train another model, or set icp_weight to 0."
            )
        if options.start_block > 0:
            # Above the embeddings the first token's activations are a thousand times larger, and so would its step be.
            tokens = tokens & compared_tokens(inputs)  # not in place: it may be the caller's mask
        clean, mask = record.site.detach(), fit_mask(tokens, record.site, in_front=False)
        sign = -1 if options.direction == "ascent" else 1
        gradient = _input_gradient(task_loss, record.site)
        step, state = perturbation_step(gradient, clean, mask, options.epsilon, options.update)
        shift = sign * step
        for _ in range(1, options.steps):
            assert clean_loss is not None  # checked above
            site = (clean + shift).to(clean.dtype).requires_grad_()
            with self._hook_site(_put_once(site)), record.start.restored_generators(), torch.enable_grad():
                gradient = _input_gradient(clean_loss(), site)
            step, state = perturbation_step(gradient, clean, mask, options.epsilon, options.update, state)
            shift = shift + sign * step
        if options.direction == "random":
            assert key is not None  # checked above
            shift = random_shift(shift, key.tensor())
        return (clean + shift).to(clean.dtype)

    @torch.no_grad()
    def teacher(self, record: ICPRecord, perturbed: Tensor) -> dict[int, Tensor]:
        """Block outputs on the perturbed input, by block index; same dropout and noise as in the clean pass.

        Args:
            record: what `clean` yielded.
            perturbed: shape and dtype of `record.site`.

        Raises:
            RuntimeError: the second pass differs in shape from the first.
        """
        assert record.rerun is not None  # set together with `record.site`
        features: dict[int, Tensor] = {}
        with keep_outputs(self._compared(), features), record.rerun.restored():
            if self.options.start_block > 0:
                states = perturbed
                # What blocks hand on to one another beside the hidden states, such as keys and values that several
                # share: a copy for this pass, since the backward pass may recompute blocks with the first pass's
                shared: dict[int, MutableMapping[Any, Any]] = {}
                for index, call in record.calls.items():
                    args, kwargs = call.with_hidden_states(states)
                    kwargs = {
                        name: shared.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value
                        for name, value in kwargs.items()
                    }
                    states = block_output(self.blocks[index](*args, **kwargs))
            else:
                assert record.backbone is not None  # the backbone embeds
                with self._hook_site(_put_once(perturbed)):
                    args, kwargs = record.backbone
                    self.backbone(*args, **kwargs)
        shapes = [(record.features[index].shape, features[index].shape) for index in self.layers]
        if any(student != teacher for student, teacher in shapes):
            raise RuntimeError(
                f"ICP: (clean, perturbed) block outputs have shapes {shapes}; open `clean` inside the adapter's "
                "`sampling` context and call `loss` before that closes."
            )
        return features

    def compare(self, record: ICPRecord, inputs: Mapping[str, Any], teacher: Mapping[int, Tensor]) -> FeatureLoss:
        """The feature loss, see `dip_hf.icp.functional.feature_loss`; `teacher` as returned by `teacher`."""
        student = [record.features[index] for index in self.layers]
        mask = compared_tokens(inputs)
        mask = fit_mask(mask, student[0][: mask.shape[0]], in_front=False)  # unfolded, as `feature_loss` wants it
        return FeatureLoss(*feature_loss(student, [teacher[index] for index in self.layers], self.weights, mask))

    def _check_passed(self, record: ICPRecord) -> None:
        """
        Raises:
            ValueError: the clean pass went around what the teacher's pass begins with, or what is compared.
        """
        if self.options.start_block == 0 and record.backbone is None:
            raise ValueError(
                f"icp_start_block=0: {type(self.backbone).__name__} did not run as a whole in the clean pass, which "
                "called its parts; set icp_start_block to 1 or more."
            )
        skipped = [index for index in self.layers if index not in record.features]
        if skipped:
            raise ValueError(
                f"icp_layers={self.options.layers} compares the outputs of blocks {self.layers}, of which the clean "
                f"pass has skipped {skipped}; choose another icp_layers or icp_start_block, or set icp_weight to 0."
            )

    def _compared(self) -> dict[int, nn.Module]:
        return {index: self.blocks[index] for index in self.layers}

    def _surroundings(self) -> Surroundings:
        # Asked anew each time, since a trainer moves the model after construction.
        return Surroundings.now({next(block.parameters()).device for block in self.blocks})

    def _hook_site(self, replace: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Replace the embeddings' output, or the start block's input, by a function of it."""
        if self.options.start_block == 0:
            return self.embedding.register_forward_hook(lambda module, args, output: replace(output))

        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = BlockCall(args, kwargs)
            return call.with_hidden_states(replace(call.hidden_states))

        block = self.blocks[self.options.start_block]
        return block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def _open_site(self, record: ICPRecord) -> Callable[[Tensor], Tensor]:
        def open_once(states: Tensor) -> Tensor:
            if record.site is not None or not torch.is_grad_enabled():
                return states
            if self.options.start_block > 0:
                record.rerun = self._surroundings()
            record.site = states if states.requires_grad else states.detach().requires_grad_()
            return record.site

        return open_once


def _input_gradient(loss: Tensor, site: Tensor) -> Tensor:
    """∂loss/∂site in fp32 or wider; the graph stays alive."""
    for scale in _LOSS_SCALES:
        (gradient,) = torch.autograd.grad(scale * loss, site, retain_graph=True)
        if gradient.isfinite().all():
            break
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale


def _put_once(replacement: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that returns `replacement` at its first call, and its argument ever after."""
    pending = [replacement]
    return lambda states: pending.pop() if pending else states
