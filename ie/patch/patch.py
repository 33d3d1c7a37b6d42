"""The patch: one edit, or a stack of them, as a small safetensors file. `docs/patch-format.md` specifies the file.

tensors    <module path>.A (r, d_in)  and  <module path>.B (r, d_out),   ΔW = scale · BᵀA
metadata   one JSON document under the key `ie`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from ie.base.update import Factors
from ie.errors import PatchError
from ie.files import new_file
from ie.header import factor_shapes, read_document
from ie.patch.info import PatchInfo, parse_info
from ie.patch.lowrank import norm

__all__ = ["DTYPES", "Patch", "load_tensors"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BY_FORMAT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NORM_TOLERANCE = 1e-3  # of what the metadata says; sums of fp32 products differ by less


@dataclass(frozen=True)
class Patch:
    """One edit, or several stacked.

    Attributes:
        info: what it is and where it comes from.
        factors: by module path A (r, d_in) and B (r, d_out), float32; their values are exact in `dtype`.
        dtype: what the file holds: `float32`, `float16` or `bfloat16`.
    """

    info: PatchInfo
    factors: Mapping[str, tuple[Tensor, Tensor]]
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        """The largest rank of a module's change."""
        return max((len(a) for a, _ in self.factors.values()), default=0)

    def update(self, scale: float | None = None) -> dict[str, Factors]:
        """The low-rank update, a batch of one; `scale` in place of the patch's own."""
        factor = self.info.scale if scale is None else scale
        return {name: (a[None], factor * b[None]) for name, (a, b) in self.factors.items()}

    def save(self, path: Path | str) -> int:
        """Write the file, whole or not at all, with each module's norm in its metadata; return its size in bytes.

        Raises:
            PatchError: if a value is not finite in the patch's dtype.
        """
        tensors, norms = {}, {}
        for name, pair in sorted(self.factors.items()):
            a, b = (factor.to("cpu", DTYPES[self.dtype]).contiguous() for factor in pair)
            if not (_finite(a) and _finite(b)):
                raise PatchError(f"{name} holds values that are not finite in {self.dtype}", hint="use float32")
            tensors[f"{name}.A"], tensors[f"{name}.B"] = a, b
            norms[name] = float(norm(a, b))
        info = self.info.model_copy(update={"norms": norms})
        document = json.dumps(info.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)
        with new_file(Path(path)) as fresh:
            fresh.write_bytes(to_bytes(tensors, {"ie": document}))  # the library's own writing makes files private
            return fresh.stat().st_size

    @classmethod
    def load(cls, path: Path | str) -> Patch:
        """Read a patch file.

        Raises:
            PatchError: if it is no patch, is damaged, says what is not so, or has a newer format.
        """
        document, tensors = read_document(path)
        info = parse_info(path, document)
        names = factor_shapes(path, tensors)
        loaded = load_tensors(path)
        factors = {name: (loaded[f"{name}.A"].float(), loaded[f"{name}.B"].float()) for name in names}
        dtypes = {_BY_FORMAT[dtype] for dtype, _ in tensors.values()}
        patch = cls(info, factors, dtypes.pop() if len(dtypes) == 1 else "float32")
        faults = [] if info.base.fingerprint else ["its base has no fingerprint"]
        faults += [*_not_finite(patch), *_false_norms(patch), *_false_ranks(patch)]
        if faults:
            raise PatchError(f"{path} is no valid patch: {'; '.join(faults)}", hint="make it again")
        return patch

    def rounded(self, dtype: str) -> Patch:
        """The same patch with its factors rounded to a dtype, still held in float32."""
        kind = DTYPES[dtype]
        factors = {name: (a.to(kind).float(), b.to(kind).float()) for name, (a, b) in self.factors.items()}
        return replace(self, factors=factors, dtype=dtype)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose header has been checked; the library may still refuse it.

    Raises:
        PatchError: if it does.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise PatchError(f"{path} cannot be read as safetensors: {error}") from error


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _not_finite(patch: Patch) -> list[str]:
    return [
        f"{name} holds values that are not finite"
        for name, (a, b) in patch.factors.items()
        if not (_finite(a) and _finite(b))
    ]


def _false_norms(patch: Patch) -> list[str]:
    """Norms are for people who look at a file without loading it: they must be true."""
    stated = patch.info.norms
    if stated is None:
        return []
    if stated.keys() != patch.factors.keys():
        return ["its norms are not those of its modules"]
    found = {name: float(norm(a, b)) for name, (a, b) in patch.factors.items()}
    return [
        f"the norm of {name} is {found[name]:.4g}, its metadata says {said:.4g}"
        for name, said in stated.items()
        if abs(found[name] - said) > _NORM_TOLERANCE * max(found[name], said)
    ]


def _false_ranks(patch: Patch) -> list[str]:
    """The rows of a stack must be its parents'; those of a joint patch are nobody's."""
    if patch.info.is_joint:
        inner = [parent.name for parent in patch.info.parents if parent.info.parents]
        return [f"its parent {name!r} is a stack itself, expected single edits" for name in inner]
    if not patch.info.parents:
        return []
    faults = []
    for parent in patch.info.parents:
        if parent.info.parents and not parent.info.is_joint:
            faults.append(f"its parent {parent.name!r} is a stack itself, expected single edits")
        if any(rank < 0 for rank in parent.ranks.values()) or parent.ranks.keys() - patch.factors.keys():
            faults.append(f"the ranks of its parent {parent.name!r} do not fit its modules")
    for name, (a, _) in patch.factors.items():
        total = sum(parent.ranks.get(name, 0) for parent in patch.info.parents)
        if total != len(a):
            faults.append(f"its parents have {total} rows of {name}, it has {len(a)}")
    return faults
