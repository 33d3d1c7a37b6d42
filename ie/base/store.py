"""What is computed of a text once and kept: in memory up to a budget, beyond it in a file.

A text's tensor depends, in its last bits, on the texts that it was computed with: matrix products of other sizes take
other kernels. So a store remembers which texts were computed together, and one that goes on from a saved state computes
a text that was kept in the same company again, when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ie.base.statefile import StateFile
from ie.data.tokens import Text

__all__ = ["TextStore"]


class TextStore:
    """Keeps one tensor for each different text; texts beyond all budgets are computed each time.

    Args:
        budget_bytes: how much to keep in memory.
        key: what makes two texts the same.
        file: where to keep more, in bf16; asked for only when something new is beyond the budget. None for nowhere.
    """

    def __init__(
        self,
        budget_bytes: int,
        key: Callable[[Text], Hashable] = lambda text: text,
        file: Callable[[], StateFile | None] = lambda: None,
    ) -> None:
        self._budget_bytes = budget_bytes
        self._key = key
        self._open = file
        self._file: StateFile | None = None
        self._kept: dict[Hashable, Tensor] = {}
        self._groups: list[list[tuple[Text, bool]]] = []  # computed together, and whether each was kept in memory
        self._absent: dict[Hashable, int] = {}  # the group of what a saved state kept and nobody has asked for yet
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._absent) + (0 if self._file is None else len(self._file))

    def __contains__(self, text: Text) -> bool:
        """Whether a text's tensor is kept in memory, or was by the store that this one goes on from."""
        return (key := self._key(text)) in self._kept or key in self._absent

    @property
    def n_file_bytes(self) -> int:
        """How much the file holds."""
        return 0 if self._file is None else self._file.n_bytes

    def get(self, texts: Sequence[Text], compute: Callable[[list[Text]], Sequence[Tensor]]) -> list[Tensor]:
        """The tensor of each text, in order; `compute` is asked once for all that are missing."""
        wanted = {self._key(text): text for text in texts}
        for key in wanted:
            if key in self._absent:
                self._compute_again(self._groups[self._absent[key]], compute)
        found = {key: tensor for key, text in wanted.items() if (tensor := self._find(key, text)) is not None}
        missing = {key: text for key, text in wanted.items() if key not in found}
        if missing:
            group = []
            for (key, text), tensor in zip(missing.items(), compute(list(missing.values())), strict=True):
                found[key] = self._keep(key, text, tensor)
                group.append((text, key in self._kept))
            if any(kept for _, kept in group):
                self._groups.append(group)
        return [found[self._key(text)] for text in texts]

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to give every text the tensor that this store would give it.

        Returns:
            `ids` (n_tokens,) int32, all texts' token ids; `texts` (n_texts, 5) int32, for each its length, where its
            instruction ends, where its answer begins, its group, and whether it was kept; `sizes` (2,) int64, the
            bytes in memory and whether the file is in use.
        """
        places = [
            (len(text.ids), text.n_instruction, text.n_prompt, index, int(kept))
            for index, group in enumerate(self._groups)
            for text, kept in group
        ]
        return {
            "ids": torch.tensor(
                [i for group in self._groups for text, _ in group for i in text.ids], dtype=torch.int32
            ),
            "texts": torch.tensor(places, dtype=torch.int32).view(-1, 5),
            "sizes": torch.tensor([self.n_bytes, self._file is not None]),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on, in an empty store, from what `state` returned."""
        self.n_bytes, uses_file = (int(size) for size in state["sizes"])
        if uses_file:
            self._file = self._open()
        ids, start = state["ids"].tolist(), 0
        for length, n_instruction, n_prompt, index, kept in state["texts"].tolist():
            text = Text(tuple(ids[start : start + length]), n_instruction, n_prompt)
            start += length
            if index == len(self._groups):
                self._groups.append([])
            self._groups[index].append((text, bool(kept)))
            if kept:
                self._absent[self._key(text)] = index

    def _compute_again(
        self, group: Sequence[tuple[Text, bool]], compute: Callable[[list[Text]], Sequence[Tensor]]
    ) -> None:
        for (text, kept), tensor in zip(group, compute([text for text, _ in group]), strict=True):
            if kept:  # `n_bytes` counts it already
                self._kept[self._key(text)] = tensor
                del self._absent[self._key(text)]

    def _find(self, key: Hashable, text: Text) -> Tensor | None:
        kept = self._kept.get(key)
        return kept if kept is not None or self._file is None else self._file.get(text.ids)

    def _keep(self, key: Hashable, text: Text, tensor: Tensor) -> Tensor:
        """Keep a tensor, and return it as it will be found: the file rounds."""
        if self.n_bytes + tensor.nbytes <= self._budget_bytes:
            self._kept[key] = tensor
            self.n_bytes += tensor.nbytes
            return tensor
        if self._file is None:  # an empty one is false
            self._file = self._open()
        if self._file is None:
            return tensor
        self._file.put(text.ids, tensor)
        found = self._file.get(text.ids)
        return tensor if found is None else found
