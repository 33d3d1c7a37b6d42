"""Rewriting one safetensors file with some tensors changed, block by block: memory is bounded, whatever its size.

The library's own reader maps the file, which counts against the process once pages are touched, and its writer wants
all tensors at once. So bytes are read and written here; the header is checked by `ie.header`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ie.errors import ModelError, PatchError
from ie.header import Layout, Span, read_layout

__all__ = ["Change", "Written", "rewrite"]

_BLOCK_VALUES = 512 * 1024  # 2 MiB in float32, of which some copies are alive at once
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {code: name for name, code in _FORMATS.items()}


@dataclass(frozen=True)
class Change:
    """What is added to a stored weight: leftᵀ right.

    Attributes:
        left: (r, n_rows) float32.
        right: (r, n_columns) float32.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Written:
    """What became of one change.

    Attributes:
        dtype: of the weight as written.
        energy: ‖ΔW‖².
        kept: ⟨ΔW', ΔW⟩, with ΔW' the change of the rounded weights.
    """

    dtype: str
    energy: float
    kept: float


def rewrite(source: Path, out: Path, changes: Mapping[str, Change], dtype: str | None = None) -> dict[str, Written]:
    """Copy a file, with changes added to some tensors.

    Args:
        source: a safetensors file.
        out: the file to write.
        changes: by the name of the weight; the file may leave out the outermost prefix of it.
        dtype: of all tensors in fp32, bf16 or fp16 that are written; None keeps each tensor's own.

    Returns:
        For each change whose weight is in this file, what became of it.

    Raises:
        ModelError: if the file cannot be read.
        PatchError: if a weight does not fit its change, or overflows.
    """
    try:
        layout = read_layout(source)
    except PatchError as error:
        raise ModelError(error.message, hint=error.hint) from error
    names = {key: name for key in layout.spans for name in [_matching(key, changes)] if name is not None}
    if not names and dtype is None:
        shutil.copyfile(source, out)
        return {}
    written = {}
    with source.open("rb") as reader, out.open("wb") as writer:
        _write_header(writer, layout, dtype)
        for key, span in layout.spans.items():
            to = _dtype_after(span, dtype)
            if key in names:
                _check(source, key, span, changes[names[key]])
                written[names[key]] = _add(reader, writer, key, span, changes[names[key]], to)
            elif to == span.dtype:
                _copy(reader, writer, span)
            else:
                _convert(reader, writer, key, span, to)
    return written


def _matching(key: str, changes: Mapping[str, Change]) -> str | None:
    """The changed weight that a checkpoint's key names; checkpoints may leave out the outermost prefix."""
    return next((name for name in changes if name == key or name.endswith(f".{key}")), None)


def _check(source: Path, key: str, span: Span, change: Change) -> None:
    expected = (change.left.shape[1], change.right.shape[1])
    if span.dtype not in _DTYPES or span.shape != expected:
        raise PatchError(
            f"{source}: {key} is {span.dtype} {list(span.shape)}, expected floats of shape {list(expected)}",
            hint="merging needs the base's full-precision checkpoint, not a quantised one",
        )


def _dtype_after(span: Span, dtype: str | None) -> str:
    return span.dtype if dtype is None or span.dtype not in _DTYPES else _FORMATS[dtype]


def _write_header(writer: BinaryIO, layout: Layout, dtype: str | None) -> None:
    """The header of the new file: the same tensors in the same order."""
    header: dict[str, object] = {"__metadata__": layout.metadata} if layout.metadata else {}
    begin = 0
    for key, span in layout.spans.items():
        to = _dtype_after(span, dtype)
        n_bytes = span.end - span.begin
        if to != span.dtype:
            n_bytes = n_bytes // _DTYPES[span.dtype].itemsize * _DTYPES[to].itemsize
        header[key] = {"dtype": to, "shape": list(span.shape), "data_offsets": [begin, begin + n_bytes]}
        begin += n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the library aligns the data to 8 bytes
    writer.write(len(raw).to_bytes(8, "little") + raw)


def _add(reader: BinaryIO, writer: BinaryIO, key: str, span: Span, change: Change, to: str) -> Written:
    """Write W + ΔW, a block of rows at a time."""
    n_rows, n_columns = span.shape
    step = max(1, _BLOCK_VALUES // n_columns)
    energy = kept = 0.0
    reader.seek(span.begin)
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        old = _read(reader, (end - begin) * n_columns, span.dtype).view(end - begin, n_columns)
        delta = change.left[:, begin:end].T @ change.right
        new = (old.float() + delta).to(_DTYPES[to])
        _check_finite(new, f"{key} with the edit in it", to)
        effect = new.float() - old.to(_DTYPES[to]).float()
        energy += float((delta * delta).sum(dtype=torch.float64))  # millions of terms
        kept += float((effect * delta).sum(dtype=torch.float64))
        writer.write(_bytes(new))
    return Written(_NAMES[to], energy, kept)


def _check_finite(values: Tensor, what: str, to: str) -> None:
    if not values.isfinite().all():
        raise PatchError(f"{what} is not finite in {_NAMES[to]}", hint="give a wider --dtype, or a smaller --scale")


def _copy(reader: BinaryIO, writer: BinaryIO, span: Span) -> None:
    reader.seek(span.begin)
    left = span.end - span.begin
    while left:
        n_bytes = min(left, _BLOCK_VALUES)
        writer.write(_take(reader, n_bytes))
        left -= n_bytes


def _convert(reader: BinaryIO, writer: BinaryIO, key: str, span: Span, to: str) -> None:
    reader.seek(span.begin)
    left = (span.end - span.begin) // _DTYPES[span.dtype].itemsize
    while left:
        n_values = min(left, _BLOCK_VALUES)
        old = _read(reader, n_values, span.dtype)
        values = old.to(_DTYPES[to])
        if span.shape:  # a lone number, as of a mask, may well be infinite
            _check_finite(values[old.isfinite()], key, to)
        writer.write(_bytes(values))
        left -= n_values


def _read(reader: BinaryIO, n_values: int, dtype: str) -> Tensor:
    kind = _DTYPES[dtype]
    return torch.frombuffer(bytearray(_take(reader, n_values * kind.itemsize)), dtype=kind)


def _take(reader: BinaryIO, n_bytes: int) -> bytes:
    block = reader.read(n_bytes)
    if len(block) < n_bytes:
        raise ModelError(f"{reader.name} became shorter while it was read")
    return block


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
