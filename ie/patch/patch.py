"""The patch: one edit as a small safetensors file, and its use on a model. `docs/patch-format.md` specifies the file.

tensors    <module path>.A (r, d_in)  and  <module path>.B (r, d_out),   ΔW = scale · BᵀA
metadata   one JSON document under the key `ie`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ie.base.model import Base
from ie.base.targets import module_shape
from ie.base.update import Factors, adding
from ie.errors import BaseMismatchError, PatchError
from ie.files import new_file
from ie.header import factor_shapes, read_document
from ie.patch.lowrank import stack

__all__ = ["FORMAT_VERSION", "Patch", "PatchInfo", "applied", "check_base", "combined"]

FORMAT_VERSION = 1


class PatchBase(BaseModel):
    """The base model that a patch was made for."""

    model_config = ConfigDict(frozen=True)

    id: str
    fingerprint: str


class PatchInfo(BaseModel):
    """The document in a patch's metadata. Keys that a newer minor change added are passed over."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    base: PatchBase
    editor: str
    instruction: str | None
    prompt: str
    target: str
    before: str
    after: str
    took: bool
    scale: float = 1.0
    created: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Patch:
    """One edit.

    Attributes:
        info: what it is and where it comes from.
        factors: by module path A (r, d_in) and B (r, d_out), float32.
    """

    info: PatchInfo
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of a module's change."""
        return max((len(a) for a, _ in self.factors.values()), default=0)

    def update(self, scale: float | None = None) -> dict[str, Factors]:
        """The low-rank update, a batch of one; `scale` in place of the patch's own."""
        factor = self.info.scale if scale is None else scale
        return {name: (a[None], factor * b[None]) for name, (a, b) in self.factors.items()}

    def save(self, path: Path | str) -> int:
        """Write the file, whole or not at all, and return its size in bytes."""
        tensors = {}
        for name, (a, b) in sorted(self.factors.items()):
            tensors[f"{name}.A"], tensors[f"{name}.B"] = a.cpu().contiguous(), b.cpu().contiguous()
        document = json.dumps(self.info.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)
        with new_file(Path(path)) as fresh:
            save_file(tensors, fresh, metadata={"ie": document})
            return fresh.stat().st_size

    @classmethod
    def load(cls, path: Path | str) -> Patch:
        """Read a patch file.

        Raises:
            PatchError: if it is no patch, is damaged, or has a newer format.
        """
        document, tensors = read_document(path)
        info = _info(path, document)
        names = factor_shapes(path, tensors)
        loaded = load_file(path)
        factors = {name: (loaded[f"{name}.A"].float(), loaded[f"{name}.B"].float()) for name in names}
        for name, (a, b) in factors.items():
            if not (a.isfinite().all() and b.isfinite().all()):
                raise PatchError(f"{path}: {name} holds values that are not finite")
        return cls(info, factors)


def _info(path: Path | str, document: Mapping[str, Any]) -> PatchInfo:
    version = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PatchError(
            f"{path} has format version {version}, this ie reads up to {FORMAT_VERSION}", hint="upgrade instructedit"
        )
    try:
        return PatchInfo.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise PatchError(f"{path}: its metadata is not that of a patch: {faults}") from error


def check_base(patch: Patch, base: Base, path: Path | str) -> None:
    """Refuse a base model that the patch was not made for.

    Raises:
        BaseMismatchError: if its fingerprint is another one.
    """
    made_for = patch.info.base
    if made_for.fingerprint != base.fingerprint:
        raise BaseMismatchError(
            f"the patch {path} was made for {made_for.id} (fingerprint {made_for.fingerprint}), "
            f"this base is {base.id} ({base.fingerprint})",
            hint="give the patch's base with --model, or make the edit again for this one",
        )


def combined(patches: Sequence[Patch], scale: float | None = None) -> dict[str, Factors]:
    """The sum of some patches as one low-rank update."""
    return stack([patch.update(scale) for patch in patches])


@contextmanager
def applied(model: nn.Module | Base, *patches: Patch, scale: float | None = None) -> Iterator[None]:
    """Let a model compute as edited by some patches while the context lasts; its weights are not changed.

    Args:
        model: a loaded causal LM, quantised or not, or a `Base`.
        patches: what to apply, together.
        scale: strength, in place of the patches' own.

    Raises:
        PatchError: if the model lacks a module of a patch, or the module has another shape; all are named.
    """
    module = model.model if isinstance(model, Base) else model
    faults = [fault for patch in patches for fault in _misfits(module, patch)]
    if faults:
        raise PatchError(f"the patch does not fit {type(module).__name__}: {'; '.join(faults)}")
    device = next(module.parameters()).device
    update = {name: (a.to(device), b.to(device)) for name, (a, b) in combined(patches, scale).items()}
    with adding(module, update):
        yield


def _misfits(model: nn.Module, patch: Patch) -> Iterator[str]:
    modules = dict(model.named_modules())
    for name, (a, b) in patch.factors.items():
        if name not in modules:
            yield f"no module {name}"
        elif module_shape(modules[name]) != (a.shape[1], b.shape[1]):
            yield f"{name} maps {module_shape(modules[name])}, the patch {(a.shape[1], b.shape[1])}"
