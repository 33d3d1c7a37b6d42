"""Reading a safetensors header without torch: what `ie inspect` shows, and the first check of any patch or editor file.

The layout is 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes:

    {"__metadata__": {str: str}, "<name>": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the JSON. Tensors must lie side by side, without hole or overlap, up to the end of the
file. The tensors' values are not looked at.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from ie.errors import PatchError

__all__ = ["MAX_HEADER_BYTES", "Metadata", "Tensors", "factor_shapes", "read_document", "read_header"]

Metadata = dict[str, str]
Tensors = dict[str, tuple[str, tuple[int, ...]]]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_HINT = "is it complete, and a safetensors file? copy or make it again"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def read_header(path: Path | str) -> tuple[Metadata, Tensors]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        The metadata (string to string) and, for each tensor's name, its dtype as the format writes it and its shape.

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
    return metadata, _tensors(path, header, n_data)


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
        document = json.loads(metadata[key])
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
    for name, (_, shape) in tensors.items():
        module, _, factor = name.rpartition(".")
        if factor not in ("A", "B") or not module:
            faults.append(f"{name!r} is named neither <module>.A nor <module>.B")
            continue
        other = tensors.get(f"{module}.{'B' if factor == 'A' else 'A'}")
        if other is None:
            faults.append(f"{name!r} has no partner")
        elif len(shape) != 2:
            faults.append(f"{name!r} has the shape {list(shape)}, expected two sizes")
        elif factor == "A" and len(other[1]) == 2:
            if shape[0] != other[1][0]:
                faults.append(f"the factors of {module!r} have the ranks {shape[0]} and {other[1][0]}")
            modules[module] = (shape[0], shape[1], other[1][1])
    if faults:
        raise PatchError(f"{path} is no valid patch: {'; '.join(faults)}", hint=_HINT)
    return modules


def _read_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON bytes and the number of bytes that follow them."""
    try:
        with path.open("rb") as file:
            n_file = os.fstat(file.fileno()).st_size
            if n_file < 8:
                _refuse(path, f"it has {n_file} bytes; the header's length alone takes 8")
            n_header = int.from_bytes(file.read(8), "little")
            if n_header > MAX_HEADER_BYTES:
                _refuse(path, f"its header claims {n_header} bytes; at most {MAX_HEADER_BYTES} are allowed")
            if 8 + n_header > n_file:
                _refuse(path, f"truncated: its header claims {n_header} bytes, the file has {n_file}")
            return file.read(n_header), n_file - 8 - n_header
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error


def _tensors(path: Path, entries: dict[str, Any], n_data: int) -> Tensors:
    """Check each tensor's entry, and that together they fill the data exactly."""
    tensors: Tensors = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > n_data:
            _refuse(path, f"truncated: tensor {name!r} ends at byte {end} of the data, the file has {n_data}")
        if (end - begin) * 8 != prod(shape) * _BITS[dtype]:
            _refuse(path, f"tensor {name!r} of {dtype} {list(shape)} takes {end - begin} bytes, which does not fit")
        tensors[name] = (dtype, shape)
        spans.append((begin, end, name))
    last_end, last_name = 0, ""
    for begin, end, name in sorted(spans):
        if begin < last_end:
            _refuse(path, f"tensors {last_name!r} and {name!r} overlap")
        if begin > last_end:
            _refuse(path, f"{begin - last_end} bytes before tensor {name!r} belong to no tensor")
        last_end, last_name = end, name
    if last_end != n_data:
        _refuse(path, f"{n_data - last_end} bytes at its end belong to no tensor")
    return tensors


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
    """Say whether a JSON value is a whole number, zero or more (`true` is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands twice: readers would disagree on which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated name {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise PatchError(f"{path} cannot be read as safetensors: {reason}", hint=_HINT) from cause
