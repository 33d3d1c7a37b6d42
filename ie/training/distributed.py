"""Data parallel training: every process has a base and an editor of its own and makes its share of each batch.

`accelerate launch` and `torchrun` start the processes; accelerate joins them. All draw the same batches from the same
random numbers, so nothing about data is ever sent. A process makes every n-th edit of a batch, its losses weighed by
the whole batch's numbers of queries: the sum of all gradients is that of one process with the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor, nn

from ie.base.asking import Ask
from ie.errors import InputError
from ie.training.episodes import Episodes

__all__ = ["Processes", "joined", "share"]


@dataclass(frozen=True)
class Processes:
    """This process and the others that train the same editor.

    Attributes:
        index: of this process, from 0.
        n: how many there are.
        device: where this one computes; None to choose as if it were alone.
    """

    index: int = 0
    n: int = 1
    device: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process validates and writes files."""
        return self.index == 0

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, bit for bit the same everywhere."""
        if self.n == 1:
            return
        tensors = list(tensors)
        flat = reduce(torch.cat([tensor.flatten() for tensor in tensors]), "sum")
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes, those that are missing in some counting as zero."""
        if self.n == 1:
            return
        parameters = list(parameters)
        found = self.largest(*(one.grad is not None for one in parameters))
        moved = [one for one, somewhere in zip(parameters, found, strict=True) if somewhere]
        for one in moved:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        self.add_up(one.grad for one in moved if one.grad is not None)

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self.n == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=torch.device(self.device or "cpu"))
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)  # accelerate's own is new
        return list(found.tolist())

    def from_first(self, value: Any) -> Any:
        """The first process's value, everywhere; the others wait for it."""
        return value if self.n == 1 else broadcast_object_list([value])[0]


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that a launcher has started, or this one alone.

    Args:
        device: `auto` or a torch device.

    Raises:
        InputError: if a single GPU is named for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if ":" in device:
        raise InputError(
            f"--device {device} cannot be shared by several processes",
            hint="give --device auto or cpu: each process takes a device of its own",
        )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield Processes(state.process_index, state.num_processes, str(state.device))
    finally:
        state.destroy_process_group()


def share(episodes: Episodes, processes: Processes) -> Episodes:
    """The episodes of a batch that this process makes: every n-th, and so every n-th stack if their number allows."""
    if processes.n == 1:
        return episodes
    own = range(processes.index, len(episodes.requests), processes.n)
    place = {edit: new for new, edit in enumerate(own)}

    def renumbered(asks: Sequence[Ask]) -> list[Ask]:
        return [replace(ask, edit=place[ask.edit]) for ask in asks if ask.edit in place]

    return Episodes(
        [episodes.requests[edit] for edit in own],
        renumbered(episodes.wanted),
        renumbered(episodes.kept),
        n_stacks=-(-episodes.n_stacks // processes.n),
    )
