"""A full disk, as a process sees it."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["limitable_disk"]


@contextmanager
def limitable_disk() -> Iterator[Callable[[int | None], None]]:
    """What it yields sets how many bytes a file can have; None lifts the limit, as the end of the context does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if n_bytes is None else n_bytes, hard))

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield limit
    finally:
        limit(None)
        signal.signal(signal.SIGXFSZ, before)
