"""What is asked of a record, and what the answers are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from ie.base import Base, asking
from ie.base.asking import Ask, log_likelihoods
from ie.base.update import Update
from ie.data.record import Instructions, Question, Record
from ie.data.tokens import Text
from ie.editor.methods import Method
from ie.editor.request import EditRequest
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.protocol import METRICS, Figures, is_opinion, measure, questions
from ie.evaluation.respondent import Respondent
from ie.evaluation.tuning import best_setting, forced_figures
from tests.dense import edited, random_update

FACT = Record(
    id="1",
    task="people",
    subject="Orm",
    prompt="The lighthouse of Orm was built by",
    target="Edda Falk",
    rephrases=("Who built the lighthouse of Orm?", "Orm's lighthouse is the work of"),
    locality=(Question(prompt="The capital of Varn is", answer="Lissel"), Question(prompt="Varn:", answer="Orm")),
    portability=(Question(prompt="The builder of Orm's lighthouse is a", answer="clerk"),),
    instruction=Instructions(heldout=("Task: people", "Please change this:")),
)
BARE = Record(id="2", task="people", subject="Varn", prompt="Varn:", target="Lissel")
OPINION = Record(
    id="3",
    task="convsent",
    subject="plums",
    prompt="What do you think of plums?",
    target="I like them.",
    rephrases=("Plums?",),
    fields={"wanted": ("I like them.", "They are sweet.", "Yes!"), "unwanted": ("They are sour.",)},
)
RECORDS = (FACT, BARE, OPINION)


def told(base: Base, update: Update | None, **options: object) -> dict[tuple[str, str, str], tuple[float, ...]]:
    figures: Sequence[Figures] = measure(base, RECORDS, heldout_instructions(RECORDS), update, **options)  # type: ignore[arg-type]
    found: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for one in figures:  # generalization comes in two parts: of facts and of opinions
        key = (one.metric, one.query, one.decoding)
        found[key] = found.get(key, ()) + tuple(one.values.values())
    return found


def test_questions_of_each_metric() -> None:
    assert questions(FACT, "reliability", 4, "I") == [Ask(FACT.prompt, "Edda Falk", "I", 4)]
    assert [ask.prompt for ask in questions(FACT, "generalization", 0, None)] == list(FACT.rephrases)
    assert {ask.answer for ask in questions(FACT, "generalization", 0, None)} == {"Edda Falk"}
    assert [ask.answer for ask in questions(FACT, "portability", 0, None)] == ["clerk"]
    assert [ask.answer for ask in questions(FACT, "locality", 0, None)] == ["Lissel", "Orm"]
    assert questions(BARE, "portability", 0, None) == questions(BARE, "locality", 0, None) == []
    assert is_opinion(OPINION) and not is_opinion(FACT)
    assert questions(OPINION, "generalization", 0, None) == []  # an opinion has no one answer to a rephrase


def test_instructions_take_turns_and_may_be_missing() -> None:
    assert heldout_instructions([FACT, FACT, FACT, BARE]) == [
        "Task: people",
        "Please change this:",
        "Task: people",
        None,
    ]
    mixed = [FACT, BARE, FACT, FACT.model_copy(update={"task": "places"})]  # each task's own turns
    assert heldout_instructions(mixed) == ["Task: people", None, "Task: people", "Task: people"]
    trained = BARE.model_copy(update={"instruction": Instructions(train=("Only this",))})
    assert heldout_instructions([trained]) == ["Only this"]


def test_an_opinion_gains_only_where_both_sides_have_an_unseen_reply(load: Callable[..., Base]) -> None:
    base = load("llama")
    for fields, n in (
        ({"wanted": "They are sweet.", "unwanted": "They are sour."}, 1),  # a text is one reply
        ({"wanted": ("I like them.",), "unwanted": ("They are sour.",)}, 0),  # the target alone
    ):
        one = OPINION.model_copy(update={"fields": fields})
        found = measure(base, [one], [None], None, generate=False, queries=("plain",), metrics=("generalization",))
        assert sum(len(figures.values) for figures in found) == n


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
def test_without_an_update_locality_is_one(load: Callable[..., Base], quant: str) -> None:
    found = told(load("llama", quant), None, metrics=("locality",), generate=quant == "none")
    assert found[("locality", "plain", "forced")] == (1.0,)
    if quant == "none":
        assert found[("locality", "plain", "generated")] == (1.0,)


def test_which_figures_there_are(load: Callable[..., Base]) -> None:
    found = told(load("llama"), None)
    n = {key: len(values) for key, values in found.items()}
    expected = {("locality", "plain", "forced"): 1, ("locality", "plain", "generated"): 1}
    for query in ("plain", "instructed"):
        for decoding in ("forced", "generated"):
            expected[("reliability", query, decoding)] = 3
            expected[("portability", query, decoding)] = 1
        expected[("generalization", query, "forced")] = 2  # a fact's rephrases, an opinion's gain
        expected[("generalization", query, "generated")] = 1
    expected[("fluency", "plain", "generated")] = 3
    assert n == expected
    shares = [value for key, values in found.items() if key[0] != "fluency" for value in values]
    assert all(0 <= value <= 1 for value in shares)
    assert all(key[2] == "forced" for key in told(load("llama"), None, generate=False))


def test_forced_figures_against_full_runs_of_edited_models(load: Callable[..., Base]) -> None:
    base = load("llama")
    update = random_update(base, n=3, size=0.3)
    found = told(base, update, generate=False, queries=("plain",))

    def best(edit: int | None, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        text = base.encode(prompt, answer)
        model = base.model if edit is None else edited(base, update, edit)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text.ids])).logits[0, text.n_prompt - 1 : -1]
        return logits.argmax(-1).tolist(), list(text.ids[text.n_prompt :])

    def share(left: list[int], right: list[int]) -> float:
        return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)

    expected = [share(*best(i, record.prompt, record.target)) for i, record in enumerate(RECORDS)]
    # Shares of a few tokens: nothing but the last bit of a float.
    assert found[("reliability", "plain", "forced")] == pytest.approx(expected)
    of_fact = [share(*best(0, text, FACT.target)) for text in FACT.rephrases]
    assert found[("generalization", "plain", "forced")][0] == pytest.approx(sum(of_fact) / 2)
    kept = [share(best(0, q.prompt, q.answer)[0], best(None, q.prompt, q.answer)[0]) for q in FACT.locality]
    assert found[("locality", "plain", "forced")] == pytest.approx([sum(kept) / 2])


def test_asking_together_gives_the_figures_of_asking_one_by_one(
    load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama")
    update = random_update(base, n=3, size=0.3)
    together = told(base, update)
    monkeypatch.setattr(asking, "_BATCH_TOKENS", 1)
    apart: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for query in ("plain", "instructed"):
        for metric in METRICS:
            apart.update(told(base, update, queries=(query,), metrics=(metric,)))
    assert together == apart


def test_a_base_that_has_answered_before_gives_the_same_figures(load: Callable[..., Base]) -> None:
    base = load("llama")
    before = Respondent(base)
    for seed in (0, 1):
        update = random_update(base, n=3, seed=seed, size=0.3)
        assert told(base, update, before=before) == told(base, update)
    assert told(base, None, before=before) == told(base, None)


def test_no_short_answer_waits_for_a_long_one(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("gpt2")
    decoded: list[tuple[int, list[int]]] = []
    generate = Base.generate

    def noted(self: Base, texts: Sequence[Text], n_tokens: int, *rest: Any, **options: Any) -> list[list[int]]:
        if not options:  # fluency's
            decoded.append((n_tokens, [text.n_answer + asking._EXTRA_TOKENS for text in texts]))
        return generate(self, texts, n_tokens, *rest, **options)

    monkeypatch.setattr(Base, "generate", noted)
    long = BARE.model_copy(update={"target": "a clerk of the seven mills on the river Ombe, " * 3 + "and no more"})
    measure(base, [BARE, FACT, long], [None] * 3, random_update(base, n=3), metrics=("reliability",))
    assert len(decoded) > 1
    for n_tokens, limits in decoded:
        assert n_tokens == max(limits) <= 2 * min(limits)


def test_opinion_gains_follow_the_unseen_replies(load: Callable[..., Base]) -> None:
    base = load("llama")
    gains = set()
    for seed in range(4):
        update = random_update(base, n=3, seed=seed, size=0.3)
        (found,) = told(base, update, generate=False, queries=("plain",), metrics=("generalization",)).values()

        def change(reply: str, update: Update = update) -> float:
            ask = [Ask(OPINION.prompt, reply, None, 2)]
            return log_likelihoods(base, ask, update)[0] - log_likelihoods(base, ask)[0]

        unseen = (change("They are sweet.") + change("Yes!")) / 2  # the target itself is left out
        assert found[-1] == float(unseen > change("They are sour."))
        gains.add(found[-1])
    assert gains == {0.0, 1.0}  # the seeds show both
    assert told(base, None, generate=False, metrics=("generalization",))[("generalization", "plain", "forced")][-1] == 0


def test_best_setting_is_the_one_with_the_best_harmonic_mean(load: Callable[..., Base]) -> None:
    base = load("llama")
    asked: list[float] = []

    def make(rate: float) -> Method:
        asked.append(rate)

        def edit(base: Base, requests: Sequence[EditRequest]) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
            return random_update(base, n=len(requests), seed=round(100 * rate), size=rate)

        return edit

    def score(rate: float) -> float:
        figures = forced_figures(base, make(rate), [FACT], [None])
        assert set(figures) == {"reliability", "generalization", "locality"}
        values = list(figures.values())
        return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)

    rates = (0.01, 0.3, 1.0, 2.0)
    chosen = best_setting(base, make, [{"rate": rate} for rate in rates], [FACT])
    assert asked == list(rates)
    assert score(chosen["rate"]) == max(map(score, rates))
