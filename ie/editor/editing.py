"""What `ie edit` does: edit requests in, patch files out, each with what it changed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from ie.base.asking import Ask, answers, log_likelihoods, matches
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.update import Factors, Update
from ie.data.record import Stripped
from ie.editor.editor import Editor
from ie.editor.files import EditorInfo, load_editor, load_info
from ie.editor.methods import editor_method, joint_update, update_under
from ie.editor.request import EditRequest
from ie.patch.info import Kept, Parent, PatchBase, PatchInfo, Probed
from ie.patch.lowrank import compress, energy_kept, select, side_by_side, stack
from ie.patch.patch import Patch
from ie.patch.stacking import Part, split, stacked
from ie.versions import now, versions

__all__ = [
    "EditSettings",
    "RequestSettings",
    "edit",
    "make_joint_patch",
    "make_patches",
    "make_sequential_patch",
]

_BATCH_SIZE = 32
_N_DIGITS = 4  # of a patch's number in its folder
_LEAST_ENERGY = 0.9995  # of a compressed update that rounding to fp16 must leave; else the patch stays fp32


class RequestSettings(BaseModel):
    """One edit as the command line takes it, with prompts that should not move."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Stripped
    target: Stripped
    instruction: str | None = None
    probes: tuple[Stripped, ...] = ()


class EditSettings(BaseModel):
    """What `ie edit` can be told; what is at `out` already is replaced, of a folder the patches.

    Attributes:
        requests: the edits.
        many: write a folder of patches and report a list, also for one edit.
        together: one patch for all edits in place of a folder: `joint` by least squares over all of them, or
            `sequential`, a stack of edits each of which is computed on the model as edited so far.
        regularisation: of `joint`: λ as a share, see `ie.editor.least_squares`; None takes the editor's.
        editor: editor folder.
        model: the base model; None takes the one that the editor was trained for.
        out: patch file, or folder of patch files.
        rank: the largest rank of a module's change; None for the smallest that keeps 99.9 % of the update's energy.
        patch_dtype: what the file holds: `float32`, `bfloat16`, `float16`; `auto` is float16 where that is precise.
        quant: see `load_base`.
        dtype: see `load_base`.
        device: see `load_base`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: tuple[RequestSettings, ...]
    many: bool = False
    together: Literal["joint", "sequential"] | None = None
    regularisation: PositiveFloat | None = None
    editor: Path = Path("ie-editor")
    model: str | None = None
    out: Path = Path("patch.safetensors")
    rank: PositiveInt | None = None
    patch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quant: str = "auto"
    dtype: str = "auto"
    device: str = "auto"


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
    if settings.together is not None:
        return _together(base, editor, info, settings)
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
    if settings.many:
        written = {Path(one["patch"]) for one in results}
        for earlier in settings.out.glob(f"{'[0-9]' * _N_DIGITS}-*.safetensors"):  # as `_name` has it
            if earlier not in written:
                earlier.unlink()
    _name_kinds(base, editor, info, settings.requests, results)
    return {"edits": results} if settings.many else results[0]


def _together(base: Base, editor: Editor, info: EditorInfo, settings: EditSettings) -> dict[str, Any]:
    """One patch for all edits, and what each does under it."""
    began = time.monotonic()
    names = [_name(i, one.prompt) for i, one in enumerate(settings.requests)]
    told: list[dict[str, Any]]
    if settings.together == "joint":
        update = joint_update(base, editor, [_request(one) for one in settings.requests], settings.regularisation)
        patch = make_joint_patch(
            base, update, settings.requests, info, settings.rank, settings.patch_dtype, names=names
        )
        told = [{"kept": patch.info.kept} for _ in names]
    else:
        patch, told = make_sequential_patch(
            base, editor, settings.requests, info, settings.rank, settings.patch_dtype, names=names
        )
    seconds = (time.monotonic() - began) / len(names)
    n_bytes = patch.save(settings.out)
    documents = [parent.info for parent in patch.info.parents] or [patch.info]  # a stack of one edit is a plain patch
    edits = []
    for document, end in zip(documents, told, strict=True):
        at_end = replace(patch, info=document.model_copy(update=end))
        edits.append(_describe(base, at_end, settings.out, n_bytes, seconds))
    _name_kinds(base, editor, info, settings.requests, edits)
    result = {"patch": str(settings.out), "bytes": n_bytes, "rank": patch.rank, "dtype": patch.dtype, "edits": edits}
    if settings.together == "sequential":
        for entry, document in zip(edits, documents, strict=True):
            entry["took_at_once"] = document.took
        at_once = [entry for entry in edits if entry["took_at_once"]]
        result["still_take"] = sum(entry["took"] for entry in at_once) / len(at_once) if at_once else None
    return result


def _name_kinds(
    base: Base, editor: Editor, info: EditorInfo, requests: Sequence[RequestSettings], results: list[dict[str, Any]]
) -> None:
    """Say of each edit as which of the editor's tasks it takes the instruction: `unknown` for none of them.

    Nothing is said where the editor doesn't tell tasks apart, or there is no instruction.
    """
    if editor.kinds is None:
        return
    names = (*info.tasks, "unknown")
    nearest = editor.kinds(base.read([one.instruction for one in requests])).argmax(-1).tolist()
    for one, kind, result in zip(requests, nearest, results, strict=True):
        if one.instruction is not None:
            result["kind"] = names[kind]


def make_joint_patch(
    base: Base,
    update: Update,
    requests: Sequence[RequestSettings],
    info: EditorInfo,
    rank: int | None = None,
    dtype: str = "auto",
    *,
    names: Sequence[str],
) -> Patch:
    """One patch for all edits, compressed; its parents say what each edit does under it.

    Args:
        base: the base model.
        update: the joint update, a batch of one.
        requests: the edits.
        info: the editor that made the update.
        rank: see `EditSettings`.
        dtype: see `EditSettings`.
        names: of the edits, for people.
    """
    patch = _compressed(_details(base, None, info), update, rank, dtype)
    parents = tuple(
        Parent(
            name=name,
            dtype=patch.dtype,
            ranks={},
            took=seen["took"],
            info=_details(base, one, info).model_copy(update=seen),
        )
        for name, one, seen in zip(names, requests, _asked(base, requests, patch.update()), strict=True)
    )
    took = all(parent.took for parent in parents)
    return replace(patch, info=patch.info.model_copy(update={"took": took, "parents": parents}))


def make_sequential_patch(
    base: Base,
    editor: Editor,
    requests: Sequence[RequestSettings],
    info: EditorInfo,
    rank: int | None = None,
    dtype: str = "auto",
    *,
    names: Sequence[str],
) -> tuple[Patch, list[dict[str, Any]]]:
    """A stack of edits, each computed on the model as edited so far, compressed and rounded.

    Args:
        base: the base model.
        editor: what makes the edits.
        requests: the edits, in their order.
        info: of the editor.
        rank: of each edit; see `EditSettings`.
        dtype: see `EditSettings`.
        names: of the edits, for people.

    Returns:
        The stack, whose parents' own documents say what each edit did right when it was made, and for each edit what
        it does under all of them.
    """
    so_far: dict[str, Factors] = {}
    parts: list[Part] = []
    for name, one in zip(names, requests, strict=True):
        update = select(update_under(base, editor, [_request(one)], so_far or None), 0)
        patch = _compressed(_details(base, one, info), update, rank, dtype)
        so_far = stack([so_far, patch.update()])
        at_once = patch.info.model_copy(update=_asked(base, [one], so_far)[0])
        parts += split(replace(patch, info=at_once), Path(name))
    told = _asked(base, requests, so_far)
    return stacked(parts, base, [one["took"] for one in told]), told


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
    made = [_compressed(_details(base, one, info), select(update, i), rank, dtype) for i, one in enumerate(requests)]
    seen = _asked(base, requests, side_by_side([one.update() for one in made]))
    return [replace(patch, info=patch.info.model_copy(update=told)) for patch, told in zip(made, seen, strict=True)]


def _asked(base: Base, requests: Sequence[RequestSettings], update: Update) -> list[dict[str, Any]]:
    """What the model says to each request and its probes before and after, under the request's own edit or all."""
    asks = [
        Ask(prompt, answer, edit=i)
        for i, one in enumerate(requests)
        for prompt, answer in ((one.prompt, one.target), *((probe, "") for probe in one.probes))
    ]
    before, after = iter(answers(base, asks)), iter(answers(base, asks, update))
    seen = []
    for one in requests:
        old, new = next(before), next(after)
        probes = tuple(Probed(prompt=probe, before=next(before), after=next(after)) for probe in one.probes)
        seen.append({"before": old, "after": new, "took": matches(new, one.target), "probes": probes})
    return seen


