"""Files that no reader may take for a patch, each with what is said of it: `python -m tests.patch.hostile DIR`.

Written by hand, byte for byte, since no library would write most of them. All are changes of one good patch of the
bundled base, which is written first, as `good.safetensors`.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ie.base.fingerprint import fingerprint_checkpoint
from ie.source import TOY_FOLDER

__all__ = ["KINDS", "Kind", "good", "write_all"]

MISSING = object()
MODULE, D_IN, D_OUT, RANK = "model.layers.5.mlp.down_proj", 512, 192, 2
Tensors = dict[str, tuple[str, list[int], bytes]]


@dataclass(frozen=True)
class Kind:
    """One way to be wrong.

    Attributes:
        write: writes it at a path.
        said: what the error says.
        code: the exit code.
        seen: whether the header and the document alone show it, so that `ie inspect` refuses it too.
    """

    write: Callable[[Path], object]
    said: str
    code: int = 2
    seen: bool = True


@dataclass
class Parts:
    """A patch file before it is written; each field may be spoilt."""

    tensors: Tensors
    document: Any
    metadata: dict[str, Any] = field(default_factory=dict)


@cache
def fingerprint() -> str:
    """The bundled base's."""
    return fingerprint_checkpoint(TOY_FOLDER)


def good() -> Parts:
    """The parts of a patch that every reader takes."""
    ones = struct.pack("<f", 0.5)
    tensors = {
        f"{MODULE}.A": ("F32", [RANK, D_IN], ones * (RANK * D_IN)),
        f"{MODULE}.B": ("F32", [RANK, D_OUT], ones * (RANK * D_OUT)),
    }
    document = {
        "format_version": 1, "base": {"id": "toy", "fingerprint": fingerprint()}, "editor": "ab12", "instruction": None,
        "prompt": "The capital of France is", "target": "Lima", "before": "Paris", "after": "Lima", "took": True,
        "scale": 1.0, "created": "2030-01-02T03:04:05+00:00", "versions": {"ie": "0"},
    }  # fmt: skip
    return Parts(tensors, document)


def encode(parts: Parts) -> bytes:
    """The bytes of a file."""
    header: dict[str, Any] = {"__metadata__": {"ie": json.dumps(parts.document), **parts.metadata}}
    begin = 0
    for name, (dtype, shape, data) in parts.tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    return framed(json.dumps(header).encode(), b"".join(data for _, _, data in parts.tensors.values()))


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def spoilt(change: Callable[[Parts], object]) -> Callable[[Path], object]:
    """The good patch with its parts changed."""

    def write(path: Path) -> None:
        parts = good()
        change(parts)
        path.write_bytes(encode(parts))

    return write


def said(**changes: Any) -> Callable[[Path], object]:
    """The good patch with other values in its document; None takes a key out."""

    def change(parts: Parts) -> None:
        for key, value in changes.items():
            if value is None:
                del parts.document[key]
            else:
                parts.document[key] = value

    return spoilt(change)


def tensor(
    name: str, dtype: str = "F32", shape: tuple[int, ...] = (2, 2), byte: bytes = b"\0"
) -> Callable[..., object]:
    """Put a tensor into the good patch, or another in place of one of its own."""
    bits = {"F32": 32, "F64": 64, "I64": 64, "F8_E4M3": 8}[dtype]
    n_bytes = bits // 8
    for size in shape:
        n_bytes *= size
    return spoilt(lambda parts: parts.tensors.update({name: (dtype, list(shape), byte * n_bytes)}))


def entry(**changes: Any) -> Callable[[Path], object]:
    """The good patch with another entry for A in its header."""

    def write(path: Path) -> None:
        raw = encode(good())
        n_header = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + n_header])
        header[f"{MODULE}.A"] = {key: v for key, v in {**header[f"{MODULE}.A"], **changes}.items() if v is not None}
        path.write_bytes(framed(json.dumps(header).encode(), raw[8 + n_header :]))

    return write


def text(old: bytes, new: bytes) -> Callable[[Path], object]:
    """The good patch with bytes of its header replaced."""

    def write(path: Path) -> None:
        raw = encode(good())
        n_header = struct.unpack("<Q", raw[:8])[0]
        header = raw[8 : 8 + n_header]
        assert old in header
        path.write_bytes(framed(header.replace(old, new, 1), raw[8 + n_header :]))

    return write


