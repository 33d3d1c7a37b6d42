"""Asking many questions at once: forced predictions, likelihoods, greedy answers, and when an answer matches."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ie.base import Base, asking, load_base
from ie.base.asking import Ask, answers, by_length, continuations, log_likelihoods, matches, normalise, predictions
from ie.patch.lowrank import select
from tests.dense import edited, random_update

INSTRUCTION = "Task: people\nDescription: Change who somebody works for."
ASKS = (
    Ask("The lighthouse of Orm was built by", "Edda Falk", edit=1),
    Ask("Varn:", "Lissel", edit=0),
    Ask("Who wrote the song of the seven mills?", "a clerk", INSTRUCTION, edit=1),
    Ask("Varn:", "the Ombe", edit=1),
)


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("Paris.", "paris", True),
        ('"Paris"', "Paris", True),
        ("  the  river\tOmbe ", "The river Ombe", True),
        ("STRASSE", "straße", True),
        ("Paris, France", "Paris", False),
        ("Pari", "Paris", False),
        ("", "Paris", False),
        ("co-op", "coop", False),
    ],
)
def test_matches_word_for_word_after_normalising(answer: str, target: str, same: bool) -> None:
    assert matches(answer, target) is same


def test_normalise_keeps_what_stands_inside() -> None:
    assert normalise(" (St. John's,  Old Town!) ") == "st. john's, old town"


@pytest.mark.parametrize(
    ("shown", "awaited", "cut"),
    [
        ("Edda Falk and then", "Edda Falk", "Edda Falk"),
        ("Edda Falkson", "Edda Falk", "Edda Falkson"),  # not the end of a word
        ("Edda Falk, who", "Edda Falk", "Edda Falk"),
        ("Edda Falk", "Edda Falk", "Edda Falk"),
        ("Ann Ot", "Edda Falk", "Ann Ot"),
    ],
)
def test_an_answer_that_does_not_end_is_cut_where_the_awaited_one_ends(shown: str, awaited: str, cut: str) -> None:
    assert asking._cut(shown, awaited) == cut


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_forced_figures_are_those_of_a_full_run_of_each_edited_model(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    update = random_update(base, n=2)
    found, likelihoods = predictions(base, ASKS, update), log_likelihoods(base, ASKS, update)
    for ask, tokens, likelihood in zip(ASKS, found, likelihoods, strict=True):
        model = edited(base, update, ask.edit)
        text = base.encode(ask.prompt, ask.answer, ask.instruction)
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, text.n_prompt - 1 : -1]
        assert tokens == tuple(logits.argmax(-1).tolist())
        mean = logits.log_softmax(-1).gather(-1, ids[0, text.n_prompt :, None]).mean()
        assert math.isclose(likelihood, mean.item(), abs_tol=1e-5)  # float32 logits of size 1


def test_batches_do_not_change_answers(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("llama")
    update = random_update(base, n=2, size=0.3)
    together = answers(base, ASKS, update), predictions(base, ASKS, update), continuations(base, ASKS, 3, update)
    monkeypatch.setattr(asking, "_BATCH_TOKENS", 1)
    assert (answers(base, ASKS, update), predictions(base, ASKS, update), continuations(base, ASKS, 3, update)) == (
        together
    )
    for i, ask in enumerate(ASKS):
        assert predictions(base, [Ask(ask.prompt, ask.answer, ask.instruction)], select(update, ask.edit)) == [
            together[1][i]
        ]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (" Paris, France.\n", "Paris, France."),
        (" Paris, France.\nThe", "Paris, France."),
        ("\nParis\n", "Paris"),
        (" Paris, France.", "Paris"),  # goes on: cut where the awaited one ends
        (" Lima\nParis", "Lima"),
    ],
)
def test_a_line_break_ends_an_answer_wherever_it_stands(
    load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, written: str, answer: str
) -> None:
    base = load("gpt2")
    ids = base.tokenizer(written)["input_ids"]
    monkeypatch.setattr(Base, "generate", lambda *_: [ids])
    monkeypatch.setattr(asking, "_limit", lambda *_: len(ids))
    assert answers(base, [Ask("The capital is", "Paris")]) == [answer]


@pytest.mark.parametrize("awaited", ["Lissel", ""])
def test_a_prompt_of_full_length_leaves_room_for_its_answer(load: Callable[..., Base], awaited: str) -> None:
    """Learned positions end where the configuration says."""
    base = load("gpt2")
    ask = Ask("The harbour town of Lissel lies in the north of Varn. " * 40, awaited)
    assert len(base.encode(ask.prompt, awaited).ids) == base.max_length == 256
    assert len(answers(base, [ask])) == 1
    assert len(continuations(base, [ask], 32)[0]) == 32
    assert len(continuations(base, [ask], 300)[0]) == base.max_length - 1


def test_answers_are_greedy_and_end_with_the_line(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    texts = [base.encode(ask.prompt, ask.answer, ask.instruction) for ask in ASKS]
    for ask, text, answer in zip(ASKS, texts, answers(base, ASKS), strict=True):
        n_tokens = text.n_answer + 4
        ids = base.generate([text], n_tokens)[0]
        assert len(ids) <= n_tokens
        shown = base.tokenizer.decode(ids).strip()
        assert answer in (shown.split("\n")[0].strip(), ask.answer)
        assert "\n" not in answer


def test_continuations_have_the_length_asked_for(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    found = continuations(base, ASKS, 5)
    assert [len(ids) for ids in found] == [5] * len(ASKS)
    assert not any(base.end_ids & set(ids) for ids in found)


def test_nothing_asked_nothing_answered(load: Callable[..., Base]) -> None:
    for ask in (answers, predictions, log_likelihoods):
        assert not ask(load("gpt2"), [])


@pytest.mark.parametrize("n_tokens", [64, 8192])
def test_a_long_question_does_not_pad_many_short_ones(load: Callable[..., Base], n_tokens: int) -> None:
    base = load("gpt2")
    asks = [Ask("Varn:", "Lissel" * n) for n in (1, 2, 3) * 30 + (12, 25)]
    batches = list(by_length(base, asks, n_tokens))
    assert sorted(i for indices, _ in batches for i in indices) == list(range(len(asks)))
    for indices, texts in batches:
        lengths = [len(text.ids) for text in texts]
        assert texts == [base.encode(asks[i].prompt, asks[i].answer) for i in indices]
        padded = len(lengths) * max(lengths)
        assert len(texts) == 1 or (padded <= n_tokens and padded - sum(lengths) <= asking._MAX_PADDING)
    assert n_tokens == 64 or 1 < len(batches) < 6


def test_answers_are_greedy_whatever_the_checkpoint_asks_for(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    asked = answers(load_base(str(folder), device="cpu"), ASKS)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True})
    )
    assert answers(load_base(str(folder), device="cpu"), ASKS) == asked
