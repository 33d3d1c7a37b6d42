"""How edits are measured: which questions are asked of a record, and what their answers are worth.

    reliability      the edit prompt gives the target
    generalization   rephrases give it too; on opinions: unseen replies of the wanted side gain over the other side's
    portability      questions that follow from the new fact are answered rightly
    locality         unrelated questions have the same answer as before

Each *forced* (share of answer tokens that are the arg-max, the answer being given) or *generated* (greedy decoding,
exact match), each *plain* or *instructed*. A record counts once, with the mean over its questions of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ie.base.asking import Ask, answers, continuations, log_likelihoods, matches, predictions
from ie.base.model import Base
from ie.base.update import Update
from ie.data.record import Record
from ie.evaluation.metrics import mean, ngram_entropy, share_equal

__all__ = ["METRICS", "Figures", "is_opinion", "measure", "questions"]

METRICS = ("reliability", "generalization", "portability", "locality")
_FLUENCY_TOKENS = 32


@dataclass(frozen=True)
class Figures:
    """Values of one metric, one for each record that has a question of its kind."""

    metric: str
    query: str
    decoding: str
    values: tuple[float, ...]


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
    """
    out: list[Figures] = []
    for query in queries:
        shown = [text if query == "instructed" else None for text in instructions]
        for metric in metrics:
            if metric == "locality" and query == "instructed":
                continue  # an unrelated question comes from a user who knows of no edit
            asks = [ask for i, record in enumerate(records) for ask in questions(record, metric, i, shown[i])]
            out.append(_figures(metric, query, "forced", asks, _forced(base, metric, asks, update)))
            if generate:
                out.append(_figures(metric, query, "generated", asks, _generated(base, metric, asks, update)))
        if "generalization" in metrics:
            opinions = [i for i, record in enumerate(records) if is_opinion(record)]
            gains = _opinion_gains(base, records, opinions, shown, update)
            out.append(Figures("generalization", query, "forced", gains))
    if generate and "plain" in queries:
        out.append(Figures("fluency", "plain", "generated", _fluency(base, records, update)))
    return [figures for figures in out if figures.values]


def _figures(metric: str, query: str, decoding: str, asks: Sequence[Ask], values: Sequence[float]) -> Figures:
    of_record: dict[int, list[float]] = {}
    for ask, value in zip(asks, values, strict=True):
        of_record.setdefault(ask.edit, []).append(value)
    return Figures(metric, query, decoding, tuple(mean(group) for group in of_record.values()))


def _forced(base: Base, metric: str, asks: Sequence[Ask], update: Update | None) -> list[float]:
    after = predictions(base, asks, update)
    if metric == "locality":
        expected = predictions(base, asks)
    else:
        texts = [base.encode(ask.prompt, ask.answer, ask.instruction) for ask in asks]
        expected = [text.ids[text.n_prompt :] for text in texts]
    return [share_equal(seen, right) for seen, right in zip(after, expected, strict=True)]


def _generated(base: Base, metric: str, asks: Sequence[Ask], update: Update | None) -> list[float]:
    after = answers(base, asks, update)
    expected = answers(base, asks) if metric == "locality" else [ask.answer for ask in asks]
    return [float(matches(seen, right)) for seen, right in zip(after, expected, strict=True)]


def _opinion_gains(
    base: Base, records: Sequence[Record], chosen: Sequence[int], shown: Sequence[str | None], update: Update | None
) -> tuple[float, ...]:
    """1 for each record whose wanted side's unseen replies gain on the other side's in mean log-probability."""
    if update is None:
        return (0.0,) * len(chosen)  # nothing changes, so nothing gains
    asks, signs = [], []
    for i in chosen:
        for side, sign in (("wanted", 1.0), ("unwanted", -1.0)):
            replies = [reply for reply in records[i].fields[side] if reply != records[i].target]
            asks += [Ask(records[i].prompt, reply, shown[i], i) for reply in replies]
            signs += [sign / len(replies)] * len(replies)
    before, after = log_likelihoods(base, asks), log_likelihoods(base, asks, update)
    gains = dict.fromkeys(chosen, 0.0)
    for ask, sign, low, high in zip(asks, signs, before, after, strict=True):
        gains[ask.edit] += sign * (high - low)
    return tuple(float(gain > 0) for gain in gains.values())


def _fluency(base: Base, records: Sequence[Record], update: Update | None) -> tuple[float, ...]:
    asks = [Ask(record.prompt, record.target, None, i) for i, record in enumerate(records)]
    return tuple(ngram_entropy(tokens) for tokens in continuations(base, asks, _FLUENCY_TOKENS, update))
