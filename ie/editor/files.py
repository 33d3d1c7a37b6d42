"""The editor folder: editor.safetensors with the weights, editor.json with everything else. No pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from ie.base.model import Base
from ie.base.targets import EditTarget
from ie.editor.editor import Editor, EditorSettings
from ie.errors import BaseMismatchError, EditorError
from ie.files import new_folder
from ie.versions import now, versions

__all__ = ["EditorInfo", "load_editor", "load_info", "save_editor"]

FORMAT_VERSION = 3  # 2: parts for kinds of edits; 3: no kind is one in the middle of all
WEIGHTS, INFO = "editor.safetensors", "editor.json"


class BaseInfo(BaseModel):
    """The base model that an editor was trained for."""

    model_config = ConfigDict(frozen=True)

    id: str
    fingerprint: str
    quant: str


class EditorInfo(BaseModel):
    """What editor.json says. Keys that a newer version added are kept out of sight, not refused."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    method: str
    base: BaseInfo
    targets: tuple[EditTarget, ...]
    settings: EditorSettings
    tasks: tuple[str, ...]
    holdout: tuple[str, ...]
    training: Mapping[str, Any]
    validation: Mapping[str, float]
    versions: Mapping[str, str]
    created: str
    fingerprint: str


def save_editor(
    folder: Path,
    editor: Editor,
    base: Base,
    *,
    tasks: tuple[str, ...],
    holdout: tuple[str, ...],
    training: Mapping[str, Any],
    validation: Mapping[str, float],
    beside: Sequence[Path] = (),
) -> EditorInfo:
    """Write an editor folder, whole or not at all.

    Args:
        folder: where to.
        editor: the editor.
        base: the base model that it was trained for.
        tasks: tasks that it was trained on.
        holdout: tasks that it never saw.
        training: the settings and figures of its training.
        validation: its figures on validation records.
        beside: files to copy into the folder.
    """
    with new_folder(folder) as fresh:
        # Rounding never: what is written is what was validated, bit for bit.
        weights = to_bytes({name: t.detach().cpu().contiguous() for name, t in editor.state_dict().items()})
        (fresh / WEIGHTS).write_bytes(weights)  # the library's own writing makes files private
        info = EditorInfo(
            method=editor.settings.method,
            base=BaseInfo(id=base.id, fingerprint=base.fingerprint, quant=base.quant),
            targets=editor.targets,
            settings=editor.settings,
            tasks=tasks,
            holdout=holdout,
            training=training,
            validation=validation,
            versions=versions(),
            created=now(),
            fingerprint=_fingerprint(hashlib.sha256(weights)),
        )
        document = json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (fresh / INFO).write_text(document + "\n", encoding="utf-8")
        for path in beside:
            shutil.copyfile(path, fresh / path.name)
    return info


def _fingerprint(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:16]


def load_info(folder: Path) -> EditorInfo:
    """Read editor.json.

    Raises:
        EditorError: if the folder is no editor, or a newer version's.
    """
    for name in (INFO, WEIGHTS):
        if not (folder / name).is_file():
            raise EditorError(f"{folder} is no editor: it has no {name}", hint="`ie train` makes one")
    try:
        document = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("format_version", 0) > FORMAT_VERSION:
            raise EditorError(
                f"{folder} has format version {document['format_version']}, this ie reads up to {FORMAT_VERSION}",
                hint="upgrade instructedit",
            )
        return EditorInfo.model_validate(document)
    except (ValidationError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise EditorError(f"{folder / INFO} cannot be read: {reason}", hint="train it again") from error


def load_editor(folder: Path, base: Base) -> tuple[Editor, EditorInfo]:
    """Load an editor for a base model, ready to edit with.

    Raises:
        EditorError: if the folder is no editor, or its weights are not those that editor.json describes.
        BaseMismatchError: if it was trained for another base model.
    """
    info = load_info(folder)
    if info.format_version < FORMAT_VERSION:
        raise EditorError(
            f"{folder} has format version {info.format_version}: it was made by an earlier ie",
            hint="train it again",
        )
    if info.base.fingerprint != base.fingerprint:
        raise BaseMismatchError(
            f"the editor {folder} was trained for {info.base.id} (fingerprint {info.base.fingerprint}), "
            f"this base is {base.id} ({base.fingerprint})",
            hint="give the editor's base with --model, or train an editor for this one",
        )
    editor = Editor(info.targets, info.settings)
    try:
        weights = load_file(folder / WEIGHTS)
        editor.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise EditorError(f"{folder / WEIGHTS} does not fit editor.json: {error}", hint="train it again") from error
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise EditorError(f"{folder / WEIGHTS} holds values that are not finite", hint="train it again")
    with (folder / WEIGHTS).open("rb") as file:
        if _fingerprint(hashlib.file_digest(file, "sha256")) != info.fingerprint:
            raise EditorError(f"{folder / WEIGHTS} is not of this editor.json", hint="copy the whole folder")
    return editor.to(base.device).eval(), info
