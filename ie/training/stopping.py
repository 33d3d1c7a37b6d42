"""Ctrl-C and SIGTERM end a run between two steps, where its state is whole; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["deferred_signals"]


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """An event that is set by the first SIGINT or SIGTERM while the context lasts.

    Signals reach the main thread alone: in another thread the event is never set.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # A signal that whoever started the process had ignored (as `nohup` and shells' background jobs do) stays ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = [(number, signal.signal(number, ask)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in before:
            signal.signal(number, handler)
