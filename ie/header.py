"""Reading a safetensors header without torch: what `ie inspect` shows, and the first check of any patch or editor file.

The layout is 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes:

    {"__metadata__": {str: str}, "<name>": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the JSON. Tensors must lie side by side, without hole or overlap, up to the end of the
file. The tensors' values are not looked at.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ie.errors import PatchError

__all__ = [
    "FACTOR_DTYPES",
    "MAX_HEADER_BYTES",
    "Layout",
    "Metadata",
    "Span",
    "Tensors",
    "factor_shapes",
    "is_module_path",
    "read_document",
    "read_header",
    "read_layout",
]

Metadata = dict[str, str]
Tensors = dict[str, tuple[str, tuple[int, ...]]]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
FACTOR_DTYPES = ("F32", "F16", "BF16")
_HINT = "is it complete, and a safetensors file? copy or make it again"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it: a pickle, which can run code",
    b"\x80\x02": "a pickle, which can run code",
    b"\x80\x03": "a pickle, which can run code",
    b"\x80\x04": "a pickle, which can run code",
    b"\x80\x05": "a pickle, which can run code",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed by gzip",
}
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class Span(NamedTuple):  # not a dataclass: those cost a millisecond each, and `ie inspect` starts at once
    """Where one tensor lies in its file: bytes `begin` to `end`, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Layout(NamedTuple):
    """What a header says: the metadata, and where each tensor lies, in the order of their bytes."""

    metadata: Metadata
    spans: dict[str, Span]


