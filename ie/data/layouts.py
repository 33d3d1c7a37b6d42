"""Published files to records, whatever layout they are in; the layout is found from the fields, not from a name.

Rules that hold for every layout. An input record becomes one record or is skipped for a reason that is counted. The
first alias is the answer. White space around texts goes (the one space before a target is added where it is read). A
published question without prompt or answer is left out (in a file of one's own it is an error); a record without
rephrases, locality or portability is still a record.

The readers of opinions (ConvSent, personality) are in `ie.data.opinions`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ie.data.dataset import parse_record
from ie.data.entries import Entry, Skip, first_text, read_entries, shown, texts
from ie.data.opinions import SIDES, TRAITS, read_opinions
from ie.data.record import Question, Record
from ie.errors import DataError

__all__ = ["LAYOUTS", "Layout", "ReadResult", "read_source"]

NQ_MARK = re.compile(r"^nq question:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """A published form of records.

    Attributes:
        name: what it is called.
        fields: the fields that give it away, for the error about an unknown one.
        matches: whether a file whose records have these fields is in this layout.
        read: one record or skip for each entry, in order.
    """

    name: str
    fields: str
    matches: Callable[[frozenset[str]], bool]
    read: Callable[[Sequence[Entry], str], Iterator[Record | Skip]]


@dataclass(frozen=True)
class ReadResult:
    """What a file gave: its records, the input records that gave none by reason, and the layout that was found."""

    records: tuple[Record, ...]
    skipped: Counter[str]
    layout: str


def read_source(path: str | Path, task: str) -> ReadResult:
    """Reads a published file, or records of our own, as JSON list or JSONL.

    Args:
        path: the file.
        task: the task that its records are for.

    Returns:
        Records and skips; together as many as the file has entries.

    Raises:
        DataError: no such file, broken JSON (with its line), no records, an unknown layout, or in records of our own
            a wrong field.
    """
    file = Path(path)
    entries, skipped = read_entries(file)
    fields = frozenset(field for entry in entries for field in entry.content)
    layout = next((layout for layout in LAYOUTS if layout.matches(fields)), None)
    if layout is None:
        raise DataError(
            f"{file}: unknown layout with the fields {shown(fields)}",
            hint="known layouts: " + "; ".join(f"{layout.name} ({layout.fields})" for layout in LAYOUTS),
        )
    records = []
    for result in layout.read(entries, task):
        if isinstance(result, Skip):
            skipped[result.reason] += 1
        else:
            records.append(result)
    return ReadResult(tuple(records), skipped, layout.name)


def _question(prompt: Any, answer: Any) -> tuple[Question, ...]:
    """One question, or none where prompt or answer is missing; a marker of the Natural Questions goes."""
    asked, told = first_text(prompt), first_text(answer)
    if NQ_MARK.match(asked):
        asked = NQ_MARK.sub("", asked).rstrip(" ?")
        asked = f"{asked}?" if asked else ""
    return (Question(prompt=asked, answer=told),) if asked and told else ()


def _questions_by_kind(kinds: Any) -> tuple[Question, ...]:
    """KnowEdit's {kind: [{prompt, ground_truth}]} as one row of questions."""
    if not isinstance(kinds, Mapping):
        return ()
    found: list[Question] = []
    for questions in kinds.values():
        for question in questions if isinstance(questions, list) else [questions]:
            if isinstance(question, Mapping):
                found += _question(question.get("prompt"), question.get("ground_truth"))
    return tuple(found)


def _fact(
    entry: Entry,
    task: str,
    *,
    subject: Any,
    prompt: Any,
    target: Any,
    ground_truth: Any = None,
    rephrases: Any = (),
    locality: tuple[Question, ...] = (),
    portability: tuple[Question, ...] = (),
) -> Record | Skip:
    """A record from what a layout found, or the reason why it is none."""
    subject, prompt, target, truth = (
        first_text(subject),
        first_text(prompt),
        first_text(target),
        first_text(ground_truth),
    )
    for value, reason in ((subject, "no subject"), (prompt, "no prompt"), (target, "empty target")):
        if not value:
            return Skip(reason)
    if target.casefold() == truth.casefold():
        return Skip("target equals ground truth")
    return Record(
        id=entry.id,
        task=task,
        subject=subject,
        prompt=prompt,
        target=target,
        ground_truth=truth or None,
        rephrases=texts(list(rephrases) if isinstance(rephrases, tuple) else rephrases),
        locality=locality,
        portability=portability,
    )


def _each(read: Callable[[Entry, str], Record | Skip]) -> Callable[[Sequence[Entry], str], Iterator[Record | Skip]]:
    """Reads entries one by one, for layouts whose records know nothing of each other."""
    return lambda entries, task: (read(entry, task) for entry in entries)