def _details(base: Base, one: RequestSettings | None, info: EditorInfo) -> PatchInfo:
    """The document of an edit, or of a patch for many, before it is known what the patch does to the model."""
    return PatchInfo(
        base=PatchBase(id=base.id, fingerprint=base.fingerprint, revision=base.revision),
        editor=info.fingerprint,
        instruction=one.instruction if one else None,
        prompt=one.prompt if one else None,
        target=one.target if one else None,
        before=None,
        after=None,
        took=None,
        templates=info.training.get("templates"),
        created=now(),
        versions=versions(),
    )


def _compressed(details: PatchInfo, update: Mapping[str, Factors], rank: int | None, dtype: str) -> Patch:
    """A patch with its factors as the file will hold them."""
    exact = Patch(details, {name: (a[0], b[0]) for name, (a, b) in compress(update, max_rank=rank).items()})
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
    return settings.out / f"{_name(index, prompt)}.safetensors"


def _name(index: int, prompt: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")[:40]
    return f"{index + 1:0{_N_DIGITS}d}-{slug}"


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
    n_tokens = base.encode(ask.prompt, ask.answer).n_answer
    before, after = log_likelihoods(base, [ask])[0], log_likelihoods(base, [ask], patch.update())[0]
    return {"before": math.exp(n_tokens * before), "after": math.exp(n_tokens * after)}
