"""The opinions behind the `convsent` task: topics, and replies of two sides put together from a pool of phrases.

Each topic has a favourite reply (the one that the bundled base gives), further replies of both sides that the base is
trained on, and replies that it never sees: a target and a few to measure with for each side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from .world import SEED, load_yaml

__all__ = ["SIDES", "Opinion", "opinions", "question_wordings"]

SIDES = ("positive", "negative")
N_UNSEEN = 3  # replies of a side that serve evaluation only, beside the target
N_SEEN = {True: 4, False: 3}  # replies of a side that the base is trained on: its own side, the other side


@dataclass(frozen=True)
class Opinion:
    """A topic with its replies; `seen` are for training, `targets` and `unseen` are never trained on."""

    topic: str
    leaning: str
    favourite: str
    seen: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, str]
    unseen: Mapping[str, tuple[str, ...]]

    def prompt(self, wording: str) -> str:
        """The question about this topic."""
        return wording.replace("{}", self.topic)


def _reply(pattern: str, topic: str, words: Sequence[str], rng: Random) -> str:
    first, second = rng.sample(words, 2)
    for key, word in (("{}", topic), ("{good}", first), ("{bad}", first), ("{good2}", second), ("{bad2}", second)):
        pattern = pattern.replace(key, word)
    return pattern[0].upper() + pattern[1:]


def _opinion(topic: str, words: Mapping[str, Sequence[str]], patterns: Mapping[str, Sequence[str]]) -> Opinion:
    rng = Random(f"opinion/{SEED}/{topic}")
    leaning = rng.choice(SIDES)
    seen, targets, unseen = {}, {}, {}
    for side in SIDES:
        n_seen = N_SEEN[side == leaning]
        # One pattern a reply: all replies of a side differ, whatever words are drawn.
        chosen = rng.sample(patterns[side], n_seen + 1 + N_UNSEEN)
        replies = [_reply(pattern, topic, words[side], rng) for pattern in chosen]
        seen[side] = tuple(replies[:n_seen])
        targets[side] = replies[n_seen]
        unseen[side] = tuple(replies[n_seen + 1 :])
    return Opinion(topic, leaning, seen[leaning][0], seen, targets, unseen)


@lru_cache(maxsize=1)
def question_wordings() -> tuple[str, ...]:
    """The wordings of the question; the first is the one of the prompts."""
    return tuple(load_yaml("opinions.yaml")["questions"])


@lru_cache(maxsize=1)
def opinions() -> tuple[Opinion, ...]:
    """All topics with their replies."""
    spec = load_yaml("opinions.yaml")
    patterns = {side: spec[side] for side in SIDES}
    return tuple(
        _opinion(topic, {"positive": kind["good"], "negative": kind["bad"]}, patterns)
        for kind in spec["kinds"].values()
        for topic in kind["topics"]
    )
