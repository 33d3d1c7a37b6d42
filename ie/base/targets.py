"""Edit targets: the linear modules that an edit may change.

The only file that knows `nn.Linear` from GPT-2's `Conv1D` from a quantised module. Modules are found by type and place:
the decoder's blocks are its longest list of modules, a projection of the MLP is a linear module of a block that lies
in no attention module. Nothing is read from the model's name. Of a gated MLP's two projections upwards one is edited:
both read the same input, and a third fewer modules edit as well (docs/experiments.md).

Orientation is settled here once: every target maps d_in to d_out, whatever way its weight is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ie.errors import ModelError

__all__ = [
    "N_EDITED_BLOCKS",
    "EditTarget",
    "find_blocks",
    "find_targets",
    "is_transposed",
    "module_shape",
    "read_target",
]

N_EDITED_BLOCKS = 3  # as the paper edits (layers 45 to 47 of GPT2-XL, 29 to 31 of LLaMA-2)


@dataclass(frozen=True)
class EditTarget:
    """A linear module that an edit may change.

    Attributes:
        name: path of the module in the model.
        block: index of the decoder block that holds it.
        d_in: number of input features.
        d_out: number of output features.
    """

    name: str
    block: int
    d_in: int
    d_out: int


def module_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear module, or None if the module is no linear map.

    Quantised modules pack their weight, so sizes are read from the module and never from `weight.shape`.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def is_transposed(module: nn.Module) -> bool:
    """True if the checkpoint stores the module's weight as (d_in, d_out), as GPT-2's Conv1D does."""
    return isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D  # quantised: what it was


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks and its path.

    Raises:
        ModelError: if the model has no list of blocks.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks to edit",
            hint="Use a causal LM with GPT-2-like or Llama-like blocks.",
        )
    return max(lists, key=lambda item: len(item[1]))


def find_targets(model: nn.Module, n_blocks: int = N_EDITED_BLOCKS) -> tuple[EditTarget, ...]:
    """MLP projections of the last `n_blocks` blocks, in forward order of the blocks: one up and one down in each.

    Raises:
        ModelError: if those blocks hold no linear projection outside attention, or a mixture of experts.
    """
    path, blocks = find_blocks(model)
    targets: list[EditTarget] = []
    for index in range(max(0, len(blocks) - n_blocks), len(blocks)):
        # Of projections of one shape the last: a gate is defined before what it gates.
        of_shape: dict[tuple[int, int], EditTarget] = {}
        for name, module in _outside_attention(blocks[index]):
            # By name or by class; a shared one beside them is a part of the MLP only.
            if name.endswith("experts") or "experts" in type(module).__name__.lower():
                raise ModelError(
                    f"{type(model).__name__} has a mixture of experts in block {index}",
                    hint="Only blocks with one MLP can be edited.",
                )
            shape = module_shape(module)
            if shape is not None:
                of_shape[shape] = EditTarget(f"{path}.{index}.{name}", index, *shape)
        targets += of_shape.values()
    if not targets:
        raise ModelError(f"{type(model).__name__} has no linear MLP projection in its last {n_blocks} blocks")
    return tuple(targets)


def _outside_attention(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if "attention" in type(child).__name__.lower():
            continue
        yield f"{prefix}{name}", child
        yield from _outside_attention(child, f"{prefix}{name}.")


def read_target(targets: Sequence[EditTarget]) -> EditTarget:
    """The edit target whose inputs say most of an instruction: the first of the last block."""
    last = max(target.block for target in targets)
    return next(target for target in targets if target.block == last)
