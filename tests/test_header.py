from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from ie.errors import PatchError
from ie.header import MAX_HEADER_BYTES, factor_shapes, read_document, read_header


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "file.safetensors"
    tensors = {"a.A": torch.zeros(2, 3), "a.B": torch.zeros(2, 5, dtype=torch.bfloat16), "s": torch.tensor(1.0)}
    save_file(tensors, path, metadata={"ie": '{"x": 1}', "other": "text"})
    metadata, found = read_header(path)
    assert metadata == {"ie": '{"x": 1}', "other": "text"}
    assert found == {"a.A": ("F32", (2, 3)), "a.B": ("BF16", (2, 5)), "s": ("F32", ())}
    assert read_document(path)[0] == {"x": 1}


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "f", {})) == ({}, {})


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[]", b"", "not an object"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "repeated name 'a'"),
        ({"__metadata__": {"ie": 1}}, b"", "does not map strings to strings"),
        ({"__metadata__": []}, b"", "does not map strings to strings"),
        ({"w": 3}, b"", "needs exactly dtype, shape and data_offsets"),
        ({"w": {"dtype": "F32", "shape": [1]}}, b"", "needs exactly"),
        ({"w": entry([1], 0, 4, "F99")}, bytes(4), "unknown dtype 'F99'"),
        ({"w": {**entry([1], 0, 4), "dtype": ["F32"]}}, bytes(4), "unknown dtype"),
        ({"w": {**entry([1], 0, 4), "shape": [-1]}}, bytes(4), "expected a list of sizes"),
        ({"w": {**entry([1], 0, 4), "shape": [True]}}, bytes(4), "expected a list of sizes"),
        ({"w": {**entry([1], 0, 4), "shape": 1}}, bytes(4), "expected a list of sizes"),
        ({"w": {**entry([1], 0, 4), "data_offsets": [0]}}, bytes(4), "expected [begin, end]"),
        ({"w": {**entry([1], 0, 4), "data_offsets": [0, 4.0]}}, bytes(4), "expected [begin, end]"),
        ({"w": entry([1], 4, 0)}, bytes(4), "after its end"),
        ({"w": entry([1], 0, 4)}, bytes(3), "truncated: tensor 'w'"),
        ({"w": entry([2], 0, 4)}, bytes(4), "does not fit"),
        ({"w": entry([1], 4, 8)}, bytes(8), "4 bytes before tensor 'w'"),
        ({"w": entry([1], 0, 4)}, bytes(8), "4 bytes at its end"),
        ({"v": entry([2], 0, 8), "w": entry([1], 4, 8)}, bytes(8), "'v' and 'w' overlap"),
        ({"v": entry([1], 0, 4), "w": entry([1], 0, 4)}, bytes(4), "'v' and 'w' overlap"),
    ],
)
def test_hostile_headers(header: Any, data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(PatchError) as error:
        read_header(write(tmp_path / "file", header, data))
    assert said in error.value.message
    assert "file" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("length", "said"),
    [(3, "truncated"), (MAX_HEADER_BYTES + 1, "at most"), (2**64 - 1, "at most"), (MAX_HEADER_BYTES, "truncated")],
)
def test_lengths_that_lie(length: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=said):
        read_header(write(tmp_path / "file", {}, length=length))


@pytest.mark.parametrize("n_bytes", [0, 7])
def test_files_too_short_for_a_length(n_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(n_bytes))
    with pytest.raises(PatchError, match=f"it has {n_bytes} bytes"):
        read_header(tmp_path / "file")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "file", {"w": entry([2, 2], 0, 16)}, bytes(16)).read_bytes()
    for n_bytes in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:n_bytes])
        with pytest.raises(PatchError):
            read_header(tmp_path / "cut")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PatchError, match="cannot read"):
            read_header(path)


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[1]", "not a JSON object")])
def test_broken_documents(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=said):
        read_document(write(tmp_path / "file", {"__metadata__": {"ie": text}}))


def test_factors() -> None:
    tensors = {"a.b.A": ("F32", (3, 5)), "a.b.B": ("F32", (3, 7))}
    assert factor_shapes("file", tensors) == {"a.b": (3, 5, 7)}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "no tensors"),
        ({"weight": (2, 2)}, "'weight' is named neither"),
        ({"A": (2, 2), "B": (2, 2)}, "'A' is named neither"),
        ({"m.A": (2, 2)}, "'m.A' has no partner"),
        ({"m.A": (2,), "m.B": (2, 2)}, "expected two sizes"),
        ({"m.A": (2, 2), "m.B": ()}, "expected two sizes"),
        ({"m.A": (2, 2), "m.B": (3, 2)}, "ranks 2 and 3"),
    ],
)
def test_factors_that_do_not_fit(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(PatchError, match=said):
        factor_shapes("file", {name: ("F32", shape) for name, shape in shapes.items()})


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(PatchError) as error:
        factor_shapes("file", {"x": ("F32", (1,)), "m.A": ("F32", (1, 1))})
    assert "'x'" in error.value.message and "'m.A'" in error.value.message
