"""What is computed of a text once and kept: in memory up to a budget, beyond it in a file."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

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
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept) + (len(self._file) if self._file else 0)

    @property
    def n_file_bytes(self) -> int:
        """How much the file holds."""
        return self._file.n_bytes if self._file else 0

    def get(self, texts: Sequence[Text], compute: Callable[[list[Text]], Sequence[Tensor]]) -> list[Tensor]:
        """The tensor of each text, in order; `compute` is asked once for all that are missing."""
        wanted = {self._key(text): text for text in texts}
        found = {key: tensor for key, text in wanted.items() if (tensor := self._find(key, text)) is not None}
        missing = {key: text for key, text in wanted.items() if key not in found}
        if missing:
            for (key, text), tensor in zip(missing.items(), compute(list(missing.values())), strict=True):
                found[key] = tensor
                self._keep(key, text, tensor)
        return [found[self._key(text)] for text in texts]

    def _find(self, key: Hashable, text: Text) -> Tensor | None:
        kept = self._kept.get(key)
        return kept if kept is not None or self._file is None else self._file.get(text.ids)

    def _keep(self, key: Hashable, text: Text, tensor: Tensor) -> None:
        if self.n_bytes + tensor.nbytes <= self._budget_bytes:
            self._kept[key] = tensor
            self.n_bytes += tensor.nbytes
            return
        self._file = self._file or self._open()
        if self._file is not None:
            self._file.put(text.ids, tensor)
