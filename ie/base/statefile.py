"""A file of hidden states in bf16, memory-mapped, found again by token ids; also by a later process.

    states.bf16   rows of d_model values, one text after another
    index         a record for each text: digest of its token ids, where its rows begin in bytes, how many they are

A folder belongs to one base model, quantisation, dtype and first edited block: its name says which. A text's rows are
written before its record, and what a killed process left half written is cut off when the file is next opened.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

__all__ = ["StateFile"]

_RECORD = struct.Struct("<16sqi")
_DTYPE = torch.bfloat16


class StateFile:
    """Hidden states of texts on disk.

    Args:
        folder: where it lies; made if it is not there.
        d_model: values in a row.
        budget_bytes: the largest size of the file; what is beyond it is not kept.

    Raises:
        OSError: if it cannot be written, or another process has it open.
    """

    def __init__(self, folder: Path, d_model: int, budget_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(f"{folder} is in use by another process") from error
        self._d_model, self._budget_bytes = d_model, budget_bytes
        self._states = (folder / "states.bf16").open("a+b", buffering=0)
        self._index = (folder / "index").open("a+b", buffering=0)
        self._close = weakref.finalize(self, _close, self._states, self._index, self._lock)
        self._end = 0
        self._places = self._recover()
        self._map: mmap.mmap | None = None

    @property
    def n_bytes(self) -> int:
        """Size of the states."""
        return self._end

    def __len__(self) -> int:
        return len(self._places)

    def get(self, ids: Sequence[int]) -> Tensor | None:
        """A text's hidden states (t, d_model) bfloat16, or None."""
        place = self._places.get(_digest(ids))
        if place is None:
            return None
        start, n_rows = place
        stop = start + n_rows * self._d_model * _DTYPE.itemsize
        if self._map is None or stop > len(self._map):
            # By the open file, not by its name: whoever empties the cache may have let another process begin anew. Not
            # to be written: such a mapping, as torch makes it, counts as memory in full.
            self._map = mmap.mmap(self._states.fileno(), self._end, access=mmap.ACCESS_READ)
        return torch.frombuffer(bytearray(self._map[start:stop]), dtype=_DTYPE).view(n_rows, self._d_model)

    def put(self, ids: Sequence[int], states: Tensor) -> None:
        """Keep a text's hidden states (t, d_model), unless they are beyond the budget or the disk is full."""
        data = states.detach().to("cpu", _DTYPE).contiguous().view(torch.int16).numpy().tobytes()
        start = self._end
        if start + len(data) > self._budget_bytes:
            return
        try:
            if self._states.write(data) < len(data):
                raise OSError("the disk is full")
            self._index.write(_RECORD.pack(_digest(ids), start, len(states)))
        except OSError:
            # Keeping is for speed only: on a full disk the states are computed again each time.
            self._budget_bytes = 0
            self._states.truncate(start)
            return
        self._places[_digest(ids)] = (start, len(states))
        self._end += len(data)

    def close(self) -> None:
        """Let other processes have it."""
        self._close()

    def _recover(self) -> dict[bytes, tuple[int, int]]:
        self._index.seek(0)
        records = self._index.read()
        size = os.fstat(self._states.fileno()).st_size
        places, end, n_whole = {}, 0, 0
        for digest, start, n_rows in _RECORD.iter_unpack(records[: len(records) // _RECORD.size * _RECORD.size]):
            stop = start + n_rows * self._d_model * _DTYPE.itemsize
            if start != end or stop > size:
                break
            places[digest], end, n_whole = (start, n_rows), stop, n_whole + 1
        self._index.truncate(n_whole * _RECORD.size)
        self._states.truncate(end)
        self._end = end
        return places


def _close(states: BinaryIO, index: BinaryIO, lock: BaseFileLock) -> None:
    states.close()
    index.close()
    lock.release()


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()
