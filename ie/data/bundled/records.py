"""From facts and opinions to records: the five bundled tasks.

    general   general knowledge                 statements; rephrases mix statements and one question
    people    invented people                   the same
    places    invented towns and companies      the same
    convsent  opinions about topics             "What do you think of X?", a target reply of the wanted side
    zsre      a fifth of all subjects           questions only; the default hold-out

A subject belongs to one task, and the questions of a record ask about subjects of its own task. Drawn from a seed for
each record, so the records are the same on every machine and a record doesn't depend on its neighbours in the list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from random import Random

from ..record import Question, Record
from .opinions import SIDES, Opinion, opinions, question_wordings
from .world import SEED, Fact, Relation, facts, follow

__all__ = ["bundled_records"]

N_REPHRASES = 4


class _Task:
    """The facts of one task, found by relation and by subject."""

    def __init__(self, members: Sequence[Fact]) -> None:
        self.facts = members
        self.by_relation: dict[str, list[Fact]] = defaultdict(list)
        self.by_subject: dict[str, list[Fact]] = defaultdict(list)
        for fact in members:
            self.by_relation[fact.relation.name].append(fact)
            self.by_subject[fact.subject].append(fact)


def _question(fact: Fact, rng: Random, wordings: Sequence[str] = ()) -> Question:
    return Question(prompt=fact.prompt(rng.choice(wordings or fact.relation.wordings)), answer=fact.answer)


def _wordings(relation: Relation, rng: Random, questions_only: bool) -> tuple[str, list[str]]:
    """The wording of the prompt and those of the rephrases."""
    if questions_only:
        first, *others = rng.sample(relation.questions, len(relation.questions))
        return first, others[:N_REPHRASES]
    first, *others = rng.sample(relation.statements, len(relation.statements))
    others = [*others[: N_REPHRASES - 1], rng.choice(relation.questions)]
    rng.shuffle(others)
    return first, others


def _locality(fact: Fact, wording: str, task: _Task, rng: Random) -> tuple[Question, ...]:
    """Two neighbours (one in the wording of the prompt), the subject's other facts, unrelated facts."""
    ask = fact.task == "zsre"
    neighbours = [other for other in task.by_relation[fact.relation.name] if other.subject != fact.subject]
    near = rng.sample(neighbours, min(2, len(neighbours)))
    found = [_question(other, rng, (wording,) if i == 0 else other.relation.questions) for i, other in enumerate(near)]
    own = [other for other in task.by_subject[fact.subject] if other.relation != fact.relation]
    chosen = [rng.choice(own)] if own else []
    while len(found) + len(chosen) < 4 or not chosen or chosen[-1].subject == fact.subject:
        other = rng.choice(task.facts)
        if other.subject != fact.subject and other.relation != fact.relation and other not in chosen:
            chosen.append(other)
    return (*found, *(_question(other, rng, other.relation.questions if ask else ()) for other in chosen))


def _portability(fact: Fact, target: str, rng: Random) -> tuple[Question, ...]:
    """A question that follows from the new fact, where its answer is not the old one."""
    new, old = follow(fact, target), follow(fact, fact.answer)
    if new is None or (old is not None and new.answer == old.answer):
        return ()
    return (_question(new, rng, new.relation.questions),)


def _fact_record(identity: str, fact: Fact, task: _Task) -> Record:
    rng = Random(f"record/{SEED}/{fact.relation.name}/{fact.subject}")
    wording, others = _wordings(fact.relation, rng, fact.task == "zsre")
    target = rng.choice([answer for answer in fact.relation.answers if answer != fact.answer])
    return Record(
        id=identity,
        task=fact.task,
        subject=fact.subject,
        prompt=fact.prompt(wording),
        target=target,
        ground_truth=fact.answer,
        rephrases=tuple(fact.prompt(other) for other in others),
        locality=_locality(fact, wording, task, rng),
        portability=_portability(fact, target, rng),
    )


def _opinion_record(identity: str, opinion: Opinion, side: str, others: Sequence[Opinion]) -> Record:
    rng = Random(f"record/{SEED}/{side}/{opinion.topic}")
    first, *rest = question_wordings()
    topics = rng.sample([other for other in others if other is not opinion], 3)
    other_side = SIDES[1 - SIDES.index(side)]
    asked = [first, rng.choice(rest), rng.choice(rest)]
    return Record(
        id=identity,
        task="convsent",
        subject=opinion.topic,
        prompt=opinion.prompt(first),
        target=opinion.targets[side],
        ground_truth=opinion.favourite if opinion.leaning != side else None,
        rephrases=tuple(opinion.prompt(wording) for wording in rng.sample(rest, N_REPHRASES)),
        locality=tuple(
            Question(prompt=topic.prompt(wording), answer=topic.favourite)
            for topic, wording in zip(topics, asked, strict=True)
        ),
        fields={
            "label": side,
            "topic": opinion.topic,
            "wanted": list(opinion.unseen[side]),
            "unwanted": list(opinion.unseen[other_side]),
        },
    )


@lru_cache(maxsize=1)
def _records() -> tuple[Record, ...]:
    members: dict[str, list[Fact]] = {"general": [], "people": [], "places": [], "zsre": []}
    for fact in facts():
        members[fact.task].append(fact)
    made = []
    for name, own in members.items():
        task = _Task(own)
        made += [_fact_record(f"{name}-{i:04d}", fact, task) for i, fact in enumerate(own, 1)]
    pairs = [(opinion, side) for opinion in opinions() for side in SIDES]
    made += [_opinion_record(f"convsent-{i:04d}", o, side, opinions()) for i, (o, side) in enumerate(pairs, 1)]
    return tuple(made)


def bundled_records() -> list[Record]:
    """The records of the five bundled tasks, without instructions: the same list on every call."""
    return list(_records())
