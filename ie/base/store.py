"""What is computed of a text once and kept, up to a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from ie.data.tokens import Text

__all__ = ["TextStore"]


class TextStore:
    """Keeps one tensor for each different text; texts beyond the budget are computed each time.

    Args:
        budget_bytes: how much to keep.
        key: what makes two texts the same.
    """

    def __init__(self, budget_bytes: int, key: Callable[[Text], Hashable] = lambda text: text) -> None:
        self._budget_bytes = budget_bytes
        self._key = key
        self._kept: dict[Hashable, Tensor] = {}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, texts: Sequence[Text], compute: Callable[[list[Text]], Sequence[Tensor]]) -> list[Tensor]:
        """The tensor of each text, in order; `compute` is asked once for all that are missing."""
        keys = [self._key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._kept}
        fresh = dict(zip(missing, compute(list(missing.values())), strict=True)) if missing else {}
        found = [self._kept[key] if key in self._kept else fresh[key] for key in keys]
        for key, tensor in fresh.items():
            if self.n_bytes + tensor.nbytes <= self._budget_bytes:
                self._kept[key] = tensor
                self.n_bytes += tensor.nbytes
        return found
