"""DReS's coded branch of a model: what is coded, and how."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from dip_hf.blocks import find_decoder_blocks, select_blocks
from dip_hf.dres.coded_pass import GRADIENTS, CodedPass, DReSRecord
from dip_hf.dres.functional import affine_error, coding_matrices
from dip_hf.dres.sequence_pass import SequencePass
from dip_hf.dres.token_pass import TokenPass
from dip_hf.noise import NoiseKey


_MLP_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block")


def find_mlp(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    """The MLP sublayer of a decoder block, and its name.

    Args:
        name: the block's name.
        block: the block.

    Raises:
        ValueError: the block has no MLP of its own module, or one that is no smooth map of a token alone.
    """
    child, mlp = next(
        ((child, getattr(block, child)) for child in _MLP_NAMES if isinstance(getattr(block, child, None), nn.Module)),
        ("", None),
    )
    kind, remedy = type(block).__name__, "use dres_placement='sequence', or other dres_blocks"
    if mlp is None:
        raise ValueError(
            f"dres_placement='token': {name!r} ({kind}) keeps its MLP in no submodule of its own (looked for "
            f"{', '.join(_MLP_NAMES)}); {remedy}."
        )
    if any(submodule.rpartition(".")[2] in ("experts", "router") for submodule, _ in mlp.named_modules()):
        raise ValueError(
            f"dres_placement='token': the MLP of {name!r} ({kind}) is a mixture of experts, which jumps where its "
            f"router changes its mind, so that the error would measure routing; {remedy}."
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


def coded_size(placement: str, group_size: int, oversampling: float) -> int:
    """N, the number of coded samples; arguments as for `DReSBranch`.

    Raises:
        ValueError: a value that cannot work in any model; names field, value and remedy.
    """
    if placement not in ("sequence", "token"):
        raise ValueError(f"dres_placement={placement!r} must be one of sequence, token.")
    if not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"dres_group_size={group_size} must be at least 2: one sample leaves no path.")
    if not 1 <= oversampling < math.inf:
        raise ValueError(
            f"dres_oversampling={oversampling} must be at least 1: with fewer coded samples than samples the "
            "error measures the interpolation and not the curvature; 1.25 to 1.5 is usual."
        )
    size = math.ceil(round(oversampling * group_size, 9))
    try:
        coding_matrices(group_size, size)
    except ValueError as error:
        raise ValueError(f"dres_oversampling={oversampling}: {error}") from error
    return size


def check_share(share: float) -> float:
    """`share` itself.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"dres_share={share} must be above 0 and at most 1: it is the share of the groups coded per step; 1 codes "
            "all, and dres_weight=0 turns DReS off."
        )
    return share


def check_gradient(gradient: str) -> str:
    """`gradient` itself.

    Raises:
        ValueError: it is none of `GRADIENTS`.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"dres_gradient={gradient!r} must be one of {', '.join(GRADIENTS)}.")
    return gradient


class DReSBranch:
    """A coded branch through some of a model's blocks, run inside a forward pass of the model.

    Args:
        model: a transformers model (of a PEFT model, its base model, so that the blocks have their usual names).
        placement: "sequence": samples are rows of the batch, f is the range of chosen blocks. "token": samples are
            valid tokens, f is the MLP sublayer of each chosen block.
        blocks: which blocks, as in `dip_hf.blocks.select_blocks`.
        group_size: K, samples in a group.
        oversampling: N/K; N is rounded up.
        share: share of the groups coded in a pass, rounded up to a whole group: a random sample, whose error is an
            unbiased estimate of the mean over all groups.
        gradient: "scale_free": through both branches, and the variance of f(x) that the error is divided by, so that
            shrinking f does not make the error smaller. "all": with the variance held constant. "coded": f(x) is a
            constant too, so that the coded branch alone has a gradient.
        block_names: names of all decoder blocks, in order, where they cannot be found.

    Attributes:
        modules: the coded submodules by name, in order of depth.
        coded_size: N.
        floor: the error of a linear f, in the mean over groups; f with one far below it is as good as constant.

    Raises:
        ValueError: a value that cannot work; names field, value and remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        placement: str = "token",
        blocks: str | int | Sequence[int] = "25%",
        group_size: int = 8,
        oversampling: float = 1.25,
        share: float = 1.0,
        gradient: str = "scale_free",
        block_names: Sequence[str] | None = None,
    ) -> None:
        self.placement = placement
        self.group_size = group_size
        self.coded_size = coded_size(placement, group_size, oversampling)
        self.floor = affine_error(group_size, self.coded_size)
        self.share = check_share(share)
        self.gradient = check_gradient(gradient)
        remedy = "pass the blocks' module names as `DReSBranch(block_names=[...])`, or set dres_weight to 0"
        names = list(block_names or find_decoder_blocks(model, remedy))
        chosen = select_blocks(names, blocks, "dres_blocks")
        self.blocks = {names[index]: model.get_submodule(names[index]) for index in chosen}
        if placement == "token":
            self.modules = dict(find_mlp(name, block) for name, block in self.blocks.items())
            return
        self.modules = self.blocks
        if chosen != list(range(chosen[0], chosen[-1] + 1)):
            raise ValueError(
                f"dres_blocks={blocks!r} chooses the blocks {chosen}, but dres_placement='sequence' needs a range "
                "without gaps; choose neighbours, or use dres_placement='token'."
            )
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if attention == "flex_attention":
            raise ValueError(
                f"dres_placement='sequence' cannot code the masks of attn_implementation={attention!r}; use 'sdpa', "
                "or dres_placement='token'."
            )

    def check(self, batch_size: int, padding_free: bool) -> None:
        """
        Args:
            batch_size: rows of a micro-batch on one device.
            padding_free: whether the rows of a batch are laid end to end (packing included).

        Raises:
            ValueError: sequence placement cannot fill a group from such batches.
        """
        if self.placement == "token":
            return
        if padding_free:
            raise ValueError(
                "dres_placement='sequence' codes the rows of a batch, which packing=True or padding_free=True lays "
                "end to end; turn these off, or use dres_placement='token'."
            )
        if batch_size < self.group_size:
            raise ValueError(
                f"dres_group_size={self.group_size} is more than the {batch_size} rows of a batch "
                "(per_device_train_batch_size, or what auto_find_batch_size made of it), so no group would be filled; "
                f"lower it to at most {batch_size}, or use dres_placement='token'."
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
        options = (
            self.modules,
            self.group_size,
            self.coded_size,
            self.share,
            key.tensor(),
            mask,
            self.gradient,
        )
        coded_pass: CodedPass
        if self.placement == "sequence":
            coded_pass = SequencePass(*options)
        else:
            coded_pass = TokenPass(list(self.blocks.values()), *options)
        handles = coded_pass.attach()
        try:
            yield coded_pass.record
        finally:
            for handle in handles:
                handle.remove()
