"""Episodes: edits to make together with the questions that show how well each was made.

An episode is one record's edit request, in one of its wordings and with one of its instructions, and its queries: the
edit prompt and another wording, each with the instruction or plain, which must give the target; the record's unrelated
questions and other records' prompts, which must not move.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ie.base.asking import Ask
from ie.data.record import Record
from ie.editor.request import EditRequest

__all__ = ["Episodes", "make_episodes"]


@dataclass(frozen=True)
class Episodes:
    """A batch of independent episodes.

    Attributes:
        requests: the edits, one an episode.
        wanted: queries that must give the target after the edit, `Ask.edit` naming their episode.
        kept: queries whose answer must stay as it was.
    """

    requests: list[EditRequest]
    wanted: list[Ask]
    kept: list[Ask]


def make_episodes(
    records: Sequence[Record], rng: random.Random, *, instructed: bool, plain_share: float, n_negatives: int
) -> Episodes:
    """Draw one episode for each record.

    Args:
        records: the records to edit, training ones.
        rng: what is drawn with.
        instructed: whether the method reads instructions.
        plain_share: share of the queries that carry no instruction.
        n_negatives: how many other records' prompts must stay as they are, for each edit.
    """
    out = Episodes([], [], [])
    for edit, record in enumerate(records):
        instruction = rng.choice(record.instruction.train) if instructed and record.instruction.train else None
        edited, *others = _wordings(record, rng)
        out.requests.append(EditRequest(edited, record.target, instruction))
        prompts = [edited, *others[:1]]
        for prompt in prompts:
            shown = None if rng.random() < plain_share else instruction
            out.wanted.append(Ask(prompt, record.target, shown, edit))
        if record.locality:
            question = rng.choice(record.locality)
            out.kept.append(Ask(question.prompt, question.answer, None, edit))
        unrelated = [other for other in records if other.subject != record.subject]
        for other in rng.sample(unrelated, min(n_negatives, len(unrelated))):
            out.kept.append(Ask(other.prompt, other.ground_truth or other.target, None, edit))
    return out


def _wordings(record: Record, rng: random.Random) -> list[str]:
    """The record's wordings in random order, its own prompt first half of the time.

    A user may edit by any wording: an editor that has seen only one of each fact is surprised by the others.
    """
    rest = list(record.rephrases)
    rng.shuffle(rest)
    if rest and rng.random() < 0.5:
        return [rest[0], *rng.sample([record.prompt, *rest[1:]], len(rest))]
    return [record.prompt, *rest]
