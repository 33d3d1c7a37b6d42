"""Which split a record belongs to: decided by its subject, so that what is tested was never trained on.

The split of a subject is a hash of seed and subject: it does not depend on the task, on the other records or on their
order, so adding a source moves no record of another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from ie.data.record import SPLITS, Split

__all__ = ["normal_subject", "quotas", "rank", "split_of"]

SHARES: Mapping[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


def normal_subject(subject: str) -> str:
    """A subject as it is compared: without case, every run of white space as one space."""
    return " ".join(subject.casefold().split())


def rank(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the texts."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(subject: str, seed: int) -> Split:
    """The split of a subject: about 80 % train, 10 % validation, 10 % test."""
    place = rank(seed, "split", normal_subject(subject))
    for split in SPLITS:
        place -= SHARES[split]
        if place < 0:
            return split
    return SPLITS[-1]


def quotas(counts: Mapping[Split, int], limit: int) -> dict[Split, int]:
    """How many records of each split to keep so that there are at most `limit` in all.

    In proportion to the counts, but a split that has records keeps one as long as the limit reaches.
    """
    total = sum(counts.values())
    if total <= limit:
        return dict(counts)
    kept = dict.fromkeys(counts, 0)
    order = sorted(counts, key=lambda split: -counts[split])
    for split in order:
        if counts[split] and sum(kept.values()) < limit:
            kept[split] = 1
    while sum(kept.values()) < limit:
        # The split that is furthest behind its share takes the next place.
        behind = max(
            order, key=lambda split: (kept[split] < counts[split], counts[split] * limit / total - kept[split])
        )
        kept[behind] += 1
    return kept
