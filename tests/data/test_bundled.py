"""The bundled facts and the records made of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from ie.data.bundled import bundled_records, facts, opinions, relations
from ie.data.record import Record

FACT_TASKS = ("general", "people", "places", "zsre")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return bundled_records()


def test_there_are_as_many_facts_as_promised() -> None:
    groups = Counter(fact.relation.group for fact in facts())
    assert groups["general"] >= 520
    assert groups["person"] + groups["town"] + groups["company"] >= 1700
    assert len(opinions()) >= 150


def test_there_are_as_many_records_as_promised(records: list[Record]) -> None:
    counts = Counter(record.task for record in records)
    assert set(counts) == {*FACT_TASKS, "convsent"}
    for task, least in {"general": 450, "people": 700, "places": 600, "convsent": 300, "zsre": 350}.items():
        assert counts[task] >= least, task


def test_zsre_draws_from_general_and_invented_subjects() -> None:
    groups = Counter(fact.relation.group for fact in facts() if fact.task == "zsre")
    assert all(groups[group] >= 50 for group in ("general", "person", "town", "company"))


def test_no_subject_is_in_two_tasks(records: list[Record]) -> None:
    tasks = defaultdict(set)
    for record in records:
        tasks[record.subject.casefold()].add(record.task)
    assert [subject for subject, found in tasks.items() if len(found) > 1] == []


def test_no_fact_is_told_twice() -> None:
    keys = Counter((fact.relation.name, fact.subject) for fact in facts(derived=True))
    assert [key for key, n in keys.items() if n > 1] == []


def test_ids_are_unique_and_name_their_task(records: list[Record]) -> None:
    assert len({record.id for record in records}) == len(records)
    assert all(record.id.rpartition("-")[0] == record.task for record in records)


def test_relations_have_enough_wordings() -> None:
    for relation in relations().values():
        assert len(relation.statements) >= 4, relation.name
        assert len(relation.questions) >= (3 if relation.via else 4), relation.name
        assert len(set(relation.wordings)) == len(relation.wordings), relation.name
        for wording in relation.statements:
            assert wording.count("{}") == 1 and not wording.endswith((" ", "?", "."))
        for wording in relation.questions:
            assert wording.count("{}") == 1 and wording.endswith("?")


def test_a_target_is_another_answer_of_the_same_relation(records: list[Record]) -> None:
    by_id = iter([record for record in records if record.task != "convsent"])
    ordered = sorted(facts(), key=lambda fact: FACT_TASKS.index(fact.task))
    for fact in ordered:
        record = next(by_id)
        assert record.subject == fact.subject
        assert record.ground_truth == fact.answer
        assert record.target in fact.relation.answers
        assert record.target != fact.answer


def test_records_are_whole(records: list[Record]) -> None:
    for record in records:
        texts = (record.prompt, *record.rephrases)
        assert len(record.rephrases) >= 3
        assert len(set(texts)) == len(texts)
        assert all(record.subject.casefold() in text.casefold() for text in texts), record.id
        assert 3 <= len(record.locality) <= 5
        asked = [question.prompt for question in record.locality]
        assert len(set(asked)) == len(asked)
        assert not set(asked) & set(texts)


def test_locality_and_portability_say_what_is_true(records: list[Record]) -> None:
    answers: dict[str, str] = {}
    for fact in facts(derived=True):
        for wording in fact.relation.wordings:
            assert answers.setdefault(fact.prompt(wording), fact.answer) == fact.answer
    for record in records:
        if record.task == "convsent":
            continue
        assert all(answers[question.prompt] == question.answer for question in record.locality)
        # What follows from the new fact is not what followed from the old one.
        assert all(answers.get(question.prompt) != question.answer for question in record.portability)
    assert sum(bool(record.portability) for record in records) >= 200


def test_locality_stays_inside_its_task(records: list[Record]) -> None:
    task_of = {fact.prompt(w): fact.task for fact in facts() for w in fact.relation.wordings}
    for record in records:
        if record.task != "convsent":
            assert {task_of[question.prompt] for question in record.locality} == {record.task}


def test_zsre_asks_and_the_others_state(records: list[Record]) -> None:
    for record in records:
        if record.task == "zsre":
            texts = [record.prompt, *record.rephrases, *(q.prompt for q in (*record.locality, *record.portability))]
            assert all(text.endswith("?") for text in texts)
        elif record.task != "convsent":
            assert not record.prompt.endswith("?")
            assert sum(text.endswith("?") for text in record.rephrases) == 1


def test_opinions_keep_unseen_replies_apart(records: list[Record]) -> None:
    trained = {reply for opinion in opinions() for seen in opinion.seen.values() for reply in seen}
    for opinion in opinions():
        assert opinion.favourite in opinion.seen[opinion.leaning]
    for record in records:
        if record.task != "convsent":
            assert record.fields == {}
            continue
        assert record.fields["label"] in ("positive", "negative")
        assert record.fields["topic"] == record.subject
        wanted, unwanted = record.fields["wanted"], record.fields["unwanted"]
        assert len(wanted) >= 3 and len(unwanted) >= 3
        unseen = {record.target, *wanted, *unwanted}
        assert len(unseen) == 1 + len(wanted) + len(unwanted)
        own = next(opinion for opinion in opinions() if opinion.topic == record.subject)
        assert not unseen & {reply for seen in own.seen.values() for reply in seen}
        assert record.target != record.ground_truth
        assert all(question.answer in trained for question in record.locality)


def test_every_fact_has_wordings_that_are_held_out() -> None:
    for fact in facts(derived=True):
        assert len(fact.heldout) == 2
        assert len(fact.seen) == len(fact.relation.wordings) - 2
        assert not set(fact.seen) & set(fact.heldout)


def test_records_are_sorted_by_task_and_number(records: list[Record]) -> None:
    for left, right in pairwise(records):
        assert left.task != right.task or left.id < right.id


DUMP = (
    "import hashlib, sys; from ie.data.bundled import bundled_records;"
    "sys.stdout.write(hashlib.sha256(''.join(r.model_dump_json() for r in bundled_records()).encode()).hexdigest());"
    "assert 'torch' not in sys.modules"
)


def test_another_process_makes_the_same_records_without_torch() -> None:
    made = [
        subprocess.run(
            [sys.executable, "-c", DUMP],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1]


def test_making_them_is_quick() -> None:
    code = "from ie.data.bundled import bundled_records; import time; t = time.process_time(); bundled_records();"
    code += "print(time.process_time() - t)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(shown) < 1.0  # of a processor
