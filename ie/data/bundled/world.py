"""The facts behind the bundled tasks: general knowledge as written down, and an invented world drawn from a seed.

A relation has wordings (statements that end right before the answer, and questions) and a closed set of answers, so
each fact has counterfactual answers of its own kind. People, towns and companies are invented: their names are put
together from syllables, their facts drawn from `SEED`. Nothing depends on the machine or on the order of calls.

For every fact one statement and one question are held out: the bundled base is trained on the others only
(`Fact.seen`), so that `Fact.heldout` measures knowledge rather than memory of strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from random import Random
from typing import Any

import yaml

__all__ = ["SEED", "Fact", "Relation", "facts", "follow", "load_yaml", "relations"]

SEED = 20
N_PEOPLE, N_TOWNS, N_COMPANIES = 320, 160, 84
N_FACTS = {"person": 3, "town": 4, "company": 3}  # facts of one subject
N_ANSWER_TOWNS, N_ANSWER_COMPANIES = 24, 20  # how many of them are answers of other facts
ZSRE_SHARE = 0.21  # of the subjects
TASK_OF_GROUP = {"general": "general", "person": "people", "town": "places", "company": "places"}


@dataclass(frozen=True)
class Relation:
    """A kind of fact: its wordings and the closed set of its answers.

    A derived relation (`via`, `of`) answers with relation `of` of the answer of relation `via`.
    """

    group: str
    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    via: str = ""
    of: str = ""

    @property
    def wordings(self) -> tuple[str, ...]:
        """Statements, then questions."""
        return self.statements + self.questions


@dataclass(frozen=True)
class Fact:
    """One true fact; `task` is the task that its subject belongs to."""

    task: str
    relation: Relation
    subject: str
    answer: str

    def prompt(self, wording: str) -> str:
        """The wording with the subject filled in, its first letter a capital."""
        text = wording.replace("{}", self.subject)
        return text[0].upper() + text[1:]

    @cached_property
    def _heldout_wordings(self) -> tuple[str, str]:
        rng = Random(f"heldout/{self.relation.name}/{self.subject}")
        return rng.choice(self.relation.statements), rng.choice(self.relation.questions)

    @property
    def seen(self) -> tuple[str, ...]:
        """Prompts that the bundled base is trained on."""
        return tuple(self.prompt(w) for w in self.relation.wordings if w not in self._heldout_wordings)

    @property
    def heldout(self) -> tuple[str, ...]:
        """Prompts that the bundled base never sees: one statement, one question."""
        return tuple(self.prompt(w) for w in self._heldout_wordings)


def load_yaml(name: str) -> dict[str, Any]:
    """A data file of this package."""
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast where it exists
    parsed: dict[str, Any] = yaml.load(text, Loader=loader)
    return parsed


def _names(syllables: Mapping[str, str], n: int, rng: Random) -> list[str]:
    """`n` different names, each one of the heads followed by one of the tails."""
    heads, tails = syllables["heads"].split(), syllables["tails"].split()
    # An underscore among the tails stands for a space.
    return rng.sample([head + tail.replace("_", " ") for head in heads for tail in tails], n)


def _invented_names(rng: Random) -> dict[str, list[str]]:
    """The people, towns and companies of the invented world."""
    pools = load_yaml("names.yaml")
    firsts, lasts = _names(pools["first"], 90, rng), _names(pools["last"], 300, rng)
    people = dict.fromkeys(f"{rng.choice(firsts)} {lasts[i % len(lasts)]}" for i in range(2 * N_PEOPLE))
    return {
        "person": list(people)[:N_PEOPLE],
        "town": _names(pools["town"], N_TOWNS, rng),
        "company": _names(pools["company"], N_COMPANIES, rng),
    }


def _pairs(text: str) -> list[tuple[str, str]]:
    """The `subject: answer` lines of a block."""
    return [(s.strip(), a.strip()) for s, _, a in (line.rpartition(": ") for line in text.splitlines()) if s]


@dataclass(frozen=True)
class _World:
    relations: Mapping[str, Relation]
    facts: tuple[Fact, ...]


def _relation(group: str, name: str, spec: Mapping[str, Any], answers: Iterable[str]) -> Relation:
    statements, questions = tuple(spec["statements"]), tuple(spec["questions"])
    return Relation(group, name, statements, questions, tuple(answers), spec.get("via", ""), spec.get("of", ""))


def _general(rng: Random) -> tuple[dict[str, Relation], list[Fact]]:
    """General knowledge: the relations and facts of general.yaml, each subject in one task."""
    found: dict[str, Relation] = {}
    pairs: list[tuple[Relation, str, str]] = []
    for name, spec in load_yaml("general.yaml").items():
        lines = _pairs(spec.get("facts", ""))
        found[name] = _relation("general", name, spec, sorted({answer for _, answer in lines}))
        pairs += [(found[name], subject, answer) for subject, answer in lines]
    # Countries stay in `general`: the portability questions of its cities and landmarks lead to them.
    fixed = {subject for relation, subject, _ in pairs if relation.name == "continent"}
    subjects = list(dict.fromkeys(subject for _, subject, _ in pairs))
    zsre = set(rng.sample([s for s in subjects if s not in fixed], round(ZSRE_SHARE * len(subjects))))
    facts = [Fact("zsre" if s in zsre else "general", relation, s, a) for relation, s, a in pairs]
    return found, facts


def _invented(rng: Random) -> tuple[dict[str, Relation], list[Fact]]:
    """The invented world: every subject gets a few relations, each with a random answer of its closed set."""
    names = _invented_names(rng)
    named = {"towns": names["town"][:N_ANSWER_TOWNS], "companies": names["company"][:N_ANSWER_COMPANIES]}
    required = {**dict.fromkeys(named["towns"], "region"), **dict.fromkeys(named["companies"], "industry")}

    found: dict[str, Relation] = {}
    facts: list[Fact] = []
    for group, specs in load_yaml("invented.yaml").items():
        own = {}
        for name, spec in specs.items():
            answers = spec.get("answers", ())
            own[name] = _relation(group, name, spec, named[answers] if isinstance(answers, str) else answers)
        found |= own
        direct = [name for name, relation in own.items() if not relation.via]
        free = [subject for subject in names[group] if subject not in required]
        zsre = set(rng.sample(free, round(ZSRE_SHARE * len(names[group]))))
        for subject in names[group]:
            chosen = set(rng.sample(direct, N_FACTS[group]))
            if subject in required and required[subject] not in chosen:
                chosen = {*sorted(chosen)[1:], required[subject]}
            task = "zsre" if subject in zsre else TASK_OF_GROUP[group]
            facts += [Fact(task, own[r], subject, rng.choice(own[r].answers)) for r in direct if r in chosen]
    return found, facts


@lru_cache(maxsize=1)
def _world() -> _World:
    general_relations, general_facts = _general(Random(f"general/{SEED}"))
    invented_relations, invented_facts = _invented(Random(f"invented/{SEED}"))
    return _World({**general_relations, **invented_relations}, (*general_facts, *invented_facts))


def relations() -> Mapping[str, Relation]:
    """All relations by name, the derived ones included."""
    return _world().relations


@lru_cache(maxsize=1)
def derived_by_source() -> Mapping[str, Relation]:
    """The derived relation that starts from a relation, by the name of the latter."""
    return {relation.via: relation for relation in relations().values() if relation.via}


@lru_cache(maxsize=2)
def facts(*, derived: bool = False) -> tuple[Fact, ...]:
    """All true facts, one for each record to come; with `derived` also those that follow from two others."""
    known = _world().facts
    if not derived:
        return known
    extra = [fact for source in known if (fact := follow(source, source.answer)) is not None]
    return (*known, *extra)


@lru_cache(maxsize=1)
def _answers() -> Mapping[tuple[str, str], str]:
    return {(fact.relation.name, fact.subject): fact.answer for fact in _world().facts}


def follow(fact: Fact, answer: str) -> Fact | None:
    """What follows from `fact` if its answer were `answer`, or None where nothing does."""
    derived = derived_by_source().get(fact.relation.name)
    if derived is None:
        return None
    end = _answers().get((derived.of, answer))
    return None if end is None else Fact(fact.task, derived, fact.subject, end)
