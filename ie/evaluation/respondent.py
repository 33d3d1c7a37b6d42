"""Who is asked: the base itself, or the base under edits. It remembers its answers.

Every method, every control and every validation is compared with what the unedited base answers, to mostly the same
questions. One respondent for the base, handed from measurement to measurement, is asked each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ie.base.asking import Ask, answers, continuations, log_likelihoods, predictions
from ie.base.model import Base
from ie.base.update import Update

__all__ = ["Respondent"]

T = TypeVar("T")


class Respondent:
    """The base, or the base under some edits; each different question is put to it once.

    Args:
        base: the base model.
        update: the edits that questions are asked under; None for the base itself, whatever edit a question names.
    """

    def __init__(self, base: Base, update: Update | None = None) -> None:
        self.base = base
        self._update = update
        self._predictions: dict[Ask, tuple[int, ...]] = {}
        self._log_likelihoods: dict[Ask, float] = {}
        self._answers: dict[Ask, str] = {}
        self._continuations: dict[int, dict[Ask, list[int]]] = {}

    def predictions(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """See `ie.base.asking.predictions`."""
        return self._once(asks, self._predictions, lambda new: predictions(self.base, new, self._update))

    def log_likelihoods(self, asks: Sequence[Ask]) -> list[float]:
        """See `ie.base.asking.log_likelihoods`."""
        return self._once(asks, self._log_likelihoods, lambda new: log_likelihoods(self.base, new, self._update))

    def answers(self, asks: Sequence[Ask]) -> list[str]:
        """See `ie.base.asking.answers`."""
        return self._once(asks, self._answers, lambda new: answers(self.base, new, self._update))

    def continuations(self, asks: Sequence[Ask], n_tokens: int) -> list[list[int]]:
        """See `ie.base.asking.continuations`."""
        known = self._continuations.setdefault(n_tokens, {})
        return self._once(asks, known, lambda new: continuations(self.base, new, n_tokens, self._update))

    def _once(self, asks: Sequence[Ask], known: dict[Ask, T], ask: Callable[[list[Ask]], list[T]]) -> list[T]:
        """What is known of each question, after asking together whatever is not."""
        asks = asks if self._update is not None else [replace(one, edit=0) for one in asks]
        new = list(dict.fromkeys(one for one in asks if one not in known))
        known.update(zip(new, ask(new), strict=True))
        return [known[one] for one in asks]
