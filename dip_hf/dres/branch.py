"""DReS's coded branch of a model: what is coded, and how."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from dip_hf.blocks import find_decoder_blocks, select_blocks
from dip_hf.dres.coded_pass import CodedPass, DReSRecord
from dip_hf.dres.functional import affine_error
from dip_hf.dres.options import DReSOptions
from dip_hf.dres.sequence_pass import SequencePass
from dip_hf.dres.token_pass import TokenPass
from dip_hf.noise import NoiseKey


_MLP_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block")
_OF_EXPERTS = ("experts", "router")


def find_mlp(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    """The MLP sublayer of a decoder block, and its name.

    Args:
        name: the block's name.
        block: the block.

    Raises:
        ValueError: the block has no MLP of its own module, or one that is no map of a token alone.
    """
    child, mlp = next(((child, mlp) for child, mlp in block.named_children() if child in _MLP_NAMES), ("", None))
    kind, remedy = type(block).__name__, "use dres_placement='sequence', or other dres_blocks"
    if mlp is None:
        raise ValueError(
            f"dres_placement='token': {name!r} ({kind}) keeps its MLP in no submodule of its own (looked for "
            f"{', '.join(_MLP_NAMES)}); {remedy}."
        )
    required = [
        parameter.name
        for parameter in inspect.signature(mlp.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(required) != 1:
        raise ValueError(
            f"dres_placement='token': the MLP of {name!r} ({kind}) takes {', '.join(required)}, not a token alone; "
            f"{remedy}."
        )
    return f"{name}.{child}", mlp


def _check_smooth(name: str, block: nn.Module) -> None:
    """
    Raises:
        ValueError: the block has a mixture of experts.
    """
    if any(submodule.rpartition(".")[2] in _OF_EXPERTS for submodule, _ in block.named_modules()):
        raise ValueError(
            f"dres_blocks: {name!r} ({type(block).__name__}) has a mixture of experts, which jumps where its router "
            "changes its mind, so that the error would measure routing; choose blocks without one, or set dres_weight "
            "to 0."
        )


class DReSBranch:
    """A coded branch through some of a model's blocks, run inside a forward pass of the model.

    Args:
        model: a transformers model (of a PEFT model, its base model, so that the blocks have their usual names).
        options: what to code, and how.
        block_names: names of all decoder blocks, in order, where they cannot be found.

    Attributes:
        modules: the coded submodules by name, in order of depth.
        floor: the error of a linear f, in the mean over groups; f with one far below it is as good as constant.

    Raises:
        ValueError: options that cannot work in this model; names field, value and remedy.
    """

    def __init__(self, model: PreTrainedModel, options: DReSOptions, block_names: Sequence[str] | None = None) -> None:
        self.options = options
        self.floor = affine_error(options.group_size, options.coded_size)
        remedy = "pass the blocks' module names as `DReSBranch(block_names=[...])`, or set dres_weight to 0"
        names = list(block_names or find_decoder_blocks(model, remedy))
        chosen = select_blocks(names, options.blocks, "dres_blocks")
        self.blocks = {names[index]: model.get_submodule(names[index]) for index in chosen}
        for name, block in self.blocks.items():
            _check_smooth(name, block)
        self.model = model
        self.names = names
        if options.placement == "token":
            self.modules = dict(find_mlp(name, block) for name, block in self.blocks.items())
            return
        self.modules = self.blocks
        if chosen != list(range(chosen[0], chosen[-1] + 1)):
            raise ValueError(
                f"dres_blocks={options.blocks!r} chooses the blocks {chosen}, but dres_placement='sequence' needs a "
                "range without gaps; choose neighbours, or use dres_placement='token'."
            )
        if model.config._attn_implementation == "flex_attention":
            raise ValueError(
                "dres_placement='sequence' cannot code the masks of attn_implementation='flex_attention'; use 'sdpa', "
                "or dres_placement='token'."
            )

    def check(self, batch_size: int, padding_free: bool) -> None:
        """
        Args:
            batch_size: rows of a micro-batch on one device.
            padding_free: whether the rows of a batch are laid end to end (packing included).

        Raises:
            ValueError: nothing that is trained has a part in what is coded; or sequence placement cannot fill a group
                from such batches.
        """
        self._check_trained()
        if self.options.placement == "token":
            return
        if padding_free:
            raise ValueError(
                "dres_placement='sequence' codes the rows of a batch, which packing=True or padding_free=True lays "
                "end to end; turn these off, or use dres_placement='token'."
            )
        if batch_size < self.options.group_size:
            raise ValueError(
                f"dres_group_size={self.options.group_size} is more than the {batch_size} rows of a batch "
                "(per_device_train_batch_size, or what auto_find_batch_size made of it), and a group is of different "
                f"rows; lower it to at most {batch_size}, or use dres_placement='token'."
            )

    def _check_trained(self) -> None:
        """
        Raises:
            ValueError: what is trained in the model lies above the last coded block.
        """
        blocks = [self.model.get_submodule(name) for name in self.names]
        coded_to = self.names.index(list(self.blocks)[-1]) + 1
        head: nn.Module | None = self.model.get_output_embeddings()
        tops = blocks[coded_to:] if head is None else [*blocks[coded_to:], head]
        # What blocks share counts where it is lowest, and the weight of a tied head with the embeddings
        below = {part for block in blocks[:coded_to] for part in block.modules()}
        above = {part for top in tops for part in top.modules()} - below
        trained = [
            module not in above
            for module in self.model.modules()
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        ]
        if trained and not any(trained):
            raise ValueError(
                f"dres_blocks={self.options.blocks!r}: all that is trained lies above {list(self.blocks)[-1]!r}, the "
                "last coded block, so that the error has no gradient; choose later blocks, train lower ones, or set "
                "dres_weight to 0."
            )

    @contextmanager
    def attached(self, key: NoiseKey, attention_mask: Tensor | None = None) -> Iterator[DReSRecord]:
        """The forward pass inside runs the coded branch too; its own output stays the same to the last bit.

        Args:
            key: what the groups depend on.
            attention_mask: of that pass, shape (batch, length), nonzero where valid; None where every token is.

        Yields:
            A record whose `error` is, after the pass, the raw term, a scalar with its gradient.

        Raises:
            ValueError: `attention_mask` is not two-dimensional; from the pass itself, arguments of the blocks that
                cannot be coded.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: DReS needs the batch's own, (batch, length)."
            )
        mask = None if attention_mask is None else attention_mask.bool()
        given = (self.modules, self.options, key.tensor(), mask)
        coded_pass: CodedPass
        if self.options.placement == "sequence":
            coded_pass = SequencePass(*given)
        else:
            coded_pass = TokenPass(list(self.blocks.values()), *given)
        with ExitStack() as hooks:
            coded_pass.attach(hooks)
            yield coded_pass.record
