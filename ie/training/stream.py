"""Which records a training edits, and in which order; the position can be saved and found again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from ie.data.record import Record

__all__ = ["RecordStream"]


class RecordStream(Iterator[Record]):
    """Endless records, each task's in shuffled passes; tasks drawn evenly, or by their size.

    Args:
        records: the records to draw from.
        balance: draw tasks evenly.
        rng: what is drawn with; its state is its owner's to save.
    """

    def __init__(self, records: Sequence[Record], balance: bool, rng: random.Random) -> None:
        by_task: dict[str, list[Record]] = {}
        for record in records:
            by_task.setdefault(record.task, []).append(record)
        self._groups = by_task
        self._orders = {task: list(range(len(group))) for task, group in by_task.items()}
        self._places = {task: len(group) for task, group in by_task.items()}  # at the end: a pass is to begin
        self._tasks = list(by_task)
        self._weights = [1 if balance else len(by_task[task]) for task in self._tasks]
        self._rng = rng

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Record:
        task = self._rng.choices(self._tasks, self._weights)[0]
        order, place = self._orders[task], self._places[task]
        if place == len(order):
            self._rng.shuffle(order)
            place = 0
        self._places[task] = place + 1
        return self._groups[task][order[place]]

    def state(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""
        return {"orders": {task: list(order) for task, order in self._orders.items()}, "places": dict(self._places)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a position that `state` returned, of a stream of the same records."""
        self._orders = {task: list(order) for task, order in state["orders"].items()}
        self._places = dict(state["places"])
