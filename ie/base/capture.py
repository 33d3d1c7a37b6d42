"""Signals: the activations u and deltas δ that an edit request causes in the edit targets.

One forward and one backward pass over a batch of independent requests. The loss is the sum of the negative
log-likelihoods of all target tokens, so no request's gradient holds anything of another. Only tokens with a gradient
are kept: in the last block these are the positions that predict the target, before it every editable token up to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ie.base.targets import EditTarget
from ie.data.tokens import TokenBatch

__all__ = ["ModuleSignals", "Signals", "recording", "row_mean"]


@dataclass(frozen=True)
class ModuleSignals:
    """What one edit target saw of a batch of requests, token by token.

    Attributes:
        u: (n_tokens, d_in) float32, the module's inputs.
        delta: (n_tokens, d_out) float32, the loss's gradient at the module's outputs.
        edit: (n_tokens,) int64, the request that each token belongs to, ascending.
        position: (n_tokens,) int64, where each token stands in its request, the instruction left out.
        opening: (n_tokens,) bool, True on a prompt's last token.
    """

    u: Tensor
    delta: Tensor
    edit: Tensor
    position: Tensor
    opening: Tensor


@dataclass(frozen=True)
class Signals:
    """The signals of `n_edits` requests by module path."""

    modules: dict[str, ModuleSignals]
    n_edits: int

    def of(self, edits: Sequence[int]) -> Signals:
        """Those of some requests, ascending, numbered anew."""
        modules = {}
        for name, one in self.modules.items():
            number = one.edit.new_full((self.n_edits,), -1)
            number[list(edits)] = torch.arange(len(edits), device=number.device)
            kept = number[one.edit] >= 0
            modules[name] = ModuleSignals(
                one.u[kept], one.delta[kept], number[one.edit[kept]], one.position[kept], one.opening[kept]
            )
        return Signals(modules, len(edits))

    @classmethod
    def together(cls, parts: Sequence[Signals], edits: Sequence[Sequence[int]]) -> Signals:
        """The signals of all requests, from those of some at a time; `edits` are the parts' requests, ascending."""
        modules = {}
        for name in parts[0].modules:
            of = [part.modules[name] for part in parts]
            edit = torch.cat(
                [torch.tensor(n, device=one.edit.device)[one.edit] for one, n in zip(of, edits, strict=True)]
            )
            order = edit.argsort(stable=True)
            fields = ("u", "delta", "position", "opening")
            values = {field: torch.cat([getattr(one, field) for one in of])[order] for field in fields}
            modules[name] = ModuleSignals(edit=edit[order], **values)
        return cls(modules, sum(part.n_edits for part in parts))

    def n_tokens(self) -> list[int]:
        """For each request the largest number of tokens that a module kept of it: the rank of its update."""
        counts = [torch.bincount(one.edit, minlength=self.n_edits) for one in self.modules.values()]
        most: list[int] = torch.stack(counts).amax(0).tolist()
        return most


def row_mean(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Mean of the values (n_answer,) of each row, (n_rows,); `rows` (n_answer,) int64 names each value's row."""
    total = values.new_zeros(n_rows).index_add(0, rows, values)
    return total / torch.bincount(rows, minlength=n_rows).clamp(min=1)


class Recorder:
    """Inputs and outputs of the edit targets during one forward pass."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def signals(self, logits: Tensor, gradient: Tensor, batch: TokenBatch, like: Signals | None = None) -> Signals:
        """Run the backward pass down to the recorded outputs.

        Args:
            logits: (n_answer, n_vocab) of the recorded forward pass.
            gradient: the gradient of the sum of the requests' losses there.
            batch: the requests.
            like: signals of the same batch; tokens are those that it kept. None keeps those with a gradient.
        """
        editable, width = batch.editable, batch.editable.shape[1]
        starts = torch.tensor([text.n_instruction for text in batch.texts], device=editable.device)
        gradients = torch.autograd.grad(logits, list(self.outputs.values()), gradient)
        modules = {}
        for (name, u), delta in zip(self.inputs.items(), gradients, strict=True):
            u, delta = u.to(editable.device), delta.to(editable.device)  # where the editor is, module by module
            flat = delta.reshape(editable.numel(), -1)
            if like is None:
                kept = (editable.flatten() & (flat != 0).any(-1)).nonzero()[:, 0]
            else:
                of = like.modules[name]
                kept = of.edit * width + starts[of.edit] + of.position
            edit = kept // width
            modules[name] = ModuleSignals(
                u=u.reshape(editable.numel(), -1)[kept].float(),
                delta=flat[kept].float(),
                edit=edit,
                position=kept % width - starts[edit],
                opening=batch.opening.flatten()[kept],
            )
        return Signals(modules, editable.shape[0])


@contextmanager
def recording(model: nn.Module, targets: Sequence[EditTarget]) -> Iterator[Recorder]:
    """Record what passes the edit targets while the context lasts."""
    recorder = Recorder()

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_(True)  # the first edited block: nothing before it has a gradient
            recorder.inputs[name] = args[0].detach()
            recorder.outputs[name] = output

        return hook

    handles = [model.get_submodule(target.name).register_forward_hook(keep(target.name)) for target in targets]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
