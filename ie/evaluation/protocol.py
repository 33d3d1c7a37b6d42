"""How edits are measured: which questions are asked of a record, and what their answers are worth.

    reliability      the edit prompt gives the target
    generalization   rephrases give it too; on opinions: unseen replies of the wanted side gain over the other side's
    portability      questions that follow from the new fact are answered rightly
    locality         unrelated questions have the same answer as before
    locality-known   the same, of questions alone that the base answered rightly before

Each *forced* (share of answer tokens that are the arg-max, the answer being given) or *generated* (greedy decoding,
exact match), each *plain* or *instructed*. A record counts once, with the mean over its questions of one kind.

All questions of a batch of records are asked together, and each different one once; figures are made of the answers
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ie.base.asking import Ask, matches
from ie.base.model import Base
from ie.base.update import Update
from ie.data.record import Record
from ie.evaluation.metrics import mean, ngram_entropy, share_equal
from ie.evaluation.respondent import Respondent

__all__ = ["METRICS", "Figures", "is_opinion", "measure", "questions"]

METRICS = ("reliability", "generalization", "portability", "locality")
_FLUENCY_TOKENS = 32

_Replies = dict[Ask, float]  # each with its share in the wanted side's gain on the other
_Way = Callable[[Respondent, Respondent, str, Sequence[Ask]], list[float]]


@dataclass(frozen=True)
class Figures:
    """Values of one metric, one for each record that has a question of its kind, by the record's number."""

    metric: str
    query: str
    decoding: str
    values: Mapping[int, float]


def is_opinion(record: Record) -> bool:
    """Whether the record wants an opinion: replies of a side rather than one answer."""
    return bool(record.fields.get("wanted")) and bool(record.fields.get("unwanted"))


def questions(record: Record, metric: str, edit: int, instruction: str | None) -> list[Ask]:
    """The questions of one metric about a record, under edit number `edit`."""
    if metric == "reliability":
        return [Ask(record.prompt, record.target, instruction, edit)]
    if metric == "generalization":
        return [] if is_opinion(record) else [Ask(text, record.target, instruction, edit) for text in record.rephrases]
    of_metric = record.portability if metric == "portability" else record.locality
    return [Ask(question.prompt, question.answer, instruction, edit) for question in of_metric]


def measure(
    base: Base,
    records: Sequence[Record],
    instructions: Sequence[str | None],
    update: Update | None,
    *,
    generate: bool = True,
    queries: Sequence[str] = ("plain", "instructed"),
    metrics: Sequence[str] = METRICS,
    before: Respondent | None = None,
) -> list[Figures]:
    """Ask every question of some records, each record under its own edit.

    Args:
        base: the base model.
        records: n records.
        instructions: n instructions, for instructed queries.
        update: n edits; None measures the base itself.
        generate: whether to decode greedily too, and to measure fluency.
        queries: `plain`, `instructed`, or both.
        metrics: which of `METRICS`.
        before: the unedited base with all that it has answered so far; None for one that has answered nothing.
    """
    before = before or Respondent(base)
    after = before if update is None else Respondent(base, update)
    asked: dict[tuple[str, str], list[Ask]] = {}
    replies: dict[str, dict[int, _Replies]] = {}
    for query in queries:
        shown = [text if query == "instructed" else None for text in instructions]
        for metric in metrics:
            if metric == "locality" and query == "instructed":
                continue  # an unrelated question comes from a user who knows of no edit
            asked[metric, query] = [ask for i, one in enumerate(records) for ask in questions(one, metric, i, shown[i])]
        if "generalization" in metrics:
            replies[query] = {i: _replies(one, i, shown[i]) for i, one in enumerate(records) if is_opinion(one)}
    # Asked together, in full batches: the figures then find every answer known.
    every = [ask for asks in asked.values() for ask in asks]
    after.predictions(every)
    if generate:
        after.answers(every)
    weighed = [ask for of_query in replies.values() for one in of_query.values() for ask in one]
    before.log_likelihoods(weighed)
    after.log_likelihoods(weighed)

    out: list[Figures] = []
    for query in queries:
        for metric in metrics:
            asks = asked.get((metric, query), [])
            ways: dict[str, _Way] = {"forced": _forced, **({"generated": _generated} if generate else {})}
            for decoding, way in ways.items():
                values = way(before, after, metric, asks)
                out.append(Figures(metric, query, decoding, _by_record(asks, values)))
                if metric == "locality":
                    known = [right == 1 for right in way(before, before, "", asks)]
                    out.append(Figures("locality-known", query, decoding, _by_record(asks, values, known)))
        gains = {edit: _gains(before, after, one) for edit, one in replies.get(query, {}).items() if one}
        out.append(Figures("generalization", query, "forced", gains))
    if generate and "plain" in queries:
        out.append(Figures("fluency", "plain", "generated", dict(enumerate(_fluency(after, records)))))
    return [figures for figures in out if figures.values]


def _by_record(asks: Sequence[Ask], values: Sequence[float], counted: Sequence[bool] | None = None) -> dict[int, float]:
    """Mean of the values of each record's questions; only of those that count."""
    of_record: dict[int, list[float]] = {}
    for ask, value, counts in zip(asks, values, counted or [True] * len(asks), strict=True):
        if counts:
            of_record.setdefault(ask.edit, []).append(value)
    return {edit: mean(group) for edit, group in of_record.items()}


def _forced(before: Respondent, after: Respondent, metric: str, asks: Sequence[Ask]) -> list[float]:
    if metric == "locality":
        expected = before.predictions(asks)
    else:
        texts = [after.base.encode(ask.prompt, ask.answer, ask.instruction) for ask in asks]
        expected = [text.ids[text.n_prompt :] for text in texts]
    return [share_equal(seen, right) for seen, right in zip(after.predictions(asks), expected, strict=True)]


def _generated(before: Respondent, after: Respondent, metric: str, asks: Sequence[Ask]) -> list[float]:
    expected = before.answers(asks) if metric == "locality" else [ask.answer for ask in asks]
    return [float(matches(seen, right)) for seen, right in zip(after.answers(asks), expected, strict=True)]


def _replies(record: Record, edit: int, instruction: str | None) -> _Replies:
    """The unseen replies of both sides to an opinion's prompt, under edit number `edit`; none if a side has none."""
    out: _Replies = {}
    sides = []
    for side in ("wanted", "unwanted"):
        given = record.fields[side]
        replies = [given] if isinstance(given, str) else given
        sides.append([reply for reply in replies if reply != record.target])
    for unseen, sign in zip(sides, (1.0, -1.0), strict=True) if all(sides) else ():
        for reply in unseen:
            ask = Ask(record.prompt, reply, instruction, edit)
            out[ask] = out.get(ask, 0.0) + sign / len(unseen)
    return out


def _gains(before: Respondent, after: Respondent, replies: _Replies) -> float:
    """1 if the wanted side's unseen replies gain on the other side's in mean log-probability, else 0."""
    asks = list(replies)
    found = zip(replies.values(), before.log_likelihoods(asks), after.log_likelihoods(asks), strict=True)
    return float(sum(share * (high - low) for share, low, high in found) > 0)


def _fluency(after: Respondent, records: Sequence[Record]) -> tuple[float, ...]:
    asks = [Ask(record.prompt, record.target, None, i) for i, record in enumerate(records)]
    return tuple(ngram_entropy(tokens) for tokens in after.continuations(asks, _FLUENCY_TOKENS))
