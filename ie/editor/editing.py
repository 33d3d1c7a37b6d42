"""What `ie edit` does: edit requests in, patch files out, each with what it changed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from ie.base.asking import Ask, answers, log_likelihoods, matches
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.update import Factors, Update
from ie.editor.files import EditorInfo, load_editor, load_info
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest
from ie.patch.info import Kept, PatchBase, PatchInfo, Probed
from ie.patch.lowrank import compress, energy_kept, select, side_by_side
from ie.patch.patch import Patch
from ie.versions import now, versions

__all__ = ["EditSettings", "RequestSettings", "edit", "make_patches"]

_BATCH_SIZE = 32
_LEAST_ENERGY = 0.9995  # of a compressed update that rounding to fp16 must leave; else the patch stays fp32


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
        rank: the largest rank of a module's change; None for the smallest that keeps 99.9 % of the update's energy.
        patch_dtype: what the file holds: `float32`, `bfloat16`, `float16`; `auto` is float16 where that is precise.
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
    rank: PositiveInt | None = None
    patch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
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
        update = method(base, [_request(one) for one in chunk])
        made = make_patches(base, update, chunk, info, settings.rank, settings.patch_dtype)
        seconds = (time.monotonic() - began) / len(chunk)
        for offset, (one, patch) in enumerate(zip(chunk, made, strict=True)):
            path = _path(settings, start + offset, one.prompt)
            results.append(_describe(base, patch, path, patch.save(path), seconds))
    return {"edits": results} if settings.many else results[0]


def make_patches(
    base: Base,
    update: Update,
    requests: Sequence[RequestSettings],
    info: EditorInfo,
    rank: int | None = None,
    dtype: str = "auto",
) -> list[Patch]:
    """One patch for each edit of a batch, compressed, with what the model says before and after.

    Before and after are asked plainly, as a user would, and after compression and rounding: of what the file holds.

    Args:
        base: the base model.
        update: n edits.
        requests: n requests.
        info: the editor that made the update.
        rank: see `EditSettings`.
        dtype: see `EditSettings`.
    """
    made = [_compressed(base, one, select(update, i), info, rank, dtype) for i, one in enumerate(requests)]
    asks = [
        Ask(prompt, answer, edit=i)
        for i, one in enumerate(requests)
        for prompt, answer in ((one.prompt, one.target), *((probe, "") for probe in one.probes))
    ]
    before, after = iter(answers(base, asks)), iter(answers(base, asks, side_by_side([one.update() for one in made])))
    patches = []
    for one, patch in zip(requests, made, strict=True):
        old, new = next(before), next(after)
        seen = {
            "before": old,
            "after": new,
            "took": matches(new, one.target),
            "probes": tuple(Probed(prompt=probe, before=next(before), after=next(after)) for probe in one.probes),
        }
        patches.append(replace(patch, info=patch.info.model_copy(update=seen)))
    return patches


def _compressed(
    base: Base, one: RequestSettings, update: Mapping[str, Factors], info: EditorInfo, rank: int | None, dtype: str
) -> Patch:
    """A patch with its factors as the file will hold them; what it does to the model is not known yet."""
    details = PatchInfo(
        base=PatchBase(id=base.id, fingerprint=base.fingerprint, revision=base.revision),
        editor=info.fingerprint,
        instruction=one.instruction,
        prompt=one.prompt,
        target=one.target,
        before=None,
        after=None,
        took=None,
        templates=info.training.get("templates"),
        created=now(),
        versions=versions(),
    )
    exact = Patch(details, {name: compress(a[0], b[0], max_rank=rank) for name, (a, b) in update.items()})
    patch = exact.rounded("float16" if dtype == "auto" else dtype)
    if dtype == "auto" and not energy_kept(exact.update(), patch.update()) >= _LEAST_ENERGY:  # also where it is NaN
        patch = exact
    kept = Kept(
        energy=energy_kept(update, patch.update()),
        rank_before=max((a.shape[1] for a, _ in update.values()), default=0),
    )
    return replace(patch, info=details.model_copy(update={"kept": kept}))


def _request(one: RequestSettings) -> EditRequest:
    return EditRequest(one.prompt, one.target, one.instruction)


def _path(settings: EditSettings, index: int, prompt: str) -> Path:
    if not settings.many:
        return settings.out
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")[:40]
    return settings.out / f"{index + 1:04d}-{slug}.safetensors"


def _describe(base: Base, patch: Patch, path: Path, n_bytes: int, seconds: float) -> dict[str, Any]:
    info = patch.info
    return {
        "patch": str(path),
        "bytes": n_bytes,
        "rank": patch.rank,
        "dtype": patch.dtype,
        "energy_kept": info.kept.energy if info.kept else None,
        "took": info.took,
        "prompt": info.prompt,
        "target": info.target,
        "before": info.before,
        "after": info.after,
        "target_probability": _probability(base, patch),
        "probes": [{**probe.model_dump(), "changed": probe.before != probe.after} for probe in info.probes],
        "seconds": seconds,
    }


def _probability(base: Base, patch: Patch) -> Mapping[str, float]:
    """Probability of the whole target after the prompt."""
    ask = Ask(patch.info.prompt or "", patch.info.target or "")
    text = base.encode(ask.prompt, ask.answer)
    n_tokens = len(text.ids) - text.n_prompt
    before, after = log_likelihoods(base, [ask])[0], log_likelihoods(base, [ask], patch.update())[0]
    return {"before": math.exp(n_tokens * before), "after": math.exp(n_tokens * after)}
