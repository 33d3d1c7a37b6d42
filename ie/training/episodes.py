"""Episodes: edits to make together with the questions that show how well each was made.

An episode is one record's edit request, in one of its wordings and with one of its instructions, and its queries: the
edit prompt and another wording, each with the instruction or plain, which must give the target; the record's unrelated
questions and other records' prompts, which must not move.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ie.base.asking import Ask
from ie.data.record import Record
from ie.editor.request import EditRequest

__all__ = ["Episodes", "Relations", "consistent", "draw_instruction", "make_episodes"]


@dataclass(frozen=True)
class Episodes:
    """A batch of independent episodes.

    Attributes:
        requests: the edits, one an episode.
        wanted: queries that must give the target after the edit, `Ask.edit` naming their episode.
        kept: queries whose answer must stay as it was.
        n_stacks: into how many sums edits are stacked, see `ie.base.update.stacked`; 0 leaves each alone. Queries are
            then asked under the sum that their episode is part of.
    """

    requests: list[EditRequest]
    wanted: list[Ask]
    kept: list[Ask]
    n_stacks: int = 0


class Relations:
    """Finds records that ask the same of different subjects: their prompts are alike but for the subject's name.

    Args:
        records: the records to find.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._groups: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            self._groups.setdefault(_relation(record), []).append(record)

    def other(self, record: Record, rng: random.Random) -> Record | None:
        """A record of the same relation and another subject; None if there is none."""
        group = [one for one in self._groups.get(_relation(record), ()) if one.subject != record.subject]
        return rng.choice(group) if group else None


def _relation(record: Record) -> tuple[str, str]:
    return record.task, record.prompt.replace(record.subject, "{}")


def make_episodes(
    records: Sequence[Record],
    rng: random.Random,
    *,
    negatives: Sequence[Record] | None = None,
    relations: Relations | None,
    told_share: float,
    plain_share: float,
    n_negatives: int,
) -> Episodes:
    """Draw one episode for each record.

    Args:
        records: the records to edit, training ones.
        rng: what is drawn with.
        negatives: records whose prompts are drawn to stay as they are, but for those about an edit's own subject; None
            for the batch's own.
        relations: where records that ask the same of another subject are found; None to do without.
        told_share: share of the edits that come with an instruction.
        plain_share: share of the queries that carry no instruction.
        n_negatives: how many other records' prompts must stay as they are, for each edit; with `relations` the first
            asks the same of another subject, which is what an edit spreads to soonest.
    """
    out = Episodes([], [], [])
    for edit, record in enumerate(records):
        instruction = draw_instruction(record, rng) if rng.random() < told_share else None
        edited, *others = _wordings(record, rng)
        out.requests.append(EditRequest(edited, record.target, instruction))
        prompts = [edited, *others[:1]]
        for prompt in prompts:
            shown = None if rng.random() < plain_share else instruction
            out.wanted.append(Ask(prompt, record.target, shown, edit, ended=True))
        if record.locality:
            question = rng.choice(record.locality)
            out.kept.append(Ask(question.prompt, question.answer, None, edit))
        unrelated = [other for other in negatives or records if other.subject != record.subject]
        related = relations.other(record, rng) if relations and n_negatives else None
        n_drawn = min(n_negatives - (related is not None), len(unrelated))
        for other in [*([related] if related else []), *rng.sample(unrelated, n_drawn)]:
            out.kept.append(Ask(other.prompt, other.ground_truth or other.target, None, edit))
    return out


def consistent(episodes: Episodes, records: Sequence[Record], n_sums: int) -> Episodes:
    """Episodes without the queries to keep that ask what another edit of the same sum is to change, in any wording.

    Args:
        episodes: a batch.
        records: its records, one an episode.
        n_sums: into how many sums its edits are added up, edit i into sum i modulo `n_sums`.
    """
    changed = {
        (edit % n_sums, text) for edit, record in enumerate(records) for text in (record.prompt, *record.rephrases)
    }
    return replace(episodes, kept=[ask for ask in episodes.kept if (ask.edit % n_sums, ask.prompt) not in changed])


def draw_instruction(record: Record, rng: random.Random) -> str | None:
    """One of the instructions that training sees; None where the record has none."""
    return rng.choice(record.instruction.train) if record.instruction.train else None


def _wordings(record: Record, rng: random.Random) -> list[str]:
    """The record's wordings in random order, its own prompt first half of the time.

    A user may edit by any wording: an editor that has seen only one of each fact is surprised by the others.
    """
    rest = list(record.rephrases)
    rng.shuffle(rest)
    if rest and rng.random() < 0.5:
        return [rest[0], *rng.sample([record.prompt, *rest[1:]], len(rest))]
    return [record.prompt, *rest]
