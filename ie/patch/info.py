"""The document in a patch's metadata: what the edit is and where it comes from. `docs/patch-format.md` specifies it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ie.errors import PatchError

__all__ = ["FORMAT_VERSION", "Kept", "Parent", "PatchBase", "PatchInfo", "Probed", "parse_info"]

FORMAT_VERSION = 1


class _Part(BaseModel):
    """A part of the document: no value is bent into another type, numbers are finite, unknown keys are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class PatchBase(_Part):
    """The base model that a patch was made for; `revision` is the hub's commit, where it came from there."""

    id: str
    fingerprint: str
    revision: str | None = None


class Probed(_Part):
    """A prompt that the edit should not move, and what the base answered without and with the patch."""

    prompt: str
    before: str
    after: str


class Kept(_Part):
    """What compression and rounding left of the editor's update.

    Attributes:
        energy: share of ‖ΔW‖² over all modules; what was lost is the squared norm of the difference.
        rank_before: the largest rank of a module's update before.
    """

    energy: float
    rank_before: int


class PatchInfo(_Part):
    """The document of a patch.

    What a person asked for may be null: a stack has it in its parents, and an adapter that another tool made has none.

    Attributes:
        base: the base model.
        editor: fingerprint of the editor.
        instruction: what kind of edit it is.
        prompt: the edit's prompt.
        target: the wanted answer.
        before: the base's greedy answer to the plain prompt.
        after: the same under this very file.
        took: whether `after` is the target; of a stack, whether all its edits take under it.
        probes: prompts that should not move.
        templates: fingerprint of the instruction templates that the editor was trained with.
        scale: strength.
        created: ISO 8601, UTC.
        versions: of `ie`, Python and packages.
        kept: what compression and rounding left.
        norms: Frobenius norm of BᵀA by module path, scale left out.
        parents: the edits of a stack, in the order of their rows; or those of a joint patch, which have no rows.
    """

    format_version: int = Field(default=FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    base: PatchBase
    editor: str | None
    instruction: str | None
    prompt: str | None
    target: str | None
    before: str | None
    after: str | None
    took: bool | None
    probes: tuple[Probed, ...] = ()
    templates: str | None = None
    scale: float = 1.0
    created: str
    versions: Mapping[str, str]
    kept: Kept | None = None
    norms: Mapping[str, float] | None = None
    parents: tuple[Parent, ...] = ()

    @property
    def is_joint(self) -> bool:
        """Whether the rows belong to all edits together: none can be taken out."""
        return bool(self.parents) and not any(parent.ranks for parent in self.parents)


class Parent(_Part):
    """One edit of a stack, or of a joint patch.

    Attributes:
        name: the file that it came from, for people and for `--without`.
        dtype: of its factors in that file.
        ranks: by module path, how many rows of the stack's factors are its own; empty in a joint patch.
        took: whether it takes under the whole patch.
        info: its own document. Its scale is multiplied into the stack's B already.
    """

    name: str
    dtype: str = Field(pattern="^(float32|float16|bfloat16)$")
    ranks: Mapping[str, int]
    took: bool | None
    info: PatchInfo


def parse_info(path: Path | str, document: Mapping[str, Any]) -> PatchInfo:
    """Check a document.

    Raises:
        PatchError: if it is not a patch's, or of a newer format version; all faults are named.
    """
    version = document.get("format_version")
    if version is None:
        raise PatchError(f"{path}: its metadata is not that of a patch: format_version: Field required")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PatchError(
            f"{path} has format version {version}, this ie reads up to {FORMAT_VERSION}", hint="upgrade instructedit"
        )
    try:
        return PatchInfo.model_validate_json(json.dumps(document))
    except (ValidationError, RecursionError) as error:
        raise PatchError(f"{path}: its metadata is not that of a patch: {_faults(error)}") from error


def _faults(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