def _read_own(entry: Entry, task: str) -> Record | Skip:
    content = {name: value for name, value in entry.content.items() if name not in ("instruction", "case_id")}
    for name, reason in (("subject", "no subject"), ("prompt", "no prompt"), ("target", "empty target")):
        if name in content and (content[name] is None or not str(content[name]).strip()):
            return Skip(reason)
    truth = content.get("ground_truth", "")
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        content.pop("ground_truth", None)
    record = parse_record(content, where=entry.where, default_id=entry.id, task=task)
    if record.ground_truth is not None and record.target.casefold() == record.ground_truth.casefold():
        return Skip("target equals ground truth")
    return record


def _read_counterfact(entry: Entry, task: str) -> Record | Skip:
    raw = entry.content
    return _fact(
        entry,
        task,
        subject=raw.get("subject"),
        prompt=raw.get("prompt"),
        target=raw.get("target_new"),
        ground_truth=raw.get("ground_truth"),
        rephrases=raw.get("rephrase_prompt"),
        locality=_question(raw.get("locality_prompt"), raw.get("locality_ground_truth")),
    )


def _read_rome(entry: Entry, task: str) -> Record | Skip:
    """Neighbours share the true object of the fact, so that object is the answer to each of them."""
    raw = entry.content
    rewrite = raw.get("requested_rewrite")
    if not isinstance(rewrite, Mapping):
        return Skip("no prompt")
    new, true = rewrite.get("target_new"), rewrite.get("target_true")
    truth = true.get("str") if isinstance(true, Mapping) else true
    subject = first_text(rewrite.get("subject"))
    return _fact(
        entry,
        task,
        subject=subject,
        prompt=first_text(rewrite.get("prompt")).replace("{}", subject),
        target=new.get("str") if isinstance(new, Mapping) else new,
        ground_truth=truth,
        rephrases=raw.get("paraphrase_prompts"),
        locality=tuple(
            question for asked in texts(raw.get("neighborhood_prompts")) for question in _question(asked, truth)
        ),
    )


def _read_knowedit(entry: Entry, task: str) -> Record | Skip:
    raw = entry.content
    return _fact(
        entry,
        task,
        subject=raw.get("subject"),
        prompt=raw.get("prompt"),
        target=raw.get("target_new"),
        ground_truth=raw.get("ground_truth"),
        rephrases=raw.get("rephrase_prompt", raw.get("rephrase")),
        locality=_questions_by_kind(raw.get("locality")),
        portability=_questions_by_kind(raw.get("portability")),
    )


def _read_zsre(entry: Entry, task: str) -> Record | Skip:
    """`alt` is the edit target, whatever else the file says; where `answers` is given, `pred` is only a guess."""
    raw = entry.content
    follows = raw.get("portability")
    follows = follows if isinstance(follows, Mapping) else {}
    return _fact(
        entry,
        task,
        subject=raw.get("subject"),
        prompt=raw.get("src"),
        target=raw.get("alt"),
        ground_truth=raw.get("answers") or raw.get("pred") or raw.get("old"),
        rephrases=raw.get("rephrase"),
        locality=_question(raw.get("loc"), raw.get("loc_ans")),
        portability=_question(follows.get("New Question"), follows.get("New Answer")),
    )


def _read_wikifactdiff(entry: Entry, task: str) -> Record | Skip:
    raw = entry.content.get("en")
    return _read_zsre(Entry(entry.id, entry.where, raw), task) if isinstance(raw, Mapping) else Skip("no prompt")


def _has(*needed: str) -> Callable[[frozenset[str]], bool]:
    return lambda fields: fields.issuperset(needed)


def _is_knowedit(fields: frozenset[str]) -> bool:
    return fields.issuperset({"subject", "prompt", "target_new"}) and bool(fields & {"locality", "portability"})


# The first that matches is taken: a layout stands before those whose fields it includes.
LAYOUTS: tuple[Layout, ...] = (
    Layout("own", "subject, prompt, target", _has("subject", "prompt", "target"), _each(_read_own)),
    Layout("ROME", "requested_rewrite", _has("requested_rewrite"), _each(_read_rome)),
    Layout("KnowEdit", "subject, prompt, target_new, locality or portability", _is_knowedit, _each(_read_knowedit)),
    Layout(
        "EasyEdit CounterFact",
        "subject, prompt, target_new",
        _has("subject", "prompt", "target_new"),
        _each(_read_counterfact),
    ),
    Layout(
        "ZsRE-MEND portability",
        "subject, src, alt, answers, portability",
        _has("subject", "src", "alt", "answers", "portability"),
        _each(_read_zsre),
    ),
    Layout("ZsRE-MEND", "subject, src, alt", _has("subject", "src", "alt"), _each(_read_zsre)),
    Layout("ConvSent", "ent, pos, neg", _has("ent", "pos", "neg"), read_opinions(SIDES)),
    Layout("WikiFactDiff", "en {subject, src, alt}", _has("en"), _each(_read_wikifactdiff)),
    Layout(
        "personality",
        "ent, " + ", ".join(TRAITS),
        _has("ent", *TRAITS),
        read_opinions({trait: trait for trait in TRAITS}),
    ),
)