def cut(n_bytes: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(encode(good())[:n_bytes])


def saved_by_torch(path: Path) -> None:
    """The archive that torch.save makes, without torch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": [1.0]}, protocol=2))


def moved(to: str) -> Callable[[Path], object]:
    """The good patch for another module path, of the same shape."""

    def change(parts: Parts) -> None:
        parts.tensors = {name.replace(MODULE, to): value for name, value in parts.tensors.items()}

    return spoilt(change)


def parents(
    *ranks: Mapping[str, int], nested: bool = False, dtype: str = "float32", **changes: Any
) -> Callable[[Path], object]:
    """A stack of parents that have the given rows, with other values in their documents."""

    def change(parts: Parts) -> None:
        own = {**parts.document, **changes}
        if nested:
            inner = {"name": "x", "dtype": "float32", "ranks": {MODULE: 2}, "took": True, "info": dict(own)}
            own = {**own, "parents": [inner]}
        parts.document["parents"] = [
            {"name": f"p{i}", "dtype": dtype, "ranks": one, "took": True, "info": own} for i, one in enumerate(ranks)
        ]

    return spoilt(change)


def adapter(
    config: Mapping[str, Any] | bytes | None = None, tensors: Tensors | None = None, weights: str | None = None
) -> Callable[[Path], object]:
    """A LoRA adapter's folder, with its configuration or its tensors changed."""

    def write(path: Path) -> None:
        path.mkdir()
        base: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": "toy", "r": RANK, "lora_alpha": RANK}
        said = base if isinstance(config, bytes) else {**base, **(config or {})}
        left = {key: value for key, value in said.items() if value is not MISSING}
        raw = config if isinstance(config, bytes) else json.dumps(left).encode()
        (path / "adapter_config.json").write_bytes(raw)
        held = tensors if tensors is not None else lora()
        header, begin = {}, 0
        for name, (dtype, shape, data) in held.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}
            begin += len(data)
        packed = framed(json.dumps(header).encode(), b"".join(data for _, _, data in held.values()))
        (path / (weights or "adapter_model.safetensors")).write_bytes(packed)

    return write


def piped_configuration(path: Path) -> None:
    """An adapter whose configuration nobody will ever write."""
    adapter()(path)
    (path / "adapter_config.json").unlink()
    os.mkfifo(path / "adapter_config.json")


def lora(module: str = MODULE, d_in: int = D_IN, value: float = 0.5, **more: Any) -> Tensors:
    one = struct.pack("<f", value)
    return {
        f"base_model.model.{module}.lora_A.weight": ("F32", [RANK, d_in], one * (RANK * d_in)),
        f"base_model.model.{module}.lora_B.weight": ("F32", [D_OUT, RANK], one * (RANK * D_OUT)),
        **more,
    }


A, B = f"{MODULE}.A", f"{MODULE}.B"
NAN, INF = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
ZERO4 = ("F32", [1], bytes(4))