def read_header(path: Path | str) -> tuple[Metadata, Tensors]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        The metadata (string to string) and, for each tensor's name, its dtype as the format writes it and its shape.

    Raises:
        PatchError: the file is missing, truncated, or no safetensors file; the message says which rule it breaks.
    """
    layout = read_layout(path)
    return layout.metadata, {name: (span.dtype, span.shape) for name, span in layout.spans.items()}


def read_layout(path: Path | str) -> Layout:
    """Read and check the header of a safetensors file, with the places of its tensors.

    Raises:
        PatchError: the file is missing, truncated, or no safetensors file; the message says which rule it breaks.
    """
    path = Path(path)
    raw, n_data = _read_bytes(path)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse(path, f"its header is not valid JSON ({error})", error)
    if not isinstance(header, dict):
        _refuse(path, f"its header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its __metadata__ does not map strings to strings")
    return Layout(metadata, _spans(path, header, n_data, 8 + len(raw)))


def read_document(path: Path | str, key: str = "ie") -> tuple[dict[str, Any], Tensors]:
    """Read the JSON document that our files carry in their metadata, and the tensors' dtypes and shapes.

    Args:
        path: a safetensors file.
        key: the metadata key that holds the document.

    Raises:
        PatchError: no safetensors file, or one without such a document.
    """
    metadata, tensors = read_header(path)
    if key not in metadata:
        raise PatchError(
            f"{path} is no patch: its metadata has no {key!r} document (keys found: {', '.join(metadata) or 'none'})",
            hint="`ie edit` writes patches; a model's or adapter's weights are something else",
        )
    try:
        document = json.loads(metadata[key], object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise PatchError(f"{path}: the {key!r} document in its metadata is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise PatchError(f"{path}: the {key!r} document in its metadata is not a JSON object")
    return document, tensors


def factor_shapes(path: Path | str, tensors: Tensors) -> dict[str, tuple[int, int, int]]:
    """Check that a patch's tensors are pairs of factors, `<module>.A` (r, d_in) and `<module>.B` (r, d_out).

    Args:
        path: the file, for the message.
        tensors: as `read_header` returns them.

    Returns:
        For each module's path its rank, d_in and d_out.

    Raises:
        PatchError: all tensors that do not fit, in one message.
    """
    modules: dict[str, tuple[int, int, int]] = {}
    faults = [] if tensors else ["it holds no tensors"]
    for name, (dtype, shape) in tensors.items():
        module, _, factor = name.rpartition(".")
        if factor not in ("A", "B") or not module:
            faults.append(f"{name!r} is named neither <module>.A nor <module>.B")
            continue
        if not is_module_path(module):
            faults.append(f"{name!r} names no module: expected names with dots between them")
        if dtype not in FACTOR_DTYPES:
            faults.append(f"{name!r} is {dtype}, expected one of {', '.join(FACTOR_DTYPES)}")
        other = tensors.get(f"{module}.{'B' if factor == 'A' else 'A'}")
        if other is None:
            faults.append(f"{name!r} has no partner")
        elif len(shape) != 2 or not shape[1]:
            faults.append(f"{name!r} has the shape {list(shape)}, expected two sizes, the second not 0")
        elif factor == "A" and len(other[1]) == 2:
            if shape[0] != other[1][0]:
                faults.append(f"the factors of {module!r} have the ranks {shape[0]} and {other[1][0]}")
            modules[module] = (shape[0], shape[1], other[1][1])
    if faults:
        raise PatchError(f"{path} is no valid patch: {'; '.join(faults)}", hint=_HINT)
    return modules


def is_module_path(name: str) -> bool:
    """Whether a text can be the path of a module: names of letters, digits, `_` and `-` with dots between them."""
    parts = name.replace("-", "_").replace("_", "0").split(".")
    return name.isascii() and all(part.isalnum() for part in parts)


def _read_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON bytes and the number of bytes that follow them."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("no regular file")  # opening a pipe would wait for a writer, reading a device never end
        with path.open("rb") as file:
            n_file = os.fstat(file.fileno()).st_size
            if n_file < 8:
                _refuse(path, f"it has {n_file} bytes; the header's length alone takes 8")
            start = file.read(8)
            for magic, what in _FOREIGN.items():
                # A true length starts so only if the header's size happens to be those bytes and `{` follows.
                if start.startswith(magic) and file.read(1) != b"{":
                    _refuse(path, f"it is {what}")
                file.seek(8)
            n_header = int.from_bytes(start, "little")
            if n_header > MAX_HEADER_BYTES:
                _refuse(path, f"its header claims {n_header} bytes; at most {MAX_HEADER_BYTES} are allowed")
            if 8 + n_header > n_file:
                _refuse(path, f"truncated: its header claims {n_header} bytes, the file has {n_file}")
            return file.read(n_header), n_file - 8 - n_header
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error


def _spans(path: Path, entries: dict[str, Any], n_data: int, start: int) -> dict[str, Span]:
    """Check each tensor's entry, and that together they fill the data, which begins at byte `start`, exactly."""
    spans: dict[str, Span] = {}
    for name, entry in entries.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > n_data:
            _refuse(path, f"truncated: tensor {name!r} ends at byte {end} of the data, the file has {n_data}")
        if (end - begin) * 8 != prod(shape) * _BITS[dtype]:
            _refuse(path, f"tensor {name!r} of {dtype} {list(shape)} takes {end - begin} bytes, which does not fit")
        spans[name] = Span(dtype, shape, start + begin, start + end)
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end, item[0])))
    last_end, last_name = start, ""
    for name, span in ordered.items():
        if span.begin < last_end:
            _refuse(path, f"tensors {last_name!r} and {name!r} overlap")
        if span.begin > last_end:
            _refuse(path, f"{span.begin - last_end} bytes before tensor {name!r} belong to no tensor")
        last_end, last_name = span.end, name
    if last_end != start + n_data:
        _refuse(path, f"{start + n_data - last_end} bytes at its end belong to no tensor")
    return ordered


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Check one tensor's entry by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"the entry of tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _refuse(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        _refuse(path, f"tensor {name!r} has the shape {shape!r}; expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        _refuse(path, f"tensor {name!r} has the offsets {offsets!r}; expected [begin, end]")
    begin, end = offsets
    if begin > end:
        _refuse(path, f"tensor {name!r} begins at byte {begin}, after its end at {end}")
    return dtype, tuple(shape), begin, end


def _is_count(value: object) -> bool:
    """Say whether a JSON value is a whole number of 63 bits, zero or more (`true` is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice: readers would disagree on which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"repeated name {name!r}")
    return found


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise PatchError(f"{path} cannot be read as safetensors: {reason}", hint=_HINT) from cause
