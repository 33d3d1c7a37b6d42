"""A respondent gives the answers that asking gives, and is asked each different question once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ie.base import Base, asking
from ie.base.asking import Ask
from ie.base.update import Update
from ie.evaluation import evaluate, respondent
from ie.evaluation.respondent import Respondent
from tests.dense import random_update

KINDS = ("predictions", "log_likelihoods", "answers")
ASKS = (
    Ask("Varn:", "Lissel", edit=0),
    Ask("Varn:", "Lissel", edit=1),
    Ask("Varn:", "Lissel", edit=0),  # the first one again
    Ask("Varn:", "Lissel", "Task: people", edit=0),
    Ask("Varn:", "the Ombe", edit=1),
)


@contextmanager
def counting() -> Iterator[dict[str, list[tuple[Ask, Update | None]]]]:
    """What is asked, by kind, and under which update; answers stay what they are."""
    asked: dict[str, list[tuple[Ask, Update | None]]] = {kind: [] for kind in (*KINDS, "continuations")}

    def counted(kind: str) -> Callable[..., Any]:
        def ask(base: Base, asks: Sequence[Ask], *rest: Any) -> Any:
            asked[kind] += [(one, rest[-1]) for one in asks]
            return getattr(asking, kind)(base, asks, *rest)

        return ask

    with pytest.MonkeyPatch.context() as patch:
        for kind in asked:
            patch.setattr(respondent, kind, counted(kind))
        yield asked


def test_answers_are_those_of_asking_one_by_one(load: Callable[..., Base]) -> None:
    base = load("llama")
    for update in (None, random_update(base, n=2, size=0.3)):
        one = Respondent(base, update)
        for _ in range(2):  # the second time from memory
            for kind in ("predictions", "answers"):
                apart = [getattr(asking, kind)(base, [ask], update)[0] for ask in ASKS]
                assert getattr(one, kind)(ASKS) == apart
            apart = [asking.log_likelihoods(base, [ask], update)[0] for ask in ASKS]
            # Sums over batches of another width: the last bits of float32.
            assert one.log_likelihoods(ASKS) == pytest.approx(apart, abs=1e-5)
            for n_tokens in (3, 5):
                apart = [asking.continuations(base, [ask], n_tokens, update)[0] for ask in ASKS]
                assert one.continuations(ASKS, n_tokens) == apart


@pytest.mark.parametrize("kind", KINDS)
def test_under_edits_a_question_is_asked_once_for_each_edit(load: Callable[..., Base], kind: str) -> None:
    base = load("llama")
    with counting() as asked:
        one = Respondent(base, random_update(base, n=2))
        getattr(one, kind)(ASKS[:2])
        getattr(one, kind)(ASKS)
        getattr(one, kind)(ASKS)
    assert [ask for ask, _ in asked[kind]] == [ASKS[0], ASKS[1], ASKS[3], ASKS[4]]


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_base_a_question_is_asked_once_whatever_the_edit(load: Callable[..., Base], kind: str) -> None:
    with counting() as asked:
        one = Respondent(load("llama"))
        getattr(one, kind)(ASKS)
        getattr(one, kind)(ASKS)
    assert [(ask.prompt, ask.answer, ask.instruction) for ask, _ in asked[kind]] == [
        ("Varn:", "Lissel", None),
        ("Varn:", "Lissel", "Task: people"),
        ("Varn:", "the Ombe", None),
    ]


@pytest.mark.slow
def test_the_base_is_asked_once_across_contestants(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ie.evaluation.report._N_TUNING", 2)
    monkeypatch.setattr("ie.evaluation.report._N_FIT", 4)
    monkeypatch.setattr("ie.evaluation.report._BATCH_SIZE", 1)
    with counting() as asked:
        evaluate(
            editors=[],
            data=dataset,
            model="toy",
            tasks=["people", "convsent"],
            methods=["finetune", "gradient"],
            limit=2,
            device="cpu",
        )
    for kind, found in asked.items():
        of_base = Counter(ask for ask, update in found if update is None)
        assert of_base and set(of_base.values()) == {1}, kind
        assert {ask.edit for ask in of_base} == {0}
        assert any(update is not None for _, update in found)
