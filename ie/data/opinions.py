"""Published opinions to records: ConvSent's two sides and the traits of the personality set.

One record an entity. The side that it is edited to is drawn by a hash of the entity, so it never changes; the target is
the shortest reply of that side that has 3 to 30 words and that no other side says too. A side without such a reply
gives way to the next one. Locality are the questions about the next entities of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from ie.data.entries import Entry, Skip, first_text, texts
from ie.data.record import Question, Record
from ie.data.splits import normal_subject, rank

__all__ = ["SIDES", "TRAITS", "read_opinions"]

MIN_WORDS, MAX_WORDS = 3, 30  # of a reply that can be a target
N_REPLIES = 4  # further replies of each side that a record carries
N_OTHERS = 2  # other entities whose questions are a record's locality
TRAITS = ("extraversion", "agreeableness", "neuroticism")
SIDES = {"positive": "pos", "negative": "neg"}
QUESTIONS = (
    "What do you think of {}?",
    "How do you feel about {}?",
    "What is your opinion of {}?",
    "Can you tell me your view on {}?",
)


@dataclass(frozen=True)
class _Opinions:
    """What is said about an entity, by side; the sides in the order in which they are tried."""

    topic: str
    replies: Mapping[str, tuple[str, ...]]
    order: tuple[str, ...]

    def chosen(self) -> tuple[str, str] | None:
        """The first side with a reply that can be a target, and the shortest of these replies."""
        for side in self.order:
            others = {reply for other in self.order if other != side for reply in self.replies[other]}
            usable = [
                reply
                for reply in self.replies[side]
                if MIN_WORDS <= len(reply.split()) <= MAX_WORDS and reply not in others
            ]
            if usable:
                return side, min(usable, key=lambda reply: (len(reply.split()), len(reply), reply))
        return None


def _opinions(entry: Entry, sides: Mapping[str, str]) -> _Opinions:
    """The replies about an entity, each said once, and its sides from the one drawn on."""
    topic = first_text(entry.content.get("ent"))
    labels = list(sides)
    first = int(rank(0, "side", normal_subject(topic)) * len(labels))
    replies = {
        label: tuple(dict.fromkeys(" ".join(reply.split()) for reply in texts(entry.content.get(field))))
        for label, field in sides.items()
    }
    return _Opinions(topic, replies, tuple(labels[first:] + labels[:first]))


def read_opinions(sides: Mapping[str, str]) -> Callable[[Sequence[Entry], str], Iterator[Record | Skip]]:
    """A reader for entities with replies by side.

    Args:
        sides: the field of each side by the side's label.
    """

    def read(entries: Sequence[Entry], task: str) -> Iterator[Record | Skip]:
        found = [_opinions(entry, sides) for entry in entries]
        asked = [
            (opinions.topic, Question(prompt=QUESTIONS[0].format(opinions.topic), answer=chosen[1]))
            for opinions in found
            if opinions.topic and (chosen := opinions.chosen())
        ]
        n_before = 0
        for entry, opinions in zip(entries, found, strict=True):
            chosen = opinions.chosen()
            if not opinions.topic or chosen is None:
                yield Skip("no subject" if not opinions.topic else f"no reply of {MIN_WORDS} to {MAX_WORDS} words")
                continue
            n_before += 1
            yield _opinion(entry, task, opinions, chosen, _others(asked, n_before, opinions.topic))

    return read


def _others(asked: Sequence[tuple[str, Question]], start: int, topic: str) -> tuple[Question, ...]:
    """The questions about the next entities of the file, from its beginning again after its end."""
    found: list[Question] = []
    for step in range(len(asked)):
        other, question = asked[(start + step) % len(asked)]
        if normal_subject(other) != normal_subject(topic) and len(found) < N_OTHERS:
            found.append(question)
        if len(found) == N_OTHERS:
            break
    return tuple(found)


def _opinion(
    entry: Entry, task: str, opinions: _Opinions, chosen: tuple[str, str], locality: tuple[Question, ...]
) -> Record:
    side, target = chosen
    wanted = [reply for reply in opinions.replies[side] if reply != target]
    rows = zip_longest(*(opinions.replies[other] for other in opinions.order if other != side))
    unwanted = [reply for reply in chain.from_iterable(rows) if reply is not None]
    prompt, *rephrases = (question.format(opinions.topic) for question in QUESTIONS)
    return Record(
        id=entry.id,
        task=task,
        subject=opinions.topic,
        prompt=prompt,
        target=target,
        rephrases=tuple(rephrases),
        locality=locality,
        fields={
            "label": side,
            "topic": opinions.topic,
            "wanted": wanted[:N_REPLIES],
            "unwanted": unwanted[:N_REPLIES],
        },
    )
