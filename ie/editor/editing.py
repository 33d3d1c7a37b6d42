"""What `ie edit` does: edit requests in, patch files out, each with what it changed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ie.base.asking import Ask, answers, log_likelihoods, matches
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.update import Update
from ie.editor.files import EditorInfo, load_editor, load_info
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest
from ie.patch.lowrank import compress, select
from ie.patch.patch import Patch, PatchBase, PatchInfo
from ie.versions import now, versions

__all__ = ["EditSettings", "RequestSettings", "edit", "make_patches"]

_BATCH_SIZE = 32


class RequestSettings(BaseModel):
    """One edit as the command line takes it, with prompts that should not move."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    target: str
    instruction: str | None = None
    probes: tuple[str, ...] = ()


class EditSettings(BaseModel):
    """What `ie edit` can be told.

    Attributes:
        requests: the edits.
        many: write a folder of patches and report a list, also for one edit.
        editor: editor folder.
        model: the base model; None takes the one that the editor was trained for.
        out: patch file, or folder of patch files.
        quant: see `load_base`; `auto` takes what the editor was trained with.
        dtype: see `load_base`.
        device: see `load_base`.
        force: overwrite `out`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: tuple[RequestSettings, ...]
    many: bool = False
    editor: Path = Path("ie-editor")
    model: str | None = None
    out: Path = Path("patch.safetensors")
    quant: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    force: bool = False


def edit(settings: EditSettings) -> dict[str, Any]:
    """Make the edits and write their patches.

    Returns:
        The JSON object of `ie edit`.

    Raises:
        EditorError: if there is no usable editor.
        BaseMismatchError: if the base is not the editor's.
    """
    info = load_info(settings.editor)
    base = load_base(settings.model or info.base.id, quant=settings.quant, dtype=settings.dtype, device=settings.device)
    editor, info = load_editor(settings.editor, base)
    method = editor_method(editor)
    results = []
    for start in range(0, len(settings.requests), _BATCH_SIZE):
        chunk = settings.requests[start : start + _BATCH_SIZE]
        began = time.monotonic()
        made = make_patches(base, method(base, [_request(one) for one in chunk]), chunk, info)
        seconds = (time.monotonic() - began) / len(chunk)
        for offset, (one, patch) in enumerate(zip(chunk, made, strict=True)):
            path = _path(settings, start + offset, one.prompt)
            results.append(_describe(base, patch, one.probes, path, patch.save(path), seconds))
    return {"edits": results} if settings.many else results[0]


def make_patches(base: Base, update: Update, requests: Sequence[RequestSettings], info: EditorInfo) -> list[Patch]:
    """One patch for each edit of a batch, compressed, with what the model says before and after.

    Before and after are asked plainly, as a user would, and after compression: of what the file holds.
    """
    asks = [Ask(one.prompt, one.target) for one in requests]
    before = answers(base, asks)
    patches = []
    for i, (one, old) in enumerate(zip(requests, before, strict=True)):
        factors = {name: compress(a[0], b[0]) for name, (a, b) in select(update, i).items()}
        after = answers(base, asks[i : i + 1], {name: (a[None], b[None]) for name, (a, b) in factors.items()})[0]
        details = PatchInfo(
            base=PatchBase(id=base.id, fingerprint=base.fingerprint),
            editor=info.fingerprint,
            instruction=one.instruction,
            prompt=one.prompt,
            target=one.target,
            before=old,
            after=after,
            took=matches(after, one.target),
            created=now(),
            versions=versions(),
        )
        patches.append(Patch(details, factors))
    return patches


def _request(one: RequestSettings) -> EditRequest:
    return EditRequest(one.prompt, one.target, one.instruction)


def _path(settings: EditSettings, index: int, prompt: str) -> Path:
    if not settings.many:
        return settings.out
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")[:40]
    return settings.out / f"{index + 1:04d}-{slug}.safetensors"


def _describe(
    base: Base, patch: Patch, probes: Sequence[str], path: Path, n_bytes: int, seconds: float
) -> dict[str, Any]:
    update = patch.update()
    asks = [Ask(probe, "") for probe in probes]
    pairs = zip(probes, answers(base, asks), answers(base, asks, update), strict=True) if asks else ()
    return {
        "patch": str(path),
        "bytes": n_bytes,
        "rank": patch.rank,
        "took": patch.info.took,
        "prompt": patch.info.prompt,
        "target": patch.info.target,
        "before": patch.info.before,
        "after": patch.info.after,
        "target_probability": _probability(base, patch.info, update),
        "probes": [{"prompt": probe, "before": old, "after": new, "changed": old != new} for probe, old, new in pairs],
        "seconds": seconds,
    }


def _probability(base: Base, info: PatchInfo, update: Update) -> Mapping[str, float]:
    """Probability of the whole target after the prompt."""
    ask = Ask(info.prompt, info.target)
    text = base.encode(ask.prompt, ask.answer)
    n_tokens = len(text.ids) - text.n_prompt
    before, after = log_likelihoods(base, [ask])[0], log_likelihoods(base, [ask], update)[0]
    return {"before": math.exp(n_tokens * before), "after": math.exp(n_tokens * after)}