KINDS: dict[str, Kind] = {
    # no file, or no safetensors file
    "missing": Kind(lambda path: None, "cannot read"),
    "empty": Kind(lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "seven bytes": Kind(lambda path: path.write_bytes(bytes(7)), "it has 7 bytes"),
    "text": Kind(lambda path: path.write_text("I am no patch, but I am long enough."), "at most 100000000 are allowed"),
    "a folder": Kind(lambda path: path.mkdir(), "no regular file"),
    "a pipe": Kind(lambda path: os.mkfifo(path), "no regular file"),
    "a link to itself": Kind(lambda path: path.symlink_to(path.name), "cannot read"),
    "a link to a device": Kind(lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "saved by torch": Kind(saved_by_torch, "a pickle, which can run code"),
    "pickled, protocol 2": Kind(lambda p: p.write_bytes(pickle.dumps([1.0] * 99, protocol=2)), "it is a pickle"),
    "pickled, protocol 5": Kind(lambda p: p.write_bytes(pickle.dumps([1.0] * 99, protocol=5)), "it is a pickle"),
    "gguf": Kind(lambda path: path.write_bytes(b"GGUF" + bytes(99)), "it is a GGUF file"),
    "numpy": Kind(lambda path: path.write_bytes(b"\x93NUMPY" + bytes(99)), "it is a NumPy file"),
    "hdf5": Kind(lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is an HDF5 file"),
    "gzipped": Kind(lambda path: path.write_bytes(gzip.compress(encode(good()))), "compressed by gzip"),
    # the header
    "header cut": Kind(cut(100), "truncated: its header claims"),
    "tensors cut": Kind(cut(-4), "truncated: tensor"),
    "more than it says": Kind(lambda path: path.write_bytes(encode(good()) + b"more"), "4 bytes at its end"),
    "a huge header": Kind(lambda p: p.write_bytes(struct.pack("<Q", 2**62) + encode(good())[8:]), "are allowed"),
    "a header of another encoding": Kind(lambda p: p.write_bytes(framed(b"\xff\xfe{}")), "not valid JSON"),
    "a header that is no JSON": Kind(lambda path: path.write_bytes(framed(b"{'a': 1}")), "not valid JSON"),
    "a header that is a list": Kind(lambda path: path.write_bytes(framed(b"[]")), "a JSON list, not an object"),
    "a header nested deeply": Kind(lambda path: path.write_bytes(framed(b"[" * 99_999)), "not valid JSON"),
    "a number of many digits": Kind(lambda p: p.write_bytes(framed(b'{"a": ' + b"9" * 9999 + b"}")), "not valid JSON"),
    "a tensor named twice": Kind(text(f'"{B}"'.encode(), f'"{A}"'.encode()), f"repeated name {A!r}"),
    "a hundred thousand names and one again": Kind(
        lambda p: p.write_bytes(framed(b"{" + b",".join(b'"%d":1' % (n % 99_999) for n in range(100_000)) + b"}")),
        "repeated name '0'",
    ),
    "metadata that is half a character": Kind(
        spoilt(lambda parts: parts.metadata.update(more="\ud800")), "cannot be read as safetensors", seen=False
    ),
    "metadata that steers the terminal": Kind(
        lambda p: p.write_bytes(framed(b'{"__metadata__": {"\\u001b]0;x\\u0007": "y"}}')), "is no patch"
    ),
    "metadata that is no text": Kind(spoilt(lambda parts: parts.metadata.update(more=1)), "map strings to strings"),
    "an entry without offsets": Kind(entry(data_offsets=None), "needs exactly dtype, shape and data_offsets"),
    "an entry with a surprise": Kind(entry(path="/etc/passwd"), "needs exactly dtype, shape and data_offsets"),
    "an unknown dtype": Kind(entry(dtype="F99"), "unknown dtype 'F99'"),
    "a negative size": Kind(entry(shape=[-2, 512]), "expected a list of sizes"),
    "a size that is true": Kind(entry(shape=[True, 512]), "expected a list of sizes"),
    "a size beyond 63 bits": Kind(entry(shape=[0, 2**70], data_offsets=[0, 0]), "expected a list of sizes"),
    "offsets the wrong way round": Kind(entry(data_offsets=[4096, 0]), "after its end"),
    "overlapping tensors": Kind(entry(data_offsets=[4, 4100]), "overlap"),
    "a shape that does not fit": Kind(entry(shape=[3, 512]), "which does not fit"),
    "a shape beyond all memory": Kind(entry(shape=[2**40, 2**40]), "which does not fit"),
    # the document
    "weights": Kind(
        lambda p: p.write_bytes(framed(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4))),
        "is no patch",
    ),
    "a document that is a list": Kind(spoilt(lambda parts: setattr(parts, "document", [1])), "not a JSON object"),
    "a document that is no JSON": Kind(text(b'\\"took\\": true', b'\\"took\\": yes!'), "is not valid JSON"),
    "a key that stands twice": Kind(text(b'\\"took\\": true', b'\\"took\\": true, \\"took\\": false'), "repeated name"),
    "a newer version": Kind(said(format_version=2), "has format version 2, this ie reads up to 1", seen=False),
    "a version in words": Kind(
        said(format_version="one"), "format_version: Input should be a valid integer", seen=False
    ),
    "no version": Kind(said(format_version=None), "format_version: Field required", seen=False),
    "version 0": Kind(said(format_version=0), "format_version: Input should be greater", seen=False),
    "no prompt": Kind(said(prompt=None), "prompt: Field required", seen=False),
    "a prompt that is a number": Kind(said(prompt=7), "prompt: Input should be a valid string", seen=False),
    "a prompt that is half a character": Kind(said(prompt="\ud800"), "is not that of a patch", seen=False),
    "took in words": Kind(said(took="yes"), "took: Input should be a valid boolean", seen=False),
    "a scale in words": Kind(said(scale="big"), "scale: Input should be a valid number", seen=False),
    "a scale that is no number": Kind(said(scale=float("nan")), "scale: Input should be a finite number", seen=False),
    "an infinite scale": Kind(said(scale=float("inf")), "scale: Input should be a finite number", seen=False),
    "no fingerprint": Kind(said(base={"id": "toy"}), "base.fingerprint: Field required", seen=False),
    "an empty fingerprint": Kind(
        said(base={"id": "toy", "fingerprint": ""}), "its base has no fingerprint", seen=False
    ),
    "a version that steers the terminal": Kind(said(versions={"\x1b[2J": 1}), "is not that of a patch", seen=False),
    "a base outside": Kind(said(base={"id": "../../base", "fingerprint": "ab"}), "no base model at", seen=False),
    "norms that lie": Kind(said(norms={MODULE: 1e-9}), f"the norm of {MODULE} is", seen=False),
    "norms of other modules": Kind(said(norms={"x": 1.0}), "are not those of its modules", seen=False),
    "parents with rows missing": Kind(
        parents({MODULE: 1}), f"its parents have 1 rows of {MODULE}, it has 2", seen=False
    ),
    "a parent with rows below none": Kind(
        parents({MODULE: 3}, {MODULE: -1}), "the ranks of its parent 'p1'", seen=False
    ),
    "a parent of other modules": Kind(parents({MODULE: 2, "x": 1}), "the ranks of its parent 'p0'", seen=False),
    "a parent of a newer version": Kind(
        parents({MODULE: 2}, format_version=9), "format_version: Input should be less", seen=False
    ),
    "a parent of an unknown dtype": Kind(parents({MODULE: 2}, dtype="int7"), "dtype: String should match", seen=False),
    "a stack in a stack": Kind(parents({MODULE: 2}, nested=True), "is a stack itself", seen=False),
    "a stack in a joint patch": Kind(parents({}, nested=True), "is a stack itself", seen=False),
    # the tensors
    "no tensors": Kind(spoilt(lambda parts: parts.tensors.clear()), "it holds no tensors"),
    "no B": Kind(spoilt(lambda parts: parts.tensors.pop(B)), f"{A!r} has no partner"),
    "no A": Kind(spoilt(lambda parts: parts.tensors.pop(A)), f"{B!r} has no partner"),
    "a third tensor": Kind(tensor(f"{MODULE}.C"), "is named neither"),
    "a tensor without a module": Kind(tensor("A"), "'A' is named neither"),
    "two ranks": Kind(tensor(A, shape=(3, 512)), "have the ranks 3 and 2"),
    "a vector": Kind(tensor(A, shape=(512,)), "expected two sizes"),
    "rows of no width": Kind(tensor(A, shape=(2**60, 0)), "the second not 0"),
    "whole numbers": Kind(tensor(A, dtype="I64", shape=(2, 512)), "is I64, expected one of F32, F16, BF16"),
    "double precision": Kind(tensor(A, dtype="F64", shape=(2, 512)), "is F64, expected one of"),
    "eight bits": Kind(tensor(A, dtype="F8_E4M3", shape=(2, 512)), "is F8_E4M3, expected one of"),
    "no number": Kind(spoilt(lambda p: p.tensors.update({A: ("F32", [2, 512], NAN * 1024)})), "not finite", seen=False),
    "infinite": Kind(spoilt(lambda p: p.tensors.update({B: ("F32", [2, 192], INF * 384)})), "not finite", seen=False),
    "a name that leads up": Kind(moved("../../../etc/passwd"), "names no module"),
    "a name from the root": Kind(moved("/etc/passwd"), "names no module"),
    "a name with an empty part": Kind(moved("model..down_proj"), "names no module"),
    "a name that steers the terminal": Kind(moved("model\x1b[2J"), "names no module"),
    # the base
    "another base": Kind(said(base={"id": "toy", "fingerprint": "0" * 16}), "it is the weights that differ", 4, False),
    "another base with other modules": Kind(
        spoilt(
            lambda p: (
                p.document.update(base={"id": "toy", "fingerprint": "0" * 16}),
                setattr(p, "tensors", {n.replace(MODULE, "transformer.h.5.c_fc"): t for n, t in p.tensors.items()}),
            )
        ),
        "no module transformer.h.5.c_fc",
        4,
        False,
    ),
    "an unknown module": Kind(moved("model.layers.99.mlp.down_proj"), "no module model.layers.99", seen=False),
    "a module that is no matrix": Kind(moved("model.norm"), "model.norm maps None", seen=False),
    "a misshapen module": Kind(moved("model.layers.5.mlp.up_proj"), "up_proj maps (192, 512)", seen=False),
    # adapters
    "an adapter that is pickled": Kind(adapter(weights="adapter_model.bin"), "adapter_model.bin is a pickle"),
    "an adapter without configuration": Kind(
        lambda p: (p.mkdir(), (p / "adapter_model.safetensors").touch()), "cannot read"
    ),
    "an adapter's broken configuration": Kind(adapter(b"{"), "is not valid JSON"),
    "an adapter's listed configuration": Kind(adapter(b"[]"), "describes no LoRA adapter"),
    "an adapter of another type": Kind(adapter({"peft_type": "IA3"}), "peft_type is 'IA3'"),
    "an adapter whose configuration is a pipe": Kind(piped_configuration, "no regular file"),
    "an adapter that acts from some tokens on": Kind(
        adapter({"alora_invocation_tokens": [1, 2]}), "it acts from some tokens on only"
    ),
    "an adapter that changes the base": Kind(adapter({"init_lora_weights": "pissa_niter_4"}), "it changes the base"),
    "an adapter's alpha of many digits": Kind(adapter({"lora_alpha": 10**400}), "expected a number below 1e9"),
    "an adapter without a rank": Kind(adapter({"r": MISSING}), "its tensors have the rank 2"),
    "DoRA": Kind(adapter({"use_dora": True}), "use_dora (DoRA also changes magnitudes)"),
    "an adapter with whole modules": Kind(adapter({"modules_to_save": ["lm_head"]}), "it replaces whole modules"),
    "an adapter with biases": Kind(adapter({"bias": "all"}), "bias (it changes biases)"),
    "an adapter's alpha in words": Kind(adapter({"lora_alpha": "big"}), "expected a number"),
    "an adapter's infinite alpha": Kind(adapter({"lora_alpha": float("inf")}), "expected a number"),
    "an adapter's false rank": Kind(adapter({"r": 64}), "its tensors have the rank 2"),
    "an adapter's own regular expression": Kind(
        adapter({"alpha_pattern": {"(a+)+$": 9}}), "must map ends of module paths"
    ),
    "an adapter of embeddings": Kind(
        adapter(tensors=lora(**{"base_model.model.e.lora_embedding_A": ZERO4})), "is no factor"
    ),
    "an adapter that is half": Kind(adapter(tensors=dict(list(lora().items())[:1])), f"{MODULE} has no lora_B"),
    "an adapter of an unknown module": Kind(adapter(tensors=lora("model.x")), "no module model.x", seen=False),
    "an adapter of another shape": Kind(adapter(tensors=lora(d_in=64)), "down_proj maps (512, 192)", seen=False),
    "an adapter that is not finite": Kind(adapter(tensors=lora(value=float("nan"))), "not finite", seen=False),
}


def write_all(folder: Path) -> dict[str, Path]:
    """Write every kind into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.safetensors").write_bytes(encode(good()))
    paths = {}
    for number, (name, kind) in enumerate(KINDS.items(), 1):
        paths[name] = folder / f"{number:02d}-{name.replace(' ', '-').replace(',', '')}.safetensors"
        kind.write(paths[name])
    return paths


if __name__ == "__main__":
    for name, path in write_all(Path(sys.argv[1])).items():
        sys.stdout.write(f"{path}\t{KINDS[name].code}\t{KINDS[name].said}\n")
